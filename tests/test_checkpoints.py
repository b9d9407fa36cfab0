"""`save_trained` and `load_trained`: what was trained comes back to the bit, onto its backbone."""

import subprocess
import sys
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import trying
from containers import CONTAINERS, Pair
from flax import nnx
from flax.training.train_state import TrainState
from flax_runs import Net, linen_params, linen_step
from helpers import assert_same_bits, host_bits, host_devices, paths_of, same_objects
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import frozen_optax as fo

BACKBONE = {"w": jnp.array([-0.0, 1e-45, jnp.nan]), "table": jnp.arange(4)}


def zeros_like(leaf: Any) -> Any:
    """A leaf of the same kind at the same place, with other bits."""
    if isinstance(leaf, (bool, int, float, complex)):
        return type(leaf)(0)
    if isinstance(leaf, np.generic):
        return np.zeros((), leaf.dtype)[()]
    if isinstance(leaf, np.ndarray):
        return np.zeros(leaf.shape, leaf.dtype)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = jnp.zeros_like(jax.random.key_data(leaf))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    host = np.zeros(leaf.shape, leaf.dtype)
    return jax.device_put(host, leaf.sharding) if leaf.committed else jnp.asarray(host)


def carried(directory: Any, trained: dict[str, Any], into: Any = None) -> dict[str, Any]:
    """Leaves that were saved beside a backbone and loaded onto it, in the place of zeros."""
    fo.save_trained(directory / "saved", {"backbone": BACKBONE, "trained": trained}, "backbone")
    into = {name: zeros_like(leaf) for name, leaf in trained.items()} if into is None else into
    loaded = fo.load_trained(directory / "saved", {"backbone": BACKBONE, "trained": into})
    assert same_objects(BACKBONE, loaded["backbone"])
    return loaded["trained"]


def values(dtype: Any) -> np.ndarray:
    """All bit patterns of a narrow type, some thousand of a wide one."""
    if dtype.itemsize <= 2 and dtype in trying.NARROW.values():
        return trying.every_pattern(dtype)
    words = np.random.default_rng(0).integers(0, 256, (2048, dtype.itemsize), np.uint8)
    return words[:, 0] > 127 if dtype == np.bool_ else words.view(dtype)[:, 0]


NUMPYS = [
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
]


def test_every_dtype_keeps_every_bit(x64: bool, tmp_path: Any) -> None:
    host = {str(dtype): values(dtype) for dtype in map(np.dtype, NUMPYS)}
    host |= {name: values(dtype) for name, dtype in trying.NARROW.items()}
    device = {
        f"device {name}": jnp.asarray(leaf)
        for name, leaf in host.items()
        if trying.device_has(leaf.dtype)
    }
    assert ("device float64" in device) is x64
    assert {"device int4", "device float8_e4m3fn", "device bfloat16"} <= device.keys()
    trained = host | device
    loaded = carried(tmp_path, trained)
    assert_same_bits(trained, loaded)
    for name, leaf in loaded.items():
        assert isinstance(leaf, jax.Array if name in device else np.ndarray), name


def test_shapes_and_kinds_of_leaves_that_are_not_plain(tmp_path: Any) -> None:
    struct = np.zeros(3, [("x", "i4"), ("y", "f8", (2,))])
    struct["y"][1] = -0.0
    trained = {
        "0-d": jnp.array(-0.0),
        "0-d fp8": jnp.array(1.5, "float8_e5m2"),
        "empty": jnp.zeros((0, 3), "int4"),
        "empty on the host": np.zeros((2, 0), ">f4"),
        "scalar": np.float64(-0.0),
        "narrow scalar": trying.NARROW["bfloat16"].type(2),
        "struct": struct,
        "another byte order": np.arange(3, dtype=">f4"),
        "nothing": np.zeros(3, jax.dtypes.float0),
        "turned": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    }
    if hasattr(ml_dtypes, "complex32"):
        trained["half complex"] = np.array([1 - 2j, complex(-0.0, np.inf)], ml_dtypes.complex32)
    loaded = carried(tmp_path, trained)
    assert_same_bits(trained, loaded)
    for name, leaf in trained.items():
        assert isinstance(loaded[name], np.generic) == isinstance(leaf, np.generic), name


def test_python_numbers_come_back_as_such(tmp_path: Any) -> None:
    trained = {"i": -(2**62), "f": -0.0, "nan": float("nan"), "c": complex(0.0, -0.0), "b": True}
    loaded = carried(tmp_path, trained)
    for name, number in trained.items():
        assert type(loaded[name]) is type(number)
        assert repr(loaded[name]) == repr(number)


