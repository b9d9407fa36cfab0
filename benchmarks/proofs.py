"""How long proofs take, beside tracing what is proved. Prints one line of JSON.

A step of a thousand small leaves in which the compiler's work would be nothing, with and without
this library's gradient, and the steps of the two large models, on shapes alone.
"""

import json
import time
from collections.abc import Callable
from typing import Any

import jax

import frozen_optax as fo
from benchmarks.contenders import CONTENDERS, adamw, on_shapes
from benchmarks.measures import Figures, spread
from benchmarks.models import deepseek, llama
from benchmarks.workloads import Workload, unrolled

ROUNDS = 3


def _seconds(call: Callable[[], Any]) -> float:
    jax.clear_caches()  # a second tracing would find what the first one made
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measured(workload: Workload, name: str) -> dict[str, Figures]:
    """Seconds to trace a step, to prove it, and to prove its optimizer."""
    tx, frozen = adamw(), workload.mask()
    training = CONTENDERS[name](workload, on_shapes(tx))
    args = (*training.state, *training.constant, workload.batch)
    calls: dict[str, Callable[[], Any]] = {
        "trace": lambda: jax.make_jaxpr(training.step)(*jax.eval_shape(lambda: args)),
        "step": lambda: fo.assert_step_freezes(training.step, *args, frozen=frozen),
        "update": lambda: fo.assert_update_freezes(
            fo.with_frozen(tx, frozen), workload.params, frozen
        ),
    }
    return {title: spread([_seconds(call) for _ in range(ROUNDS)]) for title, call in calls.items()}


def main() -> None:
    """Measures four programs."""
    small = unrolled(250, 8, 2, {249}, small_leaves=True)
    found = {
        "1,000 leaves": measured(small, "fo.jit"),
        "1,000 leaves, all of them differentiated": measured(small, "chain(tx, optax.freeze)"),
        **{workload.title: measured(workload, "fo.jit") for workload in (llama(), deepseek())},
    }
    print(json.dumps({"proofs": found}))


if __name__ == "__main__":
    main()
