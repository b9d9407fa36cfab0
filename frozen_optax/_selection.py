"""Which leaves: globs, regexes, predicates and masks over a pytree, as values that combine.

A selector is resolved against a tree once for each structure and gives a `Resolution`: the leaves' paths and, leaf by
leaf, whether it is selected. Everything else in the library reads resolutions and never paths.

A path is `jax.tree_util.keystr(path, simple=True, separator="/")`. All matching is on that string, so Haiku's keys,
which hold slashes, read as if they were nested, and two leaves that share a path are selected together.
"""

from __future__ import annotations

import abc
import dataclasses
import enum
import functools
import inspect
import re
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import numpy as np

from frozen_optax._globs import Glob, nearest_paths
from frozen_optax._trees import (
    Mismatch,
    PyTree,
    Resolution,
    View,
    align,
    describe,
    flatten_with_holes,
    is_hole,
    is_traced,
    keystr,
    remember,
    spec,
)

# A Selector, a glob, a regex, a list or tuple of these, a predicate, a bool or a (prefix) pytree of bools.
Selection: TypeAlias = Any


class _Reads(enum.IntEnum):
    """What of a tree a selector looks at, hence for how long its answer holds."""

    STRUCTURE = 0
    SHAPES = 1  # and dtypes
    VALUES = 2


class Selector(abc.ABC):
    """A choice of leaves, made by `by_path`, `by_mask` and `by_predicate` and combined with `|`, `&` and `~`.

    A selector is a value: it prints as the code that makes it, compares by its parts, and is hashable where they are.
    It works on any pytree, of arrays, tracers or `jax.ShapeDtypeStruct`, and remembers what it selected for the last
    few tree structures, so that tracing a step again does not match the patterns again (a mask function, which may read
    values, is called each time).

    Example:
      >>> import frozen_optax as fo
      >>> params = {"encoder": {"kernel": 1.0, "bias": 2.0}, "head": {"kernel": 3.0, "bias": 4.0}}
      >>> selector = fo.by_path("encoder") & ~fo.by_path("**/bias")
      >>> selector
      by_path('encoder') & ~by_path('**/bias')
      >>> selector.mask(params)
      {'encoder': {'bias': False, 'kernel': True}, 'head': {'bias': False, 'kernel': False}}
      >>> selector.paths(params)
      ['encoder/kernel']
    """

    @abc.abstractmethod
    def _select(self, view: View) -> np.ndarray:
        """A bool for each leaf."""

    @property
    def _reads(self) -> _Reads:
        """What the answer depends on."""
        return _Reads.STRUCTURE

    @functools.cached_property
    def _cache(self) -> dict[Any, Resolution]:
        return {}

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # pyright: ignore

    def _resolve(self, tree: PyTree) -> Resolution:
        """The selection for `tree`, from memory when a tree of the same structure was seen before."""
        return self._resolve_flat(tree, *jax.tree.flatten(tree))

    def _resolve_flat(self, tree: PyTree, leaves: list[Any], treedef: Any) -> Resolution:
        key = (treedef, tuple(map(spec, leaves)) if self._reads is _Reads.SHAPES else None)
        remembers = self._reads is not _Reads.VALUES
        try:
            if remembers and (known := self._cache.get(key)) is not None:
                return known
        except (TypeError, ValueError):  # static fields that cannot be hashed or compared
            remembers = False
        view = View.of(tree)
        resolution = Resolution(treedef, view.paths, tuple(self._select(view).tolist()))
        if remembers:
            remember(self._cache, key, resolution)
        return resolution

    def mask(self, tree: PyTree) -> PyTree:
        """Bools in exactly the structure of `tree`, True where selected; `None` and holes stay what they are.

        The bound method serves as it is wherever a mask function is taken: `optax.masked(tx, selector.mask)`. Optax
        calls it on gradients, too: where dtypes matter to a predicate, hand over `selector.mask(params)`.

        Args:
          tree: a pytree of arrays, tracers or `jax.ShapeDtypeStruct`.

        Raises:
          ValueError: a pattern selects nothing, or a mask does not fit; the message names it.
        """
        resolution = self._resolve(tree)
        return resolution.unflatten(resolution.selected)

    def labels(self, tree: PyTree, selected: Any = "frozen", rest: Any = "trainable") -> PyTree:
        """Labels in the structure of `tree`, for `optax.partition`.

        Args:
          tree: as for `mask`.
          selected: the label of the selected leaves.
          rest: the label of all others.

        Example:
          >>> import frozen_optax as fo
          >>> fo.by_path("encoder").labels({"encoder": 1.0, "head": 2.0})
          {'encoder': 'frozen', 'head': 'trainable'}
        """
        resolution = self._resolve(tree)
        return resolution.unflatten([selected if chosen else rest for chosen in resolution.selected])

    def paths(self, tree: PyTree) -> list[str]:
        """The paths of the selected leaves, in the tree's order."""
        return list(self._resolve(tree).chosen)

    def __or__(self, other: Selector | str | re.Pattern[str]) -> Selector:
        return _Any((self, as_selector(other))) if isinstance(other, _OPERANDS) else NotImplemented

    def __ror__(self, other: str | re.Pattern[str]) -> Selector:
        return as_selector(other) | self if isinstance(other, _OPERANDS) else NotImplemented

    def __and__(self, other: Selector | str | re.Pattern[str]) -> Selector:
        return _All((self, as_selector(other))) if isinstance(other, _OPERANDS) else NotImplemented

    def __rand__(self, other: str | re.Pattern[str]) -> Selector:
        return as_selector(other) & self if isinstance(other, _OPERANDS) else NotImplemented

    def __invert__(self) -> Selector:
        return _Not(self)

    def __bool__(self) -> bool:
        raise TypeError(
            f"{self!r} is neither true nor false. Selectors combine with |, & and ~, not with or, and, not; where a "
            "mask function is wanted, give selector.mask."
        )


