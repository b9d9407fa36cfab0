"""Which leaves a selector selects: globs, regexes, predicates and masks, alone and combined, on every kind of tree."""

import contextlib
import dataclasses
import fnmatch
import functools
import glob as globs
import pickle
import re
import signal
import warnings
import weakref
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import flax.struct
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict, freeze
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import frozen_optax as fo

HOLE = optax.MaskedNode()
ALL = fo.by_mask(True)
PARAMS = {"encoder": {"kernel": 1.0, "bias": 2.0}, "head": {"kernel": 3.0, "bias": 4.0}}


def nest(*paths: str, leaf: Any = 0.0) -> dict[str, Any]:
    """A dict of dicts with a leaf at each path."""
    tree: dict[str, Any] = {}
    for path in paths:
        *modules, name = path.split("/")
        functools.reduce(lambda node, key: node.setdefault(key, {}), modules, tree)[name] = leaf
    return tree


def paths_of(tree: Any) -> list[str]:
    """The paths as jax spells them, not by the library."""
    return [jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in jax.tree_util.tree_leaves_with_path(tree)]


# ---------------------------------------------------------------------------------------------------------------------
# Globs


@pytest.mark.parametrize(
    ("glob", "selected", "others"),
    [
        # The table of the design.
        ("encoder", "encoder/layer_0/w encoder/b", "encoder_norm/w model/encoder/w"),
        ("encoder/layer_1", "encoder/layer_1/w encoder/layer_1/b", "encoder/layer_10/w encoder/layer_0/w layer_1/w"),
        ("encoder/layer_[0-3]", "encoder/layer_0/w encoder/layer_3/w", "encoder/layer_4/w encoder/layer_10/w"),
        ("encoder/*/mlp", "encoder/l0/mlp/w encoder/l1/mlp", "encoder/mlp/w encoder/l0/attn encoder/a/b/mlp x/l0/mlp"),
        ("**/bias", "bias encoder/bias encoder/a/b/bias head/bias/scale", "encoder/bias_scale encoder/b head/Bias"),
        ("**/lora_*", "lora_a encoder/lora_b/w encoder/a/lora_", "encoder/xlora_a encoder/lora head/my_lora_b"),
        ("encoder/**/kernel", "encoder/kernel encoder/a/kernel encoder/a/b/kernel/q", "kernel head/kernel encoder/b"),
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
        # Upper and lower case, names that are prefixes or suffixes of others, the same name elsewhere.
        ("Encoder", "Encoder/w", "encoder/w ENCODER/w"),
        ("[A-Z]*", "Dense_0/w", "dense_0/w"),
        ("kernel", "kernel", "a/kernel kernel_0"),
        ("head/kernel", "head/kernel", "head/kernel_norm kernel encoder/head/kernel encoder/kernel"),
        ("encoder/layer_0/kernel/0", "encoder/layer_0/kernel/0", "encoder/layer_0/kernel/00 encoder/layer_0/bias"),
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
        ("layers/[1-2]/*", {"layers": ({"w": 1.0}, {"w": 1.0}, {"w": 2.0})}, ["layers/1/w", "layers/2/w"]),
        ("1", [1.0, 2.0, 3.0], ["1"]),
        ("0/1", ((1.0, 2.0), 3.0), ["0/1"]),
        ("mlp/~/linear_0/w", {"mlp/~/linear_0": {"w": 1.0, "b": 2.0}, "mlp/~/linear_1": {"w": 1.0}}, None),
        ("mlp", {"mlp/~/linear_0": {"w": 1.0}, "mlp_1/~/linear_0": {"w": 1.0}}, ["mlp/~/linear_0/w"]),
        ("mlp/*/linear_?/w", {"mlp/~/linear_0": {"w": 1.0}, "mlp/linear_0": {"w": 1.0}}, ["mlp/~/linear_0/w"]),
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
def test_a_glob_that_cannot_be_read_is_an_error_that_says_how_to_write_it(glob, message, suggestion):
    for use in (fo.by_path, fo.freeze_by_path, fo.freeze, lambda g: fo.by_path("fine", g)):
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            use(glob)
        assert f"rite {suggestion!r}" in str(error.value)
    fo.by_path(suggestion)


def test_a_class_with_a_range_from_high_to_low_is_an_error_that_names_the_glob():
    with pytest.raises(ValueError, match=re.escape("glob 'x[z-a]' has a character class that cannot be read")):
        fo.by_path("x[z-a]")


def test_reading_a_glob_never_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for glob in ("x[[a]", "x[a--]", "x[+--]", "x[a&&b]", "x[a||b]", "x[a~~b]", "x[!--9]", "x[\\a]", "\\x"):
            with contextlib.suppress(ValueError):
                fo.by_path(glob)


@contextlib.contextmanager
def interrupted_after(seconds):
    """Interrupts a regex that does not end, where the platform has an alarm; elsewhere the test itself does not end."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_):
        raise TimeoutError("matching takes exponential time")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


@pytest.mark.parametrize(
    ("glob", "other", "matching"),
    [
        ("**/" + "a/**/" * 30 + "b", "/".join("a" * 90), "/".join("a" * 90 + "b")),
        ("*a" * 30 + "*b", "a" * 90, "a" * 90 + "b"),
        ("*a" * 30 + "*b", "a" * 90 + "/c", "a" * 90 + "b/c"),
        ("**/" + "*a*/**/" * 20 + "b", "/".join(["aaaa"] * 60), "/".join(["aaaa"] * 60 + ["b", "c"])),
    ],
    ids=["many **", "many *", "many * in a module", "both"],
)
def test_a_glob_with_many_wildcards_is_matched_without_trying_every_way(glob, other, matching):
    with interrupted_after(10):
        assert fo.by_path(glob).paths({other: 1.0, matching: 2.0}) == [matching]
        with pytest.raises(ValueError, match="selects nothing"):
            fo.by_path(glob).paths({other: 1.0})


def test_patterns_are_needed_and_have_to_be_text():
    with pytest.raises(ValueError, match=re.escape("by_path() needs at least one pattern")):
        fo.by_path()
    with pytest.raises(TypeError, match="found a list of 2"):
        fo.by_path(["a", "b"])
    with pytest.raises(TypeError, match=re.escape("found a leaf of type int: 3")):
        fo.by_path("a", 3)
    with pytest.raises(TypeError, match="bytes regex"):
        fo.by_path(re.compile(b"a"))


# ---------------------------------------------------------------------------------------------------------------------
# Regexes, predicates, masks, lists, and what else `frozen` takes


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
    with pytest.raises(ValueError, match=re.escape(f"by_path(re.compile({regex!r})) selects nothing")):
        fo.by_path(re.compile(regex)).mask(PARAMS)


def test_a_regex_keeps_its_flags():
    tree = {"a\nb": 1.0, "axb": 2.0, "A": 3.0}
    assert fo.by_path(re.compile("a.b")).paths(tree) == ["axb"]
    assert fo.by_path(re.compile("a.b", re.DOTALL)).paths(tree) == ["a\nb", "axb"]
    assert fo.by_path(re.compile("a", re.IGNORECASE)).paths(tree) == ["A"]


def test_globs_and_regexes_mix_and_any_of_them_selects():
    assert fo.by_path("head", re.compile(".*/bias")).paths(PARAMS) == ["encoder/bias", "head/bias", "head/kernel"]


def test_a_predicate_gets_each_path_with_its_shape_and_dtype():
    tree = {
        "a": jnp.ones((2, 3), jnp.bfloat16),
        "b": [np.ones(4, np.float64), jax.random.key(0)],
        "c": jax.ShapeDtypeStruct((5,), jnp.int4),
        "d": 1.0,
        "e": 2,
        "f": True,
        "g": jnp.complex64(1),
        "h": "not an array",
    }
    seen = {}
    assert fo.by_predicate(lambda path, leaf: seen.update({path: leaf}) is None).paths(tree) == list(seen)
    assert seen.pop("h") == "not an array"
    assert all(type(spec) is jax.ShapeDtypeStruct for spec in seen.values())
    assert {path: (spec.shape, str(spec.dtype)) for path, spec in seen.items()} == {
        "a": ((2, 3), "bfloat16"),
        "b/0": ((4,), "float64"),
        "b/1": ((), "key<fry>"),
        "c": ((5,), "int4"),
        "d": ((), "float32"),
        "e": ((), "int32"),
        "f": ((), "bool"),
        "g": ((), "complex64"),
    }


def test_a_predicate_gets_the_parameters_shape_and_dtype_and_never_the_gradients():
    params = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(2), "n": jnp.ones(3, jnp.int32)}
    gradients = {"a": jnp.ones(2, jnp.float32), "b": jnp.ones(2, jnp.bfloat16), "n": np.zeros(3, jax.dtypes.float0)}
    seen = []
    for make in (fo.freeze, lambda s: fo.with_frozen(optax.sgd(1.0), s)):
        tx = make(lambda path, leaf: (seen.append((path, str(leaf.dtype))), leaf.dtype != jnp.float32)[1])
        for update, n in ((tx.update, gradients["n"]), (jax.jit(tx.update), params["n"])):
            updates, _ = update({**gradients, "n": n}, tx.init(params), params)
            new = fo.apply_updates(params, updates)
            assert np.array_equal(new["a"], params["a"])
            assert not np.array_equal(new["b"], params["b"])
            assert np.array_equal(new["n"], params["n"])
    assert set(seen) == {("a", "bfloat16"), ("b", "float32"), ("n", "int32")}


def test_a_predicate_without_parameters_at_update_is_an_error_and_not_asked_about_the_gradient():
    params = {"a": jnp.ones(2)}
    is_float = lambda path, leaf: leaf.dtype == jnp.float32
    selector = fo.by_predicate(is_float)
    for tx in (
        fo.freeze(is_float),
        fo.freeze(trainable=is_float),
        fo.freeze(~selector & ALL),
        fo.freeze(ALL | ~selector),
    ):
        with pytest.raises(ValueError, match="Pass the parameters"):
            tx.update({"a": jnp.ones(2, jnp.bfloat16)}, tx.init(params))


@pytest.mark.parametrize("answer", [None, 1, 0, "yes", jnp.array(True), np.array([True]), re.match("a", "a")])
def test_a_predicate_that_returns_no_bool_is_an_error_that_names_the_path(answer):
    selector = fo.by_predicate(lambda path, leaf: answer if path == "head/kernel" else True)
    with pytest.raises(TypeError, match=r"returned .* at 'head/kernel', expected a bool"):
        selector.mask(PARAMS)


def test_a_predicate_may_return_a_numpy_bool_and_may_select_nothing():
    assert fo.by_predicate(lambda path, leaf: np.bool_(path == "head/bias")).paths(PARAMS) == ["head/bias"]
    assert fo.by_predicate(lambda path, leaf: False).paths(PARAMS) == []


@pytest.mark.parametrize("predicate", ["encoder", None, lambda: True, lambda path: True, lambda a, b, c: True, 3])
def test_a_predicate_takes_two_arguments(predicate):
    with pytest.raises(TypeError, match=re.escape("by_predicate takes a function (path, leaf) -> bool, found")):
        fo.by_predicate(predicate)


def test_predicates_of_every_callable_kind_are_understood():
    class IsBias:
        def __call__(self, path, leaf):
            return path.endswith("bias")

    def is_below(module, path, leaf):
        return path.startswith(module)

    assert fo.by_predicate(IsBias()).paths(PARAMS) == ["encoder/bias", "head/bias"]
    assert fo.by_predicate(functools.partial(is_below, "head")).paths(PARAMS) == ["head/bias", "head/kernel"]
    assert fo.by_predicate(lambda path, leaf, strict=True: strict).paths({"a": 1.0}) == ["a"]
    assert fo.by_predicate(lambda *args: len(args) == 2).paths({"a": 1.0}) == ["a"]


@pytest.mark.parametrize(
    ("mask", "paths"),
    [
        (True, ["encoder/bias", "encoder/kernel", "head/bias", "head/kernel"]),
        (False, []),
        (np.True_, ["encoder/bias", "encoder/kernel", "head/bias", "head/kernel"]),
        (jnp.array(False), []),
        ({"encoder": True, "head": False}, ["encoder/bias", "encoder/kernel"]),
        ({"encoder": np.False_, "head": {"bias": np.array(True), "kernel": jnp.array(False)}}, ["head/bias"]),
        ({"encoder": {"bias": True, "kernel": False}, "head": jnp.array(True)}, None),
    ],
)
def test_a_mask_selects_what_lies_below_its_true_leaves(mask, paths):
    paths = ["encoder/bias", "head/bias", "head/kernel"] if paths is None else paths
    for selector in (fo.by_mask(mask), fo.by_mask(lambda params: mask)):
        assert selector.paths(PARAMS) == paths
    trainable, frozen = fo.partition(PARAMS, mask)
    assert len(jax.tree.leaves(frozen)) == len(paths)
    assert len(jax.tree.leaves(trainable)) == 4 - len(paths)


def test_a_mask_function_gets_the_tree():
    selector = fo.by_mask(lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params))
    tree = {"w": jnp.ones((2, 2)), "b": None, "c": jnp.ones(2)}
    assert selector.mask(tree) == {"w": True, "b": None, "c": False}
    assert selector.mask({"w": jnp.ones(2), "b": None, "c": jnp.ones((2, 2))}) == {"w": False, "b": None, "c": True}
    assert fo.by_mask(fo.by_path("w").mask).paths(tree) == ["w"]


@pytest.mark.parametrize(
    ("mask", "tree", "message"),
    [
        ({"encoder": True}, PARAMS, "at 'the root': the mask has a dict of 1 (encoder), the parameters have a"),
        ({"encoder": {"bias": True}, "head": True}, PARAMS, "at 'encoder': the mask has a dict of 1 (bias)"),
        ({"encoder": True, "head": {"bias": {"x": True}, "kernel": True}}, PARAMS, "at 'head/bias': the mask has a"),
        ({"encoder": None, "head": True}, PARAMS, "at 'encoder': the mask has None"),
        ({"encoder": HOLE, "head": True}, PARAMS, "at 'encoder': the mask has a hole"),
        ({"a": [True]}, {"a": [1.0, 2.0]}, "at 'a': the mask has a list of 1 (0), the parameters have a list of 2"),
        ({"a": (True, True)}, {"a": [1.0, 2.0]}, "at 'a': the mask has a tuple of 2 (0, 1), the parameters have"),
        ({"a": {"b": True}}, {"a": 1.0}, "at 'a': the mask has a dict of 1 (b), the parameters have a leaf"),
        ({"a": {"b": True}}, {"a": np.ones((2, 3))}, "the parameters have a leaf float64[2, 3]"),
        ({"a": True}, {"b": 1.0}, "at 'the root'"),
        ({}, {"b": 1.0}, "at 'the root'"),
        (None, {"b": 1.0}, "at 'the root': the mask has None"),
        ({"a": True}, FrozenDict({"a": 1.0}), "at 'the root': the mask has a dict of 1 (a)"),
    ],
)
def test_a_mask_of_another_structure_is_an_error_that_names_the_path(mask, tree, message):
    for selector in (fo.by_mask(mask), fo.by_mask(lambda params: mask), ~fo.by_mask(mask)):
        with pytest.raises(ValueError, match="the mask and the parameters differ in structure") as error:
            selector.mask(tree)
        assert message in str(error.value)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ({"encoder": 1, "head": True}, "found a leaf of type int (1) at 'encoder'"),
        ({"encoder": True, "head": {"bias": "x", "kernel": True}}, "found a leaf of type str ('x') at 'head/bias'"),
        ({"encoder": np.array([True]), "head": True}, "found a leaf bool[1]"),
        ({"encoder": jnp.array(1), "head": True}, "found a leaf int32[]"),
        ({"encoder": jax.ShapeDtypeStruct((), bool), "head": True}, "found a leaf bool[]"),
        (1.0, "found a leaf of type float (1.0) at 'the root'"),
    ],
)
def test_a_mask_that_holds_anything_but_bools_is_an_error_that_names_the_path(mask, message):
    for selector in (fo.by_mask(mask), fo.by_mask(lambda params: mask)):
        with pytest.raises(TypeError, match="a mask holds True and False") as error:
            selector.mask(PARAMS)
        assert message in str(error.value)


def test_a_mask_that_depends_on_traced_values_is_an_error():
    def masked(x):
        return fo.by_mask({"a": x > 0}).mask({"a": x})

    with pytest.raises(TypeError, match="a mask cannot depend on traced values"):
        jax.jit(masked)(1.0)


def test_a_path_in_an_error_about_a_mask_reads_as_the_selectors_path_does_in_nnx():
    state = nnx.state(NnxModel(nnx.Rngs(0)), nnx.Param)
    with pytest.raises(TypeError, match="at 'encoder/bias'"):
        fo.by_mask(jax.tree.map(lambda _: 1, state)).mask(state)


def test_a_mask_function_takes_one_argument():
    with pytest.raises(TypeError, match=re.escape("Did you mean by_predicate?")):
        fo.by_mask(lambda path, leaf: True)
    with pytest.raises(TypeError, match="goes through by_mask"):
        fo.freeze(lambda params: params)


def test_of_a_list_any_selects():
    pick = lambda *items: jax.tree.leaves(fo.partition(PARAMS, list(items))[1])
    assert pick("encoder") == [2.0, 1.0]
    assert pick("encoder", "head/bias") == [2.0, 1.0, 4.0]
    assert pick(fo.by_path("encoder/bias"), re.compile("head/b.*")) == [2.0, 4.0]
    assert pick(lambda path, leaf: path == "head/bias", "encoder/bias") == [2.0, 4.0]
    assert pick(fo.by_mask({"encoder": True, "head": False}) & ~fo.by_path("**/bias"), "head/bias") == [1.0, 4.0]
    assert jax.tree.leaves(fo.partition(PARAMS, ("encoder", "head/bias"))[1]) == [2.0, 1.0, 4.0]
    assert fo.partition([1.0, 2.0], [True, False])[1] == [1.0, HOLE]  # bools: a mask in the form of a list


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
def test_one_name_of_a_list_that_selects_nothing_is_an_error_that_names_it(selection):
    for arguments in ({"frozen": selection}, {"trainable": selection}):
        with pytest.raises(ValueError, match=re.escape("by_path('hed/bias') selects nothing")) as error:
            fo.partition(PARAMS, **arguments)
        assert "'head/bias'" in str(error.value)


@pytest.mark.parametrize("empty", [[], ()])
def test_an_empty_list_is_an_error_that_says_what_to_write(empty):
    with pytest.raises(ValueError, match="write False"):
        fo.freeze(empty)


@pytest.mark.parametrize("wrong", [3, 0, 1.5, b"encoder", {"encoder"}, object(), ..., np.array([True, False])])
def test_what_cannot_select_leaves_is_an_error_that_names_its_type(wrong):
    for use in (fo.freeze, lambda s: fo.with_frozen(optax.sgd(1.0), s), lambda s: fo.partition(PARAMS, s)):
        with pytest.raises(TypeError, match=f"cannot select leaves by .* of type {type(wrong).__name__}: expected"):
            use(wrong)


@pytest.mark.parametrize("wrong", [["encoder", 3], ["encoder", True], [["encoder"]], {"encoder": "head"}, [True, 1]])
def test_a_list_of_mixed_things_is_an_error_and_nothing_of_it_is_skipped(wrong):
    with pytest.raises(TypeError, match="a mask holds True and False, found a leaf of type"):
        fo.partition(PARAMS, wrong)


ROOMS = {
    "freeze": fo.freeze,
    "with_frozen": functools.partial(fo.with_frozen, optax.sgd(1.0)),
    "partition": functools.partial(fo.partition, PARAMS),
    "restore": functools.partial(fo.restore, PARAMS, PARAMS),
}


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
    for selection in ("encoder", ["**/bias"], True, False, fo.by_path("head"), lambda path, leaf: path == "head/bias"):
        trainable, frozen = fo.partition(PARAMS, selection)
        assert fo.partition(PARAMS, trainable=selection) == (frozen, trainable)


# ---------------------------------------------------------------------------------------------------------------------
# Selectors as values


def test_selectors_combine_with_or_and_not():
    encoder, bias = fo.by_path("encoder"), fo.by_path("**/bias")
    assert (encoder | bias).paths(PARAMS) == ["encoder/bias", "encoder/kernel", "head/bias"]
    assert (encoder & bias).paths(PARAMS) == ["encoder/bias"]
    assert (encoder & ~bias).paths(PARAMS) == ["encoder/kernel"]
    assert (~encoder).paths(PARAMS) == ["head/bias", "head/kernel"]
    assert (~(encoder | bias)).paths(PARAMS) == ["head/kernel"]
    assert (~~encoder).paths(PARAMS) == encoder.paths(PARAMS)
    assert (encoder & fo.by_mask(False)).paths(PARAMS) == []
    assert isinstance(encoder | bias, fo.Selector)


@pytest.mark.parametrize("pattern", ["**/bias", re.compile(".*bias")], ids=["glob", "regex"])
def test_selectors_combine_with_patterns_on_either_side(pattern):
    encoder, bias = fo.by_path("encoder"), fo.by_path(pattern)
    assert encoder | pattern == encoder | bias
    assert pattern | encoder == bias | encoder
    assert encoder & pattern == encoder & bias
    assert pattern & encoder == bias & encoder


@pytest.mark.parametrize("other", [True, None, lambda path, leaf: True])
def test_selectors_combine_with_nothing_but_selectors_and_patterns(other):
    for combine in (lambda a, b: a | b, lambda a, b: a & b):
        with pytest.raises(TypeError, match="unsupported operand"):
            combine(fo.by_path("encoder"), other)
        with pytest.raises(TypeError, match="unsupported operand"):
            combine(other, fo.by_path("encoder"))


def test_masks_labels_and_paths_have_the_trees_structure_none_and_holes_stay():
    tree = {"a": [1.0, None, HOLE], "b": {"c": (2.0, {}), "d": None}, "e": HOLE, "f": []}
    selector = fo.by_path("a")
    assert selector.mask(tree) == {"a": [True, None, HOLE], "b": {"c": (False, {}), "d": None}, "e": HOLE, "f": []}
    assert selector.labels(tree) == {
        "a": ["frozen", None, HOLE],
        "b": {"c": ("trainable", {}), "d": None},
        "e": HOLE,
        "f": [],
    }
    assert selector.labels(tree, selected=1, rest=0)["b"] == {"c": (0, {}), "d": None}
    assert selector.labels(tree, "x")["a"][0] == "x"
    assert selector.paths(tree) == ["a/0"]
    assert (~selector).paths(tree) == ["b/c/0"]
    assert all(type(leaf) is bool for leaf in jax.tree.leaves(selector.mask(tree)))
    for made in (selector.mask(tree), selector.labels(tree)):
        assert jax.tree.structure(made) == jax.tree.structure(tree)


def test_paths_are_in_the_trees_order():
    tree = {"b": [1.0, 2.0], "a": {"z": 3.0, "y": 4.0}}
    assert fo.by_path("**").paths(tree) == paths_of(tree) == ["a/y", "a/z", "b/0", "b/1"]


A, B, C = fo.by_path("a"), fo.by_path("b/*", re.compile("c.*")), fo.by_mask({"a": True, "b": [False]})


@pytest.mark.parametrize(
    ("selector", "text"),
    [
        (A, "by_path('a')"),
        (B, "by_path('b/*', re.compile('c.*'))"),
        (C, "by_mask({'a': True, 'b': [False]})"),
        (fo.by_mask(True), "by_mask(True)"),
        (fo.by_mask((True, None)), "by_mask((True, None))"),
        (~A, "~by_path('a')"),
        (~~A, None),
        (A | B, "by_path('a') | by_path('b/*', re.compile('c.*'))"),
        (A & ~A, "by_path('a') & ~by_path('a')"),
        (~(A | C), "~(by_path('a') | by_mask({'a': True, 'b': [False]}))"),
        (~A | C & A, None),
        ((A | C) & A, None),
        (A | C | A, None),
        (A | (C | A), None),
        (A & C & A, None),
        (A & (C & A), None),
        (~(~A & (B | ~C)) | ~~A, None),
        (fo.by_path("it's", 'a"b', "a\\b", "a\nb", "é 🧊"), None),
        (fo.by_path(re.compile("a'\"\\\\", re.IGNORECASE | re.DOTALL)), None),
        (fo.by_path(re.compile("(?x) a  # a comment\n")), None),
        (fo.by_path(re.compile("|".join(f"encoder/layer_{i}/.*" for i in range(50)))), None),
    ],
)
def test_a_repr_reads_back_as_an_equal_selector(selector, text):
    if text is not None:
        assert repr(selector) == text
    assert eval(repr(selector), {**vars(fo), "re": re}) == selector


def test_a_repr_names_functions():
    def is_bias(path, leaf):
        return path.endswith("bias")

    def no_vectors(params):
        return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

    assert "is_bias" in repr(fo.by_predicate(is_bias))
    assert "no_vectors" in repr(~fo.by_mask(no_vectors))


def test_selectors_compare_by_their_parts():
    def same(path, leaf):
        return True

    for make in (
        lambda: fo.by_path("a", re.compile("b")),
        lambda: fo.by_mask({"a": True}),
        lambda: fo.by_predicate(same),
        lambda: ~fo.by_path("a") | fo.by_mask(True) & fo.by_predicate(same),
    ):
        assert make() == make()
    different = [
        *(fo.by_path("a"), fo.by_path("b"), fo.by_path("a", "b"), fo.by_path(re.compile("a"))),
        *(fo.by_path(re.compile("a", re.IGNORECASE)), fo.by_mask(True), fo.by_mask(False), fo.by_mask({"a": True})),
        *(fo.by_predicate(same), fo.by_predicate(lambda path, leaf: True), ~fo.by_path("a")),
        *(fo.by_path("a") | fo.by_path("b"), fo.by_path("a") & fo.by_path("b"), fo.by_path("b") | fo.by_path("a")),
    ]
    for i, left in enumerate(different):
        assert [left == right for right in different] == [i == j for j in range(len(different))]
        assert left != "a"


def test_selectors_are_hashable_where_their_parts_are_used_or_not():
    make = lambda: ~(fo.by_path("a", re.compile("b")) | fo.by_mask(True)) & fo.by_path("**")
    used = make()
    used.mask({"a": 1.0, "b": 2.0})
    assert hash(used) == hash(make())
    assert {used: 1}[make()] == 1
    with pytest.raises(TypeError, match="unhashable"):
        hash(fo.by_mask({"a": True}))


def test_a_selector_is_a_static_argument_of_jit():
    traces = []

    @functools.partial(jax.jit, static_argnums=1)
    def held(tree, selector):
        traces.append(selector)
        return jax.tree.map(lambda leaf, chosen: leaf * chosen, tree, selector.mask(tree))

    for _ in range(3):
        assert held({"a": 1.0, "b": 2.0}, fo.by_path("a")) == {"a": 1.0, "b": 0.0}
    assert held({"a": 1.0, "b": 2.0}, fo.by_path("b")) == {"a": 0.0, "b": 2.0}
    assert len(traces) == 2


def is_bias(path, leaf):
    return path.endswith("bias")


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_selectors_are_picklable_also_after_use(protocol):
    tree = {**PARAMS, "rest": [HOLE, FrozenDict({"bias": 1.0})]}
    mask = {"encoder": True, "head": False, "rest": False}
    selector = ~(fo.by_path("head", re.compile(".*/bias")) | fo.by_mask(mask)) | fo.by_predicate(is_bias)
    unused = pickle.dumps(selector, protocol)
    assert selector.mask(tree)["rest"] == [HOLE, FrozenDict({"bias": True})]
    used = pickle.dumps(selector, protocol)
    assert len(used) == len(unused), "it carries along what it remembers"
    for loaded in map(pickle.loads, (unused, used)):
        assert loaded == selector
        assert repr(loaded) == repr(selector)
        assert loaded.mask(tree) == selector.mask(tree)


def test_a_selector_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        fo.by_path("a").anything = 1
    with pytest.raises(TypeError, match="abstract"):
        fo.Selector()


# ---------------------------------------------------------------------------------------------------------------------
# Every kind of tree


class Pair(NamedTuple):
    encoder: Any
    head: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Registered:
    encoder: Any
    head: Any
    name: str = dataclasses.field(default="static", metadata={"static": True})


@flax.struct.dataclass
class Struct:
    encoder: Any
    head: Any
    name: str = flax.struct.field(pytree_node=False, default="static")


@jax.tree_util.register_pytree_node_class
class WithoutKeys:
    def __init__(self, *children):
        self.children = children

    def tree_flatten(self):
        return self.children, None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.encoder = nnx.Linear(2, 3, rngs=rngs)
        self.head = nnx.Linear(3, 1, rngs=rngs)


class LinenModel(nn.Module):
    def setup(self):
        self.encoder = nn.Dense(3)
        self.head = nn.Dense(1)

    def __call__(self, x):
        return self.head(self.encoder(x))


class EqxModel(eqx.Module):
    encoder: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self):
        self.encoder = eqx.nn.Linear(2, 3, key=jax.random.key(0))
        self.head = eqx.nn.Linear(3, 1, key=jax.random.key(1))

    def __call__(self, x):
        return self.head(self.encoder(x))


def leaves() -> dict[str, Any]:
    return {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}


FLAX = ["encoder/bias", "encoder/kernel"]
CONTAINERS = {
    "dict": (lambda: {"encoder": leaves(), "head": leaves()}, "encoder", FLAX),
    "FrozenDict": (lambda: freeze({"encoder": leaves(), "head": leaves()}), "encoder", FLAX),
    "list": (lambda: [leaves(), leaves()], "0", ["0/bias", "0/kernel"]),
    "tuple": (lambda: (leaves(), [jnp.ones(2), leaves()]), "1/0", ["1/0"]),
    "namedtuple": (lambda: Pair(leaves(), leaves()), "encoder", FLAX),
    "dataclass": (lambda: Registered(leaves(), leaves()), "encoder", FLAX),
    "flax.struct": (lambda: Struct(leaves(), leaves()), "encoder", FLAX),
    "without keys": (lambda: WithoutKeys(leaves(), leaves()), "1", ["1/bias", "1/kernel"]),
    "None": (lambda: {"encoder": {**leaves(), "scale": None}, "head": None, "rest": leaves()}, "encoder", FLAX),
    "holes": (lambda: {"encoder": leaves(), "head": HOLE, "rest": {"b": HOLE, "c": jnp.ones(1)}}, "encoder", FLAX),
    "empty subtrees": (lambda: {"encoder": {**leaves(), "x": {}}, "head": [(), {}], "y": jnp.ones(1)}, "encoder", FLAX),
    "a bare leaf": (lambda: jnp.ones(2), "**", [""]),
    "empty": (dict, "**", []),
    "nothing": (lambda: None, "*", []),
    "linen": (lambda: LinenModel().init(jax.random.key(0), jnp.ones((1, 2)))["params"], "encoder", FLAX),
    "nnx state": (lambda: nnx.state(NnxModel(nnx.Rngs(0)), nnx.Param), "encoder", FLAX),
    "nnx pure state": (lambda: pure(nnx.state(NnxModel(nnx.Rngs(0)), nnx.Param)), "encoder", FLAX),
    "nnx pure dict": (lambda: nnx.to_pure_dict(nnx.state(NnxModel(nnx.Rngs(0)))), "encoder", FLAX),
    "equinox": (EqxModel, "encoder", ["encoder/weight", "encoder/bias"]),
    "haiku": (
        lambda: hk.transform(lambda x: hk.nets.MLP([3, 1])(x)).init(jax.random.key(0), jnp.ones((1, 2))),
        "mlp/~/linear_0",
        ["mlp/~/linear_0/b", "mlp/~/linear_0/w"],
    ),
    "optimizer state": (lambda: optax.adam(0.1).init(leaves()), "0/mu", ["0/mu/bias", "0/mu/kernel"]),
}


def pure(state: Any) -> Any:
    return nnx.as_pure(state) if hasattr(nnx, "as_pure") else nnx.pure(state)


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_selector_works_on_every_kind_of_tree_concrete_abstract_and_traced(container):
    make, glob, expected = CONTAINERS[container]
    tree = make()
    predicate = fo.by_predicate(lambda path, leaf: path in expected and leaf.shape is not None)
    traced = []

    def trace(tree):
        traced.extend((selector.paths(tree), selector.mask(tree)) for selector in (fo.by_path(glob), predicate))
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
        assert len((~selector).paths(tree)) == len(jax.tree.leaves(tree)) - len(expected)
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


def test_a_mask_of_an_equinox_model_is_a_mask_though_it_can_be_called():
    model = EqxModel()
    mask = fo.by_path("head").mask(model)
    assert callable(mask)
    assert fo.by_mask(mask).paths(model) == ["head/weight", "head/bias"]
    assert jax.tree.leaves(fo.partition(model, mask)[1]) == [model.head.weight, model.head.bias]


@pytest.mark.parametrize(
    "leaf",
    [jax.nn.relu, "text", np.array(["text"]), np.array([None]), np.float32, np.ndarray, jnp.float32, 2**80, object()],
    ids=range(9),
)
def test_leaves_that_are_no_arrays_are_selected_like_any_other(leaf):
    tree = {"a": leaf, "b": jnp.ones(2)}
    is_a = fo.by_predicate(lambda path, leaf: path == "a")
    for selector in (fo.by_path("a"), is_a, fo.by_mask({"a": True, "b": False})):
        assert selector.paths(tree) == ["a"]
        assert selector.mask(tree) == {"a": True, "b": False}


def test_leaves_of_an_equinox_model_that_are_functions_are_selected_like_any_other():
    model = eqx.nn.MLP(2, 2, 4, 2, key=jax.random.key(0))
    assert fo.by_path("layers/0", "activation").paths(model) == ["layers/0/weight", "layers/0/bias", "activation"]


# ---------------------------------------------------------------------------------------------------------------------
# A pattern that selects nothing, and holes


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
def test_a_pattern_that_selects_nothing_is_an_error_that_names_it_the_nearest_paths_and_the_number_of_leaves(
    pattern, nearest
):
    selector = fo.by_path(pattern)
    for wrapped in (selector, ~selector, ~~selector, selector | ALL, ALL | ~selector, ~ALL & selector):
        for use in (wrapped.mask, wrapped.labels, wrapped.paths, fo.freeze(wrapped).init):
            with pytest.raises(ValueError, match=re.escape(f"by_path({pattern!r}) selects nothing")) as error:
                use(PARAMS)
            assert "none of the 4 leaves" in str(error.value)
            assert repr(nearest).rstrip("'") in str(error.value)


def test_a_name_that_stands_further_down_is_pointed_out():
    with pytest.raises(ValueError, match=re.escape("'kernel' stands at 'encoder/kernel', write '**/kernel'")):
        fo.by_path("kernel").mask(PARAMS)


def test_the_nearest_path_is_found_in_a_large_tree_too():
    tree = {f"block_{i}": {f"layer_{j}": {"kernel": 1.0, "bias": 2.0} for j in range(60)} for i in range(60)}
    for pattern in ("haed", "head/kernal"):
        with pytest.raises(ValueError, match="none of the 7201 leaves") as error:
            fo.by_path(pattern).mask({**tree, "head": {"kernel": 3.0}})
        assert "'head" in str(error.value).removeprefix(f"by_path({pattern!r})")


def test_any_pattern_but_all_is_an_error_on_a_tree_without_leaves():
    for tree in ({}, None, [], {"a": {}, "b": None}):
        for glob in ("**", "*"):
            assert fo.by_path(glob).mask(tree) == tree
            assert (~fo.by_path(glob)).mask(tree) == tree
        for selector in (fo.by_mask(True), fo.by_predicate(lambda path, leaf: 1 / 0)):
            assert selector.mask(tree) == tree
        for pattern in ("a", "**/a", re.compile("a")):
            with pytest.raises(ValueError, match="none of the 0 leaves"):
                fo.by_path(pattern).mask(tree)


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


def test_a_regex_could_match_below_any_hole():
    assert fo.by_path(re.compile("decoder/.*")).paths({"encoder": HOLE, "head": 1.0}) == []
    with pytest.raises(ValueError, match="selects nothing"):
        fo.by_path(re.compile("decoder/.*")).mask({"encoder": None, "head": 1.0})


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


ONES = {"encoder": {"kernel": jnp.ones(1), "bias": jnp.ones(1)}, "head": {"kernel": jnp.ones(1), "bias": jnp.ones(1)}}
INSIDE = {
    "freeze_by_path": lambda *patterns: optax.chain(optax.sgd(0.5), fo.freeze_by_path(*patterns)),
    "freeze": lambda *patterns: optax.chain(optax.sgd(0.5), fo.freeze(list(patterns))),
    "with_frozen": lambda *patterns: fo.with_frozen(optax.sgd(0.5), list(patterns)),
}


@pytest.mark.parametrize("inside", INSIDE)
def test_patterns_right_for_the_whole_tree_are_right_inside_optax_partition(inside):
    encoder = fo.by_path("encoder")
    for patterns in (("**/bias",), ("encoder/kernel", "head/bias"), ("encoder/*", re.compile("head/b.*"))):
        transforms = {"frozen": optax.sgd(0.25), "trainable": INSIDE[inside](*patterns)}
        assert step(optax.partition(transforms, encoder.labels), ONES) == {
            "encoder": {"kernel": 0.75, "bias": 0.75},
            "head": {"kernel": 0.5, "bias": 1.0},
        }
        assert step(optax.partition(transforms, encoder.labels(ONES)), ONES)["head"] == {"kernel": 0.5, "bias": 1.0}
    with pytest.raises(ValueError, match=re.escape("by_path('decoder') selects nothing")):
        optax.partition({"frozen": optax.sgd(1.0), "trainable": INSIDE[inside]("decoder")}, encoder.labels).init(ONES)


@pytest.mark.parametrize("inside", INSIDE)
def test_patterns_right_for_the_whole_tree_are_right_inside_optax_masked(inside):
    head = fo.by_path("head")
    for patterns in (("**/bias",), ("encoder", "head/bias"), (re.compile("encoder/k.*"), "*/bias")):
        for mask in (head.mask, head.mask(ONES)):
            new = step(optax.masked(INSIDE[inside](*patterns), mask), ONES)
            assert new == {"encoder": {"kernel": 2.0, "bias": 2.0}, "head": {"kernel": 0.5, "bias": 1.0}}
    with pytest.raises(ValueError, match=re.escape("by_path('decoder') selects nothing")):
        optax.masked(INSIDE[inside]("decoder"), head.mask).init(ONES)


# ---------------------------------------------------------------------------------------------------------------------
# Resolved once


def counting() -> tuple[list[str], Any]:
    """A list that grows with each call of a predicate, and the predicate."""
    calls: list[str] = []
    return calls, lambda path, leaf: (calls.append(path), path.endswith("bias"))[1]


@pytest.mark.parametrize("combine", [lambda s: s, lambda s: ~s, lambda s: s & ALL], ids=["s", "~s", "s & t"])
def test_a_selector_is_resolved_once_for_a_structure_and_not_at_every_trace(combine):
    calls, predicate = counting()
    selector = combine(fo.by_predicate(predicate))
    for _ in range(5):
        selector.mask(PARAMS)
        selector.labels(PARAMS)
        selector.paths(jax.tree.map(jnp.float32, PARAMS))
        jax.eval_shape(lambda tree: (selector.mask(tree), tree)[1], PARAMS)
        jax.jit(lambda tree: (selector.mask(tree), tree)[1])(PARAMS)
    assert len(calls) == 4


@pytest.mark.parametrize("argument", ["frozen", "trainable"])
@pytest.mark.parametrize("room", ["freeze", "with_frozen"])
def test_a_transform_resolves_once_for_a_structure_and_not_at_every_trace(room, argument):
    calls, predicate = counting()
    tx = ROOMS[room](**{argument: predicate})
    for _ in range(5):
        state = tx.init(ONES)
        tx.update(ONES, state, ONES)
        jax.jit(lambda *args: tx.update(*args))(ONES, state, ONES)
    assert len(calls) == 4


@pytest.mark.parametrize("argument", ["frozen", "trainable"])
@pytest.mark.parametrize("room", ["partition", "restore"])
def test_partition_and_restore_resolve_a_selector_once_for_a_structure(room, argument):
    calls, predicate = counting()
    selector = fo.by_predicate(predicate)
    for _ in range(5):
        ROOMS[room](**{argument: selector})
    assert len(calls) == 4


def test_the_parts_of_a_tree_are_structures_of_their_own():
    calls, predicate = counting()
    selector = fo.by_predicate(predicate)
    trainable, frozen = fo.partition(PARAMS, "head")
    for tree in (PARAMS, trainable, frozen, list(PARAMS.values())) * 3:
        selector.mask(tree)
    assert len(calls) == 4 + 2 + 2 + 4


def test_another_shape_or_dtype_is_resolved_again_where_a_predicate_or_mask_function_reads_it():
    for selector in (
        fo.by_predicate(lambda path, leaf: leaf.ndim > 1 and leaf.dtype == jnp.float32),
        fo.by_mask(lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1 and leaf.dtype == jnp.float32, params)),
    ):
        for combined in (selector, ~~selector, selector | ~ALL, ALL & selector, ~(~ALL | ~selector)):
            for _ in range(2):
                assert combined.paths({"a": jnp.ones((2, 2)), "b": jnp.ones(2)}) == ["a"]
                assert combined.paths({"a": jnp.ones(2), "b": jnp.ones((2, 2))}) == ["b"]
                assert combined.paths({"a": jnp.ones((2, 2), jnp.bfloat16), "b": jnp.ones((2, 2))}) == ["b"]
                assert combined.paths({"a": jnp.ones(2), "b": jnp.ones(2)}) == []


def test_an_error_is_an_error_every_time():
    selector = fo.by_path("encodr")
    for _ in range(3):
        with pytest.raises(ValueError, match="selects nothing"):
            selector.mask(PARAMS)
    assert selector.paths({"encodr": 1.0}) == ["encodr"]
    with pytest.raises(ValueError, match="selects nothing"):
        selector.mask(PARAMS)


def test_a_selector_remembers_a_bounded_number_of_structures():
    calls, predicate = counting()
    selector = fo.by_predicate(predicate)
    for i in range(300):
        selector.mask({f"key_{i}": 1.0})
    for i in range(300):
        selector.mask({f"key_{i}": 1.0})
    assert len(calls) == 600


def test_a_selector_keeps_no_leaves_alive_and_leaks_no_tracers():
    selector = fo.by_predicate(lambda path, leaf: True) & fo.by_mask(lambda params: True) & fo.by_path("**")
    array = np.ones(3)
    alive = weakref.ref(array)
    selector.mask({"a": array})
    del array
    assert alive() is None
    with jax.checking_leaks():
        jax.jit(lambda tree: (selector.mask(tree), tree)[1])({"a": 1.0, "b": 2.0})


def test_structures_whose_static_parts_cannot_be_hashed_or_compared_are_resolved_all_the_same():
    class Static(eqx.Module):
        kernel: Any
        table: Any = eqx.field(static=True)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # equinox advises against arrays here
        trees = [{"a": Static(1.0, table), "b": 2.0} for table in ([1], {"x": 1}, np.arange(3), np.arange(3))]
    selector = fo.by_path("a")
    for tree in trees * 2:
        assert selector.paths(tree) == ["a/kernel"]


def test_ten_patterns_on_a_hundred_thousand_leaves():
    leaf = np.zeros(1, np.float32)
    modules = range(100)
    tree = {f"block_{i}": {f"layer_{j}": dict.fromkeys("abcdefghij", leaf) for j in modules} for i in modules}
    patterns = {
        "block_0": lambda i, j, k: i == 0,
        "block_1/layer_[0-9]": lambda i, j, k: i == 1 and j < 10,
        "**/a": lambda i, j, k: k == "a",
        "block_*/*/b": lambda i, j, k: k == "b",
        "**/layer_99": lambda i, j, k: j == 99,
        "block_5?/**/c": lambda i, j, k: 50 <= i < 60 and k == "c",
        "block_7*/layer_1": lambda i, j, k: (i == 7 or 70 <= i < 80) and j == 1,
        "**/layer_1*/[!a-i]": lambda i, j, k: (j == 1 or 10 <= j < 20) and k == "j",
        "block_99/layer_99/j": lambda i, j, k: i == j == 99 and k == "j",
        re.compile(r"block_(\d)\1/layer_\1/.*"): lambda i, j, k: i and i % 11 == 0 and i // 11 == j,
    }
    expected = [
        f"block_{i}/layer_{j}/{k}"
        for i in sorted(modules, key=str)
        for j in sorted(modules, key=str)
        for k in "abcdefghij"
        if any(rule(i, j, k) for rule in patterns.values())
    ]
    selector = fo.by_path(*patterns)
    assert selector.paths(tree) == expected
    assert sum(jax.tree.leaves(selector.mask(tree))) == len(expected)


# ---------------------------------------------------------------------------------------------------------------------
# Properties of random trees and selectors

KEYS = ["a", "b", "ab", "layer_1", "layer_10", "x/y", "a[0]", "*", "?", "**", "[!a]", "é", "a b", "c\n", ".", "value"]
check = settings(max_examples=60, deadline=None, derandomize=True)
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
    kind = draw(st.sampled_from(kinds + ["name", "wildcard", "below", "regex"] * (len(paths) > 0 and paths != [""])))
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
    return st.recursive(
        simple_selectors(tree, values),
        lambda parts: st.one_of(
            parts.map(lambda s: ~s),
            st.tuples(parts, parts).map(lambda pair: pair[0] | pair[1]),
            st.tuples(parts, parts).map(lambda pair: pair[0] & pair[1]),
        ),
        max_leaves=3,
    )


def bools(selector: fo.Selector, tree: Any) -> list[bool]:
    mask = selector.mask(tree)
    assert jax.tree.structure(mask) == jax.tree.structure(tree)
    return jax.tree.leaves(mask)


@check
@given(st.data(), trees)
def test_or_and_and_not_of_selectors_are_those_of_their_masks(data, tree):
    s, t = data.draw(selectors(tree)), data.draw(selectors(tree))
    left, right = bools(s, tree), bools(t, tree)
    assert bools(s | t, tree) == [a or b for a, b in zip(left, right, strict=True)]
    assert bools(s & t, tree) == [a and b for a, b in zip(left, right, strict=True)]
    assert bools(~s, tree) == [not a for a in left]
    assert bools(~~s, tree) == left
    assert bools(~(s | t), tree) == bools(~s & ~t, tree)
    assert bools(~(s & t), tree) == bools(~s | ~t, tree)
    assert s.paths(tree) == [path for path, chosen in zip(paths_of(tree), left, strict=True) if chosen]
    assert jax.tree.leaves(s.labels(tree, 1, 0)) == left
    assert bools(fo.by_mask(s.mask(tree)), tree) == left
    assert bools(fo.by_mask(s.mask), tree) == left


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
def test_what_is_right_for_a_tree_is_right_with_any_leaves_and_subtrees_of_it_missing(data, tree):
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
    assert kept == [path for path, chosen in zip(jax.tree.leaves(tree), bools(selector, tree), strict=True) if chosen]


def matches(segments: list[str], keys: list[str], below: bool = False) -> bool:
    """A glob on a path, or on whatever could lie below a hole, by trying every way: what a glob means."""
    if not segments or (below and not keys):
        return True
    if segments[0] == "**":
        return matches(segments[1:], keys, below) or (bool(keys) and matches(segments, keys[1:], below))
    return bool(keys) and fnmatch.fnmatchcase(keys[0], segments[0]) and matches(segments[1:], keys[1:], below)


SEGMENTS = ["**", "*", "?", "a", "b", "a*", "*b", "*a*", "?b", "a?", "[ab]", "[!a]", "[!b]*", "a[+--]", "[]a]"]
names = st.text("ab]-.\n", min_size=1, max_size=3)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from(SEGMENTS), min_size=1, max_size=5),
    st.lists(st.lists(names, min_size=1, max_size=4), min_size=1, max_size=5),
    st.lists(st.booleans(), min_size=5, max_size=5),
)
def test_globs_mean_what_trying_every_way_gives(segments, paths, holes):
    glob = "/".join(segments)
    tree = {"/".join(keys): HOLE if hole else 1.0 for keys, hole in zip(paths, holes, strict=False)}
    expected = sorted(path for path, leaf in tree.items() if leaf == 1.0 and matches(segments, path.split("/")))
    could = any(leaf is HOLE and matches(segments, path.split("/"), below=True) for path, leaf in tree.items())
    if expected or could:
        assert sorted(fo.by_path(glob).paths(tree)) == expected
    else:
        with pytest.raises(ValueError, match="selects nothing"):
            fo.by_path(glob).mask(tree)


@pytest.mark.parametrize(
    "combine", [lambda a, b: a and b, lambda a, b: a or b, lambda a, b: not a], ids=["and", "or", "not"]
)
def test_selectors_do_not_combine_with_the_words_that_would_drop_one_of_them(combine):
    with pytest.raises(TypeError, match=r"combine with \|, & and ~"):
        combine(fo.by_path("a"), fo.by_path("b"))


def test_a_mask_function_is_asked_each_time_as_it_may_read_values():
    selector = fo.by_mask(lambda params: jax.tree.map(lambda leaf: isinstance(leaf, jax.Array), params))
    params = {"a": jnp.ones(2)}
    assert selector.mask(jax.eval_shape(lambda: params)) == {"a": False}
    assert selector.mask(params) == {"a": True}


def test_a_path_that_reads_as_a_glob_is_suggested_as_it_is_written():
    with pytest.raises(ValueError, match=re.escape("write 'a[[]0]'")):
        fo.by_path("a[0]").mask({"a[0]": 1.0})


def test_a_mask_function_that_reads_values_is_asked_about_each_tree():
    selector = fo.by_mask(lambda params: jax.tree.map(lambda leaf: bool((leaf == 0).all()), params))
    assert selector.paths({"a": jnp.zeros(2), "b": jnp.ones(2)}) == ["a"]
    assert selector.paths({"a": jnp.ones(2), "b": jnp.zeros(2)}) == ["b"]


def test_a_mask_that_is_changed_afterwards_selects_what_it_said():
    mask = {"a": True, "b": False}
    selector = fo.by_mask(mask)
    mask["a"] = False
    assert selector.paths({"a": 1.0, "b": 2.0}) == ["a"]


@pytest.mark.parametrize("glob", ["layer_[0-11]", "layer_[12-23]", "layer_[0-23]", "layer_[8-11]", "a/[0-35]/b"])
def test_a_class_that_was_meant_as_a_range_of_numbers_is_an_error(glob):
    with pytest.raises(ValueError, match=r"a class matches one character.*write two globs"):
        fo.by_path(glob)


@pytest.mark.parametrize("glob", ["[0-9]", "[0-46-9]", "[12]", "[0-9a-f]", "[a-z0]", "[0-3_]", "[!0-9]"])
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


def test_patterns_in_a_list_where_they_go_one_by_one_are_an_error_that_says_so():
    with pytest.raises(TypeError, match=r"one by one, by_path\('a', 'b'\)"):
        fo.freeze_by_path(["encoder", "head"])


def test_a_predicate_that_asks_for_values_is_told_that_there_are_none():
    with pytest.raises(TypeError, match=r"sees a leaf's shape and dtype, not its values.*by_mask"):
        fo.by_predicate(lambda path, leaf: leaf.sum() > 0).mask({"a": jnp.ones(2)})
