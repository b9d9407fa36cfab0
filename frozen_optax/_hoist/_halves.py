"""The two halves of a split program: what is computed once, and what is left for each step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from frozen_optax._hoist._cut import equations_for, variables_of
from frozen_optax._hoist._programs import part_of
from frozen_optax._hoist._rows import Rows
from frozen_optax._hoist._sizes import Batch
from frozen_optax._hoist._split import Split
from frozen_optax._typing import Leaf


def hoisted_values(
    split: Split, each: Sequence[str], shared: Sequence[str], leaves: Sequence[Leaf]
) -> list[Any]:
    """The first half: the arrays of some digests, the examples of each along its first axis."""
    named = _named(split, [*each, *shared])
    outvars = [named[digest] for digest in (*each, *shared)]
    eqns = equations_for(split, outvars, set())
    invars = [*split.jaxpr.constvars, *split.jaxpr.invars]
    read = {var for eqn in eqns for var in split.read(eqn.invars)} | set(outvars)
    values = dict(zip(invars, [*split.consts, *leaves], strict=True))
    needed = [var for var in invars if var in read]
    arrays = part_of(split.jaxpr, needed, eqns, outvars)(*(values[var] for var in needed))
    return [
        _to_rows(array, split.values[var].batch) for array, var in zip(arrays, outvars, strict=True)
    ]


def rest(split: Split, rows: Rows, leaves: Sequence[Leaf]) -> list[Any]:
    """The second half: the results of the program, from rows and what is given beside them.

    Raises:
      ValueError: the rows do not hold what it needs, or hold it in another shape or dtype.
    """
    kept = dict(zip((*rows.kept.each, *rows.kept.shared), (*rows.each, *rows.shared), strict=True))
    of_rows = {
        var: _from_rows(kept[value.digest], value.batch, var.aval)
        for var, value in split.values.items()
        if value.digest in kept
    }
    values = dict(zip(split.jaxpr.constvars, split.consts, strict=True))
    given = zip(split.jaxpr.invars, leaves, split.given, strict=True)
    values.update((var, leaf) for var, leaf, each in given if each.kind != "data")
    values.update(of_rows)

    outvars = split.read(split.jaxpr.outvars)
    live = list(filter(split.is_live, split.eqns))
    eqns = equations_for(split, variables_of(split, live), set(values))
    chosen = {*map(id, eqns), *map(id, live)}
    eqns = [eqn for eqn in split.eqns if id(eqn) in chosen]
    made = {var for eqn in eqns for var in eqn.outvars}
    read = {var for eqn in eqns for var in split.read(eqn.invars)} | set(outvars)
    missing = [
        given.name
        for var, given in zip(split.jaxpr.invars, split.given, strict=True)
        if var in read and var not in values
    ]
    if missing:
        single = (
            " A single example often makes another one: leave it out, or join it to others."
            if len(rows) == 1
            else ""
        )
        raise ValueError(
            f"the rows do not hold what this function needs of {', '.join(missing)}: they were "
            "prepared by another function, of another selection, of parameters of other shapes, or "
            "it is another program with this batch size. Prepare them by this hoisted function."
            + single
        )
    needed = [var for var in values if var in read and var not in made]
    return part_of(split.jaxpr, needed, eqns, split.jaxpr.outvars)(*(values[v] for v in needed))


def _named(split: Split, digests: Sequence[str]) -> dict[str, Any]:
    """A variable for each digest."""
    wanted = set(digests)
    found: dict[str, Any] = {}
    for var, value in split.values.items():
        if value.digest in wanted:
            found.setdefault(value.digest, var)
    return found


def _to_rows(array: Any, batch: Batch | None) -> Any:
    # What is kept as it was given is copied: a loader may write the next batch into its array.
    array = jnp.array(array) if isinstance(array, np.ndarray) else jnp.asarray(array)
    if batch is None or batch == (0, 1):
        return array
    array = jnp.moveaxis(array, batch.axis, 0)
    return array if batch.block == 1 else array.reshape(-1, batch.block, *array.shape[1:])


def _from_rows(array: Any, batch: Batch | None, aval: Any) -> Any:
    expected = _shape_in_rows(batch, aval.shape)
    if (tuple(array.shape), array.dtype) != (expected, aval.dtype):
        raise ValueError(
            f"an array of the rows is {array.dtype}{list(array.shape)}, and it was "
            f"{aval.dtype}{list(expected)} as prepare made it. Rows are picked by rows[indices] "
            "and served as they are; for a scan over parts of a batch, pick within its body."
        )
    if batch is None or batch == (0, 1):
        return array
    if batch.block > 1:
        array = array.reshape(-1, *array.shape[2:])
    return jnp.moveaxis(array, 0, batch.axis).reshape(aval.shape)


def _shape_in_rows(batch: Batch | None, shape: tuple[int, ...]) -> tuple[int, ...]:
    if batch is None:
        return shape
    of_one = shape[: batch.axis] + shape[batch.axis + 1 :]
    size = shape[batch.axis] // batch.block
    return (size, *of_one) if batch.block == 1 else (size, batch.block, *of_one)
