"""`apply_updates`: the exact sum, the leaf itself where nothing is added, and its derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import frozen_optax as fo


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "complex64", "int32", "int8"])
def test_where_an_update_is_not_zero_it_is_applied_as_optax_does(dtype, wrap):
    params = {"w": jnp.arange(-4, 4).astype(dtype)}
    updates = {"w": jnp.array([0, 1, 2, 0, 1, 3, 2, 1]).astype(dtype)}
    after = wrap(fo.apply_updates)(params, updates)
    assert after["w"].dtype == params["w"].dtype
    np.testing.assert_array_equal(after["w"], optax.apply_updates(params, updates)["w"])


def test_a_wider_update_is_added_before_it_is_narrowed():
    params, updates = jnp.ones(3, jnp.bfloat16), jnp.full(3, 2.0**-7, jnp.float32)
    after = fo.apply_updates(params, updates)
    assert after.dtype == jnp.bfloat16
    np.testing.assert_array_equal(after, optax.apply_updates(params, updates))


def test_integers_under_a_float_zero_keep_every_digit():
    params = jnp.array([2**24 + 1, 5], jnp.int32)
    after = fo.apply_updates(params, jnp.array([0.0, 1.0]))
    assert after.tolist() == [2**24 + 1, 6]


def test_nan_updates_are_applied():
    assert np.isnan(fo.apply_updates(jnp.ones(2), jnp.array([jnp.nan, 0.0]))).tolist() == [
        True,
        False,
    ]


@pytest.mark.parametrize(
    "nothing",
    [None, optax.MaskedNode(), np.zeros((), jax.dtypes.float0), np.broadcast_to(np.float32(0), ())],
)
@pytest.mark.parametrize(
    "leaf",
    [jnp.ones(()), jax.random.key(0), 3, "name", jnp.sin],
    ids=["array", "key", "int", "str", "function"],
)
def test_known_nothing_leaves_any_leaf_the_object_it_is(leaf, nothing):
    assert fo.apply_updates({"a": leaf}, {"a": nothing})["a"] is leaf


def test_no_operation_is_traced_for_a_known_zero():
    params = {"encoder": jnp.ones(2), "head": jnp.ones(2)}
    tx = fo.with_frozen(optax.sgd(0.1), "encoder")
    jaxpr = jax.make_jaxpr(
        lambda params: fo.apply_updates(params, tx.update(params, tx.init(params), params)[0])
    )(params)
    assert jaxpr.jaxpr.outvars[0] is jaxpr.jaxpr.invars[0]


def test_none_parameters_stay_none():
    assert (
        fo.apply_updates({"a": None, "b": jnp.ones(1)}, {"a": None, "b": jnp.ones(1)})["a"] is None
    )


def test_a_hole_may_stand_for_a_whole_subtree():
    params = {"encoder": {"a": jnp.ones(1), "b": [jnp.ones(1)]}, "head": jnp.ones(1)}
    after = fo.apply_updates(params, {"encoder": optax.MaskedNode(), "head": jnp.ones(1)})
    assert after["encoder"]["b"][0] is params["encoder"]["b"][0]
    assert after["head"].tolist() == [2.0]


def test_an_update_where_no_arithmetic_can_be_names_the_path():
    params = {"rng": {"key": jax.random.key(0)}}
    with pytest.raises(TypeError, match="cannot update the parameter at 'rng/key'"):
        fo.apply_updates(params, {"rng": {"key": jnp.ones(())}})


def test_an_update_that_would_change_the_shape_names_the_path():
    with pytest.raises(TypeError, match=r"cannot update the parameter at 'w': .*\(2, 3\).*\(3,\)"):
        fo.apply_updates({"w": jnp.ones(3)}, {"w": jnp.ones((2, 3))})


def test_updates_of_another_structure_name_the_path():
    with pytest.raises(
        ValueError, match="updates and the parameters differ in structure at 'head'"
    ):
        fo.apply_updates({"head": {"w": jnp.ones(3)}}, {"head": {"v": jnp.ones(3)}})


# --- derivatives


def second_derivative(function):
    return jax.grad(lambda params: jax.grad(function)(params)["head"].sum())


def adapted_loss(apply, tx, params, loss):
    updates, _ = tx.update(jax.grad(loss)(params), tx.init(params), params)
    return loss(apply(params, updates))


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("differentiate", [jax.grad, jax.jacfwd, second_derivative])
def test_a_step_has_the_derivative_of_the_sum_it_is(differentiate, wrap):
    params = {"encoder": jnp.array([1.0, 2.0, -1.0]), "head": jnp.array([0.5, 1.0, 2.0])}
    loss = lambda params: jnp.sum((params["encoder"] * params["head"] - 2.0) ** 2)
    tx = fo.with_frozen(optax.sgd(0.1), "encoder")
    derivatives = [
        wrap(differentiate(lambda params, apply=apply: adapted_loss(apply, tx, params, loss)))(
            params
        )
        for apply in (fo.apply_updates, optax.apply_updates)
    ]
    assert np.abs(derivatives[0]["head"]).max() > 0.1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *derivatives)


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_a_learning_rate_has_a_derivative_also_where_it_is_zero(rate):
    params = {"w": jnp.array([1.0, 2.0])}
    loss = lambda params: jnp.sum(params["w"] ** 2)

    def after(rate, apply):
        return loss(apply(params, jax.tree.map(lambda g: -rate * g, jax.grad(loss)(params))))

    np.testing.assert_allclose(
        jax.grad(after)(rate, fo.apply_updates), jax.grad(after)(rate, optax.apply_updates)
    )


def test_complex_parameters_have_the_derivative_of_the_sum():
    derivative = lambda apply: jax.grad(lambda p: jnp.abs(apply(p, 0.1 * p)).sum())(
        jnp.array([1 + 2j, -1j])
    )
    np.testing.assert_allclose(
        derivative(fo.apply_updates), derivative(optax.apply_updates), rtol=1e-6
    )


# --- odd leaves


@pytest.mark.parametrize(
    "leaf", [np.zeros((0,), np.float32), jax.lax.full((0, 3), 1.0)], ids=["numpy", "weak"]
)
def test_a_leaf_without_elements_stays_the_object_it_is(leaf):
    tx = fo.with_frozen(optax.sgd(0.1), "empty")
    params = {"empty": leaf, "head": jnp.ones(2)}
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    assert fo.apply_updates(params, updates)["empty"] is leaf


@pytest.mark.parametrize(
    "wrong", [np.ones(2, np.float32), [1.0, 2.0, 3.0], "update"], ids=["shape", "list", "str"]
)
def test_an_update_that_does_not_fit_names_the_path(wrong):
    with pytest.raises(TypeError, match="cannot update the parameter at 'w'"):
        fo.apply_updates({"w": np.ones(3, np.float32)}, {"w": wrong})


@pytest.mark.parametrize(
    "make", [np.broadcast_to, lambda zero, shape: np.zeros(shape, jax.dtypes.float0)]
)
def test_a_known_zero_of_a_shape_that_does_not_fit_is_an_error(make):
    update = make(np.float32(-0.0), (3,))
    with pytest.raises(TypeError, match="cannot update the parameter at 'w'"):
        fo.apply_updates({"w": jnp.ones(2)}, {"w": update})
    assert fo.apply_updates({"w": jnp.ones((2, 3))}, {"w": make(np.float32(-0.0), (2, 3))})[
        "w"
    ].shape == (2, 3)
