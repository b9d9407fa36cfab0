"""Stages as branches of one compiled program, and what `optax.conditionally_mask` does instead."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_same_bits, host_bits

import frozen_optax as fo

STARTS = {"head": 0, "encoder/top": 3, "encoder/bottom": 6}
CLIP = optax.clip_by_global_norm(0.5)


def odd(dtype: str) -> jax.Array:
    """-0.0, a subnormal, a signalling NaN, a quiet one with a payload, and a number."""
    patterns = {
        "float32": np.array([0x80000000, 1, 0x7F800001, 0x7FC00123, 0x3F800000], np.uint32),
        "bfloat16": np.array([0x8000, 1, 0x7F81, 0x7FC1, 0x3F80], np.uint16),
    }
    return jnp.asarray(patterns[dtype].view(jnp.dtype(dtype)))


def make_params() -> dict[str, Any]:
    def layer() -> dict[str, Any]:
        return {"odd": odd("float32"), "narrow": odd("bfloat16"), "w": jnp.arange(1.0, 4.0)}

    layers = {"top": layer(), "bottom": layer()}
    return {"embed": odd("float32"), "encoder": layers, "head": jnp.arange(1.0, 4.0)}


def flat(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def loss(params: Any, x: Any) -> Any:
    """NaNs of an encoder would be in every gradient of it: they are cut out."""
    total = jnp.sum((params["head"] - jnp.sin(x)) ** 2)
    for layer in params["encoder"].values():
        for leaf in layer.values():
            finite = jnp.where(jnp.isnan(leaf), 0, leaf).astype("float32")
            total += jnp.sum((finite - jnp.cos(x)) ** 2)
    return total


def sum_of_what_is_trained(params: Any, updates: Any, tx: Any) -> Any:
    """With optax's sum: what is frozen is not in it."""
    (trained, rest), (updates, _) = (fo.partition(tree, tx) for tree in (params, updates))
    return fo.combine(optax.apply_updates(trained, updates), rest)


APPLY: dict[str, Callable[..., Any]] = {
    "fo": lambda params, updates, tx: fo.apply_updates(params, updates),
    "optax": sum_of_what_is_trained,
}


def optimizer(stage: Any) -> Any:
    return stage.optimizer(lambda *_: optax.adamw(0.1), before=CLIP)


def switched(stages: Any, apply: str = "fo", loss: Callable[..., Any] = loss) -> Any:
    """The recipe: a step that takes the number of its stage."""

    def make_branch(stage: Any) -> Any:
        tx = optimizer(stage)

        def branch(params: Any, state: Any, x: Any) -> Any:
            own = fo.transfer_state(state, tx.init(params))
            updates, own = tx.update(fo.grad(loss, tx)(params, x), own, params)
            return APPLY[apply](params, updates, tx), fo.transfer_state(own, state)

        return branch

    branches = [make_branch(stage) for stage in stages]
    return lambda number, carry, x: jax.lax.switch(number, branches, *carry, x)


def start(stages: Any, params: Any) -> Any:
    return params, optimizer(stages[-1]).init(params)


def scan(stages: Any, step: Any, carry: Any, steps: Any) -> Any:
    begins = jnp.array([stage.start for stage in stages[1:]])

    def body(carry: Any, x: Any) -> Any:
        return step(jnp.searchsorted(begins, x, side="right"), carry, x), None

    return jax.lax.scan(body, carry, steps)[0]


# --- what is closed, what opens


def lost(before: Any, after: Any) -> list[str]:
    """The leaves of which a bit is another."""
    old, new = flat(before), flat(after)
    return [name for name in old if (host_bits(old[name]) != host_bits(new[name])).any()]


@pytest.mark.parametrize("apply", APPLY)
def test_what_is_closed_keeps_its_bits_in_one_jit(apply: str) -> None:
    params, stages = make_params(), fo.stages(STARTS)
    train = jax.jit(functools.partial(scan, stages, switched(stages, apply)))
    for steps, closed in ((3, {"bottom", "top"}), (6, {"bottom"}), (9, set())):
        after, _ = train(start(stages, params), jnp.arange(steps))
        assert lost(params["embed"], after["embed"]) == []
        for name in ("bottom", "top"):
            moved = lost(params["encoder"][name], after["encoder"][name])
            if name in closed:
                assert moved == []
            else:
                assert "['w']" in moved


def test_it_keeps_bits_where_nothing_is_compiled_around_the_scan() -> None:
    params, stages = make_params(), fo.stages(STARTS)
    step = switched(stages)
    after, _ = scan(stages, step, start(stages, params), jnp.arange(6))
    assert_same_bits(flat(after["encoder"]["bottom"]), flat(params["encoder"]["bottom"]))


