"""A function as one flat program, and parts of such a program as functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend as jex
from jax.extend.core import JaxprEqn

from frozen_optax._jaxprs import Jaxpr, Program, opened

_CALLS = ("jit", "pjit")  # versions of jax call it the one or the other


def is_literal(atom: Any) -> bool:
    """Whether an operand is a number that stands in the program, and no variable."""
    return isinstance(atom, jex.core.Literal)


def part_of(
    jaxpr: Jaxpr, invars: Sequence[Any], eqns: Sequence[JaxprEqn], outvars: Sequence[Any]
) -> Callable[..., list[Any]]:
    """Some equations of a program as a function of some of its variables.

    Outside of any transformation it is evaluated equation by equation.
    """
    effects = set[Any]().union(*(eqn.effects for eqn in eqns))
    part = jaxpr.replace(
        constvars=[],
        invars=list(invars),
        eqns=list(eqns),
        outvars=list(outvars),
        effects=effects,
    )
    # The newest versions have one class for a program with its constants and for one without.
    closed: Any = vars(jex.core)["ClosedJaxpr"]
    return jex.core.jaxpr_as_fun(part if closed is jex.core.Jaxpr else closed(part, []))


def flat(function: Callable[..., list[Any]], avals: Sequence[Any]) -> Program:
    """A function of arrays as a program in which nested calls of `jit` are written out.

    A call that says where its arrays lie is left whole, and so are calls with a derivative of their
    own, branches, loops and `jax.checkpoint`.
    """
    # Else loops would be written out, too, under `jax.disable_jit()`, and the program be another.
    with jax.disable_jit(False):
        program = jax.make_jaxpr(function)(*avals)
        return jax.make_jaxpr(lambda *values: _written_out(program, values))(*avals)


def _written_out(program: Program, values: Sequence[Any]) -> list[Any]:
    jaxpr, consts = opened(program)
    known = dict(zip(jaxpr.constvars, consts, strict=True))
    known.update(zip(jaxpr.invars, values, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if is_literal(atom) else known[atom]

    for eqn in jaxpr.eqns:
        if _is_plain_call(eqn):
            results = _written_out(eqn.params["jaxpr"], list(map(read, eqn.invars)))
        else:
            invars = list(dict.fromkeys(atom for atom in eqn.invars if not is_literal(atom)))
            results = part_of(jaxpr, invars, [eqn], eqn.outvars)(*map(read, invars))
        known.update(zip(eqn.outvars, results, strict=True))
    return list(map(read, jaxpr.outvars))


def _is_plain_call(eqn: JaxprEqn) -> bool:
    if eqn.primitive.name not in _CALLS:
        return False
    placements = (*eqn.params["in_shardings"], *eqn.params["out_shardings"])
    return all(type(each).__name__ == "UnspecifiedValue" for each in placements)
