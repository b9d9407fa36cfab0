"""Trees that tests of several files use, and what it means that leaves are the same."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import frozen_optax as fo

HOLE = optax.MaskedNode()
ALL = fo.by_mask(True)
PARAMS = {"encoder": {"kernel": 1.0, "bias": 2.0}, "head": {"kernel": 3.0, "bias": 4.0}}


def nest(*paths: str, leaf: Any = 0.0) -> dict[str, Any]:
    """A dict of dicts with a leaf at each path."""
    tree: dict[str, Any] = {}
    for path in paths:
        *modules, name = path.split("/")
        functools.reduce(lambda node, key: node.setdefault(key, {}), modules, tree)[name] = leaf
    return tree


def host_devices(count: int = 8) -> list[jax.Device]:
    """Devices of the host: `conftest.py` makes eight of them, whatever else the machine has."""
    return jax.devices("cpu")[:count]


def paths_of(tree: Any) -> list[str]:
    """The paths as jax spells them, not by the library."""
    return [
        jax.tree_util.keystr(p, simple=True, separator="/")
        for p, _ in jax.tree_util.tree_leaves_with_path(tree)
    ]


ROOMS = {
    "freeze": fo.freeze,
    "with_frozen": functools.partial(fo.with_frozen, optax.sgd(1.0)),
    "partition": functools.partial(fo.partition, PARAMS),
    "restore": functools.partial(fo.restore, PARAMS, PARAMS),
}


ONES = {
    "encoder": {"kernel": jnp.ones(1), "bias": jnp.ones(1)},
    "head": {"kernel": jnp.ones(1), "bias": jnp.ones(1)},
}


def make_params() -> dict[str, Any]:
    """An encoder, mostly frozen, with -0.0 and a subnormal in it, and a head."""
    return {
        "encoder": {"b": jnp.array([-0.0, 1e-45]), "w": jnp.ones((2, 2))},
        "head": {"w": jnp.ones((2, 2))},
    }


def add(tree: Any, number: Any = 1) -> Any:
    """The number added to every leaf."""
    return jax.tree.map(lambda leaf: leaf + number, tree)


def same_objects(before: Any, after: Any) -> bool:
    """Whether each leaf is the very same object."""
    return all(x is y for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))


def host_bits(leaf: Any) -> np.ndarray:
    """The bits of a leaf, told without any code of the library."""
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.ascontiguousarray(leaf).view(np.uint8)


def assert_same_bits(before: dict[str, Any], after: dict[str, Any]) -> None:
    """The same names, and below each the same dtype, shape and bits."""
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].dtype == after[name].dtype, name
        assert before[name].shape == after[name].shape, name
        differ = np.count_nonzero(host_bits(before[name]) != host_bits(after[name]))
        assert differ == 0, f"{name}: {differ} bytes differ"
