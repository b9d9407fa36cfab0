"""jaxopt: a solver that adds the updates by itself, in a loop that is compiled."""

import jax.numpy as jnp
import jaxopt
import optax
from held import assert_held, assert_same_training

import frozen_optax as fo


def loss(params, x, y):
    return jnp.mean((jnp.tanh(x @ params["base"]) @ params["head"] + params["shift"] - y) ** 2)


def test_the_solver_holds_what_is_frozen():
    x, y = jnp.linspace(-1, 1, 12).reshape(4, 3), jnp.arange(4.0)[:, None]
    before = {
        "base": jnp.array([[-0.0, 1.0], [0.5, -0.5], [0.25, 2.0]]),
        "head": jnp.ones((2, 1)),
        "shift": jnp.ones(1),
    }
    optimizer = lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(0.1))
    tx = fo.with_frozen(optimizer(), "base")
    after = jaxopt.OptaxSolver(loss, tx, maxiter=10).run(before, x, y).params
    assert_held(before, after, tx, frozen=["base"])

    alone = {name: before[name] for name in ("head", "shift")}
    of_part = lambda params, x, y: loss({**params, "base": before["base"]}, x, y)
    alone = jaxopt.OptaxSolver(of_part, optimizer(), maxiter=10).run(alone, x, y).params
    assert_same_training({name: after[name] for name in alone}, alone)