def test_a_program_does_what_stages_do_bit_for_bit() -> None:
    """Op by op, so that each group has a count of its own, and closed gradients steer nothing."""
    stages = fo.stages({"head": 0, "encoder/top": 1}, stop=3)
    params, state = make_params(), None
    with jax.disable_jit():
        for stage in stages:
            tx = optimizer(stage)
            state = fo.transfer_state(state, tx.init(params))
            for x in range(stage.start, stage.stop):
                updates, state = tx.update(fo.grad(loss, tx)(params, x), state, params)
                params = fo.apply_updates(params, updates)
        step = switched(stages)
        after, ended = scan(stages, step, start(stages, make_params()), jnp.arange(3))
    assert_same_bits(flat(after), flat(params))
    assert_same_bits(flat(ended), flat(state))


def test_closed_gradients_are_not_computed() -> None:
    """And so may be anything."""
    stages = fo.stages(STARTS)

    def hostile(params: Any, x: Any) -> Any:
        return loss(params, x) + 1e30 * jnp.sum(jnp.sqrt(params["encoder"]["top"]["w"] * 0))

    ways = (switched(stages, loss=each) for each in (loss, hostile))
    one, other = (
        jax.jit(functools.partial(scan, stages, step))(start(stages, make_params()), jnp.arange(3))
        for step in ways
    )
    assert np.isfinite(other[0]["head"]).all()
    assert_same_bits({"head": one[0]["head"]}, {"head": other[0]["head"]})


def test_a_thousand_steps_on_a_metric_are_compiled_once() -> None:
    """The stage is a part of what is carried, and goes up when the loss is low enough."""
    stages = fo.stages({"head": 0, "encoder/top": 1})
    step = switched(stages)
    traced = []

    @jax.jit
    def train(carry: Any, threshold: Any) -> Any:
        traced.append(1)

        def body(carry: Any, x: Any) -> Any:
            params, state, stage = carry
            stage = jnp.maximum(stage, jnp.sum(jnp.abs(params["head"])) < threshold)
            params, state = step(stage.astype(int), (params, state), x)
            bits = jax.lax.bitcast_convert_type(params["encoder"]["top"]["odd"], "uint32")
            return (params, state, stage), (stage, bits)

        return jax.lax.scan(body, carry, jnp.arange(1_000))

    params = make_params()
    carry = (*start(stages, params), jnp.array(False))
    compiled = train.lower(carry, 0.0).compile()  # what is compiled here cannot compile again
    ended = [compiled(carry, threshold) for threshold in (-1.0, 3.5, 100.0)]
    assert len(traced) == 1
    bits = np.asarray(params["encoder"]["top"]["odd"]).view(np.uint32)
    opened = []
    for _, (stage, found) in ended:
        opened.append(int(np.argmax(stage)) if stage.any() else None)
        kept = (found == bits).all(1)
        assert kept[~stage].all()
        assert not kept[stage].any()
    never, late, at_once = opened
    assert (never, at_once) == (None, 0)
    assert 0 < late < 1_000
    # With a count of its own the first step of Adam is as long as its rate, when it ever comes.
    _, state, _ = ended[1][0]
    counts = [
        int(leaf) for path, leaf in flat(state).items() if path.endswith("count") and "top" in path
    ]
    assert counts == [1_000 - late]


# --- the other way


def masked(apply: Callable[..., Any], *, before: bool = True) -> Any:
    stages = fo.stages(STARTS)

    def opened(transform: Any) -> Any:
        each = {
            group: optax.conditionally_mask(transform, lambda step, first=first: step >= first)
            for group, first in STARTS.items()
        }
        return optax.partition(each, stages[-1].labels)

    first = [opened(optax.identity())] if before else []
    tx = fo.with_frozen(optax.chain(*first, CLIP, opened(optax.adamw(0.1))), stages[-1].frozen)

    def body(carry: Any, x: Any) -> Any:
        params, state = carry
        updates, state = tx.update(fo.grad(loss, tx)(params, x), state, params)
        return (apply(params, updates), state), None

    def train(params: Any, steps: Any) -> Any:
        return jax.lax.scan(body, (params, tx.init(params)), steps)[0][0]

    return train


@pytest.mark.parametrize("apply", APPLY)
def test_what_conditionally_mask_keeps_of_what_is_closed(apply: str) -> None:
    params = make_params()
    after = jax.jit(masked((fo if apply == "fo" else optax).apply_updates))(params, jnp.arange(6))
    moved = lost(params["encoder"]["bottom"], after["encoder"]["bottom"])
    assert moved == ([] if apply == "fo" else ["['narrow']", "['odd']"])
    assert_same_bits({"embed": after["embed"]}, {"embed": params["embed"]})


def test_conditionally_mask_does_what_stages_do() -> None:
    stages = fo.stages(STARTS)
    step = switched(stages)
    expected, _ = jax.jit(functools.partial(scan, stages, step))(
        start(stages, make_params()), jnp.arange(9)
    )
    found = jax.jit(masked(fo.apply_updates))(make_params(), jnp.arange(9))
    steered = jax.jit(masked(fo.apply_updates, before=False))(make_params(), jnp.arange(9))
    compare = functools.partial(np.testing.assert_allclose, rtol=1e-5)
    compare(found["head"], expected["head"])
    compare(found["encoder"]["bottom"]["w"], expected["encoder"]["bottom"]["w"])
    with pytest.raises(AssertionError):
        compare(steered["head"], expected["head"])
