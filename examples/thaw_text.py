"""Thaws a pretrained text encoder in three stages: the head, the upper layers, the lower layers.

The model and the reviews are those of `finetune_text.py`. Each stage is a program of its own and
pays for what it trains; between two of them the optimizer's state goes on. The job asserts that
every group has each of its bits until its own start, and that the embeddings, which no stage names,
have them to the end. Beside it, as many steps are taken with the head alone, and with everything
trained from the start. It draws what a step of each stage takes, how far each group has moved at
the end of each, and what comes of it on films that no run has seen.

    python examples/thaw_text.py

The first time, two wheels are downloaded (93 MB) and kept; after that the job needs no network.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optax
import reviews
import task
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from rich.console import Console
from rich.table import Table

import frozen_optax as fo

HEAD, UPPER, LOWER = "head", "encoder/layer_[345]", "encoder/layer_[012]"
NAMES = {HEAD: "head", UPPER: "layers 3 to 5", LOWER: "layers 0 to 2"}


def make_optimizer(group: Any, _start: int) -> optax.GradientTransformation:
    """Large steps for what is new, small ones for what is pretrained, and these warmed up.

    A schedule counts the steps of its group, so that it begins when the group does.
    """
    if group == HEAD:
        return optax.adamw(1e-3)
    return optax.adamw(optax.linear_schedule(0.0, 5e-5, 5))


def optimizer_of(stage: fo.Stage) -> Any:
    """The optimizer of a stage, which clips by the norm of all that trains in it."""
    return stage.optimizer(make_optimizer, before=optax.clip_by_global_norm(1.0))


def thaw(
    before: task.Params,
    stages: Sequence[fo.Stage],
    data: reviews.Reviews,
    *,
    bar: task.Bar,
    **settings: int,
) -> list[task.Run]:
    """Trains stage by stage, and returns what each ends with.

    Raises:
      AssertionError: it is not proved that the steps of a stage leave alone what it freezes; a leaf
        that no stage has trained yet is not, bit for bit, what it was.
    """
    # The frozen arrays are the ones that went in: only a record of their bits tells whether they
    # are as they were.
    pretrained = [fo.fingerprint(before, stage.frozen) for stage in stages]
    run, runs = task.Run(before, 0.0), []
    for stage, fingerprint in zip(stages, pretrained, strict=True):
        assert stage.stop is not None
        steps = range(stage.start, stage.stop)
        optimizer = optimizer_of(stage)
        run = task.train(
            run.params, optimizer, data, steps=steps, state=run.state, bar=bar, **settings
        )
        fo.assert_fingerprint(run.params, fingerprint)
        fo.assert_frozen(before, run.params, optimizer)  # it fails too if nothing has moved
        runs.append(run)
    return runs


def moved(before: task.Params, after: task.Params) -> dict[str, float]:
    """How far each group has moved, as a share of what it was; that of a layer is its mean."""
    layers = task.distances(before, after)
    groups = {
        "embeddings": ["embeddings"],
        NAMES[LOWER]: ["layer_0", "layer_1", "layer_2"],
        NAMES[UPPER]: ["layer_3", "layer_4", "layer_5"],
        NAMES[HEAD]: ["head"],
    }
    return {
        name: float(np.mean([layers[layer] for layer in each])) for name, each in groups.items()
    }


def draw(
    ratios: dict[str, float],
    distances: list[dict[str, float]],
    scores: dict[str, task.Score],
    path: Path,
) -> None:
    """Writes a picture of what stages cost, what they move and what comes of it to `path`."""
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    cost, movement, quality = figure.subplots(1, 3, width_ratios=[1, 1.3, 1])
    colors = ["#0072B2", "#3B8DBD", "#009E73", "#E69F00"]

    names = [*ratios, "everything from the start"]
    bars = cost.barh(names, [*ratios.values(), 1.0], color=[*colors[: len(ratios)], colors[3]])
    cost.bar_label(bars, fmt="%.2f", padding=3, fontsize=9)
    cost.set_xlim(0, 1.25 * max(1.0, *ratios.values()))
    cost.invert_yaxis()  # the first stage at the top
    cost.set_title("time of a step,\nratio to full fine-tuning")

    for column, each in enumerate(distances):
        for row, distance in enumerate(each.values()):
            held = distance == 0
            text = "0\nevery bit" if held else f"{distance:.2%}"
            movement.add_patch(
                Rectangle(
                    (column - 0.48, row - 0.47),
                    0.96,
                    0.94,
                    color="#E8E8E8" if held else colors[column],
                )
            )
            movement.text(
                column, row, text, ha="center", va="center", color="#333333" if held else "white"
            )
    movement.set_xlim(-0.5, len(distances) - 0.5)
    movement.set_ylim(-0.5, len(distances[0]) - 0.5)
    movement.set_xticks(range(len(distances)), [f"stage {n + 1}" for n in range(len(distances))])
    movement.set_yticks(range(len(distances[0])), list(distances[0]))
    movement.tick_params(length=0)
    movement.set_title("how far a group has moved\nat the end of a stage")

    trained = {name: scores[name] for name in ("head only", "in stages", "everything")}
    shades = [colors[0], colors[2], colors[3]]
    bars = quality.bar(list(trained), [100 * each.accuracy for each in trained.values()])
    for bar, color in zip(bars, shades, strict=True):
        bar.set_color(color)
    labels = [f"{each.accuracy:.1%}\n{each.cross_entropy:.3f} nats" for each in trained.values()]
    quality.bar_label(bars, labels, padding=3, fontsize=9)
    quality.axhline(100 * scores["constant"].accuracy, color="#777777", linestyle=":")
    quality.set_ylim(0, 100)
    quality.set_title("held-out reviews told right, %\n(dotted: without reading)")

    for axes in (cost, movement, quality):
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the job as the command line says.

    Returns:
      The held-out `scores` of each way to train, and the `ratios` of a stage's step to one of full
      fine-tuning.

    Raises:
      AssertionError: a group is not bit for bit what it was before its start.
      SystemExit: an argument is wrong, or the model or the reviews cannot be had.
    """
    settings = task.parse(
        arguments, __doc__, "thaw_text.png", task.Size(75, 32, 1000), task.Size(18, 16, 200)
    )
    if settings.steps < 3:
        raise SystemExit(f"three stages need three steps at least, got --steps {settings.steps}.")
    training, held_out, before = task.load(settings)
    third, steps = settings.steps // 3, settings.steps
    stages = fo.stages({HEAD: 0, UPPER: third, LOWER: 2 * third}, stop=steps)
    # The same groups and the same clipping, so that nothing differs but when they begin.
    (head,) = fo.stages({HEAD: 0}, stop=steps)
    (everything,) = fo.stages({HEAD: 0, "encoder": 0}, stop=steps)
    options = {"batch_size": settings.batch_size, "seed": settings.seed}

    def run(title: str, stages: Sequence[fo.Stage]) -> list[task.Run]:
        with task.Bar(title, steps) as bar:
            return thaw(before, stages, training, bar=bar, **options)

    runs = {"head only": run("head only          ", [head])}
    runs["in stages"] = run("in stages          ", stages)
    with task.Bar("everything at once ", steps) as bar:
        optimizer = optimizer_of(everything)
        full = task.train(before, optimizer, training, steps=range(steps), bar=bar, **options)
    runs["everything"] = [full]
    scores = {"constant": task.score_constant(training, held_out)}
    scores |= {name: task.score(each[-1].params, held_out) for name, each in runs.items()}

    titles = [f"{n + 1}: " + ", ".join(NAMES[g] for g in s.groups) for n, s in enumerate(stages)]
    ratios = {
        title: run.seconds_per_step / full.seconds_per_step
        for title, run in zip(titles, runs["in stages"], strict=True)
    }
    table = Table("stage: what trains", "steps", "time per step", "ratio to everything")
    for stage, (title, ratio) in zip(stages, ratios.items(), strict=True):
        table.add_row(
            title,
            f"{stage.start} to {stage.stop - 1}",
            f"{1e3 * ratio * full.seconds_per_step:.0f} ms",
            f"{ratio:.2f}",
        )
    table.add_row(
        "everything from the start",
        f"0 to {steps - 1}",
        f"{1e3 * full.seconds_per_step:.0f} ms",
        "1.00",
    )
    Console().print(table)
    table = Table("held-out reviews", "accuracy", "cross-entropy")
    for name, score in scores.items():
        table.add_row(name, f"{score.accuracy:.1%}", f"{score.cross_entropy:.3f} nats")
    Console().print(table)
    print("Every group kept every bit until its start, and the embeddings to the end.")
    distances = [moved(before, run.params) for run in runs["in stages"]]
    draw(ratios, distances, scores, settings.output)
    print(f"What stages cost, what they moved, and what came of it: {settings.output}")
    return {"scores": scores, "ratios": list(ratios.values()), "distances": distances}


if __name__ == "__main__":
    main()
