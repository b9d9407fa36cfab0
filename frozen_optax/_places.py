"""Where in a larger state the parameters are: `where=lambda state: state.params`, and a choice of leaves there."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import numpy as np

from frozen_optax._selection import Selector
from frozen_optax._trees import PyTree, View, describe, keystr

Where: TypeAlias = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class _Marker:
    """Stands for the leaf of this number, so that a leaf is known by its place and not by what is in it."""

    index: int


def places(where: Where | None, tree: PyTree) -> list[PyTree]:
    """The trees that `where` returns, in place of each leaf its number in `tree`; all of `tree` without a `where`.

    A tuple or list that `where` makes names several trees; one that is itself a part of `tree` is a single tree.
    """
    treedef = jax.tree.structure(tree)
    if where is None:
        return [jax.tree.unflatten(treedef, range(treedef.num_leaves))]
    marked = jax.tree.unflatten(treedef, map(_Marker, range(treedef.num_leaves)))
    named = where(marked)
    is_named = lambda node: node is named
    makes_several = type(named) in (tuple, list) and not any(map(is_named, jax.tree.leaves(marked, is_leaf=is_named)))
    for path, leaf in jax.tree_util.tree_leaves_with_path(named):
        if not isinstance(leaf, _Marker):
            raise TypeError(
                f"where= has to return parts of the state, found {describe(leaf)} at {keystr(path) or 'the root'!r} "
                "which is none. Write where=lambda state: state.params, or a tuple of such parts."
            )
    return [jax.tree.map(lambda marker: marker.index, place) for place in (named if makes_several else [named])]


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
        named = places(self.where, view.tree)
        trees = [jax.tree.map(leaves.__getitem__, place) for place in named]
        views = [View.of(tree) for tree in trees]
        paths, holes = (
            tuple(itertools.chain.from_iterable(getattr(each, field) for each in views)) for field in ("paths", "holes")
        )
        chosen = self.part._select(View(trees[0] if len(trees) == 1 else tuple(trees), paths, holes))
        selected = np.zeros(len(leaves), bool)
        selected[np.array(jax.tree.leaves(named), int)[chosen]] = True
        return selected

    def __repr__(self) -> str:
        return f"{self.part!r} within {getattr(self.where, '__qualname__', repr(self.where))}"
