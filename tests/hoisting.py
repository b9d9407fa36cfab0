"""What it means that a hoisted function is exact, and that rows are rows."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from helpers import host_bits
from jax.extend.core import jaxpr_as_fun

import frozen_optax as fo

SIZE = 6


def same_bits(one: Any, other: Any) -> bool:
    one, other = jax.tree.leaves(one), jax.tree.leaves(other)
    pairs = zip(one, other, strict=True)
    return all(
        jnp.asarray(x).dtype == jnp.asarray(y).dtype
        and np.array_equal(host_bits(jnp.asarray(x)), host_bits(jnp.asarray(y)))
        for x, y in pairs
    )


def by_equation(fun: Any) -> Any:
    """A function of arrays that is evaluated as its program stands, loops as a whole."""

    def evaluated(*args: Any) -> Any:
        leaves, treedef = jax.tree.flatten(args)
        places = [i for i, leaf in enumerate(leaves) if is_array(leaf)]

        def flat(*arrays: Any) -> Any:
            filled = list(leaves)
            for place, array in zip(places, arrays, strict=True):
                filled[place] = array
            return fun(*jax.tree.unflatten(treedef, filled))

        arrays = [leaves[place] for place in places]
        with jax.disable_jit(False):
            program = jax.make_jaxpr(flat)(*arrays)
        (value,) = jaxpr_as_fun(program)(*arrays)
        return value

    return evaluated


def is_array(leaf: Any) -> bool:
    return hasattr(leaf, "dtype")


def changed(data: Any, example: int) -> Any:
    """The same data, but for one example, which gets another one's."""

    def change(leaf: Any) -> Any:
        if not np.ndim(leaf) or isinstance(leaf, (str, bool, int)):
            return leaf
        host = np.array(leaf)
        host[example] = host[(example + 1) % len(host)]
        return jnp.asarray(host)

    return jax.tree.map(change, data)


def assert_exact(
    fun: Any,
    frozen: Any,
    params: Any,
    data: Any,
    live: Any = (),
    live_argnums: Any = (),
    tolerance: float = 2e-5,
    with_gradient: bool = False,
) -> Any:
    """The hoisted function is the function: op by op bit for bit, compiled to rounding.

    For a whole batch and for rows picked from it, of which the gradient is compared, too, and op by
    op `with_gradient`; a row depends on its own example. Returns the report.
    """
    hoisted = fo.hoist(fun, frozen, live_argnums=live_argnums)
    places = [live_argnums] if isinstance(live_argnums, int) else list(live_argnums)

    def arguments(data: Any) -> list[Any]:
        args = list(data)
        for place, each in zip(places, live, strict=True):
            args.insert(place - 1, each)
        return args

    report = hoisted.report(params, *arguments(data))
    like = live or None
    with jax.disable_jit():
        rows = hoisted.prepare(params, *data, live=like)
        if with_gradient:
            before = fo.value_and_grad(by_equation(fun), frozen)(params, *arguments(data))
            after = fo.value_and_grad(hoisted, frozen)(params, rows, *live)
        else:
            before = by_equation(fun)(params, *arguments(data))
            after = hoisted(params, rows, *live)
        assert same_bits(before, after)
    assert rows.bytes_per_example == report.bytes_per_example
    prepare = jax.jit(lambda *data: hoisted.prepare(params, *data, live=like))
    compiled = prepare(*data)
    for example in (0, SIZE - 1):
        others = prepare(*changed(data, example))
        kept = np.delete(np.arange(SIZE), example)
        assert same_bits(compiled[kept].each, others[kept].each), "a row depends on another"
        assert same_bits(compiled.shared, others.shared)
    picked = np.array([4, 1, 2])
    some = jax.tree.map(lambda leaf: leaf[picked] if np.ndim(leaf) else leaf, data)
    value_and_grad = lambda fun: fo.value_and_grad(lambda part: fun(fo.combine(part, rest)), False)
    part, rest = fo.partition(params, frozen)
    live_step = jax.jit(value_and_grad(lambda params: fun(params, *arguments(some))))
    hoisted_step = jax.jit(value_and_grad(lambda params: hoisted(params, compiled[picked], *live)))
    with jax.default_matmul_precision("float32"):  # a GPU multiplies fewer bits by default
        compiled = prepare(*data)
        before, after = live_step(part), hoisted_step(part)
    for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)
    return report
