"""Leaves chosen by a function of their path and what they are: predicates, and filters of NNX."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, SupportsIndex

import jax
import numpy as np

from frozen_optax._messages import quoted
from frozen_optax._selectors import Reads, Selector, name_of
from frozen_optax._trees import View, is_number, key_of
from frozen_optax._typing import Leaf


class _TextPath(str):
    """The path that a predicate gets: a `str` that cannot be taken for a tuple of keys.

    An NNX filter has a predicate's signature, and expects a tuple. Of a text it would select
    nothing, or everything.
    """

    __slots__ = ()

    def _refuse(self) -> NoReturn:
        raise _TakenForKeys

    def __iter__(self) -> NoReturn:
        return self._refuse()

    def __getitem__(self, index: SupportsIndex | slice) -> str:
        return super().__getitem__(index) if isinstance(index, slice) else self._refuse()


class _TakenForKeys(TypeError):
    """A predicate has read its path as a tuple of keys."""


@dataclasses.dataclass(frozen=True, repr=False)
class ByPredicate(Selector):
    """The leaves for which a function of path and leaf says so."""

    predicate: Callable[[str, Leaf], bool]
    may_be_empty: bool = False

    @property
    def _reads(self) -> Reads:
        return Reads.SHAPES

    @property
    def _may_be_empty(self) -> bool:
        return self.may_be_empty

    def _arguments(self, view: View) -> Iterator[tuple[Any, Leaf]]:
        """What the predicate is called with, leaf by leaf."""
        return zip(map(_TextPath, view.paths), view.specs, strict=True)

    def _select(self, view: View) -> np.ndarray:
        selected = []
        leaves = jax.tree.leaves(view.tree)
        for path, leaf, arguments in zip(view.paths, leaves, self._arguments(view), strict=True):
            try:
                answer = self.predicate(*arguments)
            except _TakenForKeys:
                raise TypeError(
                    f"{self!r} reads its path as a tuple of keys, as an NNX filter does, and a "
                    f"predicate gets a str, {path!r}. If it is such a filter, say so: "
                    "frozen=nnx.All(filter). If not, split the path: path.split('/')[0]."
                ) from None
            except AttributeError as error:
                if not is_number(leaf):  # which has no shape to be asked about
                    selected.append(False)
                    continue
                raise TypeError(
                    f"{self!r} failed at {path!r}: {error}. A predicate sees a leaf's shape and "
                    "dtype, not its values; a function that needs values goes through by_mask."
                ) from error
            if not isinstance(answer, (bool, np.bool_)):
                raise TypeError(f"{self!r} returned {answer!r} at {path!r}, expected a bool.")
            selected.append(bool(answer))
        return np.array(selected, bool)

    @property
    def _if_meant(self) -> str:
        call = repr(self).removesuffix(")")
        return f"It returns False for each. If that may be so, write {call}, may_be_empty=True)."

    def __repr__(self) -> str:
        may_be_empty = ", may_be_empty=True" if self.may_be_empty else ""
        return f"by_predicate({name_of(self.predicate)}{may_be_empty})"


@dataclasses.dataclass(frozen=True, repr=False)
class ByNnxFilter(ByPredicate):
    """A filter of `flax.nnx.filterlib`.

    It gets a tuple of keys, and the Variable that holds the leaf.
    """

    filter: Any = None

    def _select(self, view: View) -> np.ndarray:
        # A Variable is asked for its own truth where it is one: is it there at all?
        has_variables = any(holder is not None for holder in view.holders)
        if view.paths and not has_variables and _asks_for_type(self.predicate):
            raise ValueError(
                f"{self!r} selects nothing that could be told: it asks for the types of "
                f"nnx.Variables, and this tree has none at {quoted(view.paths)}. Pure dicts have "
                "lost them, and nnx.Optimizer hands bare arrays to its optimizer. Select by path "
                "there, or say wrt= to nnx.Optimizer."
            )
        return super()._select(view)

    def _arguments(self, view: View) -> Iterator[tuple[Any, Leaf]]:
        keys = (tuple(map(key_of, path)) for path in view.keys)
        return zip(keys, view.specs, strict=True)

    @property
    def _if_meant(self) -> str:
        return "Filters see the keys of a path as a tuple, and the nnx.Variables of the tree."

    def __repr__(self) -> str:
        return repr(self.filter)


def _asks_for_type(predicate: Callable[..., bool]) -> bool:
    """Whether a filter of NNX, or a part of it, looks at the Variable and not at the path."""
    filterlib = sys.modules["flax.nnx"].filterlib  # which has made the filter
    if isinstance(predicate, (filterlib.OfType, filterlib.WithTag)):
        return True
    parts = [*getattr(predicate, "predicates", ()), getattr(predicate, "predicate", None)]
    return any(_asks_for_type(part) for part in parts if part is not None)
