"""Which leaves a glob selects, and what is no glob."""

import contextlib
import fnmatch
import re
import signal
import warnings

import numpy as np
import pytest
from helpers import HOLE, PARAMS, nest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import names

import frozen_optax as fo


@pytest.mark.parametrize(
    ("glob", "selected", "others"),
    [
        # The table of the design.
        ("encoder", "encoder/layer_0/w encoder/b", "encoder_norm/w model/encoder/w"),
        (
            "encoder/layer_1",
            "encoder/layer_1/w encoder/layer_1/b",
            "encoder/layer_10/w encoder/layer_0/w layer_1/w",
        ),
        (
            "encoder/layer_[0-3]",
            "encoder/layer_0/w encoder/layer_3/w",
            "encoder/layer_4/w encoder/layer_10/w",
        ),
        (
            "encoder/*/mlp",
            "encoder/l0/mlp/w encoder/l1/mlp",
            "encoder/mlp/w encoder/l0/attn encoder/a/b/mlp x/l0/mlp",
        ),
        (
            "**/bias",
            "bias encoder/bias encoder/a/b/bias head/bias/scale",
            "encoder/bias_scale encoder/b head/Bias",
        ),
        (
            "**/lora_*",
            "lora_a encoder/lora_b/w encoder/a/lora_",
            "encoder/xlora_a encoder/lora head/my_lora_b",
        ),
        (
            "encoder/**/kernel",
            "encoder/kernel encoder/a/kernel encoder/a/b/kernel/q",
            "kernel head/kernel encoder/b",
        ),
        ("encoder/**", "encoder/layer_0/w encoder/b", "encoder_norm/w model/encoder/w"),
        ("encoder/**", "encoder", "encoder_norm/w"),
        ("**", "a b/c d/e/f", ""),
        ("*", "a b/c d/e/f", ""),
        ("**", "", ""),
        ("*", "", ""),
        # `*` and `?` stay within a segment.
        ("layer_*", "layer_0/w layer_/w layer_10", "layer/w x/layer_0 my_layer_0"),
        ("*_norm", "a_norm/w _norm/w", "a_norm_b/w b/a_norm"),
        ("a*c", "ac abc abbc/x", "a/c a/bc ab/c"),
        ("*/w", "a/w b/w/x", "w a/b/w"),
        ("*/*", "a/b c/d/e", "f"),
        ("*/*/*", "a/b/c a/b/d/e", "a/f g"),
        ("*a*b*", "ab xaxbx axb/c", "ba a/b b/a"),
        ("layer_?", "layer_0/w layer_x/w", "layer_10/w layer_/w"),
        ("??", "ab/c xy", "a abc"),
        ("a?b", "axb a.b/c", "a/b ab axxb"),
        # Classes.
        ("layer_[02]", "layer_0/w layer_2", "layer_1/w layer_02/w"),
        ("layer_[!02]", "layer_1/w layer_x", "layer_0/w layer_2 layer_11"),
        ("layer_1[0-9]", "layer_10 layer_19/w", "layer_1/w layer_20/w layer_1x"),
        ("[a-cx]", "a/w b c x", "d ab -"),
        ("x[-a]", "x- xa", "xb x"),
        ("x[a-]", "x- xa", "xb x"),
        ("x[!-a]", "xb", "x- xa x"),
        ("x[]a]", "x] xa", "xb x[]a]"),
        ("x[!]a]", "xb", "x] xa"),
        ("x[^a]", "x^ xa", "xb"),
        ("x[!^]", "xa x!", "x^"),
        ("x[!!]", "xa", "x!"),
        ("x[a!]", "xa x!", "xb"),
        ("x[*]", "x*/w", "xa x"),
        ("x[?]", "x?/w", "xa x"),
        ("x[\\d]", "x\\ xd", "x1 x[\\d]"),
        ("x[a&&b]", "xa x& xb", "xc"),
        ("x[a||b~~c]", "xa x| xb x~ xc", "xd"),
        ("x[+--]", "x+ x, x-", "xa x. x*"),
        ("[[]*]", "[0] []", "0 [0"),
        ("x[.-0]y", "x.y x0y", "x/y x1y"),  # the range spans '/', which is in no segment
        ("x[!a]y", "xby", "x/y xay"),
        # `**` in the middle, at the end, several.
        ("a/**/b/**/c", "a/b/c a/x/b/c a/b/x/c/d a/x/y/b/z/c", "a/c b/c a/x/c x/a/b/c"),
        ("**/a/**/b", "a/b x/a/b x/a/y/z/b/c", "b x/b/a a/xb"),
        ("**/a/b", "a/b x/a/b/c x/y/a/b", "a/x/b b"),
        ("**/**", "a b/c", ""),
        ("**/**/w", "w a/w b/c/w", "b/c/v"),
        ("a/**/**", "a/b a/c/d", "b"),
        ("a/**/**/c", "a/c a/b/c", "c b/c"),
        ("**/*", "a b/c", ""),
        ("*/**", "a b/c", ""),
        ("**/*/w", "a/w a/b/w", "w b/v"),
        ("**/layer_*/**/bias", "layer_0/bias a/layer_1/b/c/bias", "bias a/bias layer_0/kernel"),
        ("**/a/**", "a/b x/a/c/d x/y/a", "b x/b"),
        ("*/**/w", "a/w a/b/w", "w a/v"),
        # Upper and lower case, names that are prefixes or suffixes of others, the same name
        # elsewhere.
        ("Encoder", "Encoder/w", "encoder/w ENCODER/w"),
        ("[A-Z]*", "Dense_0/w", "dense_0/w"),
        ("kernel", "kernel", "a/kernel kernel_0"),
        (
            "head/kernel",
            "head/kernel",
            "head/kernel_norm kernel encoder/head/kernel encoder/kernel",
        ),
        (
            "encoder/layer_0/kernel/0",
            "encoder/layer_0/kernel/0",
            "encoder/layer_0/kernel/00 encoder/layer_0/bias",
        ),
        # Regex metacharacters mean themselves.
        ("a.b", "a.b/w", "axb a/b"),
        ("a+", "a+/w", "aa a"),
        ("(a|b)", "(a|b)", "a b"),
        ("^a$", "^a$/w", "a"),
        ("a{2}", "a{2}", "aa"),
        ("a\\d", "a\\d", "a1 ad"),
        ("a\\*", "a\\ a\\b", "a* ab"),
        ("#a&b~c-d", "#a&b~c-d", "a"),
        ("x]y", "x]y", "xy"),
        ("!a", "!a", "b a"),
        # Dots, unicode, Haiku's.
        ("blocks.0.attn", "blocks.0.attn/w", "blocks.0.attn_norm/w blocks.00attn blocks/0/attn"),
        ("größe_*", "größe_1 größe_ß/w", "grosse_1"),
        ("?", "é", "éé"),
        ("[д-я]", "д ж", "ю2 f"),
        ("🧊/*", "🧊/w", "🔥/w"),
        ("mlp/~/linear_0", "mlp/~/linear_0/w mlp/~/linear_0/b", "mlp/~/linear_1/w mlp/linear_0/w"),
        ("~", "~/w", "a/~/w"),
        ("mlp/~", "mlp/~/linear_0/w", "mlp/w"),
    ],
)
def test_a_glob_selects_what_it_matches_and_all_below(glob, selected, others):
    tree = nest(*selected.split(" "), *others.split(" ")) if selected + others else {}
    tree = {key: value for key, value in tree.items() if key}
    assert sorted(fo.by_path(glob).paths(tree)) == sorted(selected.split())


