"""Haiku as its users have it: keys with slashes, and a state beside the parameters."""

import haiku as hk
import jax
import jax.numpy as jnp
import optax
import pytest
from helpers import same_objects

import frozen_optax as fo

X, Y = jax.random.normal(jax.random.key(1), (16, 4)), jnp.ones((16, 2))
ENCODER = ["net/~/encoder/linear/b", "net/~/encoder/linear/w"]


class Encoder(hk.Module):
    def __init__(self):
        super().__init__("encoder")

    def __call__(self, x, is_training):
        norm = hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=0.9)
        return jax.nn.relu(norm(hk.Linear(8)(x), is_training))


class Net(hk.Module):
    def __init__(self):
        super().__init__("net")
        self.encoder, self.head = Encoder(), hk.Linear(2, name="head")

    def __call__(self, x, encoder_trains):
        hidden = hk.dropout(hk.next_rng_key(), 0.1, self.encoder(x, encoder_trains))
        return self.head(hidden)


model = hk.transform_with_state(lambda x, encoder_trains: Net()(x, encoder_trains))


def make_step(tx, where, encoder_trains):
    @fo.jit(frozen=tx, where=where)
    def step(variables, opt_state, rng, x, y):
        params, state = variables

        def loss(params):
            prediction, new = model.apply(params, state, rng, x, encoder_trains)
            return jnp.mean((prediction - y) ** 2), new

        (value, state), grads = fo.value_and_grad(loss, tx, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (fo.apply_updates(params, updates), state), opt_state, value

    return step


def parameters(variables):
    return variables[0]


def both(variables):
    return variables[0], variables[1]


@pytest.mark.parametrize("pattern", ["net/~/encoder/**", "**/encoder", "net/*/encoder"])
def test_keys_with_slashes_read_as_if_nested(pattern):
    params, state = model.init(jax.random.key(0), X, True)
    paths = fo.by_path(pattern).paths(params)
    assert [path for path in paths if "linear" in path] == ENCODER
    assert set(fo.by_path("**").paths(params)) - set(paths) == {
        "net/~/head/b",
        "net/~/head/w",
    }
    assert all("/encoder/" in path for path in fo.by_path(pattern).paths(state))


def test_a_step_freezes_parameters_and_lets_the_state_go_on():
    before = model.init(jax.random.key(0), X, True)
    tx = fo.with_frozen(optax.adamw(1e-1), "net/~/encoder")
    step = make_step(tx, parameters, encoder_trains=True)
    args = tx.init(before[0]), jax.random.key(2), X, Y
    found = fo.assert_step_freezes(step, before, *args, frozen=tx, where=parameters, exact=True)
    assert set(found.values()) == {"itself"}
    after, _, _ = step(before, *args)
    fo.assert_frozen(before, after, tx, where=parameters)
    encoder = [name for name in before[0] if "encoder" in name]
    assert all(same_objects(before[0][name], after[0][name]) for name in encoder)
    assert not same_objects(before[1], after[1])


def test_a_state_is_frozen_with_its_parameters():
    before = model.init(jax.random.key(0), X, True)
    tx = fo.with_frozen(optax.adamw(1e-1), "net/~/encoder")
    args = tx.init(before[0]), jax.random.key(2), X, Y
    step = make_step(tx, both, encoder_trains=False)
    fo.assert_step_freezes(step, before, *args, frozen=tx, where=both, exact=True)
    after, _, _ = step(before, *args)
    fo.assert_frozen(before, after, tx, where=both)
    assert same_objects(before[1], after[1])
    with pytest.raises(ValueError, match=r"frozen here, and the step makes something else.*"):
        make_step(tx, both, encoder_trains=True)(before, *args)
