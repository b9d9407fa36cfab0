"""What was once served wrongly by `hoist`, and what is like it."""

import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hoisting import same_bits
from jax import lax

import frozen_optax as fo

X = jax.random.normal(jax.random.key(0), (6, 4))
PARAMS = {"w": jax.random.normal(jax.random.key(1), (4, 3)), "head": jnp.array([1.0, -2.0, 0.5])}


def loss(params: Any, x: Any) -> Any:
    return jnp.sum(jnp.tanh(x @ params["w"]) @ params["head"])


@pytest.mark.parametrize("of", ["data", "frozen"])
def test_two_inputs_of_one_path_are_told_apart(of: str) -> None:
    both = {"a/b": X, "a": {"b": 3 * X}}
    params = {"a/b": {"w": PARAMS["w"]}, "a": {"b/w": 2 * PARAMS["w"]}}
    params |= {"one": PARAMS["head"], "other": PARAMS["head"]}

    def of_both(params: Any, both: Any) -> Any:
        ones = [both["a/b"], both["a"]["b"] if of == "data" else both["a/b"]]
        weights = [params["a/b"]["w"], params["a"]["b/w"] if of == "frozen" else params["a/b"]["w"]]
        features = [jnp.tanh(x @ w) for x, w in zip(ones, weights, strict=True)]
        return jnp.sum(features[0] @ params["one"]) + 10 * jnp.sum(features[1] @ params["other"])

    hoisted = fo.hoist(of_both, trainable=["one", "other"])
    with jax.disable_jit():
        rows = hoisted.prepare(params, both)
        assert same_bits(hoisted(params, rows), of_both(params, both))


def test_two_numbers_of_one_path_are_compared_by_a_cache() -> None:
    def scaled(params: Any, batch: Any) -> Any:
        return loss(params, batch["x"] * batch["a/b"] * batch["a"]["b"])

    hoisted, path = fo.hoist(scaled, "w"), tempfile.mkdtemp()
    hoisted.cache(PARAMS, [({"x": X, "a/b": 0.5, "a": {"b": 2.0}},)], path)
    for one, other in ((0.5, 4.0), (0.25, 2.0), (2.0, 0.5)):
        with pytest.raises(ValueError, match="argument '0/a/b' of a batch"):
            hoisted.cache(PARAMS, [({"x": X, "a/b": one, "a": {"b": other}},)], path)


BODIES: dict[str, Any] = {
    "counted": lambda x, size: x * jnp.arange(size).sum(),
    "as often": lambda x, size: lax.fori_loop(0, size, lambda i, x: x * 1.5, x),
    "ones": lambda x, size: x + jnp.ones(size).sum(),
    "within": lambda x, size: jax.checkpoint(lambda x: x + jnp.ones(size).sum())(x),
    "mapped": lambda x, size: x + lax.map(jnp.sin, jnp.ones(size)).sum(),
}


@pytest.mark.parametrize("name", BODIES)
def test_what_is_done_to_each_does_not_know_how_many(name: str) -> None:
    def of_each(params: Any, x: Any) -> Any:
        features = jnp.tanh(x @ params["w"])
        return loss(PARAMS | params, lax.map(lambda x: BODIES[name](x, len(X)), X)) + jnp.sum(
            lax.map(lambda each: BODIES[name](each, len(features)), features) @ params["head"]
        )

    hoisted = fo.hoist(of_each, "w")
    rows = hoisted.prepare(PARAMS, X)
    assert any("depends on the batch size" in stop for stop in hoisted.report(PARAMS, X).stops)
    for some in (slice(0, 6), slice(1, 4)):
        np.testing.assert_allclose(hoisted(PARAMS, rows[some]), of_each(PARAMS, X[some]), rtol=1e-5)


def test_an_operation_with_other_axes_at_another_size_stays() -> None:
    def reshaped(params: Any, x: Any) -> Any:
        x = jnp.tanh(x @ params["w"])
        x = x.reshape((len(x), 3) if len(x) > 6 else (len(x), 3, 1)).reshape(-1, 3)
        return jnp.sum(x @ params["head"])

    hoisted = fo.hoist(reshaped, "w")
    rows = hoisted.prepare(PARAMS, X)
    assert rows.bytes_per_example == 12
    np.testing.assert_allclose(hoisted(PARAMS, rows), reshaped(PARAMS, X), rtol=1e-5)


