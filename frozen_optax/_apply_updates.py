"""Updates applied so that nothing else changes a bit: the exact sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from frozen_optax import _bits
from frozen_optax._elements import resolve_in_part
from frozen_optax._parts import Part
from frozen_optax._resolution import Resolution
from frozen_optax._trees import (
    describe,
    is_at_hand,
    is_hole,
    is_number,
    is_python_number,
    paths_of,
    up_to,
)
from frozen_optax._typing import Array, Frozen, Leaf, PyTree


def _sum(param: Leaf, update: Leaf) -> Leaf:
    return jnp.asarray(param + update).astype(jnp.asarray(param).dtype)


@jax.custom_jvp
def _differentiable_sum(param: Leaf, update: Leaf) -> Leaf:
    param, update = jnp.asarray(param), jnp.asarray(update)
    is_zero = jnp.broadcast_to(jax.lax.eq(update, jax.lax.full_like(update, 0)), param.shape)
    return _bits.select_bits(is_zero, param, _sum(param, update))


@_differentiable_sum.defjvp
def _jvp(primals: Sequence[Leaf], tangents: Sequence[Leaf]) -> tuple[Leaf, Leaf]:
    # It is a sum, to be differentiated as one: bits have no derivative.
    return _differentiable_sum(*primals), jax.jvp(_sum, primals, tangents)[1]


# Compiled, it is one dispatch for a leaf where nothing else is compiled, and is traced once for all
# leaves of a shape.
_exact_sum = jax.jit(_differentiable_sum)


def _apply(param: Leaf, update: Leaf) -> Leaf:
    if update is None or is_hole(update):
        return param
    if not is_number(update):
        raise TypeError(f"an update is an array, found {describe(update)}")
    if not is_number(param):  # a function, which has no shape
        if _bits.is_known_zero(update):
            return param
        raise TypeError(f"{describe(param)} cannot be added to")
    shape, of_update = jnp.shape(param), jnp.shape(update)
    if of_update != shape and np.broadcast_shapes(shape, of_update) != shape:
        raise TypeError(f"an update of shape {of_update} for a parameter of shape {shape}")
    # The object itself is kept: no operation, no copy, and every bit of any dtype.
    if 0 in shape or _bits.is_known_zero(update):
        return param
    return _exact_sum(param, update)


def _apply_in_part(part: Part, param: Leaf, update: Leaf) -> Leaf:
    """The sum in what trains of a leaf, written into the leaf: no pass over all of it."""
    if update is None or is_hole(update) or _bits.is_known_zero(update):
        return param
    if np.shape(param) != part.shape or np.shape(update) != part.shape:
        raise TypeError(f"an update of shape {np.shape(update)} for one of shape {part.shape}")
    whole = jnp.asarray(param)
    summed = _exact_sum(part.take(whole), part.take(jnp.asarray(update)))
    return _bits.moved(part.put(_bits.movable(summed), _bits.movable(whole)), whole.dtype)


def _is_moving(update: Array) -> Array:
    return jnp.any(update != 0)


_is_moving_on_device = jax.jit(_is_moving)


def _begin(part: Part | None, update: Leaf) -> Array:
    """Whether an update that is at hand moves what is frozen; on a device it is only begun."""
    if is_python_number(update):
        return np.asarray(bool(update))  # of any size, and of any kind
    if part is None or np.shape(update) != part.shape:
        return _is_moving_on_device(update)
    moves = jnp.asarray(update) != 0
    return jnp.any(part.choose(moves, jnp.zeros_like(moves)))


def _refuse_movement(resolution: Resolution, updates: Sequence[Leaf]) -> None:
    """Raise where the update of what is frozen is at hand, and not zero."""
    frozen = [
        (index, update)
        for index, update in enumerate(updates)
        if (resolution.selected[index] or index in resolution.parts)
        and not _bits.is_known_zero(update)
        and is_number(update)
        and is_at_hand(update)
    ]
    with jax.ensure_compile_time_eval():  # under a trace, too, what is at hand has its value
        begun = [_begin(resolution.parts.get(index), update) for index, update in frozen]
        moved = jax.device_get(begun)  # all were begun before the first is waited for
    for (index, update), is_moved in zip(frozen, moved, strict=True):
        if is_moved:
            what = "has frozen elements" if index in resolution.parts else "is frozen"
            raise ValueError(
                f"{resolution.paths[index]!r} {what}, and its update there is not zero: "
                f"{describe(update)} comes from an optimizer that trains it. Give the optimizer "
                "that made the updates, frozen=tx."
            )


def apply_updates(
    params: PyTree, updates: PyTree, frozen: Frozen = None, *, trainable: Frozen = None
) -> PyTree:
    """`optax.apply_updates`, except that a zero update leaves every bit of the parameter as it was.

    Where the update is known to be zero while tracing (the frozen leaves after `with_frozen`;
    `None`, holes and `float0`) there is no operation at all: the parameter itself is returned,
    whatever it is. Elsewhere it is `(p + u).astype(p.dtype)`, and where an element of `u` is 0 or
    -0.0 the bits of that element of `p`. It is differentiated as the sum it is.

    Args:
      params: a pytree of parameters.
      updates: a pytree in the structure of `params`; a hole may stand for a leaf or for a whole
        subtree.
      frozen: what has no update but zero: best the optimizer that `with_frozen` returned. Of a leaf
        in which elements are frozen only those that train are added to and written, in place where
        the leaf is donated; without it there is a pass over the whole leaf. To what is frozen as a
        whole it makes no difference.
      trainable: what may have any, instead of `frozen`.

    Returns:
      The new parameters, in the structure, shapes and dtypes of `params`.

    Raises:
      ValueError: the trees differ in structure, or `frozen` selects nothing, or does not fit; what
        it freezes has an update that is not zero, as far as values are at hand: in a compiled
        function they are not. The message names the path.
      TypeError: an update that is not nothing for a leaf no arithmetic can touch (a PRNG key, a
        function), or one of a shape that does not fit; the message names the path. Or both `frozen`
        and `trainable` are given.

    Example:
      >>> import frozen_optax as fo, jax.numpy as jnp
      >>> fo.apply_updates(jnp.array([-0.0, 1.0]), jnp.array([0.0, 0.5])).tolist()
      [-0.0, 1.5]
    """
    leaves, treedef = jax.tree.flatten(params)
    added = up_to(treedef, updates, "updates")
    parts: Mapping[int, Part] = {}
    if frozen is not None or trainable is not None:
        resolution = resolve_in_part(frozen, trainable, params)
        _refuse_movement(resolution, added)
        parts = resolution.parts
    new: list[Leaf] = []
    for index, (param, update) in enumerate(zip(leaves, added, strict=True)):
        part = parts.get(index)
        try:
            new.append(_apply_in_part(part, param, update) if part else _apply(param, update))
        except (TypeError, ValueError) as error:
            path = paths_of(params)[index]
            raise TypeError(f"cannot update the parameter at {path!r}: {error}.") from error
    return jax.tree.unflatten(treedef, new)
