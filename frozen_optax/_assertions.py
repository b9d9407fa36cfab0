"""Assertions on bits, in the style of chex and built on its public ones."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from frozen_optax import _bits
from frozen_optax._selection import Selection, frozen_selector
from frozen_optax._trees import (
    PyTree,
    describe,
    is_traced,
    paths_of,
    refuse_live,
    require_alive,
    require_same_structure,
)

_MAX_SHOWN = 10  # leaves described in one message


def _describe_with_weak_type(leaf: Any) -> str:
    return describe(leaf) + (", weakly typed" if getattr(leaf, "weak_type", False) else "")


def _has_bits(leaf: Any) -> bool:
    """Whether `leaf` is a number or an array of them; anything else is compared as it is."""
    if isinstance(leaf, (np.ndarray, np.generic)):
        return not leaf.dtype.hasobject
    return isinstance(leaf, (jax.Array, bool, float, complex))


def _as_bits(leaf: Any) -> Any:
    return _bits.bits(leaf if _bits.is_array(leaf) else np.asarray(leaf))


def _show(leaf: Any, pattern: np.ndarray, index: tuple[int, ...]) -> str:
    """One element with its bits: -0.0 (0x80000000)."""
    words = np.atleast_1d(pattern[index])
    digits = " ".join(f"0x{int(word):0{2 * words.dtype.itemsize}x}" for word in words)
    return digits if _bits.is_key(leaf) else f"{np.asarray(leaf)[index]} ({digits})"


def difference(left: Any, right: Any) -> str | None:
    """How two leaves of one kind, whose values are known, differ, or None."""
    if not _has_bits(left):
        same = left is right or np.array_equal(left, right)
        return None if same else f"{left!r} became {right!r}"
    old, new = _as_bits(left), _as_bits(right)
    differs = old != new
    if not differs.any():
        return None
    if differs.ndim > np.ndim(left):  # the two parts of a complex number, the words of a key
        differs = differs.any(axis=tuple(range(np.ndim(left), differs.ndim)))
    index = tuple(int(i) for i in np.argwhere(differs)[0])
    return (
        f"{differs.sum()} of {differs.size} elements differ, the first at {list(index)}: "
        f"{_show(left, old, index)} became {_show(right, new, index)}"
    )


def _assert_bits(rows: Sequence[tuple[str, Any, Any]], claim: str, kind: Callable[[Any], str]) -> None:
    """Raises an AssertionError that names each row (path, before, after) whose bits or kind differ."""
    for path, *pair in rows:
        require_alive(path, *pair)

    def report(difference: Callable[[Any, Any], str | None], rows_in_doubt: Sequence[tuple[str, Any, Any]]) -> None:
        faults = [(path, fault) for path, left, right in rows_in_doubt if (fault := difference(left, right))]
        if faults:
            lines = [f"  {path or 'the root'}: {fault}" for path, fault in faults[:_MAX_SHOWN]]
            more = [f"  ... and {len(faults) - _MAX_SHOWN} more"] if len(faults) > _MAX_SHOWN else []
            raise AssertionError("\n".join([f"{len(faults)} of {len(rows)} {claim}:", *lines, *more]))

    def bits(rows: Sequence[tuple[str, Any, Any]], side: int) -> dict[str, Any]:
        found = {}
        for i, row in enumerate(rows):
            if _has_bits(row[1]):
                try:
                    found[f"{i}: {row[0]}"] = _as_bits(row[side])
                except TypeError as error:
                    raise TypeError(f"cannot compare {row[0]!r}: {error}. Compare it outside of one.") from error
        return found

    report(lambda left, right: f"{kind(left)} became {kind(right)}" if kind(left) != kind(right) else None, rows)
    known = [row for row in rows if not (is_traced(row[1]) or is_traced(row[2]))]
    report(lambda left, right: None if _has_bits(left) else difference(left, right), known)
    try:
        chex.assert_trees_all_equal(bits(known, 1), bits(known, 2))
    except AssertionError:
        report(difference, known)  # the same, leaf by leaf
        raise
    traced = [row for row in rows if is_traced(row[1]) or is_traced(row[2])]
    if traced:  # checked when the traced function has run
        chex.assert_trees_all_equal(bits(traced, 1), bits(traced, 2), custom_message=claim)


def assert_trees_bit_identical(*trees: PyTree) -> None:
    """Asserts that trees are the same, bit for bit: structure, shapes, dtypes, weak types, and every bit pattern.

    Unlike `chex.assert_trees_all_equal` it tells -0.0 from 0.0 and one NaN from another, and compares PRNG keys. Arrays
    of jax and of numpy are the same if their bits are. Under `chex.chexify` it works inside jit.

    Args:
      *trees: two or more pytrees.

    Raises:
      AssertionError: they differ; the message names the paths, for each the first differing index and both values with
        their bits.
      ValueError: fewer than two trees are given, an array was donated, or two trees hold the same `nnx.Variable`.

    Example:
      >>> import frozen_optax as fo, jax.numpy as jnp
      >>> fo.assert_trees_bit_identical({"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([1.0, -0.0])})
      Traceback (most recent call last):
        ...
      AssertionError: 1 of 1 leaves differ in their bits:
        w: 1 of 2 elements differ, the first at [1]: 0.0 (0x00000000) became -0.0 (0x80000000)
    """
    if len(trees) < 2:
        raise ValueError(f"assert_trees_bit_identical compares two trees or more, found {len(trees)}.")
    paths = paths_of(trees[0])
    for tree in trees[1:]:
        refuse_live(trees[0], tree)
        try:
            chex.assert_trees_all_equal_structs(trees[0], tree)
        except AssertionError:
            try:
                require_same_structure(tree, trees[0], "a tree", "the first")
            except ValueError as error:  # the same, with the path
                raise AssertionError(str(error)) from None
            raise
        rows = list(zip(paths, jax.tree.leaves(trees[0]), jax.tree.leaves(tree), strict=True))
        _assert_bits(rows, "leaves differ in their bits", _describe_with_weak_type)


def _moved(left: Any, right: Any) -> Any:
    """Whether a leaf has other bits than before, as a bool or a traced bool."""
    if describe(left) != describe(right):
        return True
    if is_traced(left) or is_traced(right):
        return jnp.any(jnp.asarray(_as_bits(left) != _as_bits(right)))
    return difference(left, right) is not None


def assert_frozen(
    before: PyTree,
    after: PyTree,
    frozen: Selection = None,
    *,
    trainable: Selection = None,
    expect_movement: bool = True,
) -> None:
    """Asserts that every frozen leaf kept its bits from `before` to `after`, and that something else moved.

    Weak types are not compared: where `apply_updates` learns at run time that an update is zero, it cannot keep them.

    Args:
      before: the parameters before training.
      after: the parameters after it, in the same structure.
      frozen: what is frozen, as `freeze` takes it.
      trainable: what is not frozen, instead.
      expect_movement: also fail if there are trainable leaves and none of them has changed, as happens when everything
        is frozen by mistake. False where that is meant, for example before the first step.

    Raises:
      AssertionError: a frozen leaf differs in shape, dtype or bits (the message names the paths, for each the first
        differing index and both values with their bits), or nothing trainable moved.
      ValueError: the trees differ in structure or hold the same `nnx.Variable`, or an array was donated; selection
        errors as `freeze`.

    Example:
      >>> import frozen_optax as fo, jax.numpy as jnp
      >>> before = {"encoder": jnp.ones(2), "head": jnp.ones(2)}
      >>> fo.assert_frozen(before, before | {"head": jnp.zeros(2)}, "encoder")
    """
    resolution = frozen_selector(frozen, trainable)._resolve(before)
    refuse_live(before, after)
    after_leaves = resolution.up_to(after, "the tree after")
    rows = list(zip(resolution.paths, jax.tree.leaves(before), after_leaves, strict=True))
    _assert_bits(list(itertools.compress(rows, resolution.selected)), "frozen leaves did not keep their bits", describe)
    trained = resolution.rest(rows)
    if not (expect_movement and trained):
        return
    moved: Any = False
    for path, left, right in trained:
        require_alive(path, left, right)
        moved = moved | _moved(left, right)
    if is_traced(moved):
        chex.assert_trees_all_equal(moved, jnp.ones_like(moved), custom_message="no trainable leaf moved")
    elif not moved:
        raise AssertionError(
            f"no trainable leaf moved: all {len(trained)} have the bits they had before, {trained[0][0]!r} for one. Is "
            "more frozen than was meant, or the learning rate zero? If it is meant, pass expect_movement=False."
        )
