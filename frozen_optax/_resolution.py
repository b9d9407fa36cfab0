"""A `Resolution`: how a choice of leaves lies over a tree."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import optax

from frozen_optax._trees import Memory, in_modules, is_hole, numbered, objects_among, up_to
from frozen_optax._typing import Leaf, PyTree, TreeDef


def _has_only_holes(node: PyTree) -> bool:
    inside = jax.tree.leaves(node, is_leaf=is_hole)
    return bool(inside) and all(map(is_hole, inside))


def _with_holes(tree: PyTree, is_gone: Callable[[PyTree], bool]) -> PyTree:
    """A tree with a hole for each of the largest subtrees that are gone."""
    left = lambda node: optax.MaskedNode() if is_gone(node) else node
    return jax.tree.map(left, tree, is_leaf=is_gone)


@dataclasses.dataclass(frozen=True)
class Resolution:
    """A selector's answer for one tree structure: `selected[i]` belongs to the leaf at `paths[i]`.

    Of what is not selected there are two structures. `holed` has a hole for each selected leaf:
    optax's masks, and anything else that walks the parameters' own structure, understand it.
    `pruned` has one hole for a wholly selected subtree: nodes cost time at every call of a compiled
    function, so this is what is stored.

    Attributes:
      treedef: the structure.
      paths: of the leaves.
      selected: whether each is selected.
      has_holes: whether there are holes in the structure.
      objects: the indices of those that are selected for what they are and not by a choice: leaves
        that are no numbers, which nothing can train, and numbers of Python's in a module of
        Equinox's. In `holed` they are None, as they are in what `eqx.filter` makes, so both give
        one optimizer state.
    """

    treedef: TreeDef
    paths: tuple[str, ...]
    selected: tuple[bool, ...]
    has_holes: bool = dataclasses.field(default=False, compare=False)
    objects: tuple[int, ...] = ()

    def objects_among(self, leaves: Sequence[Leaf]) -> tuple[int, ...]:
        """The indices of the objects among the leaves of a tree of this structure."""
        return objects_among(leaves, lambda: self._in_modules)

    @functools.cached_property
    def _in_modules(self) -> frozenset[int]:
        return in_modules(numbered(self.treedef))

    def with_objects(self, objects: tuple[int, ...]) -> Resolution:
        """The answer where these leaves are selected whatever the selector says."""
        known = self._with_objects.get(objects)
        if known is not None:
            return known
        selected = list(self.selected)
        for index in objects:
            selected[index] = True
        made = dataclasses.replace(self, selected=tuple(selected), objects=objects)
        return self._with_objects.keep(objects, made)

    @functools.cached_property
    def _with_objects(self) -> Memory[Resolution]:
        return Memory()

    @functools.cached_property
    def numbers(self) -> tuple[bool, ...]:
        """Whether each leaf is a number or an array of them, and no object."""
        numbers = [True] * len(self.paths)
        for index in self.objects:
            numbers[index] = False
        return tuple(numbers)

    @functools.cached_property
    def complement(self) -> Resolution:
        """The answer of the negated selector."""
        selected = tuple(not chosen for chosen in self.selected)
        return dataclasses.replace(self, selected=selected, objects=())

    @functools.cached_property
    def chosen(self) -> tuple[str, ...]:
        """The paths of the selected leaves."""
        return tuple(itertools.compress(self.paths, self.selected))

    @functools.cached_property
    def numbers_among_chosen(self) -> tuple[bool, ...]:
        """Whether each selected leaf is a number or an array of them."""
        return tuple(itertools.compress(self.numbers, self.selected))

    @functools.cached_property
    def objects_among_chosen(self) -> tuple[int, ...]:
        """The indices of the objects, counted among the selected leaves."""
        return tuple(at for at, number in enumerate(self.numbers_among_chosen) if not number)

    def unflatten(self, leaves: Iterable[PyTree]) -> PyTree:
        """A tree of the resolved structure."""
        return jax.tree.unflatten(self.treedef, leaves)

    def up_to(self, tree: PyTree, name: str) -> list[PyTree]:
        """What stands in `tree` at each leaf of the resolved structure."""
        return up_to(self.treedef, tree, name)

    def rest(self, leaves: Iterable[Leaf]) -> list[PyTree]:
        """Those of `leaves` that are not selected."""
        return [leaf for leaf, selected in zip(leaves, self.selected, strict=True) if not selected]

    def narrow(self, rest: Iterable[Leaf]) -> list[Leaf]:
        """The same, from the leaves that are not selected as whole ones."""
        return list(rest)

    def cut(self, leaves: Iterable[Leaf]) -> PyTree:
        """The tree of those of `leaves` that are not selected, in the `holed` structure."""
        return jax.tree.unflatten(self.holed, self.rest(leaves))

    def merge(self, leaves: Iterable[Leaf], rest: Iterable[Leaf]) -> list[Leaf]:
        """All leaves: those of `leaves` that are selected, `rest` in place of the others."""
        rest = iter(rest)
        pairs = zip(leaves, self.selected, strict=True)
        return [leaf if chosen else next(rest) for leaf, chosen in pairs]

    def fill(self, leaves: Iterable[Leaf], rest: Iterable[Leaf]) -> PyTree:
        """The whole tree of what `merge` gives."""
        return self.unflatten(self.merge(leaves, rest))

    @functools.cached_property
    def parts(self) -> Mapping[int, Any]:
        """What is left of leaves that are selected in part, by their indices: `_parts.py`."""
        return {}

    @functools.cached_property
    def of_leaves(self) -> Resolution:
        """The same of whole leaves, those that are selected in part being not selected."""
        return self

    @functools.cached_property
    def holed(self) -> TreeDef:
        """The structure of what is not selected, a hole for each selected leaf.

        Of those that are no numbers None stays.
        """
        nodes: list[PyTree] = [optax.MaskedNode() if chosen else 0 for chosen in self.selected]
        for index in self.objects:
            nodes[index] = None
        return jax.tree.structure(self.unflatten(nodes))

    @functools.cached_property
    def _empty(self) -> frozenset[TreeDef]:
        """The structures of the largest subtrees in which nothing but holes is left."""
        nodes = jax.tree.leaves(numbered(self.holed), is_leaf=_has_only_holes)
        return frozenset(jax.tree.structure(node) for node in nodes if _has_only_holes(node))

    @functools.cached_property
    def _prunings(self) -> Memory[TreeDef]:
        return Memory()

    def prune(self, treedef: TreeDef) -> TreeDef:
        """`treedef`, with one hole for each wholly selected subtree of the `holed` in it.

        A state may hold several copies of the trainable part, two moments for example.
        """
        known = self._prunings.get(treedef)
        return self._prunings.keep(treedef, self._prune(treedef)) if known is None else known

    def _prune(self, treedef: TreeDef) -> TreeDef:
        if not self._empty:
            return treedef
        is_empty = lambda node: jax.tree.structure(node) in self._empty
        return jax.tree.structure(_with_holes(numbered(treedef), is_empty))

    @functools.cached_property
    def is_whole(self) -> bool:
        """Whether there is no hole in what is not selected."""
        return not any(map(is_hole, jax.tree.leaves(numbered(self.holed), is_leaf=is_hole)))

    @functools.cached_property
    def nothing_left(self) -> bool:
        """Whether all there is, holes aside, is selected."""
        nodes = jax.tree.leaves(self.unflatten(self.selected), is_leaf=is_hole)
        return bool(nodes) and all(self.selected)

    @functools.cached_property
    def pruned(self) -> TreeDef:
        """The structure of what is not selected, one hole for each wholly selected subtree."""

        # By place, and not by what is there: a hole of the tree itself stays.
        def is_chosen(node: PyTree) -> bool:
            inside = jax.tree.leaves(node)
            return bool(inside) and all(inside)

        return jax.tree.structure(_with_holes(self.unflatten(self.selected), is_chosen))
