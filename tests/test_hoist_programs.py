"""Random programs are what their hoisted halves are, and what is kept of an example is its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hoisting import by_equation, changed, same_bits
from jax import lax

import frozen_optax as fo

SIZE = 6

# Of an array whose first axis, or another, counts examples; many mix them.
ONE = [
    jnp.tanh,
    lambda x: x * 2 - 1,
    lambda x: x.T,
    lambda x: jnp.moveaxis(x, 0, -1),
    lambda x: x[::-1],
    lambda x: x[:, ::-1],
    lambda x: x[:, 1:],
    lambda x: x[1:],
    lambda x: x[:, :1] + x,
    lambda x: x.sum(0),
    lambda x: x.max(-1),
    lambda x: jnp.sort(x, -1),
    lambda x: jnp.sort(x, 0),
    lambda x: jnp.cumsum(x, 1),
    lambda x: jnp.cumsum(x, 0),
    lambda x: jax.nn.softmax(x),
    lambda x: jax.nn.relu(x),
    lambda x: jnp.concatenate([x, x], 1),
    lambda x: jnp.concatenate([x, x], 0),
    lambda x: jnp.stack([x, -x], 1),
    lambda x: jnp.stack([x, -x], 0),
    lambda x: jnp.pad(x, [(0, 0), (1, 0)]),
    lambda x: jnp.pad(x, [(1, 0), (0, 0)]),
    lambda x: jnp.repeat(x, 2, 0),
    lambda x: jnp.repeat(x, 2, 1),
    lambda x: jnp.tile(x, (2, 1)),
    lambda x: x.reshape(-1),
    lambda x: x.reshape(-1, 2),
    lambda x: x.reshape(2, -1),
    lambda x: x.reshape(*x.shape[::-1]),
    lambda x: x[None],
    lambda x: x[:, None],
    lambda x: x - x.mean(0),
    lambda x: x - x.mean(-1, keepdims=True),
    lambda x: x + jnp.arange(x.shape[-1]),
    lambda x: x * jnp.arange(len(x))[:, None],
    lambda x: x / len(x),
    lambda x: jnp.roll(x, 1, 0),
    lambda x: jnp.roll(x, 1, 1),
    lambda x: jnp.argmax(x, -1).astype(jnp.float32),
    lambda x: jnp.take_along_axis(x, jnp.argsort(x, -1), -1),
    lambda x: jnp.take_along_axis(x, jnp.argsort(x, 0), 0),
    lambda x: x[jnp.argsort(x[:, 0])],
    lambda x: lax.map(jnp.sin, x),
    lambda x: jax.vmap(lambda row: row[::-1])(x),
    lambda x: jax.vmap(lambda row: lax.dynamic_slice_in_dim(row, 1, 1))(x),
    lambda x: lax.scan(lambda c, row: (c + row.sum(), c * row), 0.0, x)[1],
    lambda x: lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x),
    lambda x: lax.cond(True, jnp.sin, lambda x: x[::-1], x),
    lambda x: lax.fori_loop(0, 2, lambda i, x: jnp.sin(x), x),
    lambda x: lax.fori_loop(0, 2, lambda i, x: x[::-1], x),
    lambda x: jax.jit(lambda x: jnp.tanh(x) * 3)(x),
    lambda x: jax.checkpoint(lambda x: jnp.tanh(x) * 3)(x),
    lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (1, 2), (1, 1), "SAME"),
    lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (2, 1), (1, 1), "SAME"),
    lambda x: lax.top_k(x, 2)[0],
    lambda x: jnp.split(x, 2, 0)[1],
    lambda x: jnp.split(x, 2, -1)[1],
    lambda x: x.at[:, 0].set(1.0),
    lambda x: lax.dynamic_update_slice(x, x[:, :1] * 2, (0, 1)),
    lambda x: jnp.abs(jnp.fft.fft(x)),
    lambda x: jnp.where(x > 0, x, 0.5),
    lambda x: (x > 0).astype(jnp.float32),
]
TWO = [
    jnp.add,
    jnp.multiply,
    lambda x, y: jnp.where(x > 0, x, y),
    lambda x, y: x @ y.T,
    lambda x, y: x.T @ y,
    lambda x, y: jnp.einsum("ij,ik->ijk", x, y),
    lambda x, y: jnp.einsum("ij,ij->i", x, y),
    lambda x, y: jnp.concatenate([x, y], 1),
    lambda x, y: lax.dynamic_slice_in_dim(x, jnp.argmax(y[0]), 1, 1),
    lambda x, y: x[jnp.argmax(y, -1)],
    lambda x, y: jnp.searchsorted(jnp.arange(3.0), x[:, 0])[:, None] * y,
]
# The same, of which some know how many examples there are; done as they are, or within a program.
WITHIN = [
    jnp.tanh,
    lambda x: x[::-1],
    lambda x: x - x.mean(0),
    lambda x: jnp.cumsum(x, -1),
    lambda x: x * len(x),
    lambda x: x + jnp.ones(len(x)).sum(),
    lambda x: x.at[0].set(1.0),
    lambda x: x.at[..., 0].set(1.0),
    lambda x: jnp.roll(x, 1, -1),
    lambda x: x + lax.map(jnp.sin, jnp.ones(len(x))).sum(),
    lambda x: lax.fori_loop(0, len(x), lambda i, x: x * 1.1, x),
]
PROGRAMS = [
    lambda f: jax.checkpoint(f),
    lambda f: lambda x: lax.cond(True, f, jnp.sin, x),
    lambda f: lambda x: lax.fori_loop(0, 2, lambda i, x: f(x), x),
    lambda f: lambda x: lax.scan(lambda c, _: (f(c), c), x, None, length=2)[1][1],
    lambda f: lambda x: lax.map(f, x),
    lambda f: lambda x: lax.map(lambda row: f(row) + len(x), x),
    lambda f: lambda x: lax.map(lambda row: f(jnp.ones(len(x))).sum() * row, x),
    lambda f: lambda x: lax.map(lambda row: lax.fori_loop(0, len(x), lambda _, r: f(r), row), x),
    lambda f: jax.vmap(f),
    lambda f: jax.vmap(f, in_axes=1),
    lambda f: jax.vmap(f, in_axes=1, out_axes=1),
]
OF_EACH = [  # of an example's part of each
    lambda x, y: x * y.sum(),
    lambda x, y: x[jnp.argmax(y) % len(x)],
    lambda x, y: x.at[jnp.argmax(y)].set(2.0),
    lambda x, y: x.at[jnp.argmax(y)].add(y.sum()),
    lambda x, y: lax.dynamic_slice_in_dim(x, jnp.argmax(y), 1),
    lambda x, y: lax.dynamic_update_slice_in_dim(x, x[:1] * 2, jnp.argmax(y), 0),
    lambda x, y: lax.cond(y.sum() > 0, jnp.sin, jnp.cos, x),
    lambda x, y: lax.while_loop(lambda x: jnp.abs(x).max() > 0.5, lambda x: x / 2, x),
]
PLACES = [lambda i: i, lambda i: i[:], lambda i: i ^ 1, lambda i: i[::-1], lambda i: i - 1]
AT_PLACES = [
    lambda x, y, each: x[each, jnp.argmax(y, -1) % x.shape[1]],
    lambda x, y, each: x[each[:, None], jnp.argsort(y, -1) % x.shape[1]],
    lambda x, y, each: x.at[each[:, None], jnp.argsort(y, -1)[:, :1] % x.shape[1]].set(0.0),
]
WEIGHTS = [
    lambda x, w: x @ w[: x.shape[-1]],
    lambda x, w: jnp.take(w, jnp.abs(x).astype(jnp.int32) % 4, 0),
    lambda x, w: x * w[0, 0],
    lambda x, w: x + jnp.broadcast_to(w[0, 0], x.shape),
    lambda x, w: jnp.where(w.sum() > 0, x, -x),
]


def program(seed):
    """A function of parameters and two arrays, and how many of its operations were drawn."""

    def fun(params, x, z):
        random = np.random.default_rng(seed)
        of = lambda options: options[int(random.integers(len(options)))]
        arrays = [x, z]
        for _ in range(6):
            kind = of(["one", "one", "two", "weights", "within", "each", "places"])
            late, other, within = of(arrays[-3:]), of(arrays), of(WITHIN)
            try:
                if kind == "one":
                    new = of(ONE)(late)
                elif kind == "two":
                    new = of(TWO)(late, other)
                elif kind == "within":
                    new = of(PROGRAMS)(within)(late)
                elif kind == "each":
                    new = jax.vmap(of(OF_EACH))(late, other)
                elif kind == "places":
                    new = of(AT_PLACES)(late, other, of(PLACES)(jnp.arange(len(late))))
                else:
                    new = of(WEIGHTS)(late, params["frozen"])
            except (TypeError, ValueError, IndexError, ZeroDivisionError):
                continue  # not of arrays like these
            if 0 < new.size <= 4000 and new.dtype in (jnp.float32, jnp.float16):
                arrays.append(new)
        trained = sum(jnp.sum(jnp.tanh(array) * params["trained"]) for array in arrays[2:])
        return trained + jnp.sum(x) * params["trained"]

    return fun


def check(seed):
    """Whether anything was hoisted."""
    random = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
    params = {"frozen": draw(4, 3), "trained": draw()}
    data = (draw(SIZE, 4), draw(SIZE, 4))
    fun = program(seed)
    hoisted = fo.hoist(fun, "frozen")
    try:
        with jax.disable_jit():
            rows = hoisted.prepare(params, *data)
            others = hoisted.prepare(params, *changed(data, 2))
    except ValueError as error:
        if "nothing can be hoisted" in str(error) or "cannot be traced with" in str(error):
            return False
        raise
    with jax.disable_jit():
        assert same_bits(by_equation(fun)(params, *data), hoisted(params, rows)), seed
        order = np.array([3, 0, 5, 4, 1, 2])
        expected = by_equation(fun)(params, *(each[order] for each in data))
        # Products of other rows may be summed in another order.
        np.testing.assert_allclose(hoisted(params, rows[order]), expected, rtol=1e-4, atol=1e-4)
    assert_few(fun, hoisted, params, data, rows, np.array([4, 1, 2]))
    kept = np.delete(np.arange(SIZE), 2)
    assert same_bits(rows[kept].each, others[kept].each), seed
    assert same_bits(rows.shared, others.shared), seed
    return True


def assert_few(fun, hoisted, params, data, rows, picked):
    """Rows serve another number of examples, or it is another program and they are refused."""
    try:
        found = jax.jit(hoisted)(params, rows[picked])
    except ValueError as error:
        refusals = ("another program with this batch size", "cannot be traced with")
        if any(each in str(error) for each in refusals):
            return
        raise
    expected = jax.jit(fun)(params, *(each[picked] for each in data))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_random_programs_are_what_their_halves_are():
    assert sum(map(check, range(3))) > 1


@pytest.mark.exhaustive
@pytest.mark.parametrize("first", range(3, 83, 20))
def test_more_random_programs_are_what_their_halves_are(first):
    assert sum(map(check, range(first, first + 20)))
