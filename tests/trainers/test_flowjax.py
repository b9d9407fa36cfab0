"""flowjax: the parameters are the float arrays of an Equinox module, and holes for all else."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
from flowjax.distributions import Normal
from flowjax.flows import coupling_flow
from flowjax.train import fit_to_data, fit_to_key_based_loss
from flowjax.train.losses import ElboLoss
from held import assert_held, assert_same_training
from paramax import NonTrainable, non_trainable

import frozen_optax as fo

FROZEN = "**/conditioner/layers/0"  # of a module that flowjax scans over


def optimizer():
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))


def make_flow():
    return coupling_flow(
        jax.random.key(0),
        base_dist=non_trainable(Normal(jnp.zeros(2))),
        flow_layers=2,
        nn_width=8,
        nn_depth=1,
    )


def to_data(tx, flow):
    data = jax.random.normal(jax.random.key(1), (64, 2)) * 2 + 1
    return fit_to_data(
        jax.random.key(2),
        flow,
        data,
        optimizer=tx,
        max_epochs=2,
        batch_size=16,
        return_best=False,
        show_progress=False,
    )[0]


def to_a_density(tx, flow):
    loss = ElboLoss(lambda x: -jnp.sum((x - 1) ** 2), num_samples=16)
    return fit_to_key_based_loss(
        jax.random.key(2), flow, loss_fn=loss, steps=3, optimizer=tx, show_progress=False
    )[0]


LOOPS = {"fit_to_data": to_data, "fit_to_key_based_loss": to_a_density}


def params_of(flow):
    """What flowjax trains."""
    is_leaf = lambda leaf: isinstance(leaf, NonTrainable)
    return eqx.partition(flow, eqx.is_inexact_array, is_leaf=is_leaf)[0]


@pytest.mark.parametrize("fit", LOOPS.values(), ids=LOOPS)
def test_a_flow_holds_what_is_frozen(fit):
    flow = make_flow()
    before = params_of(flow)
    tx = fo.with_frozen(optimizer(), FROZEN)
    after = params_of(fit(tx, flow))
    paths = tx.frozen.paths(before)
    assert [path.rpartition("/")[2] for path in paths] == ["weight", "bias"]
    assert_held(before, after, tx, frozen=paths)

    # flowjax's own way: what is wrapped is no part of what its optimizer is handed.
    layer = lambda flow: flow.bijection.bijection.bijection.bijections[0].conditioner.layers[0]
    alone = params_of(fit(optimizer(), eqx.tree_at(layer, flow, replace_fn=non_trainable)))
    trained = fo.partition(after, tx)[0]
    assert_same_training(trained, alone)
