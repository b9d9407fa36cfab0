"""A pattern that selects nothing is an error that points to what is near."""

import re

import pytest
from helpers import ALL, PARAMS

import frozen_optax as fo


@pytest.mark.parametrize(
    ("pattern", "nearest"),
    [
        ("encodr", "encoder"),
        ("head/kernal", "head/kernel"),
        ("Head", "head"),
        ("encoder/*/kernel", "encoder/kernel"),
        ("**/kernal", "head/kernel"),
        ("params/encoder", "encoder"),
        ("zzz", "encoder/"),
        (re.compile("ecnoder/.*"), "encoder"),
    ],
)
def test_a_pattern_that_selects_nothing_names_what_is_near(pattern, nearest):
    selector = fo.by_path(pattern)
    for wrapped in (
        selector,
        ~selector,
        ~~selector,
        selector | ALL,
        ALL | ~selector,
        ~ALL & selector,
    ):
        for use in (wrapped.mask, wrapped.labels, wrapped.paths, fo.freeze(wrapped).init):
            with pytest.raises(
                ValueError, match=re.escape(f"by_path({pattern!r}) selects nothing")
            ) as error:
                use(PARAMS)
            assert "none of the 4 leaves" in str(error.value)
            assert repr(nearest).rstrip("'") in str(error.value)


def test_a_name_that_stands_further_down_is_pointed_out():
    with pytest.raises(
        ValueError, match=re.escape("'kernel' stands at 'encoder/kernel', write '**/kernel'")
    ):
        fo.by_path("kernel").mask(PARAMS)


def test_the_nearest_path_is_found_in_a_large_tree_too():
    tree = {
        f"block_{i}": {f"layer_{j}": {"kernel": 1.0, "bias": 2.0} for j in range(60)}
        for i in range(60)
    }
    for pattern in ("haed", "head/kernal"):
        with pytest.raises(ValueError, match="none of the 7201 leaves") as error:
            fo.by_path(pattern).mask({**tree, "head": {"kernel": 3.0}})
        assert "'head" in str(error.value).removeprefix(f"by_path({pattern!r})")


def test_any_pattern_but_all_is_an_error_without_leaves():
    for tree in ({}, None, [], {"a": {}, "b": None}):
        for glob in ("**", "*"):
            assert fo.by_path(glob).mask(tree) == tree
            assert (~fo.by_path(glob)).mask(tree) == tree
        for selector in (fo.by_mask(True), fo.by_predicate(lambda path, leaf: 1 / 0)):
            assert selector.mask(tree) == tree
        for pattern in ("a", "**/a", re.compile("a")):
            with pytest.raises(ValueError, match="none of the 0 leaves"):
                fo.by_path(pattern).mask(tree)


def test_the_nearest_paths_share_the_most_segments():
    layers = {f"layers_{i}": {"attn": {"lora": {"a": 1.0, "b": 2.0}}} for i in range(20)}
    with pytest.raises(ValueError, match=r"nearest paths are 'layers_0/attn/lora/a'"):
        fo.by_path("**/lora/*/kernel").mask({"embedder": {"embedding": 0.0}, **layers})
    with pytest.raises(ValueError, match=r"nearest paths are 'layers_3/attn/lora'"):
        fo.by_path("layers_3/atn/lora").mask({"layers_3_attn_lora": 0.0, **layers})
    with pytest.raises(ValueError, match=r"nearest paths are 'encoder/layer_1'"):
        fo.by_path("encoder/laier_1").mask(
            {"encoder": {"layer_1": {"w": 1.0}, "x": 2.0}, "laier": {"x": 1.0}}
        )
