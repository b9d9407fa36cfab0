"""A state taken over: what both have comes from the old one, and all else is told."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from helpers import host_devices

import frozen_optax as fo

PARAMS = {"encoder": {"w": jnp.ones((2, 2))}, "head": {"w": jnp.ones(3)}}
ADAM = optax.adam(0.1)


def after_steps(tx: Any, params: Any = PARAMS, steps: int = 2) -> Any:
    state = tx.init(params)
    for _ in range(steps):
        _, state = tx.update(params, state, params)
    return state


def test_what_goes_on_are_the_very_arrays() -> None:
    old = after_steps(fo.with_frozen(ADAM, "encoder"))
    fresh = ADAM.init(PARAMS)
    new = fo.transfer_state(old, fresh)
    assert jax.tree.structure(new) == jax.tree.structure(fresh)
    assert new[0].mu["head"]["w"] is old[0].mu["head"]["w"]
    assert new[0].count is old[0].count
    assert new[0].mu["encoder"]["w"] is fresh[0].mu["encoder"]["w"]
    plan = fo.plan_transfer(old, fresh)
    assert plan.carried == ("[0].count", "[0].mu['head']['w']", "[0].nu['head']['w']")
    assert plan.fresh == ("[0].mu['encoder']['w']", "[0].nu['encoder']['w']")
    assert plan.dropped == ()


def test_what_is_frozen_again_is_dropped_or_taken_from_an_older_one() -> None:
    whole = after_steps(ADAM)
    frozen = fo.with_frozen(ADAM, "encoder")
    state = fo.transfer_state(whole, frozen.init(PARAMS))
    assert fo.plan_transfer(whole, state).dropped == (
        "[0].mu['encoder']['w']",
        "[0].nu['encoder']['w']",
    )
    _, state = frozen.update(PARAMS, state, PARAMS)
    thawed = fo.transfer_state(state, fo.transfer_state(whole, ADAM.init(PARAMS)))
    assert thawed[0].mu["encoder"]["w"] is whole[0].mu["encoder"]["w"]
    assert thawed[0].mu["head"]["w"] is state[0].mu["head"]["w"]
    assert int(thawed[0].count) == 3


def test_a_plain_run_is_taken_over_and_given_back() -> None:
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1))
    plain = after_steps(tx)
    nothing = fo.with_frozen(tx, False)
    over = fo.transfer_state(plain, nothing.init(PARAMS))
    assert fo.plan_transfer(plain, over) == fo.Transfer(
        fo.plan_transfer(plain, plain).carried, (), ()
    )
    _, over = nothing.update(PARAMS, over, PARAMS)
    back = fo.transfer_state(over, tx.init(PARAMS))
    expected = after_steps(tx, steps=3)
    for ours, theirs in zip(jax.tree.leaves(back), jax.tree.leaves(expected), strict=True):
        assert ours.tobytes() == theirs.tobytes()


def test_shardings_are_kept() -> None:
    mesh = jax.make_mesh((8,), ("d",), devices=host_devices(8))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    params = {"encoder": jnp.ones(3), "head": jax.device_put(jnp.ones(8), split)}
    old = after_steps(fo.with_frozen(optax.trace(0.9), "encoder"), params)
    new = fo.transfer_state(old, optax.trace(0.9).init(params))
    assert new.trace["head"].sharding == split


def test_none_is_the_beginning() -> None:
    fresh = ADAM.init(PARAMS)
    assert fo.transfer_state(None, fresh) is fresh
    assert fo.plan_transfer(None, fresh).carried == ()


def test_another_shape_or_dtype_is_an_error() -> None:
    old = after_steps(ADAM)
    for leaf, found in ((jnp.ones(4), r"float32\[4\]"), (jnp.ones(3, "bfloat16"), "bfloat16")):
        fresh = ADAM.init(PARAMS | {"head": {"w": leaf}})
        message = rf"at \[0\]\.[mn]u\['head'\]\['w'\] .*float32\[3\] and the new one .*{found}"
        with pytest.raises(ValueError, match=message):
            fo.transfer_state(old, fresh)


def test_nothing_carried_is_an_error_unless_it_is_said() -> None:
    old = after_steps(optax.trace(0.9), {"encoder": jnp.ones(2)})
    fresh = optax.trace(0.9).init({"head": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"nothing of the old state is carried.*may_be_empty"):
        fo.transfer_state(old, fresh)
    assert fo.transfer_state(old, fresh, may_be_empty=True).trace["head"] is fresh.trace["head"]
    assert fo.transfer_state(optax.EmptyState(), fresh).trace["head"] is fresh.trace["head"]


def test_an_array_that_was_donated_is_an_error() -> None:
    old = after_steps(optax.trace(0.9))
    old.trace["head"]["w"].delete()
    with pytest.raises(ValueError, match=r"\['head'\]\['w'\].*was donated"):
        fo.transfer_state(old, optax.trace(0.9).init(PARAMS))


def test_keys_that_read_alike_are_not_the_same() -> None:
    old = optax.trace(0.9).init({"0": jnp.zeros(2)})
    fresh = optax.trace(0.9).init([jnp.ones(2)])
    assert fo.plan_transfer(old, fresh).carried == ()


def test_what_was_said_to_an_optimizer_is_not_carried() -> None:
    inject = lambda rate: optax.inject_hyperparams(optax.sgd)(rate, momentum=0.9)
    old = after_steps(inject(1.0))
    fresh = inject(1e-3).init(PARAMS)
    new = fo.transfer_state(old, fresh)
    assert float(new.hyperparams["learning_rate"]) == pytest.approx(1e-3)
    assert new.count is old.count
    plan = fo.plan_transfer(old, fresh)
    assert ".hyperparams['learning_rate']" in plan.fresh
    assert any("trace" in path and "head" in path for path in plan.carried)
    decay = lambda rate: optax.inject_hyperparams(optax.sgd)(optax.constant_schedule(rate))
    _, state = decay(1e-3).update(
        PARAMS, fo.transfer_state(after_steps(decay(1.0)), decay(1e-3).init(PARAMS)), PARAMS
    )
    assert float(state.hyperparams["learning_rate"]) == pytest.approx(1e-3)


def test_a_schedule_that_is_injected_goes_on() -> None:
    """Its state is where it has come to, and not what was said."""
    tx = optax.inject_hyperparams(optax.sgd)(optax.linear_schedule(0.0, 1.0, 10))
    rates = []
    state = None
    for stage in (fo.with_frozen(tx, "encoder"), fo.with_frozen(tx, False)):
        state = fo.transfer_state(state, stage.init(PARAMS))
        for _ in range(2):
            updates, state = stage.update(PARAMS, state, PARAMS)
            rates.append(-float(updates["head"]["w"][0]))
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])
