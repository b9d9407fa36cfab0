"""Fingerprints of weights: a digest a leaf that says which bits it holds, wherever and however they are held.

Each 32-bit word of a leaf is mixed with its place in the leaf, and the results are added. The mixing is a bijection of
the word at each place, so a single changed word always changes the sum; the place is in it, so equal words in another
order are seen. Sums modulo 2^32 do not depend on the order in which they are taken: each device adds up what it holds,
and the digest is the same on any number of devices and on the host, where numpy does the same arithmetic.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from frozen_optax import _bits
from frozen_optax._selection import Selection, frozen_selector
from frozen_optax._trees import PyTree, describe, is_traced, paths_of, require_alive

_MAX_SHOWN = 10  # leaves described in one message
_DIGEST = re.compile(r"\S+ [0-9a-f]{16}")


def _words(leaf: Any) -> Any:
    """The bits of an array as 32-bit words: one an element, or one more axis of them."""
    pattern = _bits.bits(leaf)
    if pattern.dtype.itemsize < 8:
        return pattern.astype(np.uint32)
    halves = [(pattern & 0xFFFFFFFF).astype(np.uint32), (pattern >> 32).astype(np.uint32)]
    return (jnp if is_traced(pattern) else np).stack(halves, axis=-1)


def _mix(x: Any) -> Any:
    """The finalizer of MurmurHash3 (Austin Appleby, public domain): a bijection, each bit of which depends on all."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _positions(shape: tuple[int, ...], axes: range, np_or_jnp: Any) -> Any:
    """Where each element stands along some axes taken together, modulo 2^32."""
    position = np_or_jnp.zeros((1,) * len(shape), np.uint32)
    for axis in axes:
        along = np_or_jnp.arange(shape[axis], dtype=np.uint32)
        along = along.reshape([-1 if i == axis else 1 for i in range(len(shape))])
        position = position + along * np.uint32(math.prod(shape[axis + 1 : axes.stop]) % 2**32)
    return position


def _terms(words: Any) -> tuple[Any, Any]:
    """What each word adds to the two sums; the arithmetic is that of 32-bit words in numpy and in jax."""
    np_or_jnp = jnp if is_traced(words) else np
    around = next(axis for axis in range(words.ndim + 1) if math.prod(words.shape[axis:]) <= 2**32)
    outer = _positions(words.shape, range(around), np_or_jnp)
    inner = _positions(words.shape, range(around, words.ndim), np_or_jnp)
    place = _mix(inner + _mix(outer + np.uint32(0x9E3779B9)))
    first = _mix(words ^ place)
    return first, _mix(first * np.uint32(0x9E3779B1) + place)


def _sums(leaf: Any) -> Any:
    first, second = _terms(_words(leaf))
    if not is_traced(leaf):
        return np.stack([np.sum(each, dtype=np.uint32) for each in (first, second)])
    add = lambda left, right: (left[0] + right[0], left[1] + right[1])  # both in one pass
    zero = np.uint32(0)
    return jnp.stack(jax.lax.reduce((first, second), (zero, zero), add, tuple(range(first.ndim))))


_sums_on_device = jax.jit(_sums)


def _begin(path: str, leaf: Any) -> Any:
    """The sums of a leaf, computed where it is; on a device they are only begun."""
    require_alive(path, leaf)
    if isinstance(leaf, (bool, int, float, complex, np.ndarray, np.generic)):
        return _sums(np.asarray(leaf))
    if not isinstance(leaf, jax.Array):
        raise TypeError(f"a fingerprint is of arrays, found {describe(leaf)} at {path!r}. Leave it out.")
    try:
        return _sums(leaf) if is_traced(leaf) else _sums_on_device(leaf)
    except TypeError:  # 6-bit floats, whose bits no compiled function can read
        return _sums(leaf)


def _kind(leaf: Any) -> str:
    leaf = leaf if _bits.is_array(leaf) else np.asarray(leaf)
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _hex(sums: Any) -> str:
    return f"{int(sums[0]):08x}{int(sums[1]):08x}"


