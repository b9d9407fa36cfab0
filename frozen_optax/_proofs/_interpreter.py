"""What the results of a traced program are, whatever its inputs are: an abstract interpretation.

Equation by equation, what is known of the operands is turned into what is known of the results.
`_rules.py` says how, primitive by primitive.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax.extend as jex

from frozen_optax._jaxprs import Program, needed, opened
from frozen_optax._proofs import _constants
from frozen_optax._proofs._known import Known, of_input, settled
from frozen_optax._proofs._rules import apply
from frozen_optax._trees import is_mutable

# Programs that were run before, by what was known of their arguments. Loops in loops would run the
# innermost one at each turn of each.
_Runs: TypeAlias = dict[Any, tuple[Program, list[Known]]]


def interpret(program: Program, is_spread: bool = False) -> list[Known]:
    """What is known of each result of a program, whatever its inputs are.

    Args:
      program: with its constants.
      is_spread: whether it is run on several devices.
    """
    arguments = [of_input(i, aval, is_spread) for i, aval in enumerate(program.in_avals)]
    return run(program, arguments)


def run(program: Program, arguments: Sequence[Known], before: _Runs | None = None) -> list[Known]:
    """What is known of each result of a program, from what is known of its arguments."""
    before = {} if before is None else before
    key = (id(program), *(argument.summary for argument in arguments))
    if key not in before:
        inner = functools.partial(run, before=before)
        before[key] = program, _run(program, arguments, inner)  # it keeps the program's id
    return before[key][1]


def _run(
    program: Program, arguments: Sequence[Known], inner: Callable[..., list[Known]]
) -> list[Known]:
    jaxpr, consts = opened(program)
    known = dict(zip(jaxpr.constvars, map(_of_array, jaxpr.constvars, consts), strict=True))
    known.update(zip(jaxpr.invars, arguments, strict=True))

    def read(atom: Any) -> Known:
        return _of_array(atom, atom.val) if isinstance(atom, jex.core.Literal) else known[atom]

    for eqn in needed(jaxpr):
        results = apply(eqn, list(map(read, eqn.invars)), inner)
        for variable, result in zip(eqn.outvars, results, strict=True):
            known[variable] = settled(variable.aval, result)
    return list(map(read, jaxpr.outvars))


def _of_array(variable: Any, array: Any) -> Known:
    """What is known of an array that is at hand; of one that can be written to, nothing."""
    aval = variable.aval
    dtype = None if is_mutable(aval) else getattr(aval, "dtype", None)
    return Known(_constants.of_array(array, dtype))
