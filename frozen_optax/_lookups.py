"""The gradient of rows that train, where the table that they are rows of is looked up.

The gradient of a table is as large as the table, zeros and a few rows, and compilers do not see
that only some of these are wanted. So a function is linearized, and in the linear program a look-up
in the table becomes one in the rows that train, of zeros for all others. What else reads the table
(an output layer that is tied to it) is given all of it, and costs what it costs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend as jex
import jax.numpy as jnp
import numpy as np

from frozen_optax import _bits
from frozen_optax._jaxprs import Jaxpr, Program, needed, opened
from frozen_optax._parts import Part
from frozen_optax._trees import is_inexact_array
from frozen_optax._typing import Array, DType, Leaf, PyTree


class _Table(NamedTuple):
    """A table in a linear program, as it was given or cast.

    Attributes:
      place: which input of the program it is made of.
      of: the variable that it is cast from; None as it was given.
      dtype: what it is cast to; None as it was given.
    """

    place: int
    of: Any
    dtype: DType | None


class _Lookup(NamedTuple):
    """A look-up of rows of a table, in a linear program.

    Attributes:
      table: the variable that holds the table, as it is or cast.
      indices: the variable that holds the indices.
      result: the variable that holds the rows.
      params: of the gather.
    """

    table: Any
    indices: Any
    result: Any
    params: dict[str, Any]


def trains_rows(part: Part) -> bool:
    """Whether what trains of a leaf are rows of it."""
    return part.frozen.ndim == 1


def _gather(eqn: Any) -> tuple[Any, Any, dict[str, Any]] | None:
    """The table, the indices and the parameters, if an equation is a gather or a call of one."""
    if eqn.primitive.name == "gather":
        return eqn.invars[0], eqn.invars[1], eqn.params
    if eqn.primitive.name not in ("jit", "pjit"):
        return None
    jaxpr, _ = opened(eqn.params["jaxpr"])
    if len(jaxpr.eqns) != 1 or jaxpr.constvars or jaxpr.outvars != jaxpr.eqns[0].outvars:
        return None
    found = _gather(jaxpr.eqns[0])
    if found is None:
        return None
    outside = dict(zip(jaxpr.invars, eqn.invars, strict=True))
    is_given = lambda atom: not isinstance(atom, jex.core.Literal) and atom in outside
    table, indices, params = found
    return (outside[table], outside[indices], params) if is_given(indices) else None


def _takes_rows(params: dict[str, Any], shape: tuple[int, ...]) -> bool:
    """Whether a gather takes whole rows of a table of this shape, by indices of its first axis."""
    dimensions = params["dimension_numbers"]
    is_of_rows = (
        dimensions.start_index_map == dimensions.collapsed_slice_dims == (0,)
        and not dimensions.operand_batching_dims
    )
    return is_of_rows and tuple(params["slice_sizes"]) == (1, *shape[1:])


def _lookups(jaxpr: Jaxpr, parts: Sequence[Part | None]) -> tuple[dict[Any, _Table], list[_Lookup]]:
    """The inputs of a program of which rows train, and the look-ups in them.

    By indices that are constants of the program.
    """
    tables: dict[Any, _Table] = {
        variable: _Table(place, None, None)
        for place, (variable, part) in enumerate(zip(jaxpr.invars, parts, strict=True))
        if part is not None and trains_rows(part)
    }
    constants, found = set(jaxpr.constvars), list[_Lookup]()
    is_variable = lambda atom: not isinstance(atom, jex.core.Literal)
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "convert_element_type" and is_variable(eqn.invars[0]):
            (source,), (cast,) = eqn.invars, eqn.outvars
            if source in tables:
                tables[cast] = _Table(tables[source].place, source, eqn.params["new_dtype"])
            continue
        gather = _gather(eqn)
        if gather is None or not all(map(is_variable, gather[:2])):
            continue
        table, indices, params = gather
        if table in tables and indices in constants and _takes_rows(params, table.aval.shape):
            found.append(_Lookup(table, indices, eqn.outvars[0], params))
    return tables, found


def _places(part: Part, indices: Array, is_clipped: bool) -> Array:
    """Where the rows of some indices are among those that train, their number for all others.

    Indices of a narrow dtype need not reach the end of the table, nor those of a wide one fit into
    32 bits, so they are clipped to the table as they are.
    """
    last = min(len(part.frozen) - 1, int(jnp.iinfo(indices.dtype).max))
    clipped = jnp.clip(indices, 0, last)
    is_there = True if is_clipped else indices == clipped
    at, count = clipped.astype(np.int32), part.trained_shape[0]
    (trained,) = np.nonzero(~part.frozen)
    first = int(trained[0])
    if trained[-1] - first + 1 == count:
        return jnp.where(is_there & (at >= first) & (at < first + count), at - first, count)
    place_of = np.full(len(part.frozen), count, np.int32)
    place_of[trained] = np.arange(count)
    return jnp.where(is_there, jnp.asarray(place_of)[at], count)


def _look_up(part: Part, rows: Array, lookup: _Lookup, indices: Array) -> Array:
    """What the table would give that has these rows, and zeros for all others."""
    return jax.lax.gather(
        rows,
        _places(part, indices, lookup.params["mode"] == jax.lax.GatherScatterMode.CLIP),
        lookup.params["dimension_numbers"],
        slice_sizes=lookup.params["slice_sizes"],
        mode=jax.lax.GatherScatterMode.FILL_OR_DROP,
        fill_value=0,
    )


def value_and_grad_of_rows(
    fun: Callable[..., Any], trained: PyTree, parts: Sequence[Part | None], has_aux: bool
) -> tuple[Any, list[Leaf]] | None:
    """What `jax.value_and_grad` gives, of what trains of leaves.

    Args:
      fun: a function of `trained` that returns a scalar, or with `has_aux` a pair.
      trained: a tuple of lists of leaves.
      parts: for each leaf what trains of it, None for all.
      has_aux: as jax has it.

    Returns:
      The value, and the gradients of what trains, leaf by leaf. None where a part of `fun` can be
      differentiated backwards only, or is none that jax has real gradients of: jax is to be asked.
    """
    leaves, treedef = jax.tree.flatten(trained)
    if not all(is_inexact_array(leaf) and jnp.isrealobj(leaf) for leaf in leaves):
        return None
    value, linear, *aux = jax.linearize(fun, *trained, has_aux=has_aux)
    if np.shape(value) != () or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        return None
    flat = lambda *tangents: linear(*jax.tree.unflatten(treedef, tangents))
    try:
        program: Program = jax.make_jaxpr(flat)(*leaves)
    except TypeError:  # a function with a backward pass of the user's own
        return None
    jaxpr, constants = opened(program)
    tables, found = _lookups(jaxpr, parts)
    results = {lookup.result for lookup in found}
    rest = jaxpr.replace(
        invars=[*jaxpr.invars, *(lookup.result for lookup in found)],
        eqns=[eqn for eqn in jaxpr.eqns if results.isdisjoint(eqn.outvars)],
        debug_info=jaxpr.debug_info._replace(arg_names=None),
    )
    rest = rest.replace(eqns=needed(rest))
    read = {id(atom) for eqn in rest.eqns for atom in eqn.invars} | set(map(id, rest.outvars))
    constant_of = dict(zip(jaxpr.constvars, constants, strict=True))
    run = jex.core.jaxpr_as_fun(rest if program is jaxpr else program.replace(jaxpr=rest))

    def of_rows(*tangents: Leaf) -> Leaf:
        whole: list[Leaf] = []
        for tangent, part, variable, leaf in zip(
            tangents, parts, jaxpr.invars, leaves, strict=True
        ):
            if part is None:
                whole.append(tangent)
            elif id(variable) in read:
                whole.append(part.put(tangent, _bits.known_zero(leaf)))
            else:  # nothing reads it any more
                whole.append(jnp.zeros(leaf.shape, leaf.dtype))
        # Cast once, as the table is: what flows back is summed, and rounded, in the same dtypes.
        rows: dict[Any, Leaf] = {}
        for variable, table in tables.items():
            if table.dtype is None:
                rows[variable] = tangents[table.place]
            else:
                rows[variable] = jax.lax.convert_element_type(rows[table.of], table.dtype)
        looked_up: list[Leaf] = []
        for lookup in found:
            part = parts[tables[lookup.table].place]
            assert part is not None  # as of every table
            indices = constant_of[lookup.indices]
            looked_up.append(_look_up(part, rows[lookup.table], lookup, indices))
        return run(*whole, *looked_up)[0]

    taken = [
        leaf if part is None else part.take(leaf) for leaf, part in zip(leaves, parts, strict=True)
    ]
    structs = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in taken]
    gradients = jax.linear_transpose(of_rows, *structs)(jnp.ones((), jnp.result_type(value)))
    return ((value, *aux) if has_aux else value), list(gradients)
