"""Whether an update can move a frozen leaf, and frozen gradients steer the others."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from frozen_optax import _bits
from frozen_optax._assertions import difference
from frozen_optax._proofs import _constants
from frozen_optax._proofs._findings import Finding, in_words, require_proved, running, section
from frozen_optax._proofs._known import InputSet
from frozen_optax._proofs._trace import (
    Group,
    Result,
    abstract,
    as_set,
    is_number,
)
from frozen_optax._proofs._traced_update import TracedUpdate, traced_updates
from frozen_optax._selection import resolve_frozen
from frozen_optax._trees import describe, is_hole, spec
from frozen_optax._typing import Frozen, PyTree
from frozen_optax._with_frozen import trees_of

_MOVING = "frozen leaves have an update that is not proved to be zero"
_STEERED = "trained leaves have an update that is not proved to be independent of frozen gradients"


def _nan(number: Any) -> Any:
    is_float = _constants.is_float(number.dtype)
    return number * np.asarray(np.nan, number.dtype) if is_float else number


# --- frozen leaves


def _fits(shape: tuple[int, ...], leaf: Any) -> bool:
    """Whether a sum with an update of this shape has the leaf's own."""
    own = np.shape(leaf)
    if len(shape) > len(own):
        return False
    pairs = zip(shape[::-1], own[::-1], strict=False)
    return all(length in (1, of_leaf) for length, of_leaf in pairs)


def _rounds(own: Any, dtype: Any, weak: bool) -> bool:
    """Whether a sum with a zero of another dtype is in one that rounds the parameter's numbers."""
    if dtype == own:
        return False
    if weak and _constants.is_float(own) and not _constants.is_complex(dtype):
        return False  # the sum is in the parameter's own
    try:
        of_sum = jax.dtypes.canonicalize_dtype(jnp.promote_types(own, dtype))
    except ValueError:  # there is no such sum
        return True
    return not _constants.holds(np.dtype(of_sum), own)


def _zero_in_words(update: Result, leaf: Any) -> str | None:
    """What an update of a leaf is, if it is proved to be none."""
    if update.output is None:
        found = update.at_hand
        is_float0 = getattr(found, "dtype", None) == jax.dtypes.float0
        if found is None or is_hole(found) or is_float0:
            return "absent"
        dtype, shape = (spec(found).dtype if is_number(found) else None), np.shape(found)
        possible = _constants.of_array(found, dtype)
        weak = abstract(found).weak_type
    else:
        dtype, shape, weak = update.aval.dtype, update.aval.shape, update.aval.weak_type
        possible = update.known.possible
    if possible is None or not _constants.is_zero(possible, dtype):
        return None
    if not is_number(leaf):
        return None
    if not _fits(shape, leaf) or _rounds(spec(leaf).dtype, dtype, weak):
        return None
    if not possible:
        return "no elements"
    if not _constants.is_float(dtype):
        return "a constant 0"
    signs = {np.signbit(np.real(_constants.number(dtype, each))) for each in possible}
    names = ["-0.0" if sign else "0.0" for sign in sorted(signs)]
    return f"a constant {' or '.join(names)}"


_GUESSES = {
    "the parameters": "weight decay after the freeze?",
    "a random key in the state": "noise after the freeze?",
    "the state": "moments from before the freeze, or a schedule after it?",
    "the gradients of trained leaves": "a norm after the freeze, which may be infinite or NaN?",
    "the gradients of frozen leaves": "is it frozen at all?",
    "the extra arguments": "a loss that scales all updates?",
}


def _random_keys(state: Group) -> InputSet:
    """Typed keys, and what looks like a raw one."""

    def is_random(path: str, leaf: Any) -> bool:
        if _bits.is_key(leaf):
            return True
        is_raw = leaf.dtype == np.uint32 and leaf.shape[-1:] in ((2,), (4,))
        return is_raw and "key" in path

    rows = zip(itertools.count(state.first), state.paths, state.leaves, strict=False)
    return as_set(number for number, path, leaf in rows if is_random(path, leaf))


def _movement(update: TracedUpdate) -> list[Finding]:
    """Frozen leaves whose update is not proved to be zero."""
    keys = _random_keys(update.state)
    groups = {
        "the gradients of frozen leaves": update.frozen_gradients,
        "the parameters": update.params.inputs,
        "a random key in the state": keys,
        "the state": update.state.inputs & ~keys,
        "the gradients of trained leaves": update.trained_gradients,
        "the extra arguments": update.extra.inputs & ~update.frozen_gradients,
    }
    findings = []
    for path, leaf, result in update.rows(frozen=True):
        if _zero_in_words(result, leaf):
            continue
        reasons = _causes(update, result, leaf, groups)
        reasons = reasons or ["is made of constants, and is not known to be zero"]
        findings.append(Finding(path, result, reasons))
    return findings


