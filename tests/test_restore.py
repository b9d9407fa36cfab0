"""`restore`: the very same arrays put back."""

import jax
import jax.numpy as jnp
import optax
import pytest
from helpers import host_devices

import frozen_optax as fo


def make_params():
    return {"encoder": {"w": jnp.array([-0.0, 1.0])}, "head": jnp.ones(2)}


def test_restore_puts_the_very_same_frozen_arrays_back():
    reference, params = make_params(), jax.tree.map(lambda leaf: leaf + 1.0, make_params())
    after = fo.restore(params, reference, "encoder")
    assert after["encoder"]["w"] is reference["encoder"]["w"]
    assert after["head"] is params["head"]


def test_the_reference_needs_the_frozen_leaves_alone():
    _, reference = fo.partition(make_params(), "encoder", prune=True)
    params = jax.tree.map(lambda leaf: leaf + 1.0, make_params())
    fo.assert_frozen(make_params(), fo.restore(params, reference, "encoder"), "encoder")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (jnp.ones(3), r"at 'encoder/w': found a leaf float32\[3\], expected a leaf float32\[2\]"),
        (
            jnp.ones(2, jnp.bfloat16),
            r"at 'encoder/w': found a leaf bfloat16\[2\], expected a leaf float32\[2\]",
        ),
        (optax.MaskedNode(), r"at 'encoder/w': found a hole"),
        (None, r"at 'encoder/w': found None"),
    ],
)
def test_a_reference_that_does_not_fit_names_the_path(wrong, message):
    with pytest.raises(ValueError, match=message):
        fo.restore(make_params(), {"encoder": {"w": wrong}, "head": jnp.ones(2)}, "encoder")


def test_a_reference_sharded_another_way_names_the_path():
    mesh = jax.sharding.Mesh(host_devices(), ("x",))
    put = lambda *spec: jax.device_put(
        jnp.arange(8.0), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    )
    with pytest.raises(ValueError, match=r"at 'w': found it on .*expected"):
        fo.restore({"w": put("x")}, {"w": put()}, "w")
    assert fo.restore({"w": put("x")}, {"w": put("x")}, "w")


def test_a_reference_of_another_structure_names_the_path():
    with pytest.raises(
        ValueError, match="the reference and the parameters differ in structure at 'encoder'"
    ):
        fo.restore(make_params(), {"encoder": {"v": jnp.ones(2)}, "head": jnp.ones(2)}, "encoder")


def test_under_jit_restore_removes_the_addition_not_the_moments():
    params = {"encoder": jnp.ones((64, 64)), "head": jnp.ones((64, 64))}
    optimizer = optax.adam(0.1)

    def flops(step, state):
        return jax.jit(step).lower(params, state).compile().cost_analysis()["flops"]

    def plain(params, state):
        updates, state = optimizer.update(params, state, params)
        return optax.apply_updates(params, updates), state

    def restored(before, state):
        after, state = plain(before, state)
        return fo.restore(after, before, "encoder"), state

    tx = fo.with_frozen(optimizer, "encoder")

    def frozen(params, state):
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    nothing_frozen, back, changed = (
        flops(plain, state),
        flops(restored, state),
        flops(frozen, tx.init(params)),
    )
    assert changed < 0.6 * nothing_frozen
    assert changed < 0.8 * back
    assert back < nothing_frozen


def test_a_reference_that_was_donated_names_the_path():
    reference = make_params()
    jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)(reference)
    with pytest.raises(ValueError, match=r"the array at 'encoder/w' was donated"):
        fo.restore(make_params(), reference, "encoder")


def test_a_reference_of_shapes_alone_is_an_error():
    what = r"does not fit the parameters at 'encoder/w': found .* that is a shape without values"
    with pytest.raises(ValueError, match=what):
        fo.restore(make_params(), jax.eval_shape(make_params), "encoder")