@pytest.mark.parametrize(
    ("glob", "tree", "paths"),
    [
        ("layers/0", {"layers": [1.0, 2.0] + [3.0] * 9}, ["layers/0"]),
        ("layers/1", {"layers": [{"w": 1.0} for _ in range(12)]}, ["layers/1/w"]),
        (
            "layers/[1-2]/*",
            {"layers": ({"w": 1.0}, {"w": 1.0}, {"w": 2.0})},
            ["layers/1/w", "layers/2/w"],
        ),
        ("1", [1.0, 2.0, 3.0], ["1"]),
        ("0/1", ((1.0, 2.0), 3.0), ["0/1"]),
        (
            "mlp/~/linear_0/w",
            {"mlp/~/linear_0": {"w": 1.0, "b": 2.0}, "mlp/~/linear_1": {"w": 1.0}},
            None,
        ),
        (
            "mlp",
            {"mlp/~/linear_0": {"w": 1.0}, "mlp_1/~/linear_0": {"w": 1.0}},
            ["mlp/~/linear_0/w"],
        ),
        (
            "mlp/*/linear_?/w",
            {"mlp/~/linear_0": {"w": 1.0}, "mlp/linear_0": {"w": 1.0}},
            ["mlp/~/linear_0/w"],
        ),
        ("**/linear_0", {"mlp/~/linear_0": {"w": 1.0}, "linear_0": {"w": 1.0}, "linear": 2.0}, 2),
        ("a/b", {"a/b": 1.0, "a": {"b": 2.0, "c": 3.0}}, ["a/b", "a/b"]),
        ("a[[]0]", {"a[0]": 1.0, "a0": 2.0, "a": [3.0]}, ["a[0]"]),
        ("a[[]*[]]", {"a[0]": {"w": 1.0}, "a[1]": 2.0, "a0": 2.0}, ["a[0]/w", "a[1]"]),
        ("a[[][!0]]", {"a[0]": 1.0, "a[1]": 2.0}, ["a[1]"]),
        ("a b", {"a b": {"c": 1.0}, "a": 2.0}, ["a b/c"]),
        ("a b/* d", {"a b": {"c d": 1.0, "cd": 2.0}}, ["a b/c d"]),
        (" a", {" a": 1.0, "a": 2.0}, [" a"]),
        ("a\nb", {"a\nb": {"c": 1.0}, "a": 2.0}, ["a\nb/c"]),
        ("a*", {"a\nb": {"c\n": 1.0}, "b": 2.0}, ["a\nb/c\n"]),
        ("a?b", {"a\nb": 1.0, "a\n\nb": 2.0}, ["a\nb"]),
        ("**/c", {"a\nb": {"c": 1.0, "c\n": 2.0}}, ["a\nb/c"]),
        ("a", {"a": 1.0, "a\n": 2.0}, ["a"]),
        ("0", {0: 1.0, 1: 2.0, 10: 3.0}, ["0"]),
        ("1/w", {0: {"w": 1.0}, 1: {"w": 2.0}}, ["1/w"]),
        ("-1", {-1: 1.0, 1: 2.0}, ["-1"]),
        ("None", {None: 1.0}, ["None"]),
        ("(1, 2)", {(1, 2): 1.0, (1, 3): 2.0}, ["(1, 2)"]),
        ("a/*/c", {"a": {"": {"c": 1.0}}, "b": 2.0}, ["a//c"]),
        ("**", 1.0, [""]),
        ("*", np.ones(2), [""]),
        ("**", None, []),
        ("*", [{}, (), None], []),
        ("a/value", {"a": {"value": 1.0, "other": 2.0}}, ["a/value"]),
        ("value", {"value": 1.0, "other": 2.0}, ["value"]),
    ],
)
def test_a_glob_reads_every_kind_of_key(glob, tree, paths):
    if paths is None:
        paths = [glob]
    elif isinstance(paths, int):
        assert len(fo.by_path(glob).paths(tree)) == paths
        return
    assert fo.by_path(glob).paths(tree) == paths


