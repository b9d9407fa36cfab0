"""Splitting a tree and joining it again: the very same leaves in the very same structure."""

import re

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from containers import CONTAINERS, NnxModel
from flax import nnx
from helpers import HOLE, PARAMS, same_objects
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import selectors, trees

import frozen_optax as fo


def assert_same(left, right):
    """The same structure and the very same leaf objects."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    assert same_objects(left, right)


# --- partition


def test_each_leaf_is_in_one_part_and_a_hole_in_the_other():
    assert fo.partition(PARAMS, ["encoder", "head/bias"]) == (
        {"encoder": {"kernel": HOLE, "bias": HOLE}, "head": {"kernel": 3.0, "bias": HOLE}},
        {"encoder": {"kernel": 1.0, "bias": 2.0}, "head": {"kernel": HOLE, "bias": 4.0}},
    )


def test_trainable_names_what_is_in_the_first_part():
    for prune in (False, True):
        trainable, frozen = fo.partition(PARAMS, "encoder", prune=prune)
        assert fo.partition(PARAMS, trainable="encoder", prune=prune) == (frozen, trainable)
    assert fo.partition(PARAMS, trainable=True)[0] == PARAMS


def test_a_pruned_part_has_one_hole_for_an_empty_subtree():
    tree = {
        "encoder": {"a": [1.0, {"b": 2.0}], "c": {"d": (3.0,)}},
        "half": [{"x": 4.0, "y": 5.0}, [6.0, 7.0]],
        "head": {"kernel": 8.0, "bias": 9.0},
        "leaf": 10.0,
    }
    trainable, frozen = fo.partition(tree, ["encoder", "half/0", "half/1/0", "leaf"], prune=True)
    assert trainable == {
        "encoder": HOLE,
        "half": [HOLE, [HOLE, 7.0]],
        "head": {"kernel": 8.0, "bias": 9.0},
        "leaf": HOLE,
    }
    assert frozen == {
        "encoder": tree["encoder"],
        "half": [{"x": 4.0, "y": 5.0}, [6.0, HOLE]],
        "head": HOLE,
        "leaf": 10.0,
    }
    assert_same(fo.combine(trainable, frozen), tree)


def test_of_a_tree_wholly_frozen_one_hole_is_left():
    for selection in (True, "**", ["encoder", "head"]):
        assert fo.partition(PARAMS, selection, prune=True) == (HOLE, PARAMS)
    assert fo.partition(PARAMS, False, prune=True) == (PARAMS, HOLE)
    assert fo.partition(1.0, "**") == fo.partition(1.0, "**", prune=True) == (HOLE, 1.0)
    assert fo.combine(HOLE, PARAMS) == fo.combine(PARAMS, HOLE) == PARAMS


@pytest.mark.parametrize("prune", [False, True])
def test_none_and_empty_subtrees_stay_what_they_are(prune):
    tree = {
        "a": None,
        "b": {"c": None, "d": 1.0},
        "e": [None, 2.0],
        "f": {},
        "g": {"h": None, "i": ()},
    }
    for selection in ("b", "e", "**", False, ["b", "e"], "b/d"):
        parts = fo.partition(tree, selection, prune=prune)
        assert_same(fo.combine(*parts), tree)
        if selection not in ("**", False, ["b", "e"]) or not prune:  # else one part is one hole
            for part in parts:
                assert (part["a"], part["f"], part["g"]) == (None, {}, {"h": None, "i": ()})
    kept, _ = fo.partition(tree, "b", prune=False)
    assert kept["b"] == {"c": None, "d": HOLE}
    assert fo.partition(tree, "b", prune=True)[0]["b"] == HOLE


@pytest.mark.parametrize("prune", [False, True])
@pytest.mark.parametrize("empty", [{}, (), [], None, HOLE, {"a": None, "b": [{}, HOLE]}], ids=repr)
def test_a_tree_without_leaves_is_what_both_parts_are(empty, prune):
    for selection in ("**", "*", True, False, lambda path, leaf: True):
        assert fo.partition(empty, selection, prune=prune) == (empty, empty)
        assert_same(fo.combine(*fo.partition(empty, selection, prune=prune)), empty)


@pytest.mark.parametrize("prune", [False, True])
@pytest.mark.parametrize("selection", ["b", "c", ["b", "c"], "**", False])
def test_holes_that_were_there_before_stay_where_they_are(selection, prune):
    tree = {
        "a": {"x": HOLE},
        "b": {"x": 1.0, "y": HOLE},
        "c": {"x": 2.0},
        "d": [HOLE, {"x": HOLE}],
        "e": HOLE,
    }
    assert_same(fo.combine(*fo.partition(tree, selection, prune=prune)), tree)
    assert_same(
        fo.combine(*fo.partition({"a": {"x": HOLE}, "b": 1.0}, "b", prune=prune)),
        {"a": {"x": HOLE}, "b": 1.0},
    )


@pytest.mark.parametrize("container", CONTAINERS)
def test_every_kind_of_tree_is_split_and_joined_without_loss(container):
    make, glob, expected = CONTAINERS[container]
    tree = make()
    for prune in (False, True):
        trainable, frozen = fo.partition(tree, glob, prune=prune)
        assert len(jax.tree.leaves(frozen)) == len(expected)
        assert len(jax.tree.leaves(trainable)) == len(jax.tree.leaves(tree)) - len(expected)
        assert_same(fo.combine(trainable, frozen), tree)
        assert_same(fo.combine(frozen, trainable), tree)
        joined = jax.jit(lambda tree, p=prune: fo.combine(*fo.partition(tree, glob, prune=p)))(tree)
        assert jax.tree.structure(joined) == jax.tree.structure(tree)
        abstract = jax.eval_shape(lambda: tree)
        assert_same(fo.combine(*fo.partition(abstract, glob, prune=prune)), abstract)


def test_leaves_that_are_no_arrays_are_the_same_objects_too():
    model = eqx.nn.MLP(2, 2, 4, 1, key=jax.random.key(0))
    trainable, frozen = fo.partition(model, ["layers/0", "activation", "final_activation"])
    assert frozen.activation is model.activation
    assert trainable.activation == HOLE
    assert_same(fo.combine(trainable, frozen), model)
    tree = {"a": "text", "b": object(), "c": np.float64(1), "d": jnp.float32}
    assert_same(fo.combine(*fo.partition(tree, ["a", "c"])), tree)


def test_the_pruned_trainable_part_is_as_with_frozen_stores_it():
    params = jax.tree.map(jnp.float32, PARAMS)
    for selection in ("encoder", "encoder/kernel", ["encoder", "head/bias"], False):
        state = fo.with_frozen(optax.sgd(0.1, momentum=0.9), selection).init(params)
        momentum = optax.tree_utils.tree_get(state, "trace")
        trainable, _ = fo.partition(params, selection, prune=True)
        assert jax.tree.structure(momentum) == jax.tree.structure(trainable)


@pytest.mark.parametrize("prune", [False, True])
def test_the_trainable_part_is_differentiated_inside_jit(prune):
    params = {
        "encoder": {"w": jnp.arange(3.0), "steps": jnp.arange(2)},
        "head": {"w": jnp.ones(3), "b": None},
    }
    trainable, frozen = fo.partition(params, "encoder", prune=prune)

    @jax.jit
    def grad(trainable, frozen):
        def loss(part):
            whole = fo.combine(part, frozen)
            return jnp.sum(whole["encoder"]["w"] * whole["head"]["w"] ** 2)

        return jax.grad(loss)(trainable)

    gradients = grad(trainable, frozen)
    assert jax.tree.structure(gradients) == jax.tree.structure(trainable)
    assert gradients["head"]["w"].tolist() == [0.0, 2.0, 4.0]


def test_a_joined_nnx_state_updates_its_model():
    model = NnxModel(nnx.Rngs(0))
    trainable, frozen = fo.partition(nnx.state(model), "encoder", prune=True)
    trained = jax.tree.map(jnp.zeros_like, trainable)
    before = np.asarray(model.encoder.kernel[...])
    nnx.update(model, fo.combine(trained, frozen))
    assert np.array_equal(model.encoder.kernel[...], before)
    assert not np.any(model.head.kernel[...])


def test_joined_linen_parameters_apply():
    model = nn.Dense(3)
    params = model.init(jax.random.key(0), jnp.ones((1, 2)))
    trainable, frozen = fo.partition(params, "params/bias")
    assert np.array_equal(
        model.apply(fo.combine(trainable, frozen), jnp.ones(2)), model.apply(params, jnp.ones(2))
    )


@pytest.mark.parametrize(
    ("selection", "error", "message"),
    [
        ("encodr", ValueError, "by_path('encodr') selects nothing"),
        (["encoder", "encodr"], ValueError, "by_path('encodr') selects nothing"),
        (
            {"encoder": True},
            ValueError,
            "the mask and the parameters differ in structure at 'the root'",
        ),
        ("/encoder", ValueError, "Write 'encoder'"),
        (3, TypeError, "cannot select leaves by 3 of type int"),
        (None, TypeError, "exactly one of the two"),
        (lambda path, leaf: None, TypeError, "expected a bool"),
    ],
)
def test_a_selection_that_does_not_fit_is_an_error(selection, error, message):
    for tree in (PARAMS, jax.tree.map(jnp.float32, PARAMS)):
        for arguments in ({"frozen": selection}, {"trainable": selection}):
            with pytest.raises(error, match=re.escape(message)):
                fo.partition(tree, **arguments)


# --- combine


def test_three_parts_join_in_any_order_pruned_or_not():
    for prune in (False, True):
        rest, a = fo.partition(PARAMS, "encoder", prune=prune)
        c, b = fo.partition(rest, "head/kernel", prune=prune)
        for parts in ((a, b, c), (c, b, a), (b, a, c)):
            assert_same(fo.combine(*parts), PARAMS)
    assert_same(fo.combine(*fo.partition(PARAMS, "head"), HOLE), PARAMS)


def test_pruned_and_unpruned_parts_join():
    for selection in ("encoder", "encoder/kernel", ["encoder/kernel", "head"], True, False):
        trainable, frozen = fo.partition(PARAMS, selection)
        pruned_trainable, pruned_frozen = fo.partition(PARAMS, selection, prune=True)
        assert_same(fo.combine(trainable, pruned_frozen), PARAMS)
        assert_same(fo.combine(pruned_trainable, frozen), PARAMS)
        assert_same(fo.combine(trainable, frozen), PARAMS)


def test_one_part_is_itself_and_no_part_is_an_error():
    tree = {"a": 1.0, "b": HOLE, "c": None}
    assert_same(fo.combine(tree), tree)
    assert fo.combine(2.0) == 2.0
    with pytest.raises(TypeError, match="at least one part"):
        fo.combine()


def test_a_place_where_all_parts_have_a_hole_stays_a_hole():
    assert fo.combine({"a": HOLE, "b": 1.0}, {"a": HOLE, "b": HOLE}) == {"a": HOLE, "b": 1.0}
    assert fo.combine({"a": HOLE, "b": 1.0}, HOLE, {"a": HOLE, "b": HOLE}) == {"a": HOLE, "b": 1.0}
    assert fo.combine(HOLE, HOLE) == HOLE


def test_a_part_may_hold_other_leaves_than_were_split_off():
    trainable, frozen = fo.partition(PARAMS, "encoder")
    labels = jax.tree.map(lambda _: "trained", trainable)
    assert fo.combine(labels, frozen) == {
        "encoder": PARAMS["encoder"],
        "head": {"kernel": "trained", "bias": "trained"},
    }
    assert fo.combine({"a": HOLE, "b": 0}, {"a": False, "b": HOLE}) == {"a": False, "b": 0}


def test_none_joins_none_and_holes():
    for other in (None, HOLE):
        assert fo.combine({"a": None, "b": 1.0}, {"a": other, "b": HOLE}) == {"a": None, "b": 1.0}
        assert fo.combine({"a": other, "b": HOLE}, {"a": None, "b": 1.0}, HOLE) == {
            "a": None,
            "b": 1.0,
        }


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            ({"a": {"b": 1.0, "c": 2.0}}, {"a": {"b": HOLE, "c": 3.0}}),
            "2 parts have a leaf at 'a/c'",
        ),
        (
            ({"a": {"b": 1.0, "c": HOLE}}, {"a": HOLE}, {"a": {"b": 3.0, "c": 2.0}}),
            "2 parts have a leaf at 'a/b'",
        ),
        (([1.0, [2.0]], [HOLE, [3.0]], [HOLE, [4.0]]), "3 parts have a leaf at '1/0'"),
        ((1.0, 2.0), "2 parts have a leaf at 'the root'"),
        (({"a": jnp.ones((2, 3))}, {"a": 1.0}), "(a leaf float32[2, 3])"),
        (({"a/~/b": {"w": 1.0}}, {"a/~/b": {"w": 1.0}}), "at 'a/~/b/w'"),
        (
            ({"a": {"b": 1.0}}, {"a": {"c": 1.0}}),
            "differ in structure at 'a': a dict of 1 (b), a dict of 1 (c)",
        ),
        (({"a": 1.0, "b": HOLE}, {"a": HOLE}), "differ in structure at 'the root'"),
        (
            ({"a": {"b": HOLE}}, {"a": 1.0}),
            "differ in structure at 'a': a dict of 1 (b), a leaf of type float",
        ),
        (
            ({"a": 1.0}, {"a": {"b": HOLE}}),
            "differ in structure at 'a': a leaf of type float, a dict of 1 (b)",
        ),
        (
            ({"a": [1.0, HOLE]}, {"a": (HOLE, 2.0)}),
            "differ in structure at 'a': a list of 2 (0, 1), a tuple of 2",
        ),
        (
            ({"a": [1.0]}, {"a": [HOLE, 2.0]}),
            "differ in structure at 'a': a list of 1 (0), a list of 2 (0, 1)",
        ),
        (
            ({"a": {"b": None}}, {"a": {"b": 1.0}}),
            "differ in structure at 'a/b': None, a leaf of type float",
        ),
        (
            ({"a": {"b": 1.0}}, {"a": {"b": None}}),
            "differ in structure at 'a/b': a leaf of type float, None",
        ),
        (({"a": {"b": 1.0}}, None), "differ in structure at 'the root': a dict of 1 (a), None"),
    ],
)
def test_parts_that_do_not_fit_are_an_error_that_names_the_path(parts, message):
    with pytest.raises(ValueError, match="cannot combine") as error:
        fo.combine(*parts)
    assert message in str(error.value)


def test_an_error_names_the_path_in_an_nnx_state_as_selectors_do():
    state = nnx.state(NnxModel(nnx.Rngs(0)), nnx.Param)
    with pytest.raises(ValueError, match="2 parts have a leaf at 'encoder/bias'"):
        fo.combine(state, state)


# --- Properties of random trees and selectors

check = settings(max_examples=80, deadline=None, derandomize=True)


@check
@given(st.data(), trees, st.booleans())
def test_what_is_split_joins_to_the_very_same_tree(data, tree, prune):
    selector = data.draw(selectors(tree))
    trainable, frozen = fo.partition(tree, selector, prune=prune)
    assert_same(fo.combine(trainable, frozen), tree)
    assert_same(fo.combine(frozen, trainable), tree)
    chosen = jax.tree.leaves(selector.mask(tree))
    leaves = jax.tree.leaves(tree)
    for part, mine in ((trainable, False), (frozen, True)):
        expected = [leaf for leaf, pick in zip(leaves, chosen, strict=True) if pick is mine]
        assert all(a is b for a, b in zip(jax.tree.leaves(part), expected, strict=True))
    if not prune:
        is_hole = lambda node: isinstance(node, optax.MaskedNode)
        whole = jax.tree.structure(tree, is_leaf=is_hole)
        assert jax.tree.structure(trainable, is_leaf=is_hole) == whole
        assert jax.tree.structure(frozen, is_leaf=is_hole) == whole


@check
@given(st.data(), trees, st.booleans(), st.booleans())
def test_the_parts_have_nothing_more_to_freeze_or_to_train(data, tree, prune, again):
    selector = data.draw(selectors(tree))
    trainable, frozen = fo.partition(tree, selector, prune=prune)
    kept, rest = fo.partition(trainable, selector, prune=again)
    assert jax.tree.leaves(rest) == []
    assert_same(fo.combine(kept, frozen), tree)
    rest, kept = fo.partition(frozen, selector, prune=again)
    assert jax.tree.leaves(rest) == []
    assert_same(fo.combine(trainable, kept), tree)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data(), trees)
def test_freezing_twice_is_freezing_once(data, tree):
    selector = data.draw(selectors(tree))
    tx = fo.freeze(selector)
    state = tx.init(tree)
    updates = jax.tree.map(lambda leaf: leaf + np.float32(0.5), tree)
    once, _ = tx.update(updates, state, tree)
    twice, _ = tx.update(once, state, tree)
    assert jax.tree.structure(once) == jax.tree.structure(twice) == jax.tree.structure(tree)
    columns = zip(*map(jax.tree.leaves, (selector.mask(tree), updates, once, twice)), strict=True)
    for frozen, before, first, second in columns:
        expected = np.full_like(before, -0.0) if frozen else before
        assert np.asarray(first).tobytes() == np.asarray(second).tobytes() == expected.tobytes()
