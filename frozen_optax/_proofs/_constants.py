"""Possible values: each element is one of a few numbers. And what arithmetic makes of these.

`Possible` holds the numbers as bytes, so that -0.0 is not 0.0; None is any number at all. Kept are
only numbers on which platforms agree, and results that do not depend on how one rounds: zero times
a known finite number is zero, zero times something unknown may be NaN, and a product of two
constants is unknown.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np

from frozen_optax._trees import is_at_hand

Possible: TypeAlias = frozenset[bytes] | None

BOTH: Possible = frozenset([b"\0", b"\1"])
TRUE: Possible = frozenset([b"\1"])

_MAX_KEPT = 4  # numbers of one array
_MAX_SEARCHED = 2**22  # elements of an array at hand


def is_float(dtype: Any) -> bool:
    """Whether a dtype is a float or a complex one."""
    return jnp.issubdtype(dtype, jnp.inexact)


def is_complex(dtype: Any) -> bool:
    """Whether a dtype has two parts."""
    return jnp.issubdtype(dtype, jnp.complexfloating)


def has_numbers(dtype: Any) -> bool:
    """Whether a dtype is one of numbers or bools, and not of keys, of `float0`, or of tokens."""
    return dtype is not None and (dtype == np.bool_ or jnp.issubdtype(dtype, jnp.number))


def number(dtype: Any, content: bytes) -> Any:
    """One number of an `Possible`."""
    return np.frombuffer(content, dtype)[0]


@functools.cache
def zeros(dtype: Any) -> frozenset[bytes]:
    """All zeros of a dtype."""
    zero: Any = np.zeros((), dtype)
    if is_complex(dtype):
        parts = zeros(zero.real.dtype)
        return frozenset(real + imag for real, imag in itertools.product(parts, parts))
    both: tuple[Any, ...] = (zero, np.negative(zero)) if is_float(dtype) else (zero,)
    return frozenset(np.asarray(each).tobytes() for each in both if each == 0)


@functools.cache
def holds(new: Any, own: Any) -> bool:
    """Whether a dtype holds every number of another; what is subnormal there may be flushed."""
    if new == own:
        return True
    if not has_numbers(own) or not has_numbers(new) or "e8m0" in f"{own} {new}":
        return False
    if is_complex(own) and not is_complex(new):
        return False
    own, new = _of_parts(own), _of_parts(new)
    if is_float(new):
        return own == np.bool_ or _float_holds(jnp.finfo(new), own)
    if own == np.bool_:
        return True
    if is_float(own) or new == np.bool_:
        return False
    here, there = jnp.iinfo(own), jnp.iinfo(new)
    return there.min <= here.min and here.max <= there.max


def _of_parts(dtype: Any) -> Any:
    return np.zeros((), dtype).real.dtype if is_complex(dtype) else dtype


def _float_holds(there: Any, own: Any) -> bool:
    if there.bits < 16:  # platforms compute with them in one wider type or another
        return False
    if not is_float(own):
        here = jnp.iinfo(own)
        return here.bits <= there.nmant + 1 and float(here.max) <= float(there.max)
    here = jnp.finfo(own)
    is_in_range = float(here.max) <= float(there.max) and float(here.tiny) >= float(there.tiny)
    return here.nmant <= there.nmant and is_in_range


@functools.cache
def additive_identities(dtype: Any) -> frozenset[bytes]:
    """The zeros of a dtype that add nothing, not even to -0.0: -0.0 itself, where there is one."""
    if not is_float(dtype):
        return zeros(dtype)
    parts = zeros(np.zeros((), dtype).real.dtype)
    negative = parts if len(parts) == 1 else {each for each in parts if any(each)}
    return frozenset(each * 2 if is_complex(dtype) else each for each in negative)


def is_zero(known: Possible, dtype: Any) -> bool:
    """Whether every element is a zero, of whichever sign."""
    return known is not None and has_numbers(dtype) and known <= zeros(dtype)


def is_one(known: Possible, dtype: Any) -> bool:
    """Whether every element is one."""
    return known is not None and known <= {np.ones((), dtype).tobytes()}


def few(numbers: Iterable[Any], dtype: Any) -> Possible:
    """These numbers, unless they are many, or platforms disagree on what they are."""
    found = set()
    for each in numbers:
        array: Any = np.asarray(each).astype(dtype)
        if is_float(dtype):
            parts = [array.real, array.imag] if is_complex(dtype) else [array]
            if any(
                not np.isfinite(part) or 0 < abs(part) < jnp.finfo(dtype).tiny for part in parts
            ):
                return None
        found.add(array.tobytes())
        if len(found) > _MAX_KEPT:
            return None
    return frozenset(found)


def union(several: Iterable[Possible]) -> Possible:
    """What is among one of several."""
    found: frozenset[bytes] = frozenset()
    for known in several:
        if known is None:
            return None
        found |= known
    return found if len(found) <= _MAX_KEPT else None


def of_array(array: Any, dtype: Any) -> Possible:
    """What is known of an array that is at hand."""
    if not has_numbers(dtype) or not is_at_hand(array):
        return None
    host = np.asarray(array)
    if host.dtype != dtype:  # a Python number
        host = host.astype(dtype)
    if host.size > 1 and any(host.strides):
        if host.size > _MAX_SEARCHED or host.itemsize > 8:
            return None
        contents = np.ascontiguousarray(host).view(f"uint{8 * host.itemsize}").ravel()
        if len(np.unique(contents[:64])) > _MAX_KEPT:
            return None
        distinct = np.unique(contents)
        return few(distinct.view(dtype), dtype) if len(distinct) <= _MAX_KEPT else None
    first = (
        [host[(0,) * host.ndim]] if host.size else []
    )  # of a broadcast number, which may be as large as can be
    return few(first, dtype)


# --- what a primitive makes of possible values: one number, several that it could be, or None


Result: TypeAlias = Any


def _all_zeros(dtype: Any) -> list[Any]:
    return [number(dtype, content) for content in zeros(dtype)]


def _signs(zero: Any) -> list[bool]:
    """Of a real number, or of both parts of a complex one."""
    return [bool(np.signbit(zero.real)), bool(np.signbit(zero.imag))]


def sum_of(x: Any, y: Any) -> Result:
    """Of floats only with a zero: other sums are rounded.

    The sum of 0.0 and -0.0 is 0.0, and may be either: compilers leave out the addition of 0.0.
    """
    if is_float(x.dtype) and not (x or y) and _signs(x) != _signs(y):
        return _all_zeros(x.dtype)
    return np.add(x, y) if not is_float(x.dtype) or not x or not y else None


def difference_of(x: Any, y: Any) -> Result:
    """Of floats only with a zero: other differences are rounded.

    -0.0 less -0.0 is 0.0, and may be either: compilers leave out what takes away -0.0.
    """
    are_zeros = is_float(x.dtype) and not (x or y)
    signs = zip(_signs(x), _signs(y), strict=True)
    if are_zeros and any(left and right for left, right in signs):
        return _all_zeros(x.dtype)
    return np.subtract(x, y) if not is_float(x.dtype) or not x or not y else None


def product_of(x: Any, y: Any) -> Result:
    """Of floats only with zero and one.

    A complex product has sums in it, so its zeros may have any sign.
    """
    if is_complex(x.dtype):
        return None if x and y else _all_zeros(x.dtype)
    is_exact = not is_float(x.dtype) or not x or not y or abs(x) == 1 or abs(y) == 1
    return x * y if is_exact else None


def quotient_of(x: Any, y: Any) -> Result:
    """Of floats only of zero, or over one."""
    if not is_float(x.dtype) or not y:
        return None
    if not x:
        return _all_zeros(x.dtype)
    return x / y if abs(y) == 1 and not is_complex(x.dtype) else None


def larger_of(x: Any, y: Any) -> Result:
    """Of two zeros it may be either."""
    if is_complex(x.dtype):
        return None
    return max(x, y) if x or y else _all_zeros(x.dtype)


def smaller_of(x: Any, y: Any) -> Result:
    """Of two zeros it may be either."""
    if is_complex(x.dtype):
        return None
    return min(x, y) if x or y else _all_zeros(x.dtype)


def magnitude_of(x: Any) -> Result:
    """Of complex numbers it is rounded."""
    return None if is_complex(x.dtype) else np.abs(x)


def clamped(low: Any, x: Any, high: Any) -> Result:
    """Of integers: platforms need not agree on the sign of a zero."""
    return None if is_float(x.dtype) else min(max(x, low), high)


def converted(dtype: Any) -> Callable[[Any], Result]:
    """A cast that can be taken back."""

    def of_one(x: Any) -> Result:
        if is_complex(x.dtype) and not is_complex(dtype):
            return None
        there: Any = np.asarray(x).astype(dtype)
        back = there.real if is_complex(dtype) and not is_complex(x.dtype) else there
        return there if back.astype(x.dtype) == x else None

    return of_one


def of_each(
    function: Callable[..., Result], operands: Sequence[Possible], dtypes: Sequence[Any], dtype: Any
) -> Possible:
    """What a function of single numbers makes of all that the operands can be."""
    if any(operand is None for operand in operands):
        return None
    if not has_numbers(dtype) or not all(map(has_numbers, dtypes)):
        return None
    found: frozenset[bytes] = frozenset()
    for contents in itertools.product(*(operand or () for operand in operands)):
        try:
            with np.errstate(all="ignore"):
                result = function(*map(number, dtypes, contents))
        except TypeError:  # numpy has not all of the narrow types' arithmetic and casts
            return None
        if result is None:
            return None
        several = few(result if isinstance(result, list) else [result], dtype)
        if several is None:
            return None
        found |= several
    return found if len(found) <= _MAX_KEPT else None
