"""Bit identity: every pattern of the narrow types, a million of the wide ones, wherever a step may run."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import frozen_optax as fo

NARROW_FLOATS = [name for name in dir(jnp) if name.startswith(("float8_", "float6_", "float4_"))]
NARROW_INTS = [name for name in dir(jnp) if name in ("int2", "int4", "uint2", "uint4")]
NO_ADDITION = ("float8_e8m0", "float6", "key_")
MILLION = 1_000_000
x64 = functools.partial(jax.enable_x64, True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64


def every_pattern_up_to_32_bits():
    rng = np.random.default_rng(0)
    short, byte = np.arange(2**16, dtype=np.uint16), np.arange(2**8, dtype=np.uint8)
    special = np.array([0x80000000, 1, 0x80000001, 0x7F800001, 0xFFA00000, 0x7FC00001, 0xFF800000], np.uint32)
    word = np.concatenate([special, rng.integers(0, 2**32, MILLION, dtype=np.uint32)])
    leaves = {
        "bfloat16": short.view(ml_dtypes.bfloat16),
        "bool": np.array([True, False]),
        "complex64": word[: MILLION // 2 * 2].view(np.complex64),
        "float16": short.view(np.float16),
        "float32": word.view(np.float32),
        "int8": byte.view(np.int8),
        "int16": short.view(np.int16),
        "int32": word.view(np.int32),
        "uint8": byte,
        "uint16": short,
        "uint32": word,
    }
    for name in NARROW_FLOATS:
        dtype = np.dtype(getattr(jnp, name))
        leaves[name] = byte[: 2 ** ml_dtypes.finfo(dtype).bits].view(dtype)
    for name in NARROW_INTS:
        dtype = np.dtype(getattr(jnp, name))
        info = ml_dtypes.iinfo(dtype)
        leaves[name] = np.arange(info.min, info.max + 1).astype(dtype)
    return {name: jnp.asarray(leaf) for name, leaf in leaves.items()} | {
        "key_rbg": jax.random.key(3, impl="rbg"),
        "key_threefry": jax.random.split(jax.random.key(2), 8),
        "raw_key": jax.random.PRNGKey(1),
    }


def every_64_bit_pattern_in_part():
    words = np.random.default_rng(1).integers(0, 2**64, MILLION, dtype=np.uint64)
    words[:5] = [1 << 63, 1, (1 << 63) | 1, 0x7FF0000000000001, 0xFFF4000000000000]
    leaves = {
        "complex128": words.view(np.complex128),
        "float64": words.view(np.float64),
        "int64": words.view(np.int64),
        "uint64": words,
    }
    return {name: jnp.asarray(leaf) for name, leaf in leaves.items()}


def host_bits(leaf):
    """The bits of a leaf, told without any code of the library."""
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf).view(np.uint8)


def assert_same_bits(before, after):
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].dtype == after[name].dtype, name
        assert before[name].shape == after[name].shape, name
        differ = np.count_nonzero(host_bits(before[name]) != host_bits(after[name]))
        assert differ == 0, f"{name}: {differ} bytes differ"


def gradients(params):
    """A gradient for the head, and for the frozen leaves what `jax.grad(..., allow_int=True)` could give."""

    def gradient(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            return jnp.full_like(leaf, jnp.nan)
        return np.zeros(leaf.shape, jax.dtypes.float0)

    return {"frozen": jax.tree.map(gradient, params["frozen"]), "head": params["head"]}


def step(tx, params, state):
    updates, state = tx.update(gradients(params), state, params)
    return fo.apply_updates(params, updates), state


def eager(tx, params, state):
    return step(tx, params, state)[0]


def under_one_jit(tx, params, state):
    return jax.jit(functools.partial(step, tx))(params, state)[0]


def update_and_apply_jitted_apart(tx, params, state):
    updates, state = jax.jit(lambda params, state: tx.update(gradients(params), state, params))(params, state)
    return jax.jit(fo.apply_updates)(params, updates)


def updates_applied_eagerly(tx, params, state):
    updates, state = jax.jit(lambda params, state: tx.update(gradients(params), state, params))(params, state)
    return fo.apply_updates(params, updates)


def donated(tx, params, state):
    params = jax.tree.map(jnp.copy, params)
    return jax.jit(functools.partial(step, tx), donate_argnums=(0, 1))(params, state)[0]


def under_scan(tx, params, state):
    (params, state), _ = jax.jit(
        lambda carry: jax.lax.scan(lambda carry, _: (step(tx, *carry), None), carry, length=3)
    )((params, state))
    return params


def under_vmap(tx, params, state):
    # Stacked on the host: on CPU a concatenation alone loses NaN payloads of float8_e3m4.
    is_key = lambda leaf: jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    stack = lambda leaf: jnp.stack([leaf] * 2) if is_key(leaf) else jnp.asarray(np.stack([np.asarray(leaf)] * 2))
    stepped = jax.jit(jax.vmap(functools.partial(step, tx), in_axes=(0, None)))(jax.tree.map(stack, params), state)[0]
    return jax.tree.map(lambda leaf: leaf[1] if is_key(leaf) else np.asarray(leaf)[1], stepped)


def under_remat(tx, params, state):
    return jax.jit(jax.checkpoint(functools.partial(step, tx)))(params, state)[0]


def under_shard_map(tx, params, state):
    mesh = jax.sharding.Mesh(jax.devices(), ("data",))
    spec = jax.sharding.PartitionSpec()
    mapped = jax.shard_map(functools.partial(step, tx), mesh=mesh, in_specs=(spec, spec), out_specs=(spec, spec))
    return jax.jit(mapped)(params, state)[0]


CONTEXTS = [
    eager,
    under_one_jit,
    update_and_apply_jitted_apart,
    updates_applied_eagerly,
    donated,
    under_scan,
    under_vmap,
    under_remat,
    under_shard_map,
]


@pytest.mark.parametrize("context", CONTEXTS, ids=lambda context: context.__name__)
def test_with_frozen_keeps_every_bit_of_every_type(context):
    params = {"frozen": every_pattern_up_to_32_bits(), "head": jnp.ones(3)}
    tx = fo.with_frozen(optax.adamw(0.1, weight_decay=0.1), "frozen")
    after = context(tx, params, tx.init(params))
    assert_same_bits(params["frozen"], after["frozen"])
    assert not np.array_equal(params["head"], after["head"])


@pytest.mark.parametrize("context", CONTEXTS, ids=lambda context: context.__name__)
def test_with_frozen_keeps_every_bit_of_64_bit_types(context):
    with x64():
        params = {"frozen": every_64_bit_pattern_in_part(), "head": jnp.ones(3)}
        tx = fo.with_frozen(optax.adamw(0.1, weight_decay=0.1), "frozen")
        after = context(tx, params, tx.init(params))
        assert_same_bits(params["frozen"], after["frozen"])


@pytest.mark.parametrize("context", CONTEXTS, ids=lambda context: context.__name__)
def test_freeze_and_apply_updates_keep_every_bit_of_every_type(context):
    params = {"frozen": every_pattern_up_to_32_bits(), "head": jnp.ones(3)}
    tx = fo.freeze("frozen")
    after = context(tx, params, tx.init(params))
    assert_same_bits(params["frozen"], after["frozen"])


@pytest.mark.parametrize("zero", [0.0, -0.0])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_apply_updates_keeps_every_bit_under_a_zero_that_is_not_known(wrap, zero):
    params = every_pattern_up_to_32_bits()
    params = {name: leaf for name, leaf in params.items() if not name.startswith(NO_ADDITION)}

    def zeros(leaf):
        zero_of_type = jnp.zeros(leaf.shape, leaf.dtype)
        return (
            -zero_of_type
            if zero == 0 and np.signbit(zero) and jnp.issubdtype(leaf.dtype, jnp.inexact)
            else zero_of_type
        )

    after = wrap(fo.apply_updates)(params, jax.tree.map(zeros, params))
    assert_same_bits(params, after)


def test_one_jit_with_optax_apply_updates_keeps_every_bit_that_has_an_additive_identity():
    params = {"frozen": every_pattern_up_to_32_bits(), "head": jnp.ones(3)}
    params["frozen"] = {name: leaf for name, leaf in params["frozen"].items() if not name.startswith(NO_ADDITION)}
    tx = fo.with_frozen(optax.sgd(0.1), "frozen")

    @jax.jit
    def train(params, state):
        updates, state = tx.update(gradients(params), state, params)
        return optax.apply_updates(params, updates)

    assert_same_bits(params["frozen"], train(params, tx.init(params))["frozen"])


def test_with_optax_apply_updates_outside_that_jit_subnormals_are_lost_and_the_sign_of_zero_is_kept():
    params = {
        "frozen": jnp.asarray(np.array([0x80000000, 1, 0x7F800001], np.uint32).view(np.float32)),
        "head": jnp.ones(3),
    }
    tx = fo.with_frozen(optax.sgd(0.1), "frozen")
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    after = np.asarray(optax.apply_updates(params, updates)["frozen"]).view(np.uint32)
    assert after[0] == 0x80000000, "p + (-0.0) keeps -0.0"
    if jax.default_backend() == "cpu":
        assert after[1] == 0, "what CPUs do to subnormals"
        assert after[2] == 0x7FC00001, "what they do to signalling NaNs"
    fo.assert_trees_bit_identical(fo.apply_updates(params, updates)["frozen"], params["frozen"])
