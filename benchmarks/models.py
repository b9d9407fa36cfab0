"""Trees of Llama-3-70B and of DeepSeek-V3's shape, with adapters of low rank, on 256 devices.

Nothing is allocated: the trees are `ShapeDtypeStruct`s, the train step is compiled ahead of time
for a mesh of 256 devices, and XLA says what each device has to hold. Every matrix is split over all
devices along its first or last axis, as fully sharded data parallelism has it, and each device sees
one sequence. Attention is written out (no fused kernel), so the sequences are short. Prints one
line of JSON.
"""

import json
import math
import time
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.contenders import CONTENDERS, adamw, on_shapes
from benchmarks.measures import Figures, nbytes
from benchmarks.workloads import Tree, Workload

DEVICES, TOKENS, RANK = 256, 512, 16
KEPT = ["limit", "fo.jit", "optax.selective_transform", "chain(tx, optax.freeze)"]
DONATED = ["fo.jit", "optax.selective_transform"]

Shapes: TypeAlias = dict[str, tuple[int, ...]]


def _norm(x: Any, scale: Any) -> Any:
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6) * scale


def _adapted(x: Any, group: Tree, name: str) -> Any:
    """A frozen product, and beside it a trained one of low rank."""
    return x @ group[name] + (x @ group["adapters"][name]["a"].astype(x.dtype)) @ group["adapters"][
        name
    ]["b"].astype(x.dtype)


def _attend(q: Any, k: Any, v: Any) -> Any:
    """Causal attention over [batch, tokens, heads, size]; heads of k and v may be shared."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -1e9)
    out = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
    return out.reshape(*out.shape[:2], -1)


def _heads(x: Any, count: int) -> Any:
    return x.reshape(*x.shape[:2], count, -1)


def _stack(layers: int, shapes: Shapes, dtype: Any) -> Tree:
    return {name: jax.ShapeDtypeStruct((layers, *shape), dtype) for name, shape in shapes.items()}


def _adapters(layers: int, shapes: Shapes) -> Tree:
    pairs = {
        name: {"a": (rows, RANK), "b": (RANK, columns)} for name, (rows, columns) in shapes.items()
    }
    return {name: _stack(layers, pair, jnp.float32) for name, pair in pairs.items()}


def _language_model(
    title: str, width: int, vocabulary: int, stacks: dict[str, tuple[Any, int, Shapes, Shapes]]
) -> Workload:
    """Stacks of layers: one layer's function, how many, the shapes with and without adapters."""
    leaf = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    params: Tree = {
        "embed": leaf(vocabulary, width),
        "norm": leaf(width),
        "head": leaf(width, vocabulary),
    }
    params |= {
        name: _stack(n, adapted | rest, jnp.bfloat16)
        for name, (_, n, adapted, rest) in stacks.items()
    }
    params["adapters"] = {
        name: _adapters(count, adapted) for name, (_, count, adapted, _) in stacks.items()
    }

    def loss(params: Tree, tokens: Any) -> Any:
        x = params["embed"][tokens]
        for name, (layer, *_) in stacks.items():
            group = params[name] | {"adapters": params["adapters"][name]}
            x, _ = jax.lax.scan(
                jax.checkpoint(lambda x, group, layer=layer: (layer(x, group), None)), x, group
            )
        logits = _norm(x, params["norm"]) @ params["head"]
        return optax.softmax_cross_entropy_with_integer_labels(
            logits.astype(jnp.float32), tokens
        ).mean()

    batch = jax.ShapeDtypeStruct((DEVICES, TOKENS), jnp.int32)
    return Workload(
        title, params, loss, batch, frozenset({"adapters"}), products=None, product_flops=0.0
    )


def _feed(x: Any, group: Tree) -> Any:
    y = _norm(x, group["norm_2"])
    return x + (jax.nn.silu(y @ group["gate"]) * (y @ group["up"])) @ group["down"]


def llama() -> Workload:
    """80 layers of 8192, 64 heads over 8 of keys and values, 28672 between: 70.6 billion in all."""
    width, hidden = 8192, 28672
    attention = {"q": (width, width), "k": (width, 1024), "v": (width, 1024), "o": (width, width)}
    rest = {
        "gate": (width, hidden),
        "up": (width, hidden),
        "down": (hidden, width),
        "norm_1": (width,),
        "norm_2": (width,),
    }

    def layer(x: Any, group: Tree) -> Any:
        y = _norm(x, group["norm_1"])
        q, k, v = (
            _heads(_adapted(y, group, name), count)
            for name, count in (("q", 64), ("k", 8), ("v", 8))
        )
        return _feed(x + _adapted(_attend(q, k, v), group, "o"), group)

    return _language_model("Llama-3-70B", width, 128256, {"layers": (layer, 80, attention, rest)})


