"""What to keep: the smallest border, in bytes an example, between what is hoisted and what is not.

What the live part reads need not be kept as it is. Elementwise operations, moves, casts and sums
may be done again, so what they are made of may be kept instead: of a mask, the lengths it was made
from; of a one-hot, its class. Which of all such choices is the smallest is a minimum cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn

from frozen_optax._hoist._programs import is_literal
from frozen_optax._hoist._rowwise import ELEMENTWISE, MOVES, REDUCTIONS
from frozen_optax._hoist._split import Split, Value
from frozen_optax._jaxprs import opened, subprograms

# What is cheap if what it calls is; `jit` stands within the others.
_CALLS = ("custom_jvp_call", "custom_vjp_call", "jit", "pjit")
_LARGEST = 2**31 - 1  # scipy's flows are of 32 bits


def is_cheap(eqn: JaxprEqn) -> bool:
    """Whether an equation may be computed again at each step."""
    programs = list(subprograms(eqn))
    if eqn.primitive.name in _CALLS:
        return all(is_cheap(each) for program in programs for each in opened(program)[0].eqns)
    return not programs and eqn.primitive.name in ELEMENTWISE | MOVES | REDUCTIONS


def border(split: Split) -> tuple[list[str], list[str]]:
    """The digests of what to keep: an example's, and shared."""
    of_examples = _as_given(split, _smallest_cut(split))
    kept = set(of_examples)
    return of_examples, _shared(split, kept)


def variables_of(split: Split, eqns: Sequence[JaxprEqn]) -> list[Any]:
    """The variables that some equations read, and those that are returned."""
    atoms = [atom for eqn in eqns for atom in eqn.invars] + split.jaxpr.outvars
    return list(dict.fromkeys(split.read(atoms)))


def _wanted(split: Split) -> list[Any]:
    """What is not live, and the live part reads or returns."""
    read = variables_of(split, list(filter(split.is_live, split.eqns)))
    return [var for var in read if split.values[var].digest is not None]


def _smallest_cut(split: Split) -> list[str]:
    """The digests of the cheapest set of which all that is wanted of examples can be made."""
    from scipy.sparse import csr_matrix  # ships with jax; not needed to import this library
    from scipy.sparse.csgraph import maximum_flow

    nodes: dict[str, int] = {}  # each has an edge from its number to the next one
    sizes: list[int] = []

    def node(value: Value) -> int:
        assert value.digest is not None
        if value.digest not in nodes:
            nodes[value.digest] = 2 + 2 * len(nodes)
            sizes.append(max(value.size, 1))
        return nodes[value.digest]

    source, sink = 0, 1
    edges: set[tuple[int, int]] = set()
    for var in _wanted(split):
        if split.values[var].batch:
            edges.add((node(split.values[var]) + 1, sink))
    if not edges:
        return []
    for var in split.jaxpr.invars:
        if split.values[var].batch:
            edges.add((source, node(split.values[var])))
    for eqn in split.eqns:
        if split.is_live(eqn):
            continue
        of_examples = [v for v in map(split.values.get, eqn.outvars) if v is not None and v.batch]
        again = is_cheap(eqn)
        for value in of_examples:
            if not again:
                edges.add((source, node(value)))
                continue
            for atom in eqn.invars:
                if not is_literal(atom) and split.values[atom].batch:
                    edges.add((node(split.values[atom]) + 1, node(value)))

    scale = max(1, -(-4 * sum(sizes) // _LARGEST))
    widths = [-(-size // scale) for size in sizes]
    unlimited = sum(widths) + 1
    inner = [(first, first + 1, width) for first, width in zip(nodes.values(), widths, strict=True)]
    triples = [*inner, *((a, b, unlimited) for a, b in sorted(edges))]
    rows, columns, capacities = (np.array(each, np.int32) for each in zip(*triples, strict=True))
    shape = (2 + 2 * len(nodes),) * 2
    capacity = csr_matrix((capacities, (rows, columns)), shape=shape, dtype=np.int32)
    left = (capacity - maximum_flow(capacity, source, sink).flow).tocsc()
    # Of several smallest cuts the last one: what reaches the sink past no full edge is beyond it.
    beyond, seen = [sink], {sink}
    while beyond:
        column = beyond.pop()
        span = slice(left.indptr[column], left.indptr[column + 1])
        for row, room in zip(left.indices[span], left.data[span], strict=True):
            if room > 0 and int(row) not in seen:
                seen.add(int(row))
                beyond.append(int(row))
    return [name for name, first in nodes.items() if first + 1 in seen and first not in seen]


def _as_given(split: Split, digests: Sequence[str]) -> list[str]:
    """The same, but integers as they were given in the place of what they alone are made to.

    A label takes no more room as it is than as an index of a look-up, and other programs read it:
    that for a single example, often, and one that is written otherwise next year.
    """
    given: dict[str, str] = {}  # by what is made of it alone, cheaply
    for var in split.jaxpr.invars:
        value, dtype = split.values[var], getattr(var.aval, "dtype", np.dtype(float))
        is_integer = dtype == np.dtype(bool) or jnp.issubdtype(dtype, jnp.integer)
        if value.digest and value.batch and is_integer:
            given[value.digest] = value.digest
    sizes = {value.digest: value.size for value in split.values.values()}
    for eqn in split.eqns:
        operands = [split.values[atom] for atom in split.read(eqn.invars)]
        sources = {given.get(each.digest or "", "") for each in operands if each.batch}
        if len(sources) != 1 or "" in sources or not is_cheap(eqn):
            continue
        for value in map(split.values.get, eqn.outvars):
            if value and value.digest and value.made_of == frozenset({"data"}):
                given.setdefault(value.digest, *sources)
    found = [given.get(digest, digest) for digest in digests]
    pairs = zip(digests, found, strict=True)
    return list(dict.fromkeys(b if sizes[b] <= sizes[a] else a for a, b in pairs))


def _shared(split: Split, kept: set[str]) -> list[str]:
    """The digests of what is computed once for all, of what the rest then reads.

    What is a parameter comes with the parameters. What is only moved is moved again, and what is
    made of constants alone is left to the compiler.
    """
    made_by = {var: eqn for eqn in split.eqns for var in eqn.outvars}
    found: dict[str, None] = {}
    seen: set[Any] = set()
    wanted = _wanted(split)
    while wanted:
        var = wanted.pop()
        value = split.values[var]
        if var in seen or value.digest is None or value.digest in kept:
            continue
        seen.add(var)
        if var not in made_by:
            if value.made_of == frozenset({"data"}):  # a number for all examples
                found[value.digest] = None
            continue
        eqn = made_by[var]
        is_worth_it = value.made_of and not value.batch and eqn.primitive.name not in MOVES
        if is_worth_it:
            found[value.digest] = None
        else:
            wanted += split.read(eqn.invars)
    return list(found)


def equations_for(split: Split, wanted: Sequence[Any], stop: set[Any]) -> list[JaxprEqn]:
    """The equations that make some variables, of what `stop` and the inputs hold."""
    missing = {var for var in wanted if var not in stop}
    found = []
    for eqn in reversed(split.eqns):
        if not missing.isdisjoint(eqn.outvars):
            missing.difference_update(eqn.outvars)
            missing.update(var for var in split.read(eqn.invars) if var not in stop)
            found.append(eqn)
    return found[::-1]
