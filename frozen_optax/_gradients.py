"""Gradients of what is trained, and of nothing else.

They are computed, or taken from the state of a line search that has computed them.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from frozen_optax import _bits
from frozen_optax._elements import frozen_in_part, lay
from frozen_optax._lookups import trains_rows, value_and_grad_of_rows
from frozen_optax._messages import quoted
from frozen_optax._parts import Part
from frozen_optax._resolution import Resolution
from frozen_optax._trees import describe, require_same_structure
from frozen_optax._typing import Array, Frozen, Leaf, PyTree
from frozen_optax._variables import refuse_changed

# The collection of fp8's scales and histories, as `flax.linen.fp8_ops` calls it.
_OVERWRITTEN = "_overwrite_with_gradient"
_OF_MODULES = "Of a module take nnx.value_and_grad, whose gradients with_frozen takes, too."


def _gradient(
    resolution: Resolution, params: list[Leaf], trained: list[Leaf], holes: bool
) -> PyTree:
    """The gradient of the whole tree from those of what is trained."""
    whole = resolution.merge(map(_bits.known_zero, params), trained)
    return resolution.of_leaves.cut(whole) if holes else resolution.unflatten(whole)


def _parts_of(resolution: Resolution) -> list[Part | None]:
    """What trains of each trainable leaf, None for all of it."""
    indices = itertools.compress(itertools.count(), resolution.complement.selected)
    return [resolution.parts.get(index) for index in indices]


def _trains_rows(resolution: Resolution) -> bool:
    return any(map(trains_rows, resolution.parts.values()))


def _refuse_undifferentiable(resolution: Resolution, leaves: list[Leaf]) -> None:
    """Raise for a trainable leaf that no gradient can be taken of."""
    resolution = resolution.of_leaves
    for path, leaf in zip(resolution.complement.chosen, resolution.rest(leaves), strict=True):
        if not _bits.is_differentiable(leaf):
            raise TypeError(
                f"cannot differentiate by the trainable leaf {path!r}, {describe(leaf)}. Freeze it."
            )


def _refuse_overwritten(resolution: Resolution) -> None:
    """Raise for a frozen leaf of Flax's that is overwritten with its gradient.

    That is how fp8 scales are carried on: `TrainState.apply_gradients` puts the gradient in their
    place, and the zero of a frozen leaf would be one.
    """
    overwritten = [path for path in resolution.chosen if _OVERWRITTEN in path.split("/")]
    if overwritten:
        raise ValueError(
            f"the frozen leaves {quoted(overwritten)} are of the kind that Flax overwrites with "
            "their gradients, which would make them zero. They follow the data and are no weights: "
            "select among the others, 'params/encoder' for 'encoder'."
        )


def _as_places(argnums: Any) -> tuple[bool, tuple[int, ...]]:
    """Whether `argnums` is one position, and its positions; what counts as an integer is one."""
    try:
        return True, (operator.index(argnums),)
    except TypeError:
        return False, tuple(map(operator.index, argnums))


def value_and_grad(
    fun: Callable[..., Any],
    frozen: Frozen = None,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    holomorphic: bool = False,
    *,
    trainable: Frozen = None,
    holes: bool = False,
) -> Callable[..., tuple[Any, Any]]:
    """`jax.value_and_grad` with respect to the trainable leaves alone.

    Frozen leaves are not differentiated, while tracing and not by the compiler's grace, so they may
    be of any dtype: integers, bools, PRNG keys need no `allow_int`. The gradient has the full
    structure. That of a frozen leaf is zero in its shape and dtype, known to be zero while tracing:
    `with_frozen` and `apply_updates` do nothing for it. That of a leaf that is no array (a
    function, a Python number in an Equinox module), which is frozen in any case, is None.

    Of a leaf in which an optimizer given for `frozen` freezes elements, their gradient is zero.
    Where rows of it train and the function looks rows up in it, no gradient of the size of the leaf
    is computed: the function is linearized, and its transpose is taken with those rows in place of
    the leaf. It is called a second time where a part of it is differentiated by a `jax.custom_vjp`,
    and the leaf is then differentiated whole.

    Args:
      fun: a function of the parameters and other arguments that returns a scalar, as
        `jax.value_and_grad` takes it.
      frozen: the leaves that are frozen: a glob on their paths (`"encoder"`), a compiled regex, a
        `Selector`, a list of these, a predicate `(path, leaf) -> bool`, a bool, a pytree of bools,
        or the optimizer that `with_frozen` returned.
      argnums: which positional arguments to differentiate; a pattern is relative to each of them.
      has_aux: whether `fun` returns a pair of the scalar and auxiliary data.
      holomorphic: whether `fun` is promised to be holomorphic.
      trainable: the leaves that are not, instead of `frozen`: exactly one of the two is given.
      holes: leave a hole (`optax.MaskedNode`) for each frozen leaf instead of a zero. Zeros that
        leave a compiled function, or are carried through a `scan`, become arrays that take memory;
        holes do not. Every function here accepts them, and `with_frozen` outermost; optax's own
        wrappers around it do not.

    Returns:
      A function of the arguments of `fun` that returns what `jax.value_and_grad(fun, ...)` does.

    Raises:
      TypeError: not exactly one of `frozen` and `trainable` is given, or it is no way to select
        leaves. When called: `argnums` names an argument that is not given by position; a trainable
        leaf is no float or complex number. The message names it.
      ValueError: when called: a pattern selects nothing, or a mask does not fit; everything is
        frozen and nobody said so (`"**"`, `True`); `argnums` names an argument twice; a frozen leaf
        is one that Flax overwrites with its gradient.

    Example:
      >>> import frozen_optax as fo, jax.numpy as jnp
      >>> params = {"base": jnp.arange(3), "scale": jnp.array(2.0)}
      >>> value, grads = fo.value_and_grad(lambda p: p["scale"] * p["base"].sum(), "base")(params)
      >>> float(value), float(grads["scale"]), grads["base"].tolist()
      (6.0, 3.0, [0, 0, 0])
    """
    selector, elements = frozen_in_part(frozen, trainable)
    is_one, places = _as_places(argnums)

    @functools.wraps(fun)
    def value_and_grad_of_trainable(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if any(not -len(args) <= place < len(args) for place in places):
            raise TypeError(
                f"argnums is {argnums}, and {len(args)} arguments were given by position."
            )
        at = [place % len(args) for place in places]
        if len(set(at)) < len(at):
            raise ValueError(
                f"argnums is {argnums}, which names an argument twice among the {len(args)} given."
            )
        leaves = [jax.tree.leaves(args[place]) for place in at]
        # Leaves that train in part are differentiated whole: what reads them reads all of them.
        in_part = [lay(selector, elements, args[place], to_train=True) for place in at]
        resolutions = [resolution.of_leaves for resolution in in_part]

        for resolution, each in zip(resolutions, leaves, strict=True):
            _refuse_undifferentiable(resolution, each)
            _refuse_overwritten(resolution)

        def of_trainable(*trained: list[Leaf]) -> Any:
            whole = list(args)
            for place, resolution, each, part in zip(at, resolutions, leaves, trained, strict=True):
                whole[place] = resolution.fill(each, part)
            before = [jax.tree.leaves(whole[place]) for place in at]
            result = fun(*whole, **kwargs)
            for place, each in zip(at, before, strict=True):
                refuse_changed(each, whole[place], _OF_MODULES)
            return result

        parts = [
            resolution.rest(each) for resolution, each in zip(resolutions, leaves, strict=True)
        ]
        every_part = tuple(range(len(parts)))
        found = None
        if any(map(_trains_rows, in_part)) and not holomorphic:
            of_leaves = [part for resolution in in_part for part in _parts_of(resolution)]
            found = value_and_grad_of_rows(of_trainable, tuple(parts), of_leaves, has_aux)
        if found is not None:
            value, of_rows = found
            flat = iter(of_rows)
            narrowed = [[next(flat) for _ in part] for part in parts]
        else:
            differentiate = jax.value_and_grad(of_trainable, every_part, has_aux, holomorphic)
            value, of_parts = differentiate(*parts)
            narrowed = [r.narrow(part) for r, part in zip(in_part, of_parts, strict=True)]
        grads = tuple(
            _gradient(resolution, each, trained, holes)
            for resolution, each, trained in zip(in_part, leaves, narrowed, strict=True)
        )
        return value, grads[0] if is_one else grads

    return value_and_grad_of_trainable


def grad(
    fun: Callable[..., Any],
    frozen: Frozen = None,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    holomorphic: bool = False,
    *,
    trainable: Frozen = None,
    holes: bool = False,
) -> Callable[..., Any]:
    """`jax.grad` with respect to the trainable leaves alone.

    Arguments and errors are those of `value_and_grad`.

    Returns:
      A function of the arguments of `fun` that returns the gradient, or with `has_aux` the gradient
      and the auxiliary data.

    Example:
      >>> import frozen_optax as fo, jax.numpy as jnp
      >>> params = {"base": jnp.arange(3), "scale": jnp.array(2.0)}
      >>> loss = lambda p: p["scale"] * p["base"].sum()
      >>> grads = fo.grad(loss, trainable="scale", holes=True)(params)
      >>> grads["base"], float(grads["scale"])
      (MaskedNode(), 3.0)
    """
    both = value_and_grad(
        fun, frozen, argnums, has_aux, holomorphic, trainable=trainable, holes=holes
    )

    @functools.wraps(fun)
    def grad_of_trainable(*args: Any, **kwargs: Any) -> Any:
        value, grads = both(*args, **kwargs)
        return (grads, value[1]) if has_aux else grads

    return grad_of_trainable


def _misfit(resolution: Resolution, params: list[Leaf], value: PyTree, grads: PyTree) -> str | None:
    """Why what a line search has stored is no value and gradient of the trainable leaves, if so."""
    if value is None or grads is None:
        return "it has none"
    if jax.tree.structure(grads) != resolution.holed:
        pruned = resolution.prune(resolution.holed)
        expected = jax.tree.unflatten(pruned, resolution.rest(params))
        try:
            require_same_structure(grads, expected, "its gradient", "the trainable parameters")
        except ValueError as error:
            return str(error).rstrip(".")
    paths, trainable = resolution.complement.chosen, resolution.rest(params)
    for path, param, gradient in zip(paths, trainable, jax.tree.leaves(grads), strict=True):
        expected, found = jnp.shape(param), jnp.shape(gradient)
        if expected != found:
            return f"that at {path!r} has the shape {found}, and the parameter {expected}"
    return None


def value_and_grad_from_state(
    fun: Callable[..., Any],
    frozen: Frozen = None,
    *,
    trainable: Frozen = None,
    holes: bool = False,
) -> Callable[..., tuple[Any, Any]]:
    """`optax.value_and_grad_from_state` for a line search inside `with_frozen`.

    A line search that has stored the value and the gradient at the point it accepted saves
    computing them again. Optax's own function raises there, as the stored gradient has holes and a
    computed one has none.

    Args:
      fun: a function of the parameters and other arguments that returns a scalar.
      frozen: the leaves that are frozen: a glob on their paths (`"encoder"`), a compiled regex, a
        `Selector`, a list of these, a predicate `(path, leaf) -> bool`, a bool, a pytree of bools,
        or the optimizer that `with_frozen` returned.
      trainable: the leaves that are not, instead of `frozen`: exactly one of the two is given.
      holes: leave a hole (`optax.MaskedNode`) for each frozen leaf instead of a zero.

    Returns:
      A function `(params, *args, state, **kwargs)` that returns value and gradient: from `state` if
      it holds a finite value, computed otherwise.

    Raises:
      TypeError: not exactly one of `frozen` and `trainable` is given, or it is no way to select
        leaves.
      ValueError: when called: a pattern selects nothing, or a mask does not fit; everything is
        frozen and nobody said so (`"**"`, `True`); `state` holds no value and gradient, or not
        those of the trainable leaves. The message names the path.

    Example:
      >>> import frozen_optax as fo, jax.numpy as jnp, optax
      >>> loss = lambda p: jnp.sum((p["base"] * p["scale"] - 1.0) ** 2)
      >>> tx = fo.with_frozen(optax.lbfgs(), "base")
      >>> params = {"base": jnp.array([1.0, 2.0]), "scale": jnp.zeros(2)}
      >>> state = tx.init(params)
      >>> for _ in range(5):
      ...     value, grads = fo.value_and_grad_from_state(loss, tx)(params, state=state)
      ...     search = {"value": value, "grad": grads, "value_fn": loss}
      ...     updates, state = tx.update(grads, state, params, **search)
      ...     params = fo.apply_updates(params, updates)
      >>> bool(loss(params) < 1e-3)
      True
    """
    selector, elements = frozen_in_part(frozen, trainable)
    computed = value_and_grad(fun, frozen, trainable=trainable, holes=True)

    @functools.wraps(fun)
    def from_state(params: PyTree, *args: Any, state: PyTree, **kwargs: Any) -> tuple[Any, Any]:
        resolution = lay(selector, elements, params, to_train=True)
        leaves = jax.tree.leaves(params)
        stored_value = optax.tree_utils.tree_get(state, "value")
        stored = optax.tree_utils.tree_get(state, "grad")
        if reason := _misfit(resolution, leaves, stored_value, stored):
            raise ValueError(
                f"the state holds no value, or no gradient of the {resolution.holed.num_leaves} "
                f"trainable leaves: {reason}. Use a line search that stores them "
                "(store_grad=True) inside with_frozen, with the same leaves frozen: give the "
                "optimizer for what is frozen."
            )
        known = jnp.asarray(stored_value)

        def compute() -> tuple[Array, list[Leaf]]:
            value, grads = computed(params, *args, **kwargs)
            return value, resolution.narrow(jax.tree.leaves(grads))

        def take() -> tuple[Array, list[Leaf]]:
            return known, jax.tree.leaves(stored)

        value, trained = jax.lax.cond(jnp.isfinite(known), take, compute)
        return value, _gradient(resolution, leaves, trained, holes)

    return from_state
