"""Flax training steps, in their own idiom: Linen's `TrainState` and NNX's `Optimizer`, with each way of freezing.

Both step with `optax.apply_updates`, so what a transform promises of bits is what `p + u` keeps: everything inside one
jit, where XLA removes the addition of a constant zero; all but subnormals and signalling NaNs outside.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization
from flax.core import FrozenDict
from flax.training.train_state import TrainState

import frozen_optax as fo

# -0.0, a subnormal, a NaN with a payload, a signalling one, -inf: a frozen leaf that the loss does not use.
RELIC_BITS = np.array([0x80000000, 0x00000123, 0x7FC01234, 0x7F801234, 0xFF800000], np.uint32)
RELIC = RELIC_BITS.view(np.float32)

X = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
Y = np.random.default_rng(1).normal(size=(8, 2)).astype(np.float32)

OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "adamw": optax.adamw(0.05, weight_decay=0.1),
    "clipped adam": optax.chain(optax.clip_by_global_norm(0.05), optax.adam(0.05)),
    "clipped momentum": optax.chain(optax.clip_by_global_norm(0.05), optax.sgd(0.5, momentum=0.9)),
    "lbfgs": optax.lbfgs(memory_size=2),  # with the extra arguments of its line search
}

PATHS = ["encoder/layers_0/bias", "encoder/layers_0/kernel", "encoder/layers_1/bias", "encoder/layers_1/kernel"]
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


def loss(prediction: Any) -> Any:
    return jnp.mean((prediction - Y) ** 2)


class Encoder(nn.Module):
    def setup(self) -> None:
        self.layers = [nn.Dense(4, bias_init=nn.initializers.constant(-0.0)), nn.Dense(4)]
        self.relic = self.param("relic", lambda _: jnp.asarray(RELIC))

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
        self.layers = listed([nnx.Linear(3, 4, bias_init=negative, rngs=rngs), nnx.Linear(4, 4, rngs=rngs)])
        self.relic = nnx.Param(jnp.asarray(RELIC))

    def __call__(self, x: Any) -> Any:
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return x


class NnxNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.encoder = NnxEncoder(rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.head(self.encoder(x))


def flat(tree: Any, prefix: str = "") -> dict[str, np.ndarray]:
    """Host copies of nested dicts of arrays, by path; keys as the numbers they are made of."""
    if not hasattr(tree, "items"):
        tree = jax.random.key_data(tree) if jnp.issubdtype(tree.dtype, jax.dtypes.prng_key) else tree
        return {prefix: np.array(tree)}
    return {p: a for k, v in tree.items() for p, a in flat(v, f"{prefix}/{k}" if prefix else str(k)).items()}


def weights(model: nnx.Module, *filters: Any) -> dict[str, np.ndarray]:
    return flat(nnx.to_pure_dict(nnx.state(model, *(filters or (nnx.Param,)))))


def bits(array: Any) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.uint32)


def assert_same_bits(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> None:
    assert before.keys() == after.keys()
    for path in before:
        np.testing.assert_array_equal(bits(before[path]), bits(after[path]), err_msg=path)


def below(tree: dict[str, np.ndarray], module: str) -> dict[str, np.ndarray]:
    return {path: leaf for path, leaf in tree.items() if path.startswith(f"{module}/")}


def used(tree: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the loss uses of the encoder."""
    return {path: leaf for path, leaf in below(tree, "encoder").items() if path != "encoder/relic"}


def assert_close(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray], rtol: float = 1e-4) -> None:
    assert actual.keys() == expected.keys()
    for path in actual:
        np.testing.assert_allclose(actual[path], expected[path], rtol=rtol, atol=1e-6, err_msg=path)


