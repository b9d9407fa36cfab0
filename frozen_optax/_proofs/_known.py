"""What is known of an array that a program computes, whatever its inputs are, and how it joins."""

from __future__ import annotations

import collections
import dataclasses
import functools
import operator
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np

from frozen_optax._proofs import _constants
from frozen_optax._proofs._constants import Possible
from frozen_optax._proofs._provenance import Forwarded, Loss

# Inputs of a program, one bit each: such sets are joined at every equation, and may be large.
InputSet: TypeAlias = int


@dataclasses.dataclass(frozen=True, eq=False)
class Dependencies:
    """The inputs that can have an effect on an array, and by way of which arrays and primitives."""

    inputs: InputSet = 0
    through: str = (
        ""  # the primitive that reads the sources; what only moves elements has no name here
    )
    sources: tuple[Dependencies, ...] = ()

    @classmethod
    def on(cls, sources: Iterable[Dependencies], through: str = "") -> Dependencies:
        """What depends on all that these depend on."""
        distinct = {id(source): source for source in sources if source.inputs}
        if not distinct:
            return INDEPENDENT
        inputs = functools.reduce(operator.or_, (source.inputs for source in distinct.values()))
        return cls(inputs, through, tuple(distinct.values()))

    def trail(self, wanted: InputSet) -> tuple[int, list[str]]:
        """The nearest of the wanted inputs, and the primitives on the way from it.

        Raises:
          LookupError: it depends on none of them.
        """
        queue: collections.deque[tuple[Dependencies, Any]] = collections.deque([(self, None)])
        seen = {id(self)}
        while queue:
            node, way = queue.popleft()
            if not node.sources and node.inputs & wanted:
                steps = []
                while way:
                    step, way = way
                    steps.append(step)
                return node.inputs.bit_length() - 1, steps
            for source in node.sources:
                if source.inputs & wanted and id(source) not in seen:
                    seen.add(id(source))
                    queue.append((source, (node.through, way) if node.through else way))
        raise LookupError("it depends on none of these inputs")


INDEPENDENT = Dependencies()


@dataclasses.dataclass(frozen=True, eq=False)
class Known:
    """What is known of an array. Nothing, for a start: any numbers, of no input in particular."""

    possible: Possible = None  # a few numbers, one of which every element is
    forwarded: Forwarded | None = None  # the input whose elements these are
    dependencies: Dependencies = INDEPENDENT  # the inputs that can have an effect on it

    @property
    def is_constant(self) -> bool:
        """Whether all elements are one known number."""
        return self.possible is not None and len(self.possible) <= 1

    @property
    def is_untouched(self) -> bool:
        """Whether these are the elements of an input, with all their bits."""
        return self.forwarded is not None and not self.forwarded.losses

    @property
    def summary(self) -> tuple[Any, ...]:
        """What two have in common of which the same is known; unlike ones may be alike as well."""
        forwarded = self.forwarded
        of_input = forwarded and (
            forwarded.source,
            forwarded.moves,
            forwarded.written,
            forwarded.losses,
            forwarded.is_spread,
        )
        return self.possible, of_input, self.dependencies.inputs

    def agrees(self, other: Known) -> bool:
        """Whether as much is known of the one as of the other."""
        if self.forwarded is None or other.forwarded is None:
            is_forwarded_alike = self.forwarded is other.forwarded
        else:
            is_forwarded_alike = (
                self.forwarded.is_like(other.forwarded)
                and self.forwarded.losses == other.forwarded.losses
            )
        return (
            is_forwarded_alike
            and self.possible == other.possible
            and self.dependencies.inputs == other.dependencies.inputs
        )


def of_input(number: int, aval: Any, is_spread: bool = False) -> Known:
    """What is known of an input of the program."""
    forwarded = Forwarded(number, aval, is_spread=is_spread)
    return settled(aval, Known(None, forwarded, Dependencies(1 << number)))


def settled(aval: Any, known: Known) -> Known:
    """What is known of an array of this shape and dtype, whichever rule it comes from."""
    if 0 in getattr(aval, "shape", ()):
        return Known(frozenset(), known.forwarded)
    possible = known.possible
    if possible == frozenset():  # numbers of an operand without elements; this one has some
        possible = None
    if possible is None and getattr(aval, "dtype", None) == np.bool_:
        possible = _constants.BOTH
    known = dataclasses.replace(known, possible=possible)
    if known.is_constant:  # the same number, whatever the inputs are
        return dataclasses.replace(known, dependencies=INDEPENDENT)
    return known


def join(
    cases: Sequence[Known],
    through: str,
    which: Known | None = None,
    losses: Loss = Loss.NOTHING,
) -> Known:
    """What is known of one of several arrays, whichever it is, and whatever `which` decides it."""
    possible = _constants.union(case.possible for case in cases)
    if possible is not None and len(possible) == 1:
        return Known(possible)
    deciding = [which.dependencies] if which else []
    dependencies = Dependencies.on([*(case.dependencies for case in cases), *deciding], through)
    first, *others = [case.forwarded for case in cases]
    if first is None or not all(map(first.is_like, others)):
        return Known(possible, None, dependencies)
    forwarded = first.at_loss(losses, *(other.losses for other in others if other))
    if not forwarded.losses:  # the same bits in each case, so nothing hangs on which it is
        dependencies = cases[0].dependencies
    return Known(possible, forwarded, dependencies)
