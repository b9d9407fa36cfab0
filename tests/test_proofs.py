"""Proofs: what is called proved cannot happen, what a run shows is never called proved, and the rest is listed."""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.training.train_state import TrainState
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import frozen_optax as fo
from benchmarks.catalogue import NAMES, extra_args, make
from frozen_optax import _numbers, _witnesses

README = (Path(__file__).parent.parent / "README.md").read_text()
MASK = {"encoder": True, "head": False}


def make_params():
    kernel, head = jax.random.split(jax.random.key(0))
    return {
        "encoder": {"kernel": jax.random.normal(kernel, (3, 4)), "table": jnp.full((4,), 2.0)},
        "head": {"bias": jnp.full((3,), 0.1), "kernel": jax.random.normal(head, (4, 3))},
    }


def loss(params):
    hidden = jnp.tanh(params["encoder"]["kernel"] + params["encoder"]["table"])
    return jnp.mean((hidden @ params["head"]["kernel"] + params["head"]["bias"] - 0.5) ** 2)


def verdict(check: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """The message of the error, or nothing where it is proved."""
    try:
        check(*args, **kwargs)
    except AssertionError as error:
        return str(error)
    return ""


# --- transformations: proof and run

WAYS = {
    "with_frozen": lambda tx: fo.with_frozen(tx, "encoder"),
    "optax.freeze before": lambda tx: optax.chain(optax.freeze(MASK), tx),
    "fo.freeze after": lambda tx: optax.chain(tx, fo.freeze("encoder")),
    "fo.freeze between": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), fo.freeze("encoder"), tx),
    "optax.freeze and a scale after": lambda tx: optax.chain(tx, optax.freeze(MASK), optax.scale(-1.0)),
}
STEERED, MOVED = "trained leaves have an update that", "frozen leaves have an update that"


def runner(name, tx, params):
    """A function that takes three steps and returns their updates; `change` is what becomes of frozen gradients."""
    one = params.fast if name == "lookahead" else params

    @jax.jit
    def step(gradient, state):
        return tx.update(gradient, state, params, **extra_args(name, loss, one, gradient))

    def run(change=lambda gradient: gradient):
        state, found, gradient = tx.init(params), [], jax.grad(loss)(one)
        gradient = gradient | {"encoder": jax.tree.map(change, gradient["encoder"])}
        for _ in range(3):
            updates, state = step(gradient, state)
            found.append(updates.fast if name == "lookahead" else updates)
        return found

    return run


@pytest.mark.parametrize("name", NAMES)
def test_no_optimizer_that_moves_a_leaf_or_is_steered_in_a_run_is_proved(name, monkeypatch):
    params = make_params()
    gradient = jax.grad(loss)(params)
    for way, wrap in WAYS.items():
        if way == "fo.freeze between":  # from here on without runs that show what is not proved: they take long
            monkeypatch.setattr(_witnesses, "_MAX_NUMBERS", 0)
        if name == "lookahead" and way != "with_frozen":  # it takes a pair of trees, on which no freeze in a chain fits
            continue
        tx = optax.with_extra_args_support(wrap(make(name)))
        given = optax.LookaheadParams.init_synced(params) if name == "lookahead" else params
        args = extra_args(name, loss, params, gradient)
        message = verdict(fo.assert_update_freezes, tx, given, "encoder", **args)
        if way == "with_frozen":  # whose runs are in test_optimizers.py
            assert message == ""
            continue
        if "after" in way:
            assert MOVED not in message
        if MOVED in message:
            continue
        run = runner(name, tx, given)
        updates = run()
        assert not any(np.any(np.asarray(leaf)) for each in updates for leaf in jax.tree.leaves(each["encoder"])), way
        if STEERED not in message:
            others = run(lambda gradient: 3 * gradient)
            fo.assert_trees_bit_identical(*([each["head"] for each in two] for two in (updates, others)))


@pytest.mark.parametrize(
    ("after", "reason"),
    [
        (lambda: optax.adamw(0.1, weight_decay=0.1), "parameters (encoder/kernel) through mul, add, mul: weight decay"),
        (lambda: optax.add_decayed_weights(0.1), "parameters (encoder/kernel) through mul, add: weight decay"),
        (lambda: optax.adam(0.1), "the state (1/0/mu/encoder/kernel) through"),
        (lambda: optax.sgd(0.1, momentum=0.9), "the state (1/0/trace/encoder/kernel) through mul, add, mul: moments"),
        (lambda: optax.noisy_sgd(0.1, key=jax.random.key(0)), "a random key in the state (1/0/rng_key) through"),
        (lambda: optax.add_noise(0.1, 0.5, key=0), "a random key in the state (1/rng_key) through"),
        (lambda: optax.clip_by_global_norm(1.0), "the gradients of trained leaves (head/"),
        (lambda: optax.polyak_sgd(), "the extra arguments (value) through"),
        (lambda: optax.scale_by_trust_ratio(min_norm=1.0), "the parameters (encoder/kernel) through"),
    ],
)  # fmt: skip
def test_the_reason_names_what_reaches_the_update_and_by_which_way(after, reason):
    tx = optax.chain(fo.freeze("encoder"), after())
    with pytest.raises(AssertionError) as error:
        fo.assert_update_freezes(tx, make_params(), "encoder", **({"value": 1.0} if "value" in reason else {}))
    message = str(error.value)
    assert message.startswith("2 of 2 frozen leaves have an update that is not proved to be zero:\n  encoder/kernel: ")
    assert reason in message


def test_a_steering_that_comes_a_step_late_is_seen():
    """The norm of all gradients is stored, and scales the updates of the next step."""

    def update(updates, state, params=None):
        del params
        return jax.tree.map(lambda u: u * state["norm"], updates), {"norm": norm(updates)}

    norm = lambda tree: sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree))
    late = optax.GradientTransformation(lambda params: {"norm": jnp.ones(())}, update)
    tx = optax.chain(late, fo.freeze("encoder"))
    fo.assert_update_freezes(tx, make_params(), "encoder", non_interference=False)
    message = verdict(fo.assert_update_freezes, tx, make_params(), "encoder")
    assert message.startswith(f"2 of 2 {STEERED} is not proved to be independent of frozen gradients:\n  head/bias: ")
    assert "refuted: at step 2, where frozen gradients are another" in message
    assert "depends on what earlier steps may have left in the state (0/norm) through mul" in message
    assert not verdict(fo.assert_update_freezes, fo.with_frozen(late, "encoder"), make_params(), "encoder")


