"""Whether a gradient transformation can move a frozen leaf, and whether frozen gradients can steer the others."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from frozen_optax import _bits, _numbers
from frozen_optax._assertions import difference
from frozen_optax._findings import Finding, require_proved, section
from frozen_optax._optimizer import trees_of, with_extra_args
from frozen_optax._programs import Group, Inputs, Result, is_array_or_float, is_number, trace
from frozen_optax._selection import Selection, frozen_selector
from frozen_optax._trees import PyTree, Resolution, describe, is_hole, is_traced, spec

_FORMS = 4  # that a state may take before it stays as it is
_STEPS = 3  # of a run that is to show something


class _Update:
    """A traced `update`: its arguments, and what it returns for any of them."""

    def __init__(self, tx: Any, params: PyTree, resolution: Resolution, state: PyTree, extra_args: dict[str, Any]):
        self.inputs = inputs = Inputs()
        self.leaves = jax.tree.leaves(trees_of(params)[0])
        has_gradient = lambda leaf: is_number(leaf) and not _bits.is_key(leaf)
        of_gradient = lambda leaf: leaf if is_traced(leaf) else _bits.known_zero(leaf)
        self.params, make_params = inputs.add("the parameters", params, is_number)
        self.gradients, make_gradients = inputs.add("the gradients", resolution.unflatten(self.leaves), has_gradient)
        self.state, make_state = inputs.add("the state", state, is_number)
        self.extra, make_extra = inputs.add("the extra arguments", extra_args, is_array_or_float)
        self._init = lambda *values: tx.init(make_params(values))

        def update(values: Any) -> tuple[list[Any], tuple[int, PyTree]]:
            given = jax.tree.map(of_gradient, make_gradients(values)), make_state(values), make_params(values)
            updates, new = tx.update(*given, **make_extra(values))
            rows = [resolution.up_to(tree, "the updates") for tree in trees_of(updates)]
            return [*itertools.chain(*rows), *jax.tree.leaves(new)], (len(rows), jax.tree.map(spec, new))

        results, (trees, self.next_state), self.runs = trace(update, inputs)
        count = trees * len(resolution.paths)
        self.updates, self.after = results[:count], results[count:]
        self.paths, self.selected = resolution.paths * trees, resolution.selected * trees
        self.form = _form(state)
        self.state_stays_alike = self.form == _form(self.next_state)
        frozen = self.gradients.bits(resolution.selected)
        self.trained_gradients = self.gradients.bits() & ~frozen
        like_params = lambda tree: jax.tree.structure(tree) == resolution.treedef  # `grad`, for line searches
        of_extra = [
            resolution.selected if like_params(extra_args[name]) else [False] * len(jax.tree.leaves(extra_args[name]))
            for name in sorted(extra_args)
        ]
        self.frozen_gradients = frozen | self.extra.bits(list(itertools.chain(*of_extra)))

    def rows(self, frozen: bool) -> Iterator[tuple[str, Any, Result]]:
        """Path, parameter and update of each frozen leaf, or of each other."""
        leaves = itertools.cycle(self.leaves)
        for path, leaf, result, selected in zip(self.paths, leaves, self.updates, self.selected, strict=False):
            if selected == frozen:
                yield path, leaf, result

    @functools.cached_property
    def _run(self) -> Callable[..., list[Any]]:
        return self.runs.compiled(range(len(self.runs.program.out_avals)))

    def fresh(self, seed: int) -> list[Any] | None:
        """Random numbers, with the state that `init` makes of the parameters among them, if it is one of this form."""
        numbers = self.runs.numbers(seed)
        state = jax.jit(self._init)(*numbers[self.params.span])
        if _form(state) != self.form:
            return None
        return self._with_state(numbers, jax.tree.leaves(state))

    def _with_state(self, numbers: list[Any], leaves: Sequence[Any]) -> list[Any]:
        for place, number in self.state.numbers.items():
            numbers[number] = leaves[place]
        return numbers

    def rollout(self, numbers: list[Any], gradient: Callable[[int, Any], Any]) -> Iterator[list[Any]]:
        """The updates of some steps from there on, each with other gradients; `gradient` may change them."""
        numbers = [
            gradient(i, number) if self.frozen_gradients >> i & 1 else number for i, number in enumerate(numbers)
        ]
        for step in range(_STEPS if self.state_stays_alike else 1):
            random = self.runs.numbers(10 + 1000 * step)[self.gradients.span]
            numbers[self.gradients.span] = [gradient(self.gradients.first + i, each) for i, each in enumerate(random)]
            outputs = self._run(*numbers)
            yield [result.of(outputs) for result in self.updates]
            if self.state_stays_alike:
                numbers = self._with_state(numbers, [result.of(outputs) for result in self.after])


def _form(state: PyTree) -> Any:
    leaves, treedef = jax.tree.flatten(state)
    return treedef, [describe(spec(leaf)) for leaf in leaves]


def _traced(tx: Any, params: PyTree, resolution: Resolution, extra_args: dict[str, Any]) -> list[_Update]:
    """The update, for each form that the state takes."""
    tx = with_extra_args(tx)
    inputs = Inputs()
    group, make = inputs.add("the parameters", params, is_number)
    state = jax.eval_shape(lambda *values: tx.init(make(values)), *map(spec, group.leaves))
    found: list[_Update] = []
    while len(found) < _FORMS:
        found.append(_Update(tx, params, resolution, state, extra_args))
        state = found[-1].next_state
        if _form(state) in [update.form for update in found]:
            return found
    raise ValueError(f"the structure, shapes or dtypes of the state change at each of {_FORMS} updates.")


def _nan(number: Any) -> Any:
    return number * np.asarray(np.nan, number.dtype) if _numbers.is_float(number.dtype) else number


# --- frozen leaves


def _fits(shape: tuple[int, ...], leaf: Any) -> bool:
    """Whether a sum with an update of this shape has the leaf's own."""
    own = np.shape(leaf)
    return len(shape) <= len(own) and all(n in (1, m) for n, m in zip(shape[::-1], own[::-1], strict=False))


