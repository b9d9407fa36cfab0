"""The arrays that the rows of a cache are kept in: wide as they are, or narrower on request."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from frozen_optax import _bits
from frozen_optax._typing import DType


@dataclasses.dataclass(frozen=True)
class Column:
    """One array of the rows: an example's part of it, its dtype, and the dtype it is kept in."""

    shape: tuple[int, ...]
    dtype: DType
    stored: DType

    def __str__(self) -> str:
        name = f"{self.dtype}[{','.join(map(str, self.shape))}]"
        return name if self.stored == self.dtype else f"{name} as {self.stored}"

    @property
    def row_bytes(self) -> int:
        """What a row takes where it is kept."""
        return math.prod(self.shape) * self.stored.itemsize


@dataclasses.dataclass
class Error:
    """The largest difference that keeping numbers narrower has made; of what is finite.

    Attributes:
      absolute: of all numbers.
      relative: to the number, of those that are not zero.
    """

    absolute: float = 0.0
    relative: float = 0.0


def as_narrow(dtype: Any) -> DType | None:
    """The dtype that float rows are to be kept in."""
    if dtype is None:
        return None
    try:
        found: Any = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating):
        raise TypeError(
            f"dtype is that of float rows: one of floats, as jnp.bfloat16. Found {dtype!r}."
        )
    return found


def column_of(shape: tuple[int, ...], dtype: DType, narrow: DType | None) -> Column:
    """How an array of the rows is kept: as it is, but for floats that are wider than asked for.

    A single number an example, a label or a weight, would save nothing.
    """
    dtype = np.dtype(dtype)
    is_wider = (
        narrow is not None
        and math.prod(shape) > 1
        and jnp.issubdtype(dtype, jnp.floating)
        and _bits.width(dtype) > _bits.width(narrow)
    )
    return Column(shape, dtype, narrow if is_wider and narrow is not None else dtype)


def narrowed(column: Column, rows: np.ndarray, first: int, error: Error) -> np.ndarray:
    """Rows as they are kept; the error it makes is added to what is known of it.

    Args:
      column: of which they are a part.
      rows: as they were computed.
      first: the number of the first one.
      error: the largest so far.

    Raises:
      ValueError: a number is none in the narrower dtype.
    """
    if column.stored == column.dtype or not rows.size:
        return rows
    wide = np.float64 if column.dtype.itemsize == 8 else np.float32
    with np.errstate(all="ignore"):  # what overflows is found below
        stored = rows.astype(column.stored)
        was, now = rows.astype(wide), stored.astype(wide)
        moved, size = np.abs(now - was), np.abs(was)
    is_finite = np.isfinite(moved)
    if not is_finite.all():
        bad = (np.isnan(was) != np.isnan(now)) | (np.isinf(was) != np.isinf(now))
        if bad.any():
            place = tuple(np.argwhere(bad)[0])
            raise ValueError(
                f"row {first + int(place[0])} of {column} holds {was[place]}, which is "
                f"{now[place]} as {column.stored}. Keep the rows in a dtype that has it, or leave "
                "dtype out."
            )
    error.absolute = max(error.absolute, float(np.max(moved, where=is_finite, initial=0)))
    has_ratio = is_finite & (size > 0)
    with np.errstate(all="ignore"):
        ratio = np.divide(moved, size, out=np.zeros_like(moved), where=has_ratio)
    error.relative = max(error.relative, float(np.max(ratio)))
    return stored


def widened(column: Column, rows: np.ndarray) -> np.ndarray:
    """Rows in the dtype that they were computed in."""
    return rows if column.stored == column.dtype else rows.astype(column.dtype)
