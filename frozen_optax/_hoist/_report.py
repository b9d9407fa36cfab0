"""What hoisting gains, told before anything is computed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from jax.extend.core import JaxprEqn

from frozen_optax._hoist._cut import equations_for, variables_of
from frozen_optax._hoist._rowwise import MOVES
from frozen_optax._hoist._split import Split
from frozen_optax._jaxprs import opened, subprograms

_MAX_STOPS = 5


@dataclasses.dataclass(frozen=True)
class Report:
    """What hoisting a function gains, for a batch of the given size.

    FLOPs are counted in the program: products and convolutions in full, all else one an element.
    The time of a step is taken to follow them, its gradient to cost twice what is differentiated.

    Attributes:
      batch_size: the examples of a batch.
      forward: the FLOPs of the function, for a batch.
      hoisted: those of them that are computed once.
      backward: those of its gradient in the trainable leaves.
      bytes_per_example: what a row takes.
      bytes_shared: what all rows share.
      stops: the operations that it ended at, each with the reason.
      does_nothing: whether there is nothing to hoist.
    """

    batch_size: int
    forward: int
    hoisted: int
    backward: int
    bytes_per_example: int
    bytes_shared: int
    stops: tuple[str, ...]
    does_nothing: bool

    @property
    def share(self) -> float:
        """The share of the forward FLOPs that is hoisted."""
        return self.hoisted / max(self.forward, 1)

    def speed_up(self, epochs: int) -> float:
        """How many times faster some epochs are expected to be, the preparation counted."""
        before = epochs * (self.forward + self.backward)
        return before / max(before - (epochs - 1) * self.hoisted, 1)

    @property
    def pays_at(self) -> int | None:
        """The first epoch by whose end it has paid; None if never."""
        return 2 if self.hoisted else None

    def __str__(self) -> str:
        if self.does_nothing:
            lines = ["nothing to hoist: no more is determined than what is given"]
        else:
            gains = ", ".join(f"{self.speed_up(n):.1f}x for {n}" for n in (2, 10, 100))
            lines = [
                f"hoisted         {self.share:.1%} of the forward FLOPs",
                f"kept            {self.bytes_per_example:,} bytes an example, "
                f"{self.bytes_shared:,} bytes shared by all",
                f"pays            from epoch {self.pays_at} on",
                f"expected        {gains} epochs, the preparation counted",
            ]
        for i, stop in enumerate(self.stops[:_MAX_STOPS]):
            lines.append(("ended at        " if i == 0 else " " * 16) + stop)
        if len(self.stops) > _MAX_STOPS:
            lines.append(f"{' ' * 16}... and {len(self.stops) - _MAX_STOPS} more")
        return "\n".join(lines)


def report(split: Split, size: int, kept: tuple[list[str], list[str]]) -> Report:
    """What is gained where the values of some digests are kept."""
    each, shared = kept
    kept_digests = {*each, *shared}
    stored = {var for var, value in split.values.items() if value.digest in kept_digests}
    at_hand = stored | set(split.jaxpr.constvars)
    at_hand |= {
        var
        for var, given in zip(split.jaxpr.invars, split.given, strict=True)
        if given.kind != "data"
    }
    live = [eqn for eqn in split.eqns if split.is_live(eqn)]
    wanted = variables_of(split, live)
    again = equations_for(split, wanted, at_hand)
    rest = sum(_flops(eqn) for eqn in split.eqns if id(eqn) in {*map(id, again), *map(id, live)})
    forward = sum(map(_flops, split.eqns))
    digests = {value.digest: value for value in split.values.values()}
    given = {split.values[var].digest for var in split.jaxpr.invars}
    return Report(
        size,
        forward,
        forward - rest,
        2 * sum(_flops(eqn) for eqn in _differentiated(split)),
        sum(digests[digest].size for digest in each),
        sum(digests[digest].size for digest in shared),
        ended_at(split),
        kept_digests <= given,
    )


def ended_at(split: Split) -> tuple[str, ...]:
    """The operations at which hoisting ended, those that read what was computed first."""
    first = [stop for stop in split.stops if not stop.is_of_data_as_given]
    return tuple(dict.fromkeys(map(str, first or split.stops)))


def ends(split: Split) -> str:
    """The same in a sentence."""
    stops = ended_at(split)[:3]
    return f"It ended at {'; '.join(stops)}." if stops else "It reads no data at all."


def _differentiated(split: Split) -> list[JaxprEqn]:
    """The equations between the trainable leaves and the results."""
    reached = {
        var
        for var, given in zip(split.jaxpr.invars, split.given, strict=True)
        if given.kind == "trained"
    }
    found = []
    for eqn in split.eqns:
        if not reached.isdisjoint(split.read(eqn.invars)):
            reached.update(eqn.outvars)
            found.append(eqn)
    return found


def _length(var: Any) -> int:
    return math.prod(getattr(var.aval, "shape", ()))


def _flops(eqn: JaxprEqn) -> int:
    """About how many operations an equation does on numbers."""
    name, params = eqn.primitive.name, eqn.params
    results = sum(map(_length, eqn.outvars))
    if name == "dot_general":
        (summed, _), _ = params["dimension_numbers"]
        shape: Sequence[int] = eqn.invars[0].aval.shape  # pyright: ignore[reportAttributeAccessIssue]
        return 2 * results * math.prod(shape[axis] for axis in summed)
    if name == "conv_general_dilated":
        shape = eqn.invars[1].aval.shape  # pyright: ignore[reportAttributeAccessIssue]
        features = shape[params["dimension_numbers"].rhs_spec[0]]
        return 2 * results * math.prod(shape) // features
    if name == "fft":
        turns = math.log2(max(2, math.prod(params["fft_lengths"])))
        return round(2.5 * turns * max(results, _length(eqn.invars[0])))
    programs = [sum(map(_flops, opened(each)[0].eqns)) for each in subprograms(eqn)]
    if programs:
        turns = params["length"] if name == "scan" else 1
        return turns * (max(programs) if name == "cond" else sum(programs))
    if name in MOVES:
        return 0
    return max(results, sum(map(_length, eqn.invars)) if name.startswith("reduce") else 0)
