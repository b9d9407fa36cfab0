"""Whether a train step can move a frozen leaf: each has to come out as it went in, whatever the arguments are."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax

from frozen_optax._assertions import difference
from frozen_optax._findings import Finding, require_proved, section
from frozen_optax._handed import SIGN_OF_ZERO
from frozen_optax._places import Where, Within
from frozen_optax._programs import Inputs, Result, is_array_or_float, is_number, trace
from frozen_optax._rows import successor_of
from frozen_optax._selection import Selection, frozen_selector
from frozen_optax._trees import describe, spec
from frozen_optax._witnesses import Runs


def _names(step: Callable[..., Any], count: int) -> list[str]:
    try:
        found = [parameter.name for parameter in inspect.signature(step).parameters.values()]
    except (TypeError, ValueError):  # a builtin
        found = []
    return [found[i] if i < len(found) else f"argument {i}" for i in range(count)]


def _kept_in_words(result: Result, number: int | None, leaf: Any) -> tuple[str | None, bool]:
    """What has become of a leaf, the input of that number, if it is proved to have stayed; and whether exactly."""
    if result.output is None:
        return ("itself", True) if number is None and result.known is leaf else (None, False)
    before = spec(leaf)
    if number is None or (result.aval.shape, result.aval.dtype) != (before.shape, before.dtype):
        return None, False
    if 0 in before.shape:
        return "no elements", True
    same = result.value.same
    if same is None or same.input != number or not same.is_input:
        return None, False
    if same.costs & SIGN_OF_ZERO:
        return "itself up to the sign of zero: -0.0 may become 0.0", False
    return (
        ("itself but for odd bits: subnormals and NaN payloads may be lost", False) if same.costs else ("itself", True)
    )


def _change(path: str, result: Result, number: int | None, leaf: Any, words: str | None, inputs: Inputs) -> Finding:
    """Why it is not proved that a leaf stays."""
    finding = Finding(path, result, [])
    if words:
        finding.verdict = f"proved, but not exactly: it is {words}"
        return finding
    if result.output is None or number is None:
        now = describe(result.known if result.output is None else result.aval)
        finding.shown = f"{describe(leaf)} became {now}, whatever it was"
        return finding
    if describe(result.aval) != describe(spec(leaf)):
        finding.shown = f"{describe(spec(leaf))} became {describe(result.aval)}"
    value, first = result.value, inputs.groups[0]
    if value.same and value.same.input >= 0 and value.same.is_input and value.same.input != number:
        finding.reasons.append(f"is {inputs.name(value.same.input)}")
        return finding
    own = 1 << number
    groups = {inputs.name(number): own, f"other leaves of {first.name}": first.bits() & ~own}
    groups |= {group.name: group.bits() for group in inputs.groups[1:]}
    for name, bits in groups.items():
        if value.reads.inputs & bits:
            finding.reasons.append(f"depends on {name}{inputs.way(value.reads, bits, name)}")
    finding.reasons = finding.reasons or ["depends on no argument"]
    return finding


def _show_change(findings: Sequence[tuple[Finding, int]], runs: Runs) -> None:
    in_doubt = [
        (f, number) for f, number in findings if f.verdict == "unknown" and f.result.output is not None and not f.shown
    ]
    if not in_doubt or runs.reason_against:
        return
    run = runs.compiled([f.result.output for f, _ in in_doubt if f.result.output is not None])
    attempts: list[tuple[str, Callable[[], list[Any]]]] = []
    if runs.is_at_hand:
        attempts.append(("run on the arguments as given", lambda: list(runs.given)))
    if not runs.may_not_end:
        attempts.append(("run on random numbers", lambda: runs.numbers(0)))
        attempts.append(("run on random positive numbers", lambda: runs.numbers(1, lambda i: True)))
    for how, make in attempts:
        numbers = make()
        for (finding, number), found in zip(in_doubt, run(*numbers), strict=True):
            if not finding.shown and (changed := difference(numbers[number], found)):
                finding.shown = f"{changed}, {how}"


def assert_step_freezes(
    step: Callable[..., Any],
    *args: Any,
    frozen: Selection = None,
    trainable: Selection = None,
    where: Where | None = None,
    exact: bool = False,
) -> dict[str, str]:
    """Asserts that a whole train step can never move a frozen leaf. A proof, before the first step.

    It traces the step and follows the data: each frozen leaf of what it returns has to be the leaf that went in, or
    that plus a constant zero, whatever all arguments are. So it sees what no look at an optimizer can: a moving
    average, a projection, a cast there and back, batch statistics, adapters merged into the weights.

    Proved means proved of the traced program, for arrays of these shapes and dtypes. What is not proved is refuted, if
    a run on random numbers shows it, or unknown.

    Args:
      step: a function of the parameters, or of a state that holds them, that returns their successor, alone or first
        in a tuple; compiled or not.
      *args: its arguments. Numbers in the first, arrays and Python floats in the others stand for any array of their
        shape and dtype, and may be `jax.ShapeDtypeStruct`s; all else (functions, integers, bools) is taken as it is.
      frozen: what is frozen, as `freeze` takes it.
      trainable: what is not frozen, instead.
      where: says where in the first argument the parameters are, as `jit` takes it.
      exact: do not accept what is true only up to the sign of zero, or but for odd bits.

    Returns:
      What each frozen leaf is after the step, by path: `"itself"`; `"itself but for odd bits: ..."`, as -0.0 was added,
      or it was cast to a wider dtype and back; `"itself up to the sign of zero: ..."`, as 0.0 was added. Compilers
      remove such an addition from a single program. Run op by op, or in several programs, it is there.

    Raises:
      AssertionError: something is not proved. The message names the leaves, the verdict for each, and what it depends
        on by way of which primitives.
      TypeError, ValueError: as `freeze`; the step does not return the successor of its first argument; and what it
        raises.

    Example:
      >>> import frozen_optax as fo, jax, jax.numpy as jnp
      >>> params = {"encoder": jnp.ones(2), "head": jnp.ones(2)}
      >>> fo.assert_step_freezes(lambda p, x: p | {"head": p["head"] - x}, params, 0.1, frozen="encoder")
      {'encoder': 'itself'}
      >>> fo.assert_step_freezes(lambda p, x: jax.tree.map(lambda leaf: leaf * x, p), params, 0.1, frozen="encoder")
      Traceback (most recent call last):
        ...
      AssertionError: 1 of 1 frozen leaves are not proved to stay as they are:
        encoder: refuted: 2 of 2 elements differ, the first at [0]: ... became ...
          depends on encoder through mul
          depends on x through mul
    """
    if not args:
        raise TypeError("assert_step_freezes takes a step and its arguments, the parameters first, and was given none.")
    selector = frozen_selector(frozen, trainable)
    resolution = (selector if where is None else Within(selector, where))._resolve(args[0])
    inputs, names = Inputs(), _names(step, len(args))
    (first, *_), makers = zip(
        *(
            inputs.add(name, arg, is_array_or_float if i else is_number)
            for i, (name, arg) in enumerate(zip(names, args, strict=True))
        ),
        strict=True,
    )

    def program(values: Any) -> tuple[list[Any], list[int]]:
        result = step(*(make(values) for make in makers))
        pairs = successor_of(result, makers[0](values), where)
        leaves = jax.tree.leaves(result)
        pairs = [(ours, theirs) for ours, theirs in pairs if resolution.selected[ours]]
        return [leaves[theirs] for _, theirs in pairs], [ours for ours, _ in pairs]

    results, places, runs = trace(program, inputs)
    leaves = jax.tree.leaves(args[0])
    proved: dict[str, str] = {}
    findings: list[tuple[Finding, int | None]] = []
    for place, result in zip(places, results, strict=True):
        number, leaf = first.numbers.get(place), leaves[place]
        words, is_exact = _kept_in_words(result, number, leaf)
        if words and (is_exact or not exact):
            proved[resolution.paths[place]] = words
        else:
            findings.append((_change(resolution.paths[place], result, number, leaf, words, inputs), number))
    _show_change([(finding, number) for finding, number in findings if number is not None], runs)
    claim = "frozen leaves are not proved to stay as they are"
    require_proved(section([finding for finding, _ in findings], len(results), claim, runs))
    return proved
