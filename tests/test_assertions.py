"""The assertions: they see every bit, name what differs, and work under `chex.chexify`."""

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import trying
from flax import nnx

import frozen_optax as fo


def differ(left, right, match):
    with pytest.raises(AssertionError, match=match):
        fo.assert_trees_bit_identical(left, right)


def test_trees_of_every_dtype_are_the_same_as_themselves():
    tree = {
        name: jnp.ones((2, 2), name)
        for name in ("float32", "bfloat16", "float8_e4m3fn", "int4", "complex64", "bool")
    }
    tree |= {
        "key": jax.random.split(jax.random.key(0)),
        "empty": jnp.ones((0, 3)),
        "none": None,
        "name": "x",
        "f": jnp.sin,
    }
    fo.assert_trees_bit_identical(tree, jax.tree.map(lambda leaf: leaf, tree), tree)
    fo.assert_trees_bit_identical({"w": jnp.ones(3)}, {"w": np.ones(3, np.float32)})


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float8_e5m2"])
def test_what_equality_of_numbers_does_not_see(dtype):
    chex.assert_trees_all_equal({"w": jnp.array([0.0])}, {"w": jnp.array([-0.0])})
    differ(
        {"w": jnp.array([0.0], dtype)},
        {"w": jnp.array([-0.0], dtype)},
        r"w: 1 of 1 elements differ, the first at \[0\]",
    )
    info = ml_dtypes.finfo(dtype)
    nan = {8: np.uint8, 16: np.uint16, 32: np.uint32}[info.bits]
    quiet = (2 ** (info.bits - 1) - 1) - np.arange(2)  # two NaNs
    first, second = (jnp.asarray(np.array([word], nan).view(dtype)) for word in quiet)
    assert np.isnan(np.asarray(first).astype(np.float32))
    differ({"w": first}, {"w": second}, "1 of 1 elements differ")


@pytest.mark.parametrize(
    ("left", "right", "message"),
    [
        (jnp.ones(2), jnp.ones(3), r"float32\[2\] became a leaf float32\[3\]"),
        (jnp.ones(2), jnp.ones(2, jnp.bfloat16), r"float32\[2\] became a leaf bfloat16\[2\]"),
        (jnp.asarray(1.0), jnp.ones(()), r"weakly typed became a leaf float32\[\]$"),
        (
            jax.random.key(0),
            jax.random.key(1),
            r"0x00000000 0x00000000 became 0x00000000 0x00000001",
        ),
        (
            jnp.array([1 + 2j]),
            jnp.array([1 - 2j]),
            r"\(1\+2j\) \(0x3f800000 0x40000000\) became \(1-2j\)",
        ),
        (
            jnp.array([1, -3], jnp.int4),
            jnp.array([1, 3], jnp.int4),
            r"at \[1\]: -3 \(0x0d\) became 3 \(0x03\)",
        ),
        (jnp.array(True), jnp.array(False), r"at \[\]: True \(0x01\) became False \(0x00\)"),
        (1.0, 1, "of type float became a leaf of type int"),
        (1.0, 2.0, r"1.0 \(0x3ff0000000000000\) became 2.0"),
        ("a", "b", "'a' became 'b'"),
    ],
)
def test_a_difference_names_path_index_values_and_bits(left, right, message):
    differ({"encoder": {"w": left}}, {"encoder": {"w": right}}, r"encoder/w: .*" + message)


def test_a_difference_in_structure_names_the_path():
    differ(
        {"encoder": {"w": jnp.ones(1)}},
        {"encoder": {"v": jnp.ones(1)}},
        "differ in structure at 'encoder'",
    )
    differ(
        {"a": jnp.ones(1), "b": None},
        {"a": jnp.ones(1), "b": jnp.ones(1)},
        "differ in structure at 'b'",
    )
    differ({"a": jnp.ones(1)}, {"a": {"b": jnp.ones(1)}}, "(?i)structure")


def test_the_report_of_a_large_tree_is_cut_short_with_the_count():
    left = {f"layer_{i:03d}": jnp.zeros(2) for i in range(300)}
    with pytest.raises(AssertionError) as caught:
        fo.assert_trees_bit_identical(left, jax.tree.map(lambda leaf: leaf - 1.0, left))
    message = str(caught.value)
    assert "300 of 300" in message
    assert "and 290 more" in message
    assert len(message.splitlines()) == 12


def test_every_leaf_at_fault_is_named():
    left = {"a": jnp.zeros(2), "b": jnp.zeros(2), "c": jnp.zeros(2)}
    with pytest.raises(AssertionError, match=r"2 of 3 leaves(?s:.*) a: (?s:.*) c: "):
        fo.assert_trees_bit_identical(
            left, left | {"a": jnp.ones(2), "c": jnp.zeros(3)} | {"c": jnp.ones(2)}
        )


def test_leaves_with_the_same_path_are_both_compared():
    left = {"a/b": jnp.zeros(1), "a": {"b": jnp.zeros(1)}}
    differ(left, {"a/b": jnp.ones(1), "a": {"b": jnp.zeros(1)}}, "1 of 2")
    differ(left, {"a/b": jnp.zeros(1), "a": {"b": jnp.ones(1)}}, "1 of 2")


