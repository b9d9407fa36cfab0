"""`assert_update_freezes`: what is called proved cannot happen, what moves a leaf is found."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from kinds import EACH_OF_FEW
from proving import MOVED, STEERED, WAYS, loss, make_params, verdict

import frozen_optax as fo
from benchmarks.catalogue import NAMES, extra_args, make
from frozen_optax._proofs import _counterexamples


def runner(name, tx, params):
    """Three steps, as a function of what becomes of frozen gradients, to their updates."""

    def step(gradient, state):
        with (
            jax.disable_jit()
        ):  # to compile each program takes longer than all of its steps, op by op
            return tx.update(gradient, state, params, **extra_args(name, loss, params, gradient))

    def run(change=lambda gradient: gradient):
        state, found, gradient = tx.init(params), [], jax.grad(loss)(params)
        gradient = gradient | {"encoder": jax.tree.map(change, gradient["encoder"])}
        for _ in range(3):
            updates, state = step(gradient, state)
            found.append(updates)
        return found

    return run


def given_to(name, params):
    return optax.LookaheadParams.init_synced(params) if name == "lookahead" else params


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_under_with_frozen_is_proved(name):  # its runs are in test_optimizers.py
    params = make_params()
    tx, args = (
        fo.with_frozen(make(name), "encoder"),
        extra_args(name, loss, params, jax.grad(loss)(params)),
    )
    assert fo.assert_update_freezes(tx, given_to(name, params), "encoder", **args)


@pytest.mark.parametrize("name", EACH_OF_FEW)
def test_no_optimizer_that_moves_or_is_steered_is_proved(name, monkeypatch):
    if name == "lookahead":  # it takes a pair of trees, on which no freeze in a chain fits
        return
    params = make_params()
    gradient = jax.grad(loss)(params)
    for way, wrap in WAYS.items():
        if way == "with_frozen":  # proved above
            continue
        if (
            way == "fo.freeze between"
        ):  # from here on without runs that show what is not proved: they take long
            monkeypatch.setattr(_counterexamples, "_MAX_NUMBERS", 0)
        tx = optax.with_extra_args_support(wrap(make(name)))
        args = extra_args(name, loss, params, gradient)
        message = verdict(fo.assert_update_freezes, tx, params, "encoder", **args)
        if "after" in way:
            assert MOVED not in message
        if MOVED in message:
            continue
        run = runner(name, tx, params)
        updates = run()
        assert not any(
            np.any(np.asarray(leaf))
            for each in updates
            for leaf in jax.tree.leaves(each["encoder"])
        ), way
        if STEERED not in message:
            others = run(lambda gradient: 3 * gradient)
            fo.assert_trees_bit_identical(
                *([each["head"] for each in two] for two in (updates, others))
            )


PARAMETER = "parameters (encoder/kernel) through"
KEY = "a random key in the state"
REASONS = [
    (lambda: optax.adamw(0.1, weight_decay=0.1), f"{PARAMETER} mul, add, mul: weight decay"),
    (lambda: optax.add_decayed_weights(0.1), f"{PARAMETER} mul, add: weight decay"),
    (lambda: optax.adam(0.1), "the state (1/0/mu/encoder/kernel) through"),
    (
        lambda: optax.sgd(0.1, momentum=0.9),
        "the state (1/0/trace/encoder/kernel) through mul, add, mul: moments",
    ),
    (lambda: optax.noisy_sgd(0.1, key=jax.random.key(0)), f"{KEY} (1/0/rng_key) through"),
    (lambda: optax.add_noise(0.1, 0.5, key=0), f"{KEY} (1/rng_key) through"),
    (lambda: optax.clip_by_global_norm(1.0), "the gradients of trained leaves (head/"),
    (lambda: optax.polyak_sgd(), "the extra arguments (value) through"),
    (lambda: optax.scale_by_trust_ratio(min_norm=1.0), f"the {PARAMETER}"),
]


@pytest.mark.parametrize(("after", "reason"), REASONS)
def test_the_reason_names_what_reaches_the_update_and_how(after, reason):
    tx = optax.chain(fo.freeze("encoder"), after())
    with pytest.raises(AssertionError) as error:
        fo.assert_update_freezes(
            tx, make_params(), "encoder", **({"value": 1.0} if "value" in reason else {})
        )
    message = str(error.value)
    assert message.startswith(
        "2 of 2 frozen leaves have an update that is not proved to be zero:\n  encoder/kernel: "
    )
    assert reason in message


def test_a_movement_that_comes_steps_late_is_seen():
    def update(updates, state, params=None):
        late = jax.tree.map(lambda u, p: jnp.where(state["count"] >= 2, p, u * 0), updates, params)
        return late, {"count": state["count"] + 1}

    tx = optax.GradientTransformation(lambda params: {"count": jnp.zeros((), int)}, update)
    message = verdict(fo.assert_update_freezes, tx, make_params(), "encoder")
    assert "refuted: it is" in message
    assert "at step 3 of a run on random numbers from a fresh state" in message


def test_the_update_is_looked_at_in_each_form_of_the_state():
    def update(updates, state, params=None):
        form = len(state)
        moved = jax.tree.map(lambda u, p: p if form == 2 else jnp.zeros_like(u), updates, params)
        return moved, (*state, jnp.zeros(())) if form < 2 else state

    tx = optax.GradientTransformation(lambda params: (), update)
    assert "depends on the parameters (encoder/kernel)" in verdict(
        fo.assert_update_freezes, tx, make_params(), "**"
    )
    grows = optax.GradientTransformation(
        lambda params: (), lambda u, s, p=None: (u, (*s, jnp.zeros(())))
    )
    with pytest.raises(ValueError, match="change at each of 4 updates"):
        fo.assert_update_freezes(grows, make_params(), "encoder")


def test_what_an_update_is_made_of_is_told_exactly():
    params = {
        "float": jnp.ones(2),
        "int": jnp.arange(3),
        "key": jax.random.key(0),
        "complex": jnp.ones(1, jnp.complex64),
        "fnuz": jnp.ones(1, jnp.float8_e4m3fnuz),
        "empty": jnp.zeros((0, 2)),
        "head": jnp.ones(2),
    }
    frozen = [name for name in params if name != "head"]
    found = fo.assert_update_freezes(
        fo.with_frozen(optax.adamw(0.1), trainable="head"), params, trainable="head"
    )
    assert found == {
        "float": "a constant -0.0",
        "int": "a constant 0",
        "key": "absent",
        "complex": "a constant -0.0",
        "fnuz": "a constant 0.0",
        "empty": "no elements",
    }
    some = {name: params[name] for name in ("float", "complex", "head")}
    of = lambda *more: fo.assert_update_freezes(optax.chain(*more), some, ["float", "complex"])
    freeze = fo.freeze(["float", "complex"])
    assert of(optax.sgd(0.1), freeze) == {"float": "a constant -0.0", "complex": "a constant -0.0"}
    assert of(freeze, optax.scale(-1.0))["float"] == "a constant 0.0"
    by_optax = optax.freeze({"float": True, "complex": True, "head": False})
    assert of(by_optax)["float"] == "a constant 0.0"
    assert set(frozen) == set(found)


def test_extra_arrays_and_floats_are_abstract():
    def update(updates, state, params=None, *, value=0.0, steps=1, fun=None, training=True, **_):
        assert isinstance(steps, int)
        assert isinstance(training, bool)
        assert isinstance(value, jax.core.Tracer)
        zero = sum(jnp.zeros(()) for _ in range(steps)) if training else value
        return jax.tree.map(lambda u: jnp.zeros_like(u) + zero, updates), (state, fun(1.0))[0]

    tx = optax.GradientTransformationExtraArgs(lambda params: (), update)
    prove = functools.partial(fo.assert_update_freezes, tx, make_params(), "**", fun=lambda x: x)
    assert prove(value=0.0, steps=3)["encoder/kernel"] == "a constant 0.0"
    assert "the extra arguments (value) through" in verdict(prove, value=0.0, training=False)
    assert "it is" in verdict(prove, value=jax.ShapeDtypeStruct((), jnp.float32), training=False)


def test_nothing_is_computed_or_stored_for_large_parameters():
    large = jax.eval_shape(
        lambda: {"encoder": jnp.zeros((200_000, 200_000)), "head": jnp.zeros((4,))}
    )
    assert fo.assert_update_freezes(fo.with_frozen(optax.adamw(0.1), "encoder"), large, "encoder")
    message = verdict(fo.assert_update_freezes, optax.adamw(0.1), large, "encoder")
    assert (
        "encoder: unknown (too large to be run on random numbers)\n"
        "    depends on the gradients of frozen" in message
    )
