"""Where the leaves of a step lie.

Two of them may be one buffer, and one may not be where the step runs.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import jax
import numpy as np

from frozen_optax._bits import is_key
from frozen_optax._rows import InputRow
from frozen_optax._trees import is_traced, join, keystr
from frozen_optax._typing import Leaf, PyTree


def buffers(leaf: jax.Array) -> set[Hashable]:
    """Where the values of an array lie in memory."""
    if is_key(leaf):
        leaf = jax.random.key_data(leaf)
    return {(shard.device, shard.data.unsafe_buffer_pointer()) for shard in leaf.addressable_shards}


def _is_buffer(leaf: Leaf) -> bool:
    return isinstance(leaf, jax.Array) and not is_traced(leaf) and not leaf.is_deleted()


def refuse_shared(
    frozen: InputRow, donated: dict[str, PyTree], identify: Callable[[jax.Array], set[Hashable]]
) -> None:
    """Raise where a donated leaf and a frozen one are the same memory.

    Args:
      frozen: the frozen leaves.
      donated: what is donated, by the names of the arguments.
      identify: tells what memory an array is in. Where two say the same, they share it.
    """
    owners: dict[Hashable, str] = {}
    for path, leaf in zip(frozen.paths, frozen.leaves, strict=True):
        if _is_buffer(leaf):
            owners |= dict.fromkeys(identify(leaf), path)
    for name, tree in donated.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            shared = owners.keys() & identify(leaf) if _is_buffer(leaf) else ()
            for key in shared:
                raise ValueError(
                    f"the frozen leaf {owners[key]!r} is the same buffer as "
                    f"{join(name, keystr(path))!r}, which is to be donated: the step would "
                    "overwrite it. Freeze both (tied weights), give the one a copy of its own "
                    "(jnp.copy), or donate neither."
                )


def target_of(leaves: Sequence[Leaf]) -> frozenset[Hashable]:
    """The devices that a step runs on for the sake of some of its leaves.

    There are none where it may run anywhere.
    """
    arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array) and not is_traced(leaf)]
    device_sets = [leaf.sharding.device_set for leaf in arrays if leaf.committed]
    return frozenset(max(device_sets, key=len, default=()))


def elsewhere(leaf: Leaf, sharding: PyTree, target: frozenset[Hashable]) -> str | None:
    """Where a leaf is, if that is not where a step needs it."""
    if isinstance(leaf, np.ndarray) and leaf.size > 1:  # a lone number takes no time
        return "on the host"
    if not isinstance(leaf, jax.Array):
        return None
    if leaf.committed:  # jax does not move it, and says so where it would have to
        return None
    if isinstance(sharding, jax.sharding.Sharding):
        is_there = leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
        return None if is_there else "not sharded as in_shardings says"
    if not target or frozenset(leaf.sharding.device_set) == target:
        return None
    return f"on {len(leaf.sharding.device_set)} of {len(target)} devices"
