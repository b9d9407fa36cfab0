"""Batch statistics, which no optimizer owns."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from flax_runs import HOLD, X, below, differ, flat, loss, nnx_step, noisy_pair, weights
from helpers import assert_same_bits

import frozen_optax as fo


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
    start = NormState.create(
        apply_fn=NormNet(hold).apply, tx=HOLD["with_frozen"](optax.adamw(0.1)), **variables
    )

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


def test_linen_weights_with_moving_statistics_are_not_frozen() -> None:
    start, end = norm_run()
    assert_same_bits(flat(start.params["encoder"]), flat(end.params["encoder"]))
    assert differ(flat(start.params["head"]), flat(end.params["head"]))
    assert differ(flat(start.batch_stats["encoder"]), flat(end.batch_stats["encoder"]))
    assert not np.allclose(encoded(start), encoded(end), rtol=0.1)


@pytest.mark.parametrize("way", ["hold", "restore"])
def test_linen_statistics_are_held_by_averages_or_by_restore(way: str) -> None:
    start, end = norm_run(**{way: True})
    assert_same_bits(flat(start.params["encoder"]), flat(end.params["encoder"]))
    assert_same_bits(flat(start.batch_stats["encoder"]), flat(end.batch_stats["encoder"]))
    np.testing.assert_array_equal(encoded(start), encoded(end))
    # The trained part's own go on.
    assert differ(flat(start.batch_stats["norm"]), flat(end.batch_stats["norm"]))


def test_nnx_weights_with_moving_statistics_are_not_frozen() -> None:
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
