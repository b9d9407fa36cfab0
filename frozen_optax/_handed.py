"""An input that a program hands through: moved about or written in another way, and what that may have cost it."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from frozen_optax import _numbers
from frozen_optax._bits import width
from frozen_optax._numbers import Among, is_complex, is_float

# What an input can lose by arithmetic that changes nothing. `p + (-0.0)` flushes subnormals and quiets signalling NaNs
# on some platforms, and `p + 0.0` turns -0.0 into 0.0 as well.
ODD_BITS, SIGN_OF_ZERO = 1, 2

_MAX_MOVED = 2**24  # elements of an array whose places are followed one by one
_MAX_MOVES = 64


@dataclasses.dataclass(frozen=True, eq=False)
class Moves:
    """The elements of one array in other places: a primitive that does nothing else, of arrays that are so, too."""

    primitive: str
    params: dict[str, Any]
    operands: tuple[Moves | None, ...]  # None is the array itself
    output: int
    shape: tuple[int, ...]
    source: tuple[int, ...]  # the shape of the array itself
    depth: int

    @functools.cached_property
    def order(self) -> np.ndarray:
        """Which element of the array itself stands where."""
        first, *others = [operand.order if operand else _places(self.source) for operand in self.operands]
        params = self.params
        match self.primitive:
            case "transpose":
                return first.transpose(params["permutation"])
            case "rev":
                return np.flip(first, params["dimensions"])
            case "slice":
                steps = params["strides"] or [1] * first.ndim
                return first[tuple(map(slice, params["start_indices"], params["limit_indices"], steps))]
            case "concatenate":
                return np.concatenate([first, *others], params["dimension"])
            case "stack":
                return np.stack([first, *others], params["axis"])
            case "unstack":
                return np.moveaxis(first, params["axis"], 0)[self.output]
            case "tile":
                return np.tile(first, params["reps"])
            case "split":
                return np.split(first, np.cumsum(params["sizes"])[:-1], params["axis"])[self.output]
            case "broadcast_in_dim":
                axes = dict(zip(params["broadcast_dimensions"], first.shape, strict=True))
                return np.broadcast_to(first.reshape([axes.get(i, 1) for i in range(len(self.shape))]), self.shape)
            case _:  # reshape, squeeze, expand_dims
                return first.reshape(self.shape)


MOVING = {
    *("reshape", "transpose", "rev", "slice", "squeeze", "expand_dims", "broadcast_in_dim", "concatenate", "split"),
    *("stack", "unstack", "tile"),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Same:
    """The elements of an input."""

    input: int
    aval: Any  # of the input
    moves: Moves | None = None
    written: tuple[str, ...] = ()  # not as the input has it: "bits", "real", "imag", "cast"
    costs: int = 0

    def at_cost(self, *costs: int) -> Same:
        """The same, which may have lost something."""
        return dataclasses.replace(self, costs=functools.reduce(operator.or_, costs, self.costs))

    @functools.cached_property
    def order(self) -> np.ndarray | None:
        """Which element stands where, if that is known."""
        if self.aval.size > _MAX_MOVED:
            return None
        return self.moves.order if self.moves else _places(self.aval.shape)

    def is_like(self, other: Same | None) -> bool:
        """Whether both are the same elements, in the same places, written in the same way."""
        if other is None or (self.input, self.written) != (other.input, other.written):
            return False
        if self.moves is other.moves:
            return True
        return self.order is not None and other.order is not None and np.array_equal(self.order, other.order)

    @property
    def is_input(self) -> bool:
        """Whether this is the input, at whatever cost."""
        return self.is_like(Same(self.input, self.aval))


@functools.lru_cache(maxsize=4)
def _places(shape: tuple[int, ...]) -> np.ndarray:
    return np.arange(np.prod(shape, dtype=int), dtype=np.int32).reshape(shape)


def moved(eqn: Any, sames: Sequence[Same | None], output: int) -> Same | None:
    first = sames[0]
    if first is None or first.aval.size > _MAX_MOVED or first.aval.dtype == "float8_e5m2fnuz":  # moved as float16
        return None
    if not all(same and (same.input, same.written) == (first.input, first.written) for same in sames):
        return None
    operands = tuple(same.moves for same in sames if same)
    depth = 1 + max(moves.depth if moves else 0 for moves in operands)
    if depth > _MAX_MOVES:
        return None
    shape = eqn.outvars[output].aval.shape
    moves = Moves(eqn.primitive.name, eqn.params, operands, output, shape, first.aval.shape, depth)
    narrow = is_float(first.aval.dtype) and width(first.aval.dtype) <= 8  # some platforms move them as wider ones
    costs = [same.costs for same in sames if same]
    return dataclasses.replace(first, moves=moves).at_cost(*costs, ODD_BITS if narrow else 0)


def converted(same: Same, new: Any) -> Same | None:
    """An input in another dtype that holds all its numbers, or back in its own."""
    own = same.aval.dtype
    if same.written not in ((), ("cast",)) or not _numbers.holds(new, own):
        return None
    written = () if new == own else ("cast",)
    return dataclasses.replace(same, written=written).at_cost(
        ODD_BITS if is_float(own) and written != same.written else 0
    )


def bitcast(same: Same, old: Any, new: Any) -> Same | None:
    """The bits of an input as numbers of another dtype, or as what they were."""
    if "cast" in same.written or width(old) != width(new):
        return None
    if old == new:
        return same
    *rest, last = same.written or ("",)
    if last != "bits":
        return dataclasses.replace(same, written=(*same.written, "bits"))
    own = np.zeros((), same.aval.dtype).real.dtype if rest else same.aval.dtype
    return dataclasses.replace(same, written=tuple(rest)) if new == own else same


def whole(real: Same | None, imag: Same | None) -> Same | None:
    """A complex input put together from its parts."""
    if real is None or imag is None or (real.written, imag.written) != (("real",), ("imag",)):
        return None
    real, imag = (dataclasses.replace(part, written=()) for part in (real, imag))
    return real.at_cost(imag.costs) if real.is_like(imag) else None


def with_nothing_added(name: str, sames: Sequence[Same | None], known: Sequence[Among], dtype: Any) -> Same | None:
    """An input plus or minus zero, times or over one."""
    turns = [(sames[0], known[1])] + ([] if name in ("sub", "div") else [(sames[1], known[0])])
    for same, other in turns:
        if same is None or other is None or (same.written[-1:] == ("bits",) and is_float(dtype)):
            continue
        if same.aval.dtype == "float8_e8m0fnu":  # its least number is no NaN, and subnormal everywhere else
            continue
        costs = ODD_BITS if is_float(same.aval.dtype) and "bits" not in same.written else 0
        if name in ("mul", "div"):
            if _numbers.is_one(other, dtype) and not is_complex(dtype):  # x * (1 + 0i) multiplies x by zero as well
                return same.at_cost(costs)
        elif _numbers.is_zero(other, dtype):
            adds = _numbers.after("neg", {}, [other], [dtype], dtype) if name == "sub" else other
            is_exact = adds is not None and adds <= _numbers.additive_identities(dtype)
            return same.at_cost(costs, 0 if is_exact or not costs else SIGN_OF_ZERO)
    return None