def test_a_movement_that_comes_steps_late_is_seen():
    def update(updates, state, params=None):
        late = jax.tree.map(lambda u, p: jnp.where(state["count"] >= 2, p, u * 0), updates, params)
        return late, {"count": state["count"] + 1}

    tx = optax.GradientTransformation(lambda params: {"count": jnp.zeros((), int)}, update)
    message = verdict(fo.assert_update_freezes, tx, make_params(), "encoder")
    assert "refuted: it is" in message
    assert "at step 3 of a run on random numbers from a fresh state" in message


def test_the_update_is_looked_at_in_each_form_that_the_state_takes():
    def update(updates, state, params=None):
        form = len(state)
        moved = jax.tree.map(lambda u, p: p if form == 2 else jnp.zeros_like(u), updates, params)
        return moved, (*state, jnp.zeros(())) if form < 2 else state

    tx = optax.GradientTransformation(lambda params: (), update)
    assert "depends on the parameters (encoder/kernel)" in verdict(fo.assert_update_freezes, tx, make_params(), "**")
    grows = optax.GradientTransformation(lambda params: (), lambda u, s, p=None: (u, (*s, jnp.zeros(()))))
    with pytest.raises(ValueError, match="change at each of 4 updates"):
        fo.assert_update_freezes(grows, make_params(), "encoder")


def test_what_an_update_is_made_of_is_told_exactly():
    params = {
        "float": jnp.ones(2),
        "int": jnp.arange(3),
        "key": jax.random.key(0),
        "complex": jnp.ones(1, jnp.complex64),
        "fnuz": jnp.ones(1, jnp.float8_e4m3fnuz),
        "empty": jnp.zeros((0, 2)),
        "head": jnp.ones(2),
    }
    frozen = [name for name in params if name != "head"]
    found = fo.assert_update_freezes(fo.with_frozen(optax.adamw(0.1), trainable="head"), params, trainable="head")
    assert found == {
        "float": "a constant -0.0",
        "int": "a constant 0",
        "key": "absent",
        "complex": "a constant -0.0",
        "fnuz": "a constant 0.0",
        "empty": "no elements",
    }
    some = {name: params[name] for name in ("float", "complex", "head")}
    of = lambda *more: fo.assert_update_freezes(optax.chain(*more), some, ["float", "complex"])
    freeze = fo.freeze(["float", "complex"])
    assert of(optax.sgd(0.1), freeze) == {"float": "a constant -0.0", "complex": "a constant -0.0"}
    assert of(freeze, optax.scale(-1.0))["float"] == "a constant 0.0"
    assert of(optax.freeze({"float": True, "complex": True, "head": False}))["float"] == "a constant 0.0"
    assert set(frozen) == set(found)


def test_extra_arguments_are_abstract_where_they_are_arrays_or_floats():
    def update(updates, state, params=None, *, value=0.0, steps=1, fun=None, training=True, **_):
        assert isinstance(steps, int)
        assert isinstance(training, bool)
        assert isinstance(value, jax.core.Tracer)
        zero = sum(jnp.zeros(()) for _ in range(steps)) if training else value
        return jax.tree.map(lambda u: jnp.zeros_like(u) + zero, updates), (state, fun(1.0))[0]

    tx = optax.GradientTransformationExtraArgs(lambda params: (), update)
    prove = functools.partial(fo.assert_update_freezes, tx, make_params(), "**", fun=lambda x: x)
    assert prove(value=0.0, steps=3)["encoder/kernel"] == "a constant 0.0"
    assert "the extra arguments (value) through" in verdict(prove, value=0.0, training=False)
    assert "it is" in verdict(prove, value=jax.ShapeDtypeStruct((), jnp.float32), training=False)


def test_nothing_is_computed_or_stored_for_large_parameters():
    large = jax.eval_shape(lambda: {"encoder": jnp.zeros((200_000, 200_000)), "head": jnp.zeros((4,))})
    assert fo.assert_update_freezes(fo.with_frozen(optax.adamw(0.1), "encoder"), large, "encoder")
    message = verdict(fo.assert_update_freezes, optax.adamw(0.1), large, "encoder")
    assert "encoder: unknown (too large to be run on random numbers)\n    depends on the gradients of frozen" in message


# --- steps: what moves and what does not


def state_of(params):
    return {"params": params, "ema": jax.tree.map(lambda p: p * 0.5, params), "x": jnp.ones(())}


def kernel_to(function: Callable[..., Any], *more: Any) -> Callable[..., Any]:
    """A step that does this to one frozen leaf, and trains the rest."""

    def step(params, x):
        new = jax.tree.map(lambda p: p - 0.1 * x, params["head"])
        kernel = params["encoder"]["kernel"]
        return {"encoder": params["encoder"] | {"kernel": function(kernel, x, *more)}, "head": new}

    return step


def rewritten(kernel: Any, x: Any) -> Any:
    scale = jax.jit(lambda k, x: k * x, donate_argnums=0)
    return scale(kernel, x + 1)


def swapped(params, x):
    return {"encoder": {"kernel": params["head"]["twin"], "table": params["encoder"]["table"]}, "head": params["head"]}


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


as_bits = jax.lax.bitcast_convert_type


def scan_keeping(kernel: Any, x: Any) -> Any:
    return jax.lax.scan(lambda carry, _: ((carry[0], carry[1] * 2), None), (kernel, x), None, 3)


def scan_over(row: Any) -> Any:
    return jax.lax.scan(lambda carry, element: (carry, element), 0.0, row)[1]


def while_keeping(kernel: Any, x: Any) -> Any:
    return jax.lax.while_loop(lambda carry: carry[1] < 3, lambda carry: (carry[0], carry[1] + 1), (kernel, x))


