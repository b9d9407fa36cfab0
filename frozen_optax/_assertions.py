"""Assertions on bits, in the style of chex and built on its public ones."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from frozen_optax import _bits
from frozen_optax._selection import Selection, frozen_selector
from frozen_optax._trees import PyTree, describe, is_traced, keystr, refuse_live, require_same_structure

_MAX_SHOWN = 10  # leaves described in one message


def _kind(leaf: Any) -> str:
    """All of a leaf but its values: what it is, its shape, dtype and weak type."""
    return describe(leaf) + (", weakly typed" if getattr(leaf, "weak_type", False) else "")


def _usable(path: str, leaf: Any) -> Any:
    """`leaf`, if its values can be looked at."""
    if isinstance(leaf, jax.Array) and not is_traced(leaf) and leaf.is_deleted():
        raise ValueError(
            f"the array at {path!r} was donated and its values are gone. Keep a copy of it before the step: "
            "jax.tree.map(jnp.copy, params)."
        )
    return leaf


def _comparable(leaf: Any) -> bool:
    return _bits.is_array(leaf) or isinstance(leaf, (bool, int, float, complex))


def _as_bits(leaf: Any) -> Any:
    return _bits.bits(leaf if _bits.is_array(leaf) else np.asarray(leaf))


def _show(leaf: Any, pattern: np.ndarray, index: tuple[int, ...]) -> str:
    """One element with its bits: -0.0 (0x80000000)."""
    words = np.atleast_1d(pattern[index])
    digits = " ".join(f"0x{int(word):0{2 * words.dtype.itemsize}x}" for word in words)
    return digits if _bits.is_key(leaf) else f"{np.asarray(leaf)[index]} ({digits})"


def _difference_in_kind(left: Any, right: Any) -> str | None:
    """How two leaves differ in all but their values, or None; what has no bits is compared as it is."""
    if _kind(left) != _kind(right):
        return f"{_kind(left)} became {_kind(right)}"
    return None if _comparable(left) or left is right or left == right else f"{left!r} became {right!r}"


def _difference(left: Any, right: Any) -> str | None:
    """How the bits of two leaves of one kind differ, or None."""
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


def _assert_bits(paths: Sequence[str], before: Sequence[Any], after: Sequence[Any], claim: str) -> None:
    """Raises an AssertionError that names every leaf whose bits, shape, dtype or weak type differ."""
    rows = list(zip(paths, map(_usable, paths, before), map(_usable, paths, after), strict=True))
    known = not any(is_traced(leaf) for _, *pair in rows for leaf in pair)

    def report(difference: Callable[[Any, Any], str | None]) -> None:
        faults = [(path, fault) for path, left, right in rows if (fault := difference(left, right))]
        if faults:
            lines = [f"  {path or 'the root'}: {fault}" for path, fault in faults[:_MAX_SHOWN]]
            more = [f"  ... and {len(faults) - _MAX_SHOWN} more"] if len(faults) > _MAX_SHOWN else []
            raise AssertionError("\n".join([f"{len(faults)} of {len(rows)} {claim}:", *lines, *more]))

    report(_difference_in_kind)
    comparable = [(f"{i}: {path}", pair) for i, (path, *pair) in enumerate(rows) if _comparable(pair[0])]
    bits = [{name: _as_bits(pair[side]) for name, pair in comparable} for side in (0, 1)]
    try:
        chex.assert_trees_all_equal(*bits, custom_message=claim)  # in a traced function: checked when it has run
    except AssertionError:
        if known:
            report(_difference)
        raise


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
    flat = jax.tree_util.tree_leaves_with_path(trees[0])
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
        after = jax.tree.leaves(tree)
        _assert_bits(
            [keystr(path) for path, _ in flat], [leaf for _, leaf in flat], after, "leaves differ in their bits"
        )


def _any_moved(before: Iterable[Any], after: Iterable[Any]) -> Any:
    """Whether any leaf has other bits than before, as a bool or a traced bool."""
    moved: Any = False
    for left, right in zip(before, after, strict=True):
        if not is_traced(left) and not is_traced(right):
            moved = moved | bool(_difference_in_kind(left, right) or (_comparable(left) and _difference(left, right)))
        elif _comparable(left):
            moved = moved | jnp.any(jnp.asarray(_as_bits(left) != _as_bits(right)))
    return moved


def assert_frozen(
    before: PyTree,
    after: PyTree,
    frozen: Selection = None,
    *,
    trainable: Selection = None,
    expect_movement: bool = True,
) -> None:
    """Asserts that every frozen leaf kept its bits from `before` to `after`, and that something else moved.

    Args:
      before: the parameters before training.
      after: the parameters after it, in the same structure.
      frozen: what is frozen, as `freeze` takes it.
      trainable: what is not frozen, instead.
      expect_movement: also fail if there are trainable leaves and none of them has changed, as happens when everything
        is frozen by mistake. False where that is meant, for example before the first step.

    Raises:
      AssertionError: a frozen leaf differs in shape, dtype, weak type or bits (the message names the paths, for each
        the first differing index and both values with their bits), or nothing trainable moved.
      ValueError: the trees differ in structure or hold the same `nnx.Variable`, or an array was donated; selection
        errors as `freeze`.

    Example:
      >>> import frozen_optax as fo, jax.numpy as jnp
      >>> before = {"encoder": jnp.ones(2), "head": jnp.ones(2)}
      >>> fo.assert_frozen(before, before | {"head": jnp.zeros(2)}, "encoder")
    """
    resolution = frozen_selector(frozen, trainable)._resolve(before)
    refuse_live(before, after)
    leaves = resolution.paths, jax.tree.leaves(before), resolution.up_to(after, "the tree after training")

    def columns(frozen: bool) -> list[list[Any]]:
        chosen = [is_frozen == frozen for is_frozen in resolution.selected]
        return [list(itertools.compress(column, chosen)) for column in leaves]

    paths, old, new = columns(frozen=True)
    _assert_bits(paths, old, new, "frozen leaves did not keep their bits")
    paths, old, new = columns(frozen=False)
    if not (expect_movement and paths):
        return
    moved = _any_moved(map(_usable, paths, old), map(_usable, paths, new))
    if is_traced(moved):
        chex.assert_trees_all_equal(moved, jnp.ones_like(moved), custom_message="no trainable leaf moved")
    elif not moved:
        raise AssertionError(
            f"no trainable leaf moved: all {len(paths)} have the bits they had before, {paths[0]!r} for one. Is "
            "more frozen than was meant, or the learning rate zero? If it is meant, pass expect_movement=False."
        )
