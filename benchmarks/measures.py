"""What a step costs to trace, to compile and to run, and in FLOPs and bytes as XLA counts them."""

import gc
import json
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from flax import nnx

from benchmarks.contenders import Training

Figures = dict[str, float]
# Steps dispatched one after the other before anything waits for them, as a training loop has it.
LOOP = 100

_COLLECTIVE = re.compile(
    r"= (.*?) (?:all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)
_SHAPE = re.compile(r"([a-z]+\d+)\[([\d,]*)\]")


def nbytes(tree: Any) -> int:
    """What the arrays of a tree take."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def compiling(training: Training, batch: Any, donate: bool = False) -> tuple[Any, Figures]:
    """The compiled step, and what it took to make it and what XLA says of it."""
    args = (*training.state, *training.constant, batch)
    step = training.compiler(
        lambda *args: training.step(*args),  # a new function, so that nothing is remembered of it
        donate_argnums=tuple(range(len(training.state))) if donate else (),
    )
    jax.clear_caches()
    gc.collect()
    start = time.perf_counter()
    traced = step.trace(*args)
    between = time.perf_counter()
    compiled = traced.lower().compile()
    end = time.perf_counter()
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    return compiled, {
        "trace": between - start,
        "compile": end - between,
        "flops": cost["flops"],
        "bytes accessed": cost["bytes accessed"],
        "bytes in": memory.argument_size_in_bytes,
        "bytes out": memory.output_size_in_bytes,
        "bytes temporary": memory.temp_size_in_bytes,
        "bytes aliased": memory.alias_size_in_bytes,
        "state": nbytes(training.optimizer_state(training.state)),
    }


def _reach(tree: Any, path: tuple[Any, ...]) -> Any:
    """The leaf at a path."""
    for key in path:
        if isinstance(tree, nnx.Variable):
            return jax.tree.leaves(tree)[0]
        if isinstance(key, jax.tree_util.GetAttrKey):
            tree = getattr(tree, key.name)
        else:
            tree = tree[key.idx if isinstance(key, jax.tree_util.SequenceKey) else key.key]
    return tree


def runner(training: Training, batch: Any, donate: bool = False) -> Callable[..., float]:
    """A function that runs the next steps, one or more, and says how long each took.

    It goes on from where it ended, and waits once, after the last step.
    """
    step = training.compile_with(donate)
    state = jax.tree.map(lambda leaf: leaf.copy(), training.state) if donate else training.state
    # What one program returns is there all at once, so that any leaf will do.
    path, _ = jax.tree_util.tree_leaves_with_path(state)[-1]

    def run(steps: int = 1) -> float:
        nonlocal state
        start = time.perf_counter()
        for _ in range(steps - 1):
            state = step(*state, *training.constant, batch)[: len(state)]
        result = step(*state, *training.constant, batch)
        _reach(result, path).block_until_ready()
        taken = time.perf_counter() - start
        state = result[: len(state)]
        return taken / steps

    return run


def stepping(
    runners: dict[str, Callable[..., float]], rounds: int, *steps: int
) -> dict[str, list[float]]:
    """Steps of each, in turn; `steps` at once, if given.

    So whatever else the machine does falls on all of them. The order changes from round to round,
    and only the second of two runs counts: what ran before leaves the caches to the first. That is
    a single step.
    """
    times: dict[str, list[float]] = {name: [] for name in runners}
    order, shuffle = list(runners), random.Random(0).shuffle
    for _ in range(rounds + 1):  # the first round compiles
        shuffle(order)
        gc.collect()
        for name in order:
            runners[name]()
            times[name].append(runners[name](*steps))
    return {name: each[1:] for name, each in times.items()}


def collectives(program: str) -> tuple[int, int]:
    """How many collectives a compiled program has, and how many bytes each device gets by them."""
    results = [match[1] for match in _COLLECTIVE.finditer(program)]
    width = lambda dtype: int(re.sub(r"\D", "", dtype)) / 8
    size = lambda dims: int(np.prod([int(dim) for dim in dims.split(",") if dim]))
    total = sum(
        width(dtype) * size(dims) for result in results for dtype, dims in _SHAPE.findall(result)
    )
    return len(results), int(total)


def spread(values: Iterable[float]) -> Figures:
    """Median, and the quarter of the values below and above it."""
    values = sorted(values)
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"median": statistics.median(values), "low": low, "high": high, "runs": len(values)}


def elsewhere(*args: str) -> Any:
    """What a module of this package prints as JSON, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", *args], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"python -m {' '.join(args)} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])
