"""A tree of each kind that jax and the frameworks know, and the paths of its leaves."""

import dataclasses
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import flax.struct
import haiku as hk
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.core import freeze
from helpers import HOLE


class Pair(NamedTuple):
    encoder: Any
    head: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Registered:
    encoder: Any
    head: Any
    name: str = dataclasses.field(default="static", metadata={"static": True})


@flax.struct.dataclass
class Struct:
    encoder: Any
    head: Any
    name: str = flax.struct.field(pytree_node=False, default="static")


@jax.tree_util.register_pytree_node_class
class WithoutKeys:
    def __init__(self, *children):
        self.children = children

    def tree_flatten(self):
        return self.children, None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.encoder = nnx.Linear(2, 3, rngs=rngs)
        self.head = nnx.Linear(3, 1, rngs=rngs)


class LinenModel(nn.Module):
    def setup(self):
        self.encoder = nn.Dense(3)
        self.head = nn.Dense(1)

    def __call__(self, x):
        return self.head(self.encoder(x))


class EqxModel(eqx.Module):
    encoder: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self):
        self.encoder = eqx.nn.Linear(2, 3, key=jax.random.key(0))
        self.head = eqx.nn.Linear(3, 1, key=jax.random.key(1))

    def __call__(self, x):
        return self.head(self.encoder(x))


def leaves() -> dict[str, Any]:
    return {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}


FLAX = ["encoder/bias", "encoder/kernel"]
CONTAINERS = {
    "dict": (lambda: {"encoder": leaves(), "head": leaves()}, "encoder", FLAX),
    "FrozenDict": (lambda: freeze({"encoder": leaves(), "head": leaves()}), "encoder", FLAX),
    "list": (lambda: [leaves(), leaves()], "0", ["0/bias", "0/kernel"]),
    "tuple": (lambda: (leaves(), [jnp.ones(2), leaves()]), "1/0", ["1/0"]),
    "namedtuple": (lambda: Pair(leaves(), leaves()), "encoder", FLAX),
    "dataclass": (lambda: Registered(leaves(), leaves()), "encoder", FLAX),
    "flax.struct": (lambda: Struct(leaves(), leaves()), "encoder", FLAX),
    "without keys": (lambda: WithoutKeys(leaves(), leaves()), "1", ["1/bias", "1/kernel"]),
    "None": (
        lambda: {"encoder": {**leaves(), "scale": None}, "head": None, "rest": leaves()},
        "encoder",
        FLAX,
    ),
    "holes": (
        lambda: {"encoder": leaves(), "head": HOLE, "rest": {"b": HOLE, "c": jnp.ones(1)}},
        "encoder",
        FLAX,
    ),
    "empty subtrees": (
        lambda: {"encoder": {**leaves(), "x": {}}, "head": [(), {}], "y": jnp.ones(1)},
        "encoder",
        FLAX,
    ),
    "a bare leaf": (lambda: jnp.ones(2), "**", [""]),
    "empty": (dict, "**", []),
    "nothing": (lambda: None, "*", []),
    "linen": (
        lambda: LinenModel().init(jax.random.key(0), jnp.ones((1, 2)))["params"],
        "encoder",
        FLAX,
    ),
    "nnx state": (lambda: nnx.state(NnxModel(nnx.Rngs(0)), nnx.Param), "encoder", FLAX),
    "nnx pure state": (lambda: pure(nnx.state(NnxModel(nnx.Rngs(0)), nnx.Param)), "encoder", FLAX),
    "nnx pure dict": (lambda: nnx.to_pure_dict(nnx.state(NnxModel(nnx.Rngs(0)))), "encoder", FLAX),
    "equinox": (EqxModel, "encoder", ["encoder/weight", "encoder/bias"]),
    "haiku": (
        lambda: hk.transform(lambda x: hk.nets.MLP([3, 1])(x)).init(
            jax.random.key(0), jnp.ones((1, 2))
        ),
        "mlp/~/linear_0",
        ["mlp/~/linear_0/b", "mlp/~/linear_0/w"],
    ),
    "optimizer state": (
        lambda: optax.adam(0.1).init(leaves()),
        "0/mu",
        ["0/mu/bias", "0/mu/kernel"],
    ),
}


def pure(state: Any) -> Any:
    return nnx.as_pure(state) if hasattr(nnx, "as_pure") else nnx.pure(state)
