"""What holds for random trees and random selectors."""

import glob as globs
import pickle
import re

import jax
import optax
from helpers import paths_of
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import assert_selects, bools, selectors, trees

import frozen_optax as fo

check = settings(max_examples=60, deadline=None, derandomize=True)


@check
@given(st.data(), trees)
def test_or_and_and_not_of_selectors_are_those_of_their_masks(data, tree):
    s, t = data.draw(selectors(tree)), data.draw(selectors(tree))
    left, right = bools(s, tree), bools(t, tree)
    both = [a and b for a, b in zip(left, right, strict=True)]
    either = [a or b for a, b in zip(left, right, strict=True)]
    neither = [not a for a in either]
    assert bools(s | t, tree) == either
    assert_selects(s & t, tree, both)
    assert_selects(~s, tree, [not a for a in left])
    assert bools(~~s, tree) == left
    assert_selects(~(s | t), tree, neither)
    assert_selects(~s & ~t, tree, neither)
    if any(both):
        assert_selects(~(s & t), tree, [not a for a in both])
    if not (all(left) or all(right)):
        assert_selects(~s | ~t, tree, [not a for a in both])
    assert s.paths(tree) == [
        path for path, chosen in zip(paths_of(tree), left, strict=True) if chosen
    ]
    assert jax.tree.leaves(s.labels(tree, 1, 0)) == left
    assert_selects(fo.by_mask(s.mask(tree)), tree, left)
    assert_selects(fo.by_mask(s.mask), tree, left)


@check
@given(st.data(), trees)
def test_every_repr_reads_back_and_every_value_survives_a_pickle(data, tree):
    selector = data.draw(selectors(tree, values=True))
    again = eval(repr(selector), {**vars(fo), "re": re, "MaskedNode": optax.MaskedNode})
    assert again == selector
    assert bools(again, tree) == bools(selector, tree)
    assert pickle.loads(pickle.dumps(selector)) == selector


@check
@given(trees)
def test_an_escaped_path_selects_the_leaves_at_it_and_below_it(tree):
    paths = paths_of(tree)
    assume(paths != [""])
    for path in paths:
        keys = path.split("/")
        for i in range(1, len(keys) + 1):
            name = "/".join(keys[:i])
            expected = [other for other in paths if other == name or other.startswith(name + "/")]
            assert fo.by_path(globs.escape(name)).paths(tree) == expected


@check
@given(st.data(), trees)
def test_what_is_right_for_a_tree_is_right_for_less_of_it(data, tree):
    selector = data.draw(selectors(tree))
    dig = lambda node: optax.MaskedNode() if data.draw(st.booleans()) else node
    holes = [dig(path) for path in paths_of(tree)]
    tree = jax.tree.unflatten(jax.tree.structure(tree), holes)  # its leaves are their own paths
    whole = isinstance(tree, (dict, list)) and data.draw(st.booleans())
    if whole and isinstance(tree, dict):
        tree = {key: dig(value) for key, value in tree.items()}
    elif whole:
        tree = [dig(value) for value in tree]
    kept = selector.paths(tree)
    assert kept == [
        path
        for path, chosen in zip(jax.tree.leaves(tree), bools(selector, tree), strict=True)
        if chosen
    ]
