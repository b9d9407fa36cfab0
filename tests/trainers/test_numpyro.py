"""numpyro: an optimizer of optax becomes one of its own, and `update` gets a value."""

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from held import assert_held, assert_same_training
from numpyro.infer import SVI, Trace_ELBO

import frozen_optax as fo

OPTIMIZERS = {
    "adamw": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)),
    "reduce_on_plateau": lambda: optax.chain(  # is handed `value`
        optax.adam(1e-2), optax.contrib.reduce_on_plateau(patience=1)
    ),
}


def model(data):
    mean = numpyro.sample("mean", dist.Normal(jnp.zeros(2), 10.0).to_event(1))
    with numpyro.plate("data", len(data)):
        numpyro.sample("observed", dist.Normal(mean, 1.0).to_event(1), obs=data)


def make_guide(loc=None):
    def guide(data):
        mean = numpyro.param("loc", jnp.array([-0.0, 0.5])) if loc is None else loc
        scale = numpyro.param("scale", jnp.array([0.3, 0.7]), constraint=dist.constraints.positive)
        numpyro.sample("mean", dist.Normal(mean, scale).to_event(1))

    return guide


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_svi_holds_what_is_frozen(optimizer):
    data = jax.random.normal(jax.random.key(1), (16, 2)) + 3
    run = lambda tx, guide: SVI(model, guide, tx, Trace_ELBO()).run(
        jax.random.key(0), 10, data, progress_bar=False
    )
    tx = fo.with_frozen(optimizer(), "loc")
    svi = SVI(model, make_guide(), tx, Trace_ELBO())
    before = svi.optim.get_params(svi.init(jax.random.key(0), data).optim_state)
    after = svi.optim.get_params(run(tx, make_guide()).state.optim_state)
    assert_held(before, after, tx, frozen=["loc"])

    alone = run(optimizer(), make_guide(before["loc"]))
    alone = svi.optim.get_params(alone.state.optim_state)
    assert_same_training({"scale": after["scale"]}, alone)
