"""blackjax: particles, each with a frozen part, and parameters of a distribution."""

import blackjax
import jax
import jax.numpy as jnp
import optax
from held import assert_held, assert_same_training

import frozen_optax as fo


def optimizer():
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-1))


def log_density(position):
    return -jnp.sum((position["x"] - 1) ** 2) - jnp.sum((position["y"] + position["x"]) ** 2)


def test_particles_hold_what_is_frozen():
    x, y = jax.random.normal(jax.random.key(0), (2, 8, 2))
    before = {"x": x, "y": y.at[0, 0].set(-0.0)}

    def run(tx):
        svgd = blackjax.svgd(jax.grad(log_density), tx)
        state, step = svgd.init(before), jax.jit(svgd.step)
        for _ in range(5):
            state = step(state)
        return state.particles

    tx = fo.with_frozen(optimizer(), "y")
    after = run(tx)
    assert_held(before, after, tx, frozen=["y"])
    mask = {"x": False, "y": True}
    assert_same_training(after, run(optax.selective_transform(optimizer(), freeze_mask=mask)))


def test_variational_inference_holds_what_is_frozen():
    """Of a pair of trees, means and scales: the means move, the scales do not."""
    position = {"x": jnp.zeros(2), "y": jnp.ones(2)}

    def run(tx):
        vi = blackjax.meanfield_vi(log_density, tx, num_samples=8)
        start = state = vi.init(position)
        step = jax.jit(vi.step)
        for key in jax.random.split(jax.random.key(0), 5):
            state, _ = step(key, state)
        return (start.mu, start.rho), (state.mu, state.rho)

    tx = fo.with_frozen(optimizer(), "1")
    before, after = run(tx)
    assert_held(before, after, tx, frozen=["1/x", "1/y"])
    other = optax.selective_transform(optimizer(), freeze_mask=(False, True))
    assert_same_training(after, run(other)[1])