def _causes(
    update: TracedUpdate, result: Result, leaf: Any, groups: Mapping[str, InputSet]
) -> list[str]:
    """Why an update may not be zero."""
    if result.output is None:
        return [f"is {describe(result.at_hand)} that is not zero"]
    dependencies, reasons = result.known.dependencies, []
    for name, group in groups.items():
        if dependencies.inputs & group:
            way = update.inputs.way(dependencies, group)
            reasons.append(f"depends on {name}{way}: {_GUESSES[name]}")
    if not is_number(leaf):
        return [*reasons, f"is an update, and the parameter {describe(leaf)}"]
    aval, own = result.aval, spec(leaf)
    if not _fits(aval.shape, leaf) or _rounds(own.dtype, aval.dtype, aval.weak_type):
        reasons.append(f"is {describe(aval)}, and the parameter {describe(own)}")
    return reasons


def _first_nonzero(update: Any) -> str | None:
    if not is_number(update) or _bits.is_key(update):
        return None
    host = np.asarray(update)
    wrong = ~(host == 0)
    if not wrong.any():
        return None
    index = tuple(map(int, np.argwhere(wrong)[0]))
    return f"{host[index]} at {list(index)}"


def _attempts(update: TracedUpdate) -> Iterator[tuple[str, list[Any], Callable[[int, Any], Any]]]:
    """Inputs that may show a movement, the likeliest first."""
    runs, fresh = update.runs, update.fresh(0)

    def as_it_is(number: int, gradient: Any) -> Any:
        return gradient

    def with_nan(number: int, gradient: Any) -> Any:
        return _nan(gradient) if update.trained_gradients >> number & 1 else gradient

    if fresh:
        yield "from a fresh state", fresh, as_it_is
    if runs.may_not_end:
        return
    in_state = range(update.state.span.start, update.state.span.stop)
    moments = runs.numbers(1, in_state.__contains__)
    yield "from a state with moments of its own", moments, as_it_is
    if fresh:
        yield "from a fresh state with NaN in the gradients of trained leaves", fresh, with_nan


def _show_movement(update: TracedUpdate, findings: list[Finding]) -> None:
    """Look for runs in which frozen leaves have an update."""
    if not findings or update.runs.reason_against:
        return
    finding_of = {id(finding.result): finding for finding in findings}
    for how, numbers, gradient in _attempts(update):
        for step, updates in enumerate(update.rollout(numbers, gradient)):
            for result, found in zip(update.updates, updates, strict=True):
                finding = finding_of.get(id(result))
                if finding and not finding.shown and (nonzero := _first_nonzero(found)):
                    finding.shown = (
                        f"it is {nonzero} at step {step + 1} of a run on random numbers {how}"
                    )
            if all(finding.shown for finding in findings):
                return


# --- trained leaves


def _reached_by_frozen_gradients(update: TracedUpdate, updates: Sequence[TracedUpdate]) -> InputSet:
    """The frozen gradients, and what they can have left in the state."""
    reached = update.frozen_gradients
    if len(updates) > 1:  # which leaf of one form is which of the next is not known
        is_stored = any(
            result.known.dependencies.inputs & each.frozen_gradients
            for each in updates
            for result in each.after
        )
        return reached | (update.state.inputs if is_stored else 0)
    before = None
    while reached != before:
        before = reached
        for place, number in update.state.input_at.items():
            if update.after[place].known.dependencies.inputs & reached:
                reached |= as_set([number])
    return reached


def _interference(update: TracedUpdate, reached: InputSet) -> list[Finding]:
    """Trained leaves whose update depends on frozen gradients, or on what these have reached."""
    frozen = update.frozen_gradients
    if not frozen:
        return []
    findings = []
    for path, _, result in update.rows(frozen=False):
        dependencies = result.known.dependencies
        if dependencies.inputs & frozen:
            way = update.inputs.way(dependencies, frozen)
            reason = f"depends on the gradients of frozen leaves{way}"
        elif dependencies.inputs & reached:
            way = update.inputs.way(dependencies, reached)
            reason = f"depends on what earlier steps may have left in the state{way}"
        elif not (update.runs.only_returns or result.output is None or result.known.is_constant):
            reason = "may depend on what a mutable array or a callback carries from them"
        else:
            continue
        findings.append(Finding(path, result, [reason]))
    return findings


