"""What a leaf is made of: its bits, the number that adds nothing to it, and whether an update is that number.

Arithmetic is no way to keep bits. On CPU `p + (-0.0)` flushes subnormals to zero and quiets signalling NaNs, and
`jnp.where` loses NaN payloads of the narrow floats, so everything here selects between unsigned integers of the same
width, or does nothing at all.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from frozen_optax._trees import Resolution, describe, is_hole, is_traced

_UNSIGNED = {4: "uint4", 8: "uint8", 16: "uint16", 32: "uint32", 64: "uint64"}


def is_key(leaf: Any) -> bool:
    """Whether `leaf` is an array of typed PRNG keys."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def is_array(leaf: Any) -> bool:
    """Whether `leaf` has a shape and a dtype: an array of jax or numpy, a tracer, a `jax.ShapeDtypeStruct`."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def width(dtype: Any) -> int:
    """The bits of an element: less than a byte for the narrow integers and floats."""
    if jnp.issubdtype(dtype, jnp.floating):
        return jnp.finfo(dtype).bits
    return jnp.iinfo(dtype).bits if jnp.issubdtype(dtype, jnp.integer) else 8 * dtype.itemsize


def is_differentiable(leaf: Any) -> bool:
    """Whether `leaf` is a float or complex number, or an array of them."""
    return jnp.issubdtype(leaf.dtype, jnp.inexact) if is_array(leaf) else isinstance(leaf, (float, complex))


def has_additive_identity(dtype: Any) -> bool:
    """Whether some number adds nothing: not to PRNG keys, `float0`, e8m0 (no zero), 6-bit floats (no addition)."""
    if dtype == jax.dtypes.float0 or str(dtype).startswith(("float8_e8m0", "float6")):
        return False
    return dtype == np.bool_ or jnp.issubdtype(dtype, jnp.number)


def negative_zero(dtype: Any) -> bool:
    """Whether the dtype has a zero with a sign: all floats and complex numbers but the fnuz types."""
    return jnp.issubdtype(dtype, jnp.inexact) and not jnp.dtype(dtype).name.endswith("fnuz")


@functools.lru_cache(maxsize=256)
def _broadcast_zero(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    zero = np.zeros((), dtype if has_additive_identity(dtype) else jax.dtypes.float0)
    return np.broadcast_to(np.negative(zero) if negative_zero(zero.dtype) else zero, shape)


def known_zero(leaf: Any) -> Any:
    """The update that leaves `leaf` as it is, with its shape and dtype, known to be zero while tracing.

    It is a numpy array that holds one number, broadcast, so it takes no memory, optax can compute with it, and
    `is_known_zero` sees it for what it is. A dtype without an additive identity gets `float0`, jax's tangent of what
    cannot be differentiated; a leaf that is no array gets a hole.
    """
    if not is_array(leaf):
        return optax.MaskedNode()
    return _broadcast_zero(leaf.shape, leaf.dtype)  # it cannot be written to, so all leaves of a shape share it


def is_known_zero(update: Any) -> bool:
    """Whether an update is known to be nothing: `None`, a hole, `float0`, or a broadcast zero as `known_zero` makes."""
    if update is None or is_hole(update):
        return True
    if getattr(update, "dtype", None) == jax.dtypes.float0:
        return True
    if isinstance(update, np.ndarray):
        return not update.size or (not any(update.strides) and not update.flat[0])
    return False


def select_bits(condition: Any, left: Any, right: Any) -> Any:
    """`jnp.where` that keeps every bit of what it selects; all of one shape, `left` and `right` of one dtype."""
    dtype = left.dtype
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return jax.lax.complex(
            select_bits(condition, jax.lax.real(left), jax.lax.real(right)),
            select_bits(condition, jax.lax.imag(left), jax.lax.imag(right)),
        )
    if jnp.issubdtype(dtype, jnp.floating) and width(dtype) >= 8:  # below, there are no NaNs to lose
        unsigned = _UNSIGNED[width(dtype)]
        left, right = (jax.lax.bitcast_convert_type(x, unsigned) for x in (left, right))
        return jax.lax.bitcast_convert_type(select_bits(condition, left, right), dtype)
    everywhere = jax.lax.eq(right, right)  # sharded as `right` is, which `condition` need not be
    return jax.lax.select(jax.lax.bitwise_and(condition, everywhere), left, right)


def bits(leaf: Any) -> Any:
    """The bit pattern of an array as unsigned integers; complex numbers and PRNG keys get one more axis.

    Arrays whose values are known come back as numpy arrays, tracers as tracers.
    """
    if leaf.dtype == jax.dtypes.float0:  # it has none
        return np.zeros(leaf.shape, np.uint8)
    if is_key(leaf):
        leaf = jax.random.key_data(leaf)
    if is_traced(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            return jnp.stack([bits(jnp.real(leaf)), bits(jnp.imag(leaf))], axis=-1)
        if leaf.dtype == np.bool_:
            return leaf.astype("uint8")
        narrow = width(leaf.dtype)
        if narrow < 8 and jnp.issubdtype(leaf.dtype, jnp.integer):
            return leaf.astype("int8").astype("uint8") & (2**narrow - 1)
        if narrow not in _UNSIGNED:
            raise TypeError(f"a compiled function cannot read the bits of {leaf.dtype}")
        raw = jax.lax.bitcast_convert_type(leaf, _UNSIGNED[narrow])
        return raw.astype("uint8") if narrow < 8 else raw
    host = np.asarray(leaf)
    if np.iscomplexobj(host):
        return np.stack([bits(host.real), bits(host.imag)], axis=-1)
    host = np.ascontiguousarray(host).reshape(host.shape)
    if host.dtype.itemsize not in (1, 2, 4, 8) or not host.dtype.isnative or host.dtype.names:
        return np.frombuffer(host.tobytes(), np.uint8).reshape(*host.shape, host.dtype.itemsize)
    raw = host.view(f"uint{8 * host.dtype.itemsize}")
    narrow = width(host.dtype)  # int4 and its like take a byte each on the host
    return raw & np.uint8(2**narrow - 1) if narrow < 8 else raw


def refuse_untrainable(frozen: Resolution, leaves: Iterable[Any]) -> None:
    """Raise for a leaf that is to be trained and is no number."""
    for path, is_frozen, leaf in zip(frozen.paths, frozen.selected, leaves, strict=True):
        if not (is_frozen or is_array(leaf) or isinstance(leaf, (bool, int, float, complex))):
            raise TypeError(
                f"the trainable leaf {path!r} is no array but {describe(leaf)}. Freeze it, or leave it out of the "
                "parameters: with Equinox, eqx.filter(model, eqx.is_inexact_array)."
            )


def refuse_inexact(frozen: Resolution, leaves: Iterable[Any]) -> None:
    """Raise for a frozen leaf that no compiled function keeps: Python scalars, 64-bit host arrays without x64."""
    for path, is_frozen, leaf in zip(frozen.paths, frozen.selected, leaves, strict=True):
        if not is_frozen:
            continue
        if isinstance(leaf, (bool, int, float, complex)) and not isinstance(leaf, np.generic):
            found = f"the Python {type(leaf).__name__} {leaf!r}"
        elif isinstance(leaf, (np.ndarray, np.generic)) and jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype:
            found = f"a {leaf.dtype} array on the host while 64-bit types are not enabled"
        else:
            continue
        raise TypeError(
            f"the frozen leaf {path!r} is {found}: a compiled function would hand it back changed. Pass "
            "jnp.asarray(...) of it, in the dtype that it shall keep."
        )
