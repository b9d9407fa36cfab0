"""`fingerprint` and `assert_fingerprint`: the same for the same bits, and no others."""

import json
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trying
from helpers import host_devices
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import frozen_optax as fo
from benchmarks.measures import collectives
from frozen_optax import _digests

DTYPES = [
    *(
        "float32",
        "float16",
        "bfloat16",
        "float8_e4m3fn",
        "float8_e5m2",
        "float8_e8m0fnu",
        "float4_e2m1fn",
    ),
    *("int32", "uint32", "int16", "int8", "uint8", "int4", "uint4", "int2", "bool", "complex64"),
]


def make(dtype, shape=(6, 8), seed=0):
    bits = np.random.default_rng(seed).integers(0, 256, (*shape, 8), np.uint8)
    dtype = jnp.dtype(dtype)
    if dtype.name == "bool":
        return bits[..., 0] > 127
    if dtype.name in ("int4", "uint4", "int2", "float4_e2m1fn"):
        return (bits[..., 0] % 2).astype(np.int8).astype(dtype)
    return np.ascontiguousarray(bits[..., : dtype.itemsize]).view(dtype)[..., 0]


def digest(leaf):
    return fo.fingerprint({"w": leaf}, "w")["w"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_host_and_the_device_agree(dtype):
    host = make(dtype)
    assert digest(host) == digest(jnp.asarray(host))
    assert digest(host).startswith(f"{dtype}[6,8] ")


@pytest.mark.parametrize(
    "dtype", [np.float64, np.int64, np.complex128, *trying.NARROW.values()], ids=str
)
def test_every_host_type_has_the_devices_fingerprint(dtype):
    values = np.array([0, 1]).astype(dtype)
    assert digest(values) == digest(values.copy()) != digest(values[::-1].copy())
    if trying.device_has(dtype):
        assert digest(jnp.asarray(values)) == digest(values)


def test_python_numbers_have_the_fingerprint_of_numpys():
    assert digest(2.0) == digest(np.float64(2)) != digest(2)


def test_prng_keys_and_leaves_without_elements_or_axes():
    assert digest(jax.random.key(0)) == digest(jax.random.key(0)) != digest(jax.random.key(1))
    assert digest(jax.random.split(jax.random.key(0))) != digest(
        jax.random.split(jax.random.key(1))
    )
    assert digest(jnp.zeros((0, 3))) != digest(jnp.zeros((3, 0)))
    assert digest(jnp.array(1.0)) != digest(jnp.array(2.0))


def test_every_flip_of_one_bit_in_a_million_elements_is_seen():
    words = np.random.default_rng(0).integers(0, 2**32, 1_000_000, np.uint32)
    rng = np.random.default_rng(1)
    at, bit = rng.integers(0, words.size, 10_000), rng.integers(0, 32, 10_000, dtype=np.uint32)
    flipped = words.copy()
    # Each on its own: what a word adds depends on it and its place alone.
    flipped[at] ^= np.uint32(1) << bit
    before, after = (_digests._terms(each) for each in (words, flipped))
    for old, new in zip(before, after, strict=True):
        assert (old[at] != new[at])[words[at] != flipped[at]].all()
        rest = np.setdiff1d(np.arange(words.size), at)
        np.testing.assert_array_equal(old[rest], new[rest])
    whole = digest(words)
    for i in range(100):  # and from end to end
        one = words.copy()
        one[at[i]] ^= np.uint32(1) << bit[i]
        assert digest(one) != whole


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "bool"])
def test_order_shape_and_dtype_count(dtype):
    x = make(dtype)
    others = [x[::-1], x[:, ::-1], np.roll(x, 1), x.T, x.reshape(8, 6), x.reshape(-1), x[None]]
    swapped = x.copy().reshape(-1)
    i, j = 0, next(k for k in range(1, x.size) if swapped[k] != swapped[0])
    swapped[[i, j]] = swapped[[j, i]]
    found = [digest(np.ascontiguousarray(each)) for each in [x, *others, swapped.reshape(x.shape)]]
    assert len(set(found)) == len(found)


def test_the_same_bytes_in_another_dtype_are_others():
    x = make("float32")
    assert len({digest(x.view(dtype)) for dtype in (np.float32, np.int32, np.uint32)}) == 3
    assert digest(jnp.array([0.0])) != digest(jnp.array([-0.0]))
    nans = np.array([0x7FC00000, 0x7FC00001, 0x7F800001], np.uint32).view(np.float32)
    assert len({digest(nans[i : i + 1]) for i in range(3)}) == 3


def test_a_thousand_random_changes_are_all_seen():
    rng, x = np.random.default_rng(0), make("float32", (16, 16))
    seen = {digest(x)}
    for _ in range(1000):
        y = x.copy().reshape(-1).view(np.uint32)
        places = rng.choice(y.size, 2, replace=False)
        y[places] = y[places[::-1]] if rng.random() < 0.5 else rng.integers(0, 2**32, 2, np.uint32)
        seen.add(digest(y.view(np.float32).reshape(16, 16)))
    assert len(seen) > 990  # two exchanges may be the same


