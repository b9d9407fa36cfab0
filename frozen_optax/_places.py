"""Where in a larger state the parameters are: `where=lambda state: state.params`, and a choice of leaves there."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np

from frozen_optax._selection import Selector
from frozen_optax._trees import PyTree, View, describe, keystr, spec

Where: TypeAlias = Callable[[Any], Any]


class _Marker:
    """Stands for a leaf that is no array."""


class Places(NamedTuple):
    """What `where` returned, in place of each leaf its number in the state, and the trees that it names."""

    named: PyTree
    trees: list[PyTree]


def places(where: Where, tree: PyTree) -> Places:
    """Where in `tree` the parts are that `where` names.

    A tuple or list that `where` makes names several trees; one that is itself a part of `tree` is a single tree. A leaf
    is known by its place and not by what it is: `where` sees a `jax.ShapeDtypeStruct` of its own for each.
    """
    leaves, treedef = jax.tree.flatten(tree)
    markers = [_Marker() if (marker := spec(leaf)) is leaf else marker for leaf in leaves]
    numbers = {id(marker): number for number, marker in enumerate(markers)}
    marked = jax.tree.unflatten(treedef, markers)
    named = where(marked)
    for path, leaf in jax.tree_util.tree_leaves_with_path(named):
        if id(leaf) not in numbers:
            raise TypeError(
                f"where= has to return parts of the state, found {describe(leaf)} at {keystr(path) or 'the root'!r} "
                "which is none. Write where=lambda state: state.params, or a tuple of such parts."
            )
    if leaves and not jax.tree.leaves(named):
        raise TypeError(f"where= has to return parts of the state, and returned {describe(named)} without a leaf.")
    is_named = lambda node: node is named
    several = type(named) in (tuple, list) and not any(map(is_named, jax.tree.leaves(marked, is_leaf=is_named)))
    numbered = jax.tree.map(lambda marker: numbers[id(marker)], named)
    return Places(numbered, list(numbered) if several else [numbered])


@dataclasses.dataclass(frozen=True, repr=False)
class Within(Selector):
    """A selector of a whole state: what `part` selects in the trees that `where` returns, paths relative to each."""

    part: Selector
    where: Where

    @property
    def _reads(self) -> Any:
        return self.part._reads

    def _select(self, view: View) -> np.ndarray:
        leaves = jax.tree.leaves(view.tree)
        found = places(self.where, view.tree)
        views = [View.of(tree) for tree in found.trees]
        paths, holes = (
            tuple(itertools.chain.from_iterable(getattr(each, field) for each in views)) for field in ("paths", "holes")
        )
        chosen = self.part._select(View(jax.tree.map(leaves.__getitem__, found.named), paths, holes))
        selected = np.zeros(len(leaves), bool)
        selected[np.array(jax.tree.leaves(found.named), int)[chosen]] = True
        return selected

    def __repr__(self) -> str:
        return f"{self.part!r} within {getattr(self.where, '__qualname__', repr(self.where))}"
