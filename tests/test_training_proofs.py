"""Whole training steps, as they are written, under the proof."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.training.train_state import TrainState
from helpers import host_devices
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from proving import ITSELF, MASK, ODD, SIGN, WAYS, loss, make_params, verdict

import frozen_optax as fo


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Dense(4, name="encoder")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        return nn.Dense(2, name="head")(nn.relu(x))


class State(TrainState):
    batch_stats: Any


def flax_step(tx, train=True, ema=None):
    x = jnp.ones((8, 3))
    variables = Net().init(jax.random.key(0), x)
    state = State.create(apply_fn=Net().apply, tx=tx, **variables)

    def step(state, x):
        def loss(params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            y, new = state.apply_fn(variables, x, train=train, mutable=["batch_stats"])
            return jnp.mean(y**2), new["batch_stats"]

        grads, stats = jax.grad(loss, has_aux=True)(state.params)
        new = state.apply_gradients(grads=grads).replace(batch_stats=stats)
        if not ema:
            return new
        average = lambda p, q: ema * p + (1 - ema) * q
        return new.replace(params=jax.tree.map(average, state.params, new.params))

    return step, state, x


WHERE = {
    "params": lambda state: state.params,
    "all": lambda state: (state.params, state.batch_stats),
}


def test_a_flax_train_state():
    tx = fo.with_frozen(optax.adamw(0.1), ["encoder", "norm"])
    prove = functools.partial(
        fo.assert_step_freezes, frozen=["encoder", "norm"], where=WHERE["params"]
    )
    found = prove(*flax_step(tx))
    assert list(found) == [
        f"params/{path}" for path in ("encoder/bias", "encoder/kernel", "norm/bias", "norm/scale")
    ]
    assert {words.split(":")[0] for words in found.values()} == {ODD}
    step, state, x = flax_step(tx)
    assert prove(jax.jit(step, donate_argnums=0), state, x) == found
    shapes = jax.eval_shape(lambda: (state, x))
    assert prove(step, *shapes) == found


def test_batch_statistics_are_seen_to_move():
    tx = fo.with_frozen(optax.adamw(0.1), ["encoder", "norm"])
    step, state, x = flax_step(tx)
    prove = functools.partial(
        fo.assert_step_freezes, frozen=["encoder", "norm"], where=WHERE["all"]
    )
    message = verdict(prove, step, state, x)
    assert message.startswith(
        "2 of 6 frozen leaves are not proved to stay as they are:\n  batch_stats/norm/mean: refuted"
    )
    assert "depends on x through" in message
    assert "batch_stats/norm/mean" in prove(*flax_step(tx, train=False))
    thrown_away = fo.jit(step, frozen=["encoder", "norm"], where=WHERE["all"], discard=True)
    # It is the step's own function that is proved.
    assert verdict(prove, thrown_away, state, x) == message


def test_a_moving_average_over_all_parameters_is_seen():
    tx = fo.with_frozen(optax.adamw(0.1), "encoder")
    prove = functools.partial(fo.assert_step_freezes, frozen="encoder", where=WHERE["params"])
    message = verdict(prove, *flax_step(tx, ema=0.9))  # 0.9 * p + 0.1 * p is p, but for rounding
    assert "2 of 2 frozen leaves are not proved to stay" in message
    assert "depends on params/encoder/kernel through mul, add" in message


def train_step(tx, gradient, apply):
    def step(params, state, x):
        value, grads = gradient(lambda p: loss(p) * x)(params)
        updates, state = tx.update(grads, state, params)
        return apply(params, updates), state, value

    return step


@pytest.mark.parametrize(
    ("wrap", "apply", "words"),
    [
        (WAYS["with_frozen"], fo.apply_updates, ITSELF),
        (WAYS["with_frozen"], optax.apply_updates, ODD),
        (WAYS["fo.freeze after"], fo.apply_updates, ITSELF),
        (WAYS["fo.freeze after"], optax.apply_updates, ODD),
        (WAYS["optax.freeze and a scale after"], fo.apply_updates, ITSELF),
        (WAYS["optax.freeze and a scale after"], optax.apply_updates, ODD),
        (lambda tx: optax.chain(tx, optax.freeze(MASK)), optax.apply_updates, SIGN),
        (lambda tx: optax.selective_transform(tx, freeze_mask=MASK), optax.apply_updates, SIGN),
        (lambda tx: fo.with_frozen(optax.MultiSteps(tx, 4), "encoder"), fo.apply_updates, ITSELF),
        (
            lambda tx: optax.apply_if_finite(fo.with_frozen(tx, "encoder"), 3),
            fo.apply_updates,
            ITSELF,
        ),
        (
            lambda tx: optax.MultiSteps(optax.chain(tx, optax.freeze(MASK)), 4),
            optax.apply_updates,
            SIGN,
        ),
        (lambda tx: optax.chain(optax.freeze(MASK), tx), optax.apply_updates, None),
        (lambda tx: tx, optax.apply_updates, None),
    ],
)
def test_ways_to_freeze(wrap, apply, words):
    tx = wrap(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1)))
    params = make_params()
    for gradient in (jax.value_and_grad, lambda fun: fo.value_and_grad(fun, "encoder")):
        step = train_step(tx, gradient, apply)
        args = (params, tx.init(params), jnp.ones(()))
        if words:
            found = fo.assert_step_freezes(step, *args, frozen="encoder")
            assert {each.split(":")[0] for each in found.values()} == {words}
        else:
            assert "refuted" in verdict(fo.assert_step_freezes, step, *args, frozen="encoder")


def test_what_restore_promises_is_proved():
    params, tx = make_params(), optax.adamw(0.1)
    step = train_step(tx, jax.value_and_grad, optax.apply_updates)
    args = (params, tx.init(params), jnp.ones(()))
    assert "refuted" in verdict(fo.assert_step_freezes, step, *args, frozen="encoder")
    kept = jax.jit(
        lambda p, *args: (fo.restore(step(p, *args)[0], p, "encoder"), *step(p, *args)[1:])
    )
    found = fo.assert_step_freezes(kept, *args, frozen="encoder", exact=True)
    assert set(found.values()) == {"itself"}


def test_a_step_over_eight_devices():
    mesh = Mesh(np.array(host_devices(8)), "x")
    params = {"encoder": jnp.ones((8, 2)), "norm": jnp.ones(3), "head": jnp.ones((8, 2))}
    specs = {"encoder": P("x"), "norm": P(), "head": P("x")}

    def of(function, out=specs):
        def local(params, x):
            grads = jax.lax.pmean(jnp.sum(x), "x") * params["head"]
            return function(params) | {"head": params["head"] - grads}

        return jax.shard_map(
            local, mesh=mesh, in_specs=(specs, P("x")), out_specs=out, check_vma=False
        )

    x = jnp.ones(8)
    prove = functools.partial(fo.assert_step_freezes, frozen=["encoder", "norm"])
    assert set(prove(of(lambda p: p), params, x).values()) == {"itself"}
    assert prove(of(lambda p: p | {"norm": p["norm"] + 0.0}), params, x)["norm"].startswith(SIGN)
    shifted = of(
        lambda p: (
            p
            | {"encoder": jax.lax.ppermute(p["encoder"], "x", [(i, (i + 1) % 8) for i in range(8)])}
        )
    )
    assert "1 of 2 frozen leaves" in verdict(prove, shifted, params, x)
    first = of(lambda p: p | {"norm": jax.lax.pmean(p["norm"], "x")})
    assert "norm: unknown" in verdict(prove, first, params, x)