def _repr(pattern: str | re.Pattern[str]) -> str:
    """As `repr`, which cuts a regex off after 200 characters."""
    if isinstance(pattern, str):
        return repr(pattern)
    flags = repr(re.compile("", pattern.flags)).removeprefix("re.compile(''").removesuffix(")")
    return f"re.compile({pattern.pattern!r}{flags})"


@dataclasses.dataclass(frozen=True, repr=False)
class _Path(Selector):
    patterns: tuple[str | re.Pattern[str], ...]

    @functools.cached_property
    def _matchers(self) -> list[Glob | re.Pattern[str]]:
        return [Glob(pattern) if isinstance(pattern, str) else pattern for pattern in self.patterns]

    def _select(self, view: View) -> np.ndarray:
        selected = np.zeros(len(view.paths), bool)
        for matcher in self._matchers:
            regex = matcher.regex if isinstance(matcher, Glob) else matcher
            matches = np.fromiter((regex.fullmatch(path) is not None for path in view.paths), bool, len(view.paths))
            if not matches.any() and not self._may_be_empty(matcher, view):
                pattern = matcher.glob if isinstance(matcher, Glob) else matcher
                count = len(view.paths)
                is_glob = isinstance(pattern, str)
                nearest = nearest_paths(
                    pattern if is_glob else pattern.pattern, view.paths, None if is_glob else pattern
                )
                message = f"by_path({_repr(pattern)}) selects nothing: it matches none of the {count} leaves."
                raise ValueError(f"{message} {nearest}".rstrip())
            selected |= matches
        return selected

    @staticmethod
    def _may_be_empty(matcher: Glob | re.Pattern[str], view: View) -> bool:
        if isinstance(matcher, re.Pattern):  # no telling what a regex could match below a hole
            return bool(view.holes)
        return matcher.regex.fullmatch("") is not None or any(map(matcher.may_match_below, view.holes))

    def __repr__(self) -> str:
        return f"by_path({', '.join(map(_repr, self.patterns))})"


@dataclasses.dataclass(frozen=True, repr=False)
class _Predicate(Selector):
    predicate: Callable[[str, Any], bool]

    @property
    def _reads(self) -> _Reads:
        return _Reads.SHAPES

    def _select(self, view: View) -> np.ndarray:
        selected = []
        for path, leaf in zip(view.paths, view.specs, strict=True):
            try:
                answer = self.predicate(path, leaf)
            except AttributeError as error:
                raise TypeError(
                    f"{self!r} failed at {path!r}: {error}. A predicate sees a leaf's shape and dtype, not its "
                    "values; a function that needs values goes through by_mask."
                ) from error
            if not isinstance(answer, (bool, np.bool_)):
                raise TypeError(f"{self!r} returned {answer!r} at {path!r}, expected a bool.")
            selected.append(bool(answer))
        return np.array(selected, bool)

    def __repr__(self) -> str:
        return f"by_predicate({getattr(self.predicate, '__qualname__', repr(self.predicate))})"


def _as_bool(leaf: Any) -> bool | None:
    """A bool, or a bool array without dimensions whose value is known, as a bool; None for anything else."""
    if isinstance(leaf, (bool, np.bool_)):
        return bool(leaf)
    known = isinstance(leaf, (np.ndarray, jax.Array)) and not is_traced(leaf)
    return bool(leaf) if known and leaf.shape == () and leaf.dtype == np.bool_ else None


