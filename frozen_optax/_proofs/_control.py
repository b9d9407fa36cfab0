"""Rules that give all three facts at once: operands handed on, choices, programs that are run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from frozen_optax._jaxprs import opened
from frozen_optax._proofs import _constants, _provenance
from frozen_optax._proofs._equations import Equation, Run
from frozen_optax._proofs._known import Dependencies, Known, join
from frozen_optax._proofs._provenance import Forwarded, Part


def _handed_through(known: Known, dtype: Any) -> Known:
    forwarded = _provenance.handed_through(known.forwarded, dtype)
    return dataclasses.replace(known, forwarded=forwarded)


def handed_on(equation: Equation, run: Run) -> list[Known] | None:
    """Each operand is a result, as it is: somewhere else, or under another name."""
    if len(equation.operands) != len(equation.eqn.outvars):
        return None
    return list(equation.operands)


def placed(equation: Equation, run: Run) -> list[Known] | None:
    """Each operand is a result, maybe on other devices."""
    known = handed_on(equation, run)
    return known and [
        _handed_through(each, dtype) if each.forwarded and each.forwarded.is_spread else each
        for each, dtype in zip(known, equation.dtypes, strict=True)
    ]


def _adds_up(sharding: Any) -> bool:
    """Whether what lies on the devices is a sum's terms, which a move to others has to add up."""
    spec = getattr(sharding, "spec", None)
    return bool(getattr(spec, "unreduced", ()))


def handed_to_other_devices(equation: Equation, run: Run) -> list[Known] | None:
    here = getattr(equation.eqn.invars[0].aval, "sharding", None)
    there = equation.params["dst_sharding"]
    return None if _adds_up(here) or _adds_up(there) else placed(equation, run)


def calls(key: str) -> Callable[[Equation, Run], list[Known] | None]:
    """The program that a parameter holds is run on the operands."""

    def known(equation: Equation, run: Run) -> list[Known] | None:
        program = equation.params[key]
        if len(opened(program)[0].invars) != len(equation.operands):
            return None
        return run(program, equation.operands)

    return known


def select(equation: Equation, run: Run) -> list[Known]:
    which, *cases = equation.operands
    dtype_of_which, *_ = equation.dtypes
    possible = {int(_constants.number(dtype_of_which, each)) for each in which.possible or ()}
    if not possible or not possible <= set(range(len(cases))):
        possible = set(range(len(cases)))
    chosen = [cases[i] for i in sorted(possible)]
    chosen = [_handed_through(case, equation.dtype) for case in chosen]
    return [join(chosen, equation.name, which)] if len(chosen) > 1 else chosen


def branches(equation: Equation, run: Run) -> list[Known]:
    which, *operands = equation.operands
    branches = equation.params["branches"]
    if which.possible is not None and len(which.possible) == 1:
        (content,) = which.possible
        index = int(_constants.number(equation.dtypes[0], content))
        return run(branches[min(max(index, 0), len(branches) - 1)], operands)
    results = [run(branch, operands) for branch in branches]
    return [join(cases, equation.name, which) for cases in zip(*results, strict=True)]


def _fixpoint(
    begin: Sequence[Known], turn: Callable[[list[Known]], list[Known]], through: str
) -> list[Known]:
    """What is known of what a loop carries, after any number of turns.

    Each turn can only take away from what is known, so there is an end to it.
    """
    carry = list(begin)
    while True:
        after = [join(pair, through) for pair in zip(carry, turn(carry), strict=True)]
        if all(map(Known.agrees, carry, after)):
            return carry
        carry = after


def while_loop(equation: Equation, run: Run) -> list[Known]:
    params, operands = equation.params, equation.operands
    of_cond, of_body = params["cond_nconsts"], params["body_nconsts"]
    cond_consts, body_consts = operands[:of_cond], operands[of_cond : of_cond + of_body]
    begin = operands[of_cond + of_body :]
    carry = _fixpoint(
        begin, lambda carry: run(params["body_jaxpr"], [*body_consts, *carry]), equation.name
    )
    (goes_on,) = run(params["cond_jaxpr"], [*cond_consts, *carry])

    def after_all_turns(known: Known) -> Known:
        if known.is_constant or known.is_untouched:
            return known  # however often it turns
        deciding = Dependencies.on([known.dependencies, goes_on.dependencies], equation.name)
        return dataclasses.replace(known, dependencies=deciding)

    return list(map(after_all_turns, carry))


def _is_spread(known: Known) -> bool:
    return known.forwarded is not None and known.forwarded.is_spread


