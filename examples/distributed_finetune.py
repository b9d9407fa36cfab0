r"""Fine-tunes adapters and a head on a frozen backbone that lies over the devices of all processes.

The same script runs on a TPU pod, on a cluster of GPUs, and as a rehearsal on the CPU of one
machine. It is started once in each process: on a TPU pod, and under Slurm or MPI, without a word on
the others, as `jax.distributed.initialize` asks the cluster for them,

    python examples/distributed_finetune.py --checkpoints /shared/run

and elsewhere with them said, here the first of two processes of four CPU devices each:

    python examples/distributed_finetune.py --checkpoints /tmp/run --cpu-devices 4 \
        --coordinator 127.0.0.1:4321 --processes 2 --process-id 0

Each device holds a part of every matrix, of its gradient and of its optimizer state (FSDP). Before
its first step the run proves that no step can move the backbone; after its last it asserts that the
backbone has the bits that it began with. A run that is started again after one of its processes was
lost goes on from the last checkpoint.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import frozen_optax as fo

CLASSES, RANK = 8, 4
TX = fo.with_frozen(
    optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-3)), trainable=["adapters", "head"]
)

# --- the model: put your own here


def init_params(seed: int, layers: int, width: int) -> Any:
    """Stands for what loads your backbone: that in bfloat16, what is trained in float32."""
    keys = jax.random.split(jax.random.key(seed), 2 * layers + 1)

    def matrix(key: jax.Array, shape: tuple[int, int], dtype: Any = "bfloat16") -> jax.Array:
        return (jax.random.normal(key, shape) * shape[0] ** -0.5).astype(dtype)

    wide, names = 4 * width, [f"layer_{index}" for index in range(layers)]
    return {
        "backbone": {
            name: {"up": matrix(up, (width, wide)), "down": matrix(down, (wide, width))}
            for name, up, down in zip(names, keys[::2], keys[1::2], strict=False)
        },
        "adapters": {
            name: {
                "a": matrix(jax.random.fold_in(key, 1), (width, RANK), "float32"),
                "b": jnp.zeros((RANK, width)),
            }
            for name, key in zip(names, keys[::2], strict=False)
        },
        "head": {"kernel": matrix(keys[-1], (width, CLASSES), "float32")},
    }


def logits(params: Any, x: jax.Array) -> jax.Array:
    """Of inputs of shape (examples, width), of shape (examples, CLASSES)."""
    for name, layer in params["backbone"].items():
        adapter = params["adapters"][name]
        up, down = (layer[key].astype("float32") for key in ("up", "down"))
        x = x + jax.nn.gelu(x @ up) @ down + x @ adapter["a"] @ adapter["b"]
    return x @ params["head"]["kernel"]


def loss(params: Any, x: jax.Array, label: jax.Array) -> jax.Array:
    """The mean cross-entropy of a batch, in nats."""
    each = optax.softmax_cross_entropy_with_integer_labels(logits(params, x), label)
    return each.mean()


def example(seed: int, step: int, row: int, width: int) -> tuple[np.ndarray, int]:
    """One example of a batch: whoever asks for this row of this step gets this one."""
    x = np.random.default_rng([seed, step, row]).standard_normal(width, np.float32)
    return x, int(np.argmax(x[:CLASSES]))


# --- where it lies


def shardings(shapes: Any, mesh: Mesh) -> Any:
    """Each leaf over all devices, along the first of its axes that they divide."""

    def of(leaf: Any) -> NamedSharding:
        divided = [axis for axis, size in enumerate(leaf.shape) if size % mesh.size == 0]
        return NamedSharding(mesh, P(*[None] * divided[0], "fsdp") if divided else P())

    return jax.tree.map(of, shapes)


def make_mesh() -> Mesh:
    """All devices of all processes in a row."""
    return jax.make_mesh((jax.device_count(),), ("fsdp",), axis_types=(AxisType.Auto,))


def make_state(mesh: Mesh, settings: argparse.Namespace) -> Any:
    """The parameters and the optimizer state: each device makes its own part, and nothing else."""
    make = lambda: init_params(settings.seed, settings.layers, settings.width)
    params = jax.jit(make, out_shardings=shardings(jax.eval_shape(make), mesh))()
    # Moments lie as their parameters do; a count is made on one device, and has to be on each.
    on_each = NamedSharding(mesh, P())
    place = lambda leaf: leaf if leaf.committed else jax.device_put(leaf, on_each)
    return params, jax.tree.map(place, TX.init(params))


def make_batch(mesh: Mesh, settings: argparse.Namespace, step: int) -> Any:
    """The inputs and labels of a step: each process makes the rows of its own devices."""
    shape = (settings.batch_size, settings.width)
    split = NamedSharding(mesh, P("fsdp"))

    def rows(index: tuple[slice, ...]) -> list[tuple[np.ndarray, int]]:
        asked = range(*index[0].indices(shape[0]))
        return [example(settings.seed, step, row, shape[1]) for row in asked]

    x = jax.make_array_from_callback(
        shape, split, lambda index: np.stack([x for x, _ in rows(index)])
    )
    label = jax.make_array_from_callback(
        shape[:1], split, lambda index: np.array([label for _, label in rows(index)], np.int32)
    )
    return x, label


# --- training


@fo.jit(frozen=TX, donate_argnums=(0, 1))
def train_step(params: Any, opt_state: Any, x: jax.Array, label: jax.Array) -> Any:
    """One step of what is trained."""
    value, grads = fo.value_and_grad(loss, TX)(params, x, label)
    updates, opt_state = TX.update(grads, opt_state, params)
    return fo.apply_updates(params, updates), opt_state, value


class Checkpoints:
    """The last two states of a run: each process writes, and reads, the parts that it holds.

    A checkpoint has its name only when all parts are written, so that a run which is killed leaves
    whole ones.
    """

    def __init__(self, directory: Path):
        self._manager = ocp.CheckpointManager(
            directory.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=2)
        )

    def latest(self) -> int:
        """The step of the last one, 0 if there is none."""
        return self._manager.latest_step() or 0

    def save(self, step: int, state: Any) -> None:
        """Writes the state after a step, and waits until it is there."""
        self._manager.save(step, args=ocp.args.StandardSave(state))
        self._manager.wait_until_finished()

    def restore(self, step: int, like: Any) -> Any:
        """The state after a step, in the shapes, dtypes and shardings of another."""
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        return self._manager.restore(step, args=ocp.args.StandardRestore(shapes))

    def close(self) -> None:
        """To be called at the end."""
        self._manager.close()


def say(text: str) -> None:
    """Prints in one process of all."""
    if jax.process_index() == 0:
        print(text, flush=True)


def train(settings: argparse.Namespace) -> dict[str, Any]:
    """Trains on all devices, from the last checkpoint if there is one, to the last step.

    Returns:
      What the run did: from which step it went on, the loss of each step, and the fingerprints of
      the frozen and of the trained leaves.

    Raises:
      AssertionError: the step is not proved to leave the backbone alone, or the backbone has other
        bits than at the beginning.
    """
    mesh = make_mesh()
    if settings.batch_size % mesh.size:
        raise SystemExit(f"--batch-size has to be a multiple of the {mesh.size} devices.")
    params, opt_state = make_state(mesh, settings)
    backbone = fo.fingerprint(params, TX)
    batch = make_batch(mesh, settings, 0)
    fo.assert_step_freezes(train_step, params, opt_state, *batch, frozen=TX, exact=True)
    say(f"{mesh.size} devices of {jax.process_count()} processes; no step can move the backbone")

    checkpoints = Checkpoints(settings.checkpoints)
    begin = checkpoints.latest()
    if begin:
        fresh = params
        params, opt_state = checkpoints.restore(begin, (params, opt_state))
        fo.assert_frozen(fresh, params, TX)
        say(f"goes on after step {begin}")
    losses = []
    for step in range(begin + 1, settings.steps + 1):
        x, label = make_batch(mesh, settings, step)
        params, opt_state, value = train_step(params, opt_state, x, label)
        losses.append(float(value))
        say(f"step {step}: loss {losses[-1]:.9g}")  # all digits of a float32
        if step % settings.save_every == 0 or step == settings.steps:
            checkpoints.save(step, (params, opt_state))
            say(f"saved step {step}")
    checkpoints.close()
    fo.assert_fingerprint(params, backbone)
    say(f"all {len(backbone)} frozen arrays kept every bit")
    return {
        "begin": begin,
        "devices": mesh.size,
        "processes": jax.process_count(),
        "losses": losses,
        "frozen": backbone,
        "trained": fo.fingerprint(params, ~TX.frozen),
    }


# --- the processes


def join(settings: argparse.Namespace) -> None:
    """Makes this process one of the run's; what is not said, the cluster is asked for."""
    if settings.cpu_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", settings.cpu_devices)
    if settings.processes == 1:
        return
    if settings.cpu_devices:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        settings.coordinator,
        settings.processes,
        settings.process_id,
        heartbeat_timeout_seconds=settings.lost_after,
    )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    whole = {"type": int, "metavar": "N"}
    cluster = parser.add_argument_group("the processes (default: what the cluster says)")
    cluster.add_argument("--coordinator", metavar="HOST:PORT", help="of the first process")
    cluster.add_argument("--processes", **whole, help="how many there are; 1 needs no cluster")
    cluster.add_argument("--process-id", **whole, help="which of them this is, from 0")
    cluster.add_argument("--cpu-devices", **whole, help="run on so many CPU devices a process")
    lost = "seconds without a word from a process until the others end (default: %(default)s)"
    cluster.add_argument("--lost-after", **whole, default=100, help=lost)
    run = parser.add_argument_group("the run")
    run.add_argument("--checkpoints", type=Path, required=True, help="a folder that all can reach")
    run.add_argument("--steps", **whole, default=100, help="to train to (default: %(default)s)")
    run.add_argument("--save-every", **whole, default=50, help="steps (default: %(default)s)")
    run.add_argument("--report", type=Path, help="where the first process writes what was done")
    for name, default in {"layers": 4, "width": 256, "batch-size": 64, "seed": 0}.items():
        run.add_argument(f"--{name}", **whole, default=default, help="(default: %(default)s)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the job as the command line says, and returns what `train` does.

    Raises:
      AssertionError: as `train`.
      SystemExit: an argument is wrong.
    """
    settings = parse(arguments)
    join(settings)
    begin = time.monotonic()
    report = train(settings)
    say(f"{len(report['losses'])} steps in {time.monotonic() - begin:.1f} s, compilation included")
    if settings.report and jax.process_index() == 0:
        settings.report.write_text(json.dumps(report))
    if settings.processes != 1:
        jax.distributed.shutdown()
    return report


if __name__ == "__main__":
    main()