WEAK = {"int": 3, "float": -0.0, "complex": complex(-0.0, 1)}


def weak_leaves() -> dict[str, Any]:
    """Weakly typed arrays of each kind and of several shapes, on one device and on eight."""
    mesh = jax.make_mesh((8,), ("x",), devices=host_devices(8))
    found = {}
    for name, number in WEAK.items():
        one = jnp.asarray(number)
        many = jnp.broadcast_to(one, (16, 2)).at[1].set(7)
        found |= {f"{name} 0-d": one, f"{name} 2-d": many, f"{name} empty": many[:0]}
        found[f"{name} put"] = jax.device_put(many, host_devices()[1])
        for spec in (P(), P("x")):
            found[f"{name} {spec}"] = jax.device_put(many, NamedSharding(mesh, spec))
    return found


def test_weak_types_are_those_that_were_saved(x64: bool, tmp_path: Any) -> None:
    trained = weak_leaves()
    assert all(leaf.weak_type for leaf in trained.values())
    strong = {f"strong {name}": zeros_like(leaf) for name, leaf in trained.items()}
    loaded = carried(tmp_path, trained | strong)
    assert_same_bits(trained | strong, loaded)
    for name, leaf in loaded.items():
        assert leaf.weak_type is (name in trained), name
        assert leaf.sharding == (trained | strong)[name].sharding
        assert leaf.committed == (trained | strong)[name].committed
    # What stands in its place says nothing of it, nor of what it is on the host.
    on_host = {"float 0-d": np.float32(0), "int 0-d": jax.ShapeDtypeStruct((), jnp.int32)}
    if not x64:
        into = trained | strong | on_host
        loaded = fo.load_trained(tmp_path / "saved", {"backbone": BACKBONE, "trained": into})
        assert loaded["trained"]["int 0-d"].weak_type
        assert type(loaded["trained"]["float 0-d"]) is np.float32


def test_a_step_is_not_traced_anew_for_what_is_loaded(tmp_path: Any) -> None:
    traces = []

    @fo.jit(frozen="backbone")
    def step(params: Any) -> Any:
        traces.append(1)
        return params | {"scale": params["scale"] * 2}

    params = {"backbone": jnp.ones(2, jnp.bfloat16), "scale": jnp.asarray(0.5)}
    params = step(params)
    fo.save_trained(tmp_path / "scale", params, "backbone")
    loaded = fo.load_trained(tmp_path / "scale", params)
    assert float(step(loaded)["scale"]) == 2
    assert (loaded["backbone"] * loaded["scale"]).dtype == jnp.bfloat16
    assert len(traces) == 1


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_keys_of_random_numbers_keep_their_kind(impl: str, tmp_path: Any) -> None:
    mesh = jax.make_mesh((4, 2), ("x", "y"), devices=host_devices(8))
    keys = jax.random.split(jax.random.key(7, impl=impl), 4)
    trained = {
        "one": jax.random.key(3, impl=impl),
        "several": keys,
        "none": keys[:0],
        "sharded": jax.device_put(keys, NamedSharding(mesh, P("x"))),
        "struct": keys,
    }
    into = {name: zeros_like(leaf) for name, leaf in trained.items()}
    into["struct"] = jax.ShapeDtypeStruct(keys.shape, keys.dtype)
    loaded = carried(tmp_path, trained, into)
    assert_same_bits(trained, loaded)
    assert loaded["sharded"].sharding == trained["sharded"].sharding
    assert all(jax.random.key_impl(leaf) == impl for leaf in loaded.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "int4", "uint4"])
@pytest.mark.parametrize("spec", [P("x"), P(None, "x"), P(("x", "y")), P()], ids=str)
def test_shardings_are_those_of_params(dtype: str, spec: P, tmp_path: Any) -> None:
    mesh = jax.make_mesh((4, 2), ("x", "y"), devices=host_devices(8))
    leaf = jnp.asarray(np.random.default_rng(0).integers(-4, 4, (8, 16)), dtype)
    leaf = jnp.abs(leaf) if dtype == "uint4" else leaf
    saved = jax.device_put(leaf, NamedSharding(mesh, P("y", "x")))
    spread, alone = NamedSharding(mesh, spec), SingleDeviceSharding(host_devices()[3])
    into = {
        "spread": jax.device_put(jnp.zeros_like(leaf), spread),
        "struct": jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=spread),
        "alone": jax.device_put(jnp.zeros_like(leaf), alone),
        "anywhere": jnp.zeros_like(leaf),
        "without": jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
        "host": np.zeros(leaf.shape, leaf.dtype),
    }
    loaded = carried(tmp_path, dict.fromkeys(into, saved), into)
    assert_same_bits(dict.fromkeys(into, saved), loaded)
    assert loaded["spread"].sharding == loaded["struct"].sharding == spread
    assert loaded["alone"].sharding == alone
    # What may lie anywhere may be used with what lies on all devices.
    assert not loaded["anywhere"].committed
    assert not loaded["without"].committed
    assert type(loaded["host"]) is np.ndarray


