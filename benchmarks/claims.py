"""What becomes of each optimizer under each way of freezing, and how long patterns take.

Three steps of each optimizer of the catalogue on a small model with finite frozen gradients, op by
op, so that two runs of the same arithmetic agree in every bit: frozen leaves move, frozen gradients
steer the trained part, it raises, or none of these. Prints one line of JSON.
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
from benchmarks.catalogue import NAMES, extra_args, make

STEPS = 3
MASK = {"encoder": True, "head": False}
Way = Callable[[optax.GradientTransformation], optax.GradientTransformation]

WAYS: dict[str, Way] = {
    "optax.freeze before": lambda tx: optax.chain(optax.freeze(MASK), tx),
    "optax.freeze after": lambda tx: optax.chain(tx, optax.freeze(MASK)),
    "optax.selective_transform": lambda tx: optax.selective_transform(tx, freeze_mask=MASK),
    "fo.with_frozen": lambda tx: fo.with_frozen(tx, "encoder"),
}


def _params() -> dict[str, Any]:
    encoder, head = jax.random.split(jax.random.key(0))
    return {
        "encoder": {"kernel": jax.random.normal(encoder, (3, 4)), "table": jnp.full((4,), 2.0)},
        "head": {"bias": jnp.full((3,), 0.1), "kernel": jax.random.normal(head, (4, 3))},
    }


def _loss(params: Any) -> Any:
    hidden = jnp.linspace(-1.0, 1.0, 12).reshape(3, 4)
    if "encoder" in params:  # a gradient for the frozen leaves, without a part in the value
        table, kernel = params["encoder"]["table"], params["encoder"]["kernel"]
        hidden = (
            hidden
            + (table - jax.lax.stop_gradient(table))
            + (kernel - jax.lax.stop_gradient(kernel))
        )
    return jnp.mean(
        (jnp.tanh(hidden @ params["head"]["kernel"] + params["head"]["bias"]) - 0.5) ** 2
    )


def _run(name: str, wrap: Way, params: Any, apply: Callable[[Any, Any], Any]) -> Any:
    """The parameters after a few compiled steps; both trees as one for lookahead."""
    tx = optax.with_extra_args_support(wrap(make(name)))
    params = optax.LookaheadParams.init_synced(params) if name == "lookahead" else params

    def step(params: Any, state: Any) -> Any:
        one = params.fast if name == "lookahead" else params
        gradients = jax.grad(_loss)(one)
        updates, state = tx.update(
            gradients, state, params, **extra_args(name, _loss, one, gradients)
        )
        return apply(params, updates), state

    state = tx.init(params)
    with jax.disable_jit():
        for _ in range(STEPS):
            params, state = step(params, state)
    return params.fast if name == "lookahead" else params


def _outcome(name: str, wrap: Way, apply: Callable[[Any, Any], Any]) -> str:
    params = _params()
    alone = _run(name, lambda tx: tx, {"head": params["head"]}, optax.apply_updates)
    try:
        after = _run(name, wrap, params, apply)
    except Exception:
        return "raises"
    same = lambda left, right: jax.tree.all(jax.tree.map(np.array_equal, left, right))
    if not same(after["encoder"], params["encoder"]):
        return "moves"
    return "exact" if same(after["head"], alone["head"]) else "steered"


def optimizers() -> dict[str, dict[str, list[str]]]:
    """The names of the optimizers, way by way, by what becomes of them."""
    found: dict[str, dict[str, list[str]]] = {}
    for title, wrap in WAYS.items():
        apply = fo.apply_updates if title.startswith("fo.") else optax.apply_updates
        found[title] = {kind: [] for kind in ("moves", "steered", "raises", "exact")}
        for name in NAMES:
            found[title][_outcome(name, wrap, apply)].append(name)
    return found


def selecting() -> dict[str, float]:
    """Seconds for ten patterns on 100,000 leaves, the first time and when resolved before."""
    leaf = jax.ShapeDtypeStruct((), jnp.float32)
    tree = {
        f"layer_{i:04d}": {f"part_{j}": {"kernel": leaf, "bias": leaf} for j in range(10)}
        for i in range(5_000)
    }
    selector = fo.by_path(*[f"**/part_{j}/kernel" for j in range(10)])
    taken = {}
    for time_of in ("first", "again"):
        start = time.perf_counter()
        selector.paths(tree)
        taken[time_of] = time.perf_counter() - start
    return taken


def main() -> None:
    """Measures both."""
    print(json.dumps({"selecting": selecting(), "optimizers": optimizers()}))


if __name__ == "__main__":
    main()