MOVES = {
    "weight decay": kernel_to(lambda k, x: k - 0.01 * k),
    "moving average": kernel_to(lambda k, x: 0.9 * k + 0.1 * x),
    "noise": kernel_to(lambda k, x: k + 1e-3 * jax.random.normal(jax.random.key(0), k.shape)),
    "noise from a key": kernel_to(lambda k, x: k + jax.random.normal(jax.random.key(x.astype(int)), k.shape)),
    "cast to bfloat16 and back": kernel_to(lambda k, x: k.astype(jnp.bfloat16).astype(k.dtype)),
    "cast to float16, added to, and back": kernel_to(lambda k, x: (k.astype(jnp.float16) + 0).astype(k.dtype)),
    "cast to an integer and back": kernel_to(lambda k, x: k.astype(int).astype(k.dtype)),
    "roll by one": kernel_to(lambda k, x: jnp.roll(k, 1)),
    "reversed": kernel_to(lambda k, x: k[::-1]),
    "transposed by a reshape": kernel_to(lambda k, x: k.T.reshape(k.shape)),
    "sorted": kernel_to(lambda k, x: jnp.sort(k)),
    "clipped": kernel_to(lambda k, x: jnp.clip(k, -0.1, 0.1)),
    "projected on the unit ball": kernel_to(lambda k, x: k / jnp.maximum(1.0, jnp.linalg.norm(k))),
    "standardized": kernel_to(lambda k, x: (k - k.mean()) / k.std()),
    "where on a traced condition": kernel_to(lambda k, x: jnp.where(x > 1, k, 0.5 * k)),
    "where on a traced mask": kernel_to(lambda k, x: jnp.where(k > x, k, 0.0)),
    "cond": kernel_to(lambda k, x: jax.lax.cond(x > 0, lambda k: k + 1, lambda k: k, k)),
    "switch": kernel_to(lambda k, x: jax.lax.switch(x.astype(int) + 5, [lambda k: k, lambda k: k, lambda k: -k], k)),
    "a scan that adds": kernel_to(lambda k, x: jax.lax.scan(lambda c, _: (c + x, None), k, None, 3)[0]),
    "a scan over rows that shifts them": kernel_to(lambda k, x: jax.lax.scan(lambda c, row: (row, c), k[0] * 0, k)[1]),
    "a while loop": kernel_to(lambda k, x: jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: c + 1, k)),
    "a fori loop": kernel_to(lambda k, x: jax.lax.fori_loop(0, 2, lambda i, c: c * 0.5, k)),
    "a donated and rewritten buffer": kernel_to(rewritten),
    "another leaf of its shape": swapped,
    "a merge of adapters": kernel_to(merged),
    "quantized and back": kernel_to(lambda k, x: jnp.round(k * 16) / 16),
    "one element set": kernel_to(lambda k, x: k.at[0, 0].set(x)),
    "one row set where it is": kernel_to(lambda k, x: jax.lax.dynamic_update_slice(k, k[:1] * x, (0, 0))),
    "nothing but zeros": kernel_to(lambda k, x: jnp.zeros_like(k)),
    "a constant": kernel_to(lambda k, x: np.ones(k.shape, k.dtype)),
    "times zero of infinity": kernel_to(lambda k, x: k + 0.0 * (x / 0.0)),
    "a gradient": kernel_to(lambda k, x: k - 0.1 * jax.grad(lambda k: jnp.sum(jnp.sin(k) * x))(k)),
    "a custom derivative": kernel_to(lambda k, x: through_jvp(k)),
    "a rematerialized function": kernel_to(lambda k, x: jax.checkpoint(jnp.sin)(k)),
    "a compiled function": kernel_to(lambda k, x: jax.jit(lambda k: k + x)(k)),
    "a host callback": kernel_to(lambda k, x: jax.pure_callback(lambda k: np.asarray(k) * 2, k, k)),
    "batch statistics": kernel_to(lambda k, x: 0.99 * k + 0.01 * jnp.mean(x)),
    "a changed bit": kernel_to(lambda k, x: as_bits(as_bits(k, jnp.uint32) ^ 1, k.dtype)),
    "one of two rows exchanged": kernel_to(lambda k, x: jnp.concatenate([k[1:2], k[:1], k[2:]])),
    "integers that overflow": kernel_to(lambda k, x: k + (jnp.int8(127) + x.astype(jnp.int8) + jnp.int8(1))),
}  # fmt: skip

ITSELF, ODD, SIGN = "itself", "itself but for odd bits", "itself up to the sign of zero"
STAYS = {
    "left alone": (ITSELF, kernel_to(lambda k, x: k)),
    "minus zero added": (ODD, kernel_to(lambda k, x: k + (-0.0))),
    "zero subtracted": (ODD, kernel_to(lambda k, x: k - 0.0)),
    "zero added": (SIGN, kernel_to(lambda k, x: k + 0.0)),
    "minus zero subtracted": (SIGN, kernel_to(lambda k, x: k - jnp.full_like(k, -0.0))),
    "zeros scaled and added": (ODD, kernel_to(lambda k, x: k + jnp.zeros_like(k) * -0.1)),
    "times one": (ODD, kernel_to(lambda k, x: k * 1.0)),
    "over one": (ODD, kernel_to(lambda k, x: k / jnp.ones_like(k))),
    "`optax.apply_updates` of zeros": (SIGN, kernel_to(lambda k, x: optax.apply_updates(k, jnp.zeros_like(k)))),
    "`apply_updates` of zeros": (ITSELF, kernel_to(lambda k, x: fo.apply_updates(k, jnp.zeros_like(k)))),
    "transposed twice": (ITSELF, kernel_to(lambda k, x: k.T.T)),
    "reshaped and back": (ITSELF, kernel_to(lambda k, x: k.ravel().reshape(k.shape))),
    "reversed twice": (ITSELF, kernel_to(lambda k, x: k[::-1, ::-1][::-1, ::-1])),
    "roll by zero": (ITSELF, kernel_to(lambda k, x: jnp.roll(k, 0))),
    "roll there and back": (ITSELF, kernel_to(lambda k, x: jnp.roll(jnp.roll(k, 2, 1), -2, 1))),
    "split and joined": (ITSELF, kernel_to(lambda k, x: jnp.concatenate([k[:1], k[1:]]))),
    "stacked and unstacked": (ITSELF, kernel_to(lambda k, x: jnp.stack(list(k)))),
    "where with itself": (ITSELF, kernel_to(lambda k, x: jnp.where(x > 0, k, k))),
    "where on a known condition": (ITSELF, kernel_to(lambda k, x: jnp.where(jnp.ones_like(k) > 0, k, x))),
    "cond with itself": (ITSELF, kernel_to(lambda k, x: jax.lax.cond(x > 0, lambda k: k, lambda k: k, k))),
    "cond on a known condition": (ITSELF, kernel_to(lambda k, x: jax.lax.cond(jnp.array(True), lambda: k, lambda: -k))),
    "switch": (ITSELF, kernel_to(lambda k, x: jax.lax.switch(x.astype(int), [lambda k: k, lambda k: k.T.T], k))),
    "a scan that carries it": (ITSELF, kernel_to(lambda k, x: scan_keeping(k, x)[0][0])),
    "a scan over its rows": (ITSELF, kernel_to(lambda k, x: jax.lax.scan(lambda c, r: (c + r.sum(), r), x, k)[1])),
    "a scan in a scan": (ITSELF, kernel_to(lambda k, x: jax.lax.scan(lambda c, r: (c, scan_over(r)), x, k)[1])),
    "a while loop that carries it": (ITSELF, kernel_to(lambda k, x: while_keeping(k, x)[0])),
    "a fori loop that carries it": (ITSELF, kernel_to(lambda k, x: jax.lax.fori_loop(0, 3, lambda i, c: c, k))),
    "a compiled function": (ITSELF, kernel_to(lambda k, x: jax.jit(lambda k, x: (x, k))(k, x)[1])),
    "a custom derivative": (ITSELF, kernel_to(lambda k, x: through_vjp(k))),
    "a rematerialized function": (ITSELF, kernel_to(lambda k, x: jax.checkpoint(lambda k: k)(k))),
    "an optimization barrier": (ITSELF, kernel_to(lambda k, x: jax.lax.optimization_barrier((x, k))[1])),
    "a copy": (ITSELF, kernel_to(lambda k, x: jnp.copy(k))),
    "its bits and back": (ITSELF, kernel_to(lambda k, x: as_bits(as_bits(k, jnp.uint32) | 0, k.dtype))),
    "a printed value": (ITSELF, kernel_to(lambda k, x: (jax.debug.callback(lambda k: None, k), k)[1])),
}  # fmt: skip