def test_a_sharded_backbone_stays_where_it_is(tmp_path: Any) -> None:
    mesh = jax.make_mesh((8,), ("x",), devices=host_devices(8))
    backbone = jax.device_put(jnp.arange(16.0), NamedSharding(mesh, P("x")))
    params = {"backbone": backbone, "head": jnp.arange(3.0)}
    fo.save_trained(tmp_path / "saved", params, "backbone")
    loaded = fo.load_trained(tmp_path / "saved", params | {"head": jnp.zeros(3)})
    assert loaded["backbone"] is backbone
    # The bits count, not where they lie.
    on_host = fo.load_trained(tmp_path / "saved", params | {"backbone": np.arange(16, dtype="f4")})
    assert_same_bits({"head": params["head"]}, {"head": on_host["head"]})


def test_a_donated_leaf_says_where_to_load(tmp_path: Any) -> None:
    trained = {"head": jax.device_put(jnp.arange(3.0), host_devices()[2])}
    gone = {"head": jax.device_put(jnp.zeros(3), host_devices()[2])}
    gone["head"].delete()
    loaded = carried(tmp_path, trained, gone)
    assert_same_bits(trained, loaded)
    assert loaded["head"].devices() == {host_devices()[2]}


NASTY = ["a", "a/0", "a/.zarray", ".", "..", "../x", "it's", 'q"q', "ü", "", "#2", "%", "x" * 300]


def test_names_that_no_file_may_have_are_kept_apart(tmp_path: Any) -> None:
    trained = {name: jnp.full(2, float(i)) for i, name in enumerate(NASTY)}
    assert_same_bits(trained, carried(tmp_path, trained))
    where = lambda state: tuple(state.values())  # all at one path, the root
    fo.save_trained(tmp_path / "roots", trained, trainable="**", where=where)
    loaded = fo.load_trained(tmp_path / "roots", jax.tree.map(zeros_like, trained), where=where)
    assert_same_bits(trained, loaded)


@pytest.mark.parametrize("kind", CONTAINERS)
def test_every_kind_of_tree_is_loaded_as_it_was_saved(kind: str, tmp_path: Any) -> None:
    make, pattern, _ = CONTAINERS[kind]
    params = jax.tree.map(lambda leaf: leaf + 2 if hasattr(leaf, "dtype") else leaf, make())
    fo.save_trained(tmp_path / "saved", params, trainable=pattern)
    trained = fo.by_path(pattern).mask(params)
    into = jax.tree.map(lambda leaf, yes: zeros_like(leaf) if yes else leaf, params, trained)
    loaded = fo.load_trained(tmp_path / "saved", into)
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    of = lambda tree: dict(enumerate(jax.tree.leaves(tree)))
    assert_same_bits(of(params), of(loaded))
    kept = zip(*map(jax.tree.leaves, (params, loaded, trained)), strict=True)
    assert all(before is after for before, after, yes in kept if not yes)


PARAMS = {"encoder": {"w": jnp.ones(2), "b": jnp.ones(2)}, "head": jnp.arange(3.0)}
ZERO_HEAD = PARAMS | {"head": jnp.zeros(3)}
SAID = {
    "optimizer": {"frozen": fo.with_frozen(optax.adam(0.1), "encoder")},
    "trainable": {"trainable": "head"},
    "selector": {"frozen": ~fo.by_path("head")},
    "list": {"frozen": ["encoder/w", "**/b"]},
    "predicate": {"frozen": lambda path, leaf: path.startswith("encoder")},
    "mask": {"frozen": {"encoder": True, "head": False}},
}


@pytest.mark.parametrize("way", SAID)
def test_frozen_may_be_said_in_every_way(way: str, tmp_path: Any) -> None:
    fo.save_trained(tmp_path / "saved", PARAMS, **SAID[way])
    loaded = fo.load_trained(tmp_path / "saved", ZERO_HEAD)
    assert same_objects(PARAMS["encoder"], loaded["encoder"])
    np.testing.assert_array_equal(loaded["head"], PARAMS["head"])


