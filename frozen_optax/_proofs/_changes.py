"""What a step makes of its frozen leaves: the leaf that went in, or something else."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax

from frozen_optax._bits import is_array
from frozen_optax._messages import Fault, listed
from frozen_optax._proofs._counterexamples import Runs
from frozen_optax._proofs._findings import Finding
from frozen_optax._proofs._known import Dependencies
from frozen_optax._proofs._provenance import Loss
from frozen_optax._proofs._trace import Inputs, Result, Values, as_set, is_number, trace
from frozen_optax._resolution import Resolution
from frozen_optax._trees import describe, is_python_number, is_traced, program_key, spec
from frozen_optax._typing import PyTree, Where
from frozen_optax._where import successor_of


def argument_names(step: Callable[..., Any], count: int) -> list[str]:
    """What to call the first arguments of a step."""
    try:
        found = [parameter.name for parameter in inspect.signature(step).parameters.values()]
    except (TypeError, ValueError):  # a builtin
        found = []
    return [found[i] if i < len(found) else f"argument {i}" for i in range(count)]


def trace_step(
    step: Callable[..., Any],
    inputs: Inputs,
    makers: Sequence[Callable[[Values], PyTree]],
    resolution: Resolution,
    where: Where | None,
) -> tuple[list[Result], list[int], Runs]:
    """What a step returns for the frozen leaves of its first argument, as a program.

    Args:
      step: a function of the arguments that `makers` make of the inputs.
      inputs: the inputs of the program.
      makers: a function of the inputs for each argument.
      resolution: which leaves of the first argument are looked at.
      where: says where in the first argument the parameters are.
    """

    def program(values: Values) -> tuple[list[Any], list[int]]:
        result = step(*(make(values) for make in makers))
        pairs = successor_of(result, makers[0](values), where)
        leaves = jax.tree.leaves(result)
        pairs = [(ours, theirs) for ours, theirs in pairs if resolution.selected[ours]]
        return [leaves[theirs] for _, theirs in pairs], [ours for ours, _ in pairs]

    return trace(program, inputs)


def _are_one_number(left: Any, right: Any) -> bool:
    """Whether two numbers of Python's are the same, which may be two objects."""
    are_numbers = is_python_number(left) and is_python_number(right)
    return are_numbers and program_key(left) == program_key(right)


def kept_in_words(result: Result, number: int | None, leaf: Any) -> tuple[str | None, bool]:
    """What has become of a leaf that is proved to have stayed, the input of that number.

    And whether all its bits are proved to have stayed.
    """
    if result.output is None:
        is_leaf = result.at_hand is leaf or _are_one_number(result.at_hand, leaf)
        return ("itself", True) if number is None and is_leaf else (None, False)
    before = spec(leaf)
    if number is None or (result.aval.shape, result.aval.dtype) != (before.shape, before.dtype):
        return None, False
    if 0 in before.shape:
        return "no elements", True
    forwarded = result.known.forwarded
    if forwarded is None or forwarded.source != number or not forwarded.is_whole:
        return None, False
    if forwarded.losses & Loss.SIGN_OF_ZERO:
        return "itself up to the sign of zero: -0.0 may become 0.0", False
    if forwarded.losses:
        return "itself but for odd bits: subnormals and NaN payloads may be lost", False
    return "itself", True


def change(
    path: str, result: Result, number: int | None, leaf: Any, words: str | None, inputs: Inputs
) -> Finding:
    """Why it is not proved that a leaf stays."""
    finding = Finding(path, result, [])
    if words:
        finding.verdict = f"proved, but not exactly: it is {words}"
        return finding
    if result.output is None or number is None:
        now = describe(result.at_hand if result.output is None else result.aval)
        finding.shown = f"whatever it was, it becomes {now} that does not depend on the arguments"
        return finding
    if describe(result.aval) != describe(spec(leaf)):
        finding.shown = f"{describe(spec(leaf))} became {describe(result.aval)}"
    forwarded = result.known.forwarded
    if forwarded and forwarded.is_whole and forwarded.source != number:
        finding.reasons.append(f"is {inputs.name(forwarded.source)}")
        return finding
    finding.reasons = _dependencies_in_words(result.known.dependencies, number, inputs)
    return finding


def _dependencies_in_words(dependencies: Dependencies, number: int, inputs: Inputs) -> list[str]:
    """What a leaf depends on: itself, the leaves beside it, each other argument."""
    own, (first, *others) = as_set([number]), inputs.groups
    parts = {inputs.name(number): own, f"other leaves of {first.name}": first.inputs & ~own}
    parts |= {group.name: group.inputs for group in others}
    reasons = []
    for name, part in parts.items():
        if dependencies.inputs & part:
            reasons.append(f"depends on {name}{inputs.way(dependencies, part, name)}")
    return reasons or ["depends on no argument"]


def refuse_discards(
    step: Callable[..., Any],
    arguments: dict[str, Any],
    in_doubt: Resolution,
    where: Where | None,
) -> None:
    """Raise where a step makes something else of a frozen leaf than the leaf, or that plus zero.

    It is called while the step is traced, with its tracers, for the leaves that come out as another
    tracer. That costs a second trace. Where all come out as they went in, nothing is traced again.

    Args:
      step: a function of `arguments`, in their order.
      arguments: those that are not static, by their names; the first holds the parameters.
      in_doubt: which leaves of the first argument are looked at.
      where: says where in the first argument the parameters are.

    Raises:
      ValueError: what is computed for a frozen leaf would be thrown away; the message names the
        paths, and what each depends on.
    """
    inputs = Inputs()

    def is_abstract(leaf: Any) -> bool:
        return is_array(leaf) and is_number(leaf)  # under `jax.disable_jit`, an array at hand

    added = [inputs.add(name, value, is_abstract) for name, value in arguments.items()]
    groups, makers = zip(*added, strict=True)
    leaves = jax.tree.leaves(next(iter(arguments.values())))
    try:
        results, places, _ = trace_step(step, inputs, makers, in_doubt, where)
    except jax.errors.JAXTypeError:
        if any(map(is_traced, leaves)):
            raise
        return  # jit is disabled, and the step looks at values: there is no program to look at
    faults = []
    for place, result in zip(places, results, strict=True):
        number, leaf, path = groups[0].input_at.get(place), leaves[place], in_doubt.paths[place]
        words, _ = kept_in_words(result, number, leaf)
        if not words:
            finding = change(path, result, number, leaf, None, inputs)
            what = finding.shown or "it is not known to be the leaf that went in"
            faults.append(Fault(path, what, finding.reasons))
    if faults:
        heading = "leaves are frozen here, and the step makes something else of them:"
        lines = listed(f"{len(faults)} {heading}", faults)
        raise ValueError("\n".join([*lines, *_WAYS_OUT]))


_WAYS_OUT = [
    "That would be computed and then thrown away.",
    "- If they are to change (statistics, counts of random numbers, moving averages, what the "
    "optimizer trains), leave them out here: where=lambda state: (the parameters alone), or "
    "frozen=tx.frozen & ~fo.by_path(...).",
    "- If they are to stay, freeze them in the optimizer and say it once, fo.jit(frozen=tx). A "
    "wrapper around it may move them again: put it inside. A zero update times a number may be "
    "none: add it by fo.apply_updates.",
    "- If it is meant, write fo.jit(..., discard=True).",
]
