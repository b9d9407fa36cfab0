"""An optimizer's update as a program: what its inputs are, in which forms its state comes, runs."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from frozen_optax import _bits
from frozen_optax._extra_args import with_extra_args
from frozen_optax._proofs._counterexamples import Runs
from frozen_optax._proofs._known import InputSet
from frozen_optax._proofs._trace import (
    Group,
    Inputs,
    Result,
    Values,
    abstract,
    as_traced,
    is_array_or_float,
    is_number,
    trace,
)
from frozen_optax._resolution import Resolution
from frozen_optax._trees import is_traced
from frozen_optax._typing import PyTree
from frozen_optax._with_frozen import trees_of

_FORMS = 4  # that a state may take before it stays as it is
_STEPS = 3  # of a run that is to show something


@dataclasses.dataclass(frozen=True, eq=False)
class TracedUpdate:
    """A traced `update`: its arguments, and what it returns for any of them."""

    inputs: Inputs
    params: Group
    gradients: Group
    state: Group
    extra: Group
    frozen_gradients: InputSet  # those among the extra arguments, too
    trained_gradients: InputSet

    leaves: Sequence[Any]  # of the parameters
    paths: Sequence[str]  # of the updates; of two trees of them, if it trains two
    selected: Sequence[bool]
    updates: Sequence[Result]
    after: Sequence[Result]  # the leaves of the next state

    form: Any
    next_state: PyTree  # abstract
    init: Callable[..., PyTree]
    runs: Runs

    @functools.cached_property
    def state_stays_alike(self) -> bool:
        """Whether the next state has the form of the last."""
        return self.form == _form(self.next_state)

    def rows(self, frozen: bool) -> Iterator[tuple[str, Any, Result]]:
        """Path, parameter and update of each frozen leaf, or of each other."""
        leaves = itertools.cycle(self.leaves)
        rows = zip(self.paths, leaves, self.updates, self.selected, strict=False)
        for path, leaf, result, selected in rows:
            if selected == frozen:
                yield path, leaf, result

    @functools.cached_property
    def _run(self) -> Callable[..., list[Any]]:
        return self.runs.compiled(range(len(self.runs.program.out_avals)))

    def fresh(self, seed: int) -> list[Any] | None:
        """Random numbers for all inputs, and among them the state that `init` makes of these.

        None if that state has not this form.
        """
        numbers = self.runs.numbers(seed)
        state = jax.jit(self.init)(*numbers[self.params.span])
        if _form(state) != self.form:
            return None
        return self._with_state(numbers, jax.tree.leaves(state))

    def _with_state(self, numbers: list[Any], leaves: Sequence[Any]) -> list[Any]:
        for place, number in self.state.input_at.items():
            numbers[number] = leaves[place]
        return numbers

    def rollout(
        self, numbers: list[Any], gradient: Callable[[int, Any], Any]
    ) -> Iterator[list[Any]]:
        """The updates of some steps from there on, each with other gradients.

        Args:
          numbers: for all inputs.
          gradient: may change those of one input, by its number.
        """
        numbers = list(numbers)
        for i, number in enumerate(numbers):
            if self.frozen_gradients >> i & 1:
                numbers[i] = gradient(i, number)
        for step in range(_STEPS if self.state_stays_alike else 1):
            random = self.runs.numbers(10 + 1000 * step)[self.gradients.span]
            first = self.gradients.first
            numbers[self.gradients.span] = [gradient(first + i, g) for i, g in enumerate(random)]
            outputs = self._run(*numbers)
            yield [result.of(outputs) for result in self.updates]
            if self.state_stays_alike:
                numbers = self._with_state(numbers, [result.of(outputs) for result in self.after])


def _form(state: PyTree) -> Any:
    leaves, treedef = jax.tree.flatten(state)
    specs = [(each.shape, each.dtype, each.weak_type) for each in map(abstract, leaves)]
    return treedef, specs


def _trace_update(
    tx: Any,
    params: PyTree,
    resolution: Resolution,
    state: PyTree,
    extra_args: dict[str, Any],
) -> TracedUpdate:
    """The update from a state of this form."""
    inputs = Inputs()
    leaves = jax.tree.leaves(trees_of(params)[0])

    def has_gradient(leaf: Any) -> bool:
        return is_number(leaf) and not _bits.is_key(leaf)

    def of_gradient(leaf: Any) -> Any:
        return leaf if is_traced(leaf) else _bits.known_zero(leaf)

    of_params, make_params = inputs.add("the parameters", params, is_number)
    of_gradients, make_gradients = inputs.add(
        "the gradients", resolution.unflatten(leaves), has_gradient
    )
    of_state, make_state = inputs.add("the state", state, is_number)
    of_extra, make_extra = inputs.add("the extra arguments", extra_args, is_array_or_float)

    def update(values: Values) -> tuple[list[Any], tuple[int, PyTree]]:
        gradients = jax.tree.map(of_gradient, make_gradients(values))
        given = gradients, make_state(values), make_params(values)
        updates, new = tx.update(*given, **make_extra(values))
        rows = [resolution.up_to(tree, "the updates") for tree in trees_of(updates)]
        returned = [*itertools.chain(*rows), *jax.tree.leaves(new)]
        return returned, (len(rows), jax.tree.map(abstract, new))

    results, (trees, next_state), runs = trace(update, inputs)
    count = trees * len(resolution.paths)
    frozen = of_gradients.inputs_where(resolution.selected)
    return TracedUpdate(
        inputs=inputs,
        params=of_params,
        gradients=of_gradients,
        state=of_state,
        extra=of_extra,
        frozen_gradients=frozen | _frozen_gradients_in(of_extra, extra_args, resolution),
        trained_gradients=of_gradients.inputs & ~frozen,
        leaves=leaves,
        paths=resolution.paths * trees,
        selected=resolution.selected * trees,
        updates=results[:count],
        after=results[count:],
        form=_form(state),
        next_state=next_state,
        init=lambda *values: tx.init(make_params(values)),
        runs=runs,
    )


def _frozen_gradients_in(
    extra: Group, extra_args: dict[str, Any], resolution: Resolution
) -> InputSet:
    """The frozen leaves of whatever has the parameters' structure: `grad` of a line search."""

    def is_like_params(tree: PyTree) -> bool:
        return jax.tree.structure(tree) == resolution.treedef

    selected = []
    for part in jax.tree.leaves(extra_args, is_leaf=is_like_params):
        selected.extend(resolution.selected if is_like_params(part) else [False])
    return extra.inputs_where(selected)


def traced_updates(
    tx: Any, params: PyTree, resolution: Resolution, extra_args: dict[str, Any]
) -> list[TracedUpdate]:
    """The update, for each form that the state takes."""
    tx = with_extra_args(tx)
    inputs = Inputs()
    group, make = inputs.add("the parameters", params, is_number)
    leaves = map(as_traced, group.leaves)
    state = jax.eval_shape(lambda *values: tx.init(make(values)), *leaves)
    found: list[TracedUpdate] = []
    while len(found) < _FORMS:
        found.append(_trace_update(tx, params, resolution, state, extra_args))
        state = found[-1].next_state
        if _form(state) in [update.form for update in found]:
            return found
    raise ValueError(
        f"the structure, shapes or dtypes of the state change at each of {_FORMS} updates."
    )