def _show_interference(update: TracedUpdate, findings: list[Finding]) -> None:
    """Look for runs that differ in frozen gradients alone, and in what is trained."""
    if not findings or update.runs.reason_against:
        return
    begin = update.fresh(0)
    if begin is None:
        return

    def train(change: Callable[[Any], Any]) -> list[list[Any]]:
        def gradient(number: int, given: Any) -> Any:
            return change(given) if update.frozen_gradients >> number & 1 else given

        return list(update.rollout(begin, gradient))

    one = train(lambda gradient: gradient)
    others = {"are another": train(lambda gradient: (gradient * 3).astype(gradient.dtype))}
    if not update.runs.may_not_end:
        others["are NaN"] = train(_nan)
    place = {id(result): i for i, result in enumerate(update.updates)}
    for (how, other), finding in itertools.product(others.items(), findings):
        i = place[id(finding.result)]
        for step, (left, right) in enumerate(zip(one, other, strict=True)):
            if not finding.shown and (found := difference(left[i], right[i])):
                finding.shown = f"at step {step + 1}, where frozen gradients {how}: {found}"


def assert_update_freezes(
    tx: Any,
    params: PyTree,
    frozen: Frozen = None,
    *,
    trainable: Frozen = None,
    non_interference: bool = True,
    **extra_args: Any,
) -> dict[str, str]:
    """Asserts that an optimizer can never move a frozen leaf. A proof, before the first step.

    It traces `tx.init` and `tx.update` and follows the data. The update of a frozen leaf has to be
    a constant zero, or absent, whatever the gradients, the parameters, the state (not only a fresh
    one) and the extra arguments are. And the updates of trained leaves must not depend on the
    gradients of frozen ones, at once or by way of the state; that is reported apart.

    Proved means proved of the traced program, for arrays of these shapes and dtypes. What is not
    proved is refuted, if a run on random numbers shows it, or unknown. A zero times something that
    may be infinite is not zero.

    Args:
      tx: any gradient transformation.
      params: the parameters, or their `jax.ShapeDtypeStruct`s; for `optax.lookahead` its pair of
        trees.
      frozen: the leaves that are frozen: a glob on their paths (`"encoder"`), a compiled regex, a
        `Selector`, a list of these, a predicate `(path, leaf) -> bool`, a bool, a pytree of bools,
        or the optimizer that `with_frozen` returned.
      trainable: the leaves that are not, instead of `frozen`: exactly one of the two is given.
      non_interference: False leaves out the second check.
      **extra_args: what `tx.update` needs besides, as it would be given: arrays and Python floats
        stand for any of their shape, all else (functions, integers, bools) is taken as it is.

    Returns:
      What the update of each frozen leaf is, by path: `"absent"`, `"a constant -0.0"`, `"a constant
      0.0"`. Added by `optax.apply_updates`, 0.0 turns -0.0 into 0.0; `frozen_optax.apply_updates`
      adds no zero.

    Raises:
      AssertionError: something is not proved. The message names the leaves, the verdict for each,
        and what it depends on by way of which primitives.
      TypeError, ValueError: nothing is selected, or a name that does not exist; and what `tx`
        raises.

    Example:
      >>> import frozen_optax as fo, jax.numpy as jnp, optax
      >>> params = {"encoder": jnp.ones(2), "head": jnp.ones(2)}
      >>> tx = fo.with_frozen(optax.adamw(1e-3), "encoder")
      >>> fo.assert_update_freezes(tx, params, tx)
      {'encoder': 'a constant -0.0'}
      >>> tx = optax.chain(fo.freeze("encoder"), optax.adamw(1e-3))
      >>> fo.assert_update_freezes(tx, params, "encoder")
      Traceback (most recent call last):
        ...
      AssertionError: 1 of 1 frozen leaves have an update that is not proved to be zero:
        encoder: refuted: it is -... at [0] at step 1 of a run on random numbers from a fresh state
          depends on the parameters (encoder) through mul, add, mul: weight decay after the freeze?
          depends on the state (1/0/mu/encoder) through mul, add, ...: moments from before the ...
    """
    resolution = resolve_frozen(frozen, trainable, trees_of(params)[0], to_check=True)
    updates = traced_updates(tx, params, resolution, extra_args)
    proved: dict[str, list[str]] = {}
    for update in updates:
        movement = _movement(update)
        with running(movement):
            _show_movement(update, movement)
        steered: list[Finding] = []
        if non_interference:
            steered = _interference(update, _reached_by_frozen_gradients(update, updates))
        with running(steered):
            _show_interference(update, steered)
        frozen_leaves = sum(update.selected)
        trained_leaves = len(update.selected) - frozen_leaves
        require_proved(
            section(movement, frozen_leaves, _MOVING, update.runs),
            section(steered, trained_leaves, _STEERED, update.runs),
        )
        for path, leaf, result in update.rows(frozen=True):
            proved.setdefault(path, []).append(_zero_in_words(result, leaf) or "")
    return in_words(proved)
