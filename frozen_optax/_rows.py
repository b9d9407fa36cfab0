"""The leaves of a tree in rows, as `jit` passes them through a compiled function.

Nodes cost time at each call, and so does each leaf that goes in or comes out. A row is a single
node. The tree around its leaves travels as that node's static data, so that jax itself keeps track
of which tree came out.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, TypeAlias

import jax
import optax

from frozen_optax._resolution import Resolution
from frozen_optax._trees import in_modules, is_hole, is_python_number, program_key
from frozen_optax._typing import Leaf, PyTree, TreeDef

# Objects, each with what tells it from others that are equal to it.
Static: TypeAlias = tuple[tuple[Hashable, Leaf], ...]

# --- what goes in: the first argument, its frozen leaves apart from the others


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class InputRow:
    """The frozen leaves of a tree, or the others. To jax each is known by its path.

    Frozen leaves that are no numbers are no leaves to jax. They are static, so another one is
    another program.
    """

    leaves: Sequence[Leaf]
    is_frozen: bool
    resolution: Resolution

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of the leaves."""
        return self.resolution.chosen if self.is_frozen else self.resolution.complement.chosen

    @property
    def objects(self) -> tuple[Leaf, ...]:
        """The leaves that are no numbers."""
        if not (self.is_frozen and self.resolution.objects):
            return ()
        return tuple(self.leaves[index] for index in self.resolution.objects_among_chosen)

    @property
    def static(self) -> Static:
        """The objects as jax is to compare them, which compares by equality alone."""
        return tuple((program_key(each), each) for each in self.objects)

    def _numbers(self, leaves: Sequence[Any]) -> Sequence[Any]:
        """Those of some things, one for each leaf, that belong to numbers."""
        if not (self.is_frozen and self.resolution.objects):
            return leaves
        return tuple(itertools.compress(leaves, self.resolution.numbers_among_chosen))

    def tree_flatten_with_keys(self) -> tuple[Iterable[Any], Any]:
        leaves, static = self.tree_flatten()
        keys = map(jax.tree_util.DictKey, self._numbers(self.paths))
        return tuple(zip(keys, leaves, strict=True)), static

    def tree_flatten(self) -> tuple[Sequence[Leaf], Any]:
        return self._numbers(self.leaves), (self.is_frozen, self.resolution, self.static)

    @classmethod
    def tree_unflatten(
        cls, static: tuple[bool, Resolution, Static], leaves: Sequence[Leaf]
    ) -> InputRow:
        is_frozen, resolution, objects = static
        if objects:
            numbers, others = iter(leaves), (each for _, each in objects)
            leaves = [
                next(numbers if is_number else others)
                for is_number in resolution.numbers_among_chosen
            ]
        return cls(leaves, is_frozen, resolution)


def partition_leaves(
    resolution: Resolution, leaves: Sequence[Leaf]
) -> tuple[list[Leaf], list[Leaf]]:
    """The frozen ones of the leaves of a tree, and the others."""
    frozen = list(itertools.compress(leaves, resolution.selected))
    others = list(itertools.compress(leaves, resolution.complement.selected))
    return frozen, others


def partition_rows(resolution: Resolution, leaves: Sequence[Leaf]) -> tuple[InputRow, InputRow]:
    """The frozen leaves of a tree as a row, and the others as another."""
    frozen, others = partition_leaves(resolution, leaves)
    return InputRow(frozen, True, resolution), InputRow(others, False, resolution)


def combine_rows(frozen: InputRow, others: InputRow) -> PyTree:
    """The tree again."""
    resolution = frozen.resolution
    of_frozen, of_others = iter(frozen.leaves), iter(others.leaves)
    return resolution.unflatten(
        [next(of_frozen if selected else of_others) for selected in resolution.selected]
    )


# --- what comes out: a result, its frozen leaves left out


@functools.partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["index"])
@dataclasses.dataclass(frozen=True)
class Kept:
    """Stands in a result for one of the frozen leaves, by its index among them."""

    index: int


def is_kept(node: PyTree) -> bool:
    """Whether `node` stands for a frozen leaf."""
    return isinstance(node, Kept)


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class OutputRow:
    """The leaves of a result that are new, and how to make the result of them.

    Attributes:
      leaves: what is new.
      treedef: the structure of the result, in which each hole and each frozen leaf is a leaf.
      order: for each of these, its index in `[*frozen, *leaves, a hole]`.
    """

    leaves: Sequence[Leaf]
    treedef: TreeDef
    order: tuple[int, ...]

    def tree_flatten_with_keys(self) -> tuple[Iterable[Any], Any]:
        keys = map(jax.tree_util.SequenceKey, range(len(self.leaves)))
        return tuple(zip(keys, self.leaves, strict=True)), (self.treedef, self.order)

    def tree_flatten(self) -> tuple[Sequence[Leaf], Any]:
        return self.leaves, (self.treedef, self.order)

    @classmethod
    def tree_unflatten(
        cls, static: tuple[TreeDef, tuple[int, ...]], leaves: Sequence[Leaf]
    ) -> OutputRow:
        return cls(leaves, *static)


def leave_out(
    result: PyTree,
    successor: Sequence[tuple[int, int]],
    resolution: Resolution,
    objects: Sequence[Leaf],
) -> tuple[list[Leaf], TreeDef]:
    """The leaves and holes of a result, a `Kept` for each frozen leaf, and the result's structure.

    Args:
      result: what a step returns.
      successor: which leaf of it is the successor of which leaf of the first argument.
      resolution: which leaves of the first argument are frozen.
      objects: those of them that are no numbers.
    """
    frozen = itertools.compress(range(len(resolution.selected)), resolution.selected)
    among_frozen = {leaf: index for index, leaf in enumerate(frozen)}
    # What is no number is frozen wherever it stands in the first argument.
    is_object = {id(objects[at]): index for at, index in enumerate(resolution.objects_among_chosen)}
    nodes, treedef = jax.tree.flatten(result, is_leaf=is_hole)
    places_of_leaves = [place for place, node in enumerate(nodes) if not is_hole(node)]
    for ours, theirs in successor:
        if ours in among_frozen:
            nodes[places_of_leaves[theirs]] = Kept(among_frozen[ours])
    # A number of Python's may be one object at many places. Elsewhere it is an array, as ever.
    has_numbers = any(map(is_python_number, objects))
    inside = in_modules(result) if has_numbers else frozenset[int]()
    for index, place in enumerate(places_of_leaves if is_object else ()):
        node = nodes[place]
        if id(node) in is_object and (index in inside or not is_python_number(node)):
            nodes[place] = Kept(is_object[id(node)])
    return nodes, treedef


def as_row(nodes: Sequence[PyTree], treedef: TreeDef, frozen_count: int) -> OutputRow:
    """What is new in a result, of which `leave_out` has made these."""
    new: list[Leaf] = []
    order: list[int] = []
    for node in nodes:
        if is_hole(node):
            order.append(-1)  # the last, however many are new
        elif is_kept(node):
            order.append(node.index)
        else:
            order.append(frozen_count + len(new))
            new.append(node)
    return OutputRow(new, treedef, tuple(order))


def from_row(frozen: Sequence[Leaf], row: OutputRow) -> PyTree:
    """The result again, the frozen leaves in their places.

    A hole is a leaf here: one is put where it belongs, which is cheaper than to make each anew.
    """
    every = [*frozen, *row.leaves, optax.MaskedNode()]
    return jax.tree.unflatten(row.treedef, map(every.__getitem__, row.order))
