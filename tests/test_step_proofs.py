"""`assert_step_freezes`: what moves a leaf, what does not and how exactly, what cannot be told."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import host_devices
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from proving import HEAD, ITSELF, ODD, PAGE, SIGN, arguments, kernel_to, steering, verdict

import frozen_optax as fo


def state_of(params):
    return {"params": params, "ema": jax.tree.map(lambda p: p * 0.5, params), "x": jnp.ones(())}


def rewritten(kernel: Any, x: Any) -> Any:
    scale = jax.jit(lambda k, x: k * x, donate_argnums=0)
    return scale(kernel, x + 1)


def swapped(params, x):
    return {
        "encoder": {"kernel": params["head"]["twin"], "table": params["encoder"]["table"]},
        "head": params["head"],
    }


@jax.custom_vjp
def through_vjp(kernel):
    return kernel


through_vjp.defvjp(lambda kernel: (kernel, None), lambda _, t: (t,))


@jax.custom_jvp
def through_jvp(kernel):
    return kernel * 1.5


through_jvp.defjvps(lambda t, ans, kernel: t)


def merged(kernel: Any, x: Any) -> Any:
    return kernel + (jnp.full((3, 1), 0.1) * x) @ jnp.full((1, 4), 0.1)


as_bits, as_rows = jax.lax.bitcast_convert_type, jax.lax.reshape


def same(kernel: Any) -> Any:
    return kernel


def reordered_twice(kernel: Any, x: Any) -> Any:
    turned = as_rows(kernel, (4, 3), dimensions=(1, 0))
    return as_rows(turned, (3, 4), dimensions=(1, 0))


def rows_shifted(kernel: Any, x: Any) -> Any:
    return jax.lax.scan(lambda carry, row: (row, carry), kernel[0] * 0, kernel)[1]


def chosen_for_sure(kernel: Any, x: Any) -> Any:
    return jax.lax.cond(jnp.array(True), lambda: kernel, lambda: -kernel)


def where_x_is_a_number(kernel: Any, x: Any) -> Any:
    return jnp.where(x * x >= 0, kernel, jnp.where(x != x, kernel, -kernel))


def scan_keeping(kernel: Any, x: Any) -> Any:
    return jax.lax.scan(lambda carry, _: ((carry[0], carry[1] * 2), None), (kernel, x), None, 3)


def scan_over(row: Any) -> Any:
    return jax.lax.scan(lambda carry, element: (carry, element), 0.0, row)[1]


def while_keeping(kernel: Any, x: Any) -> Any:
    goes_on = lambda carry: carry[1] < 3
    count_on = lambda carry: (carry[0], carry[1] + 1)
    return jax.lax.while_loop(goes_on, count_on, (kernel, x))


MOVES_THE_KERNEL = {
    "weight decay": lambda k, x: k - 0.01 * k,
    "moving average": lambda k, x: 0.9 * k + 0.1 * x,
    "noise": lambda k, x: k + 1e-3 * jax.random.normal(jax.random.key(0), k.shape),
    "noise from a key": lambda k, x: k + jax.random.normal(jax.random.key(x.astype(int)), k.shape),
    "cast to bfloat16 and back": lambda k, x: k.astype(jnp.bfloat16).astype(k.dtype),
    "cast to float16, added to, and back": lambda k, x: (k.astype(jnp.float16) + 0).astype(k.dtype),
    "cast to an integer and back": lambda k, x: k.astype(int).astype(k.dtype),
    "roll by one": lambda k, x: jnp.roll(k, 1),
    "reversed": lambda k, x: k[::-1],
    "transposed by a reshape": lambda k, x: k.T.reshape(k.shape),
    "sorted": lambda k, x: jnp.sort(k),
    "clipped": lambda k, x: jnp.clip(k, -0.1, 0.1),
    "projected on the unit ball": lambda k, x: k / jnp.maximum(1.0, jnp.linalg.norm(k)),
    "standardized": lambda k, x: (k - k.mean()) / k.std(),
    "where on a traced condition": lambda k, x: jnp.where(x > 1, k, 0.5 * k),
    "where on a traced mask": lambda k, x: jnp.where(k > x, k, 0.0),
    "cond": lambda k, x: jax.lax.cond(x > 0, lambda k: k + 1, lambda k: k, k),
    "switch": lambda k, x: jax.lax.switch(x.astype(int) + 5, [same, same, lambda k: -k], k),
    "a scan that adds": lambda k, x: jax.lax.scan(lambda c, _: (c + x, None), k, None, 3)[0],
    "a scan over rows that shifts them": rows_shifted,
    "a while loop": lambda k, x: jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: c + 1, k),
    "a fori loop": lambda k, x: jax.lax.fori_loop(0, 2, lambda i, c: c * 0.5, k),
    "a donated and rewritten buffer": rewritten,
    "a merge of adapters": merged,
    "quantized and back": lambda k, x: jnp.round(k * 16) / 16,
    "one element set": lambda k, x: k.at[0, 0].set(x),
    "one row set where it is": lambda k, x: jax.lax.dynamic_update_slice(k, k[:1] * x, (0, 0)),
    "nothing but zeros": lambda k, x: jnp.zeros_like(k),
    "a constant": lambda k, x: np.ones(k.shape, k.dtype),
    "times zero of infinity": lambda k, x: k + 0.0 * (x / 0.0),
    "a gradient": lambda k, x: k - 0.1 * jax.grad(lambda k: jnp.sum(jnp.sin(k) * x))(k),
    "a custom derivative": lambda k, x: through_jvp(k),
    "a rematerialized function": lambda k, x: jax.checkpoint(jnp.sin)(k),
    "a compiled function": lambda k, x: jax.jit(lambda k: k + x)(k),
    "a host callback": lambda k, x: jax.pure_callback(lambda k: np.asarray(k) * 2, k, k),
    "batch statistics": lambda k, x: 0.99 * k + 0.01 * jnp.mean(x),
    "a changed bit": lambda k, x: as_bits(as_bits(k, jnp.uint32) ^ 1, k.dtype),
    "one of two rows exchanged": lambda k, x: jnp.concatenate([k[1:2], k[:1], k[2:]]),
    "integers that overflow": lambda k, x: k + (jnp.int8(127) + x.astype(jnp.int8) + jnp.int8(1)),
}
MOVES = {name: kernel_to(change) for name, change in MOVES_THE_KERNEL.items()}
MOVES["another leaf of its shape"] = swapped

STAYS_BY_WORDS = {
    ITSELF: {
        "left alone": lambda k, x: k,
        "`apply_updates` of zeros": lambda k, x: fo.apply_updates(k, jnp.zeros_like(k)),
        "transposed twice": lambda k, x: k.T.T,
        "reshaped and back": lambda k, x: k.ravel().reshape(k.shape),
        "reshaped in another order, twice": reordered_twice,
        "reversed twice": lambda k, x: k[::-1, ::-1][::-1, ::-1],
        "roll by zero": lambda k, x: jnp.roll(k, 0),
        "roll there and back": lambda k, x: jnp.roll(jnp.roll(k, 2, 1), -2, 1),
        "split and joined": lambda k, x: jnp.concatenate([k[:1], k[1:]]),
        "stacked and unstacked": lambda k, x: jnp.stack(list(k)),
        "where with itself": lambda k, x: jnp.where(x > 0, k, k),
        "where on a known condition": lambda k, x: jnp.where(jnp.ones_like(k) > 0, k, x),
        "cond with itself": lambda k, x: jax.lax.cond(x > 0, same, same, k),
        "cond on a known condition": chosen_for_sure,
        "switch": lambda k, x: jax.lax.switch(x.astype(int), [same, lambda k: k.T.T], k),
        "a scan that carries it": lambda k, x: scan_keeping(k, x)[0][0],
        "a scan over its rows": lambda k, x: jax.lax.scan(lambda c, r: (c + r.sum(), r), x, k)[1],
        "a scan in a scan": lambda k, x: jax.lax.scan(lambda c, r: (c, scan_over(r)), x, k)[1],
        "a while loop that carries it": lambda k, x: while_keeping(k, x)[0],
        "a fori loop that carries it": lambda k, x: jax.lax.fori_loop(0, 3, lambda i, c: c, k),
        "a compiled function": lambda k, x: jax.jit(lambda k, x: (x, k))(k, x)[1],
        "a custom derivative": lambda k, x: through_vjp(k),
        "a rematerialized function": lambda k, x: jax.checkpoint(same)(k),
        "an optimization barrier": lambda k, x: jax.lax.optimization_barrier((x, k))[1],
        "a copy": lambda k, x: jnp.copy(k),
        "its bits and back": lambda k, x: as_bits(as_bits(k, jnp.uint32) | 0, k.dtype),
        "a printed value": lambda k, x: (jax.debug.callback(lambda k: None, k), k)[1],
    },
    ODD: {
        "minus zero added": lambda k, x: k + (-0.0),
        "zero subtracted": lambda k, x: k - 0.0,
        "zeros scaled and added": lambda k, x: k + jnp.zeros_like(k) * -0.1,
        "times one": lambda k, x: k * 1.0,
        "over one": lambda k, x: k / jnp.ones_like(k),
    },
    SIGN: {
        "zero added": lambda k, x: k + 0.0,
        "minus zero subtracted": lambda k, x: k - jnp.full_like(k, -0.0),
        "`optax.apply_updates` of zeros": lambda k, x: optax.apply_updates(k, jnp.zeros_like(k)),
    },
}
STAYS = {
    name: (words, kernel_to(change))
    for words, changes in STAYS_BY_WORDS.items()
    for name, change in changes.items()
}

# What cannot move and is not proved, with the reason: as docs/proofs.md lists them.
UNKNOWN_OF_THE_KERNEL = {
    "a product with zero of what may be infinite": lambda k, x: k + 0.0 * jnp.tanh(x),
    "a clip to bounds that nothing reaches": lambda k, x: jnp.clip(k, -jnp.inf, jnp.inf),
    "a condition that needs arithmetic": where_x_is_a_number,
    "what adds and takes away the same": lambda k, x: (k * 2) / 2,
    "a position that is computed": lambda k, x: jnp.roll(k, 0 * x.astype(int)),
    "an element written over itself": lambda k, x: k.at[0].set(k[0]),
    "one array made of several leaves": lambda k, x: jnp.append(k, x)[:-1].reshape(k.shape),
    "a callback to the host": lambda k, x: jax.pure_callback(np.asarray, k, k),
}
UNKNOWN = {name: kernel_to(change) for name, change in UNKNOWN_OF_THE_KERNEL.items()}


@pytest.mark.parametrize("name", MOVES)
def test_no_step_that_moves_a_leaf_is_called_proved(name):
    after = MOVES[name](*arguments())
    params, x = arguments()
    assert np.any(np.asarray(after["encoder"]["kernel"]) != np.asarray(params["encoder"]["kernel"]))
    message = verdict(fo.assert_step_freezes, MOVES[name], params, x, frozen="encoder")
    # Runs that refute are compiled, and a GPU's compiler leaves out a cast there and back.
    compiled = jax.jit(MOVES[name])(params, x)["encoder"]["kernel"]
    is_moved = np.any(np.asarray(compiled) != np.asarray(params["encoder"]["kernel"]))
    assert is_moved or jax.default_backend() != "cpu"
    found = "refuted: " if is_moved else "unknown"
    assert message.startswith(
        f"1 of 2 frozen leaves are not proved to stay as they are:\n  encoder/kernel: {found}"
    )


@pytest.mark.parametrize("name", STAYS)
def test_steps_that_move_nothing_are_proved_and_how_exactly(name):
    words, step = STAYS[name]
    params, x = arguments()
    found = fo.assert_step_freezes(step, params, x, frozen="encoder")
    assert found["encoder/kernel"].split(":")[0] == words
    assert found["encoder/table"] == "itself"
    assert list(found) == ["encoder/kernel", "encoder/table"]
    assert fo.assert_step_freezes(jax.jit(step), params, x, frozen="encoder") == found
    message = verdict(fo.assert_step_freezes, step, params, x, frozen="encoder", exact=True)
    assert bool(message) == (words != ITSELF)
    assert f"encoder/kernel: proved, but not exactly: it is {words}" in message or not message
    after = step(params, x)["encoder"]["kernel"]
    np.testing.assert_array_equal(after, params["encoder"]["kernel"])


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_cannot_be_told_is_unknown_and_stands_on_the_page(name):
    params, x = arguments()
    np.testing.assert_array_equal(
        UNKNOWN[name](params, x)["encoder"]["kernel"], params["encoder"]["kernel"]
    )
    message = verdict(fo.assert_step_freezes, UNKNOWN[name], params, x, frozen="encoder")
    assert message.startswith(
        "1 of 2 frozen leaves are not proved to stay as they are:\n  encoder/kernel: unknown"
    )
    assert name in PAGE


def test_a_run_that_fails_does_not_hide_what_was_found():
    def fails(kernel):
        raise RuntimeError("no such thing")

    params, x = arguments()
    message = verdict(
        fo.assert_step_freezes,
        kernel_to(
            lambda k, x: k + jax.pure_callback(fails, jax.ShapeDtypeStruct(k.shape, k.dtype), x)
        ),
        params,
        x,
        frozen="encoder",
    )
    assert "encoder/kernel: unknown (a run on numbers failed:" in message
    assert "depends on encoder/kernel through add" in message
    tx = steering(lambda h, b: jax.pure_callback(fails, jax.ShapeDtypeStruct(h.shape, h.dtype), b))
    message = verdict(fo.assert_update_freezes, tx, {"base": jnp.ones(3), "head": HEAD}, "base")
    assert "head: unknown (a run on numbers failed:" in message


def test_leaves_that_share_a_path_are_each_proved():
    params = {"a": {"b": jnp.ones(2)}, "a/b": jnp.ones(2), "head": jnp.ones(2)}
    step = lambda p: {"a": p["a"], "a/b": p["a/b"] + 0.0, "head": p["head"] * 2}
    assert fo.assert_step_freezes(step, params, frozen="a/b")["a/b"].startswith(f"itself, {SIGN}")
    moved = lambda p: {"a": p["a"], "a/b": p["a/b"] * 2, "head": p["head"] * 2}
    assert "1 of 2 frozen leaves" in verdict(fo.assert_step_freezes, moved, params, frozen="a/b")


def test_a_part_that_comes_out_elsewhere_is_another_array():
    mesh = Mesh(np.array(host_devices(4)).reshape(2, 2), ("x", "y"))
    of = lambda out: jax.shard_map(
        lambda p: p, mesh=mesh, in_specs=P(("x", "y")), out_specs=out, check_vma=False
    )
    step = lambda out: lambda params: params | {"base": of(out)(params["base"])}
    params = {"base": jnp.arange(4.0), "head": HEAD}
    assert fo.assert_step_freezes(step(P(("x", "y"))), params, frozen="base") == {"base": "itself"}
    assert "base: refuted" in verdict(
        fo.assert_step_freezes, step(P(("y", "x"))), params, frozen="base"
    )


@pytest.mark.parametrize(
    ("leaf", "words"),
    [
        (jnp.ones(2, jnp.bfloat16), ODD),
        (jnp.ones(2, jnp.float8_e4m3fn), ODD),
        (jnp.ones(2, jnp.complex64), ITSELF),
        (jnp.arange(3), ITSELF),
        (jnp.arange(3, dtype=jnp.int4), ITSELF),
        (jnp.array([True, False]), ITSELF),
        (jax.random.key(0), ITSELF),
        (jnp.zeros((0, 3)), "no elements"),
        (0.5, ITSELF),
        (3, ITSELF),
    ],
    ids=lambda value: (
        f"{type(value).__name__}-{getattr(value, 'dtype', '')}"
        if not isinstance(value, str)
        else ""
    ),
)
def test_leaves_of_any_kind(leaf, words):
    params = {"base": leaf, "scale": jnp.ones(2)}
    tx = fo.with_frozen(optax.adamw(0.1), "base")
    found = fo.assert_step_freezes(
        lambda p: p | {"scale": p["scale"] * 2}, params, frozen="base", exact=True
    )
    assert found == {"base": "no elements" if words == "no elements" else "itself"}
    if words == ODD:  # in mixed precision: to a wider dtype, and back

        def wide(p):
            sum_ = p["base"].astype(jnp.float32) + jnp.float32(-0.0)
            return p | {"base": sum_.astype(p["base"].dtype)}

        assert fo.assert_step_freezes(wide, params, frozen="base")["base"].startswith(ODD)
        narrow = lambda p: p | {"base": p["base"].astype(jnp.float8_e5m2).astype(p["base"].dtype)}
        assert "not proved" in verdict(fo.assert_step_freezes, narrow, params, frozen="base")
    array = params | {"base": jnp.asarray(leaf) if isinstance(leaf, (int, float)) else leaf}
    assert list(fo.assert_update_freezes(tx, array, "base")) == ["base"]


def test_leaves_elsewhere_or_of_another_kind_are_named():
    params = {
        "encoder": {"a": jnp.ones(2), "b": jnp.ones(2), "c": jnp.ones(2)},
        "head": jnp.ones(2),
    }

    def step(p):
        b = p["encoder"]["b"]
        encoder = {"a": b, "b": b.astype(jnp.bfloat16), "c": np.ones(2, np.float32)}
        return {"encoder": encoder, "head": p["head"]}

    assert verdict(fo.assert_step_freezes, step, params, frozen="encoder").splitlines() == [
        "3 of 3 frozen leaves are not proved to stay as they are:",
        "  encoder/a: refuted: 2 of 2 elements differ, the first at [0]: "
        + re.search(
            r"encoder/a: refuted: .*\]: (.*)",
            verdict(fo.assert_step_freezes, step, params, frozen="encoder"),
        )[1],
        "    is encoder/b",
        "  encoder/b: refuted: a leaf float32[2] became a leaf bfloat16[2]",
        "    depends on encoder/b through a cast to bfloat16",
        "  encoder/c: refuted: whatever it was, it becomes a leaf float32[2] "
        "that does not depend on the arguments",
    ]


def test_errors_say_what_to_do():
    params, x = arguments()
    with pytest.raises(TypeError, match="takes a step and its arguments"):
        fo.assert_step_freezes(lambda p: p, frozen="encoder")
    with pytest.raises(ValueError, match=r"by_path\('encodr'\) selects nothing"):
        fo.assert_step_freezes(kernel_to(lambda k, x: k), params, x, frozen="encodr")
    with pytest.raises(ValueError, match="returns the successor of its first argument"):
        fo.assert_step_freezes(lambda p, x: x, params, x, frozen="encoder")
    with pytest.raises(TypeError, match="takes an optimizer"):
        fo.assert_update_freezes(optax.adam, params, "encoder")
    with pytest.raises(TypeError, match="exactly one of"):
        fo.assert_update_freezes(optax.adam(0.1), params)


def test_integers_bools_and_functions_are_part_of_the_program():
    params, _ = arguments()

    def step(params, count, train, scale, fun):
        assert (count, train) == (2, True)
        assert isinstance(scale, jax.core.Tracer)
        new = jax.tree.map(lambda p: fun(p) * scale, params["head"])
        return params | {"head": new}

    assert set(
        fo.assert_step_freezes(step, params, 2, True, 0.1, jnp.sin, frozen="encoder").values()
    ) == {"itself"}


def test_a_loop_that_might_not_end_runs_on_given_arguments():
    step = kernel_to(
        lambda k, x: jax.lax.while_loop(lambda c: jnp.all(c < 2), lambda c: c * 2, k + 1.5)
    )
    params, x = arguments()
    params["encoder"]["kernel"] = jnp.ones((3, 4))
    message = verdict(fo.assert_step_freezes, step, params, x, frozen="encoder")
    assert "run on the arguments as given" in message
    shapes = jax.eval_shape(lambda: (params, x))
    assert "encoder/kernel: unknown\n" in verdict(
        fo.assert_step_freezes, step, *shapes, frozen="encoder"
    )
