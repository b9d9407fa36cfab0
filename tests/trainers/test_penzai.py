"""penzai: parameters in a tuple, which have labels, and no names in their paths."""

import jax
import jax.numpy as jnp
import optax
import pytest
from held import assert_held, assert_same_training, leaves_of
from penzai import pz
from penzai.models.simple_mlp import MLP
from penzai.toolshed.basic_training import StatefulTrainer

import frozen_optax as fo


def by_label(label):
    """The parameters whose label begins so: a mask function sees them with their labels."""
    return lambda params: tuple(each.label.startswith(label) for each in params)


def loss(model, state, rng, x, y):
    found = model(pz.nx.wrap(x).tag("features")).untag("features").unwrap()
    return jnp.mean((found - y) ** 2), state, {}


def params_of(model):
    return pz.unbind_params(model, freeze=True)[1]


def train(tx):
    model = MLP.from_config(init_base_rng=jax.random.key(0), feature_sizes=[2, 4, 1])
    before = params_of(model)
    trainer = StatefulTrainer.build(jax.random.key(1), model, tx, loss)
    for _ in range(5):
        trainer.step(x=jnp.array([0.5, -1.0]), y=jnp.ones(1))
    return before, params_of(model)


def test_what_is_selected_by_label_is_held():
    optimizer = lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    tx = fo.with_frozen(optimizer(), by_label("mlp/Affine_0"))
    before, after = train(tx)
    assert list(leaves_of(before)) == [f"{i}/value/data_array" for i in range(4)]
    assert_held(before, after, tx, frozen=["0/value/data_array", "1/value/data_array"])
    mask = (True, True, False, False)
    _, other = train(optax.selective_transform(optimizer(), freeze_mask=mask))
    assert_same_training(after, other)


def test_a_label_that_no_parameter_has_is_an_error():
    with pytest.raises(ValueError, match="selects nothing"):
        train(fo.with_frozen(optax.adam(1e-2), by_label("mlp/Affine_7")))