def _zero_in_words(update: Result, leaf: Any) -> str | None:
    """What an update of a leaf is, if it is proved to be none."""
    if update.output is None:
        known = update.known
        if known is None or is_hole(known) or getattr(known, "dtype", None) == jax.dtypes.float0:
            return "absent"
        dtype = spec(known).dtype if is_number(known) else None
        among, shape = _numbers.of_array(known, dtype), np.shape(known)
    else:
        dtype, among, shape = update.aval.dtype, update.value.among, update.aval.shape
    if among is None or not _numbers.is_zero(among, dtype) or not _fits(shape, leaf):
        return None
    signs = {np.signbit(np.real(_numbers.number(dtype, each))) for each in among}
    names = ["-0.0" if sign else "0.0" for sign in sorted(signs)] if _numbers.is_float(dtype) else ["0"]
    return f"a constant {' or '.join(names)}" if among else "no elements"


_GUESSES = {
    "the parameters": "weight decay after the freeze?",
    "a random key in the state": "noise after the freeze?",
    "the state": "moments from before the freeze, or a schedule after it?",
    "the gradients of trained leaves": "a norm after the freeze, which may be infinite or NaN?",
    "the gradients of frozen leaves": "is it frozen at all?",
    "the extra arguments": "a loss that scales all updates?",
}


def _random_keys(state: Group) -> int:
    is_raw = lambda path, leaf: leaf.dtype == np.uint32 and leaf.shape[-1:] in ((2,), (4,)) and "key" in path
    members = enumerate(zip(state.paths, state.leaves, strict=True))
    return sum(1 << state.first + i for i, (path, leaf) in members if _bits.is_key(leaf) or is_raw(path, leaf))


def _movement(update: _Update) -> list[Finding]:
    """Frozen leaves whose update is not proved to be zero."""
    keys = _random_keys(update.state)
    groups = {
        "the gradients of frozen leaves": update.frozen_gradients,
        "the parameters": update.params.bits(),
        "a random key in the state": keys,
        "the state": update.state.bits() & ~keys,
        "the gradients of trained leaves": update.trained_gradients,
        "the extra arguments": update.extra.bits() & ~update.frozen_gradients,
    }
    findings = []
    for path, leaf, result in update.rows(frozen=True):
        if _zero_in_words(result, leaf):
            continue
        reads, reasons = result.value.reads, []
        for name, bits in groups.items():
            if reads.inputs & bits:
                reasons.append(f"depends on {name}{update.inputs.way(reads, bits)}: {_GUESSES[name]}")
        if result.output is None:
            reasons = [f"is {describe(result.known)} that is not zero"]
        elif not _fits(result.aval.shape, leaf):
            reasons.append(f"is {describe(result.aval)}, and the parameter {describe(spec(leaf))}")
        findings.append(Finding(path, result, reasons or ["is made of constants, and is not known to be zero"]))
    return findings


