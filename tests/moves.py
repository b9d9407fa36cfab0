"""Moves, views and casts of an array, each with what takes it back, or nearly does."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from choices import Choice, bits_of, dtype_of, has_axes, is_bool, is_complex, is_float, is_real
from hostile import DTYPES, FLOATS, INTEGERS, WIDE
from jax import lax


def reshape(x: Any, shape: Sequence[int], dimensions: Any = None) -> Any:
    """`lax.reshape`, which finds out late that an array has another size."""
    if jnp.size(x) != math.prod(shape):
        raise ValueError("an array of another size")
    return lax.reshape(x, shape, dimensions)


def transposed(c: Choice, x: Any) -> tuple[Any, Callable[[Any], Any]]:
    permutation = c.permutation(jnp.ndim(x))
    back = tuple(int(i) for i in np.argsort(permutation))
    if c.chance(0.2):
        back = permutation
    return lax.transpose(x, permutation), lambda y: lax.transpose(y, back)


def reshaped(c: Choice, x: Any) -> tuple[Any, Callable[[Any], Any]]:
    shape = jnp.shape(x)
    sizes = c.of([s for s in [(8,), (4, 2), (2, 4), (2, 2, 2)] if math.prod(s) == math.prod(shape)])
    dimensions = c.permutation(len(shape)) if c.chance(0.5) else None

    def back(y: Any) -> Any:
        if dimensions is None or c_wrong:
            return reshape(y, shape)
        first = reshape(y, [shape[i] for i in dimensions])
        return lax.transpose(first, tuple(int(i) for i in np.argsort(dimensions)))

    c_wrong = c.chance(0.3)
    return reshape(x, sizes, dimensions), back


def in_fortran_order(c: Choice, x: Any) -> tuple[Any, Callable[[Any], Any]]:
    order = "F" if c.chance(0.6) else "C"
    return jnp.ravel(x, order="F"), lambda y: jnp.reshape(y, jnp.shape(x), order=order)


def reversed_(c: Choice, x: Any) -> tuple[Any, Callable[[Any], Any]]:
    axis = int(c.random.integers(jnp.ndim(x)))
    again = axis if c.chance(0.8) else jnp.ndim(x) - 1 - axis
    return lax.rev(x, (axis,)), lambda y: lax.rev(y, (again,))


def rolled(c: Choice, x: Any) -> tuple[Any, Callable[[Any], Any]]:
    axis, by = int(c.random.integers(jnp.ndim(x))), int(c.random.integers(0, 3))
    back = -by if c.chance(0.8) else by
    return jnp.roll(x, by, axis), lambda y: jnp.roll(y, back, axis)


def cut(c: Choice, x: Any) -> tuple[Any, Callable[[Any], Any]]:
    axis = int(c.random.integers(jnp.ndim(x)))
    n = jnp.shape(x)[axis]
    first = int(c.random.integers(1, n)) if n > 1 else 1
    in_order = c.chance(0.8)
    sizes = [first, n - first] if n > first else [n]
    pieces = lax.split(x, sizes, axis)
    order = list(range(len(pieces))) if in_order else list(range(len(pieces)))[::-1]
    whole = lax.concatenate([pieces[i] for i in order], axis)
    return whole, lambda y: y


def in_strides(c: Choice, x: Any) -> tuple[Any, Callable[[Any], Any]]:
    even, odd = x[::2], x[1::2]
    if c.chance(0.3):
        even, odd = odd, even
    if jnp.shape(even) != jnp.shape(odd):
        raise LookupError("of an odd length")
    shape = jnp.shape(x)
    return jnp.stack([even, odd], axis=1), lambda y: reshape(y, shape)


def stacked(c: Choice, x: Any) -> tuple[Any, Callable[[Any], Any]]:
    other = c.like(x)
    axis = int(c.random.integers(jnp.ndim(x) + 1))
    which = 0 if c.chance(0.7) else 1
    return jnp.stack([x, other], axis), lambda y: jnp.unstack(y, axis=axis)[which]


def tiled(c: Choice, x: Any) -> tuple[Any, Callable[[Any], Any]]:
    start = 0 if c.chance(0.7) else 1
    n = jnp.shape(x)[0]
    reps = (2, *[1] * (jnp.ndim(x) - 1))
    return jnp.tile(x, reps), lambda y: lax.slice_in_dim(y, start, start + n, axis=0)


def broadcast(c: Choice, x: Any) -> tuple[Any, Callable[[Any], Any]]:
    shape, dims = (3, *jnp.shape(x)), tuple(range(1, jnp.ndim(x) + 1))
    index = int(c.random.integers(3))
    wide = lax.broadcast_in_dim(x, shape, dims)
    if c.chance(0.4):
        wide = jnp.roll(wide, 1, axis=0)
    return wide, lambda y: lax.squeeze(lax.slice_in_dim(y, index, index + 1), (0,))


def padded(c: Choice, x: Any) -> tuple[Any, Callable[[Any], Any]]:
    value = jnp.zeros((), dtype_of(x)) if c.chance(0.5) else jnp.ones((), dtype_of(x))
    config = [(1, 0, 0), *[(0, 0, 0)] * (jnp.ndim(x) - 1)]
    wide = lax.pad(x, value, config)
    return wide, lambda y: lax.slice_in_dim(y, 1, jnp.shape(y)[0])


def viewed(c: Choice, x: Any) -> tuple[Any, Callable[[Any], Any]]:
    own = dtype_of(x)
    options = [*FLOATS, *INTEGERS, *(WIDE if jax.config.jax_enable_x64 else [])]
    options = [d for d in options if bits_of(d) == bits_of(own) and "complex" not in d]
    there = c.of(options)
    return (
        lax.bitcast_convert_type(x, there),
        lambda y: lax.bitcast_convert_type(y, own),
    )


def cast(c: Choice, x: Any) -> tuple[Any, Callable[[Any], Any]]:
    own = dtype_of(x)
    there = c.of([*DTYPES, *(WIDE if jax.config.jax_enable_x64 else [])])
    if is_float(x) and c.chance(0.5):
        there = "float32"
    if is_complex(x) and "complex" not in there:
        there = "complex64"
    back = own
    return lax.convert_element_type(x, there), lambda y: lax.convert_element_type(y, back)


def in_parts(c: Choice, x: Any) -> tuple[Any, Callable[[Any], Any]]:
    swapped = c.chance(0.3)

    def back(y: Any) -> Any:
        parts = [lax.real(y), lax.imag(y)]
        return lax.complex(*(parts[::-1] if swapped else parts))

    return x, back


MOVES = [
    (transposed, has_axes),
    (reshaped, lambda x: math.prod(jnp.shape(x)) == 8),
    (in_fortran_order, has_axes),
    (reversed_, has_axes),
    (rolled, has_axes),
    (cut, has_axes),
    (in_strides, has_axes),
    (stacked, lambda x: True),
    (tiled, has_axes),
    (broadcast, lambda x: True),
    (padded, has_axes),
    (viewed, lambda x: is_real(x) and not is_bool(x)),
    (viewed, lambda x: is_real(x) and not is_bool(x)),
    (cast, lambda x: True),
    (cast, lambda x: True),
    (in_parts, is_complex),
]
