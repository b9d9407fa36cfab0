"""The leaves of a tree in rows, as `jit` passes them through a compiled function: what is frozen apart from the rest.

Nodes cost time at each call, and so does each leaf that goes in or comes out. A row is a single node; the tree around
its leaves travels as that node's static data, so that jax itself keeps track of which tree came out.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import optax

from frozen_optax._places import Where, places
from frozen_optax._trees import PyTree, Resolution, is_hole, require_same_structure


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class Row:
    """Leaves in a row, known by their paths, and how to make a tree of them."""

    leaves: Sequence[Any]
    paths: tuple[str, ...]
    form: Any

    def tree_flatten_with_keys(self) -> tuple[Any, Any]:
        keys = map(jax.tree_util.DictKey, self.paths)
        return tuple(zip(keys, self.leaves, strict=True)), (self.paths, self.form)

    def tree_flatten(self) -> tuple[Any, Any]:
        return self.leaves, (self.paths, self.form)

    @classmethod
    def tree_unflatten(cls, static: Any, leaves: Any) -> Row:
        return cls(leaves, *static)


def take_apart(resolution: Resolution, leaves: Sequence[Any]) -> tuple[Row, Row]:
    """The frozen leaves of a tree, and the others."""
    rest = resolution.complement
    return (
        Row(list(itertools.compress(leaves, resolution.selected)), resolution.chosen, resolution),
        Row(list(itertools.compress(leaves, rest.selected)), rest.chosen, resolution),
    )


def put_together(frozen: Row, others: Row) -> PyTree:
    """The tree again."""
    resolution, one, other = frozen.form, iter(frozen.leaves), iter(others.leaves)
    return resolution.unflatten([next(one if selected else other) for selected in resolution.selected])


@functools.partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["number"])
@dataclasses.dataclass(frozen=True)
class Kept:
    """Stands in a result for the frozen leaf of this number."""

    number: int


def is_kept(node: Any) -> bool:
    return isinstance(node, Kept)


def successor_of(result: PyTree, first: PyTree, where: Where | None) -> list[tuple[int, int]]:
    """Pairs of numbers of leaves: one of the first argument, and that of its successor in the result.

    The successor has the structure of the first argument. With `where` other parts may differ, if only the type is the
    same and says something.
    """
    candidates = [result]
    if type(result) in (tuple, list) or hasattr(result, "_fields"):  # its first item's leaves come first in it
        candidates += result[:1]
    expected = jax.tree.structure(first)
    for candidate in candidates:
        if jax.tree.structure(candidate) == expected:
            numbers = range(expected.num_leaves) if where is None else jax.tree.leaves(places(where, first).named)
            return [(number, number) for number in numbers]
    if where is not None and type(first) not in (tuple, list):
        named = places(where, first).named
        for candidate in candidates:
            try:
                found = places(where, candidate).named if type(candidate) is type(first) else None
            except Exception:  # a user's function, on a tree that it was not written for
                continue
            if jax.tree.structure(found) == jax.tree.structure(named):
                return list(zip(jax.tree.leaves(named), jax.tree.leaves(found), strict=True))
    difference = ""
    try:
        require_same_structure(candidates[-1], first, "the result", "the first argument")
    except ValueError as error:
        difference = str(error)
    raise ValueError(f"a step returns the successor of its first argument, alone or first in a tuple: {difference}")


def leave_out(result: PyTree, successor: list[tuple[int, int]], resolution: Resolution) -> tuple[list[Any], Any]:
    """The leaves and holes of a result, with a `Kept` for each frozen leaf of the successor, and its structure."""
    frozen = itertools.compress(range(len(resolution.selected)), resolution.selected)
    numbers = {leaf: number for number, leaf in enumerate(frozen)}
    leaves, treedef = jax.tree.flatten(result, is_leaf=is_hole)
    places_of_leaves = [place for place, leaf in enumerate(leaves) if not is_hole(leaf)]
    for ours, theirs in successor:
        if ours in numbers:
            leaves[places_of_leaves[theirs]] = Kept(numbers[ours])
    return leaves, treedef


def as_row(leaves: Sequence[Any], treedef: Any, frozen_count: int) -> Row:
    """What is new in a result. Its form is the tree, and where each leaf stands in `frozen + new + [a hole]`."""
    number = itertools.count(frozen_count)
    order = tuple(-1 if is_hole(leaf) else leaf.number if is_kept(leaf) else next(number) for leaf in leaves)
    new = [leaf for leaf in leaves if not (is_hole(leaf) or is_kept(leaf))]
    return Row(new, tuple(map(str, range(len(new)))), (treedef, order))


def from_row(frozen: Sequence[Any], row: Row) -> PyTree:
    """The result again, the frozen leaves in their places.

    A hole is a leaf here: one is put where it belongs, which is cheaper than to make each anew.
    """
    treedef, order = row.form
    return jax.tree.unflatten(treedef, map([*frozen, *row.leaves, optax.MaskedNode()].__getitem__, order))
