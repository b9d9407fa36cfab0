"""Inputs that a program forwards: moved about or written otherwise, and what that may have lost."""

from __future__ import annotations

import dataclasses
import enum
import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, cast

import jax
import numpy as np
from jax.extend.core import JaxprEqn, Primitive

from frozen_optax._bits import width
from frozen_optax._proofs import _constants
from frozen_optax._proofs._constants import Possible, is_complex, is_float

_MAX_MOVED = 2**24  # elements of an array whose places are followed one by one
_MAX_MOVES = 64

_CUT_AND_JOINED = frozenset(["slice", "split", "unstack", "concatenate", "stack"])


class Loss(enum.Flag):
    """What an input can lose by arithmetic that changes nothing.

    On some platforms `p + (-0.0)` flushes subnormals and quiets signalling NaNs. `p + 0.0` turns
    -0.0 into 0.0 as well.
    """

    NOTHING = 0
    ODD_BITS = enum.auto()
    SIGN_OF_ZERO = enum.auto()


class Part:
    """A part of an array, in a program that is run on each. It is no input."""


Source: TypeAlias = int | Part  # an input by its number


@dataclasses.dataclass(frozen=True, eq=False)
class Moves:
    """The elements of one array in other places: what a primitive returns that only moves."""

    primitive: Primitive
    params: Mapping[str, Any]
    operands: tuple[Moves | None, ...]  # None is the array itself
    output: int
    source: tuple[int, ...]  # the shape of the array itself
    depth: int

    @functools.cached_property
    def order(self) -> np.ndarray | None:
        """Which element of the array itself stands where, or None where that cannot be found out.

        The primitive itself is run, on the places in place of the elements. So it cannot be
        misread, whatever its parameters are.
        """
        orders = [places(self.source) if each is None else each.order for each in self.operands]
        if any(order is None for order in orders):
            return None
        # Where the elements lie, device by device, is not looked at.
        anywhere = {key: None for key in ("sharding", "out_sharding") if key in self.params}
        try:
            with jax.ensure_compile_time_eval():  # a proof may be made within a trace
                moved = self.primitive.bind(*orders, **{**self.params, **anywhere})
        except Exception:  # it wants a mesh, or whatever else is not here: nothing is claimed
            return None
        return np.asarray(moved[self.output] if self.primitive.multiple_results else moved)


def places(shape: tuple[int, ...]) -> np.ndarray:
    """Each element's own place."""
    return np.arange(np.prod(shape, dtype=int), dtype=np.int32).reshape(shape)


@dataclasses.dataclass(frozen=True, eq=False)
class Forwarded:
    """The elements of an input, or of an array that a loop or a mesh takes apart."""

    source: Source
    aval: Any  # of the source
    moves: Moves | None = None
    written: tuple[str, ...] = ()  # not as the source has it: "bits", "real", "imag", "cast"
    losses: Loss = Loss.NOTHING
    is_spread: bool = False  # over several devices, whose parts a compiler may put together by sums

    def at_loss(self, *losses: Loss) -> Forwarded:
        """The same, which may have lost something more."""
        return dataclasses.replace(self, losses=functools.reduce(operator.or_, losses, self.losses))

    def rewritten(self, *written: str) -> Forwarded:
        """The same, written in another way."""
        return dataclasses.replace(self, written=written)

    @functools.cached_property
    def order(self) -> np.ndarray | None:
        """Which element stands where, if that is known."""
        if self.aval.size > _MAX_MOVED:
            return None
        return places(self.aval.shape) if self.moves is None else self.moves.order

    def is_like(self, other: Forwarded | None) -> bool:
        """Whether both are the same elements, in the same places, written in the same way."""
        if other is None or (self.source, self.written) != (other.source, other.written):
            return False
        if self.moves is other.moves:
            return True
        if self.order is None or other.order is None:
            return False
        return np.array_equal(self.order, other.order)

    @property
    def is_view(self) -> bool:
        """Whether its bits are taken for numbers of another dtype."""
        return self.written[-1:] == ("bits",)

    @property
    def is_whole(self) -> bool:
        """Whether this is its source, element by element, at whatever loss."""
        return self.is_like(Forwarded(self.source, self.aval))


def handed_through(forwarded: Forwarded | None, dtype: Any) -> Forwarded | None:
    """An input after some platform may have handed it on as numbers of a wider type.

    XLA on CPU moves, selects and scans floats of 16 bits or less so, which quiets signalling NaNs,
    and float8_e5m2fnuz by way of a type that has other numbers.
    """
    if forwarded is None or not is_float(dtype) or width(dtype) > 16:
        return forwarded
    if forwarded.is_view or dtype == "float8_e5m2fnuz":
        return None  # a NaN of the view may be an ordinary number of the input
    return forwarded.at_loss(Loss.ODD_BITS)


