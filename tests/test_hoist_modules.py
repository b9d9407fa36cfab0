"""`hoist` of modules that hold more than parameters, and errors that are the function's own."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import frozen_optax as fo

X = jax.random.normal(jax.random.key(0), (6, 4))


class Model(nnx.Module):
    """An encoder, and what changes in place behind it."""

    def __init__(self, changing: Any):
        self.encoder, self.head = (nnx.Linear(*io, rngs=nnx.Rngs(0)) for io in ((4, 8), (8, 1)))
        self.changing = changing

    def __call__(self, x: Any) -> Any:
        return self.head(self.changing(jnp.tanh(self.encoder(x))))


class Counter(nnx.Module):
    """Counts its calls, in a Variable of its own kind."""

    def __init__(self) -> None:
        self.calls = nnx.Variable(jnp.zeros(()))

    def __call__(self, x: Any) -> Any:
        self.calls[...] += 1
        return x * self.calls[...]


CHANGING = {
    "rngs/count": lambda: nnx.Dropout(0.5, rngs=nnx.Rngs(1)),
    "mean": lambda: nnx.BatchNorm(8, rngs=nnx.Rngs(1)),
    "calls": Counter,
}


def loss(model: Any, x: Any) -> Any:
    return jnp.mean(model(x) ** 2)


@pytest.mark.parametrize("name", CHANGING)
def test_a_module_that_changes_in_place_is_refused(name: str) -> None:
    hoisted, model = fo.hoist(loss, "encoder"), Model(CHANGING[name]())
    message = f"changed the nnx.Variable at 'changing/{name}' in place.* live_argnums"
    for call in (hoisted.prepare, hoisted.report, lambda *args: hoisted.cache(model, [args[1:]])):
        with pytest.raises(ValueError, match=message):
            call(model, X)
    model.changing = nnx.Dropout(0.5, deterministic=True)
    rows = hoisted.prepare(model, X)
    np.testing.assert_allclose(hoisted(model, rows), loss(model, X), rtol=1e-5)


@pytest.mark.parametrize("name", CHANGING)
def test_what_changes_may_be_live_and_returned(name: str) -> None:
    graph, params, rest = nnx.split(Model(CHANGING[name]()), nnx.Param, ...)

    def split_loss(params: Any, x: Any, rest: Any) -> Any:
        model = nnx.merge(graph, params, rest)
        return loss(model, x), nnx.state(model, nnx.Not(nnx.Param))

    hoisted = fo.hoist(split_loss, "encoder", live_argnums=2)
    rows = hoisted.cache(params, [(X,)], live=(rest,))[:]
    live = rest
    for _ in range(3):
        (value, rest), (expected, live) = hoisted(params, rows, rest), split_loss(params, X, live)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(rest), jax.tree.leaves(live), strict=True):
        if not jnp.issubdtype(ours.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_numbers_of_python_in_an_equinox_module_are_part_of_the_program() -> None:
    keys = jax.random.split(jax.random.key(0))
    model = [
        eqx.nn.Linear(4, 8, key=keys[0]),
        eqx.nn.Dropout(0.5),
        eqx.nn.Linear(8, 1, key=keys[1]),
    ]

    def of_layers(model: Any, x: Any, key: Any) -> Any:
        hidden = model[1](jnp.tanh(jax.vmap(model[0])(x)), key=key)
        return jnp.mean(jax.vmap(model[2])(hidden) ** 2)

    hoisted, key = fo.hoist(of_layers, "0", live_argnums=2), jax.random.key(3)
    rows = hoisted.cache(model, [(X,)])[:]
    np.testing.assert_allclose(hoisted(model, rows, key), of_layers(model, X, key), rtol=1e-5)


def test_what_the_function_raises_of_its_arguments_is_raised() -> None:
    def of_two(params: Any, x: Any, key: Any) -> Any:
        return jnp.mean(x @ params["encoder"]) + jax.random.normal(key)

    with pytest.raises(TypeError, match="missing 1 required positional argument: 'key'"):
        fo.hoist(of_two, "encoder").prepare({"encoder": jnp.ones((4, 2)), "head": X}, X)
