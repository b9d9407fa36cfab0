"""Which leaves a regex selects."""

import re

import pytest
from helpers import HOLE, PARAMS

import frozen_optax as fo


@pytest.mark.parametrize(
    ("regex", "paths"),
    [
        (r"encoder/.*", ["encoder/bias", "encoder/kernel"]),
        (r".*bias", ["encoder/bias", "head/bias"]),
        (r"(encoder|head)/kernel", ["encoder/kernel", "head/kernel"]),
        (r"(?i)HEAD/KERNEL", ["head/kernel"]),
        (r"^head/bias$", ["head/bias"]),
        (r"[^/]*/k.{5}", ["encoder/kernel", "head/kernel"]),
    ],
)
def test_a_regex_selects_the_paths_it_matches_whole(regex, paths):
    assert fo.by_path(re.compile(regex)).paths(PARAMS) == paths


@pytest.mark.parametrize("regex", ["encoder", "bias", "head/", "head/bia", "ead/bias", "HEAD/bias"])
def test_a_regex_that_matches_a_part_of_a_path_selects_nothing(regex):
    with pytest.raises(
        ValueError, match=re.escape(f"by_path(re.compile({regex!r})) selects nothing")
    ):
        fo.by_path(re.compile(regex)).mask(PARAMS)


def test_a_regex_keeps_its_flags():
    tree = {"a\nb": 1.0, "axb": 2.0, "A": 3.0}
    assert fo.by_path(re.compile("a.b")).paths(tree) == ["axb"]
    assert fo.by_path(re.compile("a.b", re.DOTALL)).paths(tree) == ["a\nb", "axb"]
    assert fo.by_path(re.compile("a", re.IGNORECASE)).paths(tree) == ["A"]


def test_globs_and_regexes_mix_and_any_of_them_selects():
    assert fo.by_path("head", re.compile(".*/bias")).paths(PARAMS) == [
        "encoder/bias",
        "head/bias",
        "head/kernel",
    ]


def test_a_regex_could_match_below_any_hole():
    assert fo.by_path(re.compile("decoder/.*")).paths({"encoder": HOLE, "head": 1.0}) == []
    with pytest.raises(ValueError, match="selects nothing"):
        fo.by_path(re.compile("decoder/.*")).mask({"encoder": None, "head": 1.0})


def test_a_regex_that_is_a_modules_name_is_told_to_go_below():
    with pytest.raises(ValueError, match=r"for all below a module write 'encoder/\.\*'") as error:
        fo.by_path(re.compile("encoder")).mask(PARAMS)
    assert "case" not in str(error.value)