def _first_nonzero(update: Any) -> str | None:
    if not is_number(update) or _bits.is_key(update):
        return None
    host = np.asarray(update)
    if not (wrong := ~(host == 0)).any():
        return None
    index = tuple(map(int, np.argwhere(wrong)[0]))
    return f"{host[index]} at {list(index)}"


def _attempts(update: _Update) -> Iterator[tuple[str, list[Any], Callable[[int, Any], Any]]]:
    """Inputs that may show a movement, the likeliest first."""
    runs, as_it_is = update.runs, lambda i, gradient: gradient
    with_nan = lambda i, gradient: _nan(gradient) if update.trained_gradients >> i & 1 else gradient
    if fresh := update.fresh(0):
        yield "from a fresh state", fresh, as_it_is
    if not runs.may_not_end:
        in_state = range(update.state.span.start, update.state.span.stop)
        yield "from a state with moments of its own", runs.numbers(1, in_state.__contains__), as_it_is
    if fresh and not runs.may_not_end:
        yield "from a fresh state with NaN in the gradients of trained leaves", fresh, with_nan


def _show_movement(update: _Update, findings: list[Finding]) -> None:
    if not findings or update.runs.reason_against:
        return
    of_path = {id(finding.result): finding for finding in findings}
    for how, numbers, gradient in _attempts(update):
        for step, updates in enumerate(update.rollout(numbers, gradient)):
            for result, found in zip(update.updates, updates, strict=True):
                finding = of_path.get(id(result))
                if finding and not finding.shown and (nonzero := _first_nonzero(found)):
                    finding.shown = f"it is {nonzero} at step {step + 1} of a run on random numbers {how}"
            if all(finding.shown for finding in findings):
                return


# --- trained leaves


def _interference(update: _Update, is_only_form: bool) -> list[Finding]:
    """Trained leaves whose update frozen gradients can have an effect on, at once or by way of the state."""
    frozen, tainted, before = update.frozen_gradients, update.frozen_gradients, -1
    if frozen and not (is_only_form and update.state_stays_alike):
        tainted |= update.state.bits()  # which leaf of the one is which of the next is not known
    while tainted != before:
        before = tainted
        for place, number in update.state.numbers.items() if update.state_stays_alike else ():
            if update.after[place].value.reads.inputs & tainted:
                tainted |= 1 << number
    findings = []
    for path, _, result in update.rows(frozen=False):
        reads, unseen = result.value.reads, not update.runs.is_seen and result.output is not None
        if not frozen or not (reads.inputs & tainted or (unseen and not result.value.is_constant)):
            continue
        if not reads.inputs & tainted:
            reason = "may depend on what a mutable array or a callback carries from them"
        elif at_once := reads.inputs & frozen:
            reason = f"depends on the gradients of frozen leaves{update.inputs.way(reads, at_once)}"
        else:
            way = update.inputs.way(reads, reads.inputs & tainted)
            reason = f"depends on what earlier steps may have left in the state{way}"
        findings.append(Finding(path, result, [reason]))
    return findings


def _show_interference(update: _Update, findings: list[Finding]) -> None:
    if not findings or update.runs.reason_against:
        return
    if not (begin := update.fresh(0)):
        return

    def train(change: Callable[[Any], Any]) -> list[list[Any]]:
        return list(update.rollout(begin, lambda i, g: change(g) if update.frozen_gradients >> i & 1 else g))

    one = train(lambda gradient: gradient)
    others = {"are another": train(lambda g: (g * 3).astype(g.dtype))}
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
        encoder: refuted: it is -... at [0] at step 1 of a run on random numbers from a fresh state
          depends on the parameters (encoder) through mul, add, mul: weight decay after the freeze?
          depends on the state (1/0/mu/encoder) through mul, add, ...: moments from before the freeze, or a schedule ...
    """
    resolution = frozen_selector(frozen, trainable)._resolve(trees_of(params)[0])
    updates = _traced(tx, params, resolution, extra_args)
    found: dict[str, str] = {}
    for update in updates:
        movement = _movement(update)
        _show_movement(update, movement)
        steered = _interference(update, len(updates) == 1) if non_interference else []
        _show_interference(update, steered)
        count = sum(update.selected)
        moving = "frozen leaves have an update that is not proved to be zero"
        steering = "trained leaves have an update that is not proved to be independent of frozen gradients"
        require_proved(
            section(movement, count, moving, update.runs),
            section(steered, len(update.selected) - count, steering, update.runs),
        )
        found |= {path: _zero_in_words(result, leaf) or "" for path, leaf, result in update.rows(frozen=True)}
    return found