# What cannot move and is not proved, with the reason: as the README lists them.
UNKNOWN = {
    "a product with zero of what may be infinite": kernel_to(lambda k, x: k + 0.0 * jnp.tanh(x)),
    "a clip to bounds that nothing reaches": kernel_to(lambda k, x: jnp.clip(k, -jnp.inf, jnp.inf)),
    "a condition that needs arithmetic": kernel_to(lambda k, x: jnp.where(x * x >= 0, k, jnp.where(x != x, k, -k))),
    "what adds and takes away the same": kernel_to(lambda k, x: (k * 2) / 2),
    "a position that is computed": kernel_to(lambda k, x: jnp.roll(k, 0 * x.astype(int))),
    "an element written over itself": kernel_to(lambda k, x: k.at[0].set(k[0])),
    "one array made of several leaves": kernel_to(lambda k, x: jnp.append(k, x)[:-1].reshape(k.shape)),
    "a callback to the host": kernel_to(lambda k, x: jax.pure_callback(np.asarray, k, k)),
}  # fmt: skip


def arguments():
    params = make_params()
    params["head"]["twin"] = params["encoder"]["kernel"] + 1.0
    return params, jnp.array(0.5)


@pytest.mark.parametrize("name", MOVES)
def test_no_step_that_moves_a_leaf_is_called_proved(name):
    after = MOVES[name](*arguments())
    params, x = arguments()
    assert np.any(np.asarray(after["encoder"]["kernel"]) != np.asarray(params["encoder"]["kernel"]))
    message = verdict(fo.assert_step_freezes, MOVES[name], params, x, frozen="encoder")
    assert message.startswith("1 of 2 frozen leaves are not proved to stay as they are:\n  encoder/kernel: refuted: ")


@pytest.mark.parametrize("name", STAYS)
def test_steps_that_cannot_move_a_leaf_are_proved_and_how_exactly_is_told(name):
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
def test_what_cannot_be_told_is_unknown_and_stands_in_the_readme(name):
    params, x = arguments()
    np.testing.assert_array_equal(UNKNOWN[name](params, x)["encoder"]["kernel"], params["encoder"]["kernel"])
    message = verdict(fo.assert_step_freezes, UNKNOWN[name], params, x, frozen="encoder")
    assert message.startswith("1 of 2 frozen leaves are not proved to stay as they are:\n  encoder/kernel: unknown")
    assert name in README


# --- what an adversary found: each was called proved, or did not come to an end


def of_base(function: Callable[..., Any]) -> Callable[..., Any]:
    """A step that does this to the frozen leaf."""
    return lambda params: params | {"base": function(params["base"], params["head"])}


def known(*numbers: float, dtype: Any = "float32") -> Callable[[Any], Any]:
    """An array of these numbers that is an output of the program, to be known by its rules."""
    return lambda head: jnp.where(False, head[: len(numbers)].astype(dtype), np.array(numbers, dtype))


