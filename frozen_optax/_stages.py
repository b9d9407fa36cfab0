"""Freezing that changes from step to step: a schedule of groups, each stage a value.

The loop stays the user's. A stage says what is frozen, to every tool of the library, and makes an
optimizer in which each group has a count of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, overload

import jax
import numpy as np
import optax

from frozen_optax._elements import Elements
from frozen_optax._selection import as_selector
from frozen_optax._selectors import Reads, Selector, reads
from frozen_optax._trees import View, describe, objects_in
from frozen_optax._typing import Frozen, PyTree
from frozen_optax._with_frozen import FrozenOptimizer, with_frozen

_FROZEN = "frozen"  # the label of what no group of a stage names

# --- the groups


@dataclasses.dataclass(frozen=True)
class _Group:
    """Leaves that train together.

    Attributes:
      key: what the user called them.
      label: their name in `optax.partition`, the same in each process.
      selector: what selects them.
      start: the step at which they begin to train.
      stop: the step at which they are frozen again; None if they are not.
    """

    key: Any
    label: str
    selector: Selector
    start: int
    stop: int | None

    def trains_at(self, step: int) -> bool:
        """Whether it trains at a step."""
        return self.start <= step and (self.stop is None or step < self.stop)


def _step(value: Any, what: str) -> int:
    """A step of a schedule; `what` has it."""
    try:
        step = operator.index(value)
    except TypeError:
        step = -1
    if isinstance(value, bool) or step < 0:
        raise ValueError(
            f"{what} has the step {value!r}. A step is an integer from 0 on. A group has one, from "
            "which it trains, or a pair: at the second it is frozen again."
        )
    return step


def _label(key: Any, selector: Selector, number: int) -> str:
    """What to call a group: as the user did, or as its selector prints, if that is always alike."""
    if isinstance(key, str):
        return key
    label = repr(selector)
    return f"group {number}" if "<" in label else label  # a lambda, or the address of an object


def _group(key: Any, bounds: Any, number: int) -> _Group:
    selector = as_selector(key)
    label, what = _label(key, selector, number), f"the group {key!r}"
    if not isinstance(bounds, (tuple, list)):
        return _Group(key, label, selector, _step(bounds, what), None)
    if len(bounds) != 2:
        raise ValueError(f"the group {key!r} has {bounds!r}, expected one step or a pair of them.")
    start, stop = (_step(bound, what) for bound in bounds)
    if start >= stop:
        raise ValueError(
            f"the group {key!r} is to train from step {start} to step {stop}, which is no step at "
            "all. The first of the pair is the smaller one."
        )
    return _Group(key, label, selector, start, stop)


def _choices(groups: Sequence[_Group], view: View) -> dict[str, np.ndarray]:
    """What each group selects.

    Raises:
      ValueError: a group selects nothing, or a leaf is in two.
    """
    chosen = {group.label: group.selector._choose(view) for group in groups}  # pyright: ignore
    for i, one in enumerate(groups):
        for other in groups[i + 1 :]:
            both = np.flatnonzero(chosen[one.label] & chosen[other.label])
            if both.size:
                size = lambda group: np.count_nonzero(chosen[group.label])
                smaller, larger = sorted((one, other), key=size)
                raise ValueError(
                    f"the groups {one.key!r} and {other.key!r} overlap, at "
                    f"{view.paths[both[0]]!r}. A leaf trains in one group: leave it out of one, "
                    f"{larger.selector!r} & ~{smaller.selector!r}."
                )
    return chosen


@dataclasses.dataclass(frozen=True, repr=False)
class _AllBut(Selector):
    """The leaves that are in none of some groups.

    All groups of the schedule are looked up each time, so that a name that is not there is an error
    in the first stage, and not when its turn comes.
    """

    groups: tuple[_Group, ...]
    trained: tuple[_Group, ...]

    @property
    def _reads(self) -> Reads:
        return max(reads(group.selector) for group in self.groups)

    @property
    def _may_be_empty(self) -> bool:
        return True  # all may be thawed

    def _select(self, view: View) -> np.ndarray:
        chosen = _choices(self.groups, view)
        return ~np.any([chosen[group.label] for group in self.trained], axis=0)

    def __repr__(self) -> str:
        return " & ".join(f"~{group.selector!r}" for group in self.trained)


# --- what groups freeze themselves


@dataclasses.dataclass(frozen=True, repr=False)
class _Within(Selector):
    """The leaves of a group that something else selects as well, if there are any."""

    group: Selector
    chosen: Selector

    @property
    def _reads(self) -> Reads:
        return max(reads(self.group), reads(self.chosen))

    @property
    def _may_be_empty(self) -> bool:
        return True  # it may be about another group

    def _select(self, view: View) -> np.ndarray:
        return self.group._choose(view) & self.chosen._choose(view)

    def __repr__(self) -> str:
        return f"{self.group!r} & {self.chosen!r}"


def _over_what_trains(
    transform: optax.GradientTransformation, freezing: Sequence[tuple[_Group, FrozenOptimizer]]
) -> optax.GradientTransformation:
    """A transform of several groups that does not see what their optimizers freeze in them."""
    if not freezing:
        return transform
    narrow = lambda group: functools.partial(_Within, group.selector)
    frozen = [narrow(group)(optimizer.frozen) for group, optimizer in freezing]
    elements = Elements.joined(
        optimizer.elements.narrowed(narrow(group))
        for group, optimizer in freezing
        if optimizer.elements is not None
    )
    # What is trained was looked at before.
    return with_frozen(transform, frozen, elements=elements, allow_int=True, allow_zero=True)


# --- the stages


@dataclasses.dataclass(frozen=True)
class Stage:
    """Steps in which the same leaves train.

    Attributes:
      start: its first step.
      stop: the step after its last one; None if it is open.
      frozen: a `Selector` of what is frozen in it, for every tool of the library.
      groups: the groups that train in it, as `stages` was given them.
    """

    start: int
    stop: int | None
    frozen: Selector
    groups: tuple[Frozen, ...]
    _trained: tuple[_Group, ...] = dataclasses.field(repr=False)

    def labels(self, params: PyTree) -> PyTree:
        """The group of each leaf, `"frozen"` for those that do not train, for `optax.partition`.

        A group that is no `str` is called as its selector prints, or by its number in the schedule
        where that is a lambda or an object.
        """
        leaves, treedef = jax.tree.flatten(params)
        # Within `with_frozen` there is None for a function, as a group may name, and a hole counts
        # for whatever could stand there.
        with_hole = lambda node: optax.MaskedNode() if node is None else node
        is_none = lambda node: node is None
        view = View.of(jax.tree.map(with_hole, params, is_leaf=is_none))
        labels = np.full(len(leaves), _FROZEN, object)
        is_number = np.ones(len(leaves), bool)
        is_number[list(objects_in(params))] = False
        for label, chosen in _choices(self._trained, view).items():
            labels[chosen & is_number] = label
        return jax.tree.unflatten(treedef, labels.tolist())

    def optimizer(
        self,
        make: Callable[[Any, int], optax.GradientTransformation],
        before: optax.GradientTransformation | None = None,
    ) -> FrozenOptimizer:
        """`with_frozen` around an optimizer for each group that trains in this stage.

        Each group has a state of its own, and so a count: one that is thawed late begins with bias
        correction and warm-up as if it were alone. `transfer_state` carries the state of the groups
        that go on.

        Args:
          make: `make(group, start)` returns the optimizer of a group; `group` is as `stages` was
            given it, and `start` the step at which it began to train. The counts in its state, and
            so its schedules, begin there.
          before: what comes before it, over all that trains in this stage: clipping by global norm.
            It sees no gradient of what the optimizer of a group freezes in it.

        Raises:
          TypeError: `make` is no function.
        """
        if not callable(make):
            raise TypeError(
                "stage.optimizer takes a function of a group and the step at which it began, found "
                f"{describe(make)}. For one optimizer alike write lambda group, start: optimizer."
            )
        transforms: dict[Hashable, optax.GradientTransformation] = {}
        transforms |= {group.label: make(group.key, group.start) for group in self._trained}
        inner = optax.partition(transforms, self.labels)
        if before is not None:
            made = [(group, transforms[group.label]) for group in self._trained]
            freezing = [(group, tx) for group, tx in made if isinstance(tx, FrozenOptimizer)]
            inner = optax.chain(_over_what_trains(before, freezing), inner)
        return with_frozen(inner, self.frozen)


class Stages(Sequence[Stage]):
    """The stages of a schedule, in order. They follow one another without a gap."""

    def __init__(self, stages: Sequence[Stage]):
        self._stages = tuple(stages)

    def __len__(self) -> int:
        return len(self._stages)

    @overload
    def __getitem__(self, index: int) -> Stage: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Stage]: ...

    def __getitem__(self, index: int | slice) -> Stage | Sequence[Stage]:
        return self._stages[index]

    def at(self, step: int) -> Stage:
        """The stage that a step belongs to.

        Raises:
          ValueError: it belongs to none, or is no integer.
        """
        try:
            step = operator.index(step)
        except TypeError:
            raise ValueError(f"a step is an integer, found {step!r}.") from None
        for stage in self._stages:
            if stage.start <= step and (stage.stop is None or step < stage.stop):
                return stage
        stop = self._stages[-1].stop
        raise ValueError(
            f"step {step} is in no stage: they go from step 0 to "
            f"{'the end' if stop is None else f'step {stop - 1}'}."
        )

    def __repr__(self) -> str:
        return f"Stages({list(self._stages)!r})"


def stages(starts: Mapping[Any, int | tuple[int, int]], stop: int | None = None) -> Stages:
    """A schedule of what trains: groups of leaves, each from a step of its own on.

    Each stage is a program of its own, compiled when it begins, and pays for what it trains and no
    more. Between two stages `transfer_state` carries the optimizer's state.

    Args:
      starts: for each group the step at which it begins to train, or a pair, the second of which is
        the step at which it is frozen again. A group is said as `frozen` is elsewhere: a glob on
        paths (`"head"`, `"encoder/layer_5"`), a compiled regex, a `Selector`, a predicate. What no
        group names is always frozen. No leaf is in two groups.
      stop: the step after the last one; without it the last stage is open.

    Returns:
      A sequence of `Stage`s. `stages(...).at(step)` is the one that a step belongs to, to resume
      in. Each has `start`, `stop`, `frozen`, `groups`, `labels(params)` and `optimizer(make,
      before=None)`.

    Raises:
      TypeError: `starts` is no dict, or a group is no way to select leaves.
      ValueError: a step is negative or no integer, or a pair is not in order; at some step nothing
        trains; `stop` is not after all starts. When used: a group selects nothing, or two overlap.
        The message names the group.

    Example:
      >>> import frozen_optax as fo, jax.numpy as jnp, optax
      >>> params = {"encoder": jnp.ones(2), "head": jnp.ones(3)}
      >>> state = None
      >>> for stage in fo.stages({"head": 0, "encoder": 2}, stop=4):
      ...     tx = stage.optimizer(lambda group, start: optax.sgd(0.1))
      ...     state = fo.transfer_state(state, tx.init(params))
      ...     for step in range(stage.start, stage.stop):
      ...         updates, state = tx.update(params, state, params)
      ...         params = fo.apply_updates(params, updates)
      ...     print(stage.groups, {name: round(float(leaf[0]), 3) for name, leaf in params.items()})
      ('head',) {'encoder': 1.0, 'head': 0.81}
      ('head', 'encoder') {'encoder': 0.81, 'head': 0.656}
    """
    if not isinstance(starts, Mapping):
        raise TypeError(
            f"stages take a dict, such as {{'head': 0, 'encoder': 500}}, found {describe(starts)}."
        )
    if not starts:
        raise ValueError("stages need at least one group: nothing would ever train.")
    groups = tuple(_group(*item, number) for number, item in enumerate(starts.items()))
    labels = [group.label for group in groups]
    for label in labels:
        if labels.count(label) > 1 or label == _FROZEN:
            raise ValueError(
                f"two groups are called {label!r}."
                if label != _FROZEN
                else "a group cannot be called 'frozen': that is what no group names. Write "
                "fo.by_path('frozen')."
            )
    bounds = {0, *(group.start for group in groups)}
    bounds |= {group.stop for group in groups if group.stop is not None}
    if stop is not None:
        last = max(groups, key=lambda group: group.start)
        if _step(stop, "the argument stop") <= last.start:
            raise ValueError(
                f"the group {last.key!r} would begin at step {last.start} and never train: the "
                f"stop is at step {stop}."
            )
        bounds = {bound for bound in bounds if bound < stop}
    starts_of_stages = sorted(bounds)
    made: list[Stage] = []
    for start, end in zip(starts_of_stages, [*starts_of_stages[1:], stop], strict=True):
        trained = tuple(group for group in groups if group.trains_at(start))
        if not trained:
            if end is None:  # every group is frozen again, and no stop was said
                break
            raise ValueError(
                f"nothing trains from step {start} to step {end}: there is no such stage. Let a "
                "group begin at 0, and the next one where the last is frozen."
            )
        keys = tuple(group.key for group in trained)
        made.append(Stage(start, end, _AllBut(groups, trained), keys, trained))
    return Stages(made)