def test_one_tree_alone_is_an_error():
    with pytest.raises(ValueError, match="two trees or more"):
        fo.assert_trees_bit_identical({})


# --- assert_frozen


def before():
    return {"encoder": {"w": jnp.array([0.0, 1.0])}, "head": {"w": jnp.ones(2)}}


def test_a_frozen_leaf_that_moved_is_named():
    after = {"encoder": {"w": jnp.array([-0.0, 1.0])}, "head": {"w": jnp.zeros(2)}}
    with pytest.raises(
        AssertionError,
        match=r"1 of 1 frozen leaves did not keep their bits(?s:.*)encoder/w: 1 of 2",
    ):
        fo.assert_frozen(before(), after, "encoder")
    fo.assert_frozen(before(), before() | {"encoder": after["encoder"]}, trainable="encoder")


def test_nothing_trainable_moved_is_a_failure_unless_it_is_meant():
    with pytest.raises(AssertionError, match=r"no trainable leaf moved: all 1 .* 'head/w'"):
        fo.assert_frozen(before(), before(), "encoder")
    fo.assert_frozen(before(), before(), "encoder", expect_movement=False)
    fo.assert_frozen(before(), before(), "**")


def test_movement_in_the_sign_of_zero_is_movement():
    fo.assert_frozen(
        {"a": jnp.ones(1), "b": jnp.zeros(1)}, {"a": jnp.ones(1), "b": -jnp.zeros(1)}, "a"
    )


def test_a_donated_array_is_an_error_that_says_to_keep_a_copy():
    params = before()
    jax.jit(lambda params: jax.tree.map(lambda leaf: leaf + 1, params), donate_argnums=0)(params)
    with pytest.raises(ValueError, match=r"the array at 'encoder/w' was donated.*Keep a copy"):
        fo.assert_frozen(params, before(), "encoder")


def test_shapes_without_values_are_refused_and_never_pass():
    params = {"encoder": jnp.ones((4, 2)), "head": jnp.ones(2)}
    shapes = jax.eval_shape(lambda: params)
    rows = fo.with_frozen(optax.sgd(1.0), elements={"encoder": slice(0, 2)})
    for before, after in ((shapes, shapes), (params, shapes), (shapes, params)):
        checks = [
            lambda b=before, a=after: fo.assert_trees_bit_identical(b, a),
            lambda b=before, a=after: fo.assert_frozen(b, a, "encoder", expect_movement=False),
            lambda b=before, a=after: fo.assert_frozen(b, a, rows, expect_movement=False),
            lambda b=before, a=after: fo.assert_frozen(a, a | {"head": b["head"]}, "encoder"),
        ]
        for check in checks:
            with pytest.raises(ValueError, match=r"'(encoder|head)' is a shape and has no values"):
                check()


def test_no_selection_and_another_structure_are_errors():
    with pytest.raises(ValueError, match="selects nothing"):
        fo.assert_frozen(before(), before(), "encodr")
    with pytest.raises(ValueError, match="differ in structure at 'head'"):
        fo.assert_frozen(before(), before() | {"head": {}}, "encoder")


# --- under chexify


def checked(assertion, *args):
    run = chex.chexify(jax.jit(assertion))
    run(*args)
    run.wait_checks()


DTYPED = {
    "w": jnp.array([0.0]),
    "k": jax.random.key(0),
    "i": jnp.array([1], jnp.int4),
    "c": jnp.array([1j]),
    "b": jnp.ones(1, bool),
}


def test_equal_trees_pass_under_chexify():
    checked(fo.assert_trees_bit_identical, DTYPED, DTYPED)