HEAD = jnp.array([0.5, -1.0, 2.0])
FLOATS = jnp.arange(3.0)
HOSTILE = {
    "reset to a closed-over array": (FLOATS, of_base(lambda p, h: FLOATS)),
    "int8 through float8": (
        jnp.array([17, 2, 3], jnp.int8),
        of_base(lambda p, h: p.astype("float8_e4m3fn").astype("int8")),
    ),
    "int32 through float32": (jnp.array([2**24 + 1, 2, 3]), of_base(lambda p, h: p.astype("float32").astype("int32"))),
    "int8 through uint8": (
        jnp.array([-1, 2, 3], jnp.int8),
        of_base(lambda p, h: p.astype("uint8").astype("float16").astype("int8")),
    ),
    "one float8 through another": (
        jnp.array([32.0, 1, 2], jnp.float8_e4m3fn),
        of_base(lambda p, h: p.astype("float8_e4m3b11fnuz").astype(p.dtype)),
    ),
    "float16 through bfloat16": (
        jnp.array([1.001, 1, 2], jnp.float16),
        of_base(lambda p, h: p.astype("bfloat16").astype(p.dtype)),
    ),
    "bfloat16 through float16": (
        jnp.array([1e30, 1, 2], jnp.bfloat16),
        of_base(lambda p, h: p.astype("float16").astype(p.dtype)),
    ),
    "complex through its real part": (jnp.array([1j, 1, 2]), of_base(lambda p, h: p.real.astype(p.dtype))),
    "an `or` of integers": (
        FLOATS,
        of_base(
            lambda p, h: jax.lax.cond(
                jax.lax.reduce_or(known(1, 2, 1)(h).astype(int), (0,)) == 3, lambda: p + 1, lambda: p
            )
        ),
    ),
    "a function scattered": (FLOATS, of_base(lambda p, h: p + jnp.zeros_like(p).at[0].apply(lambda x: x + 1))),
    "a product of complex numbers of length one": (
        FLOATS * 0,
        of_base(lambda p, h: p + 1e20 * jnp.imag((0.6 + 0.8j) * known(0.6 - 0.8j, dtype="complex64")(h)[0])),
    ),
    "a select beyond its cases": (
        FLOATS,
        of_base(lambda p, h: jax.lax.select_n(known(0, 5, 0)(h).astype(int), p, p + 1, p + 2)),
    ),
    "a cond beyond its branches": (
        FLOATS,
        of_base(lambda p, h: jax.lax.switch(known(7)(h).astype(int)[0], [lambda: p, lambda: -p])),
    ),
    "a constant minus the leaf": (FLOATS, of_base(lambda p, h: jnp.zeros_like(p) - p)),
    "one over the leaf": (FLOATS + 1, of_base(lambda p, h: jnp.ones_like(p) / p)),
    "times one and zero": (jnp.array([jnp.inf, 1, 2], jnp.complex64), of_base(lambda p, h: p * jnp.ones_like(p))),
    "plus infinity": (FLOATS, of_base(lambda p, h: p + 0.0 * known(np.inf)(h)[0])),
    "times a product of constants": (
        FLOATS,
        of_base(lambda p, h: p * (known(1e-30)(h)[0] * np.float32(1e30) * np.float32(2))),
    ),
    "the maximum of nothing": (
        FLOATS,
        of_base(lambda p, h: p + jnp.broadcast_to(jax.lax.reduce_max(jnp.zeros((0,)), (0,)), p.shape)),
    ),
    "one of two in a select": (
        FLOATS,
        lambda p: p | {"base": jnp.where(p["head"] > 0, p["twin"], p["base"])},
    ),
    "plus a constant cast to an integer": (
        FLOATS,
        of_base(lambda p, h: p + known(0.5)(h).astype(int).astype(p.dtype) + known(1.5)(h).astype(int)),
    ),
    "the last part of a scan": (FLOATS, of_base(lambda p, h: jax.lax.scan(lambda c, x: (x, c), p[0], p)[1])),
    "a scan over moved parts": (
        jnp.arange(6.0).reshape(2, 3),
        of_base(lambda p, h: jax.lax.scan(lambda c, x: (c, x[::-1]), 0, p)[1]),
    ),
    "a scan that carries a part": (
        FLOATS,
        of_base(lambda p, h: jax.lax.scan(lambda c, x: (x, None), p[:1], p[:, None])[0] + jnp.zeros(3)),
    ),
    "another of two in a select": (
        FLOATS,
        lambda p: {"base": jnp.where(p["head"] > 0, p["base"], p["twin"]), "head": p["head"], "twin": p["base"]},
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_looks_like_nothing_and_moves_a_leaf_is_not_proved(name):
    base, step = HOSTILE[name]
    params = {"base": base, "head": HEAD, "twin": base + base.dtype.type(1)}
    compiled = jax.jit(lambda params: step(params)["base"])(params)
    moved = [after for after in (step(params)["base"], compiled) if verdict(fo.assert_trees_bit_identical, after, base)]
    assert moved or name == "reset to a closed-over array"
    assert "not proved to stay" in verdict(fo.assert_step_freezes, step, params, frozen="base")


def transformation(update: Callable[..., Any], init: Any = ()) -> optax.GradientTransformation:
    return optax.GradientTransformation(lambda params: init, update)


def steering(function: Callable[..., Any]) -> optax.GradientTransformation:
    """The update of the trained leaf is a function of it and of the frozen gradient."""
    return transformation(lambda g, s, p=None: ({"base": jnp.zeros(3), "head": function(g["head"], g["base"])}, s))


def stored(head: Any, base: Any) -> Any:
    reference = jax.new_ref(jnp.zeros(3)) if hasattr(jax, "new_ref") else jax.experimental.mutable_array(jnp.zeros(3))
    reference[...] = base
    return reference[...]


STEERING = {
    "the sign of a zero in a scan": lambda h, b: (
        1 / jax.lax.scan(lambda c, x: (c, x + jnp.where(b > 0, 0.0, -0.0)[0]), 0, h)[1]
    ),
    "the sign of a zero in a cond": lambda h, b: 1 / jax.lax.cond(b[0] > 0, lambda: h, lambda: h + jnp.zeros(3)),
    "the turns of a loop that adds zero": lambda h, b: (
        1 / jax.lax.while_loop(lambda c: c[0] < b[0], lambda c: (c[0] + 1, c[1] + jnp.zeros(3)), (0.0, h))[1]
    ),
    "the turns of a loop": lambda h, b: jax.lax.while_loop(
        lambda c: c[0] < b[0], lambda c: (c[0] + 1, c[1] + 1), (0.0, jnp.zeros(3))
    )[1],
    "a select": lambda h, b: jnp.where(b > 0, h, 2 * h),
    "a select of constants": lambda h, b: jnp.where(b > 0, 1.0, 2.0),
    "a cond of constants": lambda h, b: jax.lax.cond(b[0] > 0, lambda: jnp.zeros(3), lambda: jnp.ones(3)),
    "a mutable array": stored,
}


@pytest.mark.parametrize("name", STEERING)
def test_ways_to_steer_a_trained_leaf_are_seen(name):
    params = {"base": jnp.ones(3), "head": HEAD}
    assert STEERED in verdict(fo.assert_update_freezes, steering(STEERING[name]), params, "base")
    alone = lambda function: transformation(lambda g, s, p=None: (jax.tree.map(lambda h: function(h, h), g), s))
    if name != "a mutable array":  # of which nothing is known
        assert fo.assert_update_freezes(fo.with_frozen(alone(STEERING[name]), "base"), params, "base")


def test_leaves_that_are_no_arrays_do_not_shift_which_gradients_are_frozen():
    params = {"act": jax.nn.relu, "c": jnp.ones(3), "enc": jnp.ones(3)}
    tx = optax.chain(optax.clip_by_global_norm(1.0), fo.freeze(["enc", "act"]))
    assert STEERED in verdict(fo.assert_update_freezes, tx, params, ["enc", "act"])
    found = fo.assert_update_freezes(fo.with_frozen(optax.adam(1e-3), ["act", "c"]), params, ["act", "c"])
    assert found == {"act": "absent", "c": "a constant -0.0"}


def test_a_state_with_leaves_that_are_no_numbers():
    float0 = np.zeros(3, jax.dtypes.float0)

    def update(gradients, state, params=None):
        first, _, there, _ = state
        return {"base": jnp.zeros(3), "head": there}, (first, jnp.zeros(3), gradients["base"], jnp.zeros(3))

    tx = transformation(update, (float0, jnp.zeros(3), jnp.zeros(3), jnp.zeros(3)))
    message = verdict(fo.assert_update_freezes, tx, {"base": jnp.ones(3), "head": HEAD}, "base")
    assert "head: refuted: at step 2, where frozen gradients are another" in message
    assert "the state (2)" in message


def test_a_frozen_gradient_among_the_extra_arguments_is_one():
    params = make_params()
    tx = optax.chain(optax.freeze(MASK), optax.lbfgs(), fo.freeze("encoder"))
    args = extra_args("lbfgs", loss, params, jax.grad(loss)(params))
    message = verdict(fo.assert_update_freezes, tx, params, "encoder", **args)
    assert "depends on the gradients of frozen leaves (grad/encoder/" in message


def test_an_update_of_another_shape_is_none_at_all():
    tx = transformation(lambda g, s, p=None: ({"base": jnp.zeros((2, 3)), "head": g["head"]}, s))
    message = verdict(fo.assert_update_freezes, tx, {"base": jnp.ones(3), "head": HEAD}, "base")
    assert "is a leaf float32[2, 3], and the parameter a leaf float32[3]" in message


def test_a_key_as_an_update_is_no_zero():
    tx = transformation(lambda g, s, p=None: (p, s))
    assert "key: unknown" in verdict(fo.assert_update_freezes, tx, {"key": jax.random.key(0)}, "**")


def test_what_is_closed_over_may_be_anything():
    params, x = arguments()
    reference = jax.new_ref(jnp.zeros(3)) if hasattr(jax, "new_ref") else jax.experimental.mutable_array(jnp.zeros(3))
    gone = jnp.ones(3)

    def step(params, x):
        reference[...] = reference[...] + x
        return params | {"head": jax.tree.map(lambda p: p + jnp.sum(gone), params["head"])}

    assert fo.assert_step_freezes(step, params, x, frozen="encoder")

    @jax.jit
    def inside(y):
        proved = fo.assert_step_freezes(
            lambda p, x: p | {"head": jax.tree.map(lambda h: h * y, p["head"])}, params, x, frozen="encoder"
        )
        assert set(proved.values()) == {"itself"}
        refuted = verdict(fo.assert_step_freezes, kernel_to(lambda k, x: k + y), params, x, frozen="encoder")
        assert "encoder/kernel: unknown" in refuted
        return y

    inside(1.0)


def test_narrow_constants_that_do_not_know_each_other():
    step = of_base(lambda p, h: p + jnp.ones(3, "int4").astype("uint4").astype("int4").astype(p.dtype))
    assert "refuted" in verdict(fo.assert_step_freezes, step, {"base": FLOATS, "head": HEAD}, frozen="base")
    step = of_base(lambda p, h: p + jax.lax.sort((known(0.0, 0.0, 0.0)(h), jnp.zeros(3, "int8")), num_keys=1)[0])
    assert fo.assert_step_freezes(step, {"base": FLOATS, "head": HEAD}, frozen="base")["base"].startswith(SIGN)


def test_a_loop_that_nan_would_keep_going_comes_to_an_end():
    endless = lambda g: jax.lax.while_loop(lambda x: ~(jnp.abs(x) < 1), lambda x: x * 0.5, g[0])
    tx = transformation(lambda g, s, p=None: ({"base": jnp.zeros(3) * endless(g["head"]), "head": g["head"]}, s))
    assert "base: unknown" in verdict(fo.assert_update_freezes, tx, {"base": jnp.ones(3), "head": HEAD}, "base")
    tx = steering(lambda h, b: h * endless(b))
    assert "head: refuted" in verdict(fo.assert_update_freezes, tx, {"base": jnp.ones(3), "head": HEAD}, "base")


@pytest.mark.parametrize(
    "own", ["bool", "int8", "uint8", "int4", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]
)
def test_a_dtype_that_holds_another_gives_back_every_number(own):
    """All patterns of narrow types, there and back with numpy; subnormals and NaNs aside."""
    own = jnp.dtype(own)
    size = 2 ** (8 * own.itemsize)
    if own == np.bool_ or own == jnp.int4:
        every = np.arange(-8, 8).astype(own)
    else:
        every = np.arange(size).astype(f"uint{8 * own.itemsize}").view(own)
    wide = [
        *[
            "bool",
            "int8",
            "uint8",
            "int16",
            "uint16",
            "int32",
            "uint32",
            "int64",
            "float16",
            "bfloat16",
            "float32",
            "float64",
            "complex64",
        ],
        own,
    ]
    narrow = ["float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz", "float8_e8m0fnu", "int4", "uint4"]
    held = set()
    for name in (*wide, *narrow):
        new = jnp.dtype(name)
        with np.errstate(all="ignore"):
            numbers = every.astype(np.float64)
            back = numbers.astype(new).astype(np.complex128).real.astype(own).astype(np.float64)
        is_float = own != np.bool_ and jnp.issubdtype(own, jnp.floating)
        normal = np.abs(numbers) >= float(jnp.finfo(own).tiny) if is_float else slice(None)
        same = np.array_equal(back[normal], numbers[normal])
        assert same or not _numbers.holds(new, own), (own, new)
        held |= {new.name} if _numbers.holds(new, own) else set()
    assert {own.name, "float32", "float64", "complex64"} <= held


def test_constants_on_which_platforms_disagree_are_not_known():
    of = lambda *numbers, dtype=np.float32: _numbers.of_array(np.array(numbers, dtype), np.dtype(dtype))
    assert of(0.0, -0.0) == _numbers.zeros(np.dtype("float32"))
    assert of(1e-45) is of(np.nan) is of(np.inf) is of(1, 2, 3, 4, 5) is None
    assert of(dtype=np.float32) == frozenset()
    assert len(of(*[0.0, 1.0] * 1000)) == 2
    assert of(*[0.0] * 100, 1, 2, 3, 4, 5) is None
    after = functools.partial(_numbers.after, params={}, dtypes=[np.dtype("float32")] * 2, dtype=np.dtype("float32"))
    assert after("mul", operands=[of(3.0), of(0.1)]) is None
    assert after("mul", operands=[of(0.0), of(0.1)]) == of(0.0)
    assert after("mul", operands=[of(0.0), None]) is None
    assert after("add", operands=[of(0.1), of(-0.1)]) is None
    assert after("sub", operands=[of(0.0), of(0.0)]) == of(0.0)
    assert after("div", operands=[of(0.0), of(0.0)]) is None
    assert after("max", operands=[of(0.0), of(-0.0)]) == _numbers.zeros(np.dtype("float32"))
    assert after("max", operands=[of(0.0), of(1.0)]) == of(1.0)
    assert (
        after("convert_element_type", operands=[of(0.5)], dtype=np.dtype("int32"), dtypes=[np.dtype("float32")]) is None
    )


# --- whole steps, as they are written


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Dense(4, name="encoder")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        return nn.Dense(2, name="head")(nn.relu(x))


class State(TrainState):
    batch_stats: Any


def flax_step(tx, train=True, ema=None):
    x = jnp.ones((8, 3))
    variables = Net().init(jax.random.key(0), x)
    state = State.create(apply_fn=Net().apply, tx=tx, **variables)

    def step(state, x):
        def loss(params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            y, new = state.apply_fn(variables, x, train=train, mutable=["batch_stats"])
            return jnp.mean(y**2), new["batch_stats"]

        grads, stats = jax.grad(loss, has_aux=True)(state.params)
        new = state.apply_gradients(grads=grads).replace(batch_stats=stats)
        return (
            new.replace(params=jax.tree.map(lambda p, q: ema * p + (1 - ema) * q, state.params, new.params))
            if ema
            else new
        )

    return step, state, x


WHERE = {"params": lambda state: state.params, "all": lambda state: (state.params, state.batch_stats)}


def test_a_flax_train_state():
    tx = fo.with_frozen(optax.adamw(0.1), ["encoder", "norm"])
    prove = functools.partial(fo.assert_step_freezes, frozen=["encoder", "norm"], where=WHERE["params"])
    found = prove(*flax_step(tx))
    assert list(found) == [f"params/{path}" for path in ("encoder/bias", "encoder/kernel", "norm/bias", "norm/scale")]
    assert {words.split(":")[0] for words in found.values()} == {ODD}
    step, state, x = flax_step(tx)
    assert prove(jax.jit(step, donate_argnums=0), state, x) == found
    shapes = jax.eval_shape(lambda: (state, x))
    assert prove(step, *shapes) == found


def test_batch_statistics_are_seen_to_move():
    tx = fo.with_frozen(optax.adamw(0.1), ["encoder", "norm"])
    step, state, x = flax_step(tx)
    prove = functools.partial(fo.assert_step_freezes, frozen=["encoder", "norm"], where=WHERE["all"])
    message = verdict(prove, step, state, x)
    assert message.startswith(
        "2 of 6 frozen leaves are not proved to stay as they are:\n  batch_stats/norm/mean: refuted"
    )
    assert "depends on x through" in message
    assert "batch_stats/norm/mean" in prove(*flax_step(tx, train=False))
    kept = fo.jit(step, frozen=["encoder", "norm"], where=WHERE["all"])
    assert set(prove(kept, state, x).values()) == {"itself"}


def test_a_moving_average_over_all_parameters_is_seen():
    tx = fo.with_frozen(optax.adamw(0.1), "encoder")
    prove = functools.partial(fo.assert_step_freezes, frozen="encoder", where=WHERE["params"])
    message = verdict(prove, *flax_step(tx, ema=0.9))  # 0.9 * p + 0.1 * p is p, but for rounding
    assert "2 of 2 frozen leaves are not proved to stay" in message
    assert "depends on params/encoder/kernel through mul, add" in message


def train_step(tx, gradient, apply):
    def step(params, state, x):
        value, grads = gradient(lambda p: loss(p) * x)(params)
        updates, state = tx.update(grads, state, params)
        return apply(params, updates), state, value

    return step


@pytest.mark.parametrize(
    ("wrap", "apply", "words"),
    [
        (WAYS["with_frozen"], fo.apply_updates, ITSELF),
        (WAYS["with_frozen"], optax.apply_updates, ODD),
        (WAYS["fo.freeze after"], fo.apply_updates, ITSELF),
        (WAYS["fo.freeze after"], optax.apply_updates, ODD),
        (WAYS["optax.freeze and a scale after"], fo.apply_updates, ITSELF),
        (WAYS["optax.freeze and a scale after"], optax.apply_updates, ODD),
        (lambda tx: optax.chain(tx, optax.freeze(MASK)), optax.apply_updates, SIGN),
        (lambda tx: optax.selective_transform(tx, freeze_mask=MASK), optax.apply_updates, SIGN),
        (lambda tx: fo.with_frozen(optax.MultiSteps(tx, 4), "encoder"), fo.apply_updates, ITSELF),
        (lambda tx: optax.apply_if_finite(fo.with_frozen(tx, "encoder"), 3), fo.apply_updates, ITSELF),
        (lambda tx: optax.MultiSteps(optax.chain(tx, optax.freeze(MASK)), 4), optax.apply_updates, SIGN),
        (lambda tx: optax.chain(optax.freeze(MASK), tx), optax.apply_updates, None),
        (lambda tx: tx, optax.apply_updates, None),
    ],
)
def test_ways_to_freeze(wrap, apply, words):
    tx = wrap(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1)))
    params = make_params()
    for gradient in (jax.value_and_grad, lambda fun: fo.value_and_grad(fun, "encoder")):
        step = train_step(tx, gradient, apply)
        args = (params, tx.init(params), jnp.ones(()))
        if words:
            found = fo.assert_step_freezes(step, *args, frozen="encoder")
            assert {each.split(":")[0] for each in found.values()} == {words}
        else:
            assert "refuted" in verdict(fo.assert_step_freezes, step, *args, frozen="encoder")


def test_what_jit_and_restore_promise_is_proved():
    params, tx = make_params(), optax.adamw(0.1)
    step = train_step(tx, jax.value_and_grad, optax.apply_updates)
    args = (params, tx.init(params), jnp.ones(()))
    assert "refuted" in verdict(fo.assert_step_freezes, step, *args, frozen="encoder")
    for kept in (
        fo.jit(step, frozen="encoder"),
        jax.jit(lambda p, *args: (fo.restore(step(p, *args)[0], p, "encoder"), *step(p, *args)[1:])),
    ):
        found = fo.assert_step_freezes(kept, *args, frozen="encoder", exact=True)
        assert set(found.values()) == {"itself"}


def test_a_step_over_eight_devices():
    mesh = Mesh(np.array(jax.devices()[:8]), "x")
    params = {"encoder": jnp.ones((8, 2)), "norm": jnp.ones(3), "head": jnp.ones((8, 2))}
    specs = {"encoder": P("x"), "norm": P(), "head": P("x")}

    def of(function, out=specs):
        def local(params, x):
            grads = jax.lax.pmean(jnp.sum(x), "x") * params["head"]
            return function(params) | {"head": params["head"] - grads}

        return jax.shard_map(local, mesh=mesh, in_specs=(specs, P("x")), out_specs=out, check_vma=False)

    x = jnp.ones(8)
    prove = functools.partial(fo.assert_step_freezes, frozen=["encoder", "norm"])
    assert set(prove(of(lambda p: p), params, x).values()) == {"itself"}
    assert prove(of(lambda p: p | {"norm": p["norm"] + 0.0}), params, x)["norm"].startswith(SIGN)
    shifted = of(lambda p: p | {"encoder": jax.lax.ppermute(p["encoder"], "x", [(i, (i + 1) % 8) for i in range(8)])})
    assert "1 of 2 frozen leaves" in verdict(prove, shifted, params, x)
    first = of(lambda p: p | {"norm": jax.lax.pmean(p["norm"], "x")})
    assert "norm: unknown" in verdict(prove, first, params, x)


def test_a_part_that_comes_out_elsewhere_is_another_array():
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("x", "y"))
    of = lambda out: jax.shard_map(lambda p: p, mesh=mesh, in_specs=P(("x", "y")), out_specs=out, check_vma=False)
    step = lambda out: lambda params: params | {"base": of(out)(params["base"])}
    params = {"base": jnp.arange(4.0), "head": HEAD}
    assert fo.assert_step_freezes(step(P(("x", "y"))), params, frozen="base") == {"base": "itself"}
    assert "base: refuted" in verdict(fo.assert_step_freezes, step(P(("y", "x"))), params, frozen="base")


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
    ids=lambda value: f"{type(value).__name__}-{getattr(value, 'dtype', '')}" if not isinstance(value, str) else "",
)
def test_leaves_of_any_kind(leaf, words):
    params = {"base": leaf, "scale": jnp.ones(2)}
    tx = fo.with_frozen(optax.adamw(0.1), "base")
    found = fo.assert_step_freezes(lambda p: p | {"scale": p["scale"] * 2}, params, frozen="base", exact=True)
    assert found == {"base": "no elements" if words == "no elements" else "itself"}
    if words == ODD:  # in mixed precision: to a wider dtype, and back
        wide = lambda p: p | {"base": (p["base"].astype(jnp.float32) + jnp.float32(-0.0)).astype(p["base"].dtype)}
        assert fo.assert_step_freezes(wide, params, frozen="base")["base"].startswith(ODD)
        narrow = lambda p: p | {"base": p["base"].astype(jnp.float8_e5m2).astype(p["base"].dtype)}
        assert "not proved" in verdict(fo.assert_step_freezes, narrow, params, frozen="base")
    array = params | {"base": jnp.asarray(leaf) if isinstance(leaf, (int, float)) else leaf}
    assert list(fo.assert_update_freezes(tx, array, "base")) == ["base"]