def fingerprint(tree: PyTree, frozen: Selection = None, *, trainable: Selection = None) -> dict[str, str]:
    """A digest of each frozen leaf, to be kept and compared later: kilobytes for a model of any size.

    It depends on dtype, shape, and every bit (-0.0 is not 0.0, one NaN is not another), and on nothing else: not on the
    sharding, the platform, or the version of jax. It is computed on the device where a leaf lives, without gathering a
    sharded one, in a single pass over it; `python -m benchmarks` prints how that compares with a plain read.

    A digest has 64 bits. A change in a single element of at most 32 bits always changes it; any other change, such as a
    permutation, goes unseen with odds of about one in 2^64. It is a check against accidents: who wants to make two
    leaves of one digest can.

    Args:
      tree: a pytree of arrays.
      frozen: which leaves, as `freeze` takes it; `"**"` for all.
      trainable: which leaves not, instead.

    Returns:
      A dict from paths to digests, `{"encoder/kernel": "float32[2,2] 0f1e2d3c4b5a6978"}`, ready for JSON. Leaves that
      share a path share an entry.

    Raises:
      TypeError: a leaf is no array, or traced; the message names the path.
      ValueError: a leaf was donated. Selection errors as `freeze`.

    Example:
      >>> import frozen_optax as fo, jax.numpy as jnp
      >>> params = {"encoder": jnp.array([0.0, 1.0]), "head": jnp.ones(2)}
      >>> fo.fingerprint(params, "encoder")
      {'encoder': 'float32[2] ...'}
      >>> fo.fingerprint(params, "encoder") == fo.fingerprint(params | {"encoder": jnp.array([-0.0, 1.0])}, "encoder")
      False
    """
    resolution = frozen_selector(frozen, trainable)._resolve(tree)
    chosen = [
        (path, leaf)
        for path, leaf, selected in zip(resolution.paths, jax.tree.leaves(tree), resolution.selected, strict=True)
        if selected
    ]
    for path, leaf in chosen:
        if is_traced(leaf):
            raise TypeError(
                f"the bits of {path!r} are not known while tracing. Take the fingerprint outside of the compiled "
                "function; inside of one, under chex.chexify, assert_fingerprint compares with one taken before."
            )
    found: dict[str, str] = {}
    sums = jax.device_get([_begin(path, leaf) for path, leaf in chosen])  # all begun before the first is waited for
    for (path, leaf), each in zip(chosen, sums, strict=True):
        found[path] = ", ".join(filter(None, (found.get(path), f"{_kind(leaf)} {_hex(each)}")))
    return found


_Row = tuple[str, Any, str]  # path, leaf, the digest it should have


def _rows(tree: PyTree, fingerprint: Mapping[str, str]) -> list[_Row]:
    """The leaves that a fingerprint knows, one by one; an error where they are not there, or of another kind."""
    if not isinstance(fingerprint, Mapping):
        raise TypeError(f"a fingerprint is what fingerprint(...) returned, found {type(fingerprint).__name__}.")
    for path, entry in fingerprint.items():
        if not isinstance(entry, str) or not all(map(_DIGEST.fullmatch, entry.split(", "))):
            raise ValueError(
                f"{entry!r} at {path!r} is no digest. assert_fingerprint takes the tree first, and then what "
                "fingerprint(...) returned."
            )
    leaves: dict[str, list[Any]] = {}
    for path, leaf in zip(paths_of(tree), jax.tree.leaves(tree), strict=True):
        leaves.setdefault(path, []).append(leaf)
    rows, faults = [], []
    for path, entry in fingerprint.items():
        if path not in leaves:
            close = difflib.get_close_matches(path, leaves, n=3, cutoff=0)
            raise ValueError(
                f"the fingerprint has {path!r}, and the tree has none. The nearest paths are "
                f"{', '.join(map(repr, close))}. Pass the tree that it was taken of, the parameters and not a state."
            )
        digests = entry.split(", ")
        if len(digests) != len(leaves[path]):
            raise ValueError(f"the fingerprint has {len(digests)} leaves at {path!r}, the tree {len(leaves[path])}.")
        for leaf, digest in zip(leaves[path], digests, strict=True):
            require_alive(path, leaf)
            if digest.rpartition(" ")[0] != _kind(leaf):
                faults.append((path, f"{digest.rpartition(' ')[0]} became {_kind(leaf)}"))
            rows.append((path, leaf, digest))
    _report(faults, len(rows))
    return rows


def _report(faults: Sequence[tuple[str, str]], count: int) -> None:
    if faults:
        lines = [f"  {path or 'the root'}: {fault}" for path, fault in faults[:_MAX_SHOWN]]
        more = [f"  ... and {len(faults) - _MAX_SHOWN} more"] if len(faults) > _MAX_SHOWN else []
        raise AssertionError("\n".join([f"{len(faults)} of {count} leaves have another fingerprint:", *lines, *more]))


