"""Digests of leaves: a leaf's bits in 64 of them, the same wherever it is held.

Each 32-bit word of a leaf is mixed with its place in the leaf, and the results are added. The
mixing is a bijection of the word at each place, so a single changed word always changes the sum;
the place is in it, so equal words in another order are seen. Sums modulo 2^32 do not depend on the
order in which they are taken: each device adds up what it holds, and the digest is the same on any
number of devices and on the host, where numpy does the same arithmetic.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np

from frozen_optax import _bits
from frozen_optax._parts import Part
from frozen_optax._trees import describe, is_traced, require_alive
from frozen_optax._typing import Array, Leaf

# How one is written: dtype and shape, and after them both sums.
DIGEST = re.compile(r"\S+ [0-9a-f]{16}")


def _words(leaf: Array) -> Array:
    """The bits of an array as 32-bit words, one an element, or one more axis of them.

    A scalar gets one axis: numpy's arithmetic on scalars warns where it overflows, and that on
    arrays does not.
    """
    pattern = _bits.bits(leaf)
    pattern = pattern.reshape(pattern.shape or (1,))
    if pattern.dtype.itemsize < 8:
        return pattern.astype(np.uint32)
    halves = [(pattern & 0xFFFFFFFF).astype(np.uint32), (pattern >> 32).astype(np.uint32)]
    return (jnp if is_traced(pattern) else np).stack(halves, axis=-1)


def _mix(x: Array) -> Array:
    """The finalizer of MurmurHash3 (Austin Appleby, public domain).

    It is a bijection, each bit of which depends on all.
    """
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _positions(shape: tuple[int, ...], axes: range, np_or_jnp: ModuleType) -> Array:
    """Where each element stands along some axes taken together, modulo 2^32."""
    position = np_or_jnp.zeros((1,) * len(shape), np.uint32)
    for axis in axes:
        along = np_or_jnp.arange(shape[axis], dtype=np.uint32)
        along = along.reshape([-1 if i == axis else 1 for i in range(len(shape))])
        position = position + along * np.uint32(math.prod(shape[axis + 1 : axes.stop]) % 2**32)
    return position


def _terms(words: Array) -> tuple[Array, Array]:
    """What each word adds to the two sums; arithmetic is modulo 2^32, in numpy and in jax."""
    np_or_jnp = jnp if is_traced(words) else np
    # The place of a word is two numbers, as an array may have more than 2^32 of them: along the
    # leading axes, and along the others, which have no more.
    around = next(axis for axis in range(words.ndim + 1) if math.prod(words.shape[axis:]) <= 2**32)
    outer = _positions(words.shape, range(around), np_or_jnp)
    inner = _positions(words.shape, range(around, words.ndim), np_or_jnp)
    place = _mix(inner + _mix(outer + np.uint32(0x9E3779B9)))
    first = _mix(words ^ place)
    return first, _mix(first * np.uint32(0x9E3779B1) + place)


def _sums(leaf: Array, frozen: Array | None = None) -> Array:
    """The two sums, over the elements that a mask over the leading axes names, or over all."""
    words = _words(leaf)
    first, second = _terms(words)
    if frozen is not None:
        mask = frozen.reshape(frozen.shape + (1,) * (words.ndim - frozen.ndim))
        first, second = (each * mask for each in (first, second))
    if not is_traced(leaf):
        return np.stack([np.sum(each, dtype=np.uint32) for each in (first, second)])
    add = lambda left, right: (left[0] + right[0], left[1] + right[1])  # both in one pass
    zero = np.uint32(0)
    return jnp.stack(jax.lax.reduce((first, second), (zero, zero), add, tuple(range(first.ndim))))


def _sums_of_fetched(
    leaf: Array, device_memory: jax.sharding.Sharding, frozen: Array | None
) -> Array:
    return _sums(jax.device_put(leaf, device_memory), frozen)


_sums_on_device = jax.jit(_sums)
_sums_of_host_memory = jax.jit(_sums_of_fetched, static_argnums=1)


def begin(path: str, leaf: Leaf, part: Part | None = None) -> Array:
    """The sums of a leaf, computed where it is; on a device they are only begun.

    Of one that is frozen in part, those of what is frozen.
    """
    require_alive(path, leaf)
    frozen = None if part is None else part.frozen
    if isinstance(leaf, (bool, int, float, complex, np.ndarray, np.generic)):
        host = np.asarray(leaf)
        if host.dtype.hasobject:  # its bits are addresses, others in each process
            raise TypeError(
                f"a fingerprint is of bits, and those of {path!r} are not its own: it is "
                f"{describe(host)}. Give it a dtype of numbers, or leave it out."
            )
        return _sums(host, frozen)
    if not isinstance(leaf, jax.Array):
        raise TypeError(
            f"a fingerprint is of arrays, found {describe(leaf)} at {path!r}. Leave it out."
        )
    try:
        if is_traced(leaf):
            return _sums(leaf, frozen)
        if device_memory := _bits.device_memory_of(leaf):
            return _sums_of_host_memory(leaf, device_memory, frozen)
        return _sums_on_device(leaf, frozen)
    except TypeError:  # 6-bit floats, whose bits no compiled function can read
        return _sums(leaf, frozen)


def kind(leaf: Leaf, part: Part | None = None) -> str:
    """The dtype and shape of a leaf, as a digest begins with them, and which elements it is of."""
    leaf = leaf if _bits.is_array(leaf) else np.asarray(leaf)
    # That of a struct has spaces, and a digest is split at them.
    dtype = "".join(str(leaf.dtype).split())
    elements = "" if part is None else f"@{part.digest}"
    return f"{dtype}[{','.join(map(str, leaf.shape))}]{elements}"


def in_hex(sums: Array) -> str:
    """The sums of a leaf as its digest ends with them."""
    return f"{int(sums[0]):08x}{int(sums[1]):08x}"


def sums_of(digest: str) -> np.ndarray:
    """The sums that a digest ends with."""
    return np.array([int(digest[-16:-8], 16), int(digest[-8:], 16)], np.uint32)


def digests(
    leaves: Sequence[tuple[str, Leaf]], parts: Sequence[Part | None] | None = None
) -> list[str]:
    """The digest of each of some leaves, given with their paths; no value is traced.

    Where there is a part, that is what trains of the leaf, and the digest is of the rest.
    """
    parts = [None] * len(leaves) if parts is None else parts
    rows = [(*leaf, part) for leaf, part in zip(leaves, parts, strict=True)]
    begun = [begin(*row) for row in rows]  # all, before the first is waited for
    sums = jax.device_get(begun)
    pairs = zip(rows, sums, strict=True)
    return [f"{kind(leaf, part)} {in_hex(each)}" for (_, leaf, part), each in pairs]