def _parts(
    avals: Sequence[Any], wholes: Sequence[Known], are_spread: Callable[[Known], bool]
) -> tuple[list[Known], dict[Part, Known]]:
    """What stands for a part of each array in a program that is run on each of them.

    And what each is a part of.
    """
    whole_of = {Part(): whole for whole in wholes}
    parts = []
    for aval, (part, whole) in zip(avals, whole_of.items(), strict=True):
        forwarded = None
        if hasattr(aval, "shape"):
            forwarded = Forwarded(part, aval, is_spread=are_spread(whole))
        parts.append(dataclasses.replace(whole, forwarded=forwarded))
    return parts, whole_of


def _of_all_parts(
    known: Known, whole_of: Mapping[Part, Known], dtype: Any, is_handed_through: bool
) -> Known:
    """What is known of an array of all parts: where each is what it was, the array is.

    Args:
      known: of each part.
      whole_of: what each is a part of.
      dtype: that of the array.
      is_handed_through: whether taking it apart and putting it together costs what a move does.
    """
    forwarded = known.forwarded
    if forwarded is None or not isinstance(forwarded.source, Part):
        return dataclasses.replace(known, forwarded=None)
    if forwarded.source not in whole_of or not forwarded.is_whole:
        return dataclasses.replace(known, forwarded=None)
    before = whole_of[forwarded.source]
    dependencies = before.dependencies
    if forwarded.losses:
        dependencies = Dependencies.on([before.dependencies, known.dependencies])
    whole = before.forwarded
    if whole is not None and forwarded.losses:
        # What a view has lost are no odd bits of what is viewed.
        whole = None if whole.is_view else whole.at_loss(forwarded.losses)
    if is_handed_through:
        whole = _provenance.handed_through(whole, dtype)
    return Known(known.possible, whole, dependencies)


def _rank(variable: Any) -> int:
    return len(getattr(variable.aval, "shape", ()))


def scan(equation: Equation, run: Run) -> list[Known]:
    eqn, program = equation.eqn, equation.params["jaxpr"]
    inner = opened(program)[0]
    # What is scanned over, and what is stacked, has an axis more outside. Versions of jax count
    # them in parameters of different names.
    is_scanned = [_rank(a) > _rank(b) for a, b in zip(eqn.invars, inner.invars, strict=True)]
    is_stacked = [_rank(a) > _rank(b) for a, b in zip(eqn.outvars, inner.outvars, strict=True)]
    of_carry = is_stacked.count(False)
    of_consts = is_scanned.count(False) - of_carry
    consts, begin, scanned = (
        equation.operands[:of_consts],
        equation.operands[of_consts : of_consts + of_carry],
        equation.operands[of_consts + of_carry :],
    )
    avals = [variable.aval for variable in inner.invars[of_consts + of_carry :]]
    parts, whole_of = _parts(avals, scanned, _is_spread)

    def turn(carry: list[Known]) -> list[Known]:
        return run(program, [*consts, *carry, *parts])

    carry = _fixpoint(begin, lambda carry: turn(carry)[:of_carry], equation.name)
    stacked = turn(carry)[of_carry:]
    # What is carried may be the last of the parts, and that is no input.
    carried = [
        dataclasses.replace(known, forwarded=None)
        if known.forwarded and known.forwarded.source in whole_of
        else known
        for known in carry
    ]
    dtypes = [getattr(variable.aval, "dtype", None) for variable in eqn.outvars[of_carry:]]
    pairs = zip(stacked, dtypes, strict=True)
    return [*carried, *(_of_all_parts(known, whole_of, dtype, True) for known, dtype in pairs)]


def shard_map(equation: Equation, run: Run) -> list[Known] | None:
    program, params = equation.params["jaxpr"], equation.params
    in_specs, out_specs = params["in_specs"], params["out_specs"]
    if len(in_specs) != len(equation.operands):
        return None
    avals = [variable.aval for variable in opened(program)[0].invars]
    # Each device has its part to itself.
    parts, whole_of = _parts(avals, equation.operands, lambda whole: False)
    is_spread = any(map(_is_spread, equation.operands))
    spec_of = dict(zip(whole_of, in_specs, strict=True))
    results = []
    outputs = zip(run(program, parts), out_specs, equation.eqn.outvars, strict=True)
    for known, spec, variable in outputs:
        # Put together as another was taken apart, parts are not where they were.
        alike = {part: whole for part, whole in whole_of.items() if spec_of[part] == spec}
        dtype = getattr(variable.aval, "dtype", None)
        results.append(_of_all_parts(known, alike, dtype, is_spread))
    return results
