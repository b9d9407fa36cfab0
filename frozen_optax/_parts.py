"""A leaf of which a part trains: which elements, taken out of it and put back.

What trains becomes an array of its own, and that is all the optimizer sees. Elements that form a
block (the last rows, some columns) keep their rank and are cut out by a slice. Whole rows keep it,
too, and others become a vector; these are gathered, by indices that are a part of the program, four
bytes for each axis that the mask speaks of. Which elements they are is static: nothing of this is
computed in a step.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from frozen_optax import _bits
from frozen_optax._resolution import Resolution
from frozen_optax._trees import describe, is_hole
from frozen_optax._typing import Array, Leaf, PyTree, TreeDef

# --- a leaf


def _fewest_axes(mask: np.ndarray) -> np.ndarray:
    """A mask without the last axes that it says nothing about."""
    while mask.ndim > 1 and (mask == mask[..., :1]).all():
        mask = mask[..., 0]
    return mask


def _block(mask: np.ndarray) -> tuple[slice, ...] | None:
    """Where a mask is True, if that is a range of each of its axes."""
    ranges: list[slice] = []
    for axis in range(mask.ndim):
        others = tuple(other for other in range(mask.ndim) if other != axis)
        (at,) = np.nonzero(mask.any(axis=others))
        ranges.append(slice(int(at[0]), int(at[-1]) + 1))
    return tuple(ranges) if mask[tuple(ranges)].all() else None


@dataclasses.dataclass(frozen=True)
class Part:
    """What trains of a leaf.

    Attributes:
      shape: of the leaf.
      digest: tells the parts of leaves of one shape apart.
      frozen: a bool for each element, over as few of the leading axes as tell which are frozen.
    """

    shape: tuple[int, ...]
    digest: str
    frozen: np.ndarray = dataclasses.field(compare=False, repr=False)

    @classmethod
    def of(cls, shape: tuple[int, ...], frozen: np.ndarray) -> Part:
        """The part of a leaf that is not frozen, by a mask over its leading axes."""
        mask = _fewest_axes(frozen)
        written = (str((shape, mask.shape)).encode(), np.packbits(mask).tobytes())
        digest = hashlib.sha256(b" ".join(written)).hexdigest()[:16]
        return cls(shape, digest, mask)

    @functools.cached_property
    def _ranges(self) -> tuple[slice, ...] | None:
        """What trains, as a range of each axis, if it is a block."""
        block = _block(~self.frozen)
        rest = tuple(slice(0, length) for length in self.shape[self.frozen.ndim :])
        return None if block is None else block + rest

    @functools.cached_property
    def _indices(self) -> np.ndarray:
        """Where the elements that train are, or the rows of them, along the axes of the mask."""
        return np.argwhere(~self.frozen).astype(np.int32)

    @functools.cached_property
    def trained_shape(self) -> tuple[int, ...]:
        """The shape of what trains, as the optimizer sees it."""
        if self._ranges is not None:
            return tuple(each.stop - each.start for each in self._ranges)
        return (len(self._indices), *self.shape[self.frozen.ndim :])

    @property
    def trained_size(self) -> int:
        """How many elements train."""
        return math.prod(self.trained_shape)

    @property
    def frozen_shape(self) -> tuple[int, ...]:
        """The shape of what is frozen: of the same rank where it is whole rows, else a vector."""
        return (int(self.frozen.sum()), *self.shape[self.frozen.ndim :])

    def whole_mask(self) -> np.ndarray:
        """A bool for each element of the leaf, True for a frozen one. It takes no memory."""
        return np.broadcast_to(self.frozen.reshape(self._axes), self.shape)

    def take(self, leaf: Array) -> Array:
        """What trains of an array of the leaf's shape. Axes may stand in front."""
        batch = leaf.ndim - len(self.shape)
        if isinstance(leaf, np.ndarray):
            at = self._ranges or tuple(self._indices.T)
            return leaf[(slice(None),) * batch + at]
        take = self._take
        for _ in range(batch):
            take = jax.vmap(take)
        return take(leaf)

    def _take(self, leaf: Array) -> Array:
        if self._ranges is not None:
            starts, stops = zip(*((each.start, each.stop) for each in self._ranges), strict=True)
            return jax.lax.slice(leaf, starts, stops)
        masked = self.frozen.ndim
        dimensions = jax.lax.GatherDimensionNumbers(
            offset_dims=tuple(range(1, 1 + len(self.shape) - masked)),
            collapsed_slice_dims=tuple(range(masked)),
            start_index_map=tuple(range(masked)),
        )
        return jax.lax.gather(
            leaf,
            self._indices,
            dimensions,
            slice_sizes=(1,) * masked + self.shape[masked:],
            indices_are_sorted=True,
            unique_indices=True,
            mode=jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS,
        )

    def put(self, trained: Leaf, leaf: Leaf) -> Leaf:
        """An array of the leaf's shape, `trained` in its elements that train.

        Args:
          trained: in the shape of what trains.
          leaf: has what is to stand in the others. Where that is known to be zero, it is the number
            that adds nothing to numbers of the dtype of `trained`.
        """
        if trained is None or is_hole(trained):
            return trained
        is_zero = _bits.is_made_zero(leaf)
        if is_zero and _bits.is_made_zero(trained):
            return _bits.known_zero(jax.ShapeDtypeStruct(self.shape, trained.dtype))
        trained = jnp.asarray(trained)
        if not is_zero:
            whole = jnp.asarray(leaf)
        elif self._ranges is not None:  # one that is made within whatever is done with it
            zero = jnp.asarray(_bits.zero_of(trained.dtype))
            pairs = zip(self._ranges, self.shape, strict=True)
            around = [(each.start, length - each.stop, 0) for each, length in pairs]
            return jax.lax.pad(trained, zero, around)
        else:
            whole = jnp.full(self.shape, _bits.zero_of(trained.dtype))
        if self._ranges is not None:
            starts = [each.start for each in self._ranges]
            return jax.lax.dynamic_update_slice(whole, trained, starts)
        masked = self.frozen.ndim
        dimensions = jax.lax.ScatterDimensionNumbers(
            update_window_dims=tuple(range(1, 1 + len(self.shape) - masked)),
            inserted_window_dims=tuple(range(masked)),
            scatter_dims_to_operand_dims=tuple(range(masked)),
        )
        return jax.lax.scatter(
            whole,
            self._indices,
            trained,
            dimensions,
            indices_are_sorted=True,
            unique_indices=True,
            mode=jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS,
        )

    def choose(self, of_frozen: Leaf, of_trained: Leaf) -> Leaf:
        """The frozen elements of one array and the others of another, bit for bit.

        Both have the leaf's shape and one dtype. Arrays of numpy give one of numpy.
        """
        arrays = (of_frozen, of_trained)
        if any(isinstance(each, jax.Array) for each in arrays):
            mask = jnp.broadcast_to(self.frozen.reshape(self._axes), self.shape)
            return _bits.select_bits(mask, *map(jnp.asarray, arrays))
        chosen = np.array(of_trained)
        mask = self.whole_mask()
        chosen[mask] = np.asarray(of_frozen)[mask]
        return chosen

    @property
    def _axes(self) -> tuple[int, ...]:
        """The shape of the mask, an axis of length one for each that it says nothing about."""
        return self.frozen.shape + (1,) * (len(self.shape) - self.frozen.ndim)


