"""A selector is resolved once for a structure, told from any other, and keeps nothing alive."""

import enum
import re
import warnings
import weakref
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ALL, ONES, PARAMS, ROOMS

import frozen_optax as fo


def counting() -> tuple[list[str], Any]:
    """A list that grows with each call of a predicate, and the predicate."""
    calls: list[str] = []
    return calls, lambda path, leaf: (calls.append(path), path.endswith("bias"))[1]


@pytest.mark.parametrize(
    "combine", [lambda s: s, lambda s: ~s, lambda s: s & ALL], ids=["s", "~s", "s & t"]
)
def test_a_selector_is_resolved_once_for_a_structure(combine):
    calls, predicate = counting()
    selector = combine(fo.by_predicate(predicate))
    for _ in range(5):
        selector.mask(PARAMS)
        selector.labels(PARAMS)
        selector.paths(jax.tree.map(jnp.float32, PARAMS))
        jax.eval_shape(lambda tree: (selector.mask(tree), tree)[1], PARAMS)
        jax.jit(lambda tree: (selector.mask(tree), tree)[1])(PARAMS)
    assert len(calls) == 4


@pytest.mark.parametrize("argument", ["frozen", "trainable"])
@pytest.mark.parametrize("room", ["freeze", "with_frozen"])
def test_a_transform_resolves_once_for_a_structure(room, argument):
    calls, predicate = counting()
    tx = ROOMS[room](**{argument: predicate})
    for _ in range(5):
        state = tx.init(ONES)
        tx.update(ONES, state, ONES)
        jax.jit(lambda *args: tx.update(*args))(ONES, state, ONES)
    assert len(calls) == 4


@pytest.mark.parametrize("argument", ["frozen", "trainable"])
@pytest.mark.parametrize("room", ["partition", "restore"])
def test_partition_and_restore_resolve_once_for_a_structure(room, argument):
    calls, predicate = counting()
    selector = fo.by_predicate(predicate)
    for _ in range(5):
        ROOMS[room](**{argument: selector})
    assert len(calls) == 4


def test_the_parts_of_a_tree_are_structures_of_their_own():
    calls, predicate = counting()
    selector = fo.by_predicate(predicate)
    trainable, frozen = fo.partition(PARAMS, "head")
    for tree in (PARAMS, trainable, frozen, list(PARAMS.values())) * 3:
        selector.mask(tree)
    assert len(calls) == 4 + 2 + 2 + 4


def test_another_shape_or_dtype_is_resolved_again_where_read():
    for selector in (
        fo.by_predicate(lambda path, leaf: leaf.ndim > 1 and leaf.dtype == jnp.float32),
        fo.by_mask(
            lambda params: jax.tree.map(
                lambda leaf: leaf.ndim > 1 and leaf.dtype == jnp.float32, params
            )
        ),
    ):
        for combined in (
            selector,
            ~~selector,
            selector | ~ALL,
            ALL & selector,
            ~(~ALL | ~selector),
        ):
            for _ in range(2):
                assert combined.paths({"a": jnp.ones((2, 2)), "b": jnp.ones(2)}) == ["a"]
                assert combined.paths({"a": jnp.ones(2), "b": jnp.ones((2, 2))}) == ["b"]
                assert combined.paths(
                    {"a": jnp.ones((2, 2), jnp.bfloat16), "b": jnp.ones((2, 2))}
                ) == ["b"]
                with pytest.raises(ValueError, match="selects nothing"):
                    combined.paths({"a": jnp.ones(2), "b": jnp.ones(2)})


def test_an_error_is_an_error_every_time():
    selector = fo.by_path("encodr")
    for _ in range(3):
        with pytest.raises(ValueError, match="selects nothing"):
            selector.mask(PARAMS)
    assert selector.paths({"encodr": 1.0}) == ["encodr"]
    with pytest.raises(ValueError, match="selects nothing"):
        selector.mask(PARAMS)


def test_a_selector_remembers_a_bounded_number_of_structures():
    calls, predicate = counting()
    selector = fo.by_predicate(predicate, may_be_empty=True)
    for i in range(300):
        selector.mask({f"key_{i}": 1.0})
    for i in range(300):
        selector.mask({f"key_{i}": 1.0})
    assert len(calls) == 600


