"""What a step of each stage takes, and compiling all of them: a program a stage, or one for all.

Prints one line of JSON. 24 layers of 512 x 512, of which the last one trains at first, then half of
them, then all. Time is that of the processor: more than one core at work counts more than once.
"""

import json
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import frozen_optax as fo
from benchmarks.measures import spread

LAYERS, WIDTH, ROWS = 24, 512, 32
STEPS, ROUNDS = 20, 15
STARTS = {"top": 0, "upper": STEPS, "lower": 2 * STEPS}
CLIP, ADAMW = optax.clip_by_global_norm(1.0), optax.adamw(1e-3)
STAGES = fo.stages(STARTS, stop=3 * STEPS)


def make_params() -> dict[str, Any]:
    """The layers, by group; the last one is the first to train."""
    keys = jax.random.split(jax.random.key(0), LAYERS)
    kernels = [jax.random.normal(key, (WIDTH, WIDTH)) * WIDTH**-0.5 for key in keys]
    half = LAYERS // 2
    parts = {"lower": kernels[:half], "upper": kernels[half:-1], "top": kernels[-1:]}
    return {name: dict(enumerate(part)) for name, part in parts.items()}


def loss(params: Any, x: Any) -> Any:
    """Of all layers, from the lowest on."""
    for name in ("lower", "upper", "top"):
        for kernel in params[name].values():
            x = jnp.tanh(x @ kernel)
    return jnp.mean(x**2)


def take(tx: Any, params: Any, state: Any, step: Any) -> Any:
    """A step; the batch is another one each time, or the compiler takes work out of the loop."""
    x = jax.random.normal(jax.random.key(step), (ROWS, WIDTH))
    updates, state = tx.update(fo.grad(loss, tx)(params, x), state, params)
    return fo.apply_updates(params, updates), state


Step = Callable[[Any, Any, Any], Any]


def optimizer(stage: fo.Stage) -> Any:
    """That of a stage."""
    return stage.optimizer(lambda *_: ADAMW, before=CLIP)


def alone(stage: fo.Stage) -> tuple[Step, Any]:
    """A stage as a program of its own."""
    tx = optimizer(stage)
    return lambda *args: take(tx, *args), tx


def switched() -> tuple[Step, Any]:
    """All stages as branches."""

    def branch(stage: fo.Stage) -> Step:
        tx = optimizer(stage)

        def run(params: Any, state: Any, step: Any) -> Any:
            own = fo.transfer_state(state, tx.init(params))
            params, own = take(tx, params, own, step)
            return params, fo.transfer_state(own, state)

        return run

    branches = [branch(stage) for stage in STAGES]
    begins = jnp.array([stage.start for stage in STAGES[1:]])

    def step(params: Any, state: Any, step: Any) -> Any:
        number = jnp.searchsorted(begins, step, side="right")
        return jax.lax.switch(number, branches, params, state, step)

    return step, optimizer(STAGES[-1])


def masked() -> tuple[Step, Any]:
    """All groups, each behind a condition."""

    def opened(transform: optax.GradientTransformation) -> optax.GradientTransformation:
        each = {
            group: optax.conditionally_mask(transform, lambda step, start=start: step >= start)
            for group, start in STARTS.items()
        }
        return optax.partition(each, STAGES[-1].labels)

    inner = optax.chain(opened(optax.identity()), CLIP, opened(ADAMW))
    tx = fo.with_frozen(inner, STAGES[-1].frozen)
    return lambda *args: take(tx, *args), tx


def measured() -> dict[str, dict[str, Any]]:
    """For each way: seconds of the processor to compile, and for a step of each stage."""
    programs = {f"alone {number}": alone(stage) for number, stage in enumerate(STAGES)}
    programs |= {"switch": switched(), "conditionally_mask": masked()}
    compiles: dict[str, float] = {}
    calls: dict[tuple[str, int], Callable[[], Any]] = {}
    for name, (step, tx) in programs.items():

        def train(params: Any, state: Any, first: Any, step: Step = step) -> Any:
            body = lambda carry, i: (step(*carry, i), None)
            return jax.lax.scan(body, (params, state), first + jnp.arange(STEPS))[0]

        params = make_params()
        both = params, tx.init(params)
        start = time.process_time()
        compiled = jax.jit(train).lower(*both, 0).compile()
        compiles[name] = time.process_time() - start
        is_alone = name.startswith("alone")
        for number, stage in enumerate(STAGES):
            if is_alone and name != f"alone {number}":
                continue
            first = 0 if is_alone else stage.start
            calls[name, number] = lambda compiled=compiled, both=both, first=first: compiled(
                *both, first
            )
            if not is_alone:
                both = calls[name, number]()
    times: dict[tuple[str, int], list[float]] = {key: [] for key in calls}
    for _ in range(ROUNDS):
        for key, call in calls.items():
            start = time.process_time()
            jax.block_until_ready(call())
            times[key].append((time.process_time() - start) / STEPS)
    found: dict[str, dict[str, Any]] = {}
    numbers = range(len(STAGES))
    for name in ("alone", "switch", "conditionally_mask"):
        of = {number: f"alone {number}" if name == "alone" else name for number in numbers}
        found[name] = {
            "compile": sum(compiles[each] for each in dict.fromkeys(of.values())),
            "steps": [spread(times[of[number], number]) for number in numbers],
        }
    return found


def main() -> None:
    """Measures three ways."""
    print(json.dumps({"thawing": measured()}))


if __name__ == "__main__":
    main()