def test_where_names_the_parameters_in_a_state(tmp_path: Any) -> None:
    where = lambda state: state.params
    frozen = ["encoder/layers_0", "**/bias", "encoder/relic"]
    tx = fo.with_frozen(optax.adam(0.1), frozen)
    state = TrainState.create(apply_fn=Net().apply, params=linen_params(0), tx=tx)
    after = jax.jit(linen_step)(state)
    fo.save_trained(tmp_path / "saved", after, tx, where=where)
    loaded = fo.load_trained(tmp_path / "saved", state, where=where)
    flat = lambda tree: dict(zip(paths_of(tree), jax.tree.leaves(tree), strict=True))
    assert_same_bits(flat(after.params), flat(loaded.params))
    assert same_objects((state.step, state.opt_state), (loaded.step, loaded.opt_state))
    # Paths are those in the parameters, so these alone are loaded as well.
    alone = fo.load_trained(tmp_path / "saved", state.params)
    assert_same_bits(flat(after.params), flat(alone))


def test_a_run_goes_on_bit_for_bit_from_what_was_trained(tmp_path: Any) -> None:
    tx = fo.with_frozen(optax.adam(0.1), "encoder")
    apply_fn, zero = Net().apply, jnp.zeros((), "int32")
    make = lambda: TrainState.create(apply_fn=apply_fn, params=linen_params(0), tx=tx).replace(
        step=zero
    )
    step = jax.jit(linen_step)
    halfway = step(step(make()))
    fo.save_trained(tmp_path / "run", halfway, "params/encoder")
    resumed = fo.load_trained(tmp_path / "run", make())
    expected, continued = step(step(halfway)), step(step(resumed))
    assert int(continued.step) == 4
    fo.assert_trees_bit_identical(expected, continued)
    fo.assert_frozen(make(), continued, tx, where=lambda state: state.params)


def test_an_nnx_model_is_loaded_by_its_state(tmp_path: Any) -> None:
    class Model(nnx.Module):
        def __init__(self, seed: int):
            rngs = nnx.Rngs(seed)
            self.base, self.head = nnx.Linear(2, 3, rngs=rngs), nnx.Linear(3, 1, rngs=rngs)

    trained, model = Model(0), Model(0)
    trained.head.kernel[...] = trained.head.kernel[...] + 1
    fo.save_trained(tmp_path / "saved", nnx.state(trained, nnx.Param), "base")
    base, head = model.base.kernel[...], model.head.kernel[...]
    loaded = fo.load_trained(tmp_path / "saved", nnx.state(model, nnx.Param))
    assert model.head.kernel[...] is head  # until it is put into the model
    nnx.update(model, loaded)
    assert model.base.kernel[...] is base
    np.testing.assert_array_equal(model.head.kernel[...], trained.head.kernel[...])
    # From a state to a pure dict, whose paths are the same.
    pure = fo.load_trained(tmp_path / "saved", nnx.to_pure_dict(nnx.state(Model(0))))
    np.testing.assert_array_equal(pure["head"]["kernel"], trained.head.kernel[...])


def test_an_equinox_model_keeps_its_functions(tmp_path: Any) -> None:
    make = lambda: eqx.nn.MLP(2, 1, 4, 2, key=jax.random.key(0))
    model = make()
    last = lambda model: model.layers[-1].weight
    after = eqx.tree_at(last, model, last(model) + 1)
    fo.save_trained(tmp_path / "saved", after, trainable=["layers/2", "activation"])
    loaded = fo.load_trained(tmp_path / "saved", model)
    np.testing.assert_array_equal(last(loaded), last(after))
    assert loaded.layers[0].weight is model.layers[0].weight
    assert loaded.activation is model.activation
    np.testing.assert_array_equal(loaded(jnp.ones(2)), after(jnp.ones(2)))


def trained_by(tx: Any, params: Any, steps: int = 2) -> Any:
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        params = fo.apply_updates(params, updates)
    return params


