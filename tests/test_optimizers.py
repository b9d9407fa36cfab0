"""Every optimizer of optax: what is frozen keeps its bits, what is trained goes its own way."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from kinds import EACH_OF_FEW, FEW, KINDS

import frozen_optax as fo
from benchmarks.catalogue import LEFT_OUT, NAMES, catalogue, extra_args, make

STEPS = 3
FROZEN = ("encoder", "mixed/frozen*")


def subtree():
    """The trainable part, as a tree of its own."""
    kernel, bias, scale = jax.random.split(jax.random.key(1), 3)
    return {
        "head": {
            "bias": jax.random.normal(bias, (3,)),
            "kernel": jax.random.normal(kernel, (4, 3)),
        },
        "mixed": {"scale": 1.0 + jax.random.uniform(scale, (4,))},
    }


exhaustive = pytest.mark.exhaustive
PRECISIONS = [
    pytest.param(
        name, x64, id=f"{name}-{64 if x64 else 32}-bit", marks=() if name in always else exhaustive
    )
    for x64, always in ((False, KINDS), (True, FEW))
    for name in NAMES
]

ODD = {  # -0.0, a subnormal, a signalling NaN, a quiet one with a payload
    "float32": np.array([0x80000000, 1, 0x7FA00001, 0xFFC00123], np.uint32).view(np.float32),
    "float64": np.array([1 << 63, 1, 0x7FF4000000000001, 0xFFF8000000000123], np.uint64).view(
        np.float64
    ),
}


def frozen_leaves():
    """Frozen leaves of every kind, none of which arithmetic leaves as it is."""
    odd = ODD[jnp.result_type(float).name]
    return {
        "encoder": {
            "bool": jnp.array([True, False]),
            "complex": jnp.array([complex(-0.0, 1e-45)], jnp.complex64),
            "float": jnp.asarray(odd),
            "float8": jax.lax.bitcast_convert_type(
                jnp.arange(256, dtype=jnp.uint8), jnp.float8_e5m2
            ),
            "int4": jnp.arange(-8, 8).astype(jnp.int4),
            "key": jax.random.key(7),
            "steps": jnp.array(2**24 + 1, jnp.int32),
        },
        "mixed": {"frozen_kernel": jnp.asarray(odd), "frozen_table": jnp.full((4,), 2.0)},
    }


def merged(trainable, frozen):
    return {
        "encoder": frozen["encoder"],
        "head": trainable["head"],
        "mixed": trainable["mixed"] | frozen["mixed"],
    }


def trainable_of(params):
    return {"head": params["head"], "mixed": {"scale": params["mixed"]["scale"]}}


def loss(trainable):
    x = jnp.linspace(-1.0, 1.0, 8).reshape(2, 4) * trainable["mixed"]["scale"]
    y = jnp.tanh(x @ trainable["head"]["kernel"] + trainable["head"]["bias"])
    return jnp.mean((y - 0.5) ** 2)


def whole_loss(params):
    """The same loss of the whole tree: frozen leaves have a gradient and no part in the value."""
    assert params["encoder"]["steps"].dtype == jnp.int32, "the frozen values are not in their place"
    return loss(trainable_of(params)) + 0.0 * jnp.sum(params["mixed"]["frozen_table"])


def hostile_gradients(gradient, params):
    """Frozen gradients of every kind that occurs: float0, NaN, infinite, None, a hole."""
    float0 = lambda leaf: np.zeros(leaf.shape, jax.dtypes.float0)
    encoder = {name: float0(leaf) for name, leaf in params["encoder"].items()}
    encoder |= {
        "float": jnp.full((4,), jnp.nan),
        "complex": jnp.full((1,), jnp.inf, jnp.complex64),
        "float8": None,
    }
    encoder |= {"int4": optax.MaskedNode()}
    mixed = {"frozen_kernel": jnp.full((4,), jnp.nan), "frozen_table": jnp.full((4,), 1e30)}
    return {"encoder": encoder, "head": gradient["head"], "mixed": gradient["mixed"] | mixed}


def floats(tree):
    """Frozen leaves to which -0.0 adds nothing, so that their updates are for everyone."""
    return {
        "float": tree["encoder"]["float"],
        "complex": tree["encoder"]["complex"],
        **frozen_of(tree)["mixed"],
    }


def for_lookahead(name, params):
    return optax.LookaheadParams.init_synced(params) if name == "lookahead" else params


def fast(params):
    return params.fast if isinstance(params, optax.LookaheadParams) else params


def run_alone(name, wrap):
    tx = make(name)
    params = for_lookahead(name, subtree())

    def step(params, state):
        gradient = jax.grad(loss)(fast(params))
        updates, state = tx.update(
            gradient, state, params, **extra_args(name, loss, fast(params), gradient)
        )
        return optax.apply_updates(params, updates), state

    step, state = wrap(step), tx.init(params)
    for _ in range(STEPS):
        params, state = step(params, state)
    return params, state


def run_frozen(name, wrap, frozen):
    tx = fo.with_frozen(make(name), FROZEN)
    whole = merged(subtree(), frozen)
    params = for_lookahead(name, whole)

    def step(params, state):
        one = fast(params)
        gradient = hostile_gradients(jax.grad(loss)(trainable_of(one)), one)
        updates, state = tx.update(
            gradient, state, params, **extra_args(name, whole_loss, one, gradient)
        )
        by_optax = optax.apply_updates(floats(one), floats(fast(updates)))
        assert jax.tree.map(jnp.result_type, by_optax) == jax.tree.map(jnp.result_type, floats(one))
        return fo.apply_updates(params, updates), state

    step, state = wrap(step), tx.init(params)
    for _ in range(STEPS):
        params, state = step(params, state)
    return params, state


def frozen_of(params):
    mixed = {name: leaf for name, leaf in params["mixed"].items() if name.startswith("frozen")}
    return {"encoder": params["encoder"], "mixed": mixed}


@pytest.mark.parametrize(("name", "x64"), PRECISIONS, indirect=["x64"])
def test_op_by_op_training_is_that_of_the_subtree_bit_for_bit(name, x64):
    with jax.disable_jit():
        frozen = frozen_leaves()
        params, state = run_frozen(name, lambda step: step, frozen)
        alone, alone_state = run_alone(name, lambda step: step)
    for tree, reference in (
        zip(params, alone, strict=True) if name == "lookahead" else [(params, alone)]
    ):
        fo.assert_trees_bit_identical(trainable_of(tree), reference)
        fo.assert_trees_bit_identical(frozen_of(tree), frozen)
        assert {leaf.dtype for leaf in jax.tree.leaves(trainable_of(tree))} == {
            jnp.dtype(float if x64 else "float32")
        }
    leaves = lambda tree: [(leaf.shape, leaf.dtype, leaf.nbytes) for leaf in jax.tree.leaves(tree)]
    assert leaves(state) == leaves(alone_state)


@pytest.mark.parametrize("name", EACH_OF_FEW)
def test_under_jit_training_is_that_of_the_subtree_to_rounding(
    name,
):
    frozen = frozen_leaves()
    params, _ = run_frozen(name, jax.jit, frozen)
    alone, _ = run_alone(name, jax.jit)
    for tree, reference in (
        zip(params, alone, strict=True) if name == "lookahead" else [(params, alone)]
    ):
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)
        jax.tree.map(close, trainable_of(tree), reference)
        fo.assert_trees_bit_identical(frozen_of(tree), frozen)


@pytest.mark.parametrize("name", NAMES)
def test_the_state_has_no_node_per_frozen_leaf(name):
    few = frozen_leaves()
    many = few | {"encoder": {f"copy_{i}": few["encoder"] for i in range(5)}}
    tx = fo.with_frozen(make(name), FROZEN)
    few, many = (tx.init(for_lookahead(name, merged(subtree(), frozen))) for frozen in (few, many))
    assert jax.tree.structure(few) == jax.tree.structure(many)


@pytest.mark.parametrize("name", EACH_OF_FEW)
def test_a_state_made_elsewhere_goes_on_where_it_was(name):
    params = for_lookahead(name, merged(subtree(), frozen_leaves()))
    one = fast(params)
    gradient = hostile_gradients(jax.grad(loss)(trainable_of(one)), one)
    args = extra_args(name, whole_loss, one, gradient)
    here, elsewhere = (fo.with_frozen(make(name), FROZEN) for _ in range(2))
    state = here.init(params)
    fo.assert_trees_bit_identical(
        elsewhere.update(gradient, state, params, **args),
        here.update(gradient, state, params, **args),
    )


def test_every_optimizer_is_in_the_catalogue():
    optimizers, failed = catalogue()
    assert failed == {}
    assert len(optimizers) > 110
    assert not set(LEFT_OUT) & set(optimizers)


@pytest.mark.parametrize("name", NAMES)
def test_a_wholly_frozen_tree_stays_as_it_is(name):
    frozen = frozen_leaves()
    params = for_lookahead(name, frozen)
    tx = fo.with_frozen(make(name), "**")
    state = tx.init(params)
    gradient = jax.tree.map(lambda leaf: np.zeros(leaf.shape, jax.dtypes.float0), frozen)
    for _ in range(2):
        zero = lambda tree: jnp.zeros(())
        updates, state = tx.update(
            gradient, state, params, **extra_args(name, zero, frozen, gradient)
        )
        params = fo.apply_updates(params, updates)
    fo.assert_trees_bit_identical(fast(params), frozen)
