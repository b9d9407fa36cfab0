"""Programs walked: what is in one, what its results need, whether it does more than it returns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import jax
import jax.extend as jex
from jax.extend.core import JaxprEqn

from frozen_optax._trees import is_mutable

Jaxpr: TypeAlias = jex.core.Jaxpr
# With its constants or without: versions of jax have one class for both, or two. The newest names
# but one.
Program: TypeAlias = Any


def opened(program: Program) -> tuple[Jaxpr, Sequence[Any]]:
    """A program without its constants, and these."""
    return getattr(program, "jaxpr", program), getattr(program, "consts", ())


def is_program(value: Any) -> bool:
    """Whether a parameter of an equation is a program."""
    return hasattr(getattr(value, "jaxpr", value), "eqns")


def subprograms(eqn: JaxprEqn) -> Iterator[Program]:
    """The programs that an equation may run: branches, bodies, what it calls."""
    for value in eqn.params.values():
        members = value if isinstance(value, (tuple, list)) else [value]
        yield from filter(is_program, members)


def has_while(program: Program) -> bool:
    """Whether a program holds a loop of which no one knows when it ends."""
    for eqn in opened(program)[0].eqns:
        if eqn.primitive.name == "while" or any(map(has_while, subprograms(eqn))):
            return True
    return False


def has_hidden_effects(eqn: JaxprEqn) -> bool:
    """Whether an equation does more than it returns.

    It writes to mutable arrays, or calls the host, but for what prints.
    """
    if any(is_mutable(variable.aval) for variable in (*eqn.invars, *eqn.outvars)):
        return True
    return any("Debug" not in type(effect).__name__ for effect in eqn.effects)


def needed(jaxpr: Jaxpr) -> list[JaxprEqn]:
    """The equations that the results of a program depend on, and those that have an effect."""
    wanted = {atom for atom in jaxpr.outvars if not isinstance(atom, jex.core.Literal)}
    found = []
    for eqn in reversed(jaxpr.eqns):
        is_wanted = not wanted.isdisjoint(eqn.outvars)
        if is_wanted or eqn.effects or has_hidden_effects(eqn):
            wanted.update(atom for atom in eqn.invars if not isinstance(atom, jex.core.Literal))
            found.append(eqn)
    return found[::-1]


def only_returns(program: Program) -> bool:
    """Whether all that a program does is in its results."""
    for eqn in needed(opened(program)[0]):
        if has_hidden_effects(eqn) or not all(map(only_returns, subprograms(eqn))):
            return False
    return True


def is_on_several_devices(program: Program) -> bool:
    """Whether a program places arrays on a mesh or in shardings of more than one device."""
    for eqn in opened(program)[0].eqns:
        placements = []
        for value in eqn.params.values():
            placements += value if isinstance(value, (tuple, list)) else [value]
        if any(map(spans_devices, placements)):
            return True
        if any(map(is_on_several_devices, subprograms(eqn))):
            return True
    return False


def spans_devices(placement: Any) -> bool:
    """Whether a mesh or a sharding is of more than one device."""
    mesh = getattr(placement, "mesh", placement)
    if isinstance(mesh, (jax.sharding.Mesh, jax.sharding.AbstractMesh)):
        return mesh.size > 1
    return isinstance(placement, jax.sharding.Sharding) and len(placement.device_set) > 1
