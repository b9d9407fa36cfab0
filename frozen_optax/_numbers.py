"""Arrays of which only this is known: each element is one of a few numbers. And what exact arithmetic makes of them.

`Among` holds the numbers as bytes, so that -0.0 is not 0.0; None is any number at all. Kept are only numbers on which
platforms agree, and results that do not depend on how one rounds: zero times a known finite number is zero, zero times
something unknown may be NaN, and a product of two constants is unknown.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np

from frozen_optax._bits import width
from frozen_optax._trees import is_at_hand

Among: TypeAlias = frozenset[bytes] | None

BOTH: Among = frozenset([b"\0", b"\1"])
TRUE: Among = frozenset([b"\1"])

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
    """One number of an `Among`."""
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
    """Whether a dtype holds every number of another exactly; what is subnormal in its own may be flushed."""
    if new == own:
        return True
    if not has_numbers(own) or not has_numbers(new) or "e8m0" in f"{own} {new}" or (is_complex(own) > is_complex(new)):
        return False
    own, new = (np.zeros((), dtype).real.dtype if is_complex(dtype) else dtype for dtype in (own, new))
    if not is_float(new):
        if own == np.bool_ or is_float(own) or new == np.bool_:
            return own == np.bool_
        return jnp.iinfo(new).min <= jnp.iinfo(own).min and jnp.iinfo(own).max <= jnp.iinfo(new).max
    if own == np.bool_:
        return True
    there = jnp.finfo(new)
    if there.bits < 16:
        return False
    if not is_float(own):
        return jnp.iinfo(own).bits <= there.nmant + 1 and float(jnp.iinfo(own).max) <= float(there.max)
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


def is_zero(known: Among, dtype: Any) -> bool:
    """Whether every element is a zero, of whichever sign."""
    return known is not None and has_numbers(dtype) and known <= zeros(dtype)


def is_one(known: Among, dtype: Any) -> bool:
    """Whether every element is one."""
    return known is not None and known <= {np.ones((), dtype).tobytes()}


def few(numbers: Iterable[Any], dtype: Any) -> Among:
    """These numbers, unless they are many, or platforms disagree on what they are."""
    found = set()
    for each in numbers:
        array: Any = np.asarray(each).astype(dtype)
        if is_float(dtype):
            parts = [array.real, array.imag] if is_complex(dtype) else [array]
            if any(not np.isfinite(part) or 0 < abs(part) < jnp.finfo(dtype).tiny for part in parts):
                return None
        found.add(array.tobytes())
        if len(found) > _MAX_KEPT:
            return None
    return frozenset(found)


def union(several: Iterable[Among]) -> Among:
    """What is among one of several."""
    found: frozenset[bytes] = frozenset()
    for known in several:
        if known is None:
            return None
        found |= known
    return found if len(found) <= _MAX_KEPT else None


def of_array(array: Any, dtype: Any) -> Among:
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
    return few(
        [host[(0,) * host.ndim]] if host.size else [], dtype
    )  # a broadcast number, which may be as large as can be


def _all_zeros(dtype: Any) -> list[Any]:
    return [number(dtype, content) for content in zeros(dtype)]


def _sum_or_difference(function: Any) -> Callable[..., Any]:
    def of_two(x: Any, y: Any) -> Any:
        return function(x, y) if not is_float(x.dtype) or x == 0 or y == 0 else None

    return of_two


def _product(x: Any, y: Any) -> Any:
    if is_complex(x.dtype):
        return None if x and y else _all_zeros(x.dtype)
    return x * y if not is_float(x.dtype) or not x or not y or abs(x) == 1 or abs(y) == 1 else None


def _quotient(x: Any, y: Any) -> Any:
    if not is_float(x.dtype) or not y:
        return None
    if not x:
        return _all_zeros(x.dtype)
    return x / y if abs(y) == 1 and not is_complex(x.dtype) else None


def _extreme(function: Any) -> Callable[..., Any]:
    def of_two(x: Any, y: Any) -> Any:
        if is_complex(x.dtype):
            return None
        return function(x, y) if x or y else _all_zeros(x.dtype)

    return of_two


def _magnitude(x: Any) -> Any:
    return None if is_complex(x.dtype) else np.abs(x)


def _clamped(low: Any, x: Any, high: Any) -> Any:
    return None if is_float(x.dtype) else min(max(x, low), high)


# Of numbers that are known: one result, several that it could be, or None.
_EXACT: dict[str, Callable[..., Any]] = {
    "add": _sum_or_difference(np.add),
    "add_any": _sum_or_difference(np.add),
    "sub": _sum_or_difference(np.subtract),
    "mul": _product,
    "div": _quotient,
    "neg": np.negative,
    "abs": _magnitude,
    "max": _extreme(max),
    "min": _extreme(min),
    "clamp": _clamped,
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.bitwise_not,
    "is_finite": np.isfinite,
    "real": np.real,
    "imag": np.imag,
}

# Zero if all operands are; of which sign may depend on the platform.
_ZERO_OF_ZEROS = {
    *(
        "sin",
        "tan",
        "asin",
        "atan",
        "sinh",
        "asinh",
        "tanh",
        "atanh",
        "sqrt",
        "cbrt",
        "expm1",
        "log1p",
        "erf",
        "square",
    ),
    *("sign", "floor", "ceil", "round", "conj", "reduce_sum", "cumsum", "reduce_precision", "psum", "psum_invariant"),
}

# Elements of some of the operands, and no others: of all of them, or of those listed.
_ELEMENTS: dict[str, Sequence[int] | None] = {
    **dict.fromkeys(["reshape", "transpose", "rev", "slice", "squeeze", "expand_dims", "broadcast_in_dim"]),
    **dict.fromkeys(["concatenate", "split", "stack", "unstack", "tile", "pad", "cummax", "cummin"]),
    **dict.fromkeys(["reduce_max", "reduce_min"]),
    "sort": [0],
    "dynamic_slice": [0],
    "dynamic_update_slice": [0, 1],
    "scatter": [0, 2],
}


def _converted(x: Any, dtype: Any) -> Any:
    try:
        there = np.asarray(x).astype(dtype)
        return there if there.astype(x.dtype) == x else None
    except TypeError:  # some of the narrow types do not know each other
        return None


def _of_all(function: Callable[..., Any], operands: Sequence[Among], dtypes: Sequence[Any], dtype: Any) -> Among:
    found: frozenset[bytes] = frozenset()
    for contents in itertools.product(*(operand or () for operand in operands)):
        result = function(*map(number, dtypes, contents))
        several = None if result is None else few(result if isinstance(result, list) else [result], dtype)
        if several is None:
            return None
        found |= several
    return found if len(found) <= _MAX_KEPT else None


def after(name: str, params: Any, operands: Sequence[Among], dtypes: Sequence[Any], dtype: Any) -> Among:
    """What is known of the first result, of type `dtype`, of a primitive of that name."""
    if not has_numbers(dtype) or not operands:
        return None
    if name in _ELEMENTS and params.get("update_jaxpr") is None:  # a scatter may apply a function
        chosen = _ELEMENTS[name]
        return union(operands if chosen is None else [operands[i] for i in chosen])
    if name in ("reduce_and", "reduce_or"):  # of integers, they make new ones
        return operands[0] if dtype == np.bool_ else None
    if name in _ZERO_OF_ZEROS or (name == "integer_pow" and params["y"] > 0):
        return zeros(dtype) if all(map(is_zero, operands, dtypes)) else None
    if any(operand is None for operand in operands) or not all(map(has_numbers, dtypes)):
        return None
    with np.errstate(all="ignore"):
        if name == "convert_element_type":
            return _of_all(lambda x: _converted(x, dtype), operands, dtypes, dtype)
        if name == "bitcast_convert_type" and width(dtypes[0]) == width(dtype):
            return _of_all(lambda x: np.asarray(x).view(dtype), operands, dtypes, dtype)
        return _of_all(_EXACT[name], operands, dtypes, dtype) if name in _EXACT else None
