"""Prints the figures that the README quotes: `python -m benchmarks.claims`, some minutes on two cores.

1. How many optimizers move a frozen leaf, let frozen gradients steer the trained part, or raise, under each way of
   freezing. Three steps of each optimizer of the catalogue on a small model with finite frozen gradients, op by op, so
   that two runs of the same arithmetic agree in every bit.
2. What assigning weights back saves: FLOPs, bytes accessed, bytes returned and optimizer state of a compiled step, as
   ratios to the step of the trainable part alone.
3. How long it takes to resolve ten patterns on 100,000 leaves.
"""

import platform
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import track
from rich.table import Table

import frozen_optax as fo
from benchmarks.catalogue import NAMES, extra_args, make

STEPS = 3
MASK = {"encoder": True, "head": False}
Way = Callable[[optax.GradientTransformation], optax.GradientTransformation]

WAYS: dict[str, Way] = {
    "optax.chain(optax.freeze(mask), tx)": lambda tx: optax.chain(optax.freeze(MASK), tx),
    "optax.chain(tx, optax.freeze(mask))": lambda tx: optax.chain(tx, optax.freeze(MASK)),
    "optax.selective_transform(tx, freeze_mask=mask)": lambda tx: optax.selective_transform(tx, freeze_mask=MASK),
    "fo.with_frozen(tx, 'encoder')": lambda tx: fo.with_frozen(tx, "encoder"),
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
        hidden = hidden + (table - jax.lax.stop_gradient(table)) + (kernel - jax.lax.stop_gradient(kernel))
    return jnp.mean((jnp.tanh(hidden @ params["head"]["kernel"] + params["head"]["bias"]) - 0.5) ** 2)


def _run(name: str, wrap: Way, params: Any, apply: Callable[[Any, Any], Any]) -> Any:
    """The parameters after a few compiled steps; both trees as one for lookahead."""
    tx = optax.with_extra_args_support(wrap(make(name)))
    params = optax.LookaheadParams.init_synced(params) if name == "lookahead" else params

    def step(params: Any, state: Any) -> Any:
        one = params.fast if name == "lookahead" else params
        gradients = jax.grad(_loss)(one)
        updates, state = tx.update(gradients, state, params, **extra_args(name, _loss, one, gradients))
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


def optimizers(console: Console) -> None:
    """Prints, way by way, what becomes of each optimizer."""
    table = Table(title=f"{len(NAMES)} optimizers and transforms of optax and optax.contrib, three steps")
    kinds = {"moves": "frozen leaves move", "steered": "frozen gradients steer", "raises": "raises", "exact": "neither"}
    for column in ("", *kinds.values()):
        table.add_column(column, justify="left" if not column else "right")
    for title, wrap in WAYS.items():
        apply = fo.apply_updates if title.startswith("fo.") else optax.apply_updates
        found = {name: _outcome(name, wrap, apply) for name in track(NAMES, title, console=console, transient=True)}
        names = {kind: [name for name in NAMES if found[name] == kind] for kind in kinds}
        table.add_row(title, *(str(len(names[kind])) for kind in kinds))
        for kind in ("moves", "steered", "raises"):
            if names[kind]:
                console.print(f"[dim]{title}, {kind}: {', '.join(names[kind])}[/dim]", highlight=False)
    console.print(table)


def restoring(console: Console) -> None:
    """Prints what a compiled step costs, way by way."""
    layers, width = 8, 256
    params = {f"layer_{i}": jnp.full((width, width), 0.01) for i in range(layers)}
    last = f"layer_{layers - 1}"
    x = jnp.ones((64, width))

    def loss(params: Any) -> Any:
        hidden = x
        for i in range(layers):
            hidden = jnp.tanh(hidden @ params[f"layer_{i}"])
        return jnp.mean(hidden**2)

    def cost(step: Callable[..., Any], state: Any, params: Any = params) -> list[float]:
        compiled = jax.jit(step).lower(params, state).compile()
        analysis: Any = compiled.cost_analysis()
        output = compiled.memory_analysis().output_size_in_bytes  # pyright: ignore
        return [analysis["flops"], analysis["bytes accessed"], output, sum(x.nbytes for x in jax.tree.leaves(state))]

    def restored(tx: optax.GradientTransformation) -> list[float]:
        def step(params: Any, state: Any) -> Any:
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return fo.restore(optax.apply_updates(params, updates), params, trainable=last), state

        return cost(step, tx.init(params))

    def plain(tx: optax.GradientTransformation) -> list[float]:
        def step(params: Any, state: Any) -> Any:
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return fo.apply_updates(params, updates), state

        return cost(step, tx.init(params))

    def limit(tx: optax.GradientTransformation) -> list[float]:
        rest = {name: leaf for name, leaf in params.items() if name != last}

        def step(trainable: Any, state: Any) -> Any:
            updates, state = tx.update(jax.grad(lambda part: loss(rest | part))(trainable), state, trainable)
            return optax.apply_updates(trainable, updates), state

        trainable = {last: params[last]}
        return cost(step, tx.init(trainable), trainable)

    table = Table(
        title=f"one step of {layers} layers of {width} x {width}, the last one trained, as ratios to the limit"
    )
    for column in ("", "FLOPs", "bytes accessed", "bytes out", "optimizer state"):
        table.add_column(column, justify="right" if column else "left")
    clipped = lambda optimizer: optax.chain(optax.clip_by_global_norm(1.0), optimizer)
    named = {"sgd": optax.sgd(0.1), "adam": optax.adam(0.1), "clip + adam": clipped(optax.adam(0.1))}
    for name, optimizer in named.items():
        base = limit(optimizer)
        rows = {
            "nothing frozen": plain(optimizer),
            "restore": restored(optimizer),
            "freeze last": plain(optax.chain(optimizer, fo.freeze(trainable=last))),
            "with_frozen": plain(fo.with_frozen(optimizer, trainable=last)),
        }
        for way, figures in rows.items():
            ratios = [f"{a / b:.2f}" if b else "-" for a, b in zip(figures, base, strict=True)]
            table.add_row(f"{name}: {way}", *ratios)
    console.print(table)


def selecting(console: Console) -> None:
    """Prints how long ten patterns on 100,000 leaves take."""
    leaf = jax.ShapeDtypeStruct((), jnp.float32)
    tree = {f"layer_{i:04d}": {f"part_{j}": {"kernel": leaf, "bias": leaf} for j in range(10)} for i in range(5_000)}
    selector = fo.by_path(*[f"**/part_{j}/kernel" for j in range(10)])
    start = time.perf_counter()
    count = len(selector.paths(tree))
    first = time.perf_counter() - start
    start = time.perf_counter()
    selector.paths(tree)
    again = time.perf_counter() - start
    console.print(f"ten patterns on 100,000 leaves select {count:,}: {first:.1f} s, {again:.2f} s when resolved before")


def main() -> None:
    """Prints all figures."""
    console = Console(width=140)
    console.print(
        f"jax {jax.__version__}, optax {optax.__version__}, Python {platform.python_version()}, "
        f"{jax.devices()[0].platform} ({platform.machine()})"
    )
    selecting(console)
    restoring(console)
    optimizers(console)


if __name__ == "__main__":
    main()