@pytest.mark.parametrize("spec", [P("x"), P(None, "x"), P("x", "y")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_sharding_does_not_count_and_nothing_is_gathered(spec, dtype):
    mesh = Mesh(np.array(host_devices(8)).reshape(4, 2), ("x", "y"))
    x = make(dtype, (64, 80))
    sharded = jax.device_put(x, NamedSharding(mesh, spec))
    assert digest(sharded) == digest(x)
    program = _digests._sums_on_device.lower(sharded).compile().as_text()
    count, received = collectives(program)
    assert count > 0
    assert received <= 8 * 8 * count  # a pair of sums from each device, and nothing of the leaf


def test_another_process_finds_the_same():
    code = (
        "import json, jax, jax.numpy as jnp, frozen_optax as fo\n"
        "below = {'c': jax.random.key(3), 'd': jnp.arange(7, dtype='bfloat16')}\n"
        "tree = {'a': jnp.arange(100.0), 'b': below}\n"
        "print(json.dumps(fo.fingerprint(tree, '**')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    tree = {
        "a": jnp.arange(100.0),
        "b": {"c": jax.random.key(3), "d": jnp.arange(7, dtype="bfloat16")},
    }
    assert json.loads(done.stdout) == fo.fingerprint(tree, "**")


def test_it_stays_the_same_from_version_to_version():
    assert (
        fo.fingerprint({"a": jnp.arange(6.0).reshape(2, 3), "b": np.arange(3, dtype=np.int8)}, "**")
        == PINNED
    )


PINNED = {"a": "float32[2,3] 67a295c0fad4cb9b", "b": "int8[3] 793975f9051ae5aa"}


def test_places_beyond_two_to_the_32_are_told_apart():
    shape = (3, 2**16, 2**16)  # too large to hold: its places alone, at the corners
    terms = []
    for outer in range(3):
        around = _digests._positions(shape, range(1), np)[outer, 0, 0]
        terms.append(int(around))
    assert terms == [0, 1, 2]
    inner = _digests._positions((1, 4, 2**30), range(1, 2), np)
    assert inner.reshape(-1).tolist() == [0, 1, 2, 3]


def test_only_frozen_leaves_are_in_it_and_json_keeps_it():
    params = {"encoder": {"w": jnp.ones(2), "none": None}, "head": jnp.ones(2)}
    found = fo.fingerprint(params, "encoder")
    assert list(found) == ["encoder/w"]
    assert found == fo.fingerprint(params, trainable="head")
    fo.assert_fingerprint(params | {"head": jnp.zeros(3)}, json.loads(json.dumps(found)))
    fo.assert_fingerprint(jax.tree.map(np.asarray, params), found)


def test_leaves_that_share_a_path_share_an_entry():
    tree = {"a": {"b": jnp.ones(1)}, "a/b": jnp.zeros(1)}
    found = fo.fingerprint(tree, "**")
    assert list(found) == ["a/b"]
    fo.assert_fingerprint(tree, found)
    with pytest.raises(AssertionError, match="a/b"):
        fo.assert_fingerprint({"a": {"b": jnp.zeros(1)}, "a/b": jnp.ones(1)}, found)
    with pytest.raises(ValueError, match="2 leaves at 'a/b', the tree 1"):
        fo.assert_fingerprint({"a": {"b": jnp.ones(1)}}, found)


def test_what_differs_is_named():
    before = {"a": jnp.ones(2), "b": jnp.zeros(2), "c": jnp.zeros(2)}
    found = fo.fingerprint(before, "**")
    with pytest.raises(
        AssertionError,
        match=r"(?s)1 of 3 leaves have another fingerprint:\n  b: float32\[2\] \w+ became",
    ):
        fo.assert_fingerprint(before | {"b": jnp.array([0.0, -0.0])}, found)
    with pytest.raises(AssertionError, match=r"a: float32\[2\] became bfloat16\[2\]"):
        fo.assert_fingerprint(before | {"a": jnp.ones(2, jnp.bfloat16)}, found)
    with pytest.raises(AssertionError, match=r"2 of 3 leaves"):
        fo.assert_fingerprint({"a": before["a"], "b": jnp.ones(2), "c": jnp.ones(2)}, found)
    swapped = {"a": jnp.ones(2), "b": jnp.full(2, 2.0)}
    with pytest.raises(AssertionError, match=r"2 of 2 leaves"):
        fo.assert_fingerprint({"a": swapped["b"], "b": swapped["a"]}, fo.fingerprint(swapped, "**"))


def test_what_cannot_be_checked_is_an_error():
    tree = {"encoder": jnp.ones(2)}
    found = fo.fingerprint(tree, "**")
    with pytest.raises(
        ValueError, match=r"the fingerprint has 'encoder', and the tree has none.*'enkoder'"
    ):
        fo.assert_fingerprint({"enkoder": jnp.ones(2)}, found)
    with pytest.raises(TypeError, match="found str"):
        fo.assert_fingerprint(tree, "encoder")
    with pytest.raises(ValueError, match="'x' at 'encoder' is no digest"):
        fo.assert_fingerprint(tree, {"encoder": "x"})
    with pytest.raises(
        ValueError, match=r"at 'encoder' is no digest\. assert_fingerprint takes the tree first"
    ):
        fo.assert_fingerprint(found, tree)
    with pytest.raises(TypeError, match=r"found a leaf float32\[2\] at 'encoder'"):
        fo.fingerprint(jax.eval_shape(lambda: tree), "**")  # shapes without values
    with pytest.raises(TypeError, match="bits of 'encoder' are not known while tracing"):
        jax.jit(lambda tree: fo.fingerprint(tree, "**"))(tree)
    tree["encoder"].delete()
    for call in (lambda: fo.fingerprint(tree, "**"), lambda: fo.assert_fingerprint(tree, found)):
        with pytest.raises(ValueError, match="'encoder' was donated"):
            call()


def test_inside_of_jit_under_chexify():
    before = {"a": jnp.ones(2), "k": jax.random.key(0), "n": jnp.arange(3, dtype="int8")}
    found = fo.fingerprint(before, "**")

    @chex.chexify
    @jax.jit
    def step(tree, by):
        tree = tree | {"a": tree["a"] * by}
        fo.assert_fingerprint(tree, found)
        return tree

    step(before, 1.0)
    step.wait_checks()
    step(before, 2.0)
    with pytest.raises(AssertionError, match="leaves have another fingerprint"):
        step.wait_checks()


def test_a_watch_looks_at_every_nth_call_one_check_late():
    params = {"encoder": jnp.ones(2), "head": jnp.ones(2)}
    found = fo.fingerprint(params, "encoder")
    check = fo.watch_fingerprint(found, every=3)
    for _ in range(7):
        params["head"] = params["head"] * 2
        check(params)
    check.finish()
    moved = params | {"encoder": params["encoder"] * 2}
    check(moved)
    check(moved)  # the ninth: begun
    check(params)
    check(params)
    with pytest.raises(AssertionError, match="at call 9: 1 of 1 leaves have another fingerprint"):
        check(params)
    check(params)
    check.finish()
    last = fo.watch_fingerprint(found, every=1)
    last(moved)
    with pytest.raises(AssertionError, match="at call 1"):
        last.finish()
    last.finish()
    with pytest.raises(ValueError, match="every is 0"):
        fo.watch_fingerprint(found, every=0)


def test_a_watch_takes_python_numbers_and_host_arrays():
    params = {"encoder": {"scale": 0.5, "table": np.arange(3)}}
    check = fo.watch_fingerprint(fo.fingerprint(params, "**"), every=1)
    check(params)
    check({"encoder": {"scale": 0.5, "table": np.arange(1, 4)}})
    with pytest.raises(
        AssertionError, match=r"(?s)at call 2: 1 of 2 leaves.*encoder/table: int64\[3\] \w+ became"
    ):
        check.finish()


def test_a_watch_reads_what_the_next_step_overwrites():
    tx = fo.with_frozen(optax.sgd(0.1), "encoder")
    params = {"encoder": jnp.ones(1000), "head": jnp.ones(1000)}
    found = fo.fingerprint(params, "**")
    check = fo.watch_fingerprint(found, every=1)
    step = jax.jit(lambda params: jax.tree.map(lambda x: x * 1, params), donate_argnums=0)
    state = tx.init(params)
    del state
    for _ in range(5):
        check(params)
        params = step(params)
    check.finish()


@pytest.mark.parametrize("dtype", ["float32", "int8", "float64", "complex64", "bool", "uint16"])
def test_a_lone_host_number_has_the_devices_fingerprint(dtype):
    for number in (0, 1, 113):
        host = np.asarray(number).astype(dtype)
        found = fo.fingerprint({"array": host, "scalar": host[()]}, "**")
        assert found["array"] == found["scalar"]
        if dtype != "float64":
            assert fo.fingerprint({"array": jnp.asarray(host)}, "**") == {"array": found["array"]}


def test_a_fingerprint_of_structs_can_be_read_back():
    leaf = np.zeros(3, [("x", "i4"), ("y", "f8", (2,))])
    fingerprint = fo.fingerprint({"a": leaf, "b": np.zeros(2, "datetime64[ns]")}, "**")
    fo.assert_fingerprint(
        {"a": leaf, "b": np.zeros(2, "datetime64[ns]")}, json.loads(json.dumps(fingerprint))
    )
    other = leaf.copy()
    other["y"][1, 0] = -0.0
    with pytest.raises(AssertionError, match="a: "):
        fo.assert_fingerprint({"a": other, "b": np.zeros(2, "datetime64[ns]")}, fingerprint)