def deepseek() -> Workload:
    """61 layers of 7168 with latent attention, from the fourth on a shared expert and 8 of 256."""
    width, experts, hidden, heads = 7168, 256, 2048, 128
    attention = {
        "q_down": (width, 1536),
        "q_up": (1536, heads * 192),
        "kv_down": (width, 576),
        "kv_up": (512, heads * 256),
    }
    attention["o"] = (heads * 128, width)
    norms = {"norm_1": (width,), "norm_2": (width,), "norm_q": (1536,), "norm_kv": (512,)}
    feed = lambda hidden: {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
    inside, outside = (experts, width, hidden), (experts, hidden, width)
    routed = {
        "router": (width, experts),
        "expert_gate": inside,
        "expert_up": inside,
        "expert_down": outside,
    }

    def dense(x: Any, group: Tree) -> Any:
        y = _norm(x, group["norm_1"])
        query = _norm(_adapted(y, group, "q_down"), group["norm_q"])
        q = _heads(_adapted(query, group, "q_up"), heads)
        latent, rotary = jnp.split(_adapted(y, group, "kv_down"), [512], axis=-1)
        both = _adapted(_norm(latent, group["norm_kv"]), group, "kv_up")
        k, v = jnp.split(_heads(both, heads), 2, axis=-1)
        k = jnp.concatenate([k, jnp.broadcast_to(rotary[:, :, None], (*k.shape[:3], 64))], axis=-1)
        return _feed(x + _adapted(_attend(q, k, v), group, "o"), group)

    def mixture(x: Any, group: Tree) -> Any:
        x = dense(x, group)
        y = _norm(x, group["norm_2"])
        weights, chosen = jax.lax.top_k(jax.nn.sigmoid(y @ group["router"]), 8)
        # As in GShard: what an expert has no place for is dropped.
        capacity = 2 * TOKENS * 8 // experts
        picked = jax.nn.one_hot(chosen, experts, dtype=y.dtype)
        routes = picked.sum(2)
        dispatch = jax.nn.one_hot(jnp.cumsum(routes, axis=1) * routes - 1, capacity, dtype=y.dtype)
        tokens = jnp.einsum("btec,btd->ebcd", dispatch, y)
        gate, up = (
            jnp.einsum("ebcd,edh->ebch", tokens, group[name])
            for name in ("expert_gate", "expert_up")
        )
        out = jnp.einsum("ebch,ehd->ebcd", jax.nn.silu(gate) * up, group["expert_down"])
        return x + jnp.einsum(
            "btec,ebcd,bte->btd", dispatch, out, jnp.einsum("btke,btk->bte", picked, weights)
        )

    stacks = {
        "dense": (dense, 3, attention, norms | feed(18432)),
        "layers": (mixture, 58, attention, norms | feed(hidden) | routed),
    }
    return _language_model("DeepSeek-V3's shape", width, 129280, stacks)


def _split(mesh: Mesh, leaf: Any) -> Any:
    """A leaf over all devices, along its last axis that can be divided."""
    axes = [axis for axis, size in enumerate(leaf.shape) if size % DEVICES == 0]
    spec = P(*("all" if axes and axis == axes[-1] else None for axis in range(leaf.ndim)))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))


def compiled(workload: Workload, name: str, mesh: Mesh, donate: bool) -> Figures:
    """Bytes on each device, as XLA has them, and how long it took to compile."""
    training = CONTENDERS[name](workload, on_shapes(adamw()))
    args = jax.tree.map(lambda leaf: _split(mesh, leaf), (training.state, training.constant))
    batch = jax.ShapeDtypeStruct(
        workload.batch.shape, workload.batch.dtype, sharding=NamedSharding(mesh, P("all"))
    )
    start = time.perf_counter()
    memory = (
        training.compile_with(donate).lower(*args[0], *args[1], batch).compile().memory_analysis()
    )
    return {
        "in": memory.argument_size_in_bytes,
        "out": memory.output_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "state": nbytes(training.optimizer_state(training.state)),
        "seconds": time.perf_counter() - start,
    }


def main() -> None:
    """Compiles the steps of both models."""
    jax.config.update("jax_num_cpu_devices", DEVICES)
    mesh = Mesh(jax.devices(), ("all",))
    found = {}
    for workload in (llama(), deepseek()):
        found[workload.title] = {
            "weights": sum(leaf.size for leaf in jax.tree.leaves(workload.part(trained=False))),
            "trained": workload.trained_count,
            "bytes": nbytes(workload.params),
            "kept": {name: compiled(workload, name, mesh, donate=False) for name in KEPT},
            "donated": {name: compiled(workload, name, mesh, donate=True) for name in DONATED},
        }
    print(json.dumps({"models": found}))


if __name__ == "__main__":
    main()
