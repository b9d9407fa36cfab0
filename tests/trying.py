"""What jax and its device can do with a dtype, found out by trying: a name is no promise.

A type may be in `jax.numpy` and unknown to XLA, and a type that XLA has may be one that it does not
add or whose bits it does not hand out, all of it another way in the next version."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

# Under the names that this version of jax has for them.
mutable_array = jax.new_ref if hasattr(jax, "new_ref") else jax.experimental.mutable_array
_enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64


def precision(*, x64: bool) -> contextlib.AbstractContextManager[Any]:
    """64-bit types on or off, by the context manager that this version of jax has."""
    return _enable_x64(x64)


def works(attempt: Callable[[], Any]) -> bool:
    try:
        attempt()
    except Exception:
        return False
    return True


def bits_of(dtype: Any) -> int:
    """The bits of an element."""
    for info in (ml_dtypes.finfo, ml_dtypes.iinfo):
        with contextlib.suppress(ValueError):
            return info(dtype).bits
    return 8 * np.dtype(dtype).itemsize


def is_float(dtype: Any) -> bool:
    return works(lambda: ml_dtypes.finfo(dtype))


def every_pattern(dtype: Any) -> np.ndarray:
    """All values of a type of at most 16 bits, on the host."""
    if is_float(dtype):
        return np.arange(2 ** bits_of(dtype), dtype=f"uint{8 * np.dtype(dtype).itemsize}").view(
            dtype
        )
    info = ml_dtypes.iinfo(dtype)
    return np.arange(int(info.min), int(info.max) + 1).astype(dtype)


# The numbers that numpy does not have by itself. They are numpy's all the same, so the host has
# each of them.
NARROW = {
    name: np.dtype(kind)
    for name, kind in vars(ml_dtypes).items()
    if isinstance(kind, type) and (is_float(kind) or works(lambda kind=kind: ml_dtypes.iinfo(kind)))
}


def once_for_each_dtype(question: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Keep the answers, of which 64-bit types have another where they are off."""
    answer = functools.cache(lambda dtype, x64: question(dtype))
    return functools.wraps(question)(
        lambda dtype: answer(np.dtype(dtype), jax.config.jax_enable_x64)
    )


@once_for_each_dtype
def device_has(dtype: Any) -> bool:
    """Whether a compiled function takes and returns the type."""
    ones = np.ones(2, dtype)
    return works(
        lambda: np.testing.assert_array_equal(
            np.asarray(jax.jit(jnp.copy)(ones)).view("uint8"), ones.view("uint8")
        )
    )


@once_for_each_dtype
def device_adds(dtype: Any) -> bool:
    """Whether a compiled function adds numbers of the type."""
    return device_has(dtype) and works(
        lambda: np.asarray(jax.jit(jnp.add)(*[np.ones(2, dtype)] * 2))
    )


@once_for_each_dtype
def device_reads_bits_of(dtype: Any) -> bool:
    """Whether a compiled function can make the bits of the type an integer."""
    as_bits = jax.jit(
        lambda x: jax.lax.bitcast_convert_type(x, f"uint{bits_of(dtype)}").astype(int)
    )
    return device_has(dtype) and works(lambda: np.asarray(as_bits(np.ones(2, dtype))))


@once_for_each_dtype
def zero_that_adds_nothing(dtype: Any) -> np.ndarray | None:
    """The zero that changes no bit when added to the zeros or to one, or `None` without one."""
    if not device_adds(dtype):
        return None
    zero = np.zeros((), dtype)
    zeros = (
        (zero, np.negative(zero))
        if np.issubdtype(dtype, np.inexact) or is_float(dtype)
        else (zero,)
    )
    numbers = np.array([*zeros, np.ones((), dtype)], dtype)
    for each in reversed(zeros):
        added = np.asarray(jax.jit(jnp.add)(numbers, np.full(numbers.shape, each, dtype)))
        if added.dtype == numbers.dtype and added.tobytes() == numbers.tobytes():
            return each
    return None
