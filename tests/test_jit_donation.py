"""Donation takes what is trained, and never a buffer that also stands at a frozen place."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import add, host_devices, make_params, same_objects
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jitting import jit

import frozen_optax as fo


@pytest.mark.parametrize(
    ("option", "donated"),
    [
        ({}, ""),
        ({"donate_argnums": 0}, "p"),
        ({"donate_argnums": (0, 1)}, "ps"),
        ({"donate_argnums": (1,)}, "s"),
        ({"donate_argnums": -2}, "s"),
        ({"donate_argnums": -3}, "p"),
        ({"donate_argnames": "params"}, "p"),
        ({"donate_argnames": ("params", "state")}, "ps"),
        ({"donate_argnums": np.int64(0)}, "p"),
        ({"donate_argnums": range(2)}, "ps"),
    ],
)
@pytest.mark.parametrize("by_name", [False, True])
def test_donation_takes_what_is_trained_and_never_a_frozen_leaf(option, donated, by_name):
    def step(params, state, x):
        return add(params, x), add(state, x)

    jitted = jit(step, frozen="encoder", **option)
    params, state = make_params(), {"mu": jnp.ones((3, 3))}
    new, _ = jitted(params=params, state=state, x=1.0) if by_name else jitted(params, state, 1.0)
    assert params["head"]["w"].is_deleted() == ("p" in donated)
    assert state["mu"].is_deleted() == ("s" in donated)
    assert same_objects(params["encoder"], new["encoder"])
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(new))


def test_one_frozen_backbone_serves_several_runs_that_donate():
    step = jit(add, frozen="encoder", donate_argnums=0)
    backbone = make_params()["encoder"]
    runs = [{"encoder": backbone, "head": {"w": jnp.full((2, 2), float(i))}} for i in range(3)]
    for _ in range(3):
        runs = [step(run) for run in runs]
    assert [float(run["head"]["w"][0, 0]) for run in runs] == [3, 4, 5]
    assert all(same_objects(run["encoder"], backbone) for run in runs)


def tied(kind):
    w = jnp.ones((2, 2))
    return w, {
        "same array": w,
        "another array": w.addressable_data(0),
        "put again": jax.device_put(w, w.device),
    }[kind]


@pytest.mark.parametrize("kind", ["same array", "another array", "put again"])
@pytest.mark.parametrize("used", [True, False])
def test_a_buffer_frozen_and_donated_is_refused_with_both_paths(kind, used):
    frozen, trained = tied(kind)
    params = {"embed": {"table": frozen}, "head": {"w": trained}}

    def step(params):
        new = add(params["head"])
        return {
            "embed": params["embed"],
            "head": add(new, params["embed"]["table"]) if used else new,
        }

    with pytest.raises(
        ValueError, match=r"'embed/table' is the same buffer as 'head/w'.*jnp\.copy"
    ):
        jit(step, frozen="embed", donate_argnums=0)(params)
    assert not frozen.is_deleted()
    assert not trained.is_deleted()
    assert jit(step, frozen="embed")(params)["embed"]["table"] is frozen
    assert jit(step, frozen="**", donate_argnums=0)(params)["head"]["w"] is trained


@pytest.mark.parametrize("by_name", [False, True])
def test_a_donated_state_with_a_frozen_leaf_is_refused(by_name):
    def step(params, ema):
        return add(params), add(ema)

    params = make_params()
    ema = {"ema": {**params, "head": {"w": jnp.zeros((2, 2))}}}
    jitted = jit(step, frozen="encoder", donate_argnums=(0, 1))
    with pytest.raises(ValueError, match="'encoder/b' is the same buffer as 'ema/ema/encoder/b'"):
        jitted(params, ema=ema) if by_name else jitted(params, ema)
    new, _ = jit(step, frozen="encoder", donate_argnums=0)(params, ema)
    assert same_objects(new["encoder"], params["encoder"])


def test_donation_lets_the_runtime_see_a_shared_buffer():
    with pytest.raises(ValueError, match="keep_unused=False together with donation"):
        jit(add, frozen="encoder", donate_argnums=0, keep_unused=False)
    params = make_params()
    assert same_objects(
        params["encoder"], jit(add, frozen="encoder", keep_unused=False)(params)["encoder"]
    )
    assert same_objects(
        params["encoder"],
        jit(add, frozen="encoder", donate_argnums=0, keep_unused=True)(params)["encoder"],
    )


@pytest.mark.parametrize("spec", [P("x"), P()], ids=["split", "replicated"])
def test_a_buffer_at_two_places_on_eight_devices_is_refused(spec):
    mesh = Mesh(np.array(host_devices(8)), "x")
    assert mesh.size == 8
    w, other = (jax.device_put(jnp.ones((16, 2)), NamedSharding(mesh, spec)) for _ in range(2))
    never_traced = chex.assert_max_traces(add, n=0)  # refused before anything is compiled
    step = jit(never_traced, frozen="embed", donate_argnums=0)
    with pytest.raises(ValueError, match="'embed/table' is the same buffer as 'head/w'"):
        step({"embed": {"table": w}, "head": {"b": other, "w": w}})
    assert not w.is_deleted()
    assert not other.is_deleted()


def test_a_proof_of_a_step_is_not_its_first_call():
    w = jnp.ones((2, 2))
    trained = lambda params: params | {"head": add(params["head"])}
    step = jit(chex.assert_max_traces(trained, n=1), frozen="embed", donate_argnums=0)
    apart = {"embed": {"table": w}, "head": {"w": w + 1}}
    assert fo.assert_step_freezes(step, apart, frozen="embed") == {"embed/table": "itself"}
    step.clear_cache()
    with pytest.raises(
        ValueError, match="'embed/table' is the same buffer as 'head/w'"
    ):  # before it is traced again
        step({"embed": {"table": w}, "head": {"w": w}})


def test_a_buffer_at_two_places_later_in_training_is_refused():
    step = jit(lambda params: add(params), frozen="encoder", donate_argnums=0)
    params = step(step(make_params()))
    w = params["encoder"]["w"]
    with pytest.raises(ValueError, match="'encoder/w' is the same buffer as 'head/w'"):
        step({"encoder": params["encoder"], "head": {"w": w}})
    assert not w.is_deleted()


def test_a_frozen_leaf_that_was_donated_elsewhere_is_named():
    params = make_params()
    params["encoder"]["w"].delete()
    with pytest.raises(ValueError, match="'encoder/w' was donated"):
        jit(lambda params: add(params, params["encoder"]["w"].sum()), frozen="encoder")(params)


def test_equal_numbers_at_two_places_are_no_tie():
    new = jit(lambda p: add(p), frozen="a", donate_argnums=0)({"a": 1, "b": 1, "c": jnp.ones(1)})
    assert new["a"] == 1
    assert new["b"] == 2
