"""The report: rows that say what is frozen, bytes that are right, a text the same everywhere."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import host_devices
from jax import export
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

import frozen_optax as fo
from frozen_optax import summary

BFLOAT16 = jnp.bfloat16


def spec(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def model():
    """Two blocks below an encoder and a head: 2 * (64 * 64 + 64) + 64 * 10 + 10 parameters."""
    block = {"bias": spec(64), "kernel": spec(64, 64)}
    return {
        "encoder": {"block_0": block, "block_1": block},
        "head": {"bias": spec(10), "kernel": spec(64, 10)},
    }


def adapted(layers):
    """A stack of layers as LoRA leaves it: a frozen kernel and two trained factors in each."""
    linear = {"kernel": spec(32, 32, dtype=BFLOAT16), "lora_a": spec(32, 4), "lora_b": spec(4, 32)}
    layer = {
        "attention": {"q": linear, "v": linear},
        "mlp": {"down": spec(64, 32), "up": spec(32, 64)},
    }
    return {"embed": spec(100, 32), "layers": [layer] * layers}


def state_bytes(optimizer, params):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(optimizer.init(params)))


def shown(report):
    return [(row.path, row.frozen) for row in report.rows]


# Rows


def test_a_row_is_the_largest_subtree_of_one_kind():
    assert shown(summary(model(), "encoder")) == [("encoder", True), ("head", False)]
    assert shown(summary(model(), "encoder/block_0")) == [
        ("encoder/block_0", True),
        ("encoder/block_1", False),
        ("head", False),
    ]


def test_modules_have_rows_when_all_is_frozen_or_nothing():
    assert shown(summary(model(), True)) == [("encoder", True), ("head", True)]
    assert shown(summary(model(), False)) == [("encoder", False), ("head", False)]


def test_a_level_without_branches_does_not_count():
    report = summary({"params": {"model": model()}}, "params/model/encoder")
    assert shown(report) == [("params/model/encoder", True), ("params/model/head", False)]


def test_depth_counts_branches_before_subtrees_become_rows():
    assert shown(summary(model(), True, depth=0)) == [("", True)]
    assert [row.path for row in summary(model(), True, depth=2).rows] == [
        "encoder/block_{0,1}",
        "head/bias",
        "head/kernel",
    ]
    leaves = summary(model(), True, depth=100).rows
    assert [row.path for row in leaves[:2]] == [
        "encoder/block_{0,1}/bias",
        "encoder/block_{0,1}/kernel",
    ]
    assert all(row.shape is not None for row in leaves)


def test_rows_cover_every_leaf_once_and_select_what_they_say():
    params, frozen = adapted(12), fo.by_path("embed", "**/kernel", "layers/[0-4]/mlp")
    report = summary(params, frozen)
    for is_frozen, selector in [(True, frozen), (False, ~frozen)]:
        paths = [path for row in report.rows if row.frozen == is_frozen for path in row.paths]
        assert fo.by_path(*paths).paths(params) == selector.paths(params)
    assert (
        report.all.leaves == sum(row.leaves for row in report.rows) == len(jax.tree.leaves(params))
    )


def test_alike_subtrees_of_other_numbers_share_a_row():
    report = summary(adapted(32), trainable="**/lora_*")
    assert shown(report) == [
        ("embed", True),
        ("layers/{0..31}/attention/q/kernel", True),
        ("layers/{0..31}/attention/q/lora_a", False),
        ("layers/{0..31}/attention/q/lora_b", False),
        ("layers/{0..31}/attention/v/kernel", True),
        ("layers/{0..31}/attention/v/lora_a", False),
        ("layers/{0..31}/attention/v/lora_b", False),
        ("layers/{0..31}/mlp", True),
    ]
    kernel = report.rows[1]
    assert (kernel.leaves, kernel.shape, kernel.dtypes) == (32, (32, 32), ("bfloat16",))
    assert (kernel.parameters, kernel.bytes) == (32 * 32 * 32, 2 * 32 * 32 * 32)
    assert kernel.paths[31] == "layers/31/attention/q/kernel"


def test_frozen_and_trained_subtrees_never_share_a_row():
    assert shown(summary(adapted(12), "layers/[0-46-9]"))[1:] == [
        ("layers/{0..4,6..9}", True),
        ("layers/{5,10,11}", False),
    ]


@pytest.mark.parametrize(
    "other",
    [spec(5), spec(4, dtype=BFLOAT16), {"w": spec(4)}],
    ids=["shape", "dtype", "structure"],
)
def test_subtrees_that_are_not_alike_share_no_row(other):
    report = summary({"layer_0": spec(4), "layer_1": spec(4), "layer_2": other}, True)
    assert [row.path for row in report.rows][:1] == ["layer_{0,1}"]
    assert [row.leaves for row in report.rows] == [2, 1]


def test_a_pattern_of_two_numbers_stands_for_every_pair_of_them():
    tree = {f"a_{i}": {f"b_{j}": {"c": spec(2)} for j in range(3)} for i in range(4)}
    assert [row.path for row in summary(tree, True, depth=2).rows] == ["a_{0..3}/b_{0..2}/c"]
    del tree["a_3"]["b_1"]
    assert [row.path for row in summary(tree, True, depth=2).rows] == [
        "a_{0..2}/b_{0..2}/c",
        "a_3/b_{0,2}/c",
    ]


def test_rows_stand_in_the_order_of_the_tree():
    tree = [
        {"b_0": spec(2), "b_1": spec(2)},
        {"m": spec(5), "n": spec(6)},
        {"b_0": spec(2), "c": spec(7)},
    ]
    assert [row.path for row in summary(tree, True, depth=2).rows] == [
        "0/b_{0,1}",
        "1/m",
        "1/n",
        "2/b_0",
        "2/c",
    ]


@jax.tree_util.register_pytree_with_keys_class
class Twins(list):
    """Two leaves of the same path."""

    def tree_flatten_with_keys(self):
        return [(jax.tree_util.GetAttrKey("twin"), leaf) for leaf in self], None

    @classmethod
    def tree_unflatten(cls, _, leaves):
        return cls(leaves)


def test_leaves_of_the_same_path_keep_their_own_status():
    twins = Twins([spec(2), spec(2)])
    assert shown(summary(twins, Twins([True, False]))) == [("twin", True), ("twin", False)]
    assert [(row.path, row.leaves) for row in summary(twins, True, depth=3).rows] == [("twin", 2)]


def test_scattered_numbers_are_short_in_the_path_alone():
    (row,) = summary({f"l{i}": spec(2) for i in range(0, 40, 2)}, True).rows
    assert row.path == "l{0,2,4,...,38}"
    assert sorted(row.paths, key=len) == sorted((f"l{i}" for i in range(0, 40, 2)), key=len)


def test_the_root_holes_and_empty_trees_have_their_report():
    assert [row.paths for row in summary(spec(3), True).rows] == [("",)]
    assert "(the root)" in str(summary(spec(3), True))
    report = summary({}, False, optax.adam(1e-3))
    assert (report.rows, report.trained_fraction, report.memory.parameters) == ((), 0.0, 0)
    assert "0 leaves" in str(report)
    assert shown(summary({"a": optax.MaskedNode(), "b": None, "c": spec(3)}, "a")) == [("c", False)]


def test_a_frozen_nnx_model_reads_like_its_parameters():
    layer = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    assert shown(summary(nnx.state(layer, nnx.Param), "bias")) == [
        ("bias", True),
        ("kernel", False),
    ]


# Parameters and bytes


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("bool", 7),
        ("int2", 2),
        ("int4", 4),
        ("uint4", 4),
        ("int8", 7),
        ("uint32", 28),
        ("float4_e2m1fn", 4),
        ("float8_e8m0fnu", 7),
        ("float8_e5m2fnuz", 7),
        ("bfloat16", 14),
        ("float32", 28),
        ("complex64", 56),
    ],
)
def test_bytes_are_those_of_the_dtype_packed(dtype, expected):
    report = summary({"x": spec(7, dtype=jnp.dtype(dtype)), "w": spec(2)}, "x")
    assert report.frozen == dataclasses.replace(
        report.frozen, leaves=1, parameters=7, bytes=expected
    )
    assert report.rows[1].dtypes == (dtype,)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_a_prng_key_is_one_parameter_and_takes_its_key_data(impl):
    keys = jax.random.split(jax.random.key(0, impl=impl), 5)
    report = summary({"keys": keys, "w": spec(2)}, "keys", optax.adam(1e-3))
    assert (report.frozen.parameters, report.frozen.bytes) == (5, jax.random.key_data(keys).nbytes)


def test_leaves_of_every_kind_are_reported():
    params = {
        "function": len,
        "host": np.zeros(3),
        "host_scalar": np.float32(1),
        "scalar": 1.0,
        "w": jnp.ones(2),
    }
    rows = {
        row.path: (row.shape, row.dtypes, row.parameters, row.bytes)
        for row in summary(params, "w").rows
    }
    assert rows == {
        "function": (None, ("builtin_function_or_method",), 0, 0),
        "host": ((3,), ("float64",), 3, 24),
        "host_scalar": ((), ("float32",), 1, 4),
        "scalar": ((), ("float32",), 1, 4),
        "w": ((2,), ("float32",), 2, 8),
    }


def test_a_subtree_names_its_dtypes_and_only_a_shared_shape():
    tree = {"a": {"x": spec(3), "y": spec(4, dtype=BFLOAT16)}, "b": {"x": spec(3), "y": spec(3)}}
    a, b = summary(tree, True).rows
    assert (a.shape, a.dtypes, a.leaves) == (None, ("float32", "bfloat16"), 2)
    assert (b.shape, b.dtypes, b.leaves) == ((3,), ("float32",), 2)


def test_totals_say_how_much_is_trained():
    report = summary(model(), "encoder")
    assert report.trained == dataclasses.replace(
        report.trained, leaves=2, parameters=650, bytes=2600
    )
    assert report.frozen.parameters == 8320
    assert report.all.parameters == 8970
    assert report.trained_fraction == 650 / 8970


# Memory


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.sgd(0.1),
        optax.adamw(1e-3),
        optax.lbfgs(),
        optax.chain(optax.clip_by_global_norm(1.0), optax.lion(1e-4)),
    ],
    ids=["sgd", "adamw", "lbfgs", "chain"],
)
def test_optimizer_state_is_that_of_init_with_and_without(optimizer):
    params = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), model())
    report = summary(params, "encoder", optimizer)
    assert report.memory.optimizer_state == state_bytes(
        fo.with_frozen(optimizer, "encoder"), params
    )
    assert report.memory_without_freezing.optimizer_state == state_bytes(optimizer, params)


def test_the_optimizer_may_be_the_one_that_freezes():
    params = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), model())
    tx = fo.with_frozen(optax.adamw(1e-3), "encoder")
    assert str(summary(params, tx, tx)) == str(summary(params, tx, optax.adamw(1e-3)))


def test_memory_is_parameters_trained_gradients_and_state():
    report = summary(model(), "encoder", optax.adam(1e-3))
    memory, without = report.memory, report.memory_without_freezing
    assert (memory.parameters, memory.gradients, memory.optimizer_state) == (
        35880,
        2600,
        2 * 2600 + 4,
    )
    assert (without.parameters, without.gradients, without.optimizer_state) == (
        35880,
        35880,
        2 * 35880 + 4,
    )
    assert memory.total == 35880 + 3 * 2600 + 4


def test_what_cannot_be_differentiated_has_no_gradient():
    params = {"steps": spec(3, dtype=jnp.int32), "w": spec(2)}
    assert summary(params, False).memory.gradients == 8


def test_without_an_optimizer_there_is_no_state_and_no_total():
    report = summary(model(), "encoder")
    assert report.memory.optimizer_state is None
    assert report.memory.total is None
    assert "optimizer state" not in str(report)
    assert report.note == ""


def test_leaves_an_optimizer_cannot_take_prevent_comparison():
    params = {"steps": jnp.ones(3, jnp.int32), "w": jnp.ones(3)}
    report = summary(params, "steps", optax.lbfgs())
    assert report.memory.optimizer_state == state_bytes(optax.lbfgs(), {"w": jnp.ones(3)})
    assert report.memory_without_freezing.optimizer_state is None
    assert report.memory_without_freezing.total is None
    assert report.memory_without_freezing.gradients == 12
    assert "OverflowError" in report.note
    assert "n/a" in str(report)
    assert report.note in str(report)


def test_a_leaf_that_is_no_array_is_frozen_and_no_obstacle():
    params = {"activation": len, "base": spec(2), "w": spec(3)}
    report = summary(params, "base", optax.adam(1e-3))
    assert {row.path: row.frozen for row in report.rows} == {
        "activation": True,
        "base": True,
        "w": False,
    }
    assert report.memory.optimizer_state == 28
    assert report.memory_without_freezing.optimizer_state == 44
    assert not report.note


@pytest.mark.parametrize("leaf", [1.0, np.ones(3)], ids=["a Python scalar", "64 bits on the host"])
def test_a_leaf_that_cannot_be_frozen_is_refused_by_path(leaf):
    params = {"scale": leaf, "w": jnp.ones(3)}
    assert summary(params, "scale").frozen.leaves == 1
    with pytest.raises(TypeError, match="'scale'"):
        summary(params, "scale", optax.adam(1e-3))
    assert summary(params, trainable="scale", optimizer=optax.sgd(1e-3)).memory.optimizer_state == 0


def test_nothing_is_allocated_for_a_model_that_fits_nowhere():
    layer = {"k": spec(8192, 28672, dtype=BFLOAT16), "q": spec(8192, 8192, dtype=BFLOAT16)}
    params = {"embed": spec(128256, 8192, dtype=BFLOAT16), "layers": [layer] * 80}
    report = summary(params, trainable="layers/79", optimizer=optax.adamw(1e-3))
    assert shown(report) == [("embed", True), ("layers/{0..78}", True), ("layers/79", False)]
    assert report.memory_without_freezing.total > 2**37


def test_a_report_can_be_had_while_tracing():
    @jax.jit
    def step(params):
        reports.append(summary(params, "a", optax.adam(1e-3)))
        return params

    reports = []
    step({"a": jnp.ones(2), "b": jnp.ones(3)})
    assert reports[0].memory.optimizer_state == 28


# Memory per device


def test_without_shardings_a_device_takes_all():
    report = summary(
        {"a": np.ones(3, np.float32), "b": jnp.ones(2), "c": spec(4)}, "a", optax.adam(1e-3)
    )
    assert report.memory_per_device == report.memory
    assert "per device" not in str(report)


def test_a_device_takes_its_shards_of_what_memory_counts():
    mesh = jax.make_mesh((8,), ("data",), devices=host_devices(8))
    split, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    params = {
        "frozen": jax.device_put(jnp.ones((16, 4)), split),  # 256 bytes, 32 of them on a device
        "keys": jax.device_put(jax.random.split(jax.random.key(0), 8), split),  # 64, 8
        "replicated": jax.device_put(jnp.ones(4), whole),  # 16, 16
        "split": jax.device_put(jnp.ones((8, 2)), split),  # 64, 8
    }
    report = summary(params, ["frozen", "keys"], optax.adam(1e-3))
    memory, device = report.memory, report.memory_per_device
    assert (memory.parameters, memory.gradients, memory.optimizer_state) == (400, 80, 164)
    assert (device.parameters, device.gradients, device.optimizer_state) == (64, 24, 52)
    assert report.memory_per_device_without_freezing.gradients == 56
    assert report.frozen.bytes == 320
    assert "per device" in str(report)


def test_the_estimate_is_what_devices_hold_beside_parameters():
    mesh = jax.make_mesh((4, 2), ("x", "y"), devices=host_devices(8))
    put = lambda shape, *axes: jax.device_put(
        jnp.ones(shape), NamedSharding(mesh, PartitionSpec(*axes))
    )
    params = {"encoder": put((8, 8), "x", "y"), "head": put((8, 4), None, "y"), "norm": put((4,))}
    tx = fo.with_frozen(optax.adam(1e-3), "encoder")
    shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
    state = tx.init(params)
    mu = optax.tree_utils.tree_get(state, "mu")
    moments = sum(
        np.prod(shardings[name].shard_shape(moment.shape)) * 4
        for name, moment in mu.items()
        if hasattr(moment, "shape")
    )
    report = summary(params, "encoder", optax.adam(1e-3))
    held = sum(
        shard.data.nbytes
        for leaf in params.values()
        for shard in leaf.addressable_shards
        if shard.device == host_devices()[0]
    )
    assert report.memory_per_device.parameters == held
    assert report.memory_per_device.optimizer_state == 2 * moments + 4


def test_an_abstract_mesh_is_enough_to_plan_with():
    sharding = NamedSharding(AbstractMesh((256,), ("fsdp",)), PartitionSpec("fsdp"))
    params = {
        name: jax.ShapeDtypeStruct((512, 4), jnp.float32, sharding=sharding)
        for name in ("encoder", "head")
    }
    report = summary(params, "encoder", optax.adam(1e-3))
    assert report.memory_per_device.parameters == report.memory.parameters // 256 == 64
    assert report.memory_per_device.optimizer_state == 2 * 32 + 4


def test_a_sharding_that_does_not_divide_names_the_path():
    sharding = NamedSharding(AbstractMesh((8,), ("x",)), PartitionSpec("x"))
    with pytest.raises(ValueError, match="'head'"):
        summary({"head": jax.ShapeDtypeStruct((4,), jnp.float32, sharding=sharding)}, False)


# Text


TEXT = """\
path               leaves   dtype     parameters      bytes
---------------------------------------------------------------------
encoder          4 leaves   float32        8,320   32.5 KiB   frozen
head/bias           (10,)   float32           10       40 B   frozen
head/kernel      (64, 10)   float32          640   2.50 KiB   trained
---------------------------------------------------------------------
trained, 7.13%     1 leaf                    640   2.50 KiB
frozen           5 leaves                  8,330   32.5 KiB
all              6 leaves                  8,970   35.0 KiB

