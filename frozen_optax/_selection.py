"""Which leaves: what a user may write for `frozen` or `trainable`, as a selector."""

from __future__ import annotations

import inspect
import itertools
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from frozen_optax._masks import ByMask, as_bool, is_function
from frozen_optax._predicates import ByNnxFilter, ByPredicate
from frozen_optax._resolution import Resolution
from frozen_optax._selectors import ByPath, Rest, Selector, Union, resolve
from frozen_optax._typing import Frozen, Leaf, PyTree, Where
from frozen_optax._where import within


def _takes(function: Callable[..., Any], count: int) -> bool:
    try:
        inspect.signature(function).bind(*range(count))
    except TypeError:
        return False
    except ValueError:  # a builtin without a signature: let the call decide
        return True
    return True


def by_path(
    *patterns: str | re.Pattern[str] | Sequence[str | re.Pattern[str]], search: bool = False
) -> Selector:
    """The leaves whose path matches one of the patterns.

    A `str` is a glob, read segment by segment: `*`, `?`, `[...]` and `[!...]` stay within a
    segment, and `**` as a whole segment spans any number of segments, none included. It selects the
    leaves whose path it matches and those with an ancestor that it matches: naming a module names
    all below it. Upper and lower case differ. A compiled regex has to match the whole path.

    Args:
      *patterns: globs or compiled regexes, at least one; lists of them are taken as if they stood
        one by one.
      search: whether all of them are regexes, given as a `str` or compiled, and each is to be found
        anywhere in a path, as by `re.search`: what configuration files hold.

    Returns:
      A `Selector`. Each pattern has to select something in every tree it is used on (`**` and `*`
      excepted); a hole (`optax.MaskedNode`) counts for whatever could lie below it.

    Raises:
      TypeError: a pattern is neither a `str` nor a compiled regex.
      ValueError: a glob cannot be read, and the message says how to write it, or with `search` a
        regex. When used on a tree: a pattern selects nothing.

    Example:
      >>> import frozen_optax as fo
      >>> params = {"encoder": {"layer_1": 1.0, "layer_10": 2.0}, "encoder_norm": 3.0}
      >>> fo.by_path("encoder").paths(params)
      ['encoder/layer_1', 'encoder/layer_10']
      >>> fo.by_path("encoder/layer_1", "*_norm").paths(params)
      ['encoder/layer_1', 'encoder_norm']
      >>> fo.by_path([".*enc.*1$", "norm"], search=True).paths(params)
      ['encoder/layer_1', 'encoder_norm']
    """
    listed = (given if isinstance(given, (list, tuple)) else [given] for given in patterns)
    one_by_one: tuple[Any, ...] = tuple(itertools.chain.from_iterable(listed))
    if not one_by_one:
        raise ValueError(
            "by_path() needs at least one pattern. To select nothing write by_mask(False)."
        )
    return ByPath(one_by_one, search)


def by_mask(mask_or_fn: PyTree | Callable[[PyTree], PyTree]) -> Selector:
    """The leaves where a mask is True.

    Args:
      mask_or_fn: a bool, a pytree of bools with the parameters' structure or a prefix of it, or a
        function of the parameters that returns one, as `optax.masked` takes it.

    Returns:
      A `Selector`.

    Raises:
      TypeError: when used, a leaf of the mask is no bool.
      ValueError: when used, the mask is no prefix of the tree; the message names the path.

    Example:
      >>> import frozen_optax as fo
      >>> params = {"encoder": {"w": 1.0, "b": 2.0}, "head": 3.0}
      >>> fo.by_mask({"encoder": True, "head": False}).paths(params)
      ['encoder/b', 'encoder/w']
    """
    if not is_function(mask_or_fn):
        # In containers of its own, as the user may change the ones that were given.
        return ByMask(jax.tree.map(lambda leaf: leaf, mask_or_fn))
    if not _takes(mask_or_fn, 1):
        raise TypeError(
            f"by_mask takes a function of the parameters, found {mask_or_fn!r}. Did you mean "
            "by_predicate?"
        )
    return ByMask(mask_or_fn)


def by_predicate(predicate: Callable[[str, Leaf], bool], *, may_be_empty: bool = False) -> Selector:
    """The leaves for which `predicate(path, leaf)` is True.

    Args:
      predicate: a function of the path and of a `jax.ShapeDtypeStruct` with the parameter's shape
        and dtype (values are not shown, as they are not known while tracing). What an
        `nnx.Variable` holds comes as a Variable of that class, so `isinstance(leaf, nnx.LoRAParam)`
        tells what one would expect; a leaf that is no array comes as it is.
      may_be_empty: whether it may select nothing, for generic code. It is an error otherwise.

    Returns:
      A `Selector`.

    Raises:
      TypeError: `predicate` does not take two arguments or, when used, does not return a bool, or
        reads its path as a tuple of keys, as an NNX filter does.
      ValueError: when used, it selects nothing.

    Example:
      >>> import frozen_optax as fo, jax.numpy as jnp
      >>> params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
      >>> fo.by_predicate(lambda path, leaf: leaf.ndim < 2).paths(params)
      ['b']
    """
    if not callable(predicate) or not _takes(predicate, 2):
        raise TypeError(
            f"by_predicate takes a function (path, leaf) -> bool, found {predicate!r}. A function "
            "of the parameters that returns a mask goes through by_mask."
        )
    return ByPredicate(predicate, may_be_empty)


