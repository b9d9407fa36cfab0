"""How long a fingerprint of 100 MB takes, beside `jnp.sum` of it. Prints one line of JSON."""

import json
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import frozen_optax as fo
from benchmarks.measures import Figures, spread

BYTES, ROUNDS = 100_000_000, 15


def measured(calls: dict[str, Callable[[], Any]]) -> dict[str, Figures]:
    """Seconds of each, in turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS + 1):  # the first round compiles
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(time.perf_counter() - start)
    return {name: spread(each[1:]) for name, each in times.items()}


def main() -> None:
    """Measures leaves of three widths."""
    read, found = jax.jit(jnp.sum), {}
    for dtype in ("float32", "bfloat16", "int8"):
        leaf = jnp.ones(BYTES // jnp.dtype(dtype).itemsize, dtype)
        calls = {
            "read": lambda leaf=leaf: read(leaf),
            "fingerprint": lambda leaf=leaf: fo.fingerprint(leaf, "**"),
        }
        found[dtype] = measured(calls)
    print(json.dumps({"fingerprints": found}))


if __name__ == "__main__":
    main()
