"""A hole counts for what could lie below it, so that patterns are right inside optax's masks."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import HOLE, ONES, PARAMS, nest

import frozen_optax as fo


@pytest.mark.parametrize(
    ("glob", "hole", "could"),
    [
        ("encoder", "encoder", True),
        ("encoder", "encoder/layer_0/kernel", True),
        ("encoder/layer_0/kernel", "encoder", True),
        ("encoder/layer_[0-3]", "encoder", True),
        ("encoder/layer_[0-3]", "encoder/layer_2", True),
        ("encoder/layer_[0-3]", "encoder/layer_4", False),
        ("encoder/*/mlp", "encoder/layer_0", True),
        ("encoder/*/mlp", "encoder/layer_0/mlp/kernel", True),
        ("encoder/*/mlp", "encoder/layer_0/attention", False),
        ("**/bias", "encoder", True),
        ("**/bias", "encoder/kernel", True),  # a hole may stand for a subtree
        ("encoder/**/kernel", "encoder/a/b/c", True),
        ("encoder/**/kernel", "head", False),
        ("encoder/**", "encoder", True),
        ("encoder/**", "encoder_norm", False),
        ("a/**/b/c", "a/x/b", True),
        ("a/**/b/c", "b", False),
        ("*/*/*", "a", True),
        ("?", "ab", False),
        ("?/b", "a", True),
        ("decoder", "encoder", False),
        ("encoder", "model/encoder", False),
        ("a[[]0]", "a[0]", True),
        ("a", "a\nb", False),
        ("a*", "a\nb", True),
        ("decoder", "", True),  # nothing but one hole
    ],
)
def test_a_hole_counts_for_whatever_could_lie_below_it(glob, hole, could):
    tree = {**nest(hole, leaf=HOLE), "zzz": 1.0} if hole else HOLE
    selector = fo.by_path(glob)
    if could:
        assert selector.paths(tree) == []
        assert (~selector).paths(tree) == (["zzz"] if hole else [])
    else:
        for wrapped in (selector, ~selector):
            with pytest.raises(ValueError, match="selects nothing"):
                wrapped.mask(tree)


def test_a_mask_over_the_whole_tree_fits_a_tree_with_holes():
    mask = fo.by_path("**/bias").mask(PARAMS)
    for tree in (
        {"encoder": HOLE, "head": {"kernel": 3.0, "bias": 4.0}},
        {"encoder": {"kernel": 1.0, "bias": HOLE}, "head": {"kernel": HOLE, "bias": 4.0}},
    ):
        assert fo.by_mask(mask).paths(tree) == ["head/bias"]
    assert fo.by_mask(mask).mask(HOLE) == HOLE


def step(tx: Any, params: Any) -> Any:
    """The parameters after one step with gradients of one, run eagerly and under jit."""
    gradients = jax.tree.map(jnp.ones_like, params)
    results = []
    for wrap in (lambda f: f, jax.jit):
        state = wrap(tx.init)(params)
        updates, _ = wrap(tx.update)(gradients, state, params)
        results.append(fo.apply_updates(params, updates))
    np.testing.assert_array_equal(*(np.concatenate(jax.tree.leaves(result)) for result in results))
    return jax.tree.map(lambda leaf: leaf.item(), results[0])


INSIDE = {
    "freeze_by_path": lambda *patterns: optax.chain(optax.sgd(0.5), fo.freeze_by_path(*patterns)),
    "freeze": lambda *patterns: optax.chain(optax.sgd(0.5), fo.freeze(list(patterns))),
    "with_frozen": lambda *patterns: fo.with_frozen(optax.sgd(0.5), list(patterns)),
}


@pytest.mark.parametrize("inside", INSIDE)
def test_whole_tree_patterns_are_right_inside_optax_partition(inside):
    encoder = fo.by_path("encoder")
    for patterns in (
        ("**/bias",),
        ("encoder/kernel", "head/bias"),
        ("encoder/*", re.compile("head/b.*")),
    ):
        transforms = {"frozen": optax.sgd(0.25), "trainable": INSIDE[inside](*patterns)}
        assert step(optax.partition(transforms, encoder.labels), ONES) == {
            "encoder": {"kernel": 0.75, "bias": 0.75},
            "head": {"kernel": 0.5, "bias": 1.0},
        }
        assert step(optax.partition(transforms, encoder.labels(ONES)), ONES)["head"] == {
            "kernel": 0.5,
            "bias": 1.0,
        }
    with pytest.raises(ValueError, match=re.escape("by_path('decoder') selects nothing")):
        optax.partition(
            {"frozen": optax.sgd(1.0), "trainable": INSIDE[inside]("decoder")}, encoder.labels
        ).init(ONES)


@pytest.mark.parametrize("inside", INSIDE)
def test_whole_tree_patterns_are_right_inside_optax_masked(inside):
    head = fo.by_path("head")
    for patterns in (("**/bias",), ("encoder", "head/bias"), (re.compile("encoder/k.*"), "*/bias")):
        for mask in (head.mask, head.mask(ONES)):
            new = step(optax.masked(INSIDE[inside](*patterns), mask), ONES)
            assert new == {
                "encoder": {"kernel": 2.0, "bias": 2.0},
                "head": {"kernel": 0.5, "bias": 1.0},
            }
    with pytest.raises(ValueError, match=re.escape("by_path('decoder') selects nothing")):
        optax.masked(INSIDE[inside]("decoder"), head.mask).init(ONES)
