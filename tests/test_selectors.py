"""Selectors as values: combined, compared, shown, pickled, turned into masks, labels and paths."""

import dataclasses
import functools
import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict
from helpers import HOLE, PARAMS, paths_of

import frozen_optax as fo


def test_selectors_combine_with_or_and_not():
    encoder, bias = fo.by_path("encoder"), fo.by_path("**/bias")
    assert (encoder | bias).paths(PARAMS) == ["encoder/bias", "encoder/kernel", "head/bias"]
    assert (encoder & bias).paths(PARAMS) == ["encoder/bias"]
    assert (encoder & ~bias).paths(PARAMS) == ["encoder/kernel"]
    assert (~encoder).paths(PARAMS) == ["head/bias", "head/kernel"]
    assert (~(encoder | bias)).paths(PARAMS) == ["head/kernel"]
    assert (~~encoder).paths(PARAMS) == encoder.paths(PARAMS)
    assert (encoder & fo.by_mask(False)).paths(PARAMS) == []
    assert isinstance(encoder | bias, fo.Selector)


@pytest.mark.parametrize("pattern", ["**/bias", re.compile(".*bias")], ids=["glob", "regex"])
def test_selectors_combine_with_patterns_on_either_side(pattern):
    encoder, bias = fo.by_path("encoder"), fo.by_path(pattern)
    assert encoder | pattern == encoder | bias
    assert pattern | encoder == bias | encoder
    assert encoder & pattern == encoder & bias
    assert pattern & encoder == bias & encoder


@pytest.mark.parametrize("other", [True, None, lambda path, leaf: True])
def test_selectors_combine_with_selectors_and_patterns_alone(other):
    for combine in (lambda a, b: a | b, lambda a, b: a & b):
        with pytest.raises(TypeError, match="unsupported operand"):
            combine(fo.by_path("encoder"), other)
        with pytest.raises(TypeError, match="unsupported operand"):
            combine(other, fo.by_path("encoder"))


def test_masks_labels_and_paths_have_the_trees_structure():
    tree = {"a": [1.0, None, HOLE], "b": {"c": (2.0, {}), "d": None}, "e": HOLE, "f": []}
    selector = fo.by_path("a")
    assert selector.mask(tree) == {
        "a": [True, None, HOLE],
        "b": {"c": (False, {}), "d": None},
        "e": HOLE,
        "f": [],
    }
    assert selector.labels(tree) == {
        "a": ["frozen", None, HOLE],
        "b": {"c": ("trainable", {}), "d": None},
        "e": HOLE,
        "f": [],
    }
    assert selector.labels(tree, selected=1, rest=0)["b"] == {"c": (0, {}), "d": None}
    assert selector.labels(tree, "x")["a"][0] == "x"
    assert selector.paths(tree) == ["a/0"]
    assert (~selector).paths(tree) == ["b/c/0"]
    assert all(type(leaf) is bool for leaf in jax.tree.leaves(selector.mask(tree)))
    for made in (selector.mask(tree), selector.labels(tree)):
        assert jax.tree.structure(made) == jax.tree.structure(tree)


def test_paths_are_in_the_trees_order():
    tree = {"b": [1.0, 2.0], "a": {"z": 3.0, "y": 4.0}}
    assert fo.by_path("**").paths(tree) == paths_of(tree) == ["a/y", "a/z", "b/0", "b/1"]


A, B, C = (
    fo.by_path("a"),
    fo.by_path("b/*", re.compile("c.*")),
    fo.by_mask({"a": True, "b": [False]}),
)


@pytest.mark.parametrize(
    ("selector", "text"),
    [
        (A, "by_path('a')"),
        (B, "by_path('b/*', re.compile('c.*'))"),
        (C, "by_mask({'a': True, 'b': [False]})"),
        (fo.by_mask(True), "by_mask(True)"),
        (fo.by_mask((True, None)), "by_mask((True, None))"),
        (~A, "~by_path('a')"),
        (~~A, None),
        (A | B, "by_path('a') | by_path('b/*', re.compile('c.*'))"),
        (A & ~A, "by_path('a') & ~by_path('a')"),
        (~(A | C), "~(by_path('a') | by_mask({'a': True, 'b': [False]}))"),
        (~A | C & A, None),
        ((A | C) & A, None),
        (A | C | A, None),
        (A | (C | A), None),
        (A & C & A, None),
        (A & (C & A), None),
        (~(~A & (B | ~C)) | ~~A, None),
        (fo.by_path("it's", 'a"b', "a\\b", "a\nb", "é 🧊"), None),
        (fo.by_path(re.compile("a'\"\\\\", re.IGNORECASE | re.DOTALL)), None),
        (fo.by_path(re.compile("(?x) a  # a comment\n")), None),
        (fo.by_path(re.compile("|".join(f"encoder/layer_{i}/.*" for i in range(50)))), None),
    ],
)
def test_a_repr_reads_back_as_an_equal_selector(selector, text):
    if text is not None:
        assert repr(selector) == text
    assert eval(repr(selector), {**vars(fo), "re": re}) == selector