@pytest.mark.parametrize(
    ("glob", "message", "suggestion"),
    [
        ("/encoder", "glob '/encoder' has an empty segment", "encoder"),
        ("encoder/", "glob 'encoder/' has an empty segment", "encoder"),
        ("/encoder/w/", "glob '/encoder/w/' has an empty segment", "encoder/w"),
        ("a//b", "glob 'a//b' has an empty segment", "a/b"),
        ("**/", "glob '**/' has an empty segment", "**"),
        ("", "glob '' is empty", "**"),
        ("/", "glob '/' is empty", "**"),
        ("//", "glob '//' is empty", "**"),
        ("a**", "glob 'a**': '**' stands for whole segments only", "a*"),
        ("**a", "glob '**a': '**' stands for whole segments only", "*a"),
        ("a**b", "glob 'a**b': '**' stands for whole segments only", "a*b"),
        ("***", "glob '***': '**' stands for whole segments only", "*"),
        ("a/b**/c", "glob 'a/b**/c': '**' stands for whole segments only", "a/b*/c"),
        ("a**/b**", "glob 'a**/b**': '**' stands for whole segments only", "a*/b*"),
        ("/a**", "glob '/a**'", "a*"),
        ("[", "glob '[': the class opened by '[' is not closed", "[[]"),
        ("a[0", "glob 'a[0': the class opened by '[' is not closed", "[[]"),
        ("a[]", "glob 'a[]': the class opened by '[' is not closed", "[[]"),
        ("a[!]", "glob 'a[!]': the class opened by '[' is not closed", "[[]"),
        ("a[/]b", "glob 'a[/]b': the class opened by '[' is not closed", "[[]"),
        ("b/a[", "glob 'b/a[': the class opened by '[' is not closed", "[[]"),
    ],
)
def test_an_unreadable_glob_says_how_to_write_it(glob, message, suggestion):
    for use in (fo.by_path, fo.freeze_by_path, fo.freeze, lambda g: fo.by_path("fine", g)):
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            use(glob)
        assert f"rite {suggestion!r}" in str(error.value)
    fo.by_path(suggestion)


def test_a_class_from_high_to_low_is_an_error_with_the_glob():
    with pytest.raises(
        ValueError, match=re.escape("glob 'x[z-a]' has a character class that cannot be read")
    ):
        fo.by_path("x[z-a]")


def test_reading_a_glob_never_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for glob in (
            "x[[a]",
            "x[a--]",
            "x[+--]",
            "x[a&&b]",
            "x[a||b]",
            "x[a~~b]",
            "x[!--9]",
            "x[\\a]",
            "\\x",
        ):
            with contextlib.suppress(ValueError):
                fo.by_path(glob)


