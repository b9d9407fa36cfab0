"""What a leaf is made of: its bits, and the number that adds nothing to it.

Arithmetic is no way to keep bits. On CPU `p + (-0.0)` flushes subnormals to zero and quiets
signalling NaNs, and `jnp.where` loses NaN payloads of the narrow floats, so everything here selects
between unsigned integers of the same width, or does nothing at all.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from frozen_optax._resolution import Resolution
from frozen_optax._trees import describe, is_hole, is_number, is_traced
from frozen_optax._typing import Array, DType, Leaf

_UNSIGNED = {4: "uint4", 8: "uint8", 16: "uint16", 32: "uint32", 64: "uint64"}


def is_key(leaf: Leaf) -> bool:
    """Whether `leaf` is an array of typed PRNG keys."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def is_array(leaf: Leaf) -> bool:
    """Whether `leaf` has a shape and a dtype.

    So have arrays of jax and numpy, tracers, and `jax.ShapeDtypeStruct`.
    """
    # A type is no array, though np.float32 has a shape and a dtype.
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype") and not isinstance(leaf, type)


def width(dtype: DType) -> int:
    """The bits of an element: less than a byte for the narrow integers and floats."""
    if jnp.issubdtype(dtype, jnp.floating):
        return jnp.finfo(dtype).bits
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.iinfo(dtype).bits
    return 8 * dtype.itemsize


def is_differentiable(leaf: Leaf) -> bool:
    """Whether `leaf` is a float or complex number, or an array of them."""
    if is_array(leaf):
        return jnp.issubdtype(leaf.dtype, jnp.inexact)
    return isinstance(leaf, (float, complex))


@functools.cache
def _zeros(dtype: DType) -> tuple[np.ndarray, ...]:
    """The zeros of a dtype of numbers, the one that adds nothing last.

    That is -0.0, after 0.0, where zero has a sign. The dtype is asked, not read from its name: some
    of the narrow floats have one zero, and e8m0 has none.
    """
    zero = np.zeros((), dtype)
    if zero != 0:
        return ()
    if not jnp.issubdtype(dtype, jnp.inexact):
        return (zero,)
    negative = np.asarray(np.negative(zero))
    return (zero,) if negative.tobytes() == zero.tobytes() else (zero, negative)


def has_additive_identity(dtype: DType) -> bool:
    """Whether some number adds nothing.

    None does to PRNG keys and `float0`, to e8m0, which has no zero, to 6-bit floats, which have no
    addition, and to integers of a single bit, which no device has.
    """
    if dtype != np.bool_ and not jnp.issubdtype(dtype, jnp.number):
        return False
    if jnp.issubdtype(dtype, jnp.floating) and width(dtype) not in _UNSIGNED:
        return False
    if width(dtype) == 1:
        return False
    return bool(_zeros(dtype))


def has_negative_zero(dtype: DType) -> bool:
    """Whether the dtype has a zero with a sign.

    All floats and complex numbers have one, but the fnuz types.
    """
    return jnp.issubdtype(dtype, jnp.inexact) and len(_zeros(dtype)) > 1


def zero_of(dtype: DType) -> np.ndarray:
    """The number of a dtype that adds nothing, where it `has_additive_identity`."""
    return _zeros(dtype)[-1]


@functools.lru_cache(maxsize=256)
def _broadcast_zero(shape: tuple[int, ...], dtype: DType) -> np.ndarray:
    zero = _zeros(dtype)[-1] if has_additive_identity(dtype) else np.zeros((), jax.dtypes.float0)
    return np.broadcast_to(zero, shape)


def known_zero(leaf: Leaf) -> Leaf:
    """The update that leaves `leaf` as it is, known to be zero while tracing.

    It is a numpy array in the shape and dtype of `leaf` that holds one number, broadcast, so it
    takes no memory, optax can compute with it, and `is_known_zero` sees it for what it is. A dtype
    without an additive identity gets `float0`, jax's tangent of what cannot be differentiated; a
    leaf that is no array gets None, as `eqx.apply_updates` has it. A leaf of symbolic shape gets an
    array of jax, as numpy has no such shapes.
    """
    if not (is_array(leaf) and is_number(leaf)):
        return None
    if all(isinstance(length, int) for length in leaf.shape):
        # It cannot be written to, so all leaves of a shape share it.
        return _broadcast_zero(leaf.shape, leaf.dtype)
    if not has_additive_identity(leaf.dtype):
        return optax.MaskedNode()
    return jnp.full(leaf.shape, _zeros(leaf.dtype)[-1])