@dataclasses.dataclass(frozen=True, repr=False)
class _Mask(Selector):
    mask_or_fn: Any

    @property
    def _reads(self) -> _Reads:
        return _Reads.VALUES if _is_function(self.mask_or_fn) else _Reads.STRUCTURE

    def _select(self, view: View) -> np.ndarray:
        mask = self.mask_or_fn(view.tree) if _is_function(self.mask_or_fn) else self.mask_or_fn
        for path, leaf in flatten_with_holes(mask):
            if not is_hole(leaf) and _as_bool(leaf) is None:
                shown = describe(leaf) if hasattr(leaf, "shape") else f"{describe(leaf)} ({leaf!r})"
                raise TypeError(
                    f"a mask holds True and False, found {shown} at {keystr(path) or 'the root'!r}. "
                    "Patterns and predicates go in a list of their own; a mask cannot depend on traced values."
                )
        try:
            pairs = list(zip(jax.tree.leaves(mask), align(mask, view.tree), strict=True))
        except Mismatch as mismatch:
            path, found, expected = mismatch.args
            raise ValueError(
                f"the mask and the parameters differ in structure at {path!r}: the mask has {found}, the parameters "
                f"have {expected}. A mask has the parameters' structure or a prefix of it."
            ) from None
        return np.array([_as_bool(chosen) for chosen, part in pairs for _ in jax.tree.leaves(part)], bool)

    def __repr__(self) -> str:
        return f"by_mask({getattr(self.mask_or_fn, '__qualname__', repr(self.mask_or_fn))})"


def _operand(selector: Selector) -> str:
    return f"({selector!r})" if isinstance(selector, (_Any, _All)) else repr(selector)


@dataclasses.dataclass(frozen=True, repr=False)
class _Combined(Selector):
    parts: tuple[Selector, ...]

    @property
    def _reads(self) -> _Reads:
        return max(part._reads for part in self.parts)


class _Any(_Combined):
    def _select(self, view: View) -> np.ndarray:
        return np.any([part._select(view) for part in self.parts], axis=0)

    def __repr__(self) -> str:
        return " | ".join(map(_operand, self.parts))


class _All(_Combined):
    def _select(self, view: View) -> np.ndarray:
        return np.all([part._select(view) for part in self.parts], axis=0)

    def __repr__(self) -> str:
        return " & ".join(map(_operand, self.parts))


@dataclasses.dataclass(frozen=True, repr=False)
class _Not(Selector):
    part: Selector

    @property
    def _reads(self) -> _Reads:
        return self.part._reads

    def _select(self, view: View) -> np.ndarray:
        return ~self.part._select(view)

    def _resolve_flat(self, tree: PyTree, leaves: list[Any], treedef: Any) -> Resolution:
        # Remembered there, as `trainable=` makes a new negation at each use.
        return self.part._resolve_flat(tree, leaves, treedef).complement

    def __invert__(self) -> Selector:
        return self.part

    def __repr__(self) -> str:
        return f"~{_operand(self.part)}"


_OPERANDS = (Selector, str, re.Pattern)


def _is_function(value: Any) -> bool:
    """Whether `value` is to be called, and not a mask that happens to be callable (a module of bools)."""
    return callable(value) and not any(_as_bool(leaf) is not None for leaf in jax.tree.leaves(value))


def _takes(function: Callable[..., Any], count: int) -> bool:
    try:
        inspect.signature(function).bind(*range(count))
    except TypeError:
        return False
    except ValueError:  # a builtin without a signature: let the call decide
        return True
    return True


def by_path(*patterns: str | re.Pattern[str]) -> Selector:
    """The leaves whose path matches one of the patterns.

    A `str` is a glob, read segment by segment: `*`, `?`, `[...]` and `[!...]` stay within a segment, and `**` as a
    whole segment spans any number of segments, none included. It selects the leaves whose path it matches and those
    with an ancestor that it matches: naming a module names all below it. Upper and lower case differ. A compiled regex
    has to match the whole path.

    Args:
      *patterns: globs or compiled regexes, at least one.

    Returns:
      A `Selector`. Each pattern has to select something in every tree it is used on (`**` and `*` excepted); a hole
      (`optax.MaskedNode`) counts for whatever could lie below it.

    Raises:
      TypeError: a pattern is neither a `str` nor a compiled regex.
      ValueError: a glob cannot be read; the message says how to write it. When used on a tree: a pattern selects
        nothing.

    Example:
      >>> import frozen_optax as fo
      >>> params = {"encoder": {"layer_1": 1.0, "layer_10": 2.0}, "encoder_norm": 3.0}
      >>> fo.by_path("encoder").paths(params)
      ['encoder/layer_1', 'encoder/layer_10']
      >>> fo.by_path("encoder/layer_1", "*_norm").paths(params)
      ['encoder/layer_1', 'encoder_norm']
    """
    if not patterns:
        raise ValueError("by_path() needs at least one pattern. To select nothing write by_mask(False).")
    for pattern in patterns:
        if not isinstance(pattern, (str, re.Pattern)):
            raise TypeError(
                f"by_path takes globs and compiled regexes one by one, by_path('a', 'b'), found {describe(pattern)}: "
                f"{pattern!r}."
            )
        if isinstance(pattern, re.Pattern) and not isinstance(pattern.pattern, str):
            raise TypeError(f"by_path matches text, found the bytes regex {pattern!r}.")
        if isinstance(pattern, str):
            _ = Glob(pattern).regex  # a glob that cannot be read is an error where it is written
    return _Path(patterns)