@contextlib.contextmanager
def interrupted_after(seconds):
    """Interrupts a regex that goes on, where the platform can; elsewhere the test does not end.

    The seconds are the process's own, so that a machine that is busy with something else interrupts
    nothing."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_):
        raise TimeoutError("matching takes exponential time")

    previous = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous)


@pytest.mark.parametrize(
    ("glob", "other", "matching"),
    [
        ("**/" + "a/**/" * 30 + "b", "/".join("a" * 90), "/".join("a" * 90 + "b")),
        ("*a" * 30 + "*b", "a" * 90, "a" * 90 + "b"),
        ("*a" * 30 + "*b", "a" * 90 + "/c", "a" * 90 + "b/c"),
        (
            "**/" + "*a*/**/" * 20 + "b",
            "/".join(["aaaa"] * 60),
            "/".join(["aaaa"] * 60 + ["b", "c"]),
        ),
    ],
    ids=["many **", "many *", "many * in a module", "both"],
)
def test_a_glob_of_many_wildcards_does_not_try_every_way(glob, other, matching):
    with interrupted_after(10):
        assert fo.by_path(glob).paths({other: 1.0, matching: 2.0}) == [matching]
        with pytest.raises(ValueError, match="selects nothing"):
            fo.by_path(glob).paths({other: 1.0})


def test_patterns_are_needed_and_have_to_be_text():
    with pytest.raises(ValueError, match=re.escape("by_path() needs at least one pattern")):
        fo.by_path()
    with pytest.raises(TypeError, match=re.escape("found a leaf of type int: 3")):
        fo.by_path("a", 3)
    with pytest.raises(TypeError, match="bytes regex"):
        fo.by_path(re.compile(b"a"))


def matches(segments: list[str], keys: list[str], below: bool = False) -> bool:
    """What a glob means, on a path or on whatever could lie below a hole, by trying every way."""
    if not segments or (below and not keys):
        return True
    if segments[0] == "**":
        return matches(segments[1:], keys, below) or (
            bool(keys) and matches(segments, keys[1:], below)
        )
    return (
        bool(keys)
        and fnmatch.fnmatchcase(keys[0], segments[0])
        and matches(segments[1:], keys[1:], below)
    )


SEGMENTS = [
    "**",
    "*",
    "?",
    "a",
    "b",
    "a*",
    "*b",
    "*a*",
    "?b",
    "a?",
    "[ab]",
    "[!a]",
    "[!b]*",
    "a[+--]",
    "[]a]",
]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from(SEGMENTS), min_size=1, max_size=5),
    st.lists(st.lists(names, min_size=1, max_size=4), min_size=1, max_size=5),
    st.lists(st.booleans(), min_size=5, max_size=5),
)
def test_globs_mean_what_trying_every_way_gives(segments, paths, holes):
    glob = "/".join(segments)
    tree = {"/".join(keys): HOLE if hole else 1.0 for keys, hole in zip(paths, holes, strict=False)}
    expected = sorted(
        path for path, leaf in tree.items() if leaf == 1.0 and matches(segments, path.split("/"))
    )
    could = any(
        leaf is HOLE and matches(segments, path.split("/"), below=True)
        for path, leaf in tree.items()
    )
    if expected or could:
        assert sorted(fo.by_path(glob).paths(tree)) == expected
    else:
        with pytest.raises(ValueError, match="selects nothing"):
            fo.by_path(glob).mask(tree)


def test_a_path_that_reads_as_a_glob_is_suggested_escaped():
    with pytest.raises(ValueError, match=re.escape("write 'a[[]0]'")):
        fo.by_path("a[0]").mask({"a[0]": 1.0})


@pytest.mark.parametrize(
    "glob", ["layer_[0-11]", "layer_[12-23]", "layer_[0-23]", "layer_[8-11]", "a/[0-35]/b"]
)
def test_a_class_meant_as_a_range_of_numbers_is_an_error(glob):
    with pytest.raises(ValueError, match=r"a class matches one character.*write two globs"):
        fo.by_path(glob)


@pytest.mark.parametrize(
    "glob", ["[0-9]", "[0-46-9]", "[12]", "[0-9a-f]", "[a-z0]", "[0-3_]", "[!0-9]"]
)
def test_a_class_of_single_characters_is_none(glob):
    assert isinstance(fo.by_path(glob), fo.Selector)


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        (re.compile("encoder"), "A regex has to match the whole path"),
        ("encoder/.*", "a regex as re.compile"),
        ("{encoder,head}", "several patterns as a list"),
        ("Encoder", "Upper and lower case differ"),
    ],
)
def test_a_common_mistake_is_told_how_to_write_it(pattern, hint):
    with pytest.raises(ValueError, match=hint):
        fo.by_path(pattern).mask(PARAMS)