def differ(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> bool:
    return any(not np.allclose(left[path], right[path], rtol=1e-2, atol=1e-4) for path in left)


def assert_encoder_held_and_head_moved(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> None:
    assert_same_bits(below(before, "encoder"), below(after, "encoder"))
    assert len(below(before, "encoder")) == 5
    np.testing.assert_array_equal(bits(after["encoder/relic"]), RELIC_BITS)
    for path, leaf in below(before, "head").items():
        assert (leaf != after[path]).all(), path


def poisoned(grads: Any) -> Any:
    """NaN for every gradient in the encoder."""
    nan = lambda path, g: jnp.full_like(g, jnp.nan) if "encoder" in jax.tree_util.keystr(path) else g
    return jax.tree_util.tree_map_with_path(nan, grads)


class LineSearchState(TrainState):
    """`TrainState` hands the optimizer no extra arguments. One that does, and keeps every bit outside jit too."""

    def apply_gradients(self, *, grads: Any, **extra_args: Any) -> LineSearchState:
        updates, opt_state = self.tx.update(grads, self.opt_state, self.params, **extra_args)
        return self.replace(step=self.step + 1, params=fo.apply_updates(self.params, updates), opt_state=opt_state)


@dataclasses.dataclass
class Run:
    before: dict[str, np.ndarray]
    after: dict[str, np.ndarray]
    opt_state: Any


@dataclasses.dataclass(frozen=True)
class How:
    """How to train: under jit or not, restored after each step, with NaN in the frozen gradients, ..."""

    jit: bool = True
    restore: bool = False
    poison: bool = False
    extra: bool = False
    alone: bool = False  # the head's parameters are all the optimizer is handed
    steps: int = 3
    exact: bool = False
    donate: bool = False


def linen_params(seed: int = 0) -> Any:
    return Net().init(jax.random.key(seed), X)["params"]


def linen_step(state: TrainState, how: How = How(), rest: Any = None) -> TrainState:
    def loss_fn(params: Any) -> Any:
        return loss(state.apply_fn({"params": {**(rest or {}), **params}}, X))

    value, grads = jax.value_and_grad(loss_fn)(state.params)
    grads = poisoned(grads) if how.poison else grads
    extra = {"value": value, "grad": grads, "value_fn": loss_fn} if how.extra else {}
    new = state.apply_gradients(grads=grads, **extra)
    return new.replace(params=fo.restore(new.params, state.params, "encoder")) if how.restore else new


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
        extra = {"value": value, "grad": grads, "value_fn": lambda p: loss_fn(nnx.merge(graphdef, p, rest))}
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
def train(flavour: str, way: str, optimizer: str, how: How = How()) -> Run:
    if way == "restore":
        how = dataclasses.replace(how, restore=True)
    return FLAVOURS[flavour](WAYS[way](OPTIMIZERS[optimizer]), how)


def alone(flavour: str, optimizer: str, how: How = How()) -> dict[str, np.ndarray]:
    """Where the optimizer takes the head when it is handed the head's parameters and nothing else."""
    return train(flavour, "nothing frozen", optimizer, dataclasses.replace(how, alone=True)).after


@pytest.fixture(params=FLAVOURS)
def flavour(request: Any) -> str:
    return request.param


# What each way holds, under the framework's own jit.


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "clipped adam"])
@pytest.mark.parametrize("way", HOLD)
def test_frozen_leaves_keep_their_bits_and_the_others_move(flavour: str, way: str, optimizer: str) -> None:
    run = train(flavour, way, optimizer)
    assert_encoder_held_and_head_moved(run.before, run.after)


@pytest.mark.parametrize("way", ["with_frozen", "freeze after", "restore"])
def test_frozen_leaves_keep_their_bits_when_the_state_is_donated(flavour: str, way: str) -> None:
    run = train(flavour, way, "adamw", How(donate=True))
    assert_encoder_held_and_head_moved(run.before, run.after)
    assert_same_bits(run.after, train(flavour, way, "adamw").after)


@pytest.mark.parametrize("way", ["with_frozen", "freeze_by_path after", "freeze after"])
def test_eager_steps_keep_the_sign_of_zero_and_nan_payloads_but_flush_subnormals(flavour: str, way: str) -> None:
    run = train(flavour, way, "adamw", How(jit=False, steps=2))
    relic = bits(run.after["encoder/relic"])
    np.testing.assert_array_equal(relic[[0, 2, 4]], RELIC_BITS[[0, 2, 4]])  # -0.0, a quiet NaN, -inf
    if jax.default_backend() == "cpu":
        assert relic[1] == 0  # the subnormal: `optax.apply_updates` computes p + (-0.0)
    assert_same_bits(used(run.before), used(run.after))


def test_eager_steps_keep_every_bit_with_restore(flavour: str) -> None:
    run = train(flavour, "restore", "adamw", How(jit=False, steps=2))
    assert_encoder_held_and_head_moved(run.before, run.after)


