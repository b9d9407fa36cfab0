"""Masks of bools and functions that return one: what they select, and which do not fit."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from containers import NnxModel
from flax import nnx
from flax.core import FrozenDict
from helpers import HOLE, PARAMS

import frozen_optax as fo


@pytest.mark.parametrize(
    ("mask", "paths"),
    [
        (True, ["encoder/bias", "encoder/kernel", "head/bias", "head/kernel"]),
        (False, []),
        (np.True_, ["encoder/bias", "encoder/kernel", "head/bias", "head/kernel"]),
        (jnp.array(False), []),
        ({"encoder": True, "head": False}, ["encoder/bias", "encoder/kernel"]),
        (
            {"encoder": np.False_, "head": {"bias": np.array(True), "kernel": jnp.array(False)}},
            ["head/bias"],
        ),
        ({"encoder": {"bias": True, "kernel": False}, "head": jnp.array(True)}, None),
    ],
)
def test_a_mask_selects_what_lies_below_its_true_leaves(mask, paths):
    paths = ["encoder/bias", "head/bias", "head/kernel"] if paths is None else paths
    for selector in (fo.by_mask(mask), fo.by_mask(lambda params: mask)):
        assert selector.paths(PARAMS) == paths
    trainable, frozen = fo.partition(PARAMS, mask)
    assert len(jax.tree.leaves(frozen)) == len(paths)
    assert len(jax.tree.leaves(trainable)) == 4 - len(paths)


def test_a_mask_function_gets_the_tree():
    selector = fo.by_mask(lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params))
    tree = {"w": jnp.ones((2, 2)), "b": None, "c": jnp.ones(2)}
    assert selector.mask(tree) == {"w": True, "b": None, "c": False}
    assert selector.mask({"w": jnp.ones(2), "b": None, "c": jnp.ones((2, 2))}) == {
        "w": False,
        "b": None,
        "c": True,
    }
    assert fo.by_mask(fo.by_path("w").mask).paths(tree) == ["w"]


@pytest.mark.parametrize(
    ("mask", "tree", "message"),
    [
        (
            {"encoder": True},
            PARAMS,
            "at 'the root': the mask has a dict of 1 (encoder), the parameters have a",
        ),
        (
            {"encoder": {"bias": True}, "head": True},
            PARAMS,
            "at 'encoder': the mask has a dict of 1 (bias)",
        ),
        (
            {"encoder": True, "head": {"bias": {"x": True}, "kernel": True}},
            PARAMS,
            "at 'head/bias': the mask has a",
        ),
        ({"encoder": None, "head": True}, PARAMS, "at 'encoder': the mask has None"),
        ({"encoder": HOLE, "head": True}, PARAMS, "at 'encoder': the mask has a hole"),
        (
            {"a": [True]},
            {"a": [1.0, 2.0]},
            "at 'a': the mask has a list of 1 (0), the parameters have a list of 2",
        ),
        (
            {"a": (True, True)},
            {"a": [1.0, 2.0]},
            "at 'a': the mask has a tuple of 2 (0, 1), the parameters have",
        ),
        (
            {"a": {"b": True}},
            {"a": 1.0},
            "at 'a': the mask has a dict of 1 (b), the parameters have a leaf",
        ),
        ({"a": {"b": True}}, {"a": np.ones((2, 3))}, "the parameters have a leaf float64[2, 3]"),
        ({"a": True}, {"b": 1.0}, "at 'the root'"),
        ({}, {"b": 1.0}, "at 'the root'"),
        (None, {"b": 1.0}, "at 'the root': the mask has None"),
        ({"a": True}, FrozenDict({"a": 1.0}), "at 'the root': the mask has a dict of 1 (a)"),
    ],
)
def test_a_mask_of_another_structure_names_the_path(mask, tree, message):
    for selector in (fo.by_mask(mask), fo.by_mask(lambda params: mask), ~fo.by_mask(mask)):
        with pytest.raises(
            ValueError, match="the mask and the parameters differ in structure"
        ) as error:
            selector.mask(tree)
        assert message in str(error.value)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ({"encoder": 1, "head": True}, "found a leaf of type int (1) at 'encoder'"),
        (
            {"encoder": True, "head": {"bias": "x", "kernel": True}},
            "found a leaf of type str ('x') at 'head/bias'",
        ),
        ({"encoder": np.array([True]), "head": True}, "found a leaf bool[1]"),
        ({"encoder": jnp.array(1), "head": True}, "found a leaf int32[]"),
        ({"encoder": jax.ShapeDtypeStruct((), bool), "head": True}, "found a leaf bool[]"),
        (1.0, "found a leaf of type float (1.0) at 'the root'"),
    ],
)
def test_a_mask_of_anything_but_bools_names_the_path(mask, message):
    for selector in (fo.by_mask(mask), fo.by_mask(lambda params: mask)):
        with pytest.raises(TypeError, match="a mask holds True and False") as error:
            selector.mask(PARAMS)
        assert message in str(error.value)


def test_a_mask_that_depends_on_traced_values_is_an_error():
    def masked(x):
        return fo.by_mask({"a": x > 0}).mask({"a": x})

    with pytest.raises(TypeError, match="a mask cannot depend on traced values"):
        jax.jit(masked)(1.0)


def test_an_error_about_a_mask_spells_nnx_paths_as_selectors():
    state = nnx.state(NnxModel(nnx.Rngs(0)), nnx.Param)
    with pytest.raises(TypeError, match="at 'encoder/bias'"):
        fo.by_mask(jax.tree.map(lambda _: 1, state)).mask(state)


def test_a_mask_function_takes_one_argument():
    with pytest.raises(TypeError, match=re.escape("Did you mean by_predicate?")):
        fo.by_mask(lambda path, leaf: True)


def test_one_argument_makes_a_mask_and_two_a_predicate():
    is_matrix = lambda params: jax.tree.map(lambda leaf: jnp.ndim(leaf) > 1, params)
    tree = {"b": jnp.ones(2), "w": jnp.ones((2, 2))}
    assert jax.tree.leaves(fo.partition(tree, is_matrix)[1]) == [tree["w"]]
    assert jax.tree.leaves(fo.partition(tree, fo.by_path("w").mask)[1]) == [tree["w"]]
    assert jax.tree.leaves(fo.partition(tree, [is_matrix, "w"])[1]) == [tree["w"]]
    assert jax.tree.leaves(fo.partition(tree, lambda path, leaf: leaf.ndim > 1)[1]) == [tree["w"]]
    assert jax.tree.leaves(fo.partition(tree, lambda path, leaf=None: path == "w")[1]) == [
        tree["w"]
    ]


def test_a_mask_function_is_asked_each_time():
    selector = fo.by_mask(
        lambda params: jax.tree.map(lambda leaf: isinstance(leaf, jax.Array), params)
    )
    params = {"a": jnp.ones(2)}
    with pytest.raises(ValueError, match="selects nothing"):
        selector.mask(jax.eval_shape(lambda: params))
    assert selector.mask(params) == {"a": True}


def test_a_mask_function_of_values_is_asked_about_each_tree():
    selector = fo.by_mask(lambda params: jax.tree.map(lambda leaf: bool((leaf == 0).all()), params))
    assert selector.paths({"a": jnp.zeros(2), "b": jnp.ones(2)}) == ["a"]
    assert selector.paths({"a": jnp.ones(2), "b": jnp.zeros(2)}) == ["b"]


def test_a_mask_that_is_changed_afterwards_selects_what_it_said():
    mask = {"a": True, "b": False}
    selector = fo.by_mask(mask)
    mask["a"] = False
    assert selector.paths({"a": 1.0, "b": 2.0}) == ["a"]
