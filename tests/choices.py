"""The random choices of one operation of a random program, and what it may choose from."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np


class Choice:
    """The random choices of one operation, and the arrays that it can choose from."""

    def __init__(self, seed: Sequence[int], arrays: Sequence[Any], mesh: Any):
        self.random = np.random.default_rng(seed)
        self.arrays = arrays
        self.mesh = mesh

    def chance(self, probability: float) -> bool:
        return bool(self.random.random() < probability)

    def of(self, options: Sequence[Any]) -> Any:
        return options[int(self.random.integers(len(options)))]

    def array(self, accepts: Callable[[Any], bool] = lambda x: True) -> Any:
        """An array that was computed before, rather a late one."""
        found = [x for x in self.arrays if accepts(x)]
        if not found:
            raise LookupError("there is no such array yet")
        late = found[-4:]
        return self.of(late if self.chance(0.6) else found)

    def like(self, x: Any) -> Any:
        """An array of the shape and dtype of another one."""
        return self.array(lambda y: (jnp.shape(y), dtype_of(y)) == (jnp.shape(x), dtype_of(x)))

    def permutation(self, n: int) -> tuple[int, ...]:
        return tuple(int(i) for i in self.random.permutation(n))


def dtype_of(x: Any) -> Any:
    return jnp.result_type(x)


def is_float(x: Any) -> bool:
    return jnp.issubdtype(dtype_of(x), jnp.floating)


def is_real(x: Any) -> bool:
    return not jnp.issubdtype(dtype_of(x), jnp.complexfloating)


def is_complex(x: Any) -> bool:
    return jnp.issubdtype(dtype_of(x), jnp.complexfloating)


def is_integer(x: Any) -> bool:
    return jnp.issubdtype(dtype_of(x), jnp.integer)


def is_bool(x: Any) -> bool:
    return dtype_of(x) == np.bool_


def has_axes(x: Any) -> bool:
    return jnp.ndim(x) > 0


def bits_of(dtype: Any) -> int:
    return 8 * np.dtype(dtype).itemsize
