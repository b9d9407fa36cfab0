"""klax: hands a compiled step its optimizer, and calls `update` with a function of the loss."""

import equinox as eqx
import jax
import jax.numpy as jnp
import klax
import optax
import pytest
from held import assert_held, assert_same_training

import frozen_optax as fo

OPTIMIZERS = {
    "adam": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)),
    "lbfgs": optax.lbfgs,
}


def fit(tx, model):
    x = jnp.linspace(-1, 1, 16)[:, None]
    return klax.fit(
        model,
        (x, jnp.sin(3 * x)),
        batch_size=8,
        steps=3,
        optimizer=tx,
        make_logger=False,
        key=jax.random.key(1),
    )[0]


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_fit_holds_what_is_frozen(optimizer):
    model = klax.nn.MLP(1, 1, [4], key=jax.random.key(0))
    layer = lambda model: model.layers[0]
    params_of = lambda model: eqx.filter(model, eqx.is_inexact_array)
    before = params_of(model)
    tx = fo.with_frozen(optimizer(), "layers/0")
    after = params_of(fit(tx, model))
    assert_held(before, after, tx, frozen=["layers/0/weight", "layers/0/bias"])

    # klax's own way stops the gradient: as good under an optimizer that moves nothing without.
    alone = fit(optimizer(), eqx.tree_at(layer, model, replace_fn=klax.non_trainable))
    assert_same_training(after.layers[1], params_of(alone).layers[1])
