"""Programs that copy, rebuild or serialise what `with_frozen` returns, or resume elsewhere."""

import copy
import pickle
import subprocess
import sys
import textwrap
import types

import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import frozen_optax as fo


def make_params():
    return {"encoder": {"b": jnp.zeros(2), "w": jnp.ones((2, 2))}, "head": {"w": jnp.ones(3)}}


def growing():
    """Momentum that is made at the first update, as some optimizers outside of optax make it."""

    def update(updates, state, params=None):
        momentum = updates
        if state["m"] is not None:
            momentum = jax.tree.map(lambda m, g: 0.9 * m + g, state["m"], updates)
        new = {"m": momentum, "count": state["count"] + 1}
        return jax.tree.map(lambda m: -0.1 * m, momentum), new

    return optax.GradientTransformation(
        lambda params: {"m": None, "count": jnp.zeros((), jnp.int32)}, update
    )


OPTIMIZERS = {"adamw": lambda: optax.adamw(0.1), "lbfgs": optax.lbfgs, "growing": growing}


def train(tx, params, state, steps):
    loss = lambda params: jnp.sum((params["encoder"]["w"].sum() * params["head"]["w"] - 1) ** 2)
    for _ in range(steps):
        value, grads = fo.value_and_grad(loss, "encoder")(params)
        updates, state = optax.with_extra_args_support(tx).update(
            grads, state, params, value=value, grad=grads, value_fn=loss
        )
        params = fo.apply_updates(params, updates)
    return params, state


def rebuilt(value):
    """Functions with cells of their own, all containers anew, as hosts do that open closures."""
    if isinstance(value, types.FunctionType) and value.__closure__:
        cells = tuple(types.CellType(rebuilt(cell.cell_contents)) for cell in value.__closure__)
        made = types.FunctionType(
            value.__code__, value.__globals__, value.__name__, value.__defaults__, cells
        )
        made.__kwdefaults__ = value.__kwdefaults__
        return made
    if isinstance(value, dict):
        return {key: rebuilt(each) for key, each in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(rebuilt, value))
    return type(value)(map(rebuilt, value)) if type(value) in (list, tuple) else value


HOSTS = {
    "the cells of closures copied": rebuilt,
    "closures as pytrees": eqxi.closure_to_pytree,
    "closures as pytrees, flattened": lambda tx: jax.tree.map(
        lambda leaf: leaf, eqxi.closure_to_pytree(tx)
    ),
    "copied": copy.copy,
    "copied deeply": copy.deepcopy,
    "put together from its parts": lambda tx: optax.GradientTransformationExtraArgs(*tx),
    "its update compiled": lambda tx: tx._replace(
        update=jax.jit(tx.update, static_argnames="value_fn")
    ),
}


@pytest.mark.parametrize("name", ["adamw", "growing"])
@pytest.mark.parametrize("host", HOSTS.values(), ids=HOSTS)
def test_an_optimizer_that_a_host_has_rebuilt_trains_as_before(host, name):
    tx, params = fo.with_frozen(OPTIMIZERS[name](), "encoder"), make_params()
    expected, _ = train(tx, params, tx.init(params), 3)
    hosted = host(tx)
    halfway, state = train(hosted, params, hosted.init(params), 1)
    found, _ = train(host(hosted), halfway, state, 2)  # rebuilt once more between two steps
    fo.assert_frozen(params, found, "encoder")
    if host is HOSTS["its update compiled"]:
        np.testing.assert_allclose(found["head"]["w"], expected["head"]["w"], rtol=1e-5)
    else:
        fo.assert_trees_bit_identical(found, expected)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_goes_on_where_it_was_never_seen_or_forgotten(name):
    params = make_params()
    tx = fo.with_frozen(OPTIMIZERS[name](), "encoder")
    halfway, state = train(tx, params, tx.init(params), 2)
    expected, _ = train(tx, halfway, state, 2)
    anew = fo.with_frozen(OPTIMIZERS[name](), "encoder")
    fo.assert_trees_bit_identical(train(anew, halfway, state, 2)[0], expected)
    for i in range(20):
        other = {
            "encoder": {f"k{j}": jnp.ones(1) for j in range(i + 1)},
            "head": {"w": jnp.ones(3)},
        }
        tx.init(other)
    fo.assert_trees_bit_identical(train(tx, halfway, state, 2)[0], expected)