@pytest.mark.parametrize("way", ["with_frozen", "freeze after"])
def test_a_train_state_that_steps_with_fo_apply_updates_keeps_every_bit_outside_jit(way: str) -> None:
    run = train("linen", way, "adamw", How(jit=False, exact=True, steps=2))
    assert_encoder_held_and_head_moved(run.before, run.after)


# What with_frozen promises besides, and the others do not.


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "clipped adam", "clipped momentum"])
def test_with_frozen_takes_the_trajectory_of_the_optimizer_on_the_head_alone(flavour: str, optimizer: str) -> None:
    run = train(flavour, "with_frozen", optimizer)
    assert_close(below(run.after, "head"), alone(flavour, optimizer))


def test_lbfgs_searches_along_the_head_alone(flavour: str) -> None:
    how = How(extra=True, steps=2)
    run = train(flavour, "with_frozen", "lbfgs", how)
    assert_encoder_held_and_head_moved(run.before, run.after)
    assert_close(below(run.after, "head"), alone(flavour, "lbfgs", how), rtol=1e-3)


def test_frozen_gradients_steer_the_head_when_clipped_with_it_and_not_when_freeze_comes_before(flavour: str) -> None:
    expected = alone(flavour, "clipped momentum")
    for way in ("freeze after", "restore"):
        assert differ(below(train(flavour, way, "clipped momentum").after, "head"), expected)
    for way in BEFORE:
        assert_close(below(train(flavour, way, "clipped momentum").after, "head"), expected)


def test_nan_in_a_frozen_gradient_stays_out_of_the_head_unless_clipped_with_it(flavour: str) -> None:
    expected = alone(flavour, "clipped momentum")
    held = train(flavour, "with_frozen", "clipped momentum", How(poison=True))
    assert_encoder_held_and_head_moved(held.before, held.after)
    assert_close(below(held.after, "head"), expected)
    assert_close(below(train(flavour, "freeze before", "clipped momentum", How(poison=True)).after, "head"), expected)
    assert np.isnan(train(flavour, "freeze after", "clipped momentum", How(poison=True)).after["head/kernel"]).all()


@pytest.mark.parametrize("way", BEFORE)
def test_freeze_before_adamw_moves_the_frozen_weights_by_weight_decay(flavour: str, way: str) -> None:
    run = train(flavour, way, "adamw")
    kernels = [path for path in below(run.before, "encoder") if path.endswith("kernel")]
    assert len(kernels) == 2
    for path in kernels:
        np.testing.assert_allclose(run.after[path], run.before[path] * (1 - 0.05 * 0.1) ** 3, rtol=1e-5)


@pytest.mark.parametrize("optimizer", ["sgd", "clipped adam"])
@pytest.mark.parametrize("way", BEFORE)
def test_freeze_before_an_optimizer_without_weight_decay_keeps_values(flavour: str, way: str, optimizer: str) -> None:
    run = train(flavour, way, optimizer)
    for path, leaf in used(run.before).items():
        np.testing.assert_array_equal(leaf, run.after[path], err_msg=path)


@pytest.mark.parametrize("way", BEFORE)
def test_freeze_before_sgd_loses_the_sign_of_zero_outside_jit(flavour: str, way: str) -> None:
    run = train(flavour, way, "sgd", How(jit=False, steps=1))
    assert bits(run.after["encoder/relic"])[0] == 0  # scale(-lr) made the update 0.0, and -0.0 + 0.0 is 0.0


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_state_of_with_frozen_has_the_leaves_of_the_head_alone(flavour: str, optimizer: str) -> None:
    shapes = lambda tree: [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]
    moments = {"sgd": 0, "adamw": 2, "clipped adam": 2, "clipped momentum": 1, "lbfgs": 5}[optimizer]
    for how in (How(steps=0), How(extra=True, steps=2) if optimizer == "lbfgs" else How()):
        state = train(flavour, "with_frozen", optimizer, how).opt_state
        assert shapes(state) == shapes(OPTIMIZERS[optimizer].init({"head": linen_params()["head"]}))
        paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
        assert not [path for path in paths if "encoder" in path]
        nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, optax.MaskedNode))
        assert sum(isinstance(node, optax.MaskedNode) for node in nodes) == moments  # one for the whole encoder


