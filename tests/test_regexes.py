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


@pytest.mark.parametrize(
    ("patterns", "paths"),
    [
        (["bias"], ["encoder/bias", "head/bias"]),
        ([".*enc.*bias.*", "^head"], ["encoder/bias", "head/bias", "head/kernel"]),
        ([re.compile("HEAD", re.IGNORECASE)], ["head/bias", "head/kernel"]),
        (["kernel$"], ["encoder/kernel", "head/kernel"]),
    ],
)
def test_a_regex_may_be_searched_for(patterns, paths):
    selector = fo.by_path(patterns, search=True)
    assert selector.paths(PARAMS) == paths
    assert eval(repr(selector), {"by_path": fo.by_path, "re": re}) == selector
    assert selector != fo.by_path("bias", "head")


def test_patterns_of_a_configuration_say_what_trains():
    params = {"llm": {"layers": {"lora_a": 1.0, "w": 2.0}}, "img": {"w": 3.0}, "head": {"w": 4.0}}
    train = [".*llm.*lora.*", "head"]
    trained, _ = fo.partition(params, trainable=fo.by_path(*train, search=True))
    assert fo.by_path("**").paths(trained) == ["head/w", "llm/layers/lora_a"]
    with pytest.raises(ValueError, match="selects nothing") as error:
        fo.partition(params, trainable=fo.by_path([*train, ".*llm.*lorra.*"], search=True))
    assert str(error.value).startswith(
        "by_path('.*llm.*lorra.*', search=True) selects nothing: it matches none of the 4 leaves."
    )
    assert "'llm/layers/lora_a'" in str(error.value)
    assert "has to match the whole path" not in str(error.value)


def test_only_a_pattern_for_every_path_may_freeze_everything():
    for said in (".*", re.compile(".*")):
        fo.grad(lambda params: 0.0, fo.by_path(said, search=True))(PARAMS)
    with pytest.raises(ValueError, match="freezes all 4 leaves"):
        fo.grad(lambda params: 0.0, fo.by_path("e", search=True))(PARAMS)


def test_a_glob_where_regexes_are_searched_for_is_an_error_at_once():
    with pytest.raises(
        ValueError, match=r"the regex '\*\*/bias' cannot be read.*by_path\(\.\.\.\)"
    ):
        fo.by_path("**/bias", search=True)
