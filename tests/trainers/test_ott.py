"""ott: two train states of Flax Linen in one step, and an NNX module under `nnx.Optimizer`."""

import itertools

import jax
import optax
from flax import nnx
from held import assert_held, assert_same_training
from ott.neural.methods.flow_matching import flow_matching_step, interpolate_samples
from ott.neural.methods.neuraldual import W2NeuralDual
from ott.neural.networks.potentials import PotentialMLP
from ott.neural.networks.velocity_field.mlp import MLP

import frozen_optax as fo


def optimizer():
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))


def train_potentials(make):
    solver = W2NeuralDual(
        2, PotentialMLP([8]), PotentialMLP([8]), make(), make(), num_train_iters=4, valid_freq=10
    )
    before = solver.state_f.params, solver.state_g.params
    sources = itertools.repeat(jax.random.normal(jax.random.key(0), (16, 2)))
    targets = itertools.repeat(jax.random.normal(jax.random.key(1), (16, 2)) + 1)
    solver(sources, targets, sources, targets)
    return before, (solver.state_f.params, solver.state_g.params)


def test_two_potentials_hold_what_is_frozen():
    tx = fo.with_frozen(optimizer(), ["Dense_0", "Dense_1/bias"])  # which has no gradient
    before, after = train_potentials(lambda: tx)
    for one, other in zip(before, after, strict=True):
        assert_held(one, other, tx, frozen=["Dense_0/bias", "Dense_0/kernel", "Dense_1/bias"])
    mask = {"Dense_0": {"bias": True, "kernel": True}, "Dense_1": {"bias": True, "kernel": False}}
    make = lambda: optax.selective_transform(optimizer(), freeze_mask=mask)
    assert_same_training(after, train_potentials(make)[1])


def train_a_flow(tx):
    model = MLP(2, hidden_dims=[8], rngs=nnx.Rngs(0))
    before = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    start = jax.random.normal(jax.random.key(0), (16, 2))
    step = nnx.jit(flow_matching_step)
    for key in jax.random.split(jax.random.key(1), 4):
        step(model, optimizer, interpolate_samples(key, start, start + 1))
    return before, nnx.to_pure_dict(nnx.state(model, nnx.Param))


def test_a_flow_of_nnx_holds_what_is_frozen():
    tx = fo.with_frozen(optimizer(), "blocks/layers/0")
    before, after = train_a_flow(tx)
    paths = [f"blocks/layers/0/lin/{name}" for name in ("bias", "kernel")]
    assert_held(before, after, tx, frozen=paths)
    mask = {"blocks": {"layers": {0: True, 1: False}}}
    alone = optax.selective_transform(optimizer(), freeze_mask=nnx.State(mask))
    assert_same_training(after, train_a_flow(alone)[1])