def is_known_zero(update: Leaf) -> bool:
    """Whether an update is known to be nothing.

    `None`, a hole and `float0` are, and a broadcast zero as `known_zero` makes it.
    """
    if update is None or is_hole(update):
        return True
    if getattr(update, "dtype", None) == jax.dtypes.float0:
        return True
    if not isinstance(update, np.ndarray):
        return False
    is_one_number = not any(update.strides)
    return not update.size or (is_one_number and not update.flat[0])


def is_made_zero(update: Leaf) -> bool:
    """Whether an update is what `known_zero` has made, and not a number that happens to be zero."""
    if not isinstance(update, np.ndarray) or not has_additive_identity(update.dtype):
        return False
    return update.base is _zeros(update.dtype)[-1]


def select_bits(condition: Array, left: Array, right: Array) -> Array:
    """`jnp.where` that keeps every bit of what it selects.

    All are of one shape, `left` and `right` of one dtype.
    """
    dtype = left.dtype
    if jnp.issubdtype(dtype, jnp.complexfloating):
        real = select_bits(condition, jax.lax.real(left), jax.lax.real(right))
        imag = select_bits(condition, jax.lax.imag(left), jax.lax.imag(right))
        return jax.lax.complex(real, imag)
    # Floats of less than a byte have no NaNs to lose.
    if jnp.issubdtype(dtype, jnp.floating) and width(dtype) >= 8:
        unsigned = _UNSIGNED[width(dtype)]
        left, right = (jax.lax.bitcast_convert_type(x, unsigned) for x in (left, right))
        return jax.lax.bitcast_convert_type(select_bits(condition, left, right), dtype)
    everywhere = jax.lax.eq(right, right)  # sharded as `right` is, which `condition` need not be
    return jax.lax.select(jax.lax.bitwise_and(condition, everywhere), left, right)


def movable(leaf: Array) -> Array:
    """An array that keeps every bit where compilers move it.

    They move the narrow floats as wider ones, which quiets NaNs, so those are unsigned integers
    here. `moved` is the way back.
    """
    if jnp.issubdtype(leaf.dtype, jnp.floating) and width(leaf.dtype) in (8, 16):
        return jax.lax.bitcast_convert_type(leaf, _UNSIGNED[width(leaf.dtype)])
    return leaf


def moved(leaf: Array, dtype: DType) -> Array:
    """What `movable` has made of an array of a dtype, as that array again."""
    return leaf if leaf.dtype == dtype else jax.lax.bitcast_convert_type(leaf, dtype)


def bits(leaf: Array) -> Array:
    """The bit pattern of an array as unsigned integers.

    Complex numbers and PRNG keys get one more axis. Arrays whose values are known come back as
    numpy arrays, tracers as tracers.
    """
    if leaf.dtype == jax.dtypes.float0:  # it has none
        return np.zeros(leaf.shape, np.uint8)
    if is_key(leaf):
        leaf = jax.random.key_data(leaf)
    return _traced_bits(leaf) if is_traced(leaf) else _host_bits(np.asarray(leaf))


def device_memory_of(leaf: jax.Array) -> jax.sharding.Sharding | None:
    """Where an array that is held in host memory has to be for its devices to compute with it.

    There is no such place for one that is there.
    """
    default = next(iter(leaf.sharding.device_set)).default_memory().kind
    if leaf.sharding.memory_kind in (None, default):
        return None
    return leaf.sharding.with_memory_kind(default)


def _traced_bits(leaf: Array) -> Array:
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        return jnp.stack([_traced_bits(jnp.real(leaf)), _traced_bits(jnp.imag(leaf))], axis=-1)
    if leaf.dtype == np.bool_:
        return leaf.astype("uint8")
    narrow = width(leaf.dtype)
    if narrow < 8 and jnp.issubdtype(leaf.dtype, jnp.integer):
        return leaf.astype("int8").astype("uint8") & (2**narrow - 1)
    if narrow not in _UNSIGNED:
        raise TypeError(f"a compiled function cannot read the bits of {leaf.dtype}")
    raw = jax.lax.bitcast_convert_type(leaf, _UNSIGNED[narrow])
    return raw.astype("uint8") if narrow < 8 else raw