def test_the_state_of_freeze_after_an_optimizer_has_the_leaves_of_the_whole_model(flavour: str) -> None:
    state = train(flavour, "freeze after", "adamw", How(steps=0)).opt_state
    assert len(jax.tree.leaves(state)) == 1 + 2 * len(PATHS)


# Paths.


@pytest.mark.parametrize("jit", [False, True])
def test_paths_read_the_same_at_init_and_at_update(flavour: str, jit: bool) -> None:
    seen: list[list[tuple[str, Any, Any]]] = []

    def predicate(path: str, leaf: Any) -> bool:
        if not seen or path == seen[-1][0][0]:
            seen.append([])
        seen[-1].append((path, leaf.shape, leaf.dtype))
        return path.startswith("encoder/")

    run = FLAVOURS[flavour](fo.with_frozen(optax.adamw(0.1), predicate), How(jit=jit, steps=2))
    expected = [path.replace("layers_", "layers/") if flavour == "nnx" else path for path in PATHS]
    assert [[path for path, _, _ in once] for once in seen] == [expected] * len(seen)
    assert seen == [seen[0]] * len(seen)
    assert set(run.before) == set(expected)


@pytest.mark.parametrize(
    ("frozen", "moved"),
    [
        ("encoder/layers{}0", {"encoder/layers{}1/bias", "encoder/layers{}1/kernel", "head/bias", "head/kernel"}),
        (["encoder", "**/bias"], {"head/kernel"}),
        ("**/kernel", {"encoder/layers{}0/bias", "encoder/layers{}1/bias", "head/bias"}),
    ],
)
def test_globs_name_layers_and_leaves(flavour: str, frozen: Any, moved: set[str]) -> None:
    mark = "/" if flavour == "nnx" else "_"
    frozen = [glob.format(mark) for glob in frozen] if isinstance(frozen, list) else frozen.format(mark)
    run = FLAVOURS[flavour](fo.with_frozen(optax.sgd(0.1), frozen), How(steps=1))
    changed = {path for path, leaf in run.before.items() if (bits(leaf) != bits(run.after[path])).any()}
    assert changed == {path.format(mark) for path in moved}


@pytest.mark.parametrize("way", ["with_frozen", "freeze_by_path after"])
def test_a_typo_is_an_error_where_the_train_state_or_optimizer_is_made(flavour: str, way: str) -> None:
    wrong = {
        "with_frozen": fo.with_frozen(optax.adam(0.1), "encodr"),
        "freeze_by_path after": optax.chain(optax.adam(0.1), fo.freeze_by_path("encodr")),
    }[way]
    with pytest.raises(ValueError, match=r"'encodr'\) selects nothing.*'encoder"):
        FLAVOURS[flavour](wrong, How(steps=0))


def test_frozen_dicts_read_as_dicts() -> None:
    params = FrozenDict(linen_params())
    state = TrainState.create(apply_fn=Net().apply, params=params, tx=HOLD["with_frozen"](OPTIMIZERS["adamw"]))
    new = jax.jit(linen_step)(state)
    assert isinstance(new.params, FrozenDict)
    assert_encoder_held_and_head_moved(flat(params), flat(new.params))
    assert fo.by_path("**").paths(params) == PATHS


# Saving and loading.


def by_state_dict(state: Any, fresh: Any, directory: Any) -> Any:
    return serialization.from_state_dict(fresh, serialization.to_state_dict(state))


def by_msgpack(state: Any, fresh: Any, directory: Any) -> Any:
    return serialization.from_bytes(fresh, serialization.to_bytes(state))


def by_orbax(state: Any, fresh: Any, directory: Any) -> Any:
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory / "checkpoint", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(directory / "checkpoint", fresh)