def test_a_run_that_freezes_others_loads_it(tmp_path: Any) -> None:
    start = {name: jnp.arange(2.0) for name in ("encoder", "adapter", "head")}
    adapted = trained_by(fo.with_frozen(optax.adam(0.1), trainable="adapter"), start)
    fo.save_trained(tmp_path / "adapter", adapted, trainable="adapter")
    # The next run freezes what the first one has trained, and trains what it has frozen.
    second = fo.with_frozen(optax.adam(0.1), ["encoder", "adapter"])
    loaded = fo.load_trained(tmp_path / "adapter", start)
    assert_same_bits(adapted, loaded)
    finished = trained_by(second, loaded)
    fo.assert_frozen(loaded, finished, second)
    fo.save_trained(tmp_path / "head", finished, second)
    # Its backbone is the first one's result, so they are loaded in turn, and not the second alone.
    again = fo.load_trained(tmp_path / "head", fo.load_trained(tmp_path / "adapter", start))
    assert_same_bits(finished, again)
    with pytest.raises(ValueError, match=r"(?s)1 of 2 frozen leaves have other bits:\n  adapter: "):
        fo.load_trained(tmp_path / "head", start)


def test_everything_may_have_been_trained(tmp_path: Any) -> None:
    fo.save_trained(tmp_path / "saved", PARAMS, trainable="**")
    loaded = fo.load_trained(tmp_path / "saved", jax.tree.map(zeros_like, PARAMS))
    np.testing.assert_array_equal(loaded["head"], PARAMS["head"])


def test_nothing_may_have_been_trained_if_that_is_said(tmp_path: Any) -> None:
    fo.save_trained(tmp_path / "saved", PARAMS, fo.with_frozen(optax.adam(0.1), "**"))
    assert same_objects(PARAMS, fo.load_trained(tmp_path / "saved", PARAMS))
    with pytest.raises(ValueError, match="1 of 3 frozen leaves have other bits"):
        fo.load_trained(tmp_path / "saved", ZERO_HEAD)


def test_only_what_was_trained_is_on_disk(tmp_path: Any) -> None:
    params = {"encoder": jnp.ones(2**22), "head": jnp.ones(2)}  # 16 MiB
    fo.save_trained(tmp_path / "saved", params, "encoder")
    size = sum(each.stat().st_size for each in (tmp_path / "saved").rglob("*") if each.is_file())
    assert size < 50_000


IN_A_LOOP = """
import asyncio, jax.numpy as jnp, frozen_optax as fo
params = {"encoder": jnp.ones(2), "head": jnp.arange(3.0)}
async def cell():
    fo.save_trained("here/saved", params, "encoder")
    return fo.load_trained("here/saved", params | {"head": jnp.zeros(3)})
print(asyncio.run(cell())["head"].tolist())
"""


def test_it_works_where_a_loop_is_running(tmp_path: Any) -> None:
    """As in a notebook; and a path may be relative, and its parents missing."""
    # Its own process: Orbax before 0.11.33 does not close the loops that it makes beside that one.
    done = subprocess.run(
        [sys.executable, "-c", IN_A_LOOP], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout == "[0.0, 1.0, 2.0]\n", done.stderr
    assert (tmp_path / "here/saved").is_dir()


def test_a_checkpoint_is_replaced_if_that_is_said(tmp_path: Any) -> None:
    fo.save_trained(tmp_path / "saved", PARAMS, "encoder")
    other = {"trunk": jnp.ones(2), "tail": jnp.ones(3)}
    with pytest.raises(FileExistsError, match=r"saved'\. Write overwrite=True"):
        fo.save_trained(tmp_path / "saved", other, "trunk")
    np.testing.assert_array_equal(
        fo.load_trained(tmp_path / "saved", ZERO_HEAD)["head"], PARAMS["head"]
    )
    for _ in range(3):
        fo.save_trained(tmp_path / "saved", other, "trunk", overwrite=True)
    loaded = fo.load_trained(tmp_path / "saved", other | {"tail": jnp.zeros(3)})
    np.testing.assert_array_equal(loaded["tail"], other["tail"])
    assert len(list((tmp_path / "saved").iterdir())) == 1


def test_a_pair_of_parts_is_named_by_where(tmp_path: Any) -> None:
    state = {"step": jnp.array(3), "nets": Pair(PARAMS, {"x": jnp.ones(1)})}
    where = lambda state: (state["nets"].encoder, state["nets"].head)
    fo.save_trained(tmp_path / "saved", state, trainable=["head", "x"], where=where)
    into = state | {"nets": Pair(ZERO_HEAD, {"x": jnp.zeros(1)})}
    loaded = fo.load_trained(tmp_path / "saved", into, where=where)
    assert loaded["step"] is state["step"]
    assert host_bits(loaded["nets"].head["x"]).tolist() == host_bits(jnp.ones(1)).tolist()
    np.testing.assert_array_equal(loaded["nets"].encoder["head"], PARAMS["head"])
