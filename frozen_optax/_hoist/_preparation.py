"""`prepare`, compiled once for a data set and run batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from frozen_optax import _bits
from frozen_optax._hoist._rows import Rows
from frozen_optax._proofs._trace import abstract, is_array_or_float, is_number
from frozen_optax._selectors import Selector, resolve
from frozen_optax._trees import describe, objects_in, paths_of
from frozen_optax._typing import Leaf, PyTree

Batch = tuple[Any, ...]


class Preparation:
    """What is computed of each batch. Compiled for the size of the first one.

    Attributes:
      shapes: the rows of the first batch, abstract.
      size: the examples of the first batch.
      shared: the arrays that all rows share.
      frozen: the frozen leaves, on a device.
    """

    def __init__(
        self,
        prepare: Callable[..., Rows],
        selector: Selector,
        params: PyTree,
        first: Batch,
        live: Sequence[PyTree] | None,
    ):
        _require_tuple(0, first)
        leaves, treedef = jax.tree.flatten(params)
        selected = resolve(selector, params, to_train=True).selected
        objects = objects_in(params)
        numbers = [i for i, leaf in enumerate(leaves) if is_number(leaf) and i not in objects]
        places = [i for i in numbers if selected[i]]
        # Of what is trained shapes are enough; it need not go to the device.
        others = list(leaves)
        for i in numbers:
            if not selected[i]:
                others[i] = abstract(leaves[i])
        self.frozen = [_on_device(leaves[i]) for i in places]
        self._leaves, self._treedef = jax.tree.flatten(first)

        def rows_of(frozen: Sequence[Any], data: Sequence[Any]) -> Rows:
            filled = list(others)
            for place, leaf in zip(places, frozen, strict=True):
                filled[place] = leaf
            known = iter(data)
            args = [next(known) if is_array_or_float(leaf) else leaf for leaf in self._leaves]
            whole = jax.tree.unflatten(treedef, filled)
            return prepare(whole, *jax.tree.unflatten(self._treedef, args), live=live)

        rows = jax.jit(rows_of)
        data = _data(first)
        self.shapes: Rows = jax.eval_shape(rows, self.frozen, data)
        self.size = len(self.shapes)
        # Apart, so that what is shared, which may be large, is not returned with each batch.
        self._each = jax.jit(lambda frozen, data: rows(frozen, data).each)
        shared = jax.jit(lambda frozen, data: rows(frozen, data).shared)
        self.shared: tuple[Any, ...] = shared(self.frozen, data) if self.shapes.shared else ()

    def arrays(self, number: int, batch: Batch) -> list[Any]:
        """The arrays of a batch of which each row is an example's.

        Raises:
          TypeError: it is no tuple.
          ValueError: it is not like the first one.
        """
        _require_tuple(number, batch)
        leaves, treedef = jax.tree.flatten(batch)
        if treedef != self._treedef:
            raise ValueError(
                f"batch {number} has another structure than the first: {treedef}, expected "
                f"{self._treedef}. Give tuples of the same arguments."
            )
        paths = paths_of(batch)
        for path, leaf, first in zip(paths, leaves, self._leaves, strict=True):
            if not _is_like(leaf, first):
                raise ValueError(
                    f"argument {path!r} of batch {number} is {_words(leaf)}, and that of the first "
                    f"batch {_words(first)}. Examples are of one shape and dtype, and what has no "
                    "axis of examples is the same in all batches."
                )
        arrays = [leaf for leaf in leaves if _has_batch(leaf)]
        sizes = sorted({len(array) for array in arrays})
        if len(sizes) > 1 or not 0 < sizes[0] <= self.size:
            raise ValueError(
                f"the arguments of batch {number} have {' and '.join(map(str, sizes))} examples, "
                f"expected 1 to {self.size}. The first axis of each array counts examples; no "
                "batch is empty, or larger than the first."
            )
        return arrays

    def rows(self, batch: Batch) -> Sequence[jax.Array]:
        """The rows of a batch, and of what it is filled up with behind them.

        Filled up, a smaller one needs no other program, and is rounded as the others are. That it
        may be is what `hoist` has shown: no row depends on another.
        """
        return self._each(self.frozen, [self._filled_up(leaf) for leaf in _data(batch)])

    def _filled_up(self, leaf: Leaf) -> Leaf:
        if _has_batch(leaf) and len(leaf) < self.size:
            return leaf[np.minimum(np.arange(self.size), len(leaf) - 1)]
        # A loader may write the next batch into the same array, while this one is computed with.
        return leaf.copy() if isinstance(leaf, np.ndarray) else leaf


def _require_tuple(number: int, batch: Any) -> None:
    if not isinstance(batch, tuple):
        raise TypeError(
            f"batches are tuples of the arguments of prepare, found {describe(batch)} as batch "
            f"{number}. Of a single argument, (x,)."
        )


def _data(batch: Batch) -> list[Any]:
    return list(filter(is_array_or_float, jax.tree.leaves(batch)))


def _has_batch(leaf: Leaf) -> bool:
    return is_array_or_float(leaf) and np.ndim(leaf) > 0


def _is_like(leaf: Leaf, first: Leaf) -> bool:
    if not (is_array_or_float(leaf) and is_array_or_float(first)):
        return type(leaf) is type(first) and bool(leaf == first)
    one, other = abstract(leaf), abstract(first)
    if (one.shape[1:], one.dtype, one.weak_type) != (other.shape[1:], other.dtype, other.weak_type):
        return False
    if one.shape and other.shape:
        return True
    bits = [_bits.bits(np.asarray(each)) for each in (leaf, first)]
    return one.shape == other.shape and np.array_equal(*bits)


def _words(leaf: Leaf) -> str:
    return describe(leaf) if _has_batch(leaf) else repr(leaf)


def _on_device(leaf: Leaf) -> Leaf:
    """A frozen leaf where it does not have to be brought to at each batch."""
    return jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf


def on_host(array: jax.Array) -> np.ndarray:
    """Computed rows in the memory of the host."""
    if not array.is_fully_addressable:
        raise ValueError(
            "the rows lie on devices of several processes. Let each process build a cache of its "
            "own examples, of arrays that it has alone, at a path of its own."
        )
    return np.asarray(array)