@pytest.mark.parametrize("frozen", ["encoder", ["encoder/layers_0", "**/bias", "encoder/relic"], "**"])
@pytest.mark.parametrize("carry", [by_state_dict, by_msgpack, by_orbax])
def test_a_saved_train_state_continues_bit_for_bit(carry: Any, frozen: Any, tmp_path: Any) -> None:
    make = lambda seed: TrainState.create(
        apply_fn=Net().apply, params=linen_params(seed), tx=fo.with_frozen(OPTIMIZERS["clipped adam"], frozen)
    )
    step = jax.jit(linen_step)
    halfway = step(step(make(0)))
    fresh = make(1)  # other values, and an optimizer that has seen no state yet
    loaded = carry(halfway, jax.tree.map(jnp.asarray, fresh), tmp_path)
    assert jax.tree.structure(loaded.opt_state) == jax.tree.structure(halfway.opt_state)
    assert_same_bits(flat(halfway.params), flat(loaded.params))
    expected, continued = step(step(halfway)), step(step(loaded))
    assert_same_bits(flat(expected.params), flat(continued.params))
    assert_same_bits(flat(halfway.params["encoder"]["layers_0"]), flat(continued.params["encoder"]["layers_0"]))
    assert int(continued.step) == 4
    for left, right in zip(jax.tree.leaves(expected.opt_state), jax.tree.leaves(continued.opt_state), strict=True):
        np.testing.assert_array_equal(np.asarray(left), np.asarray(right))


def nnx_pair(seed: int, frozen: Any = "encoder") -> tuple[NnxNet, nnx.Optimizer]:
    model = NnxNet(nnx.Rngs(seed))
    return model, nnx.Optimizer(model, fo.with_frozen(OPTIMIZERS["clipped adam"], frozen), wrt=nnx.Param)


def merged(pair: Any, fresh: Any, directory: Any) -> Any:
    state = jax.tree.map(np.asarray, nnx.state(pair))
    return nnx.merge(nnx.split(fresh)[0], state)


def pure_dict(pair: Any, fresh: Any, directory: Any) -> Any:
    saved = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(pair)))
    state = nnx.state(fresh)
    nnx.replace_by_pure_dict(state, saved)
    nnx.update(fresh, state)
    return fresh


def nnx_orbax(pair: Any, fresh: Any, directory: Any) -> Any:
    import orbax.checkpoint as ocp

    graphdef, state = nnx.split(fresh)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory / "checkpoint", nnx.state(pair))
        checkpointer.wait_until_finished()
        return nnx.merge(graphdef, checkpointer.restore(directory / "checkpoint", state))


@pytest.mark.parametrize("frozen", ["encoder", ["encoder/layers/0", "**/bias", "encoder/relic"], "**"])
@pytest.mark.parametrize("carry", [merged, pure_dict, nnx_orbax])
def test_a_saved_nnx_model_and_optimizer_continue_bit_for_bit(carry: Any, frozen: Any, tmp_path: Any) -> None:
    step = nnx.jit(nnx_step)
    pair = nnx_pair(0, frozen)
    step(*pair)
    step(*pair)
    loaded = carry(pair, nnx_pair(1, frozen), tmp_path)
    assert_same_bits(weights(pair[0]), weights(loaded[0]))
    for each in (pair, loaded):
        step(*each)
        step(*each)
    assert_same_bits(weights(pair[0]), weights(loaded[0]))
    first = weights(NnxNet(nnx.Rngs(0)))
    assert_same_bits(below(first, "encoder/layers/0"), below(weights(loaded[0]), "encoder/layers/0"))
    for left, right in zip(*(jax.tree.leaves(nnx.state(each[1])) for each in (pair, loaded)), strict=True):
        np.testing.assert_array_equal(np.asarray(left), np.asarray(right))


def test_a_functional_nnx_step_under_jax_jit_takes_the_same_trajectory() -> None:
    pair = nnx_pair(0)
    before = weights(pair[0])
    graphdef, state = nnx.split(pair)

    @jax.jit
    def step(state: Any) -> Any:
        pair = nnx.merge(graphdef, state)
        nnx_step(*pair)
        return nnx.state(pair)

    for _ in range(3):
        state = step(state)
    after = weights(nnx.merge(graphdef, state)[0])
    assert_encoder_held_and_head_moved(before, after)
    assert_close(below(after, "head"), alone("nnx", "clipped adam"))


# What NNX has besides parameters.


