"""Bit identity: every pattern of narrow types, a million of wide ones, wherever a step may run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trying
from helpers import assert_same_bits, host_devices

import frozen_optax as fo
from frozen_optax import _bits

MILLION = 1_000_000
# -0.0, the least subnormals of both signs, signalling NaNs, a quiet one with a payload, -inf.
SPECIAL = {
    np.float32: [0x80000000, 1, 0x80000001, 0x7F800001, 0xFFA00000, 0x7FC00001, 0xFF800000],
    np.float64: [
        1 << 63,
        1,
        (1 << 63) | 1,
        0x7FF0000000000001,
        0xFFF4000000000000,
        0x7FF8000000000001,
        0xFFF << 52,
    ],
}


def words(dtype):
    unsigned = f"u{np.dtype(dtype).itemsize}"
    drawn = np.random.default_rng(0).integers(
        0, 2 ** (8 * np.dtype(dtype).itemsize), MILLION, unsigned
    )
    drawn[: len(SPECIAL[dtype])] = SPECIAL[dtype]
    return drawn


@functools.cache
def every_pattern_up_to_32_bits():
    short, byte, word = (
        np.arange(2**16, dtype=np.uint16),
        np.arange(2**8, dtype=np.uint8),
        words(np.float32),
    )
    leaves = {
        "bool": np.array([True, False]),
        "complex64": word.view(np.complex64),
        "float16": short.view(np.float16),
        "float32": word.view(np.float32),
        "int8": byte.view(np.int8),
        "int16": short.view(np.int16),
        "int32": word.view(np.int32),
        "uint8": byte,
        "uint16": short,
        "uint32": word,
    }
    leaves |= {
        name: trying.every_pattern(dtype)
        for name, dtype in trying.NARROW.items()
        if trying.device_has(dtype)
    }
    return {name: jnp.asarray(leaf) for name, leaf in leaves.items()} | {
        "key_rbg": jax.random.key(3, impl="rbg"),
        "key_threefry": jax.random.split(jax.random.key(2), 8),
        "raw_key": jax.random.PRNGKey(1),
    }


@functools.cache
def every_64_bit_pattern_in_part():
    word = words(np.float64)
    leaves = {
        "complex128": word.view(np.complex128),
        "float64": word.view(np.float64),
        "int64": word.view(np.int64),
        "uint64": word,
    }
    return {name: jnp.asarray(leaf) for name, leaf in leaves.items()}


@pytest.fixture
def leaves(x64):
    """Frozen leaves of every type that this precision has over the other."""
    return every_64_bit_pattern_in_part() if x64 else every_pattern_up_to_32_bits()


def that_can_be_added_to(leaves):
    """Those to which some number adds nothing: optax adds, so it can keep no others."""
    return {
        name: leaf
        for name, leaf in leaves.items()
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
        and (leaf.dtype == bool or trying.zero_that_adds_nothing(leaf.dtype) is not None)
    }


def gradients(params):
    """Gradients as `jax.grad(..., allow_int=True)` could give them, NaN for the frozen floats."""

    def gradient(leaf):
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.inexact):
            return jnp.full_like(leaf, jnp.nan)
        return np.zeros(leaf.shape, jax.dtypes.float0)

    return {"frozen": jax.tree.map(gradient, params["frozen"]), "head": params["head"]}


def step(tx, params, state, apply=fo.apply_updates):
    updates, state = tx.update(gradients(params), state, params)
    return apply(params, updates), state


def eager(tx, params, state):
    return step(tx, params, state)[0]


def under_one_jit(tx, params, state):
    return jax.jit(functools.partial(step, tx))(params, state)[0]


def update_and_apply_jitted_apart(tx, params, state):
    updates, state = jax.jit(lambda params, state: tx.update(gradients(params), state, params))(
        params, state
    )
    return jax.jit(fo.apply_updates)(params, updates)


def updates_applied_eagerly(tx, params, state):
    updates, state = jax.jit(lambda params, state: tx.update(gradients(params), state, params))(
        params, state
    )
    return fo.apply_updates(params, updates)


def donated(tx, params, state):
    params = jax.tree.map(jnp.copy, params)
    return jax.jit(functools.partial(step, tx), donate_argnums=(0, 1))(params, state)[0]


def under_scan(tx, params, state):
    (params, state), _ = jax.jit(
        lambda carry: jax.lax.scan(lambda carry, _: (step(tx, *carry), None), carry, length=3)
    )((params, state))
    return params


def under_scan_outside_any_jit(tx, params, state):
    return jax.lax.scan(lambda carry, _: (step(tx, *carry), None), (params, state), length=3)[0][0]


def under_vmap(tx, params, state):
    # Stacked on the host: on CPU a concatenation alone loses NaN payloads of float8_e3m4.
    is_key = lambda leaf: jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    stack = lambda leaf: (
        jnp.stack([leaf] * 2) if is_key(leaf) else jnp.asarray(np.stack([np.asarray(leaf)] * 2))
    )
    stepped = jax.jit(jax.vmap(functools.partial(step, tx), in_axes=(0, None)))(
        jax.tree.map(stack, params), state
    )[0]
    return jax.tree.map(lambda leaf: leaf[1] if is_key(leaf) else np.asarray(leaf)[1], stepped)


def under_remat(tx, params, state):
    return jax.jit(jax.checkpoint(functools.partial(step, tx)))(params, state)[0]


def under_shard_map(tx, params, state):
    mesh = jax.sharding.Mesh(host_devices(), ("data",))
    spec = jax.sharding.PartitionSpec()
    mapped = jax.shard_map(
        functools.partial(step, tx), mesh=mesh, in_specs=(spec, spec), out_specs=(spec, spec)
    )
    return jax.jit(mapped)(params, state)[0]


CONTEXTS = [
    eager,
    under_one_jit,
    update_and_apply_jitted_apart,
    updates_applied_eagerly,
    donated,
    under_scan,
    under_scan_outside_any_jit,
    under_vmap,
    under_remat,
    under_shard_map,
]


@pytest.mark.parametrize("context", CONTEXTS, ids=lambda context: context.__name__)
def test_with_frozen_keeps_every_bit_of_every_type(context, leaves, x64):
    params = {"frozen": leaves, "head": jnp.ones(3)}
    tx = fo.with_frozen(optax.adamw(0.1, weight_decay=0.1), "frozen")
    after = context(tx, params, tx.init(params))
    assert_same_bits(leaves, after["frozen"])
    assert not np.array_equal(params["head"], after["head"])
    assert after["head"].dtype == (jnp.float64 if x64 else jnp.float32)


@pytest.mark.parametrize("context", CONTEXTS, ids=lambda context: context.__name__)
def test_freeze_and_apply_updates_keep_every_bit_of_every_type(context, leaves):
    params = {"frozen": leaves, "head": jnp.ones(3)}
    tx = fo.freeze("frozen")
    after = context(tx, params, tx.init(params))
    assert_same_bits(leaves, after["frozen"])


@pytest.mark.parametrize("zero", [0.0, -0.0])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_apply_updates_keeps_every_bit_under_an_unknown_zero(wrap, zero, leaves):
    params = that_can_be_added_to(leaves)

    def zeros(leaf):
        of_type = jnp.zeros(leaf.shape, leaf.dtype)
        return -of_type if np.signbit(zero) and jnp.issubdtype(leaf.dtype, jnp.inexact) else of_type

    after = wrap(fo.apply_updates)(params, jax.tree.map(zeros, params))
    assert_same_bits(params, after)


# --- what only the host has


# Of a dtype that the device has not, in the words of each backend.
REFUSED = r"(?i)xla|abstract array|RuntimeProgramInputMismatch|StableHLO"


@pytest.mark.parametrize("dtype", trying.NARROW.values(), ids=trying.NARROW)
def test_a_leaf_on_the_host_is_handed_back_or_refused(dtype):
    leaf = np.arange(2, dtype=np.uint8).view(dtype) if dtype.itemsize == 1 else np.ones(2, dtype)
    params = {"frozen": {"w": leaf}, "head": jnp.ones(3)}
    tx = fo.with_frozen(optax.adamw(0.1, weight_decay=0.1), "frozen")
    after = eager(tx, params, tx.init(params))
    assert after["frozen"]["w"] is leaf
    fo.assert_frozen(params, after, "frozen")
    with pytest.raises(AssertionError, match=r"frozen/w: "):
        fo.assert_frozen(
            params,
            after | {"frozen": {"w": leaf[::-1] if dtype.itemsize == 1 else leaf * 0}},
            "frozen",
        )
    if trying.device_has(dtype):
        assert_same_bits(params["frozen"], under_one_jit(tx, params, tx.init(params))["frozen"])
    else:
        with pytest.raises(Exception, match=REFUSED):
            under_one_jit(tx, params, tx.init(params))


# --- stepping through optax.apply_updates, which adds


def optax_in_one_jit(tx, params, state):
    return jax.jit(functools.partial(step, tx, apply=optax.apply_updates))(params, state)[0]


def optax_eager(tx, params, state):
    return step(tx, params, state, optax.apply_updates)[0]


def optax_after_a_jit(tx, params, state):
    updates, _ = jax.jit(lambda params, state: tx.update(gradients(params), state, params))(
        params, state
    )
    return optax.apply_updates(params, updates)


def optax_under_scan(tx, params, state):
    one = lambda carry, _: (step(tx, *carry, optax.apply_updates), None)
    return jax.lax.scan(one, (params, state), length=1)[0][0]


WAYS = {
    "with_frozen": lambda: fo.with_frozen(optax.sgd(0.1), "frozen"),
    "freeze": lambda: fo.freeze("frozen"),
}


@pytest.mark.parametrize("way", WAYS)
def test_optax_in_one_jit_keeps_bits_that_have_an_identity(way, leaves):
    params, tx = {"frozen": that_can_be_added_to(leaves), "head": jnp.ones(3)}, WAYS[way]()
    assert_same_bits(params["frozen"], optax_in_one_jit(tx, params, tx.init(params))["frozen"])


def parts(leaf):
    """A leaf as real floats on the host, their bits, and which are subnormal."""
    host = np.asarray(leaf)
    real = host.view(host.real.dtype) if np.iscomplexobj(host) else host
    with np.errstate(invalid="ignore"):  # signalling NaNs
        number = real.astype(np.float64)
    subnormal = (number != 0) & (np.abs(number) < float(jnp.finfo(real.dtype).tiny))
    return number, real.view(f"u{real.dtype.itemsize}"), subnormal


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "context", [optax_eager, optax_after_a_jit, optax_under_scan], ids=lambda c: c.__name__
)
def test_optax_outside_one_jit_loses_subnormals_and_payloads(context, way, leaves):
    """Where p + (-0.0) is computed: op by op, and under a scan, whose argument the zero is."""
    params, tx = {"frozen": that_can_be_added_to(leaves), "head": jnp.ones(3)}, WAYS[way]()
    after = context(tx, params, tx.init(params))["frozen"]
    exact = {
        name: leaf
        for name, leaf in params["frozen"].items()
        if not jnp.issubdtype(leaf.dtype, jnp.inexact)
    }
    assert_same_bits(exact, {name: after[name] for name in exact})
    for name in params["frozen"].keys() - exact.keys():
        (before, bits, subnormal), (now, now_bits, _) = (
            parts(tree[name]) for tree in (params["frozen"], after)
        )
        assert after[name].dtype == params["frozen"][name].dtype
        differ, nan = bits != now_bits, np.isnan(before)
        assert not (differ & ~subnormal & ~nan).any(), (
            f"{name}: an ordinary number, -0.0 or an infinity changed"
        )
        assert np.isnan(now[nan]).all(), name
        lost = differ & subnormal
        assert not now[lost].any(), f"{name}: a subnormal became neither itself nor zero"
        assert (np.signbit(now) == np.signbit(before))[~nan].all(), name
        if (
            jax.default_backend() == "cpu"
            and name in ("float32", "float64")
            and context is not optax_under_scan
        ):
            assert lost.sum() == subnormal.sum() > 0, "what CPUs do to subnormals"
            quiet = type(bits[0])(1 << {4: 22, 8: 51}[bits.itemsize])
            np.testing.assert_array_equal(
                now_bits[nan], bits[nan] | quiet, err_msg="what they do to signalling NaNs"
            )
    fo.assert_trees_bit_identical(eager(tx, params, tx.init(params))["frozen"], params["frozen"])


@pytest.mark.parametrize("where", ["host", "device"])
def test_an_array_is_made_of_its_bits_again(where, x64):
    found = {name: trying.every_pattern(dtype) for name, dtype in trying.NARROW.items()}
    found |= {"f4": words(np.float32).view("f4"), "f8": words(np.float64).view("f8")}
    found |= {"c8": found["f4"].view("c8"), "c16": found["f8"].view("c16"), "b": np.eye(2) == 1}
    if where == "device":
        reads = {name: trying.device_reads_bits_of(leaf.dtype) for name, leaf in found.items()}
        is_plain = lambda name: name in ("f4", "c8", "b") or (x64 and name in ("f8", "c16"))
        found = {name: leaf for name, leaf in found.items() if reads[name] or is_plain(name)}
        assert {"int4", "float8_e5m2", "bfloat16", "c8"} <= found.keys()
    again = lambda leaf: _bits.of_bits(_bits.bits(leaf), np.dtype(leaf.dtype))
    again = jax.jit(again) if where == "device" else again
    assert_same_bits(found, {name: np.asarray(again(leaf)) for name, leaf in found.items()})
