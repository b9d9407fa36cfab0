"""What a predicate is asked, and what it may answer."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import ALL, PARAMS

import frozen_optax as fo


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
    assert fo.by_predicate(lambda path, leaf: seen.update({path: leaf}) is None).paths(
        tree
    ) == list(seen)
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


def test_a_predicate_gets_the_parameters_shape_and_dtype():
    params = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(2), "n": jnp.ones(3, jnp.int32)}
    gradients = {
        "a": jnp.ones(2, jnp.float32),
        "b": jnp.ones(2, jnp.bfloat16),
        "n": np.zeros(3, jax.dtypes.float0),
    }
    seen = []
    for make in (fo.freeze, lambda s: fo.with_frozen(optax.sgd(1.0), s)):
        tx = make(
            lambda path, leaf: (seen.append((path, str(leaf.dtype))), leaf.dtype != jnp.float32)[1]
        )
        for update, n in ((tx.update, gradients["n"]), (jax.jit(tx.update), params["n"])):
            updates, _ = update({**gradients, "n": n}, tx.init(params), params)
            new = fo.apply_updates(params, updates)
            assert np.array_equal(new["a"], params["a"])
            assert not np.array_equal(new["b"], params["b"])
            assert np.array_equal(new["n"], params["n"])
    assert set(seen) == {("a", "bfloat16"), ("b", "float32"), ("n", "int32")}


def test_a_predicate_at_update_needs_parameters_not_gradients():
    params = {"a": jnp.ones(2)}
    seen = []
    is_float = lambda path, leaf: (seen.append(leaf.dtype), leaf.dtype == jnp.float32)[1]
    selector = fo.by_predicate(is_float)
    for tx in (
        fo.freeze(is_float),
        fo.freeze(trainable=is_float),
        fo.freeze(selector & ALL),
        fo.freeze(ALL | selector),
    ):
        with pytest.raises(ValueError, match="Pass the parameters"):
            tx.update({"a": jnp.ones(2, jnp.bfloat16)}, tx.init(params))
    assert set(seen) == {np.dtype("float32")}


@pytest.mark.parametrize(
    "answer", [None, 1, 0, "yes", jnp.array(True), np.array([True]), re.match("a", "a")]
)
def test_a_predicate_that_returns_no_bool_names_the_path(answer):
    selector = fo.by_predicate(lambda path, leaf: answer if path == "head/kernel" else True)
    with pytest.raises(TypeError, match=r"returned .* at 'head/kernel', expected a bool"):
        selector.mask(PARAMS)


def test_a_predicate_may_return_numpys_bool_and_say_may_be_empty():
    assert fo.by_predicate(lambda path, leaf: np.bool_(path == "head/bias")).paths(PARAMS) == [
        "head/bias"
    ]
    assert fo.by_predicate(lambda path, leaf: False, may_be_empty=True).paths(PARAMS) == []
    with pytest.raises(ValueError, match=r"selects nothing.*'encoder/bias'.*may_be_empty=True"):
        fo.by_predicate(lambda path, leaf: False).paths(PARAMS)


@pytest.mark.parametrize(
    "predicate", ["encoder", None, lambda: True, lambda path: True, lambda a, b, c: True, 3]
)
def test_a_predicate_takes_two_arguments(predicate):
    with pytest.raises(
        TypeError, match=re.escape("by_predicate takes a function (path, leaf) -> bool, found")
    ):
        fo.by_predicate(predicate)


def test_predicates_of_every_callable_kind_are_understood():
    class IsBias:
        def __call__(self, path, leaf):
            return path.endswith("bias")

    def is_below(module, path, leaf):
        return path.startswith(module)

    assert fo.by_predicate(IsBias()).paths(PARAMS) == ["encoder/bias", "head/bias"]
    assert fo.by_predicate(functools.partial(is_below, "head")).paths(PARAMS) == [
        "head/bias",
        "head/kernel",
    ]
    assert fo.by_predicate(lambda path, leaf, strict=True: strict).paths({"a": 1.0}) == ["a"]
    assert fo.by_predicate(lambda *args: len(args) == 2).paths({"a": 1.0}) == ["a"]


def test_a_predicate_that_asks_for_values_is_told_of_none():
    with pytest.raises(TypeError, match=r"sees a leaf's shape and dtype, not its values.*by_mask"):
        fo.by_predicate(lambda path, leaf: leaf.sum() > 0).mask({"a": jnp.ones(2)})
