"""A function as a program of named inputs: what of its arguments is abstract, what it returns."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from frozen_optax import _bits
from frozen_optax._jaxprs import is_on_several_devices, only_returns, spans_devices
from frozen_optax._proofs._counterexamples import Runs
from frozen_optax._proofs._interpreter import interpret
from frozen_optax._proofs._known import Dependencies, InputSet, Known
from frozen_optax._proofs._provenance import Source
from frozen_optax._trees import is_number as is_array_or_number
from frozen_optax._trees import is_traced, objects_in, paths_of, spec
from frozen_optax._typing import PyTree

_MAX_STEPS = 6  # primitives named on one way
_TRACED = object()  # stands for a leaf that the program computes

Values = Sequence[Any]  # one for each abstract input


def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    """A number or an array as jax traces it: shape, dtype, weak type, and sharding in types.

    A Python number does not widen what it is multiplied with, and where a mesh has explicit axes a
    program may be another on another sharding.
    """
    shape = spec(leaf)
    is_python = isinstance(leaf, (bool, int, float, complex)) and not _bits.is_array(leaf)
    sharding = None
    if isinstance(leaf, jax.ShapeDtypeStruct):
        sharding = leaf.sharding
    elif isinstance(leaf, jax.Array):
        of_type = getattr(jax.typeof(leaf), "sharding", None)
        sharding = None if of_type is None or of_type.mesh.empty else of_type
    return jax.ShapeDtypeStruct(
        shape.shape,
        shape.dtype,
        weak_type=is_python or getattr(leaf, "weak_type", False),
        sharding=sharding,
    )


def as_traced(leaf: Any) -> Any:
    """What stands for a leaf in a trace; a tracer of an outer one knows more than can be said."""
    return leaf if is_traced(leaf) else abstract(leaf)


def is_number(leaf: Any) -> bool:
    """Whether a leaf of parameters or of a state is abstract: an array, or a number."""
    return is_array_or_number(leaf) and spec(leaf).dtype != jax.dtypes.float0


def is_array_or_float(leaf: Any) -> bool:
    """Whether a leaf of another argument is abstract.

    A Python integer may be a length, and a bool a choice of program.
    """
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
    def input_at(self) -> dict[int, int]:
        """The inputs of the program, by the places of the leaves among all of the argument."""
        return {place: self.first + i for i, place in enumerate(self.places)}

    @property
    def inputs(self) -> InputSet:
        """All of them as a set."""
        return as_set(self.input_at.values())

    def inputs_where(self, chosen: Sequence[bool]) -> InputSet:
        """Those of which the leaf of the argument is chosen."""
        return as_set(number for place, number in self.input_at.items() if chosen[place])


def as_set(numbers: Iterable[int]) -> InputSet:
    """Inputs as a set."""
    return sum(1 << number for number in numbers)


class Inputs:
    """The inputs of a program, argument by argument. What is not abstract is a part of it."""

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
        paths, objects = paths_of(tree), objects_in(tree)
        places = [i for i, leaf in enumerate(leaves) if is_abstract(leaf) and i not in objects]
        group = Group(
            name,
            paths=[paths[i] for i in places],
            leaves=[leaves[i] for i in places],
            places=places,
            first=sum(len(before.leaves) for before in self.groups),
        )
        self.groups.append(group)

        def make(values: Values) -> PyTree:
            filled = list(leaves)
            for place, value in zip(places, values[group.span], strict=True):
                filled[place] = value
            return jax.tree.unflatten(treedef, filled)

        return group, make

    def name(self, number: Source) -> str:
        """The path of an input in its argument."""
        assert isinstance(number, int)  # what stands for a part leaves no loop
        for group in self.groups:
            place = number - group.first
            if 0 <= place < len(group.leaves):
                return group.paths[place] or group.name
        raise LookupError(f"there is no input {number}")

    def way(self, dependencies: Dependencies, wanted: InputSet, known_as: str = "") -> str:
        """How it depends on the nearest of some inputs: its path, the primitives on the way."""
        number, primitives = dependencies.trail(wanted)
        steps = [step for step, _ in itertools.groupby(primitives)]
        if len(steps) > _MAX_STEPS:
            steps = [*steps[: _MAX_STEPS // 2], "...", *steps[-(_MAX_STEPS // 2) :]]
        name = self.name(number)
        named = "" if name == known_as else f" ({name})"
        return named + (f" through {', '.join(steps)}" if steps else "")


@dataclasses.dataclass(frozen=True)
class Result:
    """One leaf that a function returns: an output of the program, or an object that is at hand."""

    output: int | None
    aval: Any
    known: Known  # of the output, whatever the inputs are
    at_hand: Any = None

    def of(self, outputs: Values) -> Any:
        """What it is in a run."""
        return self.at_hand if self.output is None else outputs[self.output]


def trace(
    function: Callable[[Values], tuple[list[Any], Any]], inputs: Inputs
) -> tuple[list[Result], Any, Runs]:
    """A function of values for all inputs as a program.

    Args:
      function: returns leaves, and anything else.
      inputs: what stands for its values.

    Returns:
      What is known of the leaves, whatever the inputs are; the other thing that the function
      returns; and the program, to be run on numbers.
    """
    returned: list[Any] = []
    besides: list[Any] = []

    def traced(*values: Any) -> list[Any]:
        leaves, more = function(values)
        # No tracer may outlive its trace.
        returned[:] = [_TRACED if is_traced(leaf) else leaf for leaf in leaves]
        besides[:] = [more]
        # What is at hand needs no proof, and may be as large as a model.
        return list(filter(is_traced, leaves))

    program = jax.make_jaxpr(traced)(*map(as_traced, inputs.leaves))
    # A leaf that is traced already may lie anywhere, and is asked for its own sharding no more.
    placed = [getattr(leaf, "sharding", None) for leaf in inputs.leaves if not is_traced(leaf)]
    is_spread = any(map(spans_devices, placed)) or is_on_several_devices(program)
    known = interpret(program, is_spread)
    outputs = zip(itertools.count(), program.out_avals, known, strict=False)
    results = [
        Result(*next(outputs)) if leaf is _TRACED else Result(None, None, Known(), leaf)
        for leaf in returned
    ]
    return results, besides[0], Runs(program, inputs.leaves, only_returns(program))