memory            with freezing    without
------------------------------------------
parameters             35.0 KiB   35.0 KiB
gradients              2.50 KiB   35.0 KiB
optimizer state        5.00 KiB   70.1 KiB
------------------------------------------
total                  42.5 KiB    140 KiB"""


def report_of_text():
    return summary(model(), ["encoder", "head/bias"], optax.adam(1e-3))


def test_the_text_is_plain_and_aligned():
    assert str(report_of_text()) == TEXT
    assert repr(report_of_text()) == TEXT


@pytest.mark.parametrize(
    "environment", [{"COLUMNS": "20"}, {"FORCE_COLOR": "1"}, {"NO_COLOR": "1", "TERM": "dumb"}]
)
def test_the_text_depends_on_no_terminal(monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert str(report_of_text()) == TEXT


def test_rich_prints_it_in_colour():
    from rich.console import Console

    console = Console(width=120, force_terminal=True, color_system="standard", legacy_windows=False)
    with console.capture() as capture:
        console.print(report_of_text())
    assert "\x1b[32mtrained" in capture.get()
    assert "optimizer state" in capture.get()


def test_a_notebook_gets_html_with_paths_escaped():
    html = summary({"<script>": spec(3), "w": spec(2)}, "w")._repr_html_()
    assert html.startswith("<pre")
    assert html.endswith("</pre>")
    assert "&lt;script&gt;" in html
    assert "<script>" not in html


def test_paths_are_shown_as_they_are():
    tree = {"[bold]a[/bold]": spec(3), ":smile:": spec(2), "x" * 100: spec(1)}
    text = str(summary(tree, False))
    assert "[bold]a[/bold]" in text
    assert ":smile:" in text
    assert text.count("x") >= 100


def test_of_thousands_of_rows_the_text_shows_some():
    tree = {
        "".join(chr(97 + (i // 26**k) % 26) for k in range(3)): spec(i + 1) for i in range(1000)
    }
    trained = lambda path, leaf: leaf.shape[0] > 990
    report = summary(tree, trainable=trained)
    text = str(report)
    assert len(report.rows) == 1000
    assert len(text.splitlines()) < 60
    assert sum(line.endswith(" trained") for line in text.splitlines()) == 10
    hidden = sum(row.parameters for row in [row for row in report.rows if row.frozen][30:])
    (more,) = [line.split() for line in text.splitlines() if "more rows" in line]
    assert more[:6] == ["(960", "more", "rows)", "960", "leaves", f"{hidden:,}"]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((0,), "0 B"),
        ((1023,), "1023 B"),
        ((1024,), "1.00 KiB"),
        ((10 * 1024 - 1,), "10.0 KiB"),
        ((100 * 1024 - 1,), "100 KiB"),
        ((1024, 1023), "1023 KiB"),
        ((3, 2**20, 2**19), "1.50 TiB"),
        ((2**30, 2**30, 2**20), "1073741824 PiB"),
    ],
)
def test_sizes_are_shown_with_three_digits_or_four_and_a_unit(shape, expected):
    line = str(summary({"x": spec(*shape, dtype=jnp.int8)}, True)).splitlines()[2]
    assert line.removesuffix("frozen").endswith(f"  {expected}   ")


# Arguments


def test_exactly_one_of_frozen_and_trainable_is_given():
    with pytest.raises(TypeError, match="neither"):
        summary(model())
    with pytest.raises(TypeError, match="both"):
        summary(model(), "encoder", trainable="head")


def test_a_pattern_that_selects_nothing_is_an_error():
    with pytest.raises(ValueError, match="encodr"):
        summary(model(), "encodr")


def test_a_symbolic_shape_is_refused_by_path():
    leaf = jax.ShapeDtypeStruct(export.symbolic_shape("n, 2"), jnp.float32)
    with pytest.raises(TypeError, match=r"the leaf at 'encoder/w' has the symbolic shape \(n, 2\)"):
        fo.summary({"encoder": {"w": leaf}, "head": jnp.ones(2)}, "encoder")
