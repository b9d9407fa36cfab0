"""Frozen gradients that steer a trained leaf, by whichever way, are seen."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from proving import HEAD, MASK, STEERED, loss, make_params, steering, transformation, verdict
from trying import mutable_array

import frozen_optax as fo
from benchmarks.catalogue import extra_args


def test_a_steering_that_comes_a_step_late_is_seen():
    """The norm of all gradients is stored, and scales the updates of the next step."""

    def update(updates, state, params=None):
        del params
        return jax.tree.map(lambda u: u * state["norm"], updates), {"norm": norm(updates)}

    norm = lambda tree: sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree))
    late = optax.GradientTransformation(lambda params: {"norm": jnp.ones(())}, update)
    tx = optax.chain(late, fo.freeze("encoder"))
    fo.assert_update_freezes(tx, make_params(), "encoder", non_interference=False)
    message = verdict(fo.assert_update_freezes, tx, make_params(), "encoder")
    assert message.startswith(
        f"2 of 2 {STEERED} is not proved to be independent of frozen gradients:\n  head/bias: "
    )
    assert "refuted: at step 2, where frozen gradients are another" in message
    assert (
        "depends on what earlier steps may have left in the state (0/norm) through mul" in message
    )
    assert not verdict(
        fo.assert_update_freezes, fo.with_frozen(late, "encoder"), make_params(), "encoder"
    )


def stored(head: Any, base: Any) -> Any:
    reference = mutable_array(jnp.zeros(3))
    reference[...] = base
    return reference[...]


def sign_in_a_scan(head: Any, base: Any) -> Any:
    turn = lambda carry, x: (carry, x + jnp.where(base > 0, 0.0, -0.0)[0])
    return 1 / jax.lax.scan(turn, 0, head)[1]


def sign_in_a_cond(head: Any, base: Any) -> Any:
    return 1 / jax.lax.cond(base[0] > 0, lambda: head, lambda: head + jnp.zeros(3))


def turns_of_a_loop(start: Any, base: Any, add: Any) -> Any:
    goes_on = lambda carry: carry[0] < base[0]
    turn = lambda carry: (carry[0] + 1, add(carry[1]))
    return jax.lax.while_loop(goes_on, turn, (0.0, start))[1]


def adding_zero(head: Any, base: Any) -> Any:
    return 1 / turns_of_a_loop(head, base, lambda x: x + jnp.zeros(3))


def adding_one(head: Any, base: Any) -> Any:
    return turns_of_a_loop(jnp.zeros(3), base, lambda x: x + 1)


def cond_of_constants(head: Any, base: Any) -> Any:
    return jax.lax.cond(base[0] > 0, lambda: jnp.zeros(3), lambda: jnp.ones(3))


STEERING = {
    "the sign of a zero in a scan": sign_in_a_scan,
    "the sign of a zero in a cond": sign_in_a_cond,
    "the turns of a loop that adds zero": adding_zero,
    "the turns of a loop": adding_one,
    "a select": lambda h, b: jnp.where(b > 0, h, 2 * h),
    "a select of constants": lambda h, b: jnp.where(b > 0, 1.0, 2.0),
    "a cond of constants": cond_of_constants,
    "a mutable array": stored,
}


@pytest.mark.parametrize("name", STEERING)
def test_ways_to_steer_a_trained_leaf_are_seen(name):
    params = {"base": jnp.ones(3), "head": HEAD}
    assert STEERED in verdict(fo.assert_update_freezes, steering(STEERING[name]), params, "base")
    if name != "a mutable array":  # of which nothing is known
        by_itself = lambda gradient: STEERING[name](gradient, gradient)
        alone = transformation(lambda g, s, p=None: (jax.tree.map(by_itself, g), s))
        assert fo.assert_update_freezes(fo.with_frozen(alone, "base"), params, "base")


@pytest.mark.parametrize("steers", [True, False])
def test_steering_by_a_state_that_changes_its_form_is_seen(steers):
    """The first update stores the frozen gradient, and all others read it, one leaf more."""

    def update(gradients, state, params=None):
        scale = state[1] if len(state) > 1 else 1.0
        kept = gradients["base"].sum() if steers else gradients["head"].sum()
        return {"base": jnp.zeros(3), "head": gradients["head"] * scale}, (state[0], kept)

    tx = transformation(update, (jnp.zeros(()),))
    message = verdict(fo.assert_update_freezes, tx, {"base": jnp.ones(3), "head": HEAD}, "base")
    assert (STEERED in message) == steers
    assert (
        "depends on what earlier steps may have left in the state (1) through mul" in message
        or not steers
    )


def test_leaves_that_are_no_arrays_shift_no_frozen_gradient():
    params = {"act": jax.nn.relu, "c": jnp.ones(3), "enc": jnp.ones(3)}
    tx = optax.chain(optax.clip_by_global_norm(1.0), fo.freeze(["enc", "act"]))
    assert STEERED in verdict(fo.assert_update_freezes, tx, params, ["enc", "act"])
    found = fo.assert_update_freezes(
        fo.with_frozen(optax.adam(1e-3), ["act", "c"]), params, ["act", "c"]
    )
    assert found == {"act": "absent", "c": "a constant -0.0"}


def test_a_state_with_leaves_that_are_no_numbers():
    float0 = np.zeros(3, jax.dtypes.float0)

    def update(gradients, state, params=None):
        first, _, there, _ = state
        return {"base": jnp.zeros(3), "head": there}, (
            first,
            jnp.zeros(3),
            gradients["base"],
            jnp.zeros(3),
        )

    tx = transformation(update, (float0, jnp.zeros(3), jnp.zeros(3), jnp.zeros(3)))
    message = verdict(fo.assert_update_freezes, tx, {"base": jnp.ones(3), "head": HEAD}, "base")
    assert "head: refuted: at step 2, where frozen gradients are another" in message
    assert "the state (2)" in message


def test_a_frozen_gradient_among_the_extra_arguments_is_one():
    params = make_params()
    tx = optax.chain(optax.freeze(MASK), optax.lbfgs(), fo.freeze("encoder"))
    args = extra_args("lbfgs", loss, params, jax.grad(loss)(params))
    message = verdict(fo.assert_update_freezes, tx, params, "encoder", **args)
    assert "depends on the gradients of frozen leaves (grad/encoder/" in message


def test_a_loop_that_nan_would_keep_going_comes_to_an_end():
    endless = lambda g: jax.lax.while_loop(lambda x: ~(jnp.abs(x) < 1), lambda x: x * 0.5, g[0])
    tx = transformation(
        lambda g, s, p=None: ({"base": jnp.zeros(3) * endless(g["head"]), "head": g["head"]}, s)
    )
    assert "base: unknown" in verdict(
        fo.assert_update_freezes, tx, {"base": jnp.ones(3), "head": HEAD}, "base"
    )
    tx = steering(lambda h, b: h * endless(b))
    assert "head: refuted" in verdict(
        fo.assert_update_freezes, tx, {"base": jnp.ones(3), "head": HEAD}, "base"
    )


@pytest.mark.parametrize(
    "nest", [lambda g: [g], lambda g: {"grads": g, "a": 1.0}, lambda g: (1.0, {"x": (g, 2.0)})]
)
def test_gradients_in_a_nested_extra_argument_steer(nest):
    params = {"base": jnp.ones(3), "head": HEAD}

    def update(gradients, state, params=None, *, aux):
        total = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(aux))
        return {"base": jnp.zeros(3), "head": gradients["head"] * total}, state

    tx = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    message = verdict(fo.assert_update_freezes, tx, params, "base", aux=nest(params))
    assert STEERED in message