def test_a_state_that_has_grown_goes_on_in_another_process(tmp_path):
    params = make_params()
    tx = fo.with_frozen(growing(), "encoder")
    halfway, state = train(tx, params, tx.init(params), 2)
    expected, _ = train(tx, halfway, state, 2)
    (tmp_path / "state").write_bytes(pickle.dumps(jax.device_get((halfway, state))))
    program = """
        import pickle, sys
        import jax, jax.numpy as jnp
        import frozen_optax as fo
        from test_hosts import growing, train
        halfway, state = jax.tree.map(jnp.asarray, pickle.loads(open(sys.argv[1], "rb").read()))
        found, _ = train(fo.with_frozen(growing(), "encoder"), halfway, state, 2)
        open(sys.argv[1], "wb").write(pickle.dumps(jax.device_get(found)))
    """
    command = [
        sys.executable,
        "-W",
        "error",
        "-c",
        textwrap.dedent(program),
        str(tmp_path / "state"),
    ]
    subprocess.run(command, check=True, cwd=__file__.rpartition("/")[0], timeout=120)
    found = pickle.loads((tmp_path / "state").read_bytes())
    fo.assert_trees_bit_identical(jax.device_get(expected), found)


def test_a_state_of_another_optimizer_names_what_is_lost():
    params = make_params()
    state = fo.with_frozen(optax.sgd(0.1, momentum=0.9), "encoder").init(params)
    with pytest.raises(ValueError, match=r"differ in structure.*Make a new one: tx\.init.*is lost"):
        train(fo.with_frozen(growing(), "encoder"), params, state, 1)


def test_with_frozen_returns_a_transformation_that_remembers():
    tx = fo.with_frozen(optax.adam(0.1), trainable="head")
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    init, update = tx
    assert (init, update) == (tx.init, tx.update)
    assert tx.frozen.paths(make_params()) == ["encoder/b", "encoder/w"]
    assert copy.deepcopy(tx).frozen == tx.frozen
    assert {tx: 1}[tx] == 1
    assert hash(fo.with_frozen(optax.adam(0.1), {"encoder": True, "head": False}))


# --- loops that call update without the parameters


WITHOUT_PARAMS = {
    "a predicate": lambda path, leaf: path.startswith("encoder") and leaf.dtype == jnp.float32,
    "a mask function": lambda params: jax.tree_util.tree_map_with_path(
        lambda path, _: path[0].key == "encoder", params
    ),
    "either": [lambda path, leaf: leaf.ndim == 2, "encoder"],
}


@pytest.mark.parametrize("frozen", WITHOUT_PARAMS.values(), ids=WITHOUT_PARAMS)
def test_without_parameters_the_state_settles_it(frozen):
    params = make_params()
    expected = fo.with_frozen(optax.adam(0.1), "encoder")
    for tx in (fo.with_frozen(optax.adam(0.1), frozen), fo.with_frozen(growing(), "encoder")):
        updates, _ = tx.update(params, tx.init(params))
        updates, _ = jax.jit(tx.update)(params, tx.init(params))
        assert np.array_equal(updates["encoder"]["w"], np.zeros((2, 2)))
    tx = fo.with_frozen(optax.adam(0.1), frozen)
    ours, theirs = (each.update(params, each.init(params))[0] for each in (tx, expected))
    fo.assert_trees_bit_identical(ours, theirs)


UNSETTLED = {
    "gradients of another dtype": (optax.adam(0.1), lambda path, leaf: leaf.dtype == jnp.float32),
    "a state that holds no parameters": (
        optax.sgd(0.1),
        lambda path, leaf: path.startswith("encoder"),
    ),
}


@pytest.mark.parametrize("name", UNSETTLED)
def test_without_parameters_what_is_not_settled_is_asked_for(
    name,
):
    optimizer, frozen = UNSETTLED[name]
    params = {**make_params(), "head": {"w": jnp.ones(3, jnp.bfloat16)}}
    gradients = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    tx = fo.with_frozen(optimizer, frozen)
    with pytest.raises(ValueError, match=r"Pass the parameters.*selector\.mask\(params\)"):
        tx.update(gradients, tx.init(params))
    mask = fo.by_predicate(frozen).mask(params)
    tx = fo.with_frozen(optimizer, mask)
    updates, _ = tx.update(gradients, tx.init(params))
    assert np.array_equal(updates["encoder"]["w"], np.zeros((2, 2)))
