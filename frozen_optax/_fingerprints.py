"""Fingerprints of weights: a digest a leaf, taken, compared and watched."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import chex
import jax

from frozen_optax._digests import DIGEST, begin, digests, in_hex, kind, sums_of
from frozen_optax._elements import resolve_in_part
from frozen_optax._messages import Fault, listed
from frozen_optax._parts import Part, held
from frozen_optax._trees import is_traced, objects_in, require_alive
from frozen_optax._typing import Array, Frozen, Leaf, PyTree, Where
from frozen_optax._where import named_leaves


def fingerprint(
    tree: PyTree,
    frozen: Frozen = None,
    *,
    trainable: Frozen = None,
    where: Where | None = None,
) -> dict[str, str]:
    """A digest of each frozen leaf, to be kept and compared later.

    That is kilobytes for a model of any size. It depends on dtype, shape, and every bit (-0.0 is
    not 0.0, one NaN is not another), and on nothing else: not on the sharding, the platform, or the
    version of jax. It is computed on the device where a leaf lives, without gathering a sharded
    one, in a single pass over it; `python -m benchmarks` prints how that compares with a plain
    read.

    A digest has 64 bits. A change in a single element of at most 32 bits always changes it; any
    other change, such as a permutation, goes unseen with odds of about one in 2^64. It is a check
    against accidents: who wants to make two leaves of one digest can.

    Leaves that are no arrays (functions, strings) have no bits, and no digest. Given an optimizer
    that freezes elements within leaves, a digest is of these elements, and says so by an `@`; to
    compare with it takes that optimizer again.

    Args:
      tree: a pytree of arrays.
      frozen: the leaves to take it of, `"**"` for all: a glob on their paths (`"encoder"`), a
        compiled regex, a `Selector`, a list of these, a predicate `(path, leaf) -> bool`, a bool, a
        pytree of bools, or the optimizer that `with_frozen` returned.
      trainable: the leaves to leave out, instead of `frozen`: exactly one of the two is given.
      where: a function that returns the parameters in a larger state (`lambda state:
        state.params`), where `tree` is one. Paths are relative to what it returns, so the
        fingerprint is that of the parameters alone.

    Returns:
      A dict from paths to digests, `{"encoder/kernel": "float32[2,2] 0f1e2d3c4b5a6978"}`, ready for
      JSON. Leaves that share a path share an entry.

    Raises:
      TypeError: a leaf has no values, or is traced; the message names the path. Not exactly one of
        `frozen` and `trainable` is given, or it is no way to select leaves.
      ValueError: nothing is selected, or not by one of several patterns; a mask does not fit; a
        leaf was donated.

    Example:
      >>> import frozen_optax as fo, jax.numpy as jnp
      >>> params = {"encoder": jnp.array([0.0, 1.0]), "head": jnp.ones(2)}
      >>> before = fo.fingerprint(params, "encoder")
      >>> before
      {'encoder': 'float32[2] ...'}
      >>> before == fo.fingerprint(params | {"encoder": jnp.array([-0.0, 1.0])}, "encoder")
      False
    """
    resolution = resolve_in_part(frozen, trainable, tree, where=where, to_check=True)
    leaves, selected = jax.tree.leaves(tree), held(resolution).selected
    named = [
        (index, path)
        for index, path in named_leaves(where, tree)
        if selected[index] and resolution.numbers[index]
    ]
    chosen = [(path, leaves[index]) for index, path in named]
    for path, leaf in chosen:
        if is_traced(leaf):
            raise TypeError(
                f"the bits of {path!r} are not known while tracing. Take the fingerprint outside "
                "of the compiled function; inside of one, under chex.chexify, assert_fingerprint "
                "compares with one taken before."
            )
    found: dict[str, list[str]] = {}
    parts = [resolution.parts.get(index) for index, _ in named]
    for (path, _), digest in zip(chosen, digests(chosen, parts), strict=True):
        found.setdefault(path, []).append(digest)
    return {path: ", ".join(entry) for path, entry in found.items()}


# Path, leaf, what trains of it, the digest it should have.
_Expected: TypeAlias = tuple[str, Leaf, "Part | None", str]


def _require_fingerprint(fingerprint: Mapping[str, str]) -> None:
    if not isinstance(fingerprint, Mapping):
        raise TypeError(
            f"a fingerprint is what fingerprint(...) returned, found {type(fingerprint).__name__}."
        )
    if not fingerprint:
        raise ValueError(
            "the fingerprint is of no leaves, so there is nothing to check, and it would fit "
            "anything."
        )
    for path, entry in fingerprint.items():
        if not isinstance(entry, str) or not all(map(DIGEST.fullmatch, entry.split(", "))):
            raise ValueError(
                f"{entry!r} at {path!r} is no digest. assert_fingerprint takes the tree first, and "
                "then what fingerprint(...) returned."
            )


def _expected(
    tree: PyTree, fingerprint: Mapping[str, str], where: Where | None, frozen: Frozen
) -> list[_Expected]:
    """The leaves that a fingerprint knows, one by one.

    It is an error if they are not there, or of another kind.
    """
    _require_fingerprint(fingerprint)
    parts: Mapping[int, Part] = {}
    if frozen is not None:
        parts = resolve_in_part(frozen, None, tree, where=where).parts
    all_leaves, objects = jax.tree.leaves(tree), objects_in(tree)
    leaves: dict[str, list[tuple[Leaf, Part | None]]] = {}
    for index, path in named_leaves(where, tree):
        if index not in objects:
            leaves.setdefault(path, []).append((all_leaves[index], parts.get(index)))
    expected: list[_Expected] = []
    faults: list[Fault] = []
    for path, entry in fingerprint.items():
        if path not in leaves:
            close = difflib.get_close_matches(path, leaves, n=3, cutoff=0)
            raise ValueError(
                f"the fingerprint has {path!r}, and the tree has none. The nearest paths are "
                f"{', '.join(map(repr, close))}. Pass the tree that it was taken of, the "
                "parameters and not a state."
            )
        kept = entry.split(", ")
        if len(kept) != len(leaves[path]):
            raise ValueError(
                f"the fingerprint has {len(kept)} leaves at {path!r}, the tree {len(leaves[path])}."
            )
        for (leaf, part), digest in zip(leaves[path], kept, strict=True):
            require_alive(path, leaf)
            was = digest.rpartition(" ")[0]
            # What was taken of a whole leaf is compared with a whole one.
            part = part if "@" in was else None
            if "@" in was and (part is None or not was.endswith(f"@{part.digest}")):
                raise ValueError(
                    f"the fingerprint of {path!r} is of some of its elements"
                    + (", and not of those that are frozen here." if part else ".")
                    + " Give the optimizer that it was taken with, frozen=tx, to say which."
                )
            found = kind(leaf, part)
            if was != found:
                faults.append(Fault(path, f"{was} became {found}"))
            expected.append((path, leaf, part, digest))
    _report(faults, len(expected))
    return expected


def _report(faults: Sequence[Fault], count: int) -> None:
    if faults:
        heading = f"{len(faults)} of {count} leaves have another fingerprint:"
        raise AssertionError("\n".join(listed(heading, faults)))


def _compare(expected: Sequence[tuple[str, str]], sums: Sequence[Array]) -> None:
    """Raise where leaves that are of the expected kind have other sums."""
    faults: list[Fault] = []
    for (path, was), each in zip(expected, sums, strict=True):
        now = f"{was[:-16]}{in_hex(each)}"
        if was != now:
            faults.append(Fault(path, f"{was} became {now}"))
    _report(faults, len(expected))


def assert_fingerprint(
    tree: PyTree,
    fingerprint: Mapping[str, str],
    *,
    where: Where | None = None,
    frozen: Frozen = None,
) -> None:
    """Asserts that the leaves a fingerprint was taken of still hold the same bits.

    The fingerprint may come from another run, another machine, or a file: a checkpoint is compared
    with the weights it started from, one fine-tuned model with another. Under `chex.chexify` it
    works inside jit.

    Args:
      tree: a pytree that has these leaves; others are not looked at.
      fingerprint: what `fingerprint` returned.
      where: a function that returns the parameters in a larger state (`lambda state:
        state.params`), where `tree` is one.
      frozen: the optimizer that the fingerprint was taken with. It is needed, and looked at, where
        it was taken of elements within leaves.

    Raises:
      AssertionError: a leaf differs in dtype, shape or bits; the message names the paths.
      ValueError: the tree has no leaf of a path, a leaf was donated, or the fingerprint is empty or
        cannot be read; it is of other elements of a leaf than those that `frozen` tells of.
      TypeError: `fingerprint` is no mapping, or a leaf no array.

    Example:
      >>> import frozen_optax as fo, jax.numpy as jnp
      >>> before = fo.fingerprint({"encoder": jnp.ones(2), "head": jnp.ones(2)}, "encoder")
      >>> fo.assert_fingerprint({"encoder": jnp.ones(2), "head": jnp.zeros(2)}, before)
    """
    expected = _expected(tree, fingerprint, where, frozen)
    sums = [begin(*each[:-1]) for each in expected]
    known = [index for index, each in enumerate(sums) if not is_traced(each)]
    wanted_now = [(expected[index][0], expected[index][-1]) for index in known]
    _compare(wanted_now, jax.device_get([sums[index] for index in known]))
    found: dict[str, Array] = {}
    wanted: dict[str, Array] = {}
    for index, each in enumerate(sums):
        if is_traced(each):
            path, *_, digest = expected[index]
            key = f"{index}: {path}"  # several leaves may share a path
            found[key], wanted[key] = each, sums_of(digest)
    if found:
        # Compared when the traced function has run.
        message = "leaves have another fingerprint"
        chex.assert_trees_all_equal(found, wanted, custom_message=message)


class Watch:
    """What `watch_fingerprint` makes.

    It is called with the parameters of each step, and looks at every n-th.
    """

    def __init__(
        self, fingerprint: Mapping[str, str], every: int, where: Where | None, frozen: Frozen
    ):
        self._fingerprint, self._every = fingerprint, every
        self._where, self._frozen = where, frozen
        self._calls = 0
        # A check that is under way: at which call it was begun, the digests by path, and the sums.
        self._begun: tuple[int, list[tuple[str, str]], list[Array]] | None = None

    def __call__(self, tree: PyTree) -> None:
        """Begins a check at every n-th call, having ended the one before it."""
        self._calls += 1
        if self._calls % self._every == 0:
            self.finish()
            expected = _expected(tree, self._fingerprint, self._where, self._frozen)
            kept = [(path, digest) for path, *_, digest in expected]
            sums = [begin(*each[:-1]) for each in expected]
            self._begun = (self._calls, kept, sums)

    def finish(self) -> None:
        """Ends the check that has begun; to be called after the last step."""
        if self._begun:
            (call, kept, sums), self._begun = self._begun, None
            try:
                _compare(kept, jax.device_get(sums))
            except AssertionError as error:
                raise AssertionError(f"at call {call}: {error}") from None


def watch_fingerprint(
    fingerprint: Mapping[str, str],
    every: int = 100,
    *,
    where: Where | None = None,
    frozen: Frozen = None,
) -> Watch:
    """A check for a training loop that does not make it wait.

    At every n-th call the digests are begun on the device, behind the step that is under way, and
    are looked at n calls later, when they have long been there. So what moved is reported n calls
    late, with the call at which it was seen; `finish()` looks at the last ones.

    Args:
      fingerprint: what `fingerprint` returned for the parameters before training.
      every: how many calls from check to check, at least one.
      where: a function that returns the parameters in a larger state (`lambda state:
        state.params`), where the check is called with one.
      frozen: as for `assert_fingerprint`.

    Returns:
      A function of the parameters, to be called after each step, with a method `finish`.

    Raises:
      TypeError, ValueError: `every` is less than one, or the fingerprint is empty or cannot be
        read. When called: as `assert_fingerprint`.

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
        raise ValueError(
            f"every is {every}: a check is made at every call, every=1, or less often."
        )
    _require_fingerprint(fingerprint)
    return Watch(fingerprint, every, where, frozen)
