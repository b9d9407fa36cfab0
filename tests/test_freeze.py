"""`freeze`, `freeze_by_path`, `freeze_all`: chainable, stateless, the additive identity."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trying
from helpers import host_devices

import frozen_optax as fo

DTYPES = {
    name: np.dtype(name)
    for name in ("bool", "complex64", "float16", "float32", "int8", "int16", "int32")
}
DTYPES |= {
    name: np.dtype(name)
    for name in ("uint8", "uint16", "uint32", "complex128", "float64", "int64", "uint64")
}
DTYPES |= trying.NARROW


def frozen_update(leaf, update=None, with_params=True):
    tx = fo.freeze_all()
    params = {"w": leaf}
    updates = {"w": leaf if update is None else update}
    return tx.update(updates, tx.init(params), params if with_params else None)[0]["w"]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_frozen_update_is_the_additive_identity(dtype, x64):
    one = np.ones((2, 3), dtype)
    if not trying.device_has(dtype):
        # The leaf is on the host, where it may be refused; what it gets is nothing.
        with contextlib.suppress(TypeError, jax.errors.JaxRuntimeError):
            update = frozen_update(one)
            assert update.dtype == jax.dtypes.float0 or not np.asarray(update).any()
        return
    leaf = jnp.asarray(one)
    update = frozen_update(leaf)
    identity = np.zeros((), bool) if dtype.name == "bool" else trying.zero_that_adds_nothing(dtype)
    if identity is None:
        assert update.dtype == jax.dtypes.float0
        return
    assert update.dtype == leaf.dtype == dtype
    np.testing.assert_array_equal(
        np.asarray(update).view("uint8"), np.full((2, 3), identity).view("uint8")
    )
    for value in (
        jnp.zeros((2, 3), dtype),
        leaf,
        update,
    ):  # adding it is no change, for zeros of both signs too
        same = np.asarray(value + update)
        np.testing.assert_array_equal(same.view(np.uint8), np.asarray(value).view(np.uint8))


@pytest.mark.parametrize(
    "leaf", [jax.random.key(0), jax.random.split(jax.random.key(0), 3)], ids=["one", "three"]
)
def test_a_prng_key_gets_a_marker_that_apply_updates_understands(leaf):
    update = frozen_update(leaf)
    assert update.dtype == jax.dtypes.float0
    assert update.shape == leaf.shape
    assert fo.apply_updates(leaf, update) is leaf


@pytest.mark.parametrize(
    "gradient",
    [
        np.zeros((2,), jax.dtypes.float0),
        None,
        optax.MaskedNode(),
        jnp.ones(2),
        jnp.full(2, jnp.nan),
    ],
)
def test_an_update_has_the_parameters_dtype_for_any_gradient(gradient):
    update = frozen_update(jnp.array([1, 2], jnp.int8), gradient)
    assert update.dtype == jnp.int8
    assert update.tolist() == [0, 0]


def test_without_parameters_the_update_has_the_gradients_dtype():
    leaf, gradient = jnp.ones(2, jnp.bfloat16), jnp.ones(2, jnp.float32)
    assert frozen_update(leaf, gradient, with_params=False).dtype == jnp.float32


@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_it_chains_at_any_position_and_has_no_state(place):
    params = {"encoder": jnp.ones(2), "head": jnp.ones(2)}
    links = [optax.scale(2.0), optax.scale(-0.5)]
    links.insert({"first": 0, "middle": 1, "last": 2}[place], fo.freeze_by_path("encoder"))
    tx = optax.chain(*links)
    state = tx.init(params)
    assert jax.tree.leaves(state) == []
    updates, _ = jax.jit(tx.update)(params, state, params)
    assert updates["head"].tolist() == [-1.0, -1.0]
    fo.assert_frozen(params, fo.apply_updates(params, updates), "encoder")


def test_a_chain_can_undo_the_sign_of_zero_without_harm():
    params = {"encoder": jnp.array([-0.0]), "head": jnp.ones(1)}
    tx = optax.chain(fo.freeze_by_path("encoder"), optax.scale(-1.0))
    updates, _ = tx.update(params, tx.init(params), params)
    assert not np.signbit(updates["encoder"]).any()
    fo.assert_frozen(params, fo.apply_updates(params, updates), "encoder")
    with pytest.raises(AssertionError, match=r"-0.0 \(0x80000000\) became 0.0 \(0x00000000\)"):
        fo.assert_frozen(params, optax.apply_updates(params, updates), "encoder")


def test_freezing_is_idempotent():
    params = {"encoder": jnp.array([-0.0, 1.0]), "head": jnp.ones(1)}
    tx = fo.freeze("encoder")
    once, _ = tx.update(params, tx.init(params), params)
    twice, _ = tx.update(once, tx.init(params), params)
    fo.assert_trees_bit_identical(once, twice)


def test_a_pattern_that_selects_nothing_is_an_error_at_init():
    with pytest.raises(ValueError, match=r"by_path\('encodr'\) selects nothing"):
        optax.chain(optax.sgd(0.1), fo.freeze_by_path("encoder", "encodr")).init(
            {"encoder": jnp.ones(2)}
        )


def test_updates_of_another_structure_name_the_path():
    params = {"encoder": {"kernel": jnp.ones(2)}, "head": jnp.ones(2)}
    tx = fo.freeze_by_path("encoder")
    with pytest.raises(ValueError, match=r"differ in structure at 'encoder'.*weight"):
        tx.update(
            {"encoder": {"weight": jnp.ones(2)}, "head": jnp.ones(2)}, tx.init(params), params
        )


def test_sharded_parameters_get_sharded_updates():
    sharding = jax.sharding.NamedSharding(
        jax.sharding.Mesh(host_devices(), ("x",)), jax.sharding.PartitionSpec("x")
    )
    update = frozen_update(jax.device_put(jnp.ones(16), sharding))
    assert update.sharding.is_equivalent_to(sharding, 1)


def test_tree_map_params_goes_through_it():
    tx = optax.chain(optax.adam(0.1), fo.freeze_by_path("encoder"))
    params = {"encoder": jnp.ones(2), "head": jnp.ones(2)}
    mapped = optax.tree_map_params(tx, lambda leaf: "param", tx.init(params))
    assert mapped[0][0].mu == {"encoder": "param", "head": "param"}


def test_a_leaf_no_compiled_function_keeps_is_refused_by_path():
    with pytest.raises(TypeError, match="the frozen leaf 'scale' is the Python float"):
        fo.freeze("scale").init({"scale": 0.1, "w": jnp.ones(2)})