def by_mask(mask_or_fn: PyTree | Callable[[PyTree], PyTree]) -> Selector:
    """The leaves where a mask is True.

    Args:
      mask_or_fn: a bool, a pytree of bools with the parameters' structure or a prefix of it, or a function of the
        parameters that returns one, as `optax.masked` takes it.

    Returns:
      A `Selector`.

    Raises:
      TypeError: when used, a leaf of the mask is no bool.
      ValueError: when used, the mask is no prefix of the tree; the message names the path.

    Example:
      >>> import frozen_optax as fo
      >>> fo.by_mask({"encoder": True, "head": False}).paths({"encoder": {"w": 1.0, "b": 2.0}, "head": 3.0})
      ['encoder/b', 'encoder/w']
    """
    if _is_function(mask_or_fn) and not _takes(mask_or_fn, 1):
        raise TypeError(f"by_mask takes a function of the parameters, found {mask_or_fn!r}. Did you mean by_predicate?")
    return _Mask(mask_or_fn if _is_function(mask_or_fn) else jax.tree.map(lambda leaf: leaf, mask_or_fn))


def by_predicate(predicate: Callable[[str, Any], bool]) -> Selector:
    """The leaves for which `predicate(path, leaf)` is True.

    Args:
      predicate: a function of the path and of a `jax.ShapeDtypeStruct` with the parameter's shape and dtype (values
        are not shown, as they are not known while tracing); a leaf that is no array comes as it is. It may select
        nothing.

    Returns:
      A `Selector`.

    Raises:
      TypeError: `predicate` does not take two arguments or, when used, does not return a bool.

    Example:
      >>> import frozen_optax as fo, jax.numpy as jnp
      >>> fo.by_predicate(lambda path, leaf: leaf.ndim < 2).paths({"w": jnp.ones((2, 2)), "b": jnp.ones(2)})
      ['b']
    """
    if not callable(predicate) or not _takes(predicate, 2):
        raise TypeError(
            f"by_predicate takes a function (path, leaf) -> bool, found {predicate!r}. A function of the "
            "parameters that returns a mask goes through by_mask."
        )
    return _Predicate(predicate)


def as_selector(selection: Selection) -> Selector:
    """What a user may write for `frozen` or `trainable`, as a `Selector`."""
    if isinstance(selection, Selector):
        return selection
    if isinstance(selection, (str, re.Pattern)):
        return by_path(selection)
    if _is_function(selection):
        return by_predicate(selection)
    if isinstance(selection, (list, tuple)) and not hasattr(selection, "_fields"):
        if not selection:
            raise ValueError("an empty list of patterns selects nothing. If that is meant, write False.")
        if all(isinstance(item, (Selector, str, re.Pattern)) or _is_function(item) for item in selection):
            if all(isinstance(item, (str, re.Pattern)) for item in selection):
                return by_path(*selection)
            return _Any(tuple(map(as_selector, selection)))
    if jax.tree_util.all_leaves([selection]) and _as_bool(selection) is None:
        raise TypeError(
            f"cannot select leaves by {selection!r} of type {type(selection).__name__}: expected a Selector, a glob, a "
            "compiled regex, a list of these, a predicate (path, leaf) -> bool, or a bool or pytree of bools."
        )
    return by_mask(selection)


def frozen_selector(frozen: Selection, trainable: Selection) -> Selector:
    """The selector of the frozen leaves, from exactly one of the two arguments."""
    if (frozen is None) == (trainable is None):
        given = "neither" if frozen is None else "both"
        raise TypeError(f"say what is frozen, or trainable=..., exactly one of the two: {given} was given.")
    return as_selector(frozen) if trainable is None else ~as_selector(trainable)
