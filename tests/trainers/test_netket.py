"""netket: complex parameters of double precision, and samples between any two steps."""

import jax.numpy as jnp
import netket as nk
import optax
from held import assert_held, assert_same_training

import frozen_optax as fo

X64 = True


def optimizer():
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.05))


def train(tx):
    hilbert = nk.hilbert.Spin(s=1 / 2, N=4)
    hamiltonian = nk.operator.Ising(hilbert, nk.graph.Chain(4), h=1.0)
    state = nk.vqs.MCState(
        nk.sampler.MetropolisLocal(hilbert, n_chains=8),
        nk.models.RBM(alpha=1, param_dtype=complex),
        n_samples=64,
        seed=0,
        sampler_seed=0,
    )
    odd = complex(-0.0, 5e-324)
    of_layer = state.parameters["Dense"]
    of_layer = {**of_layer, "kernel": of_layer["kernel"].at[0, 0].set(odd)}
    state.parameters = before = {**state.parameters, "Dense": of_layer}
    nk.driver.VMC(hamiltonian, tx, variational_state=state).run(3, show_progress=False)
    return before, state.parameters


def test_the_driver_holds_what_is_frozen():
    tx = fo.with_frozen(optimizer(), "Dense")
    before, after = train(tx)
    assert before["Dense"]["kernel"].dtype == jnp.complex128
    assert_held(before, after, tx, frozen=["Dense/bias", "Dense/kernel"])
    mask = {"Dense": {"bias": True, "kernel": True}, "visible_bias": False}
    _, other = train(optax.selective_transform(optimizer(), freeze_mask=mask))
    assert_same_training(after, other, rtol=1e-10)