def gathered(forwarded: Forwarded | None, dtype: Any) -> Forwarded | None:
    """An input whose parts are on several devices, after they have been put together anew.

    To cut and to join along an axis that is split over devices, compilers add up parts that are
    zero elsewhere.
    """
    if forwarded is None or not forwarded.is_spread or not is_float(dtype):
        return forwarded
    if forwarded.is_view:
        return None
    return forwarded.at_loss(Loss.ODD_BITS, Loss.SIGN_OF_ZERO)


def moved(eqn: JaxprEqn, operands: Sequence[Forwarded | None], output: int) -> Forwarded | None:
    """What a primitive makes of an input that does nothing but move elements."""
    first, of_operand = operands[0], cast(Any, eqn.invars[0].aval)
    if first is None or first.aval.size > _MAX_MOVED:
        return None
    for each in operands:
        if each is None or (each.source, each.written) != (first.source, first.written):
            return None
    known = [each for each in operands if each]
    depth = 1 + max(each.moves.depth if each.moves else 0 for each in known)
    if depth > _MAX_MOVES:
        return None
    before = tuple(each.moves for each in known)
    moves = Moves(eqn.primitive, eqn.params, before, output, first.aval.shape, depth)
    forwarded = dataclasses.replace(first, moves=moves).at_loss(*(each.losses for each in known))
    if eqn.primitive.name in _CUT_AND_JOINED:
        forwarded = gathered(forwarded, of_operand.dtype)
    return handed_through(forwarded, of_operand.dtype)


def converted(operand: Forwarded | None, new: Any) -> Forwarded | None:
    """An input in another dtype that holds all its numbers, or back in its own."""
    if operand is None or operand.written not in ((), ("cast",)):
        return None
    own = operand.aval.dtype
    if not _constants.holds(new, own):
        return None
    written = () if new == own else ("cast",)
    is_cast = is_float(own) and written != operand.written
    return operand.rewritten(*written).at_loss(Loss.ODD_BITS if is_cast else Loss.NOTHING)


def bitcast(operand: Forwarded | None, old: Any, new: Any) -> Forwarded | None:
    """The bits of an input as numbers of another dtype, or as what they were."""
    if operand is None or "cast" in operand.written or width(old) != width(new):
        return None
    if old == new:
        return operand
    *rest, last = operand.written or ("",)
    if last != "bits":
        return operand.rewritten(*operand.written, "bits")
    own = operand.aval.dtype
    if rest:  # bits of the real or of the imaginary part
        own = np.zeros((), own).real.dtype
    return operand.rewritten(*rest) if new == own else operand


def part_of_complex(operand: Forwarded | None, part: str) -> Forwarded | None:
    """The real or the imaginary part of a complex input."""
    if operand is None or operand.written:
        return None
    return operand.rewritten(part)


def complex_of_parts(real: Forwarded | None, imag: Forwarded | None) -> Forwarded | None:
    """A complex input put together from its parts."""
    if real is None or imag is None:
        return None
    if (real.written, imag.written) != (("real",), ("imag",)):
        return None
    real, imag = real.rewritten(), imag.rewritten()
    return real.at_loss(imag.losses) if real.is_like(imag) else None


def _survives_arithmetic(operand: Forwarded | None, dtype: Any) -> bool:
    """Whether the numbers of an input, in this dtype, are still its own after arithmetic."""
    if operand is None:
        return False
    if operand.written[-1:] == ("bits",) and is_float(dtype):  # its bits, taken for a float's
        return False
    return operand.aval.dtype != "float8_e8m0fnu"  # its least number is subnormal elsewhere


def _loss_by_arithmetic(operand: Forwarded) -> Loss:
    is_number = is_float(operand.aval.dtype) and "bits" not in operand.written
    return Loss.ODD_BITS if is_number else Loss.NOTHING


def plus_nothing(operand: Forwarded | None, added: Possible, dtype: Any) -> Forwarded | None:
    """An input plus a zero."""
    if operand is None or not _survives_arithmetic(operand, dtype):
        return None
    if not _constants.is_zero(added, dtype):
        return None
    loss = _loss_by_arithmetic(operand)
    is_exact = added is not None and added <= _constants.additive_identities(dtype)
    if loss and not is_exact:
        loss |= Loss.SIGN_OF_ZERO
    return operand.at_loss(loss)


def times_one(operand: Forwarded | None, factor: Possible, dtype: Any) -> Forwarded | None:
    """An input times one, or over it."""
    if operand is None or not _survives_arithmetic(operand, dtype):
        return None
    if is_complex(dtype):  # x * (1 + 0i) multiplies x by zero as well
        return None
    return (
        operand.at_loss(_loss_by_arithmetic(operand)) if _constants.is_one(factor, dtype) else None
    )