def _nnx_filter(value: Frozen) -> Selector | None:
    """A filter of NNX as a selector, if it can be told from a predicate.

    These are NNX's own classes, and types of Variables.
    """
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:  # nobody can have made one
        return None
    is_type = isinstance(value, type) and issubclass(value, nnx.Variable)
    modules = {base.__module__ for base in inspect.getmro(type(value))}
    # Those of NNX, and of nnx_filter.
    if not (is_type or modules & {nnx.filterlib.__name__, "frozen_optax._nnx._filter"}):
        return None
    return ByNnxFilter(nnx.filterlib.to_predicate(value), filter=value)


def _is_pattern_or_function(item: Frozen) -> bool:
    return isinstance(item, (Selector, str, re.Pattern)) or is_function(item)


def as_selector(selection: Frozen, in_part: bool = False) -> Selector:
    """What a user may write for `frozen` or `trainable`, as a `Selector` of whole leaves.

    An optimizer that freezes elements within leaves says more than that. It is refused, unless who
    asks takes the elements `in_part`, by `_elements.py`.
    """
    if isinstance(selection, Selector):
        return selection
    if isinstance(selection, (str, re.Pattern)):
        return by_path(selection)
    if _is_optimizer(selection):
        return _of_optimizer(selection, in_part)
    if (of_nnx := _nnx_filter(selection)) is not None:
        return of_nnx
    if is_function(selection):
        # Of one argument it is a mask as optax takes it, of two a predicate.
        is_mask = not _takes(selection, 2) and _takes(selection, 1)
        return by_mask(selection) if is_mask else by_predicate(selection)
    if isinstance(selection, (list, tuple)) and not hasattr(selection, "_fields"):
        if not selection:
            raise ValueError(
                "an empty list of patterns selects nothing. If that is meant, write False."
            )
        if all(map(_is_pattern_or_function, selection)):
            if all(isinstance(item, (str, re.Pattern)) for item in selection):
                return by_path(*selection)
            return Union(tuple(map(as_selector, selection)))
    if jax.tree_util.all_leaves([selection]) and as_bool(selection) is None:
        raise TypeError(
            f"cannot select leaves by {selection!r} of type {type(selection).__name__}: expected a "
            "Selector, a glob, a compiled regex, a list of these, a predicate "
            "(path, leaf) -> bool, a bool or pytree of bools, or the optimizer that with_frozen "
            "returned."
        )
    return by_mask(selection)


def _is_optimizer(value: Frozen) -> bool:
    if isinstance(value, optax.GradientTransformation):
        return True
    has_both = all(callable(getattr(value, name, None)) for name in ("init", "update"))
    return has_both and not isinstance(value, type)


def _of_optimizer(optimizer: Frozen, in_part: bool) -> Selector:
    """What an optimizer holds still, if `with_frozen` made it."""
    frozen = getattr(optimizer, "frozen", None)
    elements = getattr(optimizer, "elements", None)
    if isinstance(frozen, Selector) and elements is not None and not in_part:
        raise TypeError(
            f"this optimizer freezes elements within leaves, {elements!r}, and what it is given to "
            "knows whole leaves only. For those that are frozen as a whole give tx.frozen. "
            "Elements are known to with_frozen, grad, value_and_grad, jit, nnx_jit, apply_updates, "
            "restore, assert_frozen, fingerprint, save_trained and summary."
        )
    if isinstance(frozen, Selector):
        return frozen
    raise TypeError(
        "this optimizer does not say what is frozen: only the one that with_frozen returned does, "
        "and a wrapper around it (optax.chain, optax.MultiSteps) or a copy made by jax.tree.map "
        "does not. Give that one, tx = fo.with_frozen(...), or put the wrapper inside it."
    )


def frozen_selector(
    frozen: Frozen, trainable: Frozen, where: Where | None = None, *, in_part: bool = False
) -> Selector:
    """The selector of the frozen leaves, from exactly one of the first two arguments.

    With `where` it selects in the whole state, and nothing outside of what `where` names. `in_part`
    says that who asks takes elements within leaves, too, or passes such leaves through whole.
    """
    if (frozen is None) == (trainable is None):
        given = "neither" if frozen is None else "both"
        raise TypeError(
            f"say what is frozen, or trainable=..., exactly one of the two: {given} was given."
        )
    if _is_optimizer(trainable):
        raise TypeError("an optimizer says what is frozen, not what is trainable: write frozen=tx.")
    if trainable is None:
        return within(as_selector(frozen, in_part), where)
    return within(Rest(as_selector(trainable), may_be_empty=True), where)


def resolve_frozen(
    frozen: Frozen,
    trainable: Frozen,
    tree: PyTree,
    *,
    where: Where | None = None,
    to_train: bool = False,
    to_check: bool = False,
) -> Resolution:
    """The frozen leaves of `tree`, from the arguments as a user gave them, at once.

    What sees its tree only later keeps the `frozen_selector`, and calls `resolve` then.
    """
    selector = frozen_selector(frozen, trainable, where)
    return resolve(selector, tree, to_train=to_train, to_check=to_check)
