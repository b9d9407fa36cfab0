"""The three classical ways to hold weights at initial values: where they agree and where not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import frozen_optax as fo

FROZEN = "encoder"


def make_params():
    kernel, head = jax.random.split(jax.random.key(0))
    return {
        "encoder": {
            "bias": jnp.array([-0.0, 0.5, 1.0]),
            "kernel": jax.random.normal(kernel, (4, 3)),
        },
        "head": {"kernel": jax.random.normal(head, (3, 2))},
    }


def loss(params, x):
    hidden = jnp.tanh(x @ params["encoder"]["kernel"] + params["encoder"]["bias"])
    return jnp.mean((hidden @ params["head"]["kernel"] - 1.0) ** 2)


def train(
    tx, steps=20, after_step=lambda params, initial: params, apply=fo.apply_updates, params=None
):
    initial = params = make_params() if params is None else params
    x = jax.random.normal(jax.random.key(1), (8, 4))

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params, x), state, params)
        return after_step(apply(params, updates), initial), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def changing_the_optimizer(optimizer, **kwargs):
    return train(fo.with_frozen(optimizer, FROZEN), **kwargs)


def assigning_the_weights_back(optimizer, **kwargs):
    return train(
        optimizer, after_step=lambda params, initial: fo.restore(params, initial, FROZEN), **kwargs
    )


def zeroing_the_gradients(optimizer, **kwargs):
    return train(optax.chain(fo.freeze_by_path(FROZEN), optimizer), **kwargs)


WAYS = [changing_the_optimizer, assigning_the_weights_back, zeroing_the_gradients]


def head_of(result):
    return result[0]["head"]["kernel"]


def holds(result):
    """Whether every frozen leaf has the bits it started with."""
    try:
        fo.assert_frozen(make_params(), result[0], FROZEN)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize(
    "optimizer", [optax.sgd(0.1), optax.sgd(0.1, momentum=0.9), optax.adam(0.1)]
)
def test_all_three_agree_if_only_gradients_move_anything(way, optimizer):
    result = way(optimizer)
    assert holds(result)
    np.testing.assert_allclose(
        head_of(result), head_of(changing_the_optimizer(optimizer)), rtol=1e-5
    )


def test_weight_decay_moves_weights_of_zero_gradient():
    optimizer = optax.adamw(0.1, weight_decay=0.1)
    assert holds(changing_the_optimizer(optimizer))
    assert holds(assigning_the_weights_back(optimizer))
    result = zeroing_the_gradients(optimizer)
    assert not holds(result)
    before, after = make_params()["encoder"]["kernel"], result[0]["encoder"]["kernel"]
    np.testing.assert_allclose(after, before * (1 - 0.1 * 0.1) ** 20, rtol=1e-4)


def test_momentum_carried_over_moves_weights_of_zero_gradient():
    optimizer = optax.sgd(0.1, momentum=0.9)
    params, state = train(optimizer, steps=3)
    gradients = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(gradients, state, params)
    assert float(jnp.abs(updates["encoder"]["kernel"]).max()) > 0, (
        "a zero gradient, and still an update"
    )
    frozen_updates, _ = optax.chain(optimizer, fo.freeze_by_path(FROZEN)).update(
        gradients, (state, optax.EmptyState()), params
    )
    fo.assert_frozen(params, fo.apply_updates(params, frozen_updates), FROZEN)


def test_frozen_gradients_steer_a_global_norm_if_only_put_back():
    optimizer = optax.chain(optax.clip_by_global_norm(0.01), optax.sgd(1.0))
    changed, back, zeroed = (way(optimizer) for way in WAYS)
    assert holds(changed)
    assert holds(back)
    assert holds(zeroed)
    np.testing.assert_allclose(head_of(changed), head_of(zeroed), rtol=1e-5)
    assert np.abs(head_of(changed) - head_of(back)).max() > 1e-3
    last, _ = train(optax.chain(optimizer, fo.freeze_by_path(FROZEN)))
    np.testing.assert_array_equal(
        last["head"]["kernel"], head_of(back), err_msg="zeroing last is no better"
    )


def test_only_the_changed_optimizer_stores_nothing_frozen():
    optimizer = optax.adam(0.1)
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(way(optimizer)[1])) for way in WAYS]
    trained = make_params()["head"]["kernel"].size
    total = sum(leaf.size for leaf in jax.tree.leaves(make_params()))
    assert sizes == [2 * trained + 1, 2 * total + 1, 2 * total + 1]


def test_a_trained_nan_reaches_frozen_weights_by_later_clipping():
    params = make_params()
    gradients = jax.tree.map(jnp.ones_like, params)
    gradients["head"]["kernel"] = gradients["head"]["kernel"].at[0, 0].set(jnp.nan)
    clip = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1))

    zeroed = optax.chain(fo.freeze_by_path(FROZEN), clip)
    updates, _ = zeroed.update(gradients, zeroed.init(params), params)
    assert np.isnan(fo.apply_updates(params, updates)["encoder"]["kernel"]).all()

    changed = fo.with_frozen(clip, FROZEN)
    updates, _ = changed.update(gradients, changed.init(params), params)
    fo.assert_frozen(params, fo.apply_updates(params, updates), FROZEN)


@pytest.mark.parametrize(
    "hold",
    [
        lambda: fo.with_frozen(optax.adamw(0.1), "**"),
        lambda: optax.chain(optax.adamw(0.1), fo.freeze_all()),
    ],
    ids=["with_frozen", "freeze_all"],
)
@pytest.mark.parametrize("apply", [fo.apply_updates, optax.apply_updates], ids=["fo", "optax"])
def test_a_whole_network_is_held_for_a_thousand_steps(hold, apply):
    params, _ = train(hold(), steps=1000, apply=apply)
    fo.assert_trees_bit_identical(params, make_params())


def test_restoring_a_whole_network_holds_it_for_a_thousand_steps():
    params, _ = train(
        optax.adamw(0.1),
        steps=1000,
        after_step=lambda params, initial: fo.restore(params, initial, "**"),
    )
    fo.assert_trees_bit_identical(params, make_params())
