"""What ten epochs take live, from features cached by hand, and hoisted; the cache is counted.

Prints one line of JSON. 12 layers of 512 x 512 and 2,048 examples, of which batches of 32 are drawn
in another order in each epoch. The last layer is trained, or the last four. Compilation is left
out.
"""

import json
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import frozen_optax as fo
from benchmarks.measures import spread

LAYERS, WIDTH, EXAMPLES, ROWS = 12, 512, 2048, 32
EPOCHS, ROUNDS = 10, 7
NAMES = [f"layer_{index:02d}" for index in range(LAYERS)]

Params = dict[str, Any]
Data = tuple[np.ndarray, np.ndarray]


def make_params() -> Params:
    """A kernel a layer."""
    keys = jax.random.split(jax.random.key(0), LAYERS)
    kernels = [jax.random.normal(key, (WIDTH, WIDTH)) * WIDTH**-0.5 for key in keys]
    return dict(zip(NAMES, kernels, strict=True))


def make_data() -> Data:
    """Inputs and labels."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((EXAMPLES, WIDTH), np.float32)
    return x, rng.integers(0, WIDTH, EXAMPLES).astype(np.int32)


def through(params: Params, x: Any, names: list[str]) -> Any:
    """Some layers, one after the other."""
    for name in names:
        x = jnp.tanh(x @ params[name])
    return x


def loss_from(first: int) -> Callable[..., Any]:
    """The loss from what goes into a layer."""

    def loss(params: Params, x: Any, y: Any) -> Any:
        logits = through(params, x, NAMES[first:])
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return loss


def epoch_of(loss: Callable[..., Any], tx: Any, pick: Callable[[Any], Any]) -> Callable[[int], Any]:
    """A function that trains for an epoch, and goes on from the one before."""

    @fo.jit(frozen=tx)
    def step(params: Params, state: Any, *batch: Any) -> Any:
        value, grads = fo.value_and_grad(loss, tx)(params, *batch)
        updates, state = tx.update(grads, state, params)
        return fo.apply_updates(params, updates), state, value

    params = make_params()
    state = tx.init(params)

    def epoch(number: int) -> None:
        nonlocal params, state
        value = None
        order = np.random.default_rng(number).permutation(EXAMPLES)
        for indices in np.split(order, EXAMPLES // ROWS):
            params, state, value = step(params, state, *pick(indices))
        jax.block_until_ready(value)

    return epoch


def seconds(call: Callable[[], Any]) -> float:
    """What a call takes."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def measured(trained: int) -> dict[str, dict[str, Any]]:
    """For each way: preparing, an epoch, and bytes that are kept of an example."""
    params, (x, y) = make_params(), make_data()
    first = LAYERS - trained
    tx = fo.with_frozen(optax.adamw(1e-3), trainable=NAMES[first:])
    batches = [(x[i : i + ROWS], y[i : i + ROWS]) for i in range(0, EXAMPLES, ROWS)]

    features = jax.jit(lambda x: through(params, x, NAMES[:first]))
    by_hand = lambda: np.concatenate([np.asarray(features(x)) for x, _ in batches])
    hoisted = fo.hoist(loss_from(0), tx)
    prepare = jax.jit(hoisted.prepare)
    of_batch = lambda batch: jax.device_get(prepare(params, *batch))
    by_hoist = lambda: hoisted.join([of_batch(batch) for batch in batches])
    cached, rows = by_hand(), by_hoist()

    epochs = {
        "live": epoch_of(loss_from(0), tx, lambda at: (x[at], y[at])),
        "by hand": epoch_of(loss_from(first), tx, lambda at: (cached[at], y[at])),
        "fo.hoist": epoch_of(hoisted, tx, lambda at: (rows[at],)),
    }
    preparing: dict[str, Callable[[], Any]] = {"by hand": by_hand, "fo.hoist": by_hoist}
    prepared: dict[str, list[float]] = {name: [] for name in preparing}
    times: dict[str, list[float]] = {name: [] for name in epochs}
    for number in range(ROUNDS + 1):  # the first compiles
        for name, call in preparing.items():
            prepared[name].append(seconds(call))
        for name, epoch in epochs.items():
            times[name].append(seconds(lambda epoch=epoch, number=number: epoch(number)))
    kept = {"live": 0, "by hand": cached[0].nbytes + y.itemsize, "fo.hoist": rows.bytes_per_example}
    return {
        name: {
            "prepare": spread(prepared[name][1:]) if name in prepared else None,
            "epoch": spread(times[name][1:]),
            "bytes": kept[name],
        }
        for name in epochs
    }


def main() -> None:
    """Measures three ways, with one layer trained and with four."""
    print(json.dumps({"hoisting": {str(trained): measured(trained) for trained in (1, 4)}}))


if __name__ == "__main__":
    main()
