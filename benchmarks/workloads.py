"""The models that are trained: how large, what of them is trained, and what a step costs on paper.

Names are padded with zeros, as `jax.jit` sorts the keys of a dict: `layer_10` comes before
`layer_2`, and the last layer of the model would not be the last in its tree.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model, as a dict of groups of leaves, of which some groups are trained."""

    title: str
    params: Tree
    loss: Callable[[Any, Any], Any]
    batch: Any
    trained: frozenset[str]
    products: int | None  # matrix products of a step written by hand; None where a loop hides them
    product_flops: float  # of each

    def part(self, trained: bool) -> Tree:
        """The groups that are trained, or those that are not."""
        return {
            name: group for name, group in self.params.items() if (name in self.trained) is trained
        }

    def mask(self) -> Tree:
        """True at each frozen leaf."""
        return {
            name: jax.tree.map(lambda _, name=name: name not in self.trained, g)
            for name, g in self.params.items()
        }

    @property
    def trained_count(self) -> int:
        """How many numbers are trained."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.part(trained=True)))


def _products(layers: int, trained: set[int]) -> int:
    """Forward through all layers, back to the first trained one, once for each trained kernel."""
    return layers + (layers - 1 - min(trained)) + len(trained)


def unrolled(layers: int, width: int, rows: int, trained: set[int], small_leaves: bool) -> Workload:
    """Layers one by one, each a kernel, and with `small_leaves` three vectors more."""
    names = [f"layer_{i:05d}" for i in range(layers)]
    keys = jax.random.split(jax.random.key(0), layers)
    shape = (width, width)

    def group(key: Any) -> Tree:
        kernel = jax.random.normal(key, shape) / width**0.5
        vectors = {"bias": jnp.zeros(width), "scale": jnp.ones(width), "shift": jnp.zeros(width)}
        return {"kernel": kernel} | (vectors if small_leaves else {})

    def loss(params: Tree, x: Any) -> Any:
        for name in names:
            group = params[name]
            x = x @ group["kernel"]
            x = (
                jnp.tanh(x + group["bias"]) * group["scale"] + group["shift"]
                if small_leaves
                else jnp.tanh(x)
            )
        return jnp.mean(x**2)

    return Workload(
        title=f"{layers:,} layers of {width} x {width}",
        params={name: group(key) for name, key in zip(names, keys, strict=True)},
        loss=loss,
        batch=jnp.ones((rows, width)),
        trained=frozenset(names[i] for i in trained),
        products=_products(layers, trained),
        product_flops=2.0 * rows * width**2,
    )


def scanned(layers: int, width: int, rows: int, rank: int) -> Workload:
    """One `scan` over stacked layers, each with a frozen kernel and a trained pair of low rank."""
    keys = jax.random.split(jax.random.key(0), 2)

    def loss(params: Tree, x: Any) -> Any:
        def layer(x: Any, group: Tree) -> Any:
            return jnp.tanh(x @ group["kernel"] + (x @ group["lora_a"]) @ group["lora_b"]), None

        return jnp.mean(jax.lax.scan(layer, x, params)[0] ** 2)

    stack = f"scan over {layers} stacked layers of {width} x {width}"
    return Workload(
        title=f"{stack}, adapters of rank {rank} trained",
        params={
            "kernel": jax.random.normal(keys[0], (layers, width, width)) / width**0.5,
            "lora_a": jax.random.normal(keys[1], (layers, width, rank)) / width**0.5,
            "lora_b": jnp.zeros((layers, rank, width)),
        },
        loss=loss,
        batch=jnp.ones((rows, width)),
        trained=frozenset({"lora_a", "lora_b"}),
        products=None,
        product_flops=2.0 * rows * width**2,
    )


NEW = "new"  # the rows of an embedding that train, where they are an array of their own


def embedding(rows: int, width: int, new: int) -> Workload:
    """A table of which the last rows are new tokens and train, with a head on top.

    The new rows are an array of their own, and are chosen at look-up: what PEFT calls trainable
    tokens.
    """
    keys = jax.random.split(jax.random.key(0), 4)
    old = rows - new

    def loss(params: Tree, tokens: Any) -> Any:
        is_new = tokens >= old
        of_new = params[NEW][jnp.where(is_new, tokens - old, 0)]
        of_old = params["table"][jnp.where(is_new, 0, tokens)]
        return _tokens_loss(jnp.where(is_new[..., None], of_new, of_old), params)

    tokens = jax.random.randint(keys[3], (8, 128), 0, rows).at[:, :new].set(jnp.arange(old, rows))
    return Workload(
        title=f"a table of {rows:,} x {width}, of which {new} rows train",
        params={
            "head": jax.random.normal(keys[0], (width, 8)) / width**0.5,
            NEW: jax.random.normal(keys[1], (new, width)),
            "table": jax.random.normal(keys[2], (old, width)),
        },
        loss=loss,
        batch=tokens,
        trained=frozenset({"head", NEW}),
        products=None,
        product_flops=0.0,
    )


def _tokens_loss(embedded: Any, params: Tree) -> Any:
    return jnp.mean((jnp.tanh(embedded.mean(axis=1)) @ params["head"]) ** 2)


def in_one_table(workload: Workload) -> Workload:
    """The workload of `embedding` with old and new rows in one table, as models have it."""
    table = jnp.concatenate([workload.params["table"], workload.params[NEW]])

    def loss(params: Tree, tokens: Any) -> Any:
        return _tokens_loss(params["table"][tokens], params)

    return dataclasses.replace(
        workload,
        params={"head": workload.params["head"], "table": table},
        loss=loss,
        trained=frozenset({"head", "table"}),
    )


def require_products(workload: Workload, program: str, flops: float) -> None:
    """Raise where the compiled step written by hand does not do what it has to on paper."""
    if workload.products is None:
        return
    found, expected = program.count(" dot("), workload.products
    needed = expected * workload.product_flops
    if found != expected or flops < needed:
        raise ValueError(
            f"{workload.title}: a step takes {expected} matrix products, {needed:.4g} FLOPs; "
            f"what was compiled takes {found}, {flops:.4g} FLOPs in all. "
            "Are the layers where their names say?"
        )
