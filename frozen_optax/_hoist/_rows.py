"""`Rows`: what was computed once, an example a row."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from frozen_optax import _bits
from frozen_optax._typing import Array, PyTree, TreeDef

# Instead of an array of the rows: a number of examples is wanted of rows that hold nothing.
COUNT = "how many"


@dataclasses.dataclass(frozen=True)
class ArrayOf:
    """A leaf of an argument, whatever the batch size: the shape of an example, or of all."""

    shape: tuple[int, ...]
    has_batch: bool
    dtype: Any
    weak_type: bool

    def at(self, size: int) -> jax.ShapeDtypeStruct:
        """It, at a batch size."""
        shape = (size, *self.shape) if self.has_batch else self.shape
        return jax.ShapeDtypeStruct(shape, self.dtype, weak_type=self.weak_type)


@dataclasses.dataclass(frozen=True)
class Said:
    """A leaf of an argument that is no array, a part of the program: `1` is another than `True`."""

    value: Any
    kind: type

    @classmethod
    def of(cls, value: Any) -> Said:
        """It, as it was given."""
        return cls(value, type(value))


@dataclasses.dataclass(frozen=True)
class Kept:
    """What rows hold and where it comes from: static, a part of their structure.

    Attributes:
      each: the digests of what an example's row holds.
      shared: those of what all examples share.
      treedef: the structure of the arguments that the rows stand for.
      leaves: their leaves: an `ArrayOf`, or what was `Said` where that is no array.
    """

    each: tuple[str, ...]
    shared: tuple[str, ...]
    treedef: TreeDef
    leaves: tuple[ArrayOf | Said, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """What frozen parameters and data determine, as `Hoisted.prepare` computes it.

    It is a pytree of arrays, so `jax.device_get(rows)` holds it on the host, and it may be passed
    to a compiled function. `len(rows)` is the number of examples, and `rows[indices]` those at some
    indices (an array of integers, or a slice), as of an array. Of indices on the host it is an
    `IndexError` that there is no such row; those on a device are clipped, as jax does.

    Attributes:
      each: arrays whose first axis counts examples.
      shared: arrays that are the same for all.
      kept: what they are; rows of two programs differ in it, and so in their structure.
    """

    each: tuple[Array, ...]
    shared: tuple[Array, ...]
    kept: Kept = dataclasses.field(metadata={"static": True})

    def __len__(self) -> int:
        return self.each[0].shape[0]

    def __getitem__(self, indices: Any) -> Rows:
        if not isinstance(indices, slice) and np.ndim(indices) != 1:
            raise TypeError(
                f"rows are taken by an array of indices or a slice, found {indices!r}. For a "
                "single example, rows[i : i + 1]."
            )
        if isinstance(indices, (np.ndarray, list, tuple)):
            _require_within(np.asarray(indices), len(self))
        return dataclasses.replace(self, each=tuple(array[indices] for array in self.each))

    @property
    def bytes_per_example(self) -> int:
        """What one row takes."""
        return sum(array.nbytes for array in self.each) // max(len(self), 1)


def join(parts: Sequence[Rows]) -> Rows:
    """The rows of several batches, one after the other.

    Raises:
      TypeError: what is given are no rows.
      ValueError: there are none, or they are of another program, or of other weights as far as what
        all examples share tells.
    """
    if not parts:
        raise ValueError("there are no rows to join.")
    first = parts[0]
    for i, part in enumerate(parts):
        require_rows(part)
        if part.kept != first.kept:
            raise ValueError(
                f"rows {i} are of another program than rows 0, or of arguments of another "
                "structure, shape or dtype. Prepare all batches by one hoisted function."
            )
        for one, other in zip(first.shared, part.shared, strict=True):
            if not _has_same_bits(one, other):
                raise ValueError(
                    f"what all examples share is another in rows {i} than in rows 0: they were "
                    "prepared with other frozen weights, or another number among the arguments. "
                    "Prepare all batches with the same."
                )
    concatenate = np.concatenate if isinstance(first.each[0], np.ndarray) else jnp.concatenate
    each = tuple(concatenate(arrays) for arrays in zip(*(part.each for part in parts), strict=True))
    return dataclasses.replace(first, each=each)


def _require_within(indices: np.ndarray, count: int) -> None:
    """Raise where there is no such row: an array of jax would give the one at its end."""
    if indices.dtype.kind not in "iu":
        return
    outside = indices[(indices < -count) | (indices >= count)]
    if outside.size:
        raise IndexError(f"there is no row {int(outside[0])}: there are {count}.")


def require_rows(rows: PyTree) -> None:
    """Raise where something is no rows."""
    if not isinstance(rows, Rows):
        raise TypeError(
            f"expected the rows that prepare returned, found {type(rows).__name__}. The order is "
            "hoisted(params, rows, *live_args)."
        )


def _has_same_bits(one: Array, other: Array) -> bool:
    if one is other:
        return True
    return np.array_equal(_bits.bits(one), _bits.bits(other))
