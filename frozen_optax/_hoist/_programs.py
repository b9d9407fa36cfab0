"""A function as one flat program, and parts of such a program as functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend as jex
from jax.extend.core import JaxprEqn

from frozen_optax._hoist._places import Fact, fact_of, looked_up
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

    Where each example is looked up at its own place, that is written so, too (`_places.py`).
    A call that says where its arrays lie is left whole, and so are calls with a derivative of their
    own, branches, loops and `jax.checkpoint`.
    """
    # Else loops would be written out, too, under `jax.disable_jit()`, and the program be another.
    with jax.disable_jit(False):
        program = jax.make_jaxpr(function)(*avals)
        nothing = [None] * len(avals)
        return jax.make_jaxpr(lambda *values: _written_out(program, values, nothing)[0])(*avals)


def _written_out(
    program: Program, values: Sequence[Any], facts: Sequence[Fact]
) -> tuple[list[Any], list[Fact]]:
    """The results of a program, and what is known of them, of its operands and what is of these."""
    jaxpr, consts = opened(program)
    made = dict(zip(jaxpr.constvars, consts, strict=True))
    made.update(zip(jaxpr.invars, values, strict=True))
    known = dict(zip(jaxpr.invars, facts, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if is_literal(atom) else made[atom]

    def fact(atom: Any) -> Fact:
        return None if is_literal(atom) else known.get(atom)

    for eqn in jaxpr.eqns:
        operands, of_operands = list(map(read, eqn.invars)), list(map(fact, eqn.invars))
        if _is_plain_call(eqn):
            results, of_results = _written_out(eqn.params["jaxpr"], operands, of_operands)
        elif (found := looked_up(eqn, of_operands, operands)) is not None:
            results, of_results = [found], [None]
        else:
            invars = list(dict.fromkeys(atom for atom in eqn.invars if not is_literal(atom)))
            results = part_of(jaxpr, invars, [eqn], eqn.outvars)(*map(read, invars))
            of_results = [fact_of(eqn, of_operands, operands)] if len(results) == 1 else []
        made.update(zip(eqn.outvars, results, strict=True))
        known.update(zip(eqn.outvars, of_results, strict=False))
    return list(map(read, jaxpr.outvars)), list(map(fact, jaxpr.outvars))


def _is_plain_call(eqn: JaxprEqn) -> bool:
    if eqn.primitive.name not in _CALLS:
        return False
    placements = (*eqn.params["in_shardings"], *eqn.params["out_shardings"])
    return all(type(each).__name__ == "UnspecifiedValue" for each in placements)