def _is_word(dtype: DType) -> bool:
    """Whether an element of numpy's is a number of the machine, and no string of bytes."""
    return dtype.itemsize in (1, 2, 4, 8) and dtype.isnative and not dtype.names


def _host_bits(host: np.ndarray) -> np.ndarray:
    if np.iscomplexobj(host):
        return np.stack([_host_bits(np.real(host)), _host_bits(np.imag(host))], axis=-1)
    host = np.ascontiguousarray(host).reshape(host.shape)
    dtype = host.dtype
    if not _is_word(dtype):
        return np.frombuffer(host.tobytes(), np.uint8).reshape(*host.shape, dtype.itemsize)
    raw = host.view(f"uint{8 * dtype.itemsize}")
    narrow = width(dtype)  # int4 and its like take a byte each on the host
    return raw & np.uint8(2**narrow - 1) if narrow < 8 else raw


def of_bits(pattern: Array, dtype: DType) -> Array:
    """The array of a dtype whose `bits` these are; keys of random numbers are for jax to wrap."""
    if jnp.issubdtype(dtype, jnp.integer) and (narrow := width(dtype)) < 8:
        if jnp.iinfo(dtype).min < 0:  # its sign is its first bit
            pattern = (pattern << (8 - narrow)).astype(np.int8) >> (8 - narrow)
        return pattern.astype(dtype)
    return (_traced_of_bits if is_traced(pattern) else _host_of_bits)(pattern, dtype)


def _traced_of_bits(pattern: Array, dtype: DType) -> Array:
    if jnp.issubdtype(dtype, jnp.complexfloating):
        part = jnp.zeros((), dtype).real.dtype
        return jax.lax.complex(*(_traced_of_bits(pattern[..., i], part) for i in range(2)))
    if dtype == np.bool_:
        return pattern.astype(dtype)
    return jax.lax.bitcast_convert_type(pattern.astype(_UNSIGNED[width(dtype)]), dtype)


def _host_of_bits(pattern: np.ndarray, dtype: DType) -> np.ndarray:
    if dtype == jax.dtypes.float0:
        return np.zeros(pattern.shape, dtype)
    has_one_more_axis = np.issubdtype(dtype, np.complexfloating) or not _is_word(dtype)
    shape = pattern.shape[:-1] if has_one_more_axis else pattern.shape
    return np.frombuffer(pattern.tobytes(), dtype).reshape(shape).copy()


def refuse_untrainable(frozen: Resolution, leaves: Iterable[Leaf]) -> None:
    """Raise for a leaf that is to be trained and is no number."""
    for path, is_frozen, leaf in zip(frozen.paths, frozen.selected, leaves, strict=True):
        if not (is_frozen or is_number(leaf)):
            raise TypeError(
                f"the trainable leaf {path!r} is no array but {describe(leaf)}, and there is no "
                "array beside it. Pass the parameters."
            )


def refuse_unkeepable(frozen: Resolution, leaves: Iterable[Leaf]) -> None:
    """Raise for a frozen leaf that no compiled function keeps.

    These are Python scalars, and 64-bit arrays on the host where 64 bits are not enabled.
    """
    rows = zip(frozen.paths, frozen.selected, frozen.numbers, leaves, strict=True)
    for path, is_frozen, is_passed, leaf in rows:  # an object is passed to no compiled function
        if is_frozen and is_passed and (found := _unkeepable(leaf)):
            raise TypeError(
                f"the frozen leaf {path!r} is {found}: a compiled function would hand it back "
                "changed. Pass jnp.asarray(...) of it, in the dtype that it shall keep."
            )


def _unkeepable(leaf: Leaf) -> str | None:
    """What a leaf is, if no compiled function keeps it."""
    if isinstance(leaf, (np.ndarray, np.generic)):  # some of numpy's scalars are Python's, too
        if jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype:
            return f"a {leaf.dtype} array on the host while 64-bit types are not enabled"
    elif isinstance(leaf, (bool, int, float, complex)):
        return f"the Python {type(leaf).__name__} {leaf!r}"
    return None
