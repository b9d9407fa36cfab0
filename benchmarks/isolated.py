"""What needs its own process: peak memory, programs for eight devices. Prints one line of JSON."""

import argparse
import json
import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.contenders import CONTENDERS, adamw
from benchmarks.measures import collectives, nbytes
from benchmarks.workloads import unrolled


def _status(field: str) -> int:
    with open("/proc/self/status") as status:
        return 1024 * int(re.search(rf"{field}:\s+(\d+)", status.read())[1])  # pyright: ignore


def memory(name: str, layers: int, width: int) -> dict[str, int]:
    """Parameters and optimizer state, and by how much training grows the process above them."""
    workload = unrolled(layers, width, 8, {layers - 1}, small_leaves=False)
    training = CONTENDERS[name](workload, adamw())
    step, state = training.compile_with(donate=False), training.state
    step.lower(*state, *training.constant, workload.batch).compile()
    before = _status("VmRSS")
    with open("/proc/self/clear_refs", "w") as peak:  # the peak begins anew
        peak.write("5")
    for _ in range(5):
        state = jax.block_until_ready(step(*state, *training.constant, workload.batch))[
            : len(state)
        ]
    held = nbytes(workload.params) + nbytes(training.optimizer_state(training.state))
    return {"held": held, "grown": max(0, _status("VmHWM") - before)}


def communication(names: list[str]) -> dict[str, Any]:
    """Collectives in a step on eight devices: the batch split, the parameters whole or split."""
    mesh = Mesh(jax.devices("cpu")[:8], ("data",))
    workload = unrolled(4, 64, 64, {3}, small_leaves=True)

    def split(leaf: Any) -> Any:
        whole = leaf.ndim == 0 or leaf.shape[0] % 8 or leaf.dtype != workload.batch.dtype
        return jax.device_put(leaf, NamedSharding(mesh, P() if whole else P("data")))

    ways = {
        "parameters on each device": lambda leaf: jax.device_put(leaf, NamedSharding(mesh, P())),
        "parameters split": split,
    }
    found: dict[str, Any] = {way: {} for way in ways}
    for way, place in ways.items():
        for name in names:
            training = CONTENDERS[name](workload, adamw())
            args = (
                *jax.tree.map(place, (training.state, training.constant)),
                split(workload.batch),
            )
            step = training.compile_with(donate=False)
            text = step.lower(*args[0], *args[1], args[2]).compile().as_text()
            found[way][name] = dict(zip(("collectives", "bytes"), collectives(text), strict=True))
    return found


def main() -> None:
    """Measures what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["memory", "communication"])
    parser.add_argument("names", nargs="+")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=1024)
    args = parser.parse_args()
    if args.what == "communication":
        jax.config.update("jax_num_cpu_devices", 8)
        print(json.dumps(communication(args.names)))
    else:
        print(json.dumps(memory(args.names[0], args.layers, args.width)))


if __name__ == "__main__":
    main()
