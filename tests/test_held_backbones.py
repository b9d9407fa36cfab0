"""Backbones as they are held: in few bits, in host memory; cast, scaled, fetched in the forward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import host_bits, same_objects
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import frozen_optax as fo

WIDTH, RANK, CLASSES = 16, 2, 8
TX = fo.with_frozen(optax.adamw(0.05), trainable=["**/lora_[ab]", "head"])
COMPILERS = {"fo.jit": functools.partial(fo.jit, frozen=TX), "jax.jit": jax.jit}


def in_bfloat16(w):
    return {"w": w.astype("bfloat16")}


def in_int8(w):
    """By the column: what an integer stands for is its column's scale times it."""
    scale = jnp.max(jnp.abs(w), axis=0) / 127
    return {"q": jnp.round(w / scale).astype("int8"), "scale": scale}


def in_float8(w):
    return {"q": w.astype("float8_e4m3fn"), "scale": jnp.ones(())}


HOLDS = {"bfloat16": in_bfloat16, "int8": in_int8, "float8": in_float8}


def as_float32(base):
    """The matrix that a layer's frozen part stands for."""
    if "w" in base:
        return base["w"].astype("float32")
    return base["q"].astype("float32") * base["scale"]


def make_params(hold):
    """Two layers, each a frozen matrix with adapters, and a trained head."""
    keys = jax.random.split(jax.random.key(0), 5)
    matrix = lambda key, *shape: jax.random.normal(key, shape) * shape[0] ** -0.5
    layers = [
        {
            "base": HOLDS[hold](matrix(keys[index], WIDTH, WIDTH)),
            "lora_a": matrix(keys[index + 2], WIDTH, RANK),
            "lora_b": jnp.zeros((RANK, WIDTH)),
        }
        for index in range(2)
    ]
    return {"layers": layers, "head": matrix(keys[4], WIDTH, CLASSES)}


def make_batch():
    return jax.random.normal(jax.random.key(9), (32, WIDTH)), jnp.arange(32) % CLASSES


def make_loss(fetch=lambda base: base):
    def loss(params, x, y):
        for layer in params["layers"]:
            w = as_float32(fetch(layer["base"]))
            x = x + jnp.tanh(x @ w + x @ layer["lora_a"] @ layer["lora_b"])
        logits = x @ params["head"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return loss


def make_step(loss):
    def step(params, state, x, y):
        value, grads = fo.value_and_grad(loss, TX)(params, x, y)
        updates, state = TX.update(grads, state, params)
        return fo.apply_updates(params, updates), state, value

    return step


def bases(params):
    return jax.tree.leaves([layer["base"] for layer in params["layers"]])


def train(step, params, state=None, steps=3):
    state, losses = TX.init(params) if state is None else state, []
    for _ in range(steps):
        params, state, value = step(params, state, *make_batch())
        losses.append(float(value))
    return params, state, losses


@pytest.mark.parametrize(
    ("hold", "compiler"), [*((hold, "fo.jit") for hold in HOLDS), ("int8", "jax.jit")]
)
def test_a_backbone_of_few_bits_keeps_them_all(hold, compiler):
    before = make_params(hold)
    step = COMPILERS[compiler](make_step(make_loss()))
    fo.assert_update_freezes(TX, before, TX)
    fo.assert_step_freezes(step, before, TX.init(before), *make_batch(), frozen=TX, exact=True)
    after, state, losses = train(step, before)
    assert losses[-1] < losses[0]
    assert same_objects(bases(before), bases(after)) == (compiler == "fo.jit")
    for old, new in zip(bases(before), bases(after), strict=True):
        assert old.dtype == new.dtype
        np.testing.assert_array_equal(host_bits(old), host_bits(new))
    fo.assert_frozen(before, after, TX)
    trained = jax.tree.leaves(fo.partition(after, TX)[0])
    assert len(trained) == 5
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert {leaf.dtype for leaf in (*trained, *moments)} == {jnp.dtype("float32")}
    assert [leaf.shape for leaf in moments] == 2 * [leaf.shape for leaf in trained]


@pytest.mark.parametrize("hold", ["bfloat16", "int8"])
def test_adapters_train_as_on_what_the_bits_stand_for(hold):
    few_bits = make_params(hold)
    whole = few_bits | {"layers": [
        layer | {"base": {"w": as_float32(layer["base"])}} for layer in few_bits["layers"]
    ]}  # fmt: skip
    step = fo.jit(make_step(make_loss()), frozen=TX)
    (after, _, losses), (expected, _, expected_losses) = train(step, few_bits), train(step, whole)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    trained, wanted = (fo.partition(tree, TX, prune=True)[0] for tree in (after, expected))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), trained, wanted)


# --- host memory