def test_a_selector_keeps_no_leaves_alive_and_leaks_no_tracers():
    selector = (
        fo.by_predicate(lambda path, leaf: True)
        & fo.by_mask(lambda params: True)
        & fo.by_path("**")
    )
    array = np.ones(3)
    alive = weakref.ref(array)
    selector.mask({"a": array})
    del array
    assert alive() is None
    with jax.checking_leaks():
        jax.jit(lambda tree: (selector.mask(tree), tree)[1])({"a": 1.0, "b": 2.0})


class Name(str, enum.Enum):  # noqa: UP042 (the text of a StrEnum is that of its value)
    ENCODER = "encoder"
    HEAD = "head"


@pytest.mark.parametrize(
    ("tree", "twin", "glob"),
    [
        ({1: 1.0, 2: 2.0}, {True: 1.0, 2: 2.0}, "1"),
        ({"encoder": 1.0, "head": 2.0}, {Name.ENCODER: 1.0, Name.HEAD: 2.0}, "encoder"),
        ({0: {"w": 1.0}, 1: 2.0}, {False: {"w": 1.0}, 1: 2.0}, "0/w"),
    ],
    ids=["bools", "enums", "further up"],
)
def test_keys_that_are_equal_and_not_the_same_are_told_apart(tree, twin, glob):
    assert jax.tree.structure(tree) == jax.tree.structure(twin)
    for seen in ((tree, twin, tree), (twin, tree, twin)):
        selector = fo.by_path("**") & fo.by_predicate(
            lambda path, leaf: path == glob, may_be_empty=True
        )
        assert [selector.paths(each) for each in seen] == [
            [glob] if each is tree else [] for each in seen
        ]
    by_glob = fo.by_path(glob)
    assert by_glob.paths(tree) == [glob]
    with pytest.raises(ValueError, match="selects nothing"):
        by_glob.paths(twin)


def test_a_selector_keeps_no_leaf_alive_that_is_no_array():
    class Activation:
        def __call__(self, x):
            return x

    selector = fo.by_predicate(lambda path, leaf: path == "w")
    activation = Activation()
    alive = weakref.ref(activation)
    selector.mask({"act": activation, "w": np.ones(3)})
    del activation
    assert alive() is None


def test_unhashable_structures_are_resolved_all_the_same():
    class Static(eqx.Module):
        kernel: Any
        table: Any = eqx.field(static=True)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # equinox advises against arrays here
        trees = [
            {"a": Static(1.0, table), "b": 2.0}
            for table in ([1], {"x": 1}, np.arange(3), np.arange(3))
        ]
    selector = fo.by_path("a")
    for tree in trees * 2:
        assert selector.paths(tree) == ["a/kernel"]


def test_ten_patterns_on_a_hundred_thousand_leaves():
    leaf = np.zeros(1, np.float32)
    modules = range(100)
    tree = {
        f"block_{i}": {f"layer_{j}": dict.fromkeys("abcdefghij", leaf) for j in modules}
        for i in modules
    }
    patterns = {
        "block_0": lambda i, j, k: i == 0,
        "block_1/layer_[0-9]": lambda i, j, k: i == 1 and j < 10,
        "**/a": lambda i, j, k: k == "a",
        "block_*/*/b": lambda i, j, k: k == "b",
        "**/layer_99": lambda i, j, k: j == 99,
        "block_5?/**/c": lambda i, j, k: 50 <= i < 60 and k == "c",
        "block_7*/layer_1": lambda i, j, k: (i == 7 or 70 <= i < 80) and j == 1,
        "**/layer_1*/[!a-i]": lambda i, j, k: (j == 1 or 10 <= j < 20) and k == "j",
        "block_99/layer_99/j": lambda i, j, k: i == j == 99 and k == "j",
        re.compile(r"block_(\d)\1/layer_\1/.*"): lambda i, j, k: i and i % 11 == 0 and i // 11 == j,
    }
    expected = [
        f"block_{i}/layer_{j}/{k}"
        for i in sorted(modules, key=str)
        for j in sorted(modules, key=str)
        for k in "abcdefghij"
        if any(rule(i, j, k) for rule in patterns.values())
    ]
    selector = fo.by_path(*patterns)
    assert selector.paths(tree) == expected
    assert sum(jax.tree.leaves(selector.mask(tree))) == len(expected)
