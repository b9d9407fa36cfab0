"""Lists and mixtures, what cannot select leaves, and `trainable` in place of `frozen`."""

import re

import jax
import numpy as np
import optax
import pytest
from helpers import HOLE, PARAMS, ROOMS

import frozen_optax as fo


def test_of_a_list_any_selects():
    pick = lambda *items: jax.tree.leaves(fo.partition(PARAMS, list(items))[1])
    assert pick("encoder") == [2.0, 1.0]
    assert pick("encoder", "head/bias") == [2.0, 1.0, 4.0]
    assert pick(fo.by_path("encoder/bias"), re.compile("head/b.*")) == [2.0, 4.0]
    assert pick(lambda path, leaf: path == "head/bias", "encoder/bias") == [2.0, 4.0]
    assert pick(
        fo.by_mask({"encoder": True, "head": False}) & ~fo.by_path("**/bias"), "head/bias"
    ) == [1.0, 4.0]
    assert jax.tree.leaves(fo.partition(PARAMS, ("encoder", "head/bias"))[1]) == [2.0, 1.0, 4.0]
    # Bools: a mask in the form of a list.
    assert fo.partition([1.0, 2.0], [True, False])[1] == [1.0, HOLE]


@pytest.mark.parametrize(
    "selection",
    [
        ["encoder", "hed/bias"],
        ("hed/bias", "encoder"),
        [fo.by_path("encoder"), fo.by_path("hed/bias")],
        [lambda path, leaf: True, "hed/bias"],
        fo.by_path("encoder", "hed/bias"),
        fo.by_path("**", "hed/bias"),
    ],
)
def test_a_name_of_a_list_that_selects_nothing_is_an_error(selection):
    for arguments in ({"frozen": selection}, {"trainable": selection}):
        with pytest.raises(
            ValueError, match=re.escape("by_path('hed/bias') selects nothing")
        ) as error:
            fo.partition(PARAMS, **arguments)
        assert "'head/bias'" in str(error.value)


@pytest.mark.parametrize("empty", [[], ()])
def test_an_empty_list_is_an_error_that_says_what_to_write(empty):
    with pytest.raises(ValueError, match="write False"):
        fo.freeze(empty)


@pytest.mark.parametrize(
    "wrong", [3, 0, 1.5, b"encoder", {"encoder"}, object(), ..., np.array([True, False])]
)
def test_what_cannot_select_leaves_is_an_error_with_its_type(wrong):
    for use in (
        fo.freeze,
        lambda s: fo.with_frozen(optax.sgd(1.0), s),
        lambda s: fo.partition(PARAMS, s),
    ):
        with pytest.raises(
            TypeError, match=f"cannot select leaves by .* of type {type(wrong).__name__}: expected"
        ):
            use(wrong)


@pytest.mark.parametrize(
    "wrong", [["encoder", 3], ["encoder", True], [["encoder"]], {"encoder": "head"}, [True, 1]]
)
def test_a_list_of_mixed_things_is_an_error_as_a_whole(wrong):
    with pytest.raises(TypeError, match="a mask holds True and False, found a leaf of type"):
        fo.partition(PARAMS, wrong)


@pytest.mark.parametrize("room", ROOMS)
def test_exactly_one_of_frozen_and_trainable_is_given(room):
    with pytest.raises(TypeError, match="exactly one of the two: neither was given"):
        ROOMS[room]()
    with pytest.raises(TypeError, match="exactly one of the two: neither was given"):
        ROOMS[room](None, trainable=None)
    with pytest.raises(TypeError, match="exactly one of the two: both was given"):
        ROOMS[room]("encoder", trainable="head")
    with pytest.raises(TypeError, match="exactly one of the two: both was given"):
        ROOMS[room](frozen=False, trainable=False)
    ROOMS[room]("encoder")
    ROOMS[room](frozen=False)
    ROOMS[room](trainable=["encoder"])
    ROOMS[room](trainable=False)


def test_trainable_is_the_complement_of_frozen():
    for selection in (
        "encoder",
        ["**/bias"],
        True,
        False,
        fo.by_path("head"),
        lambda path, leaf: path == "head/bias",
    ):
        trainable, frozen = fo.partition(PARAMS, selection)
        assert fo.partition(PARAMS, trainable=selection) == (frozen, trainable)


def test_patterns_in_a_list_are_taken_one_by_one():
    both = fo.by_path("encoder", "head")
    assert fo.by_path(["encoder", "head"]) == both
    assert fo.by_path(("encoder",), "head") == both
    assert fo.by_path(["encoder", re.compile("head/b.*")], "head/kernel").paths(
        PARAMS
    ) == fo.by_path("**").paths(PARAMS)
    fo.freeze_by_path(["encoder", "head"])
    with pytest.raises(ValueError, match=r"by_path\(\) needs at least one pattern"):
        fo.by_path([])
