"""Runs that thaw in stages, killed by SIGKILL and resumed: do they end with the same weights?

`python -m benchmarks.killed` kills fifty times, some times in each run, and prints one line of
JSON. A killed process is the worker below; it goes on from what Orbax has kept of the one before
it. What is killed when is drawn from a seed: at a step (that of a boundary, and those beside it),
at an operation on directories within a save, or after a while, whatever it does then.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import frozen_optax as fo

STARTS = {"head": 0, "encoder/top": 4, "encoder/bottom": 8}
STEPS, WIDTH = 12, 8
STAGES = fo.stages(STARTS, stop=STEPS)
BOUNDARIES = [stage.start for stage in STAGES[1:]]
SHORT = 0.3  # seconds in which some steps are taken, each of them saved
LIMIT = 300  # seconds, for a process that hangs

# --- the worker


def make_params() -> Any:
    """A small network, with -0.0 in what nothing trains."""
    keys = iter(jax.random.split(jax.random.key(0), 3))
    matrix = lambda: jax.random.normal(next(keys), (WIDTH, WIDTH))
    layers = {name: {"w": matrix(), "b": jnp.zeros(WIDTH)} for name in ("bottom", "top")}
    return {"embed": -jnp.zeros(WIDTH), "encoder": layers, "head": {"w": matrix()}}


def loss(params: Any, step: Any) -> Any:
    """That of the batch of a step."""
    x = jax.random.normal(jax.random.fold_in(jax.random.key(1), step), (4, WIDTH))
    y = x[:, ::-1]
    for name in ("bottom", "top"):
        layer = params["encoder"][name]
        x = jnp.tanh((x + params["embed"]) @ layer["w"] + layer["b"])
    return jnp.mean((x @ params["head"]["w"] - y) ** 2)


def optimizer(stage: fo.Stage) -> Any:
    """Each group warms up from its own start; all are clipped together."""
    warm_up = optax.linear_schedule(0.0, 1e-1, 3)
    return stage.optimizer(lambda *_: optax.adamw(warm_up), before=optax.clip_by_global_norm(1.0))


def worker(folder: Path, tell: Callable[[str, int], None]) -> Any:
    """Trains to the end from what is kept in a folder, and keeps the state after each step."""

    def make_step(tx: Any) -> Any:
        @fo.jit(frozen=tx, donate_argnums=(0, 1))
        def train_step(params: Any, state: Any, step: Any) -> Any:
            updates, state = tx.update(fo.grad(loss, tx)(params, step), state, params)
            return fo.apply_updates(params, updates), state

        return train_step

    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    with ocp.CheckpointManager(folder.absolute(), options=options) as kept:
        params, state = make_params(), None
        taken = kept.latest_step() or 0
        if taken:  # the state is that of the last step that was taken
            like = {"params": params, "state": optimizer(STAGES.at(taken - 1)).init(params)}
            shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
            saved = kept.restore(taken, args=ocp.args.StandardRestore(shapes))
            params, state = saved["params"], saved["state"]
        for stage in STAGES:
            assert stage.stop is not None
            steps = range(max(taken, stage.start), stage.stop)
            if not steps:
                continue
            tx = optimizer(stage)
            state = fo.transfer_state(state, tx.init(params))
            train_step = make_step(tx)
            for step in steps:
                tell("step", step)
                params, state = train_step(params, state, step)
                tell("save", step)
                kept.save(step + 1, args=ocp.args.StandardSave({"params": params, "state": state}))
        return params


def die_at(operation: int) -> None:
    """From now on: to be killed as this operation on directories, counted from 1, is begun."""
    begun = 0

    def audit(event: str, _: Any) -> None:
        nonlocal begun
        if event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir"):
            begun += 1
            if begun == operation:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)


def work(folder: Path, kind: str, step: int, operation: int) -> None:
    """The worker's process: it kills itself at the moment that it was told, if that comes."""

    def tell(what: str, number: int) -> None:
        if what == "step":
            print(number, flush=True)
        if (what, number) == (kind, step):
            if kind == "step":
                os.kill(os.getpid(), signal.SIGKILL)
            die_at(operation)

    print(written(worker(folder, tell)), flush=True)


