"""Assertions on bits, in the style of chex and built on its public ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import chex
import jax
import jax.numpy as jnp
import numpy as np

from frozen_optax import _bits
from frozen_optax._elements import resolve_in_part
from frozen_optax._messages import Fault, listed
from frozen_optax._trees import (
    describe,
    is_traced,
    paths_of,
    require_alive,
    require_same_structure,
)
from frozen_optax._typing import Array, Frozen, Leaf, PyTree, Where
from frozen_optax._variables import refuse_live
from frozen_optax._where import counterparts, named_leaves

_Pair: TypeAlias = tuple[str, Leaf, Leaf]  # the path of a leaf, what it was, and what it is


def _describe_with_weak_type(leaf: Leaf) -> str:
    return describe(leaf) + (", weakly typed" if getattr(leaf, "weak_type", False) else "")


def _has_bits(leaf: Leaf) -> bool:
    """Whether `leaf` is a number or an array of them; anything else is compared as it is."""
    if isinstance(leaf, (np.ndarray, np.generic)):
        return not leaf.dtype.hasobject
    return isinstance(leaf, (jax.Array, bool, float, complex))


def _require_values(path: str, *leaves: Leaf) -> None:
    """Raise where the values of an array are gone, or never were there."""
    require_alive(path, *leaves)
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
        raise ValueError(
            f"{path!r} is a shape and has no values, so nothing can be told of its bits. Pass the "
            "tree of arrays that it is the shape of."
        )


def _as_bits(leaf: Leaf) -> Array:
    return _bits.bits(leaf if _bits.is_array(leaf) else np.asarray(leaf))


def _show(leaf: Leaf, pattern: np.ndarray, index: tuple[int, ...]) -> str:
    """One element with its bits: -0.0 (0x80000000)."""
    words = np.atleast_1d(pattern[index])
    digits = " ".join(f"0x{int(word):0{2 * words.dtype.itemsize}x}" for word in words)
    return digits if _bits.is_key(leaf) else f"{np.asarray(leaf)[index]} ({digits})"


def _is_elsewhere(leaf: Leaf) -> bool:
    """Whether a part of an array is held by another process only."""
    if not isinstance(leaf, jax.Array) or is_traced(leaf):
        return False
    return not (leaf.is_fully_addressable or leaf.is_fully_replicated)


def _at_hand(*leaves: Leaf) -> list[Leaf]:
    """The values of leaves on the host, where this process has all of them."""
    if any(is_traced(leaf) or _is_elsewhere(leaf) for leaf in leaves):
        return list(leaves)
    return [np.asarray(leaf) for leaf in leaves]


@jax.jit
def _any_bit_differs(left: Array, right: Array) -> Array:
    return jnp.any(_bits.bits(left) != _bits.bits(right))


def _differs_on_devices(left: Leaf, right: Leaf) -> bool:
    """Whether two arrays differ, told on the devices that hold them."""
    if left is right:
        return False

    def fetched(leaf: Leaf) -> Leaf:
        device_memory = _bits.device_memory_of(leaf) if isinstance(leaf, jax.Array) else None
        return jax.device_put(leaf, device_memory) if device_memory else leaf

    return bool(_any_bit_differs(fetched(left), fetched(right)))


def difference(left: Leaf, right: Leaf) -> str | None:
    """How two leaves of one kind, whose values are known, differ, or None."""
    if _is_elsewhere(left) or _is_elsewhere(right):
        differs = _differs_on_devices(left, right)
        return "elements differ, and other processes hold a part of them" if differs else None
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


def _bits_of(pairs: Sequence[_Pair]) -> tuple[dict[str, Array], dict[str, Array]]:
    """The bits of what has bits, before and after, by names that chex may show."""
    before: dict[str, Array] = {}
    after: dict[str, Array] = {}
    for index, (path, left, right) in enumerate(pairs):
        if not _has_bits(left) or _is_elsewhere(left) or _is_elsewhere(right):
            continue
        name = f"{index}: {path}"  # several leaves may share a path
        try:
            before[name], after[name] = _as_bits(left), _as_bits(right)
        except TypeError as error:
            raise TypeError(
                f"cannot compare {path!r}: {error}. Compare it outside of one."
            ) from error
    return before, after


def _assert_bits(pairs: Sequence[_Pair], claim: str, kind: Callable[[Leaf], str]) -> None:
    """Raises an AssertionError that names the path of each pair whose bits or kind differ."""
    for path, before, after in pairs:
        _require_values(path, before, after)

    def report(
        difference: Callable[[Leaf, Leaf], str | None], pairs_in_doubt: Sequence[_Pair]
    ) -> None:
        found = [(path, difference(before, after)) for path, before, after in pairs_in_doubt]
        faults = [Fault(path, what) for path, what in found if what]
        if faults:
            heading = f"{len(faults)} of {len(pairs)} {claim}:"
            raise AssertionError("\n".join(listed(heading, faults)))

    def other_kind(left: Leaf, right: Leaf) -> str | None:
        was, now = kind(left), kind(right)
        return f"{was} became {now}" if was != now else None

    def other_object(left: Leaf, right: Leaf) -> str | None:
        on_host = _has_bits(left) and not (_is_elsewhere(left) or _is_elsewhere(right))
        return None if on_host else difference(left, right)

    report(other_kind, pairs)
    traced = [pair for pair in pairs if is_traced(pair[1]) or is_traced(pair[2])]
    known = [pair for pair in pairs if not (is_traced(pair[1]) or is_traced(pair[2]))]
    report(other_object, known)
    try:
        chex.assert_trees_all_equal(*_bits_of(known))
    except AssertionError:
        report(difference, known)  # the same, leaf by leaf
        raise
    if traced:  # compared when the traced function has run
        chex.assert_trees_all_equal(*_bits_of(traced), custom_message=claim)


def assert_trees_bit_identical(*trees: PyTree) -> None:
    """Asserts that trees are the same, bit for bit.

    That is their structure, their leaves' shapes, dtypes and weak types, and every bit pattern.
    Unlike `chex.assert_trees_all_equal` it tells -0.0 from 0.0 and one NaN from another, and
    compares PRNG keys. Arrays of jax and of numpy are the same if their bits are. Under
    `chex.chexify` it works inside jit.

    Args:
      *trees: two or more pytrees.

    Raises:
      AssertionError: they differ; the message names the paths, for each the first differing index
        and both values with their bits.
      ValueError: fewer than two trees are given, an array was donated or is a shape alone, or two
        trees hold the same `nnx.Variable`.

    Example:
      >>> import frozen_optax as fo, jax.numpy as jnp
      >>> before, after = {"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([1.0, -0.0])}
      >>> fo.assert_trees_bit_identical(before, after)
      Traceback (most recent call last):
        ...
      AssertionError: 1 of 1 leaves differ in their bits:
        w: 1 of 2 elements differ, the first at [1]: 0.0 (0x00000000) became -0.0 (0x80000000)
    """
    if len(trees) < 2:
        raise ValueError(
            f"assert_trees_bit_identical compares two trees or more, found {len(trees)}."
        )
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
        pairs = list(zip(paths, jax.tree.leaves(trees[0]), jax.tree.leaves(tree), strict=True))
        _assert_bits(pairs, "leaves differ in their bits", _describe_with_weak_type)


def _moved(left: Leaf, right: Leaf) -> bool | Array:
    """Whether a leaf has other bits than before, as a bool or a traced bool."""
    if describe(left) != describe(right):
        return True
    if is_traced(left) or is_traced(right):
        return jnp.any(jnp.asarray(_as_bits(left) != _as_bits(right)))
    return difference(left, right) is not None


def assert_frozen(
    before: PyTree,
    after: PyTree,
    frozen: Frozen = None,
    *,
    trainable: Frozen = None,
    where: Where | None = None,
    expect_movement: bool = True,
) -> None:
    """Asserts that every frozen leaf kept its bits, and that something else moved.

    Given an optimizer that freezes elements within leaves, it looks at these elements, and counts
    each such leaf among the frozen ones.

    Weak types are not compared: where `apply_updates` learns at run time that an update is zero, it
    cannot keep them.

    Args:
      before: the parameters before training.
      after: the parameters after it, in the same structure.
      frozen: the leaves that are frozen: a glob on their paths (`"encoder"`), a compiled regex, a
        `Selector`, a list of these, a predicate `(path, leaf) -> bool`, a bool, a pytree of bools,
        or the optimizer that `with_frozen` returned.
      trainable: the leaves that are not, instead of `frozen`: exactly one of the two is given.
      where: a function that returns the parameters in a larger state (`lambda state:
        state.params`), where `before` and `after` are such states. It may return a tuple of several
        parts; paths are relative to each.
      expect_movement: also fail if there are trainable leaves and none of them has changed, as
        happens when everything is frozen by mistake. False where that is meant, for example before
        the first step.

    Raises:
      AssertionError: a frozen leaf differs in shape, dtype or bits (the message names the paths,
        for each the first differing index and both values with their bits), or nothing trainable
        moved.
      TypeError: not exactly one of `frozen` and `trainable` is given, or it is no way to select
        leaves.
      ValueError: nothing is selected, which a check would always pass; a pattern selects nothing,
        or a mask does not fit; the trees differ in structure or hold the same `nnx.Variable`, or an
        array was donated, or is a shape alone. With `expect_movement`: everything is frozen, and
        nobody said so (`"**"`, `True`).

    Example:
      >>> import frozen_optax as fo, jax.numpy as jnp
      >>> before = {"encoder": jnp.ones(2), "head": jnp.ones(2)}
      >>> fo.assert_frozen(before, before | {"head": jnp.zeros(2)}, "encoder")
    """
    resolution = resolve_in_part(
        frozen, trainable, before, where=where, to_train=expect_movement, to_check=True
    )
    refuse_live(before, after)
    leaves, named = jax.tree.leaves(before), named_leaves(where, before)
    others = counterparts(where, before, after, "the tree after")
    frozen_pairs: list[_Pair] = []
    trained: list[_Pair] = []
    for (index, path), other in zip(named, others, strict=True):
        leaf = leaves[index]
        if index in resolution.parts and describe(leaf) == describe(other):
            _require_values(path, leaf, other)
            part, (was, now) = resolution.parts[index], _at_hand(leaf, other)
            frozen_pairs.append((path, was, part.choose(now, was)))
            trained.append((path, was, part.choose(was, now)))
        else:
            is_held = resolution.selected[index] or index in resolution.parts
            (frozen_pairs if is_held else trained).append((path, leaf, other))
    _assert_bits(frozen_pairs, "frozen leaves did not keep their bits", describe)
    if not (expect_movement and trained):
        return
    moved: bool | Array = False
    for path, left, right in trained:
        _require_values(path, left, right)
        moved = moved | _moved(left, right)
    if is_traced(moved):
        chex.assert_trees_all_equal(
            moved, jnp.ones_like(moved), custom_message="no trainable leaf moved"
        )
    elif not moved:
        raise AssertionError(
            f"no trainable leaf moved: all {len(trained)} have the bits they had before, "
            f"{trained[0][0]!r} for one. Is more frozen than was meant, or the learning rate zero? "
            "If it is meant, pass expect_movement=False."
        )
