"""`x[jnp.arange(len(x)), index]` as what it is: each example is looked up in its own part.

How it is written, an example depends on its place in the batch, and would stay in the step. So
numbers that count along an axis are followed to where they look something up along an axis of that
length, and the look-up is written as one of pairs: with the part of each by its side.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn


@dataclasses.dataclass(frozen=True)
class Counts:
    """Each number is its own place along an axis."""

    axis: int


@dataclasses.dataclass(frozen=True)
class AllFalse:
    """No element is true."""


@dataclasses.dataclass(frozen=True)
class Columns:
    """Along its last axis there are arrays of length one, of each what is known and its value."""

    known: Sequence[Fact]
    values: Sequence[Any]


Fact: TypeAlias = Counts | AllFalse | Columns | None


def fact_of(eqn: JaxprEqn, facts: Sequence[Fact], values: Sequence[Any]) -> Fact:
    """What is known of the result of an equation, of what is known of its operands."""
    name, params = eqn.primitive.name, eqn.params
    aval: Any = eqn.outvars[0].aval
    if name == "iota":
        axis = params["dimension"]
        return Counts(axis) if _has(aval.dtype, aval.shape[axis]) else None
    if name == "concatenate":
        last = aval.ndim - 1
        are_columns = params["dimension"] == last and all(v.shape[last] == 1 for v in values)
        return Columns(facts, values) if are_columns and any(facts) else None
    if name == "select_n" and isinstance(facts[0], AllFalse):
        return facts[1]
    if not facts or not isinstance(facts[0], Counts):
        return None
    axis, shape = facts[0].axis, values[0].shape
    if name == "lt":
        is_zero = jnp.shape(values[1]) == () and _is_literal_zero(eqn.invars[1])
        return AllFalse() if is_zero else None
    if name == "copy" or (name == "convert_element_type" and _has(aval.dtype, shape[axis])):
        return facts[0]
    if name == "broadcast_in_dim":
        place = params["broadcast_dimensions"][axis]
        return Counts(place) if aval.shape[place] == shape[axis] else None
    if name == "reshape" and params.get("dimensions") is None:
        outside = math.prod(shape[:axis])
        for place, length in enumerate(aval.shape):
            if length == shape[axis] and math.prod(aval.shape[:place]) == outside:
                return Counts(place)
    return None


def _has(dtype: Any, length: int) -> bool:
    """Whether a dtype has all integers that count so many."""
    return jnp.issubdtype(dtype, jnp.integer) and length - 1 <= jnp.iinfo(dtype).max


def _is_literal_zero(atom: Any) -> bool:
    value = getattr(atom, "val", None)
    return value is not None and not value


def looked_up(eqn: JaxprEqn, facts: Sequence[Fact], values: Sequence[Any]) -> Any | None:
    """The result of a look-up in which each is found in its own part; None where it is not so."""
    if eqn.primitive.name != "gather" or not isinstance(facts[1], Columns):
        return None
    (array, indices), columns, numbers = values, facts[1], eqn.params["dimension_numbers"]
    paired = list(
        zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True)
    )
    rest = list[int]()
    for i, (known, axis) in enumerate(zip(columns.known, numbers.start_index_map, strict=True)):
        if (
            isinstance(known, Counts)
            and known.axis not in {with_it for _, with_it in paired}
            and known.axis < indices.ndim - 1
            and axis in numbers.collapsed_slice_dims
            and array.shape[axis] == indices.shape[known.axis]
        ):
            paired.append((axis, known.axis))
        else:
            rest.append(i)
    if not rest or len(rest) == len(columns.values):
        return None
    paired.sort()
    own = {axis for axis, _ in paired}
    return lax.gather(
        array,
        lax.concatenate([columns.values[i] for i in rest], indices.ndim - 1),
        lax.GatherDimensionNumbers(
            offset_dims=numbers.offset_dims,
            collapsed_slice_dims=tuple(a for a in numbers.collapsed_slice_dims if a not in own),
            start_index_map=tuple(numbers.start_index_map[i] for i in rest),
            operand_batching_dims=tuple(axis for axis, _ in paired),
            start_indices_batching_dims=tuple(with_it for _, with_it in paired),
        ),
        eqn.params["slice_sizes"],
        unique_indices=eqn.params["unique_indices"],
        mode=eqn.params["mode"],
        fill_value=eqn.params["fill_value"],
    )
