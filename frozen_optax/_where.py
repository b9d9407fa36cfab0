"""Where in a larger state the parameters are, `where=lambda state: state.params`.

And what follows from it: which leaves are chosen there, and which are their successors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from frozen_optax._resolution import Resolution
from frozen_optax._selectors import Reads, Selector
from frozen_optax._trees import (
    View,
    describe,
    keystr,
    paths_of,
    require_same_structure,
    spec,
    up_to,
)
from frozen_optax._typing import PyTree, Where


class _Marker:
    """Stands for a leaf that is no array."""


class Places(NamedTuple):
    """What `where` returned, with the index of each leaf among all of the state in its place.

    Attributes:
      named: what was returned.
      trees: the parts that it names, one by one.
    """

    named: PyTree
    trees: list[PyTree]


def places(where: Where, tree: PyTree) -> Places:
    """Where in `tree` the parts are that `where` names.

    A tuple or list that `where` makes names several trees; one that is itself a part of `tree` is a
    single tree. A leaf is known by its place and not by what it is: `where` sees a
    `jax.ShapeDtypeStruct` of its own for each.
    """
    leaves, treedef = jax.tree.flatten(tree)
    specs = [spec(leaf) for leaf in leaves]
    # What has no shape is known by a marker, as one leaf may stand at two places.
    markers = [
        _Marker() if each is leaf else each for each, leaf in zip(specs, leaves, strict=True)
    ]
    indices = {id(marker): index for index, marker in enumerate(markers)}
    marked = jax.tree.unflatten(treedef, markers)
    try:
        named = where(marked)
    except Exception as error:
        raise TypeError(
            f"where= raised {type(error).__name__} ({error}) on {describe(tree)}. It is called on "
            "the state, which is the first argument. A step that takes its state elsewhere goes in "
            "a function that takes it first: lambda state, batch: step(batch, state)."
        ) from error
    for path, leaf in jax.tree_util.tree_leaves_with_path(named):
        if id(leaf) not in indices:
            raise TypeError(
                f"where= has to return parts of the state, found {describe(leaf)} at "
                f"{keystr(path) or 'the root'!r} which is none. Write "
                "where=lambda state: state.params, or a tuple of such parts."
            )
    if leaves and not jax.tree.leaves(named):
        raise TypeError(
            f"where= has to return parts of the state, and returned {describe(named)} without a "
            "leaf."
        )
    is_named = lambda node: node is named
    is_part = any(map(is_named, jax.tree.leaves(marked, is_leaf=is_named)))
    several = type(named) in (tuple, list) and not is_part
    indexed = jax.tree.map(lambda marker: indices[id(marker)], named)
    return Places(indexed, list(indexed) if several else [indexed])


def counterparts(where: Where | None, tree: PyTree, other: PyTree, name: str) -> list[PyTree]:
    """What stands in `other` in the place of each of the `named_leaves` of `tree`.

    All else in it may differ.
    """
    if where is None:
        return up_to(jax.tree.structure(tree), other, name)
    named = jax.tree.structure(places(where, tree).named)
    return up_to(named, where(other), name, "what where= names")


def _named_indices(where: Where | None, tree: PyTree) -> list[int]:
    """The index among all leaves of `tree` of each that `where` names; of all without it."""
    if where is None:
        return list(range(jax.tree.structure(tree).num_leaves))
    return jax.tree.leaves(places(where, tree).named)


def named_leaves(where: Where | None, tree: PyTree) -> list[tuple[int, str]]:
    """Of each leaf that `where` names, its index among all of `tree`, and its path in its part.

    Without `where` these are all the leaves.
    """
    if where is None:
        return list(enumerate(paths_of(tree)))
    named: list[tuple[int, str]] = []
    for part in places(where, tree).trees:
        named += zip(jax.tree.leaves(part), paths_of(part), strict=True)
    return named


def successor_of(result: PyTree, first: PyTree, where: Where | None) -> list[tuple[int, int]]:
    """Which leaf of what a step returns is the successor of which leaf of its first argument.

    The successor has the structure of the first argument, and is returned alone or first in a
    tuple. With `where` other parts may differ, if only the type is the same and says something.

    Returns:
      Pairs of indices: of a leaf of the first argument, and of its successor in the result. The
      leaves of a tuple's first item come first in it, so their indices are those in the tuple.

    Raises:
      ValueError: there is no successor; the message names the path at which the trees part ways.
    """
    candidates = [result]
    if type(result) in (tuple, list) or hasattr(result, "_fields"):
        candidates += result[:1]
    expected = jax.tree.structure(first)
    for candidate in candidates:
        if jax.tree.structure(candidate) == expected:
            return [(index, index) for index in _named_indices(where, first)]
    if where is not None and type(first) not in (tuple, list):
        named = places(where, first).named
        for candidate in candidates:
            if type(candidate) is not type(first):
                continue
            try:
                found = places(where, candidate).named
            except Exception:  # a user's function, on a tree that it was not written for
                continue
            if jax.tree.structure(found) == jax.tree.structure(named):
                return list(zip(jax.tree.leaves(named), jax.tree.leaves(found), strict=True))
    difference = ""
    try:
        require_same_structure(candidates[-1], first, "the result", "the first argument")
    except ValueError as error:
        difference = str(error)
    raise ValueError(
        "a step returns the successor of its first argument, alone or first in a tuple: "
        f"{difference}"
    )


@dataclasses.dataclass(frozen=True, repr=False)
class Within(Selector):
    """A selector of a whole state: what `part` selects in the trees that `where` returns.

    Paths are relative to each of them.
    """

    part: Selector
    where: Where

    @property
    def _reads(self) -> Reads:
        return max(self.part._reads, Reads.SHAPES)  # which `where` may look at, too

    @property
    def _may_be_empty(self) -> bool:
        return self.part._may_be_empty

    @property
    def _may_be_all(self) -> bool:
        return self.part._may_be_all

    def _considered(self, resolution: Resolution, tree: PyTree) -> Sequence[int]:
        return _named_indices(self.where, tree)

    def _select(self, view: View) -> np.ndarray:
        leaves = jax.tree.leaves(view.tree)
        found = places(self.where, view.tree)
        named = jax.tree.map(leaves.__getitem__, found.named)
        chosen = self.part._choose(View.of_several(named, map(View.of, found.trees)))
        selected = np.zeros(len(leaves), bool)
        selected[np.array(jax.tree.leaves(found.named), int)[chosen]] = True
        return selected

    def __repr__(self) -> str:
        return f"{self.part!r} within {getattr(self.where, '__qualname__', repr(self.where))}"


def within(selector: Selector, where: Where | None) -> Selector:
    """A selector of the whole tree, or of the parts of it that `where` names."""
    if where is None:
        return selector
    if not callable(where):
        raise TypeError(
            f"where= is a function, found {where!r}. Write where=lambda state: state.params."
        )
    return Within(selector, where)
