"""The rules of `hoist`, each by a program that mixes examples by its primitive and little else.

A rule that let its program through would be seen: with the rule switched off, rows do depend on one
another, or on where they stand.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import frozen_optax as fo
from frozen_optax._hoist import _rowwise

SIZE = 6
X = jax.random.normal(jax.random.key(0), (SIZE, 4))
PARAMS = {"encoder": jnp.eye(4) + 0.5, "head": jnp.ones(4)}
ORDER = np.array([3, 0, 5, 1, 4, 2])


@jax.custom_jvp
def reversed_with_jvp(x: Any) -> Any:
    return x[::-1]


reversed_with_jvp.defjvp(lambda p, t: (reversed_with_jvp(*p), t[0][::-1]))


@jax.custom_vjp
def reversed_with_vjp(x: Any) -> Any:
    return x[::-1]


reversed_with_vjp.defvjp(lambda x: (x[::-1], None), lambda _, g: (g[::-1],))


def of_another(x: Any) -> Any:
    """For each example the part of another one, which it names."""
    numbers = lax.GatherDimensionNumbers((1,), (0,), (0,))
    index = jnp.argmax(x, 1).astype(jnp.int32)[:, None]
    return lax.gather(x, index, numbers, (1, 4), mode="clip")


def window(start: Any, function: Any) -> Callable[[Any], Any]:
    return lambda x: lax.reduce_window(x, start, function, (2, 1), (1, 1), "SAME")


def convolved(x: Any) -> Any:
    names = ("NWC", "WIO", "NWC")
    return lax.conv_general_dilated(
        x[None], jnp.ones((3, 4, 4)), (1,), "SAME", dimension_numbers=names
    )[0]


def placed(x: Any) -> Any:
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.jit(lambda x: x[::-1], in_shardings=device)(x)


MIXES: dict[str, Callable[[Any], Any]] = {
    "argmax": lambda x: x + jnp.argmax(x, 0),
    "argmin": lambda x: x + jnp.argmin(x, 0),
    "concatenate": lambda x: jnp.concatenate([x, -x]).reshape(len(x), 2, 4).max(1),
    "cond": lambda x: lax.cond(x.shape[1] > 0, lambda x: x[::-1], lambda x: x, x),
    "conv_general_dilated": convolved,
    "cumlogsumexp": lambda x: lax.cumlogsumexp(x, 0),
    "cummax": lambda x: lax.cummax(x, 0),
    "cummin": lambda x: lax.cummin(x, 0),
    "cumprod": lambda x: lax.cumprod(x, 0),
    "cumsum": lambda x: lax.cumsum(x, 0),
    "custom_jvp_call": reversed_with_jvp,
    "custom_vjp_call": reversed_with_vjp,
    "dot_general": lambda x: x @ (x.T @ x),
    "dynamic_slice": lambda x: x + lax.dynamic_slice(x, (2, 0), (1, 4)),
    "dynamic_update_slice": lambda x: lax.dynamic_update_slice(x, jnp.zeros((1, 4)), (2, 0)),
    "gather": of_another,
    "iota": lambda x: x * lax.broadcasted_iota(jnp.float32, x.shape, 0),
    "jit": placed,
    "pad": lambda x: lax.pad(x, 0.0, ((1, -1, 0), (0, 0, 0))),
    "reduce": lambda x: x - lax.reduce(x, np.float32(0), lambda a, b: a + b * 1.0, (0,)),
    "reduce_and": lambda x: x * jnp.all(x > -0.5, 0),
    "reduce_max": lambda x: x - x.max(0),
    "reduce_min": lambda x: x - x.min(0),
    "reduce_or": lambda x: x * jnp.any(x > 0.9995, 0),
    "reduce_prod": lambda x: x * x.prod(0),
    "reduce_sum": lambda x: x - x.sum(0),
    "reduce_window": window(np.float32(0), lambda a, b: a + b * 1.0),
    "reduce_window_max": window(-jnp.inf, lax.max),
    "reduce_window_min": window(jnp.inf, lax.min),
    "reduce_window_sum": window(0.0, lax.add),
    "reduce_xor": lambda x: x * lax.reduce_xor((x * 100).astype(jnp.int32), axes=(0,)),
    "remat2": lambda x: jax.checkpoint(lambda x: x[::-1])(x),
    "reshape": lambda x: x.reshape(4, -1).T,
    "rev": lambda x: lax.rev(x, (0,)),
    "scan": lambda x: lax.scan(lambda c, row: (c + row, c), jnp.zeros(4), x)[1],
    "scatter": lambda x: x.at[2].set(0.0),
    "scatter-add": lambda x: x.at[2].add(1.0),
    "scatter-max": lambda x: x.at[0].max(9.0),
    "scatter-min": lambda x: x.at[2].min(-9.0),
    "scatter-mul": lambda x: x.at[1:3].multiply(0.5),
    "scatter-sub": lambda x: x.at[2].subtract(1.0),
    "slice": lambda x: x - lax.slice(x, (0, 0), (1, 4)),
    "sort": lambda x: lax.sort(x, dimension=0),
    "tile": lambda x: jnp.tile(x, (2, 1)).reshape(len(x), 2, 4)[:, 0],
    "top_k": lambda x: x * lax.top_k(x.T, 2)[0].sum(),
    "while": lambda x: lax.while_loop(lambda c: c[0] < 1, lambda c: (c[0] + 1, c[1][::-1]), (0, x))[
        1
    ],
}
# A primitive that versions of jax call otherwise.
ALSO_CALLED = {"remat2": "checkpoint"}
# What these could mix is not to be had: where an axis or a parameter moves with the batch, the two
# traces differ in it, and that is seen before the rule is asked, or by the rule for what is next.
SEEN_OTHERWISE = {"broadcast_in_dim", "fft", "split", "squeeze", "stack", "transpose", "unstack"}
OFTEN = {"gather", "reduce_window", "reshape", "scan", "dot_general"}


def hoisted_with(mix: Callable[[Any], Any]) -> Any:
    def loss(params: Any, x: Any) -> Any:
        return jnp.mean(mix(jnp.tanh(x @ params["encoder"])) @ params["head"])

    return fo.hoist(loss, "encoder")


def keeps_apart(mix: Callable[[Any], Any]) -> bool:
    """Whether rows are of their own examples alone, wherever these stand."""
    prepare = hoisted_with(mix).prepare
    rows = prepare(PARAMS, X)
    others = [(prepare(PARAMS, X[ORDER]), ORDER, slice(None))]
    for changed in (0, SIZE - 1):
        rest = np.delete(np.arange(SIZE), changed)
        others.append((prepare(PARAMS, X.at[changed].add(1.7)), rest, rest))
    return all(
        np.array_equal(one[here], other[there])
        for found, here, there in others
        for one, other in zip(rows.each, found.each, strict=True)
    ) and all(
        np.array_equal(one, other)
        for found, *_ in others
        for one, other in zip(rows.shared, found.shared, strict=True)
    )


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in OFTEN else [pytest.mark.exhaustive]) for n in MIXES]
)
def test_a_rule_that_let_its_primitive_mix_would_be_seen(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mix = MIXES[name]
    assert keeps_apart(mix)
    names = [name, *ALSO_CALLED.get(name, "").split()]
    switched_off = {**_rowwise.RULES, **dict.fromkeys(names, lambda step: True)}
    monkeypatch.setattr(_rowwise, "RULES", switched_off)
    program = str(jax.make_jaxpr(mix)(X))
    is_there = any(re.search(rf"\b{each}\b", program) for each in names)
    assert is_there or name == "tile"  # which older versions of jax have not
    assert keeps_apart(mix) is not is_there


def test_each_rule_has_its_program() -> None:
    alike = _rowwise.ELEMENTWISE | _rowwise._HANDED_ON
    tried = {*MIXES, *ALSO_CALLED.values(), *SEEN_OTHERWISE}
    assert set(_rowwise.RULES) - alike == tried


def test_a_function_of_the_users_along_another_axis_is_hoisted() -> None:
    product = lambda x: x * lax.reduce(x, np.float32(1), lambda a, b: a * b * 1.0, (1,))[:, None]
    report = hoisted_with(product).report(PARAMS, X)
    assert report.stops == ("dot_general [6]: head",)
    assert keeps_apart(product)
