"""Averages of parameters that a host finds in the state: one hole for a wholly frozen module."""

import jax
import jax.numpy as jnp
import optax
import pytest
from helpers import make_params

import frozen_optax as fo

IS_HOLE = lambda node: isinstance(node, optax.MaskedNode)


def average(decay):
    """Keeps an average of the parameters in the state, as kauldron's `ema_params` does."""

    def update(updates, state, params):
        new = optax.apply_updates(params, updates)
        return updates, {"ema": optax.incremental_update(new, state["ema"], 1 - decay)}

    return optax.GradientTransformation(lambda params: {"ema": params}, update)


def train(tx, params, steps=3):
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        params = fo.apply_updates(params, updates)
    return params, optax.tree.get(state, "ema")


@pytest.fixture
def inside():
    """The optimizer, the parameters after training, and the average over the trained part."""
    tx = fo.with_frozen(optax.chain(optax.adamw(0.1), average(0.9)), "encoder")
    return (tx, *train(tx, make_params()))


def test_an_average_maps_over_the_trained_part(inside):
    tx, params, ema = inside
    with pytest.raises(ValueError, match=r"encoder|MaskedNode"):
        jax.tree.map(lambda leaf, mean: mean, params, ema)
    with pytest.raises(ValueError, match=r"encoder|MaskedNode"):
        optax.incremental_update(params, ema, 0.1)
    trained, _ = fo.partition(params, tx, prune=True)
    expected = 0.1 * params["head"]["w"] + 0.9 * ema["head"]["w"]
    moved = optax.incremental_update(trained, ema, 0.1)
    assert jax.tree.structure(moved) == jax.tree.structure(ema)
    assert jnp.allclose(moved["head"]["w"], expected)


def test_an_average_is_joined_with_the_frozen_part(inside):
    tx, params, ema = inside
    evaluated = fo.combine(ema, fo.partition(params, tx, prune=True)[1])
    fo.assert_frozen(make_params(), evaluated, tx)
    assert jnp.array_equal(evaluated["head"]["w"], ema["head"]["w"])
    assert not jnp.array_equal(evaluated["head"]["w"], params["head"]["w"])
    other_way_round = jax.tree.map(
        lambda mean, leaf: leaf if IS_HOLE(mean) else mean, ema, params, is_leaf=IS_HOLE
    )
    fo.assert_trees_bit_identical(evaluated, other_way_round)


def test_an_average_outside_is_no_copy_of_what_is_frozen():
    params = {"encoder": jnp.array([0.1, 0.7, 1.0]), "head": jnp.ones(2)}
    tx = optax.chain(fo.with_frozen(optax.adamw(0.1), "encoder"), average(0.9))
    after, ema = train(tx, params, steps=30)
    fo.assert_frozen(params, after, "encoder")
    with pytest.raises(AssertionError, match="encoder"):  # 0.9 * p + 0.1 * p is rounded
        fo.assert_frozen(params, ema, "encoder")
    assert jnp.allclose(ema["encoder"], params["encoder"], rtol=1e-5)