@pytest.mark.parametrize(
    "change",
    [
        {"w": jnp.array([-0.0])},
        {"k": jax.random.key(1)},
        {"i": jnp.array([-1], jnp.int4)},
        {"c": jnp.array([-1j])},
        {"b": jnp.zeros(1, bool)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_difference_fails_under_chexify(change):
    with pytest.raises(AssertionError, match="leaves differ in their bits"):
        checked(fo.assert_trees_bit_identical, DTYPED, DTYPED | change)


def test_assert_frozen_under_chexify():
    frozen = lambda before, after: fo.assert_frozen(before, after, "encoder")
    checked(frozen, before(), before() | {"head": {"w": jnp.zeros(2)}})
    with pytest.raises(AssertionError, match="no trainable leaf moved"):
        checked(frozen, before(), before())
    with pytest.raises(AssertionError, match="frozen leaves did not keep their bits"):
        checked(frozen, before(), before() | {"encoder": {"w": jnp.array([-0.0, 1.0])}})


def test_a_difference_in_dtype_fails_while_tracing():
    with pytest.raises(AssertionError, match=r"w: a leaf float32\[1\] became a leaf bfloat16\[1\]"):
        jax.jit(fo.assert_trees_bit_identical)({"w": jnp.ones(1)}, {"w": jnp.ones(1, jnp.bfloat16)})


def test_a_snapshot_that_moves_with_an_nnx_model_is_an_error():
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    live, copy = nnx.state(model), nnx.to_pure_dict(nnx.state(model))
    nnx.update(model, jax.tree.map(lambda leaf: leaf + 1, nnx.state(model)))
    for assertion in (
        fo.assert_trees_bit_identical,
        lambda *trees: fo.assert_frozen(*trees, "kernel"),
    ):
        with pytest.raises(
            ValueError, match=r"both trees hold the same nnx\.Variable at 'bias.*nnx\.to_pure_dict"
        ):
            assertion(live, nnx.state(model))
    with pytest.raises(AssertionError, match="kernel: 4 of 4"):
        fo.assert_frozen(copy, nnx.to_pure_dict(nnx.state(model)), "kernel")


# --- leaves of every kind


def test_a_difference_beside_a_leaf_that_is_no_array_is_told():
    tree = {"act": jax.nn.relu, "w": jnp.ones(2)}
    for assertion in (fo.assert_trees_bit_identical, lambda *trees: fo.assert_frozen(*trees, "**")):
        with pytest.raises(AssertionError, match="w: 2 of 2 elements differ"):
            assertion(tree, tree | {"w": jnp.zeros(2)})


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (1.0, 2.0),
        (np.float64(1), np.float64(1 + 2**-50)),
        (np.array([1.0, 1.0]), np.array([1.0, 2.0])),
        (1, 1 + 2**32),
        (1 + 0j, 2 + 0j),
        ("a", "b"),
    ],
    ids=str,
)
def test_constants_that_differ_beside_tracers_fail_chexify(left, right):
    for assertion in (fo.assert_trees_bit_identical, lambda *trees: fo.assert_frozen(*trees, "**")):
        with pytest.raises(AssertionError, match="c: "):
            checked(
                lambda x, check=assertion: check({"x": x, "c": left}, {"x": x, "c": right}),
                jnp.ones(2),
            )


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (np.longdouble(1), np.longdouble(2)),
        (np.ones(2, ">f4"), np.array([1, 2], ">f4")),
        (np.array([1, 0, 2], np.int16)[::2], np.array([1, 0, 3], np.int16)[::2]),
        (np.zeros(2, "i4,f8"), np.ones(2, "i4,f8")),
        (np.array(["a"], "S3"), np.array(["b"], "S3")),
        (np.array(["a"], "S1"), np.array(["b"], "S1")),
        (np.array([None, 1]), np.array([None, 2])),
        (2**80, 2**81),
        (np.ones((2, 0)), np.ones((0, 2))),
        (np.zeros((), jax.dtypes.float0), np.zeros((), np.float32)),
    ],
    ids=range(10),
)
def test_leaves_of_odd_types_are_compared(left, right):
    fo.assert_trees_bit_identical({"w": left}, {"w": left})
    differ({"w": left}, {"w": right}, "w: ")


def test_a_lost_weak_type_is_a_difference_and_no_movement():
    weak, strong = (
        {"a": jnp.ones(1), "t": jnp.asarray(1.0)},
        {"a": jnp.ones(1), "t": jnp.float32(1.0)},
    )
    differ(weak, strong, "t: a leaf float32\\[\\], weakly typed became")
    fo.assert_frozen(weak, strong, "**")
    with pytest.raises(AssertionError, match="no trainable leaf moved"):
        fo.assert_frozen(weak, strong, "a")


SUB_BYTE = {name: dtype for name, dtype in trying.NARROW.items() if trying.bits_of(dtype) < 8}


@pytest.mark.parametrize("dtype", SUB_BYTE.values(), ids=SUB_BYTE)
def test_leaves_below_a_byte_are_compared_or_refused_by_chexify(dtype):
    host = [np.array([0, i], np.int8).view(dtype) for i in (0, 1)]
    differ({"w": host[0]}, {"w": host[1]}, "w: 1 of 2 elements differ")
    with pytest.raises(
        AssertionError, match="w: "
    ):  # beside what is traced, as the constants they are
        checked(
            lambda x: fo.assert_trees_bit_identical(*({"x": x, "w": leaf} for leaf in host)),
            jnp.ones(2),
        )
    if not trying.device_has(dtype):
        return  # no leaf of it can be on a device or be traced: the host's are all there are
    one, other = map(jnp.asarray, host)
    differ({"w": one}, {"w": other}, "w: 1 of 2 elements differ")
    compared = AssertionError, "differ in their bits"
    refused = TypeError, "cannot compare 'w'"
    error, message = compared if trying.device_reads_bits_of(dtype) else refused
    with pytest.raises(error, match=message):
        checked(fo.assert_trees_bit_identical, {"w": one}, {"w": other})


def test_what_the_host_keeps_beside_small_leaves_is_no_part():
    clean, padded = (np.array([word], np.uint8).view(ml_dtypes.int4) for word in (0x0D, 0x1D))
    assert clean == padded
    fo.assert_trees_bit_identical({"w": clean}, {"w": padded})
