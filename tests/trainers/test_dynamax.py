"""dynamax: calls `update` without the parameters, outside of any compiled function."""

import jax
import optax
from dynamax.linear_gaussian_ssm import LinearGaussianSSM
from held import assert_held, assert_same_training

import frozen_optax as fo


def fit(tx, model, params, props):
    emissions = jax.random.normal(jax.random.key(1), (2, 10, 2)) + 1
    return model.fit_sgd(params, props, emissions, optimizer=tx, batch_size=2, num_epochs=3)[0]


def test_fit_sgd_holds_what_is_frozen():
    model = LinearGaussianSSM(2, 2)
    params, props = model.initialize(jax.random.key(0))
    weights = params.emissions.weights.at[0, 0].set(-0.0)
    params = params._replace(emissions=params.emissions._replace(weights=weights))
    tx = fo.with_frozen(optax.adam(1e-2), "emissions/weights")
    after = fit(tx, model, params, props)
    assert_held(params, after, tx, frozen=["emissions/weights"])

    # dynamax's own way stops the gradient: as good under an optimizer that moves nothing without.
    props.emissions.weights.trainable = False
    assert_same_training(after, fit(optax.adam(1e-2), model, params, props))
