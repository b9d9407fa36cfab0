"""A selector on every kind of tree: containers, modules, and leaves that are no arrays."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from containers import CONTAINERS, EqxModel, NnxModel
from flax import nnx
from helpers import HOLE
from strategies import assert_selects, bools

import frozen_optax as fo


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_selector_works_on_every_kind_of_tree(container):
    make, glob, expected = CONTAINERS[container]
    tree = make()
    predicate = fo.by_predicate(lambda path, leaf: path in expected and leaf.shape is not None)
    traced = []

    def trace(tree):
        traced.extend(
            (selector.paths(tree), selector.mask(tree))
            for selector in (fo.by_path(glob), predicate)
        )
        return tree

    jax.jit(trace)(tree)
    abstract = jax.eval_shape(lambda: tree)
    for selector in (fo.by_path(glob), predicate):
        for seen in (tree, abstract):
            assert selector.paths(seen) == expected
            mask = selector.mask(seen)
            assert jax.tree.structure(mask) == jax.tree.structure(tree)
            assert sum(jax.tree.leaves(mask)) == len(expected)
        assert fo.by_mask(selector.mask(tree)).paths(tree) == expected
        assert_selects(~selector, tree, [not chosen for chosen in bools(selector, tree)])
    for paths, mask in traced:
        assert paths == expected
        assert jax.tree.structure(mask) == jax.tree.structure(tree)


def test_a_model_reads_the_same_in_linen_and_nnx():
    every = fo.by_path("**")
    linen = every.paths(CONTAINERS["linen"][0]())
    assert linen == ["encoder/bias", "encoder/kernel", "head/bias", "head/kernel"]
    for container in ("nnx state", "nnx pure state", "nnx pure dict"):
        assert every.paths(CONTAINERS[container][0]()) == linen
    assert every.paths(nnx.state(NnxModel(nnx.Rngs(0)))) == linen
    assert every.paths(NnxModel(nnx.Rngs(0))) == linen


def test_only_the_value_key_of_a_variable_is_no_part_of_a_path():
    tree = {"a": nnx.Param({"value": jnp.ones(1), "x": [jnp.ones(1)]}), "b": {"value": jnp.ones(1)}}
    assert fo.by_path("**").paths(tree) == ["a/value", "a/x/0", "b/value"]
    assert fo.by_path("**").paths(nnx.Param(jnp.ones(1))) == [""]
    assert fo.by_path("**").paths([nnx.BatchStat(jnp.ones(1)), HOLE]) == ["0"]
    with pytest.raises(ValueError, match="selects nothing"):
        fo.by_path("0/value").mask([nnx.Param(jnp.ones(1))])


def test_holes_in_a_variable_stay_and_count_for_their_path():
    state = nnx.state(NnxModel(nnx.Rngs(0)), nnx.Param)
    trainable, frozen = fo.partition(state, "encoder")
    assert fo.by_path("encoder/kernel").paths(trainable) == []
    assert fo.by_path("encoder/kernel").paths(frozen) == ["encoder/kernel"]
    with pytest.raises(ValueError, match="selects nothing"):
        fo.by_path("decoder").mask(trainable)


def test_a_mask_of_an_equinox_model_is_a_mask_though_callable():
    model = EqxModel()
    mask = fo.by_path("head").mask(model)
    assert callable(mask)
    assert fo.by_mask(mask).paths(model) == ["head/weight", "head/bias"]
    assert jax.tree.leaves(fo.partition(model, mask)[1]) == [model.head.weight, model.head.bias]


@pytest.mark.parametrize(
    "leaf",
    [
        jax.nn.relu,
        "text",
        np.array(["text"]),
        np.array([None]),
        np.float32,
        np.ndarray,
        jnp.float32,
        2**80,
        object(),
    ],
    ids=range(9),
)
def test_leaves_that_are_no_arrays_are_selected_like_any_other(leaf):
    tree = {"a": leaf, "b": jnp.ones(2)}
    is_a = fo.by_predicate(lambda path, leaf: path == "a")
    for selector in (fo.by_path("a"), is_a, fo.by_mask({"a": True, "b": False})):
        assert selector.paths(tree) == ["a"]
        assert selector.mask(tree) == {"a": True, "b": False}


def test_functions_of_an_equinox_model_are_leaves_like_others():
    model = eqx.nn.MLP(2, 2, 4, 2, key=jax.random.key(0))
    assert fo.by_path("layers/0", "activation").paths(model) == [
        "layers/0/weight",
        "layers/0/bias",
        "activation",
    ]
