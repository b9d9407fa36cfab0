"""Rows that train have a gradient of their own size where a table is looked up, the same bits."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import host_bits

import frozen_optax as fo

ROWS, WIDTH = 50, 4
TOKENS = jnp.array([[1, 48, 49, 48], [2, 3, 49, 7]])
PARTS = {  # which rows are frozen
    "the last rows train": np.arange(ROWS) < 47,
    "the first rows train": np.arange(ROWS) >= 3,
    "some rows train": np.arange(ROWS) % 7 != 0,
}


def make_params():
    table, head = jax.random.split(jax.random.key(0))
    return {
        "head": jax.random.normal(head, (WIDTH, 2)),
        "table": jax.random.normal(table, (ROWS, WIDTH)),
    }


def read(params, rows):
    return jnp.mean(jnp.tanh(rows @ params["head"]) ** 2)


@jax.custom_vjp
def backwards_only(x):
    return x * 2


backwards_only.defvjp(lambda x: (x * 2, None), lambda _, cotangent: (cotangent * 2,))


def scanned(params):
    def layer(carry, row):
        return jnp.tanh(carry + row), None

    return jnp.sum(jax.lax.scan(layer, jnp.ones(WIDTH), params["table"])[0])


TABLE = lambda params: params["table"]
LOSSES = {
    "indexed": lambda p: read(p, TABLE(p)[TOKENS]),
    "from the end": lambda p: read(p, TABLE(p)[TOKENS - ROWS]),
    "take": lambda p: read(p, jnp.take(TABLE(p), TOKENS, axis=0)),
    "take, clipped": lambda p: read(p, jnp.take(TABLE(p), TOKENS + 3, axis=0, mode="clip")),
    "take, filled": lambda p: read(p, jnp.take(TABLE(p), TOKENS + 3, 0, mode="fill", fill_value=1)),
    "one row": lambda p: read(p, TABLE(p)[49]),
    "twice": lambda p: read(p, TABLE(p)[TOKENS]) * read(p, TABLE(p)[TOKENS.T]),
    "narrow": lambda p: read(p, TABLE(p).astype(jnp.bfloat16)[TOKENS].astype(jnp.float32)),
    "by indices that it computes": lambda p: read(
        p, TABLE(p)[jnp.argsort(TABLE(p)[:, 0])[:40].reshape(4, 10)]
    ),
    "tied to an output": lambda p: read(p, TABLE(p)[TOKENS]) + jnp.sum(TABLE(p) @ p["head"]) ** 2,
    "columns": lambda p: read(p, TABLE(p)[:, jnp.array([0, 1, 1, 3])][:5]),
    "backwards only": lambda p: read(p, backwards_only(TABLE(p)[TOKENS])),
    "compiled": jax.jit(lambda p: read(p, TABLE(p)[TOKENS])),
    "in a checkpoint": jax.checkpoint(lambda p: read(p, TABLE(p)[TOKENS])),
    "in a scan": scanned,
    "not at all": lambda p: jnp.sum(p["head"]),
}


def same(ours, expected, frozen):
    np.testing.assert_array_equal(ours["head"], expected["head"])
    np.testing.assert_array_equal(ours["table"][~frozen], expected["table"][~frozen])
    assert not np.asarray(ours["table"])[frozen].any()


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("loss", LOSSES)
def test_op_by_op_the_gradient_is_that_of_jax(loss, part):
    params, loss, frozen = make_params(), LOSSES[loss], PARTS[part]
    tx = fo.with_frozen(optax.sgd(0.1), elements={"table": frozen})
    with jax.disable_jit():
        value, ours = fo.value_and_grad(loss, tx)(params)
        expected_value, expected = jax.value_and_grad(loss)(params)
        assert value == expected_value
        same(ours, expected, frozen)
    compiled = jax.jit(fo.grad(loss, tx))(params)
    for name in params:
        close = {"rtol": 1e-2 if loss is LOSSES["narrow"] else 1e-4, "atol": 1e-5}
        np.testing.assert_allclose(compiled[name], ours[name], **close)


MANY = 300  # more rows than 8 bits count
MODES = jax.lax.GatherScatterMode
MODES = {"clip": MODES.CLIP, "fill": MODES.FILL_OR_DROP, "promised": MODES.PROMISE_IN_BOUNDS}


def same_gradient(loss, table, frozen, same_loss=None):
    """Of rows that train, op by op, the bits of jax's gradient."""
    tx = fo.with_frozen(optax.sgd(0.1), elements={"table": frozen})
    ours = fo.grad(loss, tx)({"table": table})["table"]
    expected = jax.grad(same_loss or loss)({"table": table})["table"]
    pair = (host_bits(np.asarray(each)[~frozen]) for each in (ours, expected))
    np.testing.assert_array_equal(*pair)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.int16, jnp.int32, jnp.uint32])