def written(params: Any) -> str:
    """All bits of the weights, by path, in a line."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    found = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
    return json.dumps({path: leaf.tobytes().hex() for path, leaf in found.items()})


# --- who kills


def draw(rng: np.random.Generator, begun: int) -> tuple[str, int, int, float]:
    """What is to be killed: a step, an operation in the save after it, or anything after a while.

    It is one that is still to come, where a run has `begun` a step; half of them at a boundary.
    """
    kind = ("step", "save", "time")[rng.integers(3)]
    to_come = range(max(begun, 0) + (kind == "step"), STEPS)
    near = [step for step in to_come if place(step) != "elsewhere"]
    step = int(rng.choice(near if near and rng.random() < 0.5 else to_come or [STEPS - 1]))
    return kind, step, int(rng.integers(1, 15)), float(rng.uniform(0, SHORT))


def place(step: int) -> str:
    """Where a step lies: that of a boundary is the first of its stage."""
    names = {-1: "before a boundary", 0: "at a boundary", 1: "after a boundary"}
    found = [names[step - b] for b in BOUNDARIES if step - b in names]
    return found[0] if found else "elsewhere"


def attempt(folder: Path, drawn: tuple[str, int, int, float] | None) -> tuple[int, str]:
    """Runs the worker once: the last step that it began, and its weights if it came to its end.

    Raises:
      RuntimeError: it ended otherwise, or did not end.
    """
    kind, step, operation, seconds = drawn or ("never", 0, 0, 0.0)
    command = [sys.executable, "-m", "benchmarks.killed", "--work", str(folder)]
    command += ["--at", kind, str(step), str(operation)]
    root = Path(__file__).parent.parent
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command, cwd=root, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        try:
            assert process.stdout
            first = ""
            if kind == "time":
                first = process.stdout.readline()
                time.sleep(seconds)
                process.kill()
            told = (first + process.communicate(timeout=LIMIT)[0]).splitlines()
        finally:
            process.kill()  # nothing stays behind
        if process.returncode not in (0, -signal.SIGKILL):
            errors.seek(0)
            raise RuntimeError(f"the worker ended with {process.returncode}: {errors.read()}")
    steps = [int(line) for line in told if line.isdecimal()]
    return max(steps, default=-1), told[-1] if process.returncode == 0 else ""


def uninterrupted() -> str:
    """The weights of a run that nobody kills."""
    with tempfile.TemporaryDirectory() as folder:
        return attempt(Path(folder), None)[1]


def run(seed: int, kills: int) -> tuple[Counter[str], str]:
    """Kills a run so many times, and lets it come to its end: what was killed, and the weights."""
    found: Counter[str] = Counter()
    rng, last, weights = np.random.default_rng(seed), -1, ""
    with tempfile.TemporaryDirectory() as folder:
        while found.total() < kills and not weights:
            drawn = draw(rng, last)
            last, weights = attempt(Path(folder), drawn)
            if not weights:
                what = {"step": "before a step", "save": "in a save", "time": "after a while"}
                found[f"{what[drawn[0]]}, {place(last)}"] += 1
        return found, weights or attempt(Path(folder), None)[1]


def main() -> None:
    """Kills fifty times, or is what is killed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.killed", description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--at", nargs=3, help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.work:
        kind, step, operation = settings.at
        work(settings.work, kind, int(step), int(operation))
        return
    expected, found, runs, same = uninterrupted(), Counter[str](), 0, 0
    while found.total() < settings.kills:
        killed, weights = run(runs, min(5, settings.kills - found.total()))
        found += killed
        runs += 1
        same += weights == expected
        print(f"{found.total()} killed", file=sys.stderr, flush=True)
    print(json.dumps({"killed": {"runs": runs, "the same": same, "moments": dict(found)}}))


if __name__ == "__main__":
    main()