def test_a_single_example_is_served_of_labels_as_they_were_given() -> None:
    def entropy(params: Any, x: Any, labels: Any) -> Any:
        logits = jnp.tanh(x @ params["w"]) * params["head"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    labels = jnp.arange(6) % 3
    hoisted = fo.hoist(entropy, "w")
    rows = hoisted.prepare(PARAMS, X, labels)
    assert any(np.array_equal(array, labels) for array in rows.each)
    found = hoisted(PARAMS, rows[4:5])
    np.testing.assert_allclose(found, entropy(PARAMS, X[4:5], labels[4:5]), rtol=1e-5)


def test_a_single_example_that_is_another_program_is_refused() -> None:
    def once(params: Any, x: Any) -> Any:
        return loss(params, jnp.sin(x) if len(x) == 1 else x)

    hoisted = fo.hoist(once, "w")
    with pytest.raises(ValueError, match="A single example often makes another one"):
        hoisted(PARAMS, hoisted.prepare(PARAMS, X)[:1])


CHANGED: dict[str, Any] = {
    "narrower": lambda array: array.astype(jnp.bfloat16),
    "in two": lambda array: array.reshape(2, 3, 3),
    "one": lambda array: array[0],
    "wider": lambda array: jnp.concatenate([array, array], 1),
}


@pytest.mark.parametrize("name", CHANGED)
def test_rows_of_another_shape_or_dtype_are_refused(name: str) -> None:
    hoisted = fo.hoist(loss, "w")
    rows = jax.tree.map(CHANGED[name], hoisted.prepare(PARAMS, X))
    with pytest.raises(ValueError, match=r"an array of the rows is .*, and it was float32"):
        hoisted(PARAMS, rows)


def test_a_row_without_its_axis_is_refused_by_its_lengths() -> None:
    hoisted = fo.hoist(lambda params, x, y: loss(params, x) + y @ y * params["head"][0], "w")
    rows = hoisted.prepare(PARAMS, X, jnp.ones(6))
    with pytest.raises(ValueError, match=r"pick rows\[i : i \+ 1\] within"):
        jax.vmap(lambda row: hoisted(PARAMS, row))(rows)
    many = jax.vmap(lambda i: hoisted(PARAMS, rows[i[None]]))(jnp.arange(6))
    np.testing.assert_allclose(many.sum(), hoisted(PARAMS, rows), rtol=1e-4)


def test_an_array_that_a_loader_writes_to_again_is_copied() -> None:
    fun = lambda params, x, y: jnp.sum(jnp.tanh(x @ params["w"]) @ params["head"] * y)
    space = np.empty(64 * 4 + 64, np.uint8)  # where jax would take it as it lies
    first = -space.ctypes.data % 64
    labels = space[first : first + 64 * 4].view(np.float32)
    labels[:] = 1
    rows = fo.hoist(fun, "w").prepare(PARAMS, np.ones((64, 4), np.float32), labels)
    labels[:] = -1
    (kept,) = (array for array in rows.each if array.ndim == 1)
    np.testing.assert_array_equal(kept, np.ones(64))


def test_an_array_of_words_is_no_part_of_rows() -> None:
    fun = lambda params, batch: loss(params, batch["x"])
    hoisted = fo.hoist(fun, "w")
    for words in (np.array(list("abcdef")), np.array([{}] * 6, object)):
        with pytest.raises(TypeError, match=r"'batch' 'text' is an array of .*Leave it out"):
            hoisted.prepare(PARAMS, {"x": X, "text": words})


def test_a_live_argument_that_is_no_key_has_to_be_told() -> None:
    fun = lambda params, x, step: loss(params, x) * jnp.minimum(1.0, step / 100)
    hoisted = fo.hoist(fun, "w", live_argnums=2)
    for prepare in (hoisted.prepare, lambda params, x: hoisted.cache(params, [(x,)])):
        with pytest.raises(TypeError) as raised:
            prepare(PARAMS, X)
        notes = "\n".join(raised.value.__notes__)  # jax adds its own
        assert "live=(jax.ShapeDtypeStruct((), jnp.int32),)" in notes
    rows = hoisted.prepare(PARAMS, X, live=(jax.ShapeDtypeStruct((), jnp.int32),))
    np.testing.assert_allclose(hoisted(PARAMS, rows, 50), fun(PARAMS, X, 50), rtol=1e-6)