def _compare(expected: Sequence[tuple[str, str]], sums: Sequence[Any]) -> None:
    """Raise where leaves that are of the expected kind have other sums."""
    found = [(path, was, f"{was[:-16]}{_hex(each)}") for (path, was), each in zip(expected, sums, strict=True)]
    _report([(path, f"{was} became {now}") for path, was, now in found if was != now], len(found))


def assert_fingerprint(tree: PyTree, fingerprint: Mapping[str, str]) -> None:
    """Asserts that the leaves a fingerprint was taken of still hold the same bits.

    The fingerprint may come from another run, another machine, or a file: a checkpoint is compared with the weights it
    started from, one fine-tuned model with another. Under `chex.chexify` it works inside jit.

    Args:
      tree: a pytree that has these leaves; others are not looked at.
      fingerprint: what `fingerprint` returned.

    Raises:
      AssertionError: a leaf differs in dtype, shape or bits; the message names the paths.
      ValueError: the tree has no leaf of a path, a leaf was donated, or the fingerprint cannot be read.
      TypeError: `fingerprint` is no mapping, or a leaf no array.

    Example:
      >>> import frozen_optax as fo, jax.numpy as jnp
      >>> before = fo.fingerprint({"encoder": jnp.ones(2), "head": jnp.ones(2)}, "encoder")
      >>> fo.assert_fingerprint({"encoder": jnp.ones(2), "head": jnp.zeros(2)}, before)
    """
    rows = _rows(tree, fingerprint)
    sums = [_begin(path, leaf) for path, leaf, _ in rows]
    known = [i for i, each in enumerate(sums) if not is_traced(each)]
    _compare([(rows[i][0], rows[i][2]) for i in known], jax.device_get([sums[i] for i in known]))
    words = lambda digest: np.array([int(digest[-16:-8], 16), int(digest[-8:], 16)], np.uint32)
    if traced := {f"{i}: {rows[i][0]}": (each, words(rows[i][2])) for i, each in enumerate(sums) if is_traced(each)}:
        chex.assert_trees_all_equal(  # when the traced function has run
            *({key: pair[side] for key, pair in traced.items()} for side in (0, 1)),
            custom_message="leaves have another fingerprint",
        )


class Watch:
    """What `watch_fingerprint` makes: called with the parameters of each step, it looks at every n-th."""

    def __init__(self, fingerprint: Mapping[str, str], every: int):
        self._fingerprint, self._every = fingerprint, every
        self._calls, self._begun = 0, None

    def __call__(self, tree: PyTree) -> None:
        """Begins a check at every n-th call, having ended the one before it."""
        self._calls += 1
        if self._calls % self._every == 0:
            self.finish()
            rows = _rows(tree, self._fingerprint)
            expected = [(path, digest) for path, _, digest in rows]
            self._begun = (self._calls, expected, [_begin(path, leaf) for path, leaf, _ in rows])

    def finish(self) -> None:
        """Ends the check that has begun; to be called after the last step."""
        if self._begun:
            (call, expected, sums), self._begun = self._begun, None
            try:
                _compare(expected, jax.device_get(sums))
            except AssertionError as error:
                raise AssertionError(f"at call {call}: {error}") from None


def watch_fingerprint(fingerprint: Mapping[str, str], every: int = 100) -> Watch:
    """A check for a training loop that does not make it wait.

    At every n-th call the digests are begun on the device, behind the step that is under way, and are looked at n
    calls later, when they have long been there. So what moved is reported n calls late, with the call at which it was
    seen; `finish()` looks at the last ones.

    Args:
      fingerprint: what `fingerprint` returned for the parameters before training.
      every: how many calls from check to check, at least one.

    Returns:
      A function of the parameters, to be called after each step, with a method `finish`.

    Raises:
      ValueError: `every` is less than one. When called: as `assert_fingerprint`.

    Example:
      >>> import frozen_optax as fo, jax.numpy as jnp
      >>> params = {"encoder": jnp.ones(2)}
      >>> check = fo.watch_fingerprint(fo.fingerprint(params, "encoder"), every=2)
      >>> for _ in range(4):
      ...     params = {"encoder": params["encoder"] * 1.5}
      ...     check(params)
      Traceback (most recent call last):
        ...
      AssertionError: at call 2: 1 of 1 leaves have another fingerprint:
        encoder: ...
    """
    if every < 1:
        raise ValueError(f"every is {every}: a check is made at every call, every=1, or less often.")
    return Watch(fingerprint, every)
