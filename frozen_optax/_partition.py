"""Splitting a tree into its trainable and its frozen part, and joining the parts again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import optax

from frozen_optax._selection import Selection, frozen_selector
from frozen_optax._trees import PyTree, children, describe, is_hole, join


def partition(
    tree: PyTree, frozen: Selection = None, *, trainable: Selection = None, prune: bool = False
) -> tuple[PyTree, PyTree]:
    """Splits a tree in two: `combine(*partition(tree, frozen))` is `tree`, the very same leaves.

    Args:
      tree: any pytree; `None` stays `None` in both parts.
      frozen: what is frozen, as `freeze` takes it.
      trainable: what is not frozen, instead.
      prune: leave one hole for a subtree of which nothing is left, instead of one a leaf. That is the structure in
        which the state of `with_frozen` holds the trainable part, and the cheaper one to pass to a compiled function.

    Returns:
      `(trainable, frozen)`: two trees in the structure of `tree`, with a hole (`optax.MaskedNode`, a node without
      leaves) for each leaf that is in the other.

    Raises:
      TypeError, ValueError: as `freeze`.

    Example:
      >>> import frozen_optax as fo
      >>> trainable, frozen = fo.partition({"encoder": 1.0, "head": 2.0}, "encoder")
      >>> trainable
      {'encoder': MaskedNode(), 'head': 2.0}
      >>> fo.combine(trainable, frozen)
      {'encoder': 1.0, 'head': 2.0}
    """
    selector = frozen_selector(frozen, trainable)
    leaves = jax.tree.leaves(tree)

    def part(resolution: Any) -> PyTree:
        return jax.tree.unflatten(resolution.pruned if prune else resolution.holed, resolution.rest(leaves))

    return part(selector._resolve(tree)), part((~selector)._resolve(tree))


def _join(parts: Sequence[PyTree], path: str) -> PyTree:
    present = [part for part in parts if not is_hole(part)]
    if len(present) <= 1:
        return present[0] if present else optax.MaskedNode()
    keyed, treedef = children(present[0])
    below = [children(part) for part in present[1:]]
    if any(other != treedef for _, other in below):
        raise ValueError(
            f"cannot combine: the parts differ in structure at {path or 'the root'!r}: "
            f"{', '.join(map(describe, present))}."
        )
    if jax.tree_util.all_leaves(present[:1]):
        raise ValueError(
            f"cannot combine: {len(present)} parts have a leaf at {path or 'the root'!r} ({describe(present[0])}). "
            "Each leaf belongs to one part and is a hole (optax.MaskedNode) in the others."
        )
    columns = zip(keyed, *([child for _, child in flat] for flat, _ in below), strict=True)
    return jax.tree.unflatten(treedef, [_join([child, *others], join(path, key)) for (key, child), *others in columns])


def combine(*parts: PyTree) -> PyTree:
    """Joins the parts of a tree: at each place, whatever the one part holds that has no hole there.

    Args:
      *parts: trees as `partition` makes them, pruned or not, with any leaves in them.

    Returns:
      The whole tree. A place where all parts have a hole stays a hole.

    Raises:
      TypeError: no parts are given.
      ValueError: two parts have a leaf at the same place, or differ in structure; the message names the path.

    Example:
      >>> import frozen_optax as fo, optax
      >>> fo.combine({"encoder": 1.0, "head": optax.MaskedNode()}, {"encoder": optax.MaskedNode(), "head": 2.0})
      {'encoder': 1.0, 'head': 2.0}
    """
    if not parts:
        raise TypeError("combine needs at least one part.")
    flat, treedefs = zip(*(jax.tree.flatten(part, is_leaf=is_hole) for part in parts), strict=True)
    if all(treedef == treedefs[0] for treedef in treedefs[1:]):  # a hole a leaf: no need to walk the trees
        present = [[leaf for leaf in column if not is_hole(leaf)] for column in zip(*flat, strict=True)]
        if all(len(leaves) <= 1 for leaves in present):
            return jax.tree.unflatten(treedefs[0], [leaves[0] if leaves else optax.MaskedNode() for leaves in present])
    return _join(parts, "")