# --- a tree


@dataclasses.dataclass(frozen=True)
class PartialResolution(Resolution):
    """A `Resolution` in which some leaves are selected in part.

    To all that asks about leaves these are not selected. What is left of each is what its `Part`
    takes.
    """

    in_part: tuple[tuple[int, Part], ...] = ()

    @classmethod
    def of(cls, resolution: Resolution, parts: Mapping[int, Part]) -> PartialResolution:
        """A resolution of whole leaves, and what trains of others, by their indices."""
        fields = {f.name: getattr(resolution, f.name) for f in dataclasses.fields(resolution)}
        made = cls(**fields, in_part=tuple(sorted(parts.items())))
        made.__dict__["of_leaves"] = resolution
        return made

    @functools.cached_property
    def of_leaves(self) -> Resolution:
        fields = dataclasses.fields(Resolution)
        return Resolution(**{field.name: getattr(self, field.name) for field in fields})

    @functools.cached_property
    def parts(self) -> Mapping[int, Part]:
        return dict(self.in_part)

    @functools.cached_property
    def complement(self) -> Resolution:
        return self.of_leaves.complement

    @functools.cached_property
    def holed(self) -> TreeDef:
        return self.of_leaves.holed

    @functools.cached_property
    def pruned(self) -> TreeDef:
        return self.of_leaves.pruned

    def prune(self, treedef: TreeDef) -> TreeDef:
        return self.of_leaves.prune(treedef)

    def rest(self, leaves: Iterable[Leaf]) -> list[PyTree]:
        return self.narrow(self.of_leaves.rest(leaves))

    def narrow(self, rest: Iterable[Leaf]) -> list[Leaf]:
        indices = itertools.compress(itertools.count(), self.complement.selected)
        return [
            self._take(index, leaf) if index in self.parts else leaf
            for index, leaf in zip(indices, rest, strict=True)
        ]

    def _take(self, index: int, leaf: Leaf) -> Leaf:
        if leaf is None or is_hole(leaf):
            return leaf
        part = self.parts[index]
        shape = np.shape(leaf)
        if shape[max(len(shape) - len(part.shape), 0) :] != part.shape:
            raise ValueError(
                f"elements of {self.paths[index]!r} are frozen in the shape {part.shape}, found "
                f"{describe(leaf)}."
            )
        return part.take(leaf if _bits.is_array(leaf) else jnp.asarray(leaf))

    def merge(self, leaves: Iterable[Leaf], rest: Iterable[Leaf]) -> list[Leaf]:
        rest = iter(rest)
        merged: list[Leaf] = []
        for index, (leaf, chosen) in enumerate(zip(leaves, self.selected, strict=True)):
            if chosen:
                merged.append(leaf)
            elif index in self.parts:
                merged.append(self.parts[index].put(next(rest), leaf))
            else:
                merged.append(next(rest))
        return merged


def held(resolution: Resolution) -> Resolution:
    """The leaves of which anything is frozen, as whole ones."""
    if not resolution.parts:
        return resolution
    pairs = enumerate(resolution.selected)
    selected = tuple(chosen or index in resolution.parts for index, chosen in pairs)
    return dataclasses.replace(resolution.of_leaves, selected=selected)


def trained_shapes(resolution: Resolution) -> Sequence[tuple[int, ...] | None]:
    """For each trainable leaf the shape of what trains of it, None for whole ones."""
    shapes = [
        resolution.parts[index].trained_shape if index in resolution.parts else None
        for index in range(len(resolution.paths))
    ]
    return list(itertools.compress(shapes, resolution.complement.selected))