def places(is_sharded):
    """A place in each memory that the backend has, and the one in which it computes."""
    device = jax.devices()[0]
    if is_sharded:
        mesh = Mesh(np.array(jax.devices()), "x")
        make = lambda kind: NamedSharding(mesh, P("x"), memory_kind=kind)
    else:
        make = lambda kind: SingleDeviceSharding(device, memory_kind=kind)
    kinds = [memory.kind for memory in device.addressable_memories()]
    return [make(kind) for kind in kinds], make(device.default_memory().kind)


def test_this_backend_has_the_memory_that_is_tested():
    kinds = {memory.kind for memory in jax.devices()[0].addressable_memories()}
    of_first = jax.devices()[0].default_memory().kind
    assert of_first in kinds
    # jax 0.7.0 knows one memory of a CPU, newer ones three.
    assert kinds == {"unpinned_host"} or {"pinned_host", "device"} <= kinds


@pytest.mark.parametrize("is_sharded", [False, True], ids=["one device", "sharded"])
def test_a_backbone_in_host_memory_stays_there(is_sharded):
    in_each_memory, on_device = places(is_sharded)
    on_all = on_device if not is_sharded else NamedSharding(on_device.mesh, P())
    fetch = functools.partial(jax.tree.map, lambda leaf: jax.device_put(leaf, on_device))
    step = fo.jit(make_step(make_loss(fetch)), frozen=TX, donate_argnums=(0, 1))
    known = make_params("bfloat16")
    fingerprint = fo.fingerprint(known, TX)
    expected = train(fo.jit(make_step(make_loss()), frozen=TX), known)[2]
    for place in in_each_memory:
        before = jax.device_put(make_params("bfloat16"), on_all)
        for layer in before["layers"]:
            layer["base"] = jax.device_put(layer["base"], place)
        state = jax.tree.map(
            lambda leaf: leaf if leaf.committed else jax.device_put(leaf, on_all), TX.init(before)
        )
        assert fo.fingerprint(before, TX) == fingerprint
        fo.assert_step_freezes(step, before, state, *make_batch(), frozen=TX, exact=True)
        after, _, losses = train(step, before, state)
        assert {leaf.sharding.memory_kind for leaf in bases(after)} == {place.memory_kind}
        assert same_objects(bases(before), bases(after))
        fo.assert_frozen(before, after, TX, expect_movement=False)
        assert fo.fingerprint(after, TX) == fingerprint
        fo.assert_fingerprint(after, fingerprint)
        np.testing.assert_allclose(losses, expected, rtol=1e-4)


def test_what_changed_in_host_memory_has_another_fingerprint():
    for place in places(is_sharded=True)[0]:
        leaf = np.arange(64, dtype=np.float32)
        digest = fo.fingerprint({"a": jax.device_put(leaf, place)}, "a")
        assert digest == fo.fingerprint({"a": leaf}, "a")
        leaf[3] = -leaf[3]
        with pytest.raises(AssertionError, match="a: float32"):
            fo.assert_fingerprint({"a": jax.device_put(leaf, place)}, digest)


# --- what is kept of the trained part


def test_an_average_of_the_trained_leaves_alone():
    params = make_params("int8")
    keep = lambda params: fo.partition(params, TX, prune=True)[0]

    @fo.jit(frozen=TX, donate_argnums=(0, 1, 2))
    def step(params, state, average, x, y):
        params, state, value = make_step(make_loss())(params, state, x, y)
        return params, state, optax.incremental_update(keep(params), average, 0.25), value

    before = bases(params)
    average = expected = jax.tree.map(jnp.copy, keep(params))
    assert len(jax.tree.leaves(average)) == 5
    expected = jax.tree.map(np.asarray, expected)
    state = TX.init(params)
    for _ in range(3):
        params, state, average, _ = step(params, state, average, *make_batch())
        trained = jax.tree.map(np.asarray, keep(params))
        expected = jax.tree.map(lambda new, old: 0.25 * new + 0.75 * old, trained, expected)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), average, expected)
    averaged = fo.combine(average, fo.partition(params, TX)[1])  # the model to evaluate
    assert same_objects(bases(averaged), before)
    assert same_objects(bases(params), before)
    fo.assert_frozen(params, averaged, TX)


@pytest.mark.parametrize("hold", ["bfloat16", "int8"])
def test_merged_adapters_say_what_the_adapted_model_says(hold):
    params, _, _ = train(fo.jit(make_step(make_loss()), frozen=TX), make_params(hold))
    merged = params | {"layers": [
        {
            "base": {"w": as_float32(layer["base"]) + layer["lora_a"] @ layer["lora_b"]},
            "lora_a": jnp.zeros_like(layer["lora_a"]),
            "lora_b": jnp.zeros_like(layer["lora_b"]),
        }
        for layer in params["layers"]
    ]}  # fmt: skip
    with jax.default_matmul_precision("float32"):  # a GPU multiplies fewer bits by default
        told, wanted = (make_loss()(tree, *make_batch()) for tree in (merged, params))
    np.testing.assert_allclose(told, wanted, rtol=1e-5)
