"""Hostile numbers: zeros of both signs, subnormals, infinities, extremes, odd NaNs."""

import math
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

# The first ones come more often: what has been compiled for one program serves the next.
FLOATS = ["float32"] * 6 + ["bfloat16"] * 3 + ["float8_e4m3fn"] * 3 + ["float16", "float8_e5m2"]
INTEGERS = ["int32"] * 4 + ["uint8"] * 3 + ["uint32", "uint16", "int8", "int16"]
DTYPES = [*FLOATS, *INTEGERS, "bool", "complex64"]
WIDE = ["float64", "float64", "int64", "uint64", "complex128"]
SHAPES = [(4, 2), (4, 2), (4, 2), (8,), ()]


def hostile(shape: tuple[int, ...], dtype: Any, random: np.random.Generator) -> np.ndarray:
    """Numbers of which many are zeros of both signs, subnormal, infinite, extreme, or odd NaNs."""
    dtype = np.dtype(dtype)
    if dtype == np.bool_:
        return random.integers(0, 2, shape).astype(bool)
    if np.issubdtype(dtype, np.complexfloating):
        part = np.zeros((), dtype).real.dtype
        both = [hostile(shape, part, random) for _ in range(2)]
        found = np.empty(shape, dtype)
        found.real, found.imag = both
        return found
    size = math.prod(shape)
    unsigned = f"uint{8 * dtype.itemsize}"
    limit = np.iinfo(unsigned).max
    any_bits = random.integers(0, limit, size, unsigned, endpoint=True).view(dtype)
    small = random.integers(-3, 4, size).astype(dtype)
    if jnp.issubdtype(dtype, jnp.integer):
        info = ml_dtypes.iinfo(dtype)
        special = np.array([0, 1, info.min, info.max, 2**24 + 1 & int(info.max)], dtype)
    else:
        info = ml_dtypes.finfo(dtype)
        subnormal = np.array([1, 3], unsigned).view(dtype)
        listed = [0.0, -0.0, 1.0, float(info.max), float(info.min), np.inf, np.nan, 0.3]
        special = np.concatenate([np.array(listed).astype(dtype), subnormal, -subnormal])
    chosen = random.choice(special, size)
    kind = random.integers(0, 3, size)
    return np.select([kind == 0, kind == 1], [any_bits.view(unsigned), chosen.view(unsigned)],
                     small.view(unsigned)).astype(unsigned).view(dtype).reshape(shape)  # fmt: skip


def random_inputs(seed: int, x64: bool) -> list[np.ndarray]:
    """Hostile arrays of several shapes and dtypes, a bool and an integer among them."""
    random = np.random.default_rng(seed)
    dtypes = [*DTYPES, *(WIDE * 2 if x64 else [])]
    kinds = [(c, SHAPES[int(random.integers(len(SHAPES)))]) for c in random.choice(dtypes, 4)]
    kinds = [*kinds, kinds[0], ("bool", ()), ("int32", ()), ("float32", ())]
    return [hostile(shape, dtype, random) for dtype, shape in kinds]
