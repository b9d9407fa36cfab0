"""Splitting a tree into its trainable and its frozen part, and joining the parts again."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import optax

from frozen_optax._resolution import Resolution
from frozen_optax._selection import resolve_frozen
from frozen_optax._trees import children, describe, is_hole, join
from frozen_optax._typing import Frozen, PyTree


def partition(
    tree: PyTree, frozen: Frozen = None, *, trainable: Frozen = None, prune: bool = False
) -> tuple[PyTree, PyTree]:
    """Splits a tree in two: `combine(*partition(tree, frozen))` is `tree`, the very same leaves.

    A leaf that is no array, beside others that are, goes with the frozen ones.

    Args:
      tree: any pytree; `None` stays `None` in both parts.
      frozen: the leaves that are frozen: a glob on their paths (`"encoder"`), a compiled regex, a
        `Selector`, a list of these, a predicate `(path, leaf) -> bool`, a bool, a pytree of bools,
        or the optimizer that `with_frozen` returned.
      trainable: the leaves that are not, instead of `frozen`: exactly one of the two is given.
      prune: leave one hole for a subtree of which nothing is left, instead of one a leaf. That is
        the structure in which the state of `with_frozen` holds the trainable part, and the cheaper
        one to pass to a compiled function.

    Returns:
      `(trainable, frozen)`: two trees in the structure of `tree`, with a hole (`optax.MaskedNode`,
      a node without leaves) for each leaf that is in the other.

    Raises:
      TypeError: not exactly one of `frozen` and `trainable` is given, or it is no way to select
        leaves.
      ValueError: a pattern selects nothing, or a mask does not fit; the message names it.

    Example:
      >>> import frozen_optax as fo
      >>> trainable, frozen = fo.partition({"encoder": 1.0, "head": 2.0}, "encoder")
      >>> trainable
      {'encoder': MaskedNode(), 'head': 2.0}
      >>> fo.combine(trainable, frozen)
      {'encoder': 1.0, 'head': 2.0}
    """
    resolution = resolve_frozen(frozen, trainable, tree)
    leaves = jax.tree.leaves(tree)

    def rest(resolution: Resolution) -> PyTree:
        if prune:
            return jax.tree.unflatten(resolution.pruned, resolution.rest(leaves))
        pairs = zip(leaves, resolution.selected, strict=True)
        return resolution.unflatten(optax.MaskedNode() if gone else leaf for leaf, gone in pairs)

    return rest(resolution), rest(resolution.complement)


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
            f"cannot combine: {len(present)} parts have a leaf at {path or 'the root'!r} "
            f"({describe(present[0])}). Each leaf belongs to one part and is a hole "
            "(optax.MaskedNode) in the others."
        )
    others = [[child for _, child in flat] for flat, _ in below]
    joined = [
        _join([child, *of_others], join(path, key))
        for (key, child), *of_others in zip(keyed, *others, strict=True)
    ]
    return jax.tree.unflatten(treedef, joined)


def combine(*parts: PyTree) -> PyTree:
    """Joins the parts of a tree: at each place, whatever the one part holds that has no hole there.

    Args:
      *parts: trees as `partition` makes them, pruned or not, with any leaves in them.

    Returns:
      The whole tree. A place where all parts have a hole stays a hole.

    Raises:
      TypeError: no parts are given.
      ValueError: two parts have a leaf at the same place, or differ in structure; the message names
        the path.

    Example:
      >>> import frozen_optax as fo, optax
      >>> hole = optax.MaskedNode()
      >>> fo.combine({"encoder": 1.0, "head": hole}, {"encoder": hole, "head": 2.0})
      {'encoder': 1.0, 'head': 2.0}
    """
    if not parts:
        raise TypeError("combine needs at least one part.")
    flat, treedefs = zip(*(jax.tree.flatten(part, is_leaf=is_hole) for part in parts), strict=True)
    if all(treedef == treedefs[0] for treedef in treedefs[1:]):
        # With a hole for each leaf there is no need to walk the trees.
        columns = list(zip(*flat, strict=True))
        present = [[node for node in column if not is_hole(node)] for column in columns]
        if all(len(nodes) <= 1 for nodes in present):
            joined = [nodes[0] if nodes else optax.MaskedNode() for nodes in present]
            return jax.tree.unflatten(treedefs[0], joined)
    return _join(parts, "")