def test_indices_of_each_dtype_out_of_range_or_not(dtype, mode):
    """A gather as it is: an index from the end, or behind it, is out of range."""
    ends = jnp.iinfo(dtype)
    near = [0, 1, 4, 5, 7, 7, 14, 98, 126, 127, 128, 254, 255, 293, 294, 296, 298, 299]
    out = [300, 301, 1000, 2**31 - 1, 2**31, 2**32 - 1]
    out += [-1, -2, -6, -7, -299, -300, -301, -(2**31)]
    asked = near if mode == "promised" else near + out
    asked = [i for i in asked if ends.min <= i <= ends.max]
    # The oldest jax loses the gradient of unsigned ones that it clips.
    clipped = jnp.asarray(
        np.clip(asked, 0, MANY - 1) if mode == "clip" else asked,
        jnp.int16 if mode == "clip" else dtype,
    )
    indices = jnp.asarray(asked, dtype)
    weights = jnp.arange(1.0, 1 + len(asked))
    numbers = jax.lax.GatherDimensionNumbers((1,), (0,), (0,))

    def loss(params, indices=indices):
        at = indices[:, None]
        rows = jax.lax.gather(params["table"], at, numbers, (1, 2), mode=MODES[mode])
        return jnp.sum(weights[:, None] * jnp.sin(jnp.nan_to_num(rows)))

    at = np.arange(MANY)
    for frozen in (at < 290, at >= 5, (at < 5) | (at > 297), at % 7 != 0, at % 7 == 0):
        table = jax.random.normal(jax.random.key(0), (MANY, 2))
        same_gradient(loss, table, frozen, lambda params: loss(params, clipped))


CASTS = [jnp.float32, jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("first", CASTS)
@pytest.mark.parametrize("second", CASTS)
def test_casts_before_a_look_up_round_as_they_do_in_jax(first, second, part):
    weights = jnp.arange(1.0, 1 + TOKENS.size).reshape(*TOKENS.shape, 1) / 3

    def loss(params):
        once = params["table"].astype(first)
        twice = once.astype(second)
        tables = [once, twice, once] if jnp.finfo(first).bits > 8 else [twice, twice]
        rows = [table[TOKENS].astype(jnp.float32) for table in tables]
        return sum(jnp.sum(weights * jnp.sin(each)) for each in rows)

    for dtype in (jnp.float32, jnp.bfloat16):
        same_gradient(loss, make_params()["table"].astype(dtype), PARTS[part])


def test_auxiliary_data_and_several_arguments_are_as_in_jax():
    params, frozen = make_params(), PARTS["the last rows train"]
    tx = fo.with_frozen(optax.sgd(0.1), elements={"table": frozen})

    def loss(first, scale, second):
        rows = first["table"][TOKENS] + second["table"][TOKENS] * scale
        return read(first, rows), {"rows": rows, "n": 3}

    arguments = (params, 2.0, make_params())
    with jax.disable_jit():
        (value, aux), ours = fo.value_and_grad(loss, tx, argnums=(0, 2), has_aux=True)(*arguments)
        (of_jax, aux_of_jax), expected = jax.value_and_grad(loss, (0, 2), has_aux=True)(*arguments)
    assert value == of_jax
    assert aux["n"] == aux_of_jax["n"] == 3
    for pair in zip(ours, expected, strict=True):
        same(*pair, frozen)


def test_errors_of_the_loss_are_those_of_jax():
    tx = fo.with_frozen(optax.sgd(0.1), elements={"table": PARTS["some rows train"]})
    with pytest.raises(TypeError, match="scalar-output"):
        fo.grad(lambda params: params["table"][TOKENS], tx)(make_params())
    with pytest.raises(TypeError, match="real-valued outputs"):
        fo.grad(lambda params: jnp.sum(params["table"][TOKENS] > 0), tx)(make_params())


class Model(nn.Module):
    dtype: type = jnp.float32

    @nn.compact
    def __call__(self, tokens):
        embedded = nn.Embed(ROWS, WIDTH, name="embed", dtype=self.dtype)(tokens)
        return nn.Dense(2, dtype=self.dtype)(embedded).astype(jnp.float32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_donated_step_makes_nothing_of_the_size_of_the_table(dtype):
    model = Model(dtype)
    params = model.init(jax.random.key(0), TOKENS)["params"]
    adamw = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1))
    tx = fo.with_frozen(adamw, elements={"embed": PARTS["the last rows train"]})

    @fo.jit(frozen=tx, donate_argnums=(0, 1))
    def step(params, state, tokens):
        loss = lambda params: jnp.mean(model.apply({"params": params}, tokens) ** 2)
        updates, state = tx.update(fo.grad(loss, tx)(params), state, params)
        return fo.apply_updates(params, updates, tx), state

    program = step.lower(params, tx.init(params), TOKENS).compile().as_text()
    entry = program[program.index("ENTRY") :].splitlines()
    made = [line for line in entry if f"= f32[{ROWS},{WIDTH}]" in line and "parameter(" not in line]
    assert len(made) == 1, made  # the table itself, in place
    assert "update-slice" in made[0] or "update_slice" in made[0]
    after, _ = step(jax.tree.map(jnp.copy, params), tx.init(params), TOKENS)
    fo.assert_frozen(params, after, tx)
