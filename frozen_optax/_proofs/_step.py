"""Whether a train step can move a frozen leaf: each has to come out as it went in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from frozen_optax import _bits
from frozen_optax._assertions import difference
from frozen_optax._jit import Step
from frozen_optax._nnx import opened
from frozen_optax._proofs._changes import argument_names, change, kept_in_words, trace_step
from frozen_optax._proofs._counterexamples import Runs
from frozen_optax._proofs._findings import Finding, in_words, require_proved, running, section
from frozen_optax._proofs._trace import Inputs, Result, is_array_or_float, is_number
from frozen_optax._selection import resolve_frozen
from frozen_optax._selectors import resolve
from frozen_optax._trees import refuse_mutable, spec
from frozen_optax._typing import Frozen, Where


def _show_change(findings: Sequence[tuple[Finding, int]], runs: Runs) -> None:
    """Look for runs in which leaves change, which are the inputs of these numbers."""
    in_doubt = [
        (finding, number, finding.result.output)
        for finding, number in findings
        if finding.verdict == "unknown" and not finding.shown and finding.result.output is not None
    ]
    if not in_doubt or runs.reason_against:
        return
    run = runs.compiled([output for _, _, output in in_doubt])
    attempts: list[tuple[str, Callable[[], list[Any]]]] = []
    if runs.is_at_hand:
        attempts.append(("run on the arguments as given", lambda: list(runs.given)))
    if not runs.may_not_end:
        attempts.append(("run on random numbers", lambda: runs.numbers(0)))
        positive = lambda: runs.numbers(1, lambda i: True)
        attempts.append(("run on random positive numbers", positive))
    for how, make in attempts:
        numbers = make()
        for (finding, number, _), found in zip(in_doubt, run(*numbers), strict=True):
            if not finding.shown and (changed := difference(numbers[number], found)):
                finding.shown = f"{changed}, {how}"


def _is_rounded(leaf: Any) -> bool:
    """Whether a compiled step hands back another number: a Python float is a float32 there."""
    if _bits.is_array(leaf) or not isinstance(leaf, (float, complex)) or leaf != leaf:
        return False
    there = np.asarray(leaf).astype(spec(leaf).dtype)
    return complex(there) != complex(leaf)  # in its own precision, as numpy compares in theirs


def _rounded(path: str, result: Result, leaf: Any) -> Finding:
    dtype = spec(leaf).dtype
    verdict = f"unknown (it is the Python number {leaf!r}, which a compiled step rounds to {dtype})"
    reason = "pass jnp.asarray(...) of it, in the dtype that it shall keep, or freeze it in fo.jit"
    return Finding(path, result, [reason], verdict=verdict)


def assert_step_freezes(
    step: Callable[..., Any],
    *args: Any,
    frozen: Frozen = None,
    trainable: Frozen = None,
    where: Where | None = None,
    exact: bool = False,
) -> dict[str, str]:
    """Asserts that a whole train step can never move a frozen leaf. A proof, before the first step.

    It traces the step and follows the data: each frozen leaf of what it returns has to be the leaf
    that went in, or that plus a constant zero, whatever all arguments are. So it sees what no look
    at an optimizer can: a moving average, a projection, a cast there and back, batch statistics,
    adapters merged into the weights.

    Proved means proved of the traced program, for arrays of these shapes and dtypes. What is not
    proved is refuted, if a run on random numbers shows it, or unknown.

    Args:
      step: a function of the parameters, or of a state that holds them, that returns their
        successor, alone or first in a tuple; compiled or not. Of a step under `frozen_optax.jit` it
        is the function itself that is looked at.
      *args: its arguments. Numbers in the first, arrays and Python floats in the others stand for
        any array of their shape and dtype, and may be `jax.ShapeDtypeStruct`s; all else (functions,
        integers, bools) is taken as it is.
      frozen: the leaves that are frozen: a glob on their paths (`"encoder"`), a compiled regex, a
        `Selector`, a list of these, a predicate `(path, leaf) -> bool`, a bool, a pytree of bools,
        or the optimizer that `with_frozen` returned.
      trainable: the leaves that are not, instead of `frozen`: exactly one of the two is given.
      where: a function that returns the parameters in a larger state (`lambda state:
        state.params`), where the first argument is such a state. It may return a tuple of several
        parts; paths are relative to each.
      exact: do not accept what is true only up to the sign of zero, or but for odd bits.

    Returns:
      What each frozen leaf is after the step, by path: `"itself"`; `"itself but for odd bits:
      ..."`, as -0.0 was added, it was cast to a wider dtype and back, or a float of 16 bits or less
      was moved; `"itself up to the sign of zero: ..."`, as 0.0 was added. Compilers remove such an
      addition from a single program. Run op by op, or in several programs, it is there.

    Raises:
      AssertionError: something is not proved. The message names the leaves, the verdict for each,
        and what it depends on by way of which primitives.
      TypeError, ValueError: nothing is selected, or a name that does not exist; the step does not
        return the successor of its first argument; and what it raises.

    Example:
      >>> import frozen_optax as fo, jax, jax.numpy as jnp
      >>> params = {"encoder": jnp.ones(2), "head": jnp.ones(2)}
      >>> def step(p, x):
      ...     return p | {"head": p["head"] - x}
      >>> fo.assert_step_freezes(step, params, 0.1, frozen="encoder")
      {'encoder': 'itself'}
      >>> def decay(p, x):
      ...     return jax.tree.map(lambda leaf: leaf * x, p)
      >>> fo.assert_step_freezes(decay, params, 0.1, frozen="encoder")
      Traceback (most recent call last):
        ...
      AssertionError: 1 of 1 frozen leaves are not proved to stay as they are:
        encoder: refuted: 2 of 2 elements differ, the first at [0]: ... became ...
          depends on encoder through mul
          depends on x through ...
    """
    if not args:
        raise TypeError(
            "assert_step_freezes takes a step and its arguments, the parameters first, and was "
            "given none."
        )
    of_nnx = opened(step, args, frozen, trainable)
    if of_nnx is None:
        resolution = resolve_frozen(frozen, trainable, args[0], where=where, to_check=True)
    else:
        step, args, selector = of_nnx
        resolution = resolve(selector, args[0], to_check=True)
    is_step = isinstance(step, Step)
    if is_step:  # it hands back the frozen leaves that went in, whatever its function does
        step = step.__wrapped__
    refuse_mutable(args[0])
    inputs, makers = Inputs(), []
    for i, (name, arg) in enumerate(zip(argument_names(step, len(args)), args, strict=True)):
        _, make = inputs.add(name, arg, is_array_or_float if i else is_number)
        makers.append(make)
    results, places, runs = trace_step(step, inputs, makers, resolution, where)

    leaves = jax.tree.leaves(args[0])
    proved: dict[str, list[str]] = {}
    findings: list[Finding] = []
    in_doubt: list[tuple[Finding, int]] = []
    for place, result in zip(places, results, strict=True):
        path, leaf = resolution.paths[place], leaves[place]
        number = inputs.groups[0].input_at.get(place)
        words, is_exact = kept_in_words(result, number, leaf)
        is_passed = resolution.numbers[place] and not (is_step or of_nnx)
        if words and is_passed and _is_rounded(leaf):
            findings.append(_rounded(path, result, leaf))
        elif words and (is_exact or not exact):
            proved.setdefault(path, []).append(words)
        else:
            findings.append(change(path, result, number, leaf, words, inputs))
            if number is not None:
                in_doubt.append((findings[-1], number))
    with running(findings):
        _show_change(in_doubt, runs)
    claim = "frozen leaves are not proved to stay as they are"
    require_proved(section(findings, len(results), claim, runs))
    return in_words(proved)