def test_a_repr_names_functions():
    def is_bias(path, leaf):
        return path.endswith("bias")

    def no_vectors(params):
        return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

    assert "is_bias" in repr(fo.by_predicate(is_bias))
    assert "no_vectors" in repr(~fo.by_mask(no_vectors))


def test_selectors_compare_by_their_parts():
    def same(path, leaf):
        return True

    for make in (
        lambda: fo.by_path("a", re.compile("b")),
        lambda: fo.by_mask({"a": True}),
        lambda: fo.by_predicate(same),
        lambda: ~fo.by_path("a") | fo.by_mask(True) & fo.by_predicate(same),
    ):
        assert make() == make()
    different = [
        *(fo.by_path("a"), fo.by_path("b"), fo.by_path("a", "b"), fo.by_path(re.compile("a"))),
        *(
            fo.by_path(re.compile("a", re.IGNORECASE)),
            fo.by_mask(True),
            fo.by_mask(False),
            fo.by_mask({"a": True}),
        ),
        *(fo.by_predicate(same), fo.by_predicate(lambda path, leaf: True), ~fo.by_path("a")),
        *(
            fo.by_path("a") | fo.by_path("b"),
            fo.by_path("a") & fo.by_path("b"),
            fo.by_path("b") | fo.by_path("a"),
        ),
    ]
    for i, left in enumerate(different):
        assert [left == right for right in different] == [i == j for j in range(len(different))]
        assert left != "a"


def test_selectors_are_hashable_where_their_parts_are():
    make = lambda: ~(fo.by_path("a", re.compile("b")) | fo.by_mask(True)) & fo.by_path("**")
    used = make()
    used.mask({"a": 1.0, "b": 2.0})
    assert hash(used) == hash(make())
    assert {used: 1}[make()] == 1
    mask = lambda value: fo.by_mask({"a": value, "b": [np.False_, jnp.array(True)]})
    assert mask(True) == mask(np.True_)
    assert hash(mask(True)) == hash(mask(np.True_))
    assert mask(True) != mask(False)
    assert fo.by_mask({True: True}) != fo.by_mask({1: True})  # equal keys, and not the same


def test_a_selector_is_a_static_argument_of_jit():
    traces = []

    @functools.partial(jax.jit, static_argnums=1)
    def held(tree, selector):
        traces.append(selector)
        return jax.tree.map(lambda leaf, chosen: leaf * chosen, tree, selector.mask(tree))

    for _ in range(3):
        assert held({"a": 1.0, "b": 2.0}, fo.by_path("a")) == {"a": 1.0, "b": 0.0}
    assert held({"a": 1.0, "b": 2.0}, fo.by_path("b")) == {"a": 0.0, "b": 2.0}
    assert len(traces) == 2


def is_bias(path, leaf):
    return path.endswith("bias")


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_selectors_are_picklable_also_after_use(protocol):
    tree = {**PARAMS, "rest": [HOLE, FrozenDict({"bias": 1.0})]}
    mask = {"encoder": True, "head": False, "rest": False}
    selector = ~(fo.by_path("head", re.compile(".*/bias")) | fo.by_mask(mask)) | fo.by_predicate(
        is_bias
    )
    unused = pickle.dumps(selector, protocol)
    assert selector.mask(tree)["rest"] == [HOLE, FrozenDict({"bias": True})]
    used = pickle.dumps(selector, protocol)
    assert len(used) == len(unused), "it carries along what it remembers"
    for loaded in map(pickle.loads, (unused, used)):
        assert loaded == selector
        assert repr(loaded) == repr(selector)
        assert loaded.mask(tree) == selector.mask(tree)


def test_a_selector_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        fo.by_path("a").anything = 1
    with pytest.raises(TypeError, match="abstract"):
        fo.Selector()


@pytest.mark.parametrize(
    "combine",
    [lambda a, b: a and b, lambda a, b: a or b, lambda a, b: not a],
    ids=["and", "or", "not"],
)
def test_selectors_refuse_words_that_would_drop_one_of_them(combine):
    with pytest.raises(TypeError, match=r"combine with \|, & and ~"):
        combine(fo.by_path("a"), fo.by_path("b"))
