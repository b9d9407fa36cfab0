"""Flax training in its own idiom, with each way of freezing: `TrainState` and NNX's `Optimizer`.

Both step with `optax.apply_updates`, so what a transform promises of bits is what `p + u` keeps:
everything inside one jit, where XLA removes the addition of a constant zero; all but subnormals and
signalling NaNs outside."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.training.train_state import TrainState
from helpers import assert_same_bits

import frozen_optax as fo

# -0.0, a subnormal, a NaN with a payload, a signalling one, -inf: a frozen leaf that the loss does
# not use.
RELIC_BITS = {
    4: np.array([0x80000000, 0x00000123, 0x7FC01234, 0x7F801234, 0xFF800000], np.uint32),
    8: np.array([1 << 63, 0x123, 0x7FF8000000001234, 0x7FF0000000001234, 0xFFF << 52], np.uint64),
}

X = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
Y = np.random.default_rng(1).normal(size=(8, 2)).astype(np.float32)

OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "adamw": optax.adamw(0.05, weight_decay=0.1),
    "clipped adam": optax.chain(optax.clip_by_global_norm(0.05), optax.adam(0.05)),
    "clipped momentum": optax.chain(optax.clip_by_global_norm(0.05), optax.sgd(0.5, momentum=0.9)),
    "lbfgs": optax.lbfgs(memory_size=2),  # with the extra arguments of its line search
}

PATHS = [
    "encoder/layers_0/bias",
    "encoder/layers_0/kernel",
    "encoder/layers_1/bias",
    "encoder/layers_1/kernel",
]
PATHS += ["encoder/relic", "head/bias", "head/kernel"]

HOLD = {  # the ways that hold the frozen leaves, whatever the optimizer
    "with_frozen": lambda opt: fo.with_frozen(opt, "encoder"),
    "with_frozen, trainable": lambda opt: fo.with_frozen(opt, trainable="head"),
    "freeze_by_path after": lambda opt: optax.chain(opt, fo.freeze_by_path("encoder")),
    "freeze after": lambda opt: optax.chain(opt, fo.freeze(trainable="head")),
    "restore": lambda opt: opt,
}
BEFORE = {
    "freeze_by_path before": lambda opt: optax.chain(fo.freeze_by_path("encoder"), opt),
    "freeze before": lambda opt: optax.chain(fo.freeze(trainable="head"), opt),
}

WAYS = {**HOLD, **BEFORE, "nothing frozen": lambda opt: opt}


def number() -> np.dtype:
    """The type of the weights: float64 where 64-bit types are on. Flax by itself makes float32."""
    return np.dtype(jnp.result_type(float))


def relic_bits() -> np.ndarray:
    return RELIC_BITS[number().itemsize]


def relic() -> jax.Array:
    return jnp.asarray(relic_bits().view(number()))


def loss(prediction: Any) -> Any:
    return jnp.mean((prediction - Y) ** 2)


class Encoder(nn.Module):
    def setup(self) -> None:
        self.layers = [nn.Dense(4, bias_init=nn.initializers.constant(-0.0)), nn.Dense(4)]
        self.relic = self.param("relic", lambda _: relic())

    def __call__(self, x: Any) -> Any:
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return x


class Net(nn.Module):
    def setup(self) -> None:
        self.encoder = Encoder()
        self.head = nn.Dense(2)

    def __call__(self, x: Any) -> Any:
        return self.head(self.encoder(x))


def listed(modules: list[Any]) -> Any:
    """A list of modules: a plain one until `nnx.List` came, which has to be used since."""
    return nnx.List(modules) if hasattr(nnx, "List") else modules


class NnxEncoder(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        negative = nnx.initializers.constant(-0.0)
        linear = functools.partial(nnx.Linear, param_dtype=number(), rngs=rngs)
        self.layers = listed([linear(3, 4, bias_init=negative), linear(4, 4)])
        self.relic = nnx.Param(relic())

    def __call__(self, x: Any) -> Any:
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return x


class NnxNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.encoder = NnxEncoder(rngs)
        self.head = nnx.Linear(4, 2, param_dtype=number(), rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.head(self.encoder(x))


def flat(tree: Any, prefix: str = "") -> dict[str, np.ndarray]:
    """Host copies of nested dicts of arrays, by path; keys as the numbers they are made of."""
    if not hasattr(tree, "items"):
        tree = (
            jax.random.key_data(tree) if jnp.issubdtype(tree.dtype, jax.dtypes.prng_key) else tree
        )
        return {prefix: np.array(tree)}
    return {
        p: a
        for k, v in tree.items()
        for p, a in flat(v, f"{prefix}/{k}" if prefix else str(k)).items()
    }


def weights(model: nnx.Module, *filters: Any) -> dict[str, np.ndarray]:
    return flat(nnx.to_pure_dict(nnx.state(model, *(filters or (nnx.Param,)))))


def bits(array: Any) -> np.ndarray:
    host = np.ascontiguousarray(array)
    return host.view(f"u{host.dtype.itemsize}")


def below(tree: dict[str, np.ndarray], module: str) -> dict[str, np.ndarray]:
    return {path: leaf for path, leaf in tree.items() if path.startswith(f"{module}/")}


def used(tree: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the loss uses of the encoder."""
    return {path: leaf for path, leaf in below(tree, "encoder").items() if path != "encoder/relic"}