def test_leaves_that_stand_elsewhere_or_are_of_another_kind_are_named():
    params = {"encoder": {"a": jnp.ones(2), "b": jnp.ones(2), "c": jnp.ones(2)}, "head": jnp.ones(2)}
    step = lambda p: {
        "encoder": {"a": p["encoder"]["b"], "b": p["encoder"]["b"].astype(jnp.bfloat16), "c": np.ones(2, np.float32)},
        "head": p["head"],
    }
    assert verdict(fo.assert_step_freezes, step, params, frozen="encoder").splitlines() == [
        "3 of 3 frozen leaves are not proved to stay as they are:",
        "  encoder/a: refuted: 2 of 2 elements differ, the first at [0]: "
        + re.search(r"encoder/a: refuted: .*\]: (.*)", verdict(fo.assert_step_freezes, step, params, frozen="encoder"))[
            1
        ],
        "    is encoder/b",
        "  encoder/b: refuted: a leaf float32[2] became a leaf bfloat16[2]",
        "    depends on encoder/b through a cast to bfloat16",
        "  encoder/c: refuted: a leaf float32[2] became a leaf float32[2], whatever it was",
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

    assert set(fo.assert_step_freezes(step, params, 2, True, 0.1, jnp.sin, frozen="encoder").values()) == {"itself"}


def test_a_loop_that_might_not_end_is_run_on_the_given_arguments_alone():
    step = kernel_to(lambda k, x: jax.lax.while_loop(lambda c: jnp.all(c < 2), lambda c: c * 2, k + 1.5))
    params, x = arguments()
    params["encoder"]["kernel"] = jnp.ones((3, 4))
    message = verdict(fo.assert_step_freezes, step, params, x, frozen="encoder")
    assert "run on the arguments as given" in message
    shapes = jax.eval_shape(lambda: (params, x))
    assert "encoder/kernel: unknown\n" in verdict(fo.assert_step_freezes, step, *shapes, frozen="encoder")