def test_a_shared_parameter_goes_by_the_first_of_its_paths() -> None:
    class Tied(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.encoder = nnx.Linear(3, 3, rngs=rngs)
            self.again = self.encoder
            self.head = nnx.Linear(3, 2, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.head(self.again(jnp.tanh(self.encoder(x))))

    model = Tied(nnx.Rngs(0))
    assert fo.by_path("**").paths(nnx.state(model)) == ["again/bias", "again/kernel", "head/bias", "head/kernel"]
    with pytest.raises(ValueError, match=r"'encoder'\) selects nothing"):
        nnx.Optimizer(model, fo.with_frozen(optax.adam(0.1), "encoder"), wrt=nnx.Param)
    for tx in (fo.with_frozen(optax.adamw(0.1), "again"), optax.chain(optax.adamw(0.1), fo.freeze("again"))):
        before = weights(model)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        nnx.jit(nnx_step)(model, optimizer)
        assert model.again is model.encoder
        after = weights(model)
        assert_same_bits(below(before, "again"), below(after, "again"))
        assert differ(below(before, "head"), below(after, "head"))


def test_model_and_optimizer_takes_it_too() -> None:
    both = nnx.ModelAndOptimizer(NnxNet(nnx.Rngs(0)), HOLD["with_frozen"](OPTIMIZERS["adamw"]), wrt=nnx.Param)
    before = weights(both.model)

    @nnx.jit
    def step(both: Any) -> None:
        both.update(nnx.grad(lambda model: loss(model(X)))(both.model))

    step(both)
    step(both)
    assert_encoder_held_and_head_moved(before, weights(both.model))


MODES = [{}, {"graph": False}] if "graph" in inspect.signature(nnx.jit).parameters else [{}]


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_both_modes_of_nnx_take_it(mode: dict[str, bool]) -> None:
    model = NnxNet(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, HOLD["with_frozen"](OPTIMIZERS["adamw"]), wrt=nnx.Param, **mode)
    before = weights(model)

    @functools.partial(nnx.jit, **mode)
    def step(model: Any, optimizer: Any) -> None:
        optimizer.update(model, nnx.grad(lambda model: loss(model(X)), **mode)(model))

    for _ in range(3):
        step(model, optimizer)
    assert_encoder_held_and_head_moved(before, weights(model))
    assert_close(below(weights(model), "head"), alone("nnx", "adamw"))


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


def test_dropout_keys_are_no_parameters_and_do_not_get_in_the_way() -> None:
    model, optimizer = noisy_pair()
    before, rngs = weights(model), weights(model, nnx.RngState)
    step = nnx.jit(nnx_step)
    step(model, optimizer)
    step(model, optimizer)
    assert_same_bits(below(before, "encoder"), below(weights(model), "encoder"))
    assert differ(below(before, "head"), below(weights(model), "head"))
    moved = {path for path, leaf in weights(model, nnx.RngState).items() if (leaf != rngs[path]).any()}
    assert {path.rsplit("/", 1)[1] for path in moved} == {"count"}  # the encoder's dropout drew from its stream


def test_restore_puts_back_parameters_statistics_keys_and_counts() -> None:
    model, optimizer = noisy_pair()
    everything = lambda: nnx.to_pure_dict(nnx.state(model))
    before, start = everything(), flat(everything())
    nnx.jit(nnx_step)(model, optimizer)
    moved = flat(everything())
    assert {path for path in start if (start[path] != moved[path]).any()} >= {
        "encoder/layers/1/mean",
        "encoder/layers/1/var",
        "encoder/layers/2/rngs/count",
        "norm/mean",
        "head/kernel",
    }
    nnx.update(model, fo.restore(everything(), before, "encoder"))
    after = flat(everything())
    assert_same_bits(below(start, "encoder"), below(after, "encoder"))
    assert_same_bits(below(moved, "norm"), below(after, "norm"))
    assert_same_bits(below(moved, "head"), below(after, "head"))


def test_restore_from_the_models_own_variables_is_an_error_as_they_moved_with_it() -> None:
    model = NnxNet(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    before = nnx.state(model, nnx.Param)  # no copy: it holds the model's own Variables
    nnx_step(model, optimizer)
    with pytest.raises(ValueError, match=r"encoder/layers/0/bias.*to_pure_dict"):
        fo.restore(nnx.state(model, nnx.Param), before, "encoder")


# Batch statistics: no optimizer owns them.


class NormEncoder(nn.Module):
    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        return nn.BatchNorm(use_running_average=not train, momentum=0.5)(nn.Dense(4)(x))


class NormNet(nn.Module):
    hold: bool = False  # run the frozen encoder as at evaluation

    def setup(self) -> None:
        self.encoder = NormEncoder()
        self.norm = nn.BatchNorm(momentum=0.5)
        self.head = nn.Dense(2)

    def __call__(self, x: Any, train: bool = True) -> Any:
        x = self.encoder(x, train=train and not self.hold)
        return self.head(self.norm(jnp.exp(x), use_running_average=not train))

    def encode(self, x: Any) -> Any:
        return self.encoder(x, train=False)


class NormState(TrainState):
    batch_stats: Any


def norm_run(hold: bool = False, restore: bool = False) -> tuple[NormState, NormState]:
    variables = NormNet().init(jax.random.key(0), X)
    start = NormState.create(apply_fn=NormNet(hold).apply, tx=HOLD["with_frozen"](optax.adamw(0.1)), **variables)

    @jax.jit
    def step(state: NormState) -> NormState:
        def loss_fn(params: Any) -> Any:
            variables = {"params": params, "batch_stats": state.batch_stats}
            prediction, new = state.apply_fn(variables, X, mutable=["batch_stats"])
            return loss(prediction), new["batch_stats"]

        grads, batch_stats = jax.grad(loss_fn, has_aux=True)(state.params)
        if restore:
            batch_stats = fo.restore(batch_stats, state.batch_stats, "encoder")
        return state.apply_gradients(grads=grads, batch_stats=batch_stats)

    state = start
    for _ in range(3):
        state = step(state)
    return start, state


def encoded(state: NormState) -> np.ndarray:
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    return np.asarray(state.apply_fn(variables, X, method=NormNet.encode))


def test_linen_frozen_weights_with_moving_statistics_are_not_a_frozen_layer() -> None:
    start, end = norm_run()
    assert_same_bits(flat(start.params["encoder"]), flat(end.params["encoder"]))
    assert differ(flat(start.params["head"]), flat(end.params["head"]))
    assert differ(flat(start.batch_stats["encoder"]), flat(end.batch_stats["encoder"]))
    assert not np.allclose(encoded(start), encoded(end), rtol=0.1)


@pytest.mark.parametrize("way", ["hold", "restore"])
def test_linen_statistics_are_held_by_running_averages_or_by_restore(way: str) -> None:
    start, end = norm_run(**{way: True})
    assert_same_bits(flat(start.params["encoder"]), flat(end.params["encoder"]))
    assert_same_bits(flat(start.batch_stats["encoder"]), flat(end.batch_stats["encoder"]))
    np.testing.assert_array_equal(encoded(start), encoded(end))
    assert differ(flat(start.batch_stats["norm"]), flat(end.batch_stats["norm"]))  # the trained part's own go on


def test_nnx_frozen_weights_with_moving_statistics_are_not_a_frozen_layer() -> None:
    model, optimizer = noisy_pair()
    before, stats = weights(model), weights(model, nnx.BatchStat)
    encode = lambda: (model.eval(), np.asarray(model.encoder(X)), model.train())[1]
    output = encode()
    step = nnx.jit(nnx_step)
    for _ in range(3):
        step(model, optimizer)
    assert_same_bits(below(before, "encoder"), below(weights(model), "encoder"))
    assert differ(below(stats, "encoder"), below(weights(model, nnx.BatchStat), "encoder"))
    assert not np.allclose(output, encode())


@pytest.mark.parametrize("way", ["eval", "restore"])
def test_nnx_statistics_are_held_by_eval_or_by_restore(way: str) -> None:
    model, optimizer = noisy_pair()
    stats = weights(model, nnx.BatchStat)
    encode = lambda: (model.eval(), np.asarray(model.encoder(X)), model.train())[1]
    output = encode()
    if way == "eval":
        model.encoder.eval()  # after model.train(), which sets every layer

    @nnx.jit
    def step(model: Any, optimizer: Any) -> None:
        before = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
        nnx_step(model, optimizer)
        if way == "restore":
            after = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
            nnx.update(model, fo.restore(after, before, "encoder"))

    for _ in range(3):
        step(model, optimizer)
    after = weights(model, nnx.BatchStat)
    assert_same_bits(below(stats, "encoder"), below(after, "encoder"))
    assert differ(below(stats, "norm"), below(after, "norm"))
    np.testing.assert_array_equal(output, encode())
