"""The primitives of jax itself, as objects: a user's may have the name of one, and do anything."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.extend as jex
import jax.numpy as jnp
from jax import ad_checkpoint, lax
from jax.extend.core import Primitive

from frozen_optax._jaxprs import Program, opened, subprograms

_AxisType = jax.sharding.AxisType
_P = jax.sharding.PartitionSpec


def is_of_jax(primitive: Primitive) -> bool:
    """Whether a primitive is jax's own, and not a user's of the same name."""
    return primitive in _listed() or primitive in _found_by_tracing()


@functools.cache
def _listed() -> frozenset[Primitive]:
    """Those that jax gives out by name."""
    members = vars(jex.core.primitives).values()
    return frozenset(each for each in members if isinstance(each, Primitive))


@functools.cache
def _found_by_tracing() -> frozenset[Primitive]:
    """Those that it does not give out by name: they are in programs of its public functions."""
    found: set[Primitive] = set()
    for function, argument in _samples():
        try:
            program = jax.make_jaxpr(function)(argument)
        except AttributeError:  # a function that this version does not have
            continue
        _collect(program, found)
    return frozenset(found)


def _collect(program: Program, found: set[Primitive]) -> None:
    for eqn in opened(program)[0].eqns:
        found.add(eqn.primitive)
        for inner in subprograms(eqn):
            _collect(inner, found)


def _samples() -> list[tuple[Callable[[Any], Any], Any]]:
    array = jax.ShapeDtypeStruct((2,), jnp.float32)
    manual = jax.sharding.AbstractMesh((1,), ("d",), axis_types=(_AxisType.Auto,))
    explicit = jax.sharding.AbstractMesh((1,), ("d",), axis_types=(_AxisType.Explicit,))
    split = jax.sharding.NamedSharding(explicit, _P("d"))
    sharded = jax.ShapeDtypeStruct((2,), jnp.float32, sharding=split)

    def in_shard_map(body: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return jax.shard_map(body, mesh=manual, in_specs=_P("d"), out_specs=_P("d"))

    def with_derivative(x: Any) -> Any:
        function = jax.custom_vjp(jnp.sin)
        function.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g,))
        return function(x)

    return [
        (lax.optimization_barrier, array),
        (lambda x: jnp.split(x, 2), array),
        (lambda x: jnp.stack([x, x]), array),
        (lambda x: jnp.unstack(x), array),
        (lambda x: jnp.tile(x, 2), array),
        (lambda x: x.at[0].subtract(1.0), array),
        (lambda x: ad_checkpoint.checkpoint_name(x, "x"), array),
        (jax.checkpoint(jnp.sin), array),
        (with_derivative, array),
        (in_shard_map(lambda x: x + jnp.zeros(1)), array),  # what is alike on all devices is varied
        (in_shard_map(lambda x: x + lax.psum(x, "d")), array),
        (lambda x: jax.sharding.reshard(x, jax.sharding.NamedSharding(explicit, _P())), sharded),
        (jax.sharding.auto_axes(lambda x: x, out_sharding=split), sharded),
    ]
