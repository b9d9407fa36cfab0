"""One step on eight devices: shardings, collectives, bits, on meshes of every kind."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import host_bits, host_devices, same_objects
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import frozen_optax as fo
from benchmarks.measures import collectives

WIDTH, WIDE, CLASSES, BATCH = 16, 64, 8, 32
ADAMW = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(0.1))
TRAINED = ["adapter", "head"]
TX = fo.with_frozen(ADAMW, trainable=TRAINED)
COMPILERS = {"fo.jit": functools.partial(fo.jit, frozen=TX), "jax.jit": jax.jit}

# The mesh, and how weights and batch lie on it. `up` is (WIDTH, WIDE), `down` (WIDE, WIDTH).
LAYOUTS = {
    "data": ({"data": 8}, {}, P("data")),
    "fsdp": (
        {"data": 8},
        {"up": P("data"), "down": P("data"), "adapter": P("data"), "head": P("data")},
        P("data"),
    ),
    "tensor": ({"model": 8}, {"up": P(None, "model"), "down": P("model")}, P()),
    "fsdp and tensor": (
        {"data": 4, "model": 2},
        {"up": P("data", "model"), "down": P("model", "data"), "head": P("data")},
        P("data"),
    ),
}


def make_params():
    """On one device: an adapter below the frozen matrices, so that gradients pass through them."""
    keys = jax.random.split(jax.random.key(0), 4)
    matrix = lambda key, *shape: jax.random.normal(key, shape) * shape[0] ** -0.5
    # All that arithmetic would lose: -0.0, subnormals, NaNs of either kind with their payloads.
    odd = np.array([0x80000000, 1, 0x7F800001, 0x7FC00123] * 2, np.uint32).view(np.float32)
    odd_half = np.arange(0x7F00, 0x8100, dtype=np.uint16).view("bfloat16")
    return {
        "adapter": {"a": matrix(keys[0], WIDTH, WIDTH)},
        "encoder": {
            "up": {"w": matrix(keys[1], WIDTH, WIDE)},
            "down": {"w": matrix(keys[2], WIDE, WIDTH)},
            "odd": {"single": jnp.asarray(odd), "half": jnp.asarray(odd_half)},
            "counts": jnp.arange(8, dtype="int8"),
            "key": jax.random.key(7),
        },
        "head": {"w": matrix(keys[3], WIDTH, CLASSES)},
    }


def make_mesh(layout, axis_type):
    axes = LAYOUTS[layout][0]
    shape, types = tuple(axes.values()), (axis_type,) * len(axes)
    return jax.make_mesh(shape, tuple(axes), axis_types=types, devices=host_devices())


def put(tree, layout, mesh):
    """The tree on all devices, as the layout says by the name of a part."""
    specs = LAYOUTS[layout][1]

    def place(path, leaf):
        names = [key.key for key in path]
        spec = next((specs[name] for name in names if name in specs), P())
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(place, tree)


def make_batch(layout=None, mesh=None):
    x = jax.random.normal(jax.random.key(1), (BATCH, WIDTH))
    y = jnp.arange(BATCH) % CLASSES
    if mesh is None:
        return x, y
    return jax.device_put((x, y), NamedSharding(mesh, LAYOUTS[layout][2]))


def make_loss(layout=None, mesh=None):
    """The loss; where axis types are explicit, it says where each product lies."""
    explicit = mesh is not None and AxisType.Explicit in mesh.axis_types
    batch = LAYOUTS[layout][2] if mesh else P()
    rows = batch[0] if len(batch) else None
    columns = "model" if mesh is not None and "model" in mesh.axis_names else None

    def product(x, w, of_w, of_product):
        if not explicit:
            return x @ w
        w = jax.sharding.reshard(w, NamedSharding(mesh, of_w))
        out = NamedSharding(mesh, of_product)
        return jnp.einsum("bi,ij->bj", x, w, out_sharding=out)

    def loss(params, x, y):
        encoder = params["encoder"]
        x = x + product(x, params["adapter"]["a"], P(), P(rows))
        hidden = jnp.tanh(product(x, encoder["up"]["w"], P(None, columns), P(rows, columns)))
        x = x + product(hidden, encoder["down"]["w"], P(columns), P(rows))
        found = product(x, params["head"]["w"], P(), P(rows))
        return jnp.mean((found - jax.nn.one_hot(y, CLASSES, dtype=found.dtype)) ** 2)

    return loss


def make_step(loss, tx=TX):
    def step(params, state, x, y):
        value, grads = fo.value_and_grad(loss, tx)(params, x, y)
        updates, state = tx.update(grads, state, params)
        return fo.apply_updates(params, updates), state, value

    return step


@pytest.fixture(autouse=True)
def on_the_host():
    """All of it on the devices that there are eight of, which round alike."""
    with jax.default_device(host_devices(1)[0]):
        yield


@functools.cache
def on_one_device():
    """What two steps on one device end with, and the fingerprint of what is frozen."""
    params, step = make_params(), fo.jit(make_step(make_loss()), frozen=TX)
    state = TX.init(params)
    for _ in range(2):
        params, state, value = step(params, state, *make_batch())
    return params, float(value), fo.fingerprint(params, TX)


def frozen_and_trained(tree):
    trained, frozen = fo.partition(tree, TX)
    return jax.tree.leaves(frozen), jax.tree.leaves(trained)


def shardings(tree):
    return [leaf.sharding for leaf in jax.tree.leaves(tree)]


def lies(leaf, sharding):
    return leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


def by_hand(loss, params, x, y):
    """The program of a step of the trained part alone, the frozen one a constant argument."""

    @jax.jit
    def step(trained, state, frozen, x, y):
        value, grads = jax.value_and_grad(lambda part: loss(part | frozen, x, y))(trained)
        updates, state = ADAMW.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state, value

    trained, frozen = ({name: params[name] for name in part} for part in (TRAINED, ["encoder"]))
    return step.lower(trained, ADAMW.init(trained), frozen, x, y).compile().as_text()


def compiled(layout, axis_type, compiler):
    """A step that donates, compiled for eight devices, and its arguments."""
    mesh = make_mesh(layout, axis_type)
    params = put(make_params(), layout, mesh)
    on_each = NamedSharding(mesh, P())
    # Moments lie as their parameters do; a count is made on one device.
    place = lambda leaf: leaf if leaf.committed else jax.device_put(leaf, on_each)
    state = jax.tree.map(place, TX.init(params))
    args = params, state, *make_batch(layout, mesh)
    step = COMPILERS[compiler](make_step(make_loss(layout, mesh)), donate_argnums=(0, 1))
    if compiler == "fo.jit":
        fo.assert_step_freezes(step, *args, frozen=TX, exact=True)
    return step.lower(*args).compile(), args


AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
# `jax.jit` once, where it has most to keep in place; the others are exhaustive.
ORDINARY = [(layout, AUTO, "fo.jit") for layout in LAYOUTS] + [("fsdp", AUTO, "jax.jit")]
ORDINARY += [(layout, EXPLICIT, "fo.jit") for layout in ("fsdp", "tensor")]
COMBINATIONS = [
    pytest.param(*each, marks=[] if each in ORDINARY else pytest.mark.exhaustive)
    for each in itertools.product(LAYOUTS, [AUTO, EXPLICIT], COMPILERS)
]


@pytest.mark.parametrize(("layout", "axis_type", "compiler"), COMBINATIONS)
def test_a_step_on_eight_devices_is_that_on_one(layout, axis_type, compiler):
    step, (params, state, *batch) = compiled(layout, axis_type, compiler)
    limit = collectives(by_hand(make_loss(layout, make_mesh(layout, axis_type)), params, *batch))
    assert collectives(step.as_text()) == limit  # so none is for a frozen gradient

    expected, expected_value, fingerprint = on_one_device()
    assert fo.fingerprint(params, TX) == fingerprint
    # A donated frozen leaf of `jax.jit` is gone after the step.
    (old, given), places = frozen_and_trained(params), shardings(params)
    for _ in range(2):
        params, state, value = step(params, state, *batch)
    assert all(leaf.is_deleted() for leaf in given)
    new, trained = frozen_and_trained(params)
    assert same_objects(old, new) == (compiler == "fo.jit")
    assert all(map(lies, jax.tree.leaves(params), places))
    assert fo.fingerprint(params, TX) == fingerprint
    kept, moved = frozen_and_trained(expected)
    for leaf, on_one in zip(new, kept, strict=True):
        np.testing.assert_array_equal(host_bits(leaf), host_bits(on_one))

    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    for leaf, on_one in zip(trained, moved, strict=True):
        np.testing.assert_allclose(leaf, on_one, atol=1e-4)
    for moments in (optax.tree_utils.tree_get(state, name) for name in ("mu", "nu")):
        of_trained = [leaf.sharding for leaf in trained]
        assert all(map(lies, jax.tree.leaves(moments), of_trained))


_COLLECTIVE = re.compile(r"= (.*?) (all-reduce|reduce-scatter|all-to-all|all-gather)(?:-start)?\(")


OF_FROZEN = (WIDTH, WIDE)  # no trained leaf has this shape


def reduced_shapes(program):
    """The sizes of all that a program adds up over devices, transposed or not."""
    found = (match for match in _COLLECTIVE.finditer(program) if "reduce" in match[2])
    shapes = {shape for match in found for shape in re.findall(r"\w+\[([\d,]*)\]", match[1])}
    return {tuple(sorted(map(int, shape.split(",")))) for shape in shapes if shape}


def test_gradients_of_frozen_shapes_are_not_added_up():
    mesh = make_mesh("data", AxisType.Auto)
    params, batch = put(make_params(), "data", mesh), make_batch("data", mesh)
    whole = fo.with_frozen(ADAMW, ["encoder/odd", "encoder/counts", "encoder/key"])
    shapes = {}
    for name, tx in {"frozen": TX, "trained": whole}.items():
        step = fo.jit(make_step(make_loss("data", mesh), tx), frozen=tx)
        program = step.lower(params, tx.init(params), *batch).compile().as_text()
        shapes[name] = reduced_shapes(program)
    assert OF_FROZEN not in shapes["frozen"]
    assert (CLASSES, WIDTH) in shapes["frozen"]
    assert OF_FROZEN in shapes["trained"]


# --- shard_map


def mapped_step(mesh):
    """A step in which each device sees its own rows, and adds up gradients by itself."""

    def loss(params, x, y):
        return jax.lax.pmean(make_loss()(params, x, y), "data")

    return jax.shard_map(
        make_step(loss),
        mesh=mesh,
        in_specs=(P(), P(), P("data"), P("data")),
        out_specs=(P(), P(), P()),
    )


@pytest.mark.parametrize("compiler", COMPILERS)
def test_a_step_inside_of_shard_map(compiler):
    mesh = make_mesh("data", AxisType.Auto)
    params = before = put(make_params(), "data", mesh)
    state = TX.init(params)
    step = COMPILERS[compiler](mapped_step(mesh))
    batch = make_batch("data", mesh)
    program = step.lower(params, state, *batch).compile().as_text()
    assert OF_FROZEN not in reduced_shapes(program)
    assert (CLASSES, WIDTH) in reduced_shapes(program)
    for _ in range(2):
        params, state, value = step(params, state, *batch)
    expected, expected_value, fingerprint = on_one_device()
    (old, _), (new, trained) = frozen_and_trained(before), frozen_and_trained(params)
    assert same_objects(old, new) == (compiler == "fo.jit")
    assert all(map(lies, new, shardings(old)))
    fo.assert_frozen(before, params, TX)
    assert fo.fingerprint(params, TX) == fingerprint
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    for leaf, on_one in zip(trained, frozen_and_trained(expected)[1], strict=True):
        np.testing.assert_allclose(leaf, on_one, atol=1e-4)
