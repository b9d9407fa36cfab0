"""Variables of Flax NNX, shared and changed in place: what no function of leaves keeps."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence

import jax

from frozen_optax._trees import keystr, paths_of, variable_type
from frozen_optax._typing import Leaf, PyTree


def _variables(tree: PyTree) -> Iterator[tuple[str, PyTree]]:
    """The NNX Variables of a tree, each with its path."""
    variable = variable_type()
    if not variable:
        return
    is_variable = lambda node: isinstance(node, variable)
    for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_variable):
        if is_variable(node):
            yield keystr(path), node


def refuse_live(before: PyTree, after: PyTree) -> None:
    """Raise where two trees hold the very same NNX Variable.

    What has changed the one has changed the other.
    """
    own = {id(node) for _, node in _variables(before)}
    if not own:
        return
    for path, node in _variables(after):
        if id(node) in own:
            raise ValueError(
                f"both trees hold the same nnx.Variable at {path!r}, so they always agree: "
                "nnx.state(model) makes no copy. Take one before the step and one after it: "
                "nnx.to_pure_dict(nnx.state(model))."
            )


def refuse_changed(
    leaves: Sequence[Leaf], tree: PyTree, instead: str, returned: Container[int] = ()
) -> None:
    """Raise where a function has put other values into the NNX Variables of its argument.

    Args:
      leaves: those of the argument, before.
      tree: the argument, after.
      instead: what to do.
      returned: the ids of leaves that the function gives back, which may be there.
    """
    if next(_variables(tree), None) is None:
        return
    for path, before, after in zip(paths_of(tree), leaves, jax.tree.leaves(tree), strict=True):
        if before is not after and id(after) not in returned:
            raise ValueError(
                f"the function has changed the nnx.Variable at {path!r} in place, and nothing "
                "gives that back here: counts of random numbers and statistics would stand still. "
                f"{instead}"
            )


def refuse_tied(tree: PyTree) -> None:
    """Raise where one NNX Variable stands at two places.

    A compiled function takes leaves, and would give two Variables back.
    """
    seen: dict[int, str] = {}
    for path, node in _variables(tree):
        if id(node) in seen:
            raise ValueError(
                f"one nnx.Variable stands at two places, {seen[id(node)]!r} and {path!r}, and "
                "would come back as two that are no longer tied. Pass nnx.state(model), which "
                "holds it once, and nnx.merge inside."
            )
        seen[id(node)] = path
