"""optimistix: float64, and an optimizer that is rebuilt from its closures."""

import jax.numpy as jnp
import optax
import optimistix as optx
import pytest
from held import assert_held, assert_same_training

import frozen_optax as fo

X64 = True

OPTIMIZERS = {
    "adamw": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1)),
    "lbfgs": optax.lbfgs,  # is handed `value_fn`
}


def rosenbrock(params, scale):
    inner = params["y"] - params["x"] ** 2
    return jnp.sum((1 - params["x"]) ** 2) + scale * jnp.sum(inner**2) + params["shift"] ** 2


def minimise(tx, function, params):
    solver = optx.OptaxMinimiser(tx, rtol=1e-12, atol=1e-12)
    return optx.minimise(function, solver, params, 10.0, max_steps=20, throw=False).value


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_minimiser_holds_what_is_frozen(optimizer):
    before = {
        "shift": jnp.float64(0.3),
        "x": jnp.array([-0.5, 2.0]),
        "y": jnp.array([-0.0, 5e-324]),
    }
    assert before["x"].dtype == jnp.float64
    tx = fo.with_frozen(optimizer(), "y")
    after = minimise(tx, rosenbrock, before)
    assert_held(before, after, tx, frozen=["y"])

    y = before["y"]
    trained = {name: before[name] for name in ("shift", "x")}
    alone = minimise(
        optimizer(), lambda params, scale: rosenbrock({**params, "y": y}, scale), trained
    )
    assert_same_training({name: after[name] for name in alone}, alone, rtol=1e-10)
