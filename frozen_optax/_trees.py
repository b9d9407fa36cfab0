"""Pytrees as the library walks them: paths, holes, how two structures compare, and a tree with some leaves chosen."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

PyTree: TypeAlias = Any

_MAX_REMEMBERED = 16  # structures: parameters, gradients with holes, a few models


def is_hole(node: Any) -> bool:
    """Whether `node` stands for a leaf or subtree that is not there."""
    return isinstance(node, optax.MaskedNode)


def is_traced(leaf: Any) -> bool:
    """Whether the values of `leaf` are not known yet."""
    return isinstance(leaf, jax.core.Tracer)


def is_at_hand(leaf: Any) -> bool:
    """Whether `leaf` is a number or an array of them whose values can be read."""
    if isinstance(leaf, jax.Array):
        return not is_traced(leaf) and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) and not leaf.is_deleted()
    return isinstance(leaf, (bool, int, float, complex, np.ndarray, np.generic))


def keystr(path: Any) -> str:
    """The path of a leaf as users write it: `encoder/layer_0/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _variable_type() -> Any:
    """`nnx.Variable`, or no type at all: one cannot exist before its module is imported."""
    nnx = sys.modules.get("flax.nnx")
    return nnx.Variable if nnx else ()


def flatten_with_holes(node: PyTree, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, Any]]:
    """Leaves and holes in order, each with its key path; the `value` key of an NNX Variable is no part of it."""
    variable = _variable_type()
    stop = lambda n: is_hole(n) or (isinstance(n, variable) and n is not node)
    for keys, leaf in jax.tree_util.tree_flatten_with_path(node, is_leaf=stop)[0]:
        full = path + (keys[1:] if isinstance(node, variable) else keys)
        if isinstance(leaf, variable) and leaf is not node:
            yield from flatten_with_holes(leaf, full)
        else:
            yield full, leaf


def paths_of(tree: PyTree) -> list[str]:
    """The paths of the leaves, in order."""
    return [keystr(path) for path, node in flatten_with_holes(tree) if not is_hole(node)]


def remember(cache: dict[Any, Any], key: Any, value: Any) -> None:
    """Keeps `value`, and the last few others."""
    if key not in cache and len(cache) >= _MAX_REMEMBERED:
        cache.pop(next(iter(cache)), None)
    cache[key] = value


def spec(leaf: Any) -> Any:
    """Shape and dtype of an array-like, whatever it is made of; any other leaf as it is."""
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype") and not isinstance(leaf, type):  # np.float32 has both
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    if isinstance(leaf, (bool, int, float, complex)):
        return jax.ShapeDtypeStruct((), jax.dtypes.canonicalize_dtype(np.result_type(leaf)))
    return leaf


@dataclasses.dataclass(frozen=True)
class View:
    """A tree as selectors see it: its paths, its leaves' shapes and dtypes, and where its holes are."""

    tree: PyTree
    paths: tuple[str, ...]
    holes: tuple[str, ...]

    @classmethod
    def of(cls, tree: PyTree) -> View:
        flat = [(keystr(path), is_hole(node)) for path, node in flatten_with_holes(tree)]
        return cls(tree, *(tuple(path for path, hole in flat if hole is wanted) for wanted in (False, True)))

    @functools.cached_property
    def specs(self) -> tuple[Any, ...]:
        """Shapes and dtypes, leaf by leaf."""
        return tuple(map(spec, jax.tree.leaves(self.tree)))


def refuse_live(before: PyTree, after: PyTree) -> None:
    """Raise where two trees hold the very same NNX Variable: what changed the one has changed the other."""
    variable = _variable_type()
    is_variable = lambda node: isinstance(node, variable)
    own = {id(node) for node in jax.tree.leaves(before, is_leaf=is_variable) if is_variable(node)}
    for path, node in jax.tree_util.tree_leaves_with_path(after, is_leaf=is_variable) if own else ():
        if id(node) in own:
            raise ValueError(
                f"both trees hold the same nnx.Variable at {keystr(path)!r}, so they always agree: nnx.state(model) "
                "makes no copy. Take one before the step and one after it: nnx.to_pure_dict(nnx.state(model))."
            )


def join(path: str, key: str) -> str:
    """The path of a child; the `value` key of an NNX Variable, which `children` leaves empty, is no part of it."""
    return f"{path}/{key}" if path and key else path or key


def require_alive(path: str, *leaves: Any) -> None:
    """Raise where the values of an array are gone."""
    for leaf in leaves:
        if isinstance(leaf, jax.Array) and not is_traced(leaf) and leaf.is_deleted():
            raise ValueError(
                f"the array at {path!r} was donated and its values are gone. Keep a copy of it before the step: "
                "jax.tree.map(jnp.copy, params)."
            )


def children(node: PyTree) -> tuple[list[tuple[str, Any]], Any]:
    """The children of a node with their keys, one level down, and the node's own structure."""
    flat, treedef = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda n: n is not node)
    hidden = 1 if isinstance(node, _variable_type()) else 0
    return [(keystr(path[hidden:]), child) for path, child in flat], treedef


def describe(node: Any) -> str:
    """One node or leaf in a few words, for an error message."""
    if node is None or is_hole(node):
        return "None" if node is None else "a hole (MaskedNode)"
    if hasattr(node, "shape") and hasattr(node, "dtype"):
        return f"a leaf {node.dtype}{list(node.shape)}"
    if jax.tree_util.all_leaves([node]):
        return f"a leaf of type {type(node).__name__}"
    keys = [key for key, _ in children(node)[0]]
    shown = ", ".join(keys[:6]) + (", ..." if len(keys) > 6 else "")
    return f"a {type(node).__name__} of {len(keys)} ({shown})"


class Mismatch(Exception):
    """A prefix and a tree part ways: the path, what stands in the prefix, what in the tree."""


def align(prefix: PyTree, tree: PyTree, path: str = "") -> Iterator[Any]:
    """What stands in `tree` at each leaf of `prefix`; a hole stands for every leaf below it."""
    if jax.tree_util.all_leaves([prefix]):
        yield tree
        return
    expected, expected_def = children(prefix)
    found, found_def = children(tree)
    if is_hole(tree):
        yield from (tree for _ in jax.tree.leaves(prefix))
    elif expected_def != found_def:
        raise Mismatch(path or "the root", describe(prefix), describe(tree))
    else:
        for (key, left), (_, right) in zip(expected, found, strict=True):
            yield from align(left, right, join(path, key))


def up_to(treedef: Any, tree: PyTree, name: str, other: str = "the parameters") -> list[Any]:
    """What stands in `tree` at each leaf of a structure; an error that names the path if it differs."""
    try:
        return treedef.flatten_up_to(tree)
    except (ValueError, TypeError):  # one hole for a whole subtree, or an error that names no path
        try:
            return list(align(jax.tree.unflatten(treedef, range(treedef.num_leaves)), tree))
        except Mismatch as mismatch:
            path, expected, found = mismatch.args
            raise ValueError(
                f"{name} and {other} differ in structure at {path!r}: found {found}, expected {expected}."
            ) from None


def leaves_if(treedef: Any, tree: PyTree) -> list[Any] | None:
    """The leaves of a tree if it has that structure: cheaper than to flatten it and to look its structure up."""
    try:
        leaves = treedef.flatten_up_to(tree)
    except (ValueError, TypeError):
        return None
    return leaves if jax.tree_util.all_leaves(leaves) else None


def require_same_structure(tree: PyTree, reference: PyTree, name: str, other: str) -> None:
    """Raise, with the path, where a tree has another structure than a reference."""
    treedef, expected = jax.tree.structure(tree), jax.tree.structure(reference)
    if treedef == expected:
        return
    up_to(expected, tree, name, other)
    try:
        list(align(tree, reference))  # the tree may go deeper than the reference
    except Mismatch as mismatch:
        path, found, wanted = mismatch.args
        message = f"{name} and {other} differ in structure at {path!r}: found {found}, expected {wanted}."
        raise ValueError(message) from None
    raise ValueError(f"{name} and {other} differ in structure: found {treedef}, expected {expected}.")


@dataclasses.dataclass(frozen=True)
class Resolution:
    """A selector's answer for one tree structure: `selected[i]` belongs to the leaf at `paths[i]`.

    Of what is not selected there are two structures. `holed` has a hole for each selected leaf: optax's masks, and
    anything else that walks the parameters' own structure, understand it. `pruned` has one hole for a wholly selected
    subtree: nodes cost time at every call of a compiled function, so this is what is stored.
    """

    treedef: Any
    paths: tuple[str, ...]
    selected: tuple[bool, ...]

    @functools.cached_property
    def complement(self) -> Resolution:
        """The answer of the negated selector."""
        return Resolution(self.treedef, self.paths, tuple(not chosen for chosen in self.selected))

    @functools.cached_property
    def chosen(self) -> tuple[str, ...]:
        """The paths of the selected leaves."""
        return tuple(itertools.compress(self.paths, self.selected))

    def unflatten(self, leaves: Any) -> PyTree:
        """A tree of the resolved structure."""
        return jax.tree.unflatten(self.treedef, leaves)

    def up_to(self, tree: PyTree, name: str) -> list[Any]:
        """What stands in `tree` at each leaf of the resolved structure."""
        return up_to(self.treedef, tree, name)

    def rest(self, leaves: Iterable[Any]) -> list[Any]:
        """Those of `leaves` that are not selected."""
        return [leaf for leaf, selected in zip(leaves, self.selected, strict=True) if not selected]

    def cut(self, leaves: Iterable[Any]) -> PyTree:
        """The tree of those of `leaves` that are not selected, a hole for each that is."""
        return jax.tree.unflatten(self.holed, self.rest(leaves))

    def fill(self, leaves: Iterable[Any], rest: Iterable[Any]) -> PyTree:
        """The whole tree: those of `leaves` that are selected, and for the others, in turn, those of `rest`."""
        rest = iter(rest)
        return self.unflatten(
            [leaf if chosen else next(rest) for leaf, chosen in zip(leaves, self.selected, strict=True)]
        )

    @functools.cached_property
    def holed(self) -> Any:
        """The structure of what is not selected, a hole for each selected leaf."""
        return jax.tree.structure(self.unflatten([optax.MaskedNode() if hole else 0 for hole in self.selected]))

    @functools.cached_property
    def _empty(self) -> frozenset[Any]:
        """The structures of the largest subtrees in which nothing but holes is left."""
        found = set()

        def only_holes(node: PyTree) -> bool:
            inside = jax.tree.leaves(node, is_leaf=is_hole)
            if empty := bool(inside) and all(map(is_hole, inside)):
                found.add(jax.tree.structure(node))
            return empty

        jax.tree.leaves(jax.tree.unflatten(self.holed, range(self.holed.num_leaves)), is_leaf=only_holes)
        return frozenset(found)

    @functools.cached_property
    def _prunings(self) -> dict[Any, Any]:
        return {}

    def prune(self, treedef: Any) -> Any:
        """`treedef`, in which copies of `holed` stand, with one hole for each wholly selected subtree."""
        if treedef not in self._prunings:
            remember(self._prunings, treedef, self._prune(treedef))
        return self._prunings[treedef]

    def _prune(self, treedef: Any) -> Any:
        empty = lambda node: jax.tree.structure(node) in self._empty
        tree = jax.tree.unflatten(treedef, range(treedef.num_leaves))
        return jax.tree.structure(jax.tree.map(lambda n: optax.MaskedNode() if empty(n) else n, tree, is_leaf=empty))

    @functools.cached_property
    def is_whole(self) -> bool:
        """Whether there is no hole in what is not selected."""
        tree = jax.tree.unflatten(self.holed, range(self.holed.num_leaves))
        return not any(map(is_hole, jax.tree.leaves(tree, is_leaf=is_hole)))

    @functools.cached_property
    def nothing_left(self) -> bool:
        """Whether all there is, holes aside, is selected."""
        return all(self.selected) and bool(jax.tree.leaves(self.unflatten(self.selected), is_leaf=is_hole))

    @functools.cached_property
    def pruned(self) -> Any:
        """The structure of what is not selected, one hole for each wholly selected subtree."""
        whole = lambda node: all(inside := jax.tree.leaves(node)) and bool(inside)  # by place: a hole of the tree stays
        chosen = self.unflatten(self.selected)
        return jax.tree.structure(jax.tree.map(lambda n: optax.MaskedNode() if whole(n) else n, chosen, is_leaf=whole))
