"""What NNX has besides parameters: shared variables, keys, counts, two modes."""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from flax_runs import (
    HOLD,
    OPTIMIZERS,
    NnxNet,
    X,
    alone,
    assert_close,
    assert_encoder_held_and_head_moved,
    below,
    differ,
    flat,
    loss,
    nnx_pair,
    nnx_step,
    noisy_pair,
    weights,
)
from helpers import assert_same_bits

import frozen_optax as fo


def test_a_functional_nnx_step_takes_the_same_trajectory() -> None:
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


def test_a_shared_parameter_goes_by_the_first_of_its_paths() -> None:
    class Tied(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.encoder = nnx.Linear(3, 3, rngs=rngs)
            self.again = self.encoder
            self.head = nnx.Linear(3, 2, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.head(self.again(jnp.tanh(self.encoder(x))))

    model = Tied(nnx.Rngs(0))
    assert fo.by_path("**").paths(nnx.state(model)) == [
        "again/bias",
        "again/kernel",
        "head/bias",
        "head/kernel",
    ]
    with pytest.raises(ValueError, match=r"'encoder'\) selects nothing"):
        nnx.Optimizer(model, fo.with_frozen(optax.adam(0.1), "encoder"), wrt=nnx.Param)
    for tx in (
        fo.with_frozen(optax.adamw(0.1), "again"),
        optax.chain(optax.adamw(0.1), fo.freeze("again")),
    ):
        before = weights(model)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        nnx.jit(nnx_step)(model, optimizer)
        assert model.again is model.encoder
        after = weights(model)
        assert_same_bits(below(before, "again"), below(after, "again"))
        assert differ(below(before, "head"), below(after, "head"))


def test_model_and_optimizer_takes_it_too() -> None:
    both = nnx.ModelAndOptimizer(
        NnxNet(nnx.Rngs(0)), HOLD["with_frozen"](OPTIMIZERS["adamw"]), wrt=nnx.Param
    )
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
    optimizer = nnx.Optimizer(
        model, HOLD["with_frozen"](OPTIMIZERS["adamw"]), wrt=nnx.Param, **mode
    )
    before = weights(model)

    @functools.partial(nnx.jit, **mode)
    def step(model: Any, optimizer: Any) -> None:
        optimizer.update(model, nnx.grad(lambda model: loss(model(X)), **mode)(model))

    for _ in range(3):
        step(model, optimizer)
    assert_encoder_held_and_head_moved(before, weights(model))
    assert_close(below(weights(model), "head"), alone("nnx", "adamw"))


def test_dropout_keys_are_no_parameters() -> None:
    model, optimizer = noisy_pair()
    before, rngs = weights(model), weights(model, nnx.RngState)
    step = nnx.jit(nnx_step)
    step(model, optimizer)
    step(model, optimizer)
    assert_same_bits(below(before, "encoder"), below(weights(model), "encoder"))
    assert differ(below(before, "head"), below(weights(model), "head"))
    moved = {
        path for path, leaf in weights(model, nnx.RngState).items() if (leaf != rngs[path]).any()
    }
    # The encoder's dropout drew from its stream.
    assert {path.rsplit("/", 1)[1] for path in moved} == {"count"}


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


def test_restore_from_the_models_own_variables_is_an_error() -> None:
    model = NnxNet(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    before = nnx.state(model, nnx.Param)  # no copy: it holds the model's own Variables
    nnx_step(model, optimizer)
    with pytest.raises(ValueError, match=r"encoder/layers/0/bias.*to_pure_dict"):
        fo.restore(nnx.state(model, nnx.Param), before, "encoder")


# --- filters and what they hold


class Scaled(nnx.Module):
    def __init__(self):
        self.bias = nnx.Param(jnp.float32(2.0))
        self.step = nnx.Param(jnp.int32(0))
        self.lora = nnx.LoRAParam(jnp.zeros(2))


@pytest.mark.parametrize("filter_", [nnx.Not(nnx.LoRAParam), nnx.PathContains("bias")], ids=str)
def test_a_filter_asks_no_variable_for_its_truth(filter_):
    state = nnx.state(Scaled())
    assert fo.by_path("**").paths(state) == ["bias", "lora", "step"]
    found = fo.fingerprint(state, filter_)
    assert "bias" in found
    assert "lora" not in found


def test_a_filter_sees_the_variables_of_a_part_of_a_state():
    state = {"model": nnx.state(Scaled()), "step": jnp.int32(0)}
    where = lambda whole: whole["model"]
    found = fo.fingerprint(state, nnx.Not(nnx.LoRAParam), where=where)
    assert {path.rpartition("/")[2] for path in found} == {"bias", "step"}


def test_from_stage_to_stage_the_state_of_an_optimizer_goes_on() -> None:
    class Two(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.base = nnx.Linear(2, 3, rngs=rngs)
            self.head = nnx.Linear(3, 2, rngs=rngs)

    model = Two(nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    old: Any = None
    state: Any = None
    for stage in fo.stages({"head": 0, "base": 2}, stop=4):
        tx = fo.with_frozen(optax.adam(0.1), stage.frozen)
        new = nnx.Optimizer(model, tx, wrt=nnx.Param)
        if old is not None:
            new.opt_state = fo.transfer_state(old.opt_state, new.opt_state)
        state = fo.transfer_state(state, tx.init(params))
        for _ in range(stage.start, stage.stop or 4):
            new.update(model, jax.tree.map(jnp.sin, nnx.state(model, nnx.Param)))
            updates, state = tx.update(jax.tree.map(jnp.sin, params), state, params)
            params = fo.apply_updates(params, updates)
        assert_same_bits(weights(model), flat(params))
        old = new
