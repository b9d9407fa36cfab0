"""A state of an optimizer taken over into another: what both have, by path."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from frozen_optax._messages import quoted
from frozen_optax._trees import describe, require_alive
from frozen_optax._typing import Leaf, PyTree

# Where a state of `optax.inject_hyperparams` has the values. Where its schedules have come to
# stands beside them, and is carried.
_SAID = "hyperparams"


@dataclasses.dataclass(frozen=True)
class Transfer:
    """What becomes of the leaves of two states, by path.

    Attributes:
      carried: those that both states have, which come from the old one.
      fresh: those that only the new one has.
      dropped: those that only the old one has.
    """

    carried: tuple[str, ...]
    fresh: tuple[str, ...]
    dropped: tuple[str, ...]


def _by_path(state: PyTree) -> dict[str, Leaf]:
    """The leaves of a state. Unlike a path of parameters this one tells `0` from `'0'`."""
    return {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def _carried(old: PyTree, new: PyTree) -> set[str]:
    """The paths of what is carried: what both have, but for hyperparameters.

    Those that `optax.inject_hyperparams` keeps in the state were said to an optimizer, and not
    found by it. A new optimizer has its own.
    """
    before = _by_path(old)
    is_said = lambda path: any(getattr(key, "name", None) == _SAID for key in path)
    return {
        text
        for path, _ in jax.tree_util.tree_leaves_with_path(new)
        if (text := jax.tree_util.keystr(path)) in before and not is_said(path)
    }


def plan_transfer(old: PyTree, new: PyTree) -> Transfer:
    """What `transfer_state(old, new)` takes from which of the two, without doing it.

    Args:
      old: a state, or None.
      new: another, of arrays or of `jax.ShapeDtypeStruct`.

    Returns:
      The paths in the states, as `jax.tree_util.keystr` writes them: those that are carried over,
      those that begin anew, and those that are dropped.

    Example:
      >>> import frozen_optax as fo, jax.numpy as jnp, optax
      >>> params = {"encoder": jnp.ones(2), "head": jnp.ones(3)}
      >>> head_only = fo.with_frozen(optax.trace(0.9), "encoder").init(params)
      >>> fo.plan_transfer(head_only, optax.trace(0.9).init(params))
      Transfer(carried=(".trace['head']",), fresh=(".trace['encoder']",), dropped=())
    """
    before, after, carried = _by_path(old), _by_path(new), _carried(old, new)
    return Transfer(
        carried=tuple(path for path in after if path in carried),
        fresh=tuple(path for path in after if path not in carried),
        dropped=tuple(path for path in before if path not in carried),
    )


def _kind(leaf: Leaf) -> Any:
    return getattr(leaf, "shape", None), getattr(leaf, "dtype", type(leaf))


def transfer_state(old: PyTree, new: PyTree, *, may_be_empty: bool = False) -> PyTree:
    """The state `new`, with all that `old` has at the same paths.

    For any state of optax: what trained before a change of what is frozen, or of the optimizer,
    goes on with its moments and counts, and what is thawed begins with those of `new`. A state of
    `with_frozen` has the paths of the optimizer's own, so a plain run can be taken over, and back.

    What is frozen from here on has no place in `new`, and is dropped: a state holds what is
    trained. To go on with it later keep `old`, and transfer from both, the older one first:
    `transfer_state(state, transfer_state(kept, tx.init(params)))`.

    Hyperparameters that `optax.inject_hyperparams` keeps in its state come from `new`: they were
    said to the optimizer, and the new one may have been told others. Where its schedules have come
    to is carried.

    One thing it cannot mend: a count that several groups share is carried, so a leaf that is thawed
    has new moments and an old count. `stages` gives each group a count of its own.

    And one that it cannot see: a state does not know which elements of a leaf it is of. Where
    `with_frozen(elements=)` freezes as many rows as before, but others, moments of rows would be
    carried to other rows. Begin with `new` there, or take that leaf's out of `old`.

    Args:
      old: the state so far. None gives `new`, for a loop that begins.
      new: a fresh state, `tx.init(params)`.
      may_be_empty: whether it may be that nothing is carried, where both states hold something. It
        is an error otherwise. `plan_transfer` tells what is carried.

    Returns:
      A tree in the structure of `new`. What is carried are the very arrays of `old`, with their
      sharding.

    Raises:
      ValueError: at a path that both have the shape or dtype differ; nothing is carried; an array
        of `old` was donated. The message names the paths.

    Example:
      >>> import frozen_optax as fo, jax.numpy as jnp, optax
      >>> params = {"encoder": jnp.ones(2), "head": jnp.ones(3)}
      >>> tx = fo.with_frozen(optax.trace(0.9), "encoder")
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> thawed = optax.trace(0.9)
      >>> state = fo.transfer_state(state, thawed.init(params))
      >>> state.trace["head"].tolist(), state.trace["encoder"].tolist()
      ([1.0, 1.0, 1.0], [0.0, 0.0])
    """
    if old is None:
        return new
    before, after, carried = _by_path(old), _by_path(new), _carried(old, new)
    for path in carried:
        if _kind(before[path]) != _kind(after[path]):
            raise ValueError(
                f"at {path} the old state has {describe(before[path])} and the new one "
                f"{describe(after[path])}. They are of other parameters, or of other optimizers: "
                "begin with the new state, or leave that part of the old one out."
            )
        require_alive(path, before[path])
    if before and after and not (may_be_empty or carried):
        raise ValueError(
            "nothing of the old state is carried: it holds "
            f"{quoted(list(before))}, and the new one {quoted(list(after))}. If that is meant, "
            "write transfer_state(old, new, may_be_empty=True)."
        )
    leaves, treedef = jax.tree.flatten(new)
    taken = [
        before[path] if path in carried else leaf for path, leaf in zip(after, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, taken)
