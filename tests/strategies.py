"""Random trees and selectors."""

import glob as globs
import re
from typing import Any

import jax
import numpy as np
import pytest
from helpers import HOLE, paths_of
from hypothesis import strategies as st

import frozen_optax as fo

KEYS = [
    "a",
    "b",
    "ab",
    "layer_1",
    "layer_10",
    "x/y",
    "a[0]",
    "*",
    "?",
    "**",
    "[!a]",
    "é",
    "a b",
    "c\n",
    ".",
    "value",
]


trees = st.recursive(
    st.one_of(st.integers(0, 3).map(lambda n: np.zeros(n, np.float32)), st.none(), st.just(HOLE)),
    lambda children: st.one_of(
        st.dictionaries(st.sampled_from(KEYS), children, max_size=4),
        st.lists(children, max_size=3),
        st.lists(children, max_size=3).map(tuple),
    ),
    max_leaves=12,
)


@st.composite
def simple_selectors(draw: Any, tree: Any, values: bool = False) -> fo.Selector:
    """A selector right for the tree; one that reads back from its repr if `values`."""
    paths = paths_of(tree)
    kinds = ["all", "mask", "bool"] + ["predicate"] * (not values)
    kind = draw(
        st.sampled_from(
            kinds + ["name", "wildcard", "below", "regex"] * (len(paths) > 0 and paths != [""])
        )
    )
    if kind == "all":
        return fo.by_path(draw(st.sampled_from(["*", "**"])))
    if kind == "bool":
        return fo.by_mask(draw(st.booleans()))
    chosen = draw(st.lists(st.booleans(), min_size=len(paths), max_size=len(paths)))
    if kind == "mask":
        return fo.by_mask(jax.tree.unflatten(jax.tree.structure(tree), chosen))
    if kind == "predicate":
        names = frozenset(path for path, pick in zip(paths, chosen, strict=True) if pick)
        return fo.by_predicate(lambda path, leaf: path in names)
    path = draw(st.sampled_from(paths))
    if kind == "regex":
        regexes = [re.escape(path), "(?s).*", re.escape(path[:1]) + "(?s:.*)"]
        return fo.by_path(re.compile(draw(st.sampled_from(regexes))))
    keys = [globs.escape(key) for key in path.split("/")]
    if kind == "below":
        return fo.by_path("/".join(["**", *keys[draw(st.integers(0, len(keys) - 1)) :]]))
    keys = keys[: draw(st.integers(1, len(keys)))]
    if kind == "wildcard":
        keys[draw(st.integers(0, len(keys) - 1))] = draw(st.sampled_from(["*", "**"]))
    return fo.by_path("/".join(keys))


def selectors(tree: Any, values: bool = False) -> st.SearchStrategy[fo.Selector]:
    made = st.recursive(
        simple_selectors(tree, values),
        lambda parts: st.one_of(
            parts.map(lambda s: ~s),
            st.tuples(parts, parts).map(lambda pair: pair[0] | pair[1]),
            st.tuples(parts, parts).map(lambda pair: pair[0] & pair[1]),
        ),
        max_leaves=3,
    )
    return made.filter(lambda selector: selects_something(selector, tree))


def selects_something(selector: fo.Selector, tree: Any) -> bool:
    """Whether it can be used on a tree: one that selects nothing is an error, unless it says so."""
    try:
        selector.mask(tree)
    except ValueError:
        return False
    return True


def bools(selector: fo.Selector, tree: Any) -> list[bool]:
    mask = selector.mask(tree)
    assert jax.tree.structure(mask) == jax.tree.structure(tree)
    return jax.tree.leaves(mask)


def assert_selects(selector: fo.Selector, tree: Any, expected: list[bool]) -> None:
    """Just these leaves; where they are none it may be an error that says so."""
    if any(expected) or selects_something(selector, tree):
        assert bools(selector, tree) == expected
    else:
        with pytest.raises(ValueError, match="selects nothing"):
            selector.mask(tree)


names = st.text("ab]-.\n", min_size=1, max_size=3)
