"""Leaves chosen by a tree of bools, or by a function of the parameters that returns one."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable

import jax
import numpy as np

from frozen_optax._selectors import Reads, Selector, name_of
from frozen_optax._trees import (
    Mismatch,
    View,
    align,
    describe,
    flatten_with_holes,
    is_hole,
    is_traced,
    keystr,
)
from frozen_optax._typing import Frozen, Leaf, PyTree


def as_bool(leaf: Leaf) -> bool | None:
    """A bool, or a bool array without dimensions whose value is known; None for anything else."""
    if isinstance(leaf, (bool, np.bool_)):
        return bool(leaf)
    if not isinstance(leaf, (np.ndarray, jax.Array)) or is_traced(leaf):
        return None
    return bool(leaf) if leaf.shape == () and leaf.dtype == np.bool_ else None


def is_function(value: Frozen) -> bool:
    """Whether `value` is to be called, and not a mask that happens to be callable.

    A module that holds bools is such a mask.
    """
    if not callable(value):
        return False
    return all(as_bool(leaf) is None for leaf in jax.tree.leaves(value))


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class ByMask(Selector):
    """The leaves where a tree of bools, or what a function of the parameters returns, is True."""

    mask_or_fn: PyTree | Callable[[PyTree], PyTree]

    @functools.cached_property
    def _parts(self) -> Hashable:
        """What makes it equal to another.

        A tree of bools cannot be hashed, its leaves and structure can.
        """
        if is_function(self.mask_or_fn):
            return self.mask_or_fn
        leaves, treedef = jax.tree.flatten(self.mask_or_fn)
        bools = [as_bool(leaf) for leaf in leaves]
        known = [
            leaf if chosen is None else chosen for leaf, chosen in zip(leaves, bools, strict=True)
        ]
        return treedef, str(treedef), tuple(known)

    def __eq__(self, other: object) -> bool:
        return self._parts == other._parts if isinstance(other, ByMask) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._parts)

    @property
    def _reads(self) -> Reads:
        return Reads.VALUES if is_function(self.mask_or_fn) else Reads.STRUCTURE

    @property
    def _may_be_empty(self) -> bool:
        return as_bool(self.mask_or_fn) is False

    @property
    def _may_be_all(self) -> bool:
        return as_bool(self.mask_or_fn) is True

    def _choose(self, view: View) -> np.ndarray:
        mask = self.mask_or_fn
        if is_function(mask):
            mask = mask(view.tree)
        selected = self._spread(mask, view)
        says_so = as_bool(mask) is False  # in one word, which a mask of all False does not
        if view.paths and not selected.any() and not (view.holes or says_so):
            raise ValueError(self._selects_nothing(view.paths))
        return selected

    def _select(self, view: View) -> np.ndarray:
        return self._choose(view)

    @staticmethod
    def _spread(mask: PyTree, view: View) -> np.ndarray:
        """The mask, a bool for each leaf of the tree."""
        for path, leaf in flatten_with_holes(mask):
            if not is_hole(leaf) and as_bool(leaf) is None:
                shown = describe(leaf) if hasattr(leaf, "shape") else f"{describe(leaf)} ({leaf!r})"
                place = keystr(path) or "the root"
                raise TypeError(
                    f"a mask holds True and False, found {shown} at {place!r}. "
                    "Patterns and predicates go in a list of their own; a mask cannot depend on "
                    "traced values."
                )
        try:
            pairs = list(zip(jax.tree.leaves(mask), align(mask, view.tree), strict=True))
        except Mismatch as mismatch:
            path, found, expected = mismatch.args
            raise ValueError(
                f"the mask and the parameters differ in structure at {path!r}: the mask has "
                f"{found}, the parameters have {expected}. A mask has the parameters' structure or "
                "a prefix of it."
            ) from None
        selected: list[bool | None] = []
        for chosen, part in pairs:
            selected += [as_bool(chosen)] * len(jax.tree.leaves(part))
        return np.array(selected, bool)

    def __repr__(self) -> str:
        return f"by_mask({name_of(self.mask_or_fn)})"