def assert_close(
    actual: dict[str, np.ndarray], expected: dict[str, np.ndarray], rtol: float = 1e-4
) -> None:
    assert actual.keys() == expected.keys()
    for path in actual:
        np.testing.assert_allclose(actual[path], expected[path], rtol=rtol, atol=1e-6, err_msg=path)


def differ(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> bool:
    return any(not np.allclose(left[path], right[path], rtol=1e-2, atol=1e-4) for path in left)


def assert_encoder_held_and_head_moved(
    before: dict[str, np.ndarray], after: dict[str, np.ndarray]
) -> None:
    assert_same_bits(below(before, "encoder"), below(after, "encoder"))
    assert len(below(before, "encoder")) == 5
    np.testing.assert_array_equal(bits(after["encoder/relic"]), relic_bits())
    assert {leaf.dtype for leaf in after.values()} == {number()}
    for path, leaf in below(before, "head").items():
        assert (leaf != after[path]).all(), path


def poisoned(grads: Any) -> Any:
    """NaN for every gradient in the encoder."""
    nan = lambda path, g: (
        jnp.full_like(g, jnp.nan) if "encoder" in jax.tree_util.keystr(path) else g
    )
    return jax.tree_util.tree_map_with_path(nan, grads)


class LineSearchState(TrainState):
    """A `TrainState` that hands on extra arguments, and keeps every bit outside jit too."""

    def apply_gradients(self, *, grads: Any, **extra_args: Any) -> LineSearchState:
        updates, opt_state = self.tx.update(grads, self.opt_state, self.params, **extra_args)
        return self.replace(
            step=self.step + 1, params=fo.apply_updates(self.params, updates), opt_state=opt_state
        )


@dataclasses.dataclass
class Run:
    before: dict[str, np.ndarray]
    after: dict[str, np.ndarray]
    opt_state: Any


@dataclasses.dataclass(frozen=True)
class How:
    """How to train: under jit or not, restored after each step, with NaN in frozen gradients."""

    jit: bool = True
    restore: bool = False
    poison: bool = False
    extra: bool = False
    alone: bool = False  # the head's parameters are all the optimizer is handed
    steps: int = 3
    exact: bool = False
    donate: bool = False


def linen_params(seed: int = 0) -> Any:
    return jax.tree.map(
        lambda leaf: leaf.astype(number()), Net().init(jax.random.key(seed), X)["params"]
    )


def linen_step(state: TrainState, how: How = How(), rest: Any = None) -> TrainState:
    def loss_fn(params: Any) -> Any:
        return loss(state.apply_fn({"params": {**(rest or {}), **params}}, X))

    value, grads = jax.value_and_grad(loss_fn)(state.params)
    grads = poisoned(grads) if how.poison else grads
    extra = {"value": value, "grad": grads, "value_fn": loss_fn} if how.extra else {}
    new = state.apply_gradients(grads=grads, **extra)
    return (
        new.replace(params=fo.restore(new.params, state.params, "encoder")) if how.restore else new
    )


def linen(tx: Any, how: How = How()) -> Run:
    params = linen_params()
    rest = {"encoder": params["encoder"]} if how.alone else None
    kind = LineSearchState if how.extra or how.exact else TrainState
    own = {"head": params["head"]} if how.alone else params
    before = flat(own)
    state = kind.create(apply_fn=Net().apply, params=own, tx=tx)
    step = functools.partial(linen_step, how=how, rest=rest)
    if how.jit:
        step = jax.jit(step, donate_argnums=0 if how.donate else ())
    for _ in range(how.steps):
        given, state = state, step(state)
        assert not how.donate or given.params["encoder"]["relic"].is_deleted()
    return Run(before, flat(state.params), state.opt_state)


def nnx_step(model: Any, optimizer: nnx.Optimizer, how: How = How()) -> None:
    wrt = optimizer.wrt
    loss_fn = lambda model: loss(model(X))
    value, grads = nnx.value_and_grad(loss_fn, argnums=nnx.DiffState(0, wrt))(model)
    grads = poisoned(grads) if how.poison else grads
    extra = {}
    if how.extra:
        graphdef, _, rest = nnx.split(model, wrt, ...)
        extra = {
            "value": value,
            "grad": grads,
            "value_fn": lambda p: loss_fn(nnx.merge(graphdef, p, rest)),
        }
    before = nnx.to_pure_dict(nnx.state(model, wrt))
    optimizer.update(model, grads, **extra)
    if how.restore:
        nnx.update(model, fo.restore(nnx.to_pure_dict(nnx.state(model, wrt)), before, "encoder"))


def nnx_(tx: Any, how: How = How()) -> Run:
    model = NnxNet(nnx.Rngs(0))
    wrt = nnx.All(nnx.Param, nnx.PathContains("head")) if how.alone else nnx.Param
    optimizer = nnx.Optimizer(model, tx, wrt=wrt)
    before = weights(model, wrt)
    step = functools.partial(nnx_step, how=how)
    if how.jit:
        step = nnx.jit(step, donate_argnums=(0, 1) if how.donate else ())
    for _ in range(how.steps):
        given = jax.tree.leaves(nnx.state(model, nnx.Param))
        step(model, optimizer)
        assert not how.donate or all(leaf.is_deleted() for leaf in given)
    return Run(before, weights(model, wrt), optimizer.opt_state)


FLAVOURS = {"linen": linen, "nnx": nnx_}


@functools.cache
def trained(flavour: str, way: str, optimizer: str, how: How, weights: np.dtype) -> Run:
    run = FLAVOURS[flavour](WAYS[way](OPTIMIZERS[optimizer]), how)
    assert {leaf.dtype for leaf in run.after.values()} == {weights}
    return run


def train(flavour: str, way: str, optimizer: str, how: How = How()) -> Run:
    how = dataclasses.replace(how, restore=how.restore or way == "restore")
    return trained(flavour, way, optimizer, how, number())


def alone(flavour: str, optimizer: str, how: How = How()) -> dict[str, np.ndarray]:
    """Where the optimizer takes the head when it is handed nothing but the head."""
    return train(flavour, "nothing frozen", optimizer, dataclasses.replace(how, alone=True)).after


def nnx_pair(seed: int, frozen: Any = "encoder") -> tuple[NnxNet, nnx.Optimizer]:
    model = NnxNet(nnx.Rngs(seed))
    return model, nnx.Optimizer(
        model, fo.with_frozen(OPTIMIZERS["clipped adam"], frozen), wrt=nnx.Param
    )


class Noisy(nnx.Module):
    """An encoder with all that an optimizer does not own: running statistics, keys and counts."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.encoder = nnx.Sequential(
            nnx.Linear(3, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
        )
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.head(self.norm(self.encoder(x)))


def noisy_pair() -> tuple[Noisy, nnx.Optimizer]:
    model = Noisy(nnx.Rngs(0))
    return model, nnx.Optimizer(model, fo.with_frozen(optax.adamw(0.1), "encoder"), wrt=nnx.Param)
