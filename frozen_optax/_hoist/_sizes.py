"""A program at two batch sizes: what grows with the batch, and what is the same.

All that is known of the batch is read off from two traces of one function, at `size` examples and
at twice as many. A length that doubles counts examples; what is equal has nothing to do with them.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from frozen_optax import _bits
from frozen_optax._hoist._programs import is_literal
from frozen_optax._jaxprs import is_program, opened

# How to differentiate, of which nothing is asked of what is not differentiated.
_OF_DERIVATIVES = {
    *("jvp_jaxpr_fun", "jvp_jaxpr_thunk", "fwd_jaxpr_thunk", "bwd", "out_trees"),
    *("policy", "differentiated"),
}
# A function that is there as a program, too, in the parameter `jaxpr`.
_AS_A_PROGRAM = {"computation"}
# The parameters that may hold lengths of axes.
_LENGTHS = ("shape", "new_sizes", "limit_indices", "slice_sizes", "sizes", "length", "reps")


class Differs(Exception):
    """Something is another at another batch size, or cannot be compared."""


class Batch(NamedTuple):
    """Where the examples lie in an array: along an axis, each a block of some slices of it."""

    axis: int
    block: int = 1


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The two batch sizes; whether a length may count examples at all."""

    size: int
    may_count: bool = True

    @property
    def other(self) -> int:
        """The second one."""
        return 2 * self.size

    def length(self, one: int, other: int) -> int | str:
        """A number as it is at any size: itself, or how many examples it counts."""
        if one == other:
            return one
        count = one // self.size
        if self.may_count and one == count * self.size and other == count * self.other:
            return f"{count} a example"
        raise Differs(f"it depends on the batch size: {one} with {self.size} examples")

    def shape(self, one: Any, other: Any) -> tuple[int | str, ...]:
        """The shape of an abstract value, as it is at any size."""
        shapes = getattr(one, "shape", ()), getattr(other, "shape", ())
        if len(shapes[0]) != len(shapes[1]):
            raise Differs(f"its result has other axes with {self.other} examples")
        return tuple(map(self.length, *shapes))

    def batch(self, one: Any, other: Any) -> Batch | None:
        """Where the examples lie in an abstract value; None if it knows nothing of them."""
        shape = self.shape(one, other)
        axes = [axis for axis, length in enumerate(shape) if isinstance(length, str)]
        if len(axes) > 1:
            raise Differs("its result has examples along two axes")
        return Batch(axes[0], one.shape[axes[0]] // self.size) if axes else None

    def aval(self, one: Any, other: Any) -> str:
        """Shape and dtype, as they are at any size."""
        return f"{getattr(one, 'dtype', None)}{self.shape(one, other)}"

    def params(self, one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
        """The parameters of an equation, as they are at any size."""
        if one.keys() != other.keys():
            raise Differs("its parameters are others with another batch size")
        words = list[str]()
        left_out = _OF_DERIVATIVES | (_AS_A_PROGRAM if "jaxpr" in one else set[str]())
        for name in sorted(set(one) - left_out):
            pair = one[name], other[name]
            words.append(
                f"{name}={self._lengths(*pair) if name in _LENGTHS else self._value(*pair)}"
            )
        return str(words)

    def _lengths(self, one: Any, other: Any) -> str:
        if isinstance(one, (tuple, list)):
            if len(one) != len(other):
                raise Differs("it depends on the batch size")
            return str([self.length(*pair) for pair in zip(one, other, strict=True)])
        return str(self.length(one, other))

    def _value(self, one: Any, other: Any) -> str:
        """A value in a program, in words that tell it from all others; no length doubles in it."""
        if type(one) is not type(other):
            raise Differs("it depends on the batch size")
        if is_program(one):
            return self._program(one, other)
        if isinstance(one, (tuple, list)):
            if len(one) != len(other):
                raise Differs("it depends on the batch size")
            values = [self._value(*pair) for pair in zip(one, other, strict=True)]
            return f"{type(one).__name__}({', '.join(values)})"
        return _same(words_for(one), words_for(other))

    def _program(self, one: Any, other: Any) -> str:
        """A whole program, as it is at any size."""
        (one, consts), (other, other_consts) = opened(one), opened(other)
        if len(one.eqns) != len(other.eqns) or len(consts) != len(other_consts):
            raise Differs("it depends on the batch size")
        numbers: dict[Any, int] = {}
        of_other: dict[Any, int] = {}

        def atom(one: Any, other: Any) -> str:
            if is_literal(one):
                return f"{self._value(one.val, getattr(other, 'val', None))}:{one.aval.dtype}"
            number = numbers.setdefault(one, len(numbers))
            if is_literal(other) or of_other.setdefault(other, len(of_other)) != number:
                raise Differs("it depends on the batch size")
            return f"{number}:{self.aval(one.aval, other.aval)}"

        def atoms(one: Sequence[Any], other: Sequence[Any]) -> list[str]:
            if len(one) != len(other):
                raise Differs("it depends on the batch size")
            return list(map(atom, one, other))

        lines = [
            str(atoms(one.constvars, other.constvars)),
            self._value([*consts], [*other_consts]),
        ]
        lines.append(str(atoms(one.invars, other.invars)))
        for eqn, twin in zip(one.eqns, other.eqns, strict=True):
            lines.append(_same(eqn.primitive.name, twin.primitive.name))
            lines.append(self.params(eqn.params, twin.params))
            lines += atoms(eqn.invars, twin.invars) + atoms(eqn.outvars, twin.outvars)
        lines.append(str(atoms(one.outvars, other.outvars)))
        return digest(*lines)


def _same(one: str, other: str) -> str:
    if one != other:
        raise Differs("it depends on the batch size")
    return one


def words_for(value: Any) -> str:
    """A value in words that tell it from all others."""
    if _bits.is_array(value) and not isinstance(value, type):
        return digest_of(value)
    if " at 0x" in repr(value):  # an object without a name of its own
        raise Differs(f"it holds {value!r}, of which no one knows what it does")
    return repr(value)


def digest(*words: str) -> str:
    """A name for some words, which other words do not have."""
    return hashlib.blake2b("\n".join(words).encode(), digest_size=16).hexdigest()


def digest_of(array: Any) -> str:
    """A name for an array that is at hand: dtype, shape and bits."""
    with jax.ensure_compile_time_eval():
        if _bits.is_key(array):
            name, array = str(array.dtype), jax.random.key_data(array)
        else:
            name = str(array.dtype)
        host = np.asarray(array)
    content = hashlib.blake2b(np.ascontiguousarray(host).tobytes(), digest_size=16)
    return f"{name}{host.shape} {content.hexdigest()}"
