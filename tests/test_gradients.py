"""`value_and_grad` and `grad`: jax's conventions, with respect to the trainable leaves alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export

import frozen_optax as fo


def make_params():
    encoder = {"kernel": jnp.full((3, 3), 0.5), "bias": jnp.full(3, -0.0)}
    return {"encoder": encoder, "head": jnp.arange(3.0), "nothing": None}


def loss(params, x, scale=1.0):
    hidden = jnp.tanh(x @ params["encoder"]["kernel"] + params["encoder"]["bias"])
    return scale * jnp.sum((hidden @ params["head"]) ** 2)


X = jnp.linspace(-1.0, 1.0, 6).reshape(2, 3)


def odd_params():
    """Frozen leaves that `jax.grad` refuses."""
    frozen = {
        "int8": jnp.arange(3, dtype=jnp.int8),
        "int4": jnp.arange(3).astype(jnp.int4),
        "bool": jnp.array([True, False, True]),
        "key": jax.random.key(0),
        "float8": jnp.ones(3, jnp.float8_e4m3fn),
    }
    return {"base": frozen, "scale": jnp.full(3, 2.0)}


def odd_loss(params):
    noise = jax.random.normal(params["base"]["key"], (3,))
    return jnp.sum(params["scale"] * params["base"]["int8"] * params["base"]["bool"] + 0 * noise)


def test_value_and_trainable_gradients_are_those_of_jax():
    value, gradients = fo.value_and_grad(loss, "encoder")(make_params(), X, scale=2.0)
    expected_value, expected = jax.value_and_grad(loss)(make_params(), X, scale=2.0)
    assert value == expected_value
    fo.assert_trees_bit_identical(gradients["head"], expected["head"])
    assert jax.tree.structure(gradients) == jax.tree.structure(expected)
    assert fo.grad(loss, trainable="head")(make_params(), X)["nothing"] is None


def test_frozen_gradients_are_known_zeros_without_memory():
    params = make_params()
    jaxpr = jax.make_jaxpr(
        lambda params: fo.apply_updates(params, fo.grad(loss, "encoder")(params, X))
    )(params).jaxpr
    assert jaxpr.outvars[:2] == jaxpr.invars[:2], "no operation for encoder/bias and encoder/kernel"
    gradient = fo.grad(loss, "encoder")(params, X)["encoder"]["kernel"]
    assert gradient.strides == (0, 0)
    assert not gradient.any()


def test_frozen_leaves_are_not_differentiated_while_tracing():
    params, by_hand = make_params(), make_params()

    def hand_split(head, rest):
        return jax.grad(lambda head: loss(rest | {"head": head}, X))(head)

    limit = jax.make_jaxpr(hand_split)(by_hand["head"], by_hand)
    ours = jax.make_jaxpr(functools.partial(fo.grad(loss, "encoder", holes=True)))(params, X)
    everything = jax.make_jaxpr(jax.grad(loss))(params, X)
    assert len(ours.eqns) == len(limit.eqns) < len(everything.eqns)


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize(
    "wrap", [lambda f: f, jax.jit, jax.checkpoint], ids=["eager", "jit", "remat"]
)
def test_leaves_of_any_dtype_may_be_frozen(wrap, holes):
    value, gradients = wrap(fo.value_and_grad(odd_loss, "base", holes=holes))(odd_params())
    assert value == 4.0
    assert gradients["scale"].tolist() == [0.0, 0.0, 2.0]
    if holes:
        assert jax.tree.leaves(gradients["base"]) == []
    else:
        assert gradients["base"]["int8"].dtype == jnp.int8
    tx = fo.with_frozen(optax.adam(0.1), "base")
    updates, _ = tx.update(gradients, tx.init(odd_params()), odd_params())
    fo.assert_frozen(odd_params(), fo.apply_updates(odd_params(), updates), "base")


def test_auxiliary_data_is_returned_as_jax_does():
    with_aux = lambda params, x: (loss(params, x), {"x": x})
    (value, aux), gradients = fo.value_and_grad(with_aux, "encoder", has_aux=True)(make_params(), X)
    assert aux["x"] is X
    assert value == loss(make_params(), X)
    only, aux = fo.grad(with_aux, "encoder", has_aux=True)(make_params(), X)
    fo.assert_trees_bit_identical(only, gradients)
    assert aux["x"] is X


@pytest.mark.parametrize("argnums", [1, (0, 1), (1,), -1, [1, 0]], ids=str)
def test_argnums_are_those_of_jax(argnums):
    function = lambda a, b: jnp.sum(a["w"] * b["w"] ** 2 * a["v"] * b["v"])
    a, b = (
        {"v": jnp.array([1.0, 2.0]) + i, "w": jnp.array([3.0, 4.0]) * (i + 1)} for i in range(2)
    )
    ours = fo.grad(function, "v", argnums)(a, b)
    expected = jax.grad(function, argnums)(a, b)
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    trainable = lambda tree: [
        leaf["w"] for leaf in jax.tree.leaves(tree, is_leaf=lambda n: isinstance(n, dict))
    ]
    fo.assert_trees_bit_identical(trainable(ours), trainable(expected))


def test_complex_parameters_are_differentiated_as_jax_does():
    params = {"a": jnp.array([1 + 2j]), "b": jnp.array([2 - 1j])}
    function = lambda params: jnp.sum(params["a"] * params["b"] ** 2)
    ours = fo.grad(function, "a", holomorphic=True)(params)
    fo.assert_trees_bit_identical(ours["b"], jax.grad(function, holomorphic=True)(params)["b"])


def test_under_vmap_and_nested_it_is_what_jax_gives():
    params = make_params()
    per_example = jax.vmap(fo.grad(loss, "encoder", holes=True), in_axes=(None, 0))(
        params, X[:, None]
    )
    expected = jax.vmap(jax.grad(loss), in_axes=(None, 0))(params, X[:, None])
    np.testing.assert_allclose(per_example["head"], expected["head"], rtol=1e-6)

    second = fo.grad(
        lambda params: jnp.sum(fo.grad(loss, "encoder", holes=True)(params, X)["head"] ** 2),
        "encoder",
    )
    expected = jax.grad(lambda params: jnp.sum(jax.grad(loss)(params, X)["head"] ** 2))
    np.testing.assert_allclose(second(params)["head"], expected(params)["head"], rtol=1e-5)


def test_accumulating_with_holes_carries_nothing_frozen():
    params = make_params()
    gradient_of = fo.grad(loss, "encoder", holes=True)
    zeros = jax.tree.map(jnp.zeros_like, fo.partition(params, "encoder")[0])

    def accumulate(params):
        add = lambda total, x: (jax.tree.map(jnp.add, total, gradient_of(params, x[None])), None)
        return jax.lax.scan(add, zeros, X)[0]

    scan = next(
        eqn for eqn in jax.make_jaxpr(accumulate)(params).eqns if eqn.primitive.name == "scan"
    )
    assert len(scan.outvars) == 1, "the carry holds the gradient of the head alone"
    tx = fo.with_frozen(optax.sgd(0.1), "encoder")
    total = jax.jit(accumulate)(params)
    updates, _ = tx.update(total, tx.init(params), params)
    np.testing.assert_allclose(total["head"], jax.grad(loss)(params, X)["head"], rtol=1e-5)
    fo.assert_frozen(params, fo.apply_updates(params, updates), "encoder")


def test_the_trained_step_is_that_of_jax_grad():
    tx = fo.with_frozen(optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(0.1)), "encoder")

    def train(gradient_of):
        params, state = make_params(), tx.init(make_params())
        for _ in range(3):
            updates, state = tx.update(gradient_of(params, X), state, params)
            params = fo.apply_updates(params, updates)
        return params

    with jax.disable_jit():
        expected = train(jax.grad(loss))
        for holes in (False, True):
            fo.assert_trees_bit_identical(train(fo.grad(loss, "encoder", holes=holes)), expected)


def test_everything_frozen_has_a_value_and_no_gradient():
    value, gradients = fo.value_and_grad(odd_loss, "**", holes=True)(odd_params())
    assert value == 4.0
    assert jax.tree.leaves(gradients) == []


def test_it_keeps_the_name_and_the_documentation_of_the_function():
    assert fo.grad(loss, "encoder").__name__ == "loss"


@pytest.mark.parametrize("make", [fo.grad, fo.value_and_grad])
def test_mistakes_are_told(make):
    with pytest.raises(TypeError, match="exactly one of the two"):
        make(loss)
    with pytest.raises(ValueError, match=r"by_path\('encodr'\) selects nothing"):
        make(loss, "encodr")(make_params(), X)
    with pytest.raises(TypeError, match="argnums is 2, and 2 arguments were given by position"):
        make(loss, "encoder", 2)(make_params(), X)
    with pytest.raises(
        TypeError, match=r"by the trainable leaf 'base/bool', a leaf bool\[3\]\. Freeze it"
    ):
        make(odd_loss, "base/int*")(odd_params())


# --- from the state of a line search

LINE_SEARCHES = {
    "lbfgs": optax.lbfgs,
    "backtracking": lambda: optax.chain(
        optax.sgd(1.0), optax.scale_by_backtracking_linesearch(15, store_grad=True)
    ),
}


def quadratic(params, target=1.0):
    return jnp.sum((params["base"] * params["scale"] - target) ** 2) + 0 * params["steps"]


def quadratic_params():
    return {"base": jnp.array([1.0, 2.0, 3.0]), "scale": jnp.zeros(3), "steps": jnp.array(3)}


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("name", LINE_SEARCHES)
def test_a_line_search_goes_the_same_way_from_its_state(name, holes):
    tx = fo.with_frozen(LINE_SEARCHES[name](), trainable="scale")
    from_state = fo.value_and_grad_from_state(quadratic, trainable="scale", holes=holes)
    fresh = fo.value_and_grad(quadratic, trainable="scale", holes=holes)

    def train(value_and_grad):
        @jax.jit
        def step(params, state):
            value, gradients = value_and_grad(params, state)
            updates, state = tx.update(
                gradients, state, params, value=value, grad=gradients, value_fn=quadratic
            )
            return fo.apply_updates(params, updates), state

        params, state = quadratic_params(), tx.init(quadratic_params())
        for _ in range(6):
            params, state = step(params, state)
        return params

    after = train(lambda params, state: from_state(params, state=state))
    expected = train(lambda params, state: fresh(params))
    np.testing.assert_allclose(after["scale"], expected["scale"], rtol=1e-5)
    assert quadratic(after) < 0.5 * quadratic(quadratic_params())
    fo.assert_frozen(quadratic_params(), after, trainable="scale")


def test_what_the_state_holds_is_not_computed_again():
    tx = fo.with_frozen(optax.lbfgs(), trainable="scale")
    params = quadratic_params()
    state = tx.init(params)
    value, gradients = fo.value_and_grad_from_state(quadratic, trainable="scale")(
        params, state=state
    )
    assert value == quadratic(params), "computed, as a fresh state holds an infinite value"
    _, state = tx.update(gradients, state, params, value=value, grad=gradients, value_fn=quadratic)
    stored, stored_gradients = fo.value_and_grad_from_state(
        lambda params: 0 * quadratic(params), trainable="scale"
    )(params, state=state)
    assert stored == optax.tree_utils.tree_get(state, "value") != 0
    fo.assert_trees_bit_identical(
        stored_gradients["scale"], optax.tree_utils.tree_get(state, "grad")["scale"]
    )


WITHOUT = {
    "no line search": lambda: fo.with_frozen(optax.adam(0.1), trainable="scale"),
    "other leaves frozen": lambda: fo.with_frozen(optax.lbfgs(), "steps"),
}


@pytest.mark.parametrize("name", WITHOUT)
def test_a_state_without_the_gradient_says_what_to_use(name):
    params = quadratic_params()
    with pytest.raises(ValueError, match=r"no gradient of the 1 trainable leaves.*store_grad=True"):
        fo.value_and_grad_from_state(quadratic, trainable="scale")(
            params, state=WITHOUT[name]().init(params)
        )


@pytest.mark.parametrize("argnums", [(0, 0), (1, -1), [0, 1, 0]], ids=repr)
def test_an_argument_that_is_named_twice_is_an_error(argnums):
    loss = lambda a, b: jnp.sum(a["w"] * b["w"])
    with pytest.raises(ValueError, match="names an argument twice"):
        fo.grad(loss, False, argnums=argnums)({"w": jnp.ones(2)}, {"w": jnp.ones(2)})


@pytest.mark.parametrize("integer", [np.int64, np.int8, jnp.int32])
def test_whatever_counts_as_an_integer_names_an_argument(integer):
    loss = lambda a, b: jnp.sum(a["w"] * b["w"])
    params = {"w": jnp.ones(2)}, {"w": jnp.full(2, 3.0)}
    assert fo.grad(loss, False, argnums=integer(1))(*params)["w"].tolist() == [1, 1]
    assert fo.grad(loss, False, argnums=[integer(0)])(*params)[0]["w"].tolist() == [3, 3]


def test_a_frozen_symbolic_shape_has_a_gradient_of_nothing():
    shape = export.symbolic_shape("n, 2")
    specs = {
        "a": jax.ShapeDtypeStruct(shape, jnp.float32),
        "b": jax.ShapeDtypeStruct((2,), jnp.float32),
    }
    tx = fo.with_frozen(optax.adamw(0.1), "a")

    def step(params):
        grads = fo.grad(lambda p: jnp.sum(p["a"] * p["b"]), tx)(params)
        updates, _ = tx.update(grads, tx.init(params), params)
        return fo.apply_updates(params, updates)

    exported = export.export(jax.jit(step))(specs)
    params = {"a": jnp.array([[-0.0, 1e-45], [1.0, jnp.nan]]), "b": jnp.ones(2)}
    fo.assert_frozen(params, exported.call(params), tx)
