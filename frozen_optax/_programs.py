"""A function as a traced program of named inputs: what of its arguments is abstract, and which results are known."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from frozen_optax import _bits
from frozen_optax._flow import Reads, Value, flow
from frozen_optax._trees import PyTree, is_traced, paths_of, spec
from frozen_optax._witnesses import Runs

_MAX_STEPS = 6  # primitives named on one way

Values = Sequence[Any]  # one for each abstract input


def is_number(leaf: Any) -> bool:
    """Whether a leaf of parameters or of a state is abstract: an array, or a number that stands for one."""
    shape = spec(leaf)
    return _bits.is_array(shape) and shape.dtype != jax.dtypes.float0


def is_array_or_float(leaf: Any) -> bool:
    """Whether a leaf of another argument is abstract. A Python integer may be a length, a bool a choice of program."""
    return is_number(leaf) and not isinstance(leaf, (bool, int))


@dataclasses.dataclass(frozen=True)
class Group:
    """The abstract leaves of one argument among the inputs of a program."""

    name: str
    paths: Sequence[str]
    leaves: Sequence[Any]  # as they were given
    places: Sequence[int]  # among all leaves of the argument
    first: int  # among all inputs

    @property
    def span(self) -> slice:
        """Which inputs of the program they are."""
        return slice(self.first, self.first + len(self.leaves))

    @functools.cached_property
    def numbers(self) -> dict[int, int]:
        """The inputs of the program, by the places of the leaves among all leaves of the argument."""
        return {place: self.first + i for i, place in enumerate(self.places)}

    def bits(self, chosen: Sequence[bool] | None = None) -> int:
        """Inputs as a set of bits: all, or those of which the leaf of the argument is chosen."""
        return sum(1 << number for place, number in self.numbers.items() if chosen is None or chosen[place])


class Inputs:
    """The inputs of a program, argument by argument. What is not abstract is a part of the program."""

    def __init__(self) -> None:
        self.groups: list[Group] = []

    @property
    def leaves(self) -> list[Any]:
        """All abstract leaves, as they were given."""
        return [leaf for group in self.groups for leaf in group.leaves]

    def add(
        self, name: str, tree: PyTree, is_abstract: Callable[[Any], bool]
    ) -> tuple[Group, Callable[[Values], PyTree]]:
        """One more argument, and a function that makes it of values for all inputs."""
        leaves, treedef = jax.tree.flatten(tree)
        places = [i for i, leaf in enumerate(leaves) if is_abstract(leaf)]
        paths = paths_of(tree)
        group = Group(
            name,
            [paths[i] for i in places],
            [leaves[i] for i in places],
            places,
            sum(len(g.leaves) for g in self.groups),
        )
        self.groups.append(group)

        def make(values: Values) -> PyTree:
            filled = list(leaves)
            for place, value in zip(places, values[group.span], strict=True):
                filled[place] = value
            return jax.tree.unflatten(treedef, filled)

        return group, make

    def name(self, number: int) -> str:
        """The path of an input in its argument."""
        group = next(group for group in self.groups if 0 <= number - group.first < len(group.leaves))
        return group.paths[number - group.first] or group.name

    def way(self, reads: Reads, wanted: int, known_as: str = "") -> str:
        """How the nearest of some inputs is read: its path, and the primitives on the way."""
        number, steps = reads.trail(wanted)
        steps = [step for step, _ in itertools.groupby(steps)]
        if len(steps) > _MAX_STEPS:
            steps = [*steps[: _MAX_STEPS // 2], "...", *steps[-(_MAX_STEPS // 2) :]]
        name = self.name(number)
        return f" ({name})" * (name != known_as) + (f" through {', '.join(steps)}" if steps else "")


@dataclasses.dataclass(frozen=True)
class Result:
    """One leaf that a program returns: an output of it, of which something is known, or what it is at once."""

    output: int | None
    aval: Any
    value: Value
    known: Any = None

    def of(self, outputs: Values) -> Any:
        """What it is in a run."""
        return self.known if self.output is None else outputs[self.output]


def trace(function: Callable[[Values], tuple[list[Any], Any]], inputs: Inputs) -> tuple[list[Result], Any, Runs]:
    """A function of values for all inputs that returns leaves and anything else: both, and the program to be run."""
    returned: list[Any] = []
    besides: list[Any] = []

    def traced(*values: Any) -> list[Any]:
        leaves, more = function(values)
        returned[:], besides[:] = leaves, [more]
        return list(filter(is_traced, leaves))  # what is known here needs no proof, and may be as large as a model

    program = jax.make_jaxpr(traced)(*map(spec, inputs.leaves))
    values, is_seen = flow(program)
    outputs = zip(itertools.count(), program.out_avals, values)
    results = [Result(*next(outputs)) if is_traced(leaf) else Result(None, None, Value(), leaf) for leaf in returned]
    return results, besides[0], Runs(program, inputs.leaves, is_seen)
