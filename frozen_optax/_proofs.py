"""Proofs that frozen leaves stay as they are: of a traced program and for all its inputs, before the first step.

Proved is what follows from the program alone, refuted what a run on numbers has shown, all else unknown.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from frozen_optax import _bits, _numbers
from frozen_optax._assertions import difference
from frozen_optax._flow import SIGN_OF_ZERO
from frozen_optax._optimizer import trees_of, with_extra_args
from frozen_optax._places import Where, Within
from frozen_optax._programs import Inputs, Result, is_array_or_float, is_number, trace
from frozen_optax._rows import successor_of
from frozen_optax._selection import Selection, Selector, frozen_selector
from frozen_optax._trees import PyTree, describe, is_hole, spec
from frozen_optax._witnesses import Runs

_MAX_SHOWN = 10  # leaves described in one message
_STEPS = 3  # of a run that is to show that gradients have an effect


@dataclasses.dataclass
class _Finding:
    """A leaf of which something is not proved, and why not; `shown` by a run, if one has shown the contrary."""

    path: str
    result: Result
    reasons: list[str]
    shown: str | None = None
    verdict: str = "unknown"


def _report(findings: Sequence[_Finding], count: int, claim: str, runs: Runs) -> list[str]:
    if not findings:
        return []
    lines = [f"{len(findings)} of {count} {claim}:"]
    for finding in findings[:_MAX_SHOWN]:
        verdict = f"refuted: {finding.shown}" if finding.shown else finding.verdict
        not_run = f" ({runs.reason_against})" if verdict == "unknown" and runs.reason_against else ""
        lines.append(f"  {finding.path or 'the root'}: {verdict}{not_run}")
        lines += [f"    {reason}" for reason in finding.reasons]
    return lines + ([f"  ... and {len(findings) - _MAX_SHOWN} more"] if len(findings) > _MAX_SHOWN else [])


def _raise(*sections: list[str]) -> None:
    if lines := list(itertools.chain(*sections)):
        raise AssertionError("\n".join(lines))


# --- transformations


class _Update:
    """A traced `update`: its arguments, and what it returns for any of them."""

    def __init__(self, tx: Any, params: PyTree, selector: Selector, extra_args: dict[str, Any]):
        tx, inputs = with_extra_args(tx), Inputs()
        first = trees_of(params)[0]
        resolution = selector._resolve(first)
        has_gradient = lambda leaf: is_number(leaf) and not _bits.is_key(leaf)
        gradients = resolution.unflatten(
            [spec(leaf) if has_gradient(leaf) else _bits.known_zero(leaf) for leaf in jax.tree.leaves(first)]
        )
        self.inputs = inputs
        self.params, make_params = inputs.add("the parameters", params, is_number)
        self.gradients, make_gradients = inputs.add("the gradients", gradients, is_number)
        self.init = lambda *values: tx.init(make_params(values))
        state = jax.eval_shape(self.init, *map(spec, self.params.leaves))
        self.state, make_state = inputs.add("the state", state, is_number)
        self.extra, make_extra = inputs.add("the extra arguments", extra_args, is_array_or_float)

        def update(values: Any) -> tuple[list[Any], tuple[int, bool]]:
            given = make_gradients(values), make_state(values), make_params(values)
            updates, new = tx.update(*given, **make_extra(values))
            rows = [resolution.up_to(tree, "the updates") for tree in trees_of(updates)]
            after, treedef = jax.tree.flatten(new)
            return [*itertools.chain(*rows), *after], (len(rows), treedef == jax.tree.structure(state))

        results, (trees, self.state_stays_alike), self.runs = trace(update, inputs)
        count = trees * len(resolution.paths)
        self.updates, self.after = results[:count], results[count:]
        self.paths, self.selected = resolution.paths * trees, resolution.selected * trees
        frozen = self.gradients.bits(resolution.selected)
        self.gradients_of = {"frozen": frozen, "trained": self.gradients.bits() & ~frozen}

    def fresh(self, numbers: list[Any]) -> list[Any]:
        """Inputs with the state that `init` makes of the parameters among them."""
        state = jax.tree.leaves(jax.jit(self.init)(*numbers[self.params.span]))
        return [*numbers[: self.state.first], *state, *numbers[self.state.span.stop :]]


def _zero_in_words(update: Result) -> str | None:
    """What an update is, if it is proved to be none."""
    if update.output is None:
        known = update.known
        if known is None or is_hole(known) or getattr(known, "dtype", None) == jax.dtypes.float0:
            return "absent"
        dtype = spec(known).dtype if is_number(known) else None
        among = _numbers.of_array(known, dtype)
    else:
        dtype, among = update.aval.dtype, update.value.among
    if among is None or not _numbers.is_zero(among, dtype):
        return None
    signs = {np.signbit(np.real(_numbers.number(dtype, each))) for each in among}
    names = ["-0.0" if sign else "0.0" for sign in sorted(signs)] if _numbers.is_float(dtype) else ["0"]
    return f"a constant {' or '.join(names)}" if among else "no elements"


def _guess(name: str, way: str) -> str:
    if "random" in way or "threefry" in way:
        return ": noise after the freeze?"
    return {
        "the parameters": ": weight decay after the freeze?",
        "the state": ": moments from before the freeze, or a schedule after it?",
        "the gradients of trained leaves": ": a norm after the freeze, which may be infinite or NaN?",
        "the gradients of frozen leaves": ": is it frozen at all?",
    }.get(name, "")


def _movement(update: _Update) -> list[_Finding]:
    groups = {
        "the gradients of frozen leaves": update.gradients_of["frozen"],
        "the parameters": update.params.bits(),
        "the state": update.state.bits(),
        "the gradients of trained leaves": update.gradients_of["trained"],
        "the extra arguments": update.extra.bits(),
    }
    findings = []
    for path, result, frozen in zip(update.paths, update.updates, update.selected, strict=True):
        if not frozen or _zero_in_words(result):
            continue
        reads, reasons = result.value.reads, []
        for name, bits in groups.items():
            if reads.inputs & bits:
                way = update.inputs.way(reads, bits)
                reasons.append(f"depends on {name}{way}{_guess(name, way)}")
        if result.output is None:
            reasons = [f"is {describe(result.known)} that is not zero"]
        findings.append(_Finding(path, result, reasons or ["is made of constants, and is not known to be zero"]))
    return findings


def _first_nonzero(update: Any) -> str | None:
    host = np.asarray(update)
    if not (wrong := ~(host == 0)).any():
        return None
    index = tuple(map(int, np.argwhere(wrong)[0]))
    return f"{host[index]} at {list(index)}"


def _attempts(update: _Update) -> Iterator[tuple[str, Callable[[], list[Any]]]]:
    """Inputs that may show a movement, the likeliest first."""
    runs = update.runs
    yield "from a fresh state", lambda: update.fresh(runs.numbers(0))
    if not runs.may_not_end:
        in_state = range(update.state.span.start, update.state.span.stop)
        yield "from a state with moments of its own", lambda: runs.numbers(1, in_state.__contains__)

    def with_nan() -> list[Any]:
        numbers = update.fresh(runs.numbers(2))
        for i in range(len(numbers)):
            if update.gradients_of["trained"] >> i & 1 and _numbers.is_float(numbers[i].dtype):
                numbers[i] = numbers[i] * np.asarray(np.nan, numbers[i].dtype)
        return numbers

    yield "with NaN in the gradients of trained leaves", with_nan


def _show_movement(update: _Update, findings: list[_Finding]) -> None:
    for finding in findings:
        if finding.result.output is None:
            finding.shown = f"it is {_first_nonzero(finding.result.known)}" if is_number(finding.result.known) else None
    open_findings = [finding for finding in findings if finding.result.output is not None]
    if not open_findings or update.runs.reason_against:
        return
    run = update.runs.compiled([f.result.output for f in open_findings if f.result.output is not None])
    for how, numbers in _attempts(update):
        for finding, found in zip(open_findings, run(*numbers()), strict=True):
            if not finding.shown and (nonzero := _first_nonzero(found)):
                finding.shown = f"it is {nonzero}, run on random numbers {how}"
        if all(finding.shown for finding in open_findings):
            return


def _interference(update: _Update) -> list[_Finding]:
    """Trained leaves whose update frozen gradients can have an effect on, at once or by way of the state."""
    tainted, before = update.gradients_of["frozen"], -1
    while tainted != before:
        before = tainted
        if not update.state_stays_alike and any(result.value.reads.inputs & tainted for result in update.after):
            tainted |= update.state.bits()
        for number, result in zip(range(*update.state.span.indices(10**9)), update.after, strict=False):
            if result.value.reads.inputs & tainted:
                tainted |= 1 << number
    if not update.runs.is_seen:
        tainted = -1
    findings = []
    for path, result, frozen in zip(update.paths, update.updates, update.selected, strict=True):
        reads = result.value.reads
        if frozen or not reads.inputs & tainted or not update.gradients_of["frozen"]:
            continue
        if at_once := reads.inputs & update.gradients_of["frozen"]:
            reason = f"depends on the gradients of frozen leaves{update.inputs.way(reads, at_once)}"
        else:
            reason = (
                f"depends on what earlier steps left in the state{update.inputs.way(reads, reads.inputs & tainted)}"
            )
        findings.append(_Finding(path, result, [reason]))
    return findings


def _show_interference(update: _Update, findings: list[_Finding]) -> None:
    runs = update.runs
    if not findings or runs.reason_against or not update.state_stays_alike:
        return
    outputs = sorted({r.output for r in (*update.after, *(f.result for f in findings)) if r.output is not None})
    compiled, order = runs.compiled(outputs), {output: i for i, output in enumerate(outputs)}
    of = lambda result, found: result.known if result.output is None else found[order[result.output]]

    def train(frozen_gradient: Callable[[Any], Any]) -> list[list[Any]]:
        numbers, updates = update.fresh(runs.numbers(0)), []
        for _ in range(_STEPS):
            for i, number in enumerate(numbers):
                if update.gradients_of["frozen"] >> i & 1:
                    numbers[i] = frozen_gradient(number)
            found = compiled(*numbers)
            updates.append([of(finding.result, found) for finding in findings])
            numbers[update.state.span] = [of(result, found) for result in update.after]
        return updates

    one = train(lambda gradient: gradient)
    others = {
        "are another": train(lambda gradient: (gradient * 3).astype(gradient.dtype)),
        "are NaN": train(lambda g: g * np.asarray(np.nan, g.dtype) if _numbers.is_float(g.dtype) else g),
    }
    for how, other in others.items():
        for i, finding in enumerate(findings):
            for step in range(_STEPS):
                if not finding.shown and (found := difference(one[step][i], other[step][i])):
                    finding.shown = f"at step {step + 1}, where frozen gradients {how}: {found}"


def assert_update_freezes(
    tx: Any,
    params: PyTree,
    frozen: Selection = None,
    *,
    trainable: Selection = None,
    non_interference: bool = True,
    **extra_args: Any,
) -> dict[str, str]:
    """Asserts that a gradient transformation can never move a frozen leaf. A proof, before the first step.

    It traces `tx.init` and `tx.update` and follows the data. The update of a frozen leaf has to be a constant zero, or
    absent, whatever the gradients, the parameters, the state (not only a fresh one) and the extra arguments are. And
    the updates of trained leaves must not depend on the gradients of frozen ones, at once or by way of the state; that
    is reported apart.

    Proved means proved of the traced program, for arrays of these shapes and dtypes. What is not proved is refuted, if
    a run on random numbers shows it, or unknown. A zero times something that may be infinite is not zero.

    Args:
      tx: any gradient transformation.
      params: the parameters, or their `jax.ShapeDtypeStruct`s; for `optax.lookahead` its pair of trees.
      frozen: what is frozen, as `freeze` takes it.
      trainable: what is not frozen, instead.
      non_interference: False leaves out the second check.
      **extra_args: what `tx.update` needs besides, as it would be given: arrays and Python floats stand for any of
        their shape, all else (functions, integers, bools) is taken as it is.

    Returns:
      What the update of each frozen leaf is, by path: `"absent"`, `"a constant -0.0"`, `"a constant 0.0"`. Added by
      `optax.apply_updates`, 0.0 turns -0.0 into 0.0; `frozen_optax.apply_updates` adds no zero.

    Raises:
      AssertionError: something is not proved. The message names the leaves, the verdict for each, and what it depends
        on by way of which primitives.
      TypeError, ValueError: as `freeze`, and what `tx` raises.

    Example:
      >>> import frozen_optax as fo, jax.numpy as jnp, optax
      >>> params = {"encoder": jnp.ones(2), "head": jnp.ones(2)}
      >>> fo.assert_update_freezes(fo.with_frozen(optax.adamw(1e-3), "encoder"), params, "encoder")
      {'encoder': 'a constant -0.0'}
      >>> fo.assert_update_freezes(optax.chain(fo.freeze("encoder"), optax.adamw(1e-3)), params, "encoder")
      Traceback (most recent call last):
        ...
      AssertionError: 1 of 1 frozen leaves have an update that is not proved to be zero:
        encoder: refuted: it is -... at [0], run on random numbers from a fresh state
          depends on the parameters (encoder) through mul, add, mul: weight decay after the freeze?
          depends on the state (1/0/mu/encoder) through mul, add, ...: moments from before the freeze, or a schedule ...
    """
    update = _Update(tx, params, frozen_selector(frozen, trainable), extra_args)
    movement = _movement(update)
    _show_movement(update, movement)
    steered = _interference(update) if non_interference else []
    _show_interference(update, steered)
    count = sum(update.selected)
    claims = (
        "frozen leaves have an update that is not proved to be zero",
        "trained leaves have an update that is not proved to be independent of frozen gradients",
    )
    _raise(
        _report(movement, count, claims[0], update.runs),
        _report(steered, len(update.selected) - count, claims[1], update.runs),
    )
    rows = itertools.compress(zip(update.paths, update.updates, strict=True), update.selected)
    return {path: _zero_in_words(result) or "" for path, result in rows}


# --- steps


def _names(step: Callable[..., Any], count: int) -> list[str]:
    try:
        found = [parameter.name for parameter in inspect.signature(step).parameters.values()]
    except (TypeError, ValueError):  # a builtin
        found = []
    return [found[i] if i < len(found) else f"argument {i}" for i in range(count)]


def _kept_in_words(result: Result, number: int | None, leaf: Any) -> tuple[str | None, bool]:
    """What has become of a leaf, the input of that number, if it is proved to have stayed; and if it did in all bits."""
    if result.output is None:
        return ("itself", True) if result.known is leaf else (None, False)
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


def _change(path: str, result: Result, number: int | None, leaf: Any, words: str | None, inputs: Inputs) -> _Finding:
    """Why it is not proved that a leaf stays."""
    finding = _Finding(path, result, [])
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


def _show_change(findings: Sequence[tuple[_Finding, int]], runs: Runs) -> None:
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
      *args: its arguments. Numbers in the first, arrays and Python floats in the others stand for any of their shape
        and dtype, and may be `jax.ShapeDtypeStruct`s; all else (functions, integers, bools) is taken as it is.
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
    inputs_at = dict(zip(first.places, range(first.first, first.span.stop), strict=True))
    proved: dict[str, str] = {}
    findings: list[tuple[_Finding, int | None]] = []
    for place, result in zip(places, results, strict=True):
        number, leaf = inputs_at.get(place), leaves[place]
        words, is_exact = _kept_in_words(result, number, leaf)
        if words and (is_exact or not exact):
            proved[resolution.paths[place]] = words
        else:
            findings.append((_change(resolution.paths[place], result, number, leaf, words, inputs), number))
    _show_change([(finding, number) for finding, number in findings if number is not None], runs)
    claim = "frozen leaves are not proved to stay as they are"
    _raise(_report([finding for finding, _ in findings], len(results), claim, runs))
    return proved
