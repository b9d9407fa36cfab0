"""What is frozen within leaves: what a user may say of elements, and how it lies over a tree.

What is said is read once, when it is said, and resolved once for each shape of a leaf. All else
reads a `PartialResolution`.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from frozen_optax._parts import Part, PartialResolution
from frozen_optax._resolution import Resolution
from frozen_optax._selection import as_selector, frozen_selector
from frozen_optax._selectors import Reads, Selector, name_of, reads, resolve
from frozen_optax._trees import Memory, describe, is_traced, spec
from frozen_optax._typing import Frozen, Leaf, PyTree, Where
from frozen_optax._where import within

_WAYS = (
    "expected a boolean array over the leading axes (True is frozen), a slice or a list of indices "
    "of the first axis, or a function of the leaf's jax.ShapeDtypeStruct that returns one of these"
)

# --- what is said of one selection


class _Said(NamedTuple):
    """What a user said of the leaves that a key selects.

    Attributes:
      key: as it was given.
      selector: which leaves.
      value: a slice, an array of numpy's, or a function.
    """

    key: Any
    selector: Selector
    value: slice | np.ndarray | Callable[[jax.ShapeDtypeStruct], Any]


def _read(key: Any, value: Any) -> slice | np.ndarray:
    """What was said of elements, with values of its own, as the user may change an array."""
    if isinstance(value, slice):
        try:
            bounds = (value.start, value.stop, value.step)
            return slice(*(None if each is None else operator.index(each) for each in bounds))
        except TypeError:
            raise TypeError(f"elements of {key!r}: {value!r} is no slice of integers.") from None
    if is_traced(value):
        raise TypeError(
            f"elements of {key!r} are {describe(value)} that is traced: which elements are frozen "
            "is a part of the program, and cannot depend on what it computes. Give an array of "
            "numpy's, made outside of the compiled function."
        )
    try:
        array = np.array(value)
    except ValueError:  # rows of other lengths
        array = np.array(None)
    if array.dtype.kind not in "biu" or array.ndim == 0 or (not array.size and array.dtype != bool):
        shown = f"{value!r}" if array.ndim == 0 else describe(array)
        if array.ndim and not array.size:
            shown = "no indices at all"
        raise TypeError(
            f"elements of {key!r}: found {shown}, {_WAYS}. What is frozen as a whole goes in "
            "frozen=."
        )
    return array if array.dtype == np.bool_ else array.astype(np.int64)


def _out_of_range(path: str, index: int, length: int) -> ValueError:
    return ValueError(
        f"elements of {path!r}: the index {index} is out of range, its first axis has the length "
        f"{length}."
    )


def _mask(path: str, shape: tuple[int, ...], value: slice | np.ndarray) -> np.ndarray:
    """Which elements are frozen, over the leading axes of a leaf."""
    if not shape:
        raise ValueError(f"elements of {path!r}: it is a scalar, and has no elements to choose.")
    length = shape[0]
    if isinstance(value, np.ndarray) and value.dtype == np.bool_:
        if value.shape != shape[: value.ndim]:
            raise ValueError(
                f"elements of {path!r}: the mask has the shape {value.shape}, and the leaf "
                f"{shape}. A mask has its leading axes: {shape[:1]} for rows, or all of them."
            )
        return value
    if isinstance(value, slice):
        for bound in (value.start, value.stop):
            if bound is not None and not -length <= bound <= length:
                raise _out_of_range(path, bound, length)
    elif value.ndim != 1:
        raise ValueError(
            f"elements of {path!r}: indices of the first axis are a list, found an array of the "
            f"shape {value.shape}. For single elements give a mask of the leaf's shape."
        )
    else:
        for index in value[(value < -length) | (value >= length)]:
            raise _out_of_range(path, int(index), length)
    mask = np.zeros(length, bool)
    mask[value] = True
    return mask


def _part(path: str, said: _Said, leaf: jax.ShapeDtypeStruct) -> Part:
    """What trains of a leaf, by what was said of it."""
    if not all(isinstance(length, int) for length in leaf.shape):
        raise TypeError(f"elements of {path!r}: it has the symbolic shape {leaf.shape}.")
    value = said.value
    if not isinstance(value, (slice, np.ndarray)):
        with jax.ensure_compile_time_eval():  # a function may compute with jax, in a trace as well
            value = _read(path, value(leaf))
    mask = _mask(path, leaf.shape, value)
    if mask.all() or not mask.any():
        found, instead = "no element", "leave it out of elements="
        if mask.any():
            found, instead = "every element", "name it in frozen="
        raise ValueError(
            f"elements of {path!r}: {_shown(said.value)} freezes {found} of a leaf of the shape "
            f"{leaf.shape}. If that is meant, {instead}."
        )
    return Part.of(leaf.shape, mask)


def _shown(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"an array {'bool' if value.dtype == np.bool_ else 'of indices'}{list(value.shape)}"
    return name_of(value)


# --- what is said of a tree


class Elements:
    """What `with_frozen` was told of elements.

    It prints as it was said, and remembers how it lay over the last few trees.
    """

    def __init__(self, said: Mapping[Hashable, _Said]):
        self._said = said
        self._parts: dict[Hashable, Part] = {}
        self._laid: Memory[Resolution] = Memory()

    @classmethod
    def of(cls, elements: Any) -> Elements | None:
        """What a user gave, or what `with_frozen` has made of it before."""
        if elements is None or isinstance(elements, Elements):
            return elements
        if not isinstance(elements, Mapping):
            raise TypeError(
                f"elements= is a mapping from selections to elements, found {elements!r}: "
                "elements={'embed': slice(0, 50_000)} freezes rows of the leaf 'embed'."
            )
        if not elements:
            raise ValueError("elements={} freezes nothing within any leaf. Leave it out.")
        return cls(
            {
                key: _Said(key, as_selector(key), value if callable(value) else _read(key, value))
                for key, value in elements.items()
            }
        )

    @classmethod
    def joined(cls, several: Iterable[Elements]) -> Elements | None:
        """What was told several times, of different leaves; None if nothing was."""
        said: dict[Hashable, _Said] = {
            (number, key): each
            for number, elements in enumerate(several)
            for key, each in elements._said.items()
        }
        return cls(said) if said else None

    def narrowed(self, narrow: Callable[[Selector], Selector]) -> Elements:
        """The same of other leaves, those that `narrow` makes of each selection."""
        return Elements(
            {key: said._replace(selector=narrow(said.selector)) for key, said in self._said.items()}
        )

    def within(self, where: Where | None) -> Elements:
        """The same in a larger state, in the parts of it that `where` names."""
        return self if where is None else self.narrowed(lambda selector: within(selector, where))

    @property
    def reads_more(self) -> bool:
        """Whether it may look at more of the leaves than their shapes: at dtypes, or at values."""
        is_function = lambda said: not isinstance(said.value, (slice, np.ndarray))
        reads_more = lambda said: reads(said.selector) is not Reads.STRUCTURE
        return any(is_function(said) or reads_more(said) for said in self._said.values())

    def lay(self, resolution: Resolution, tree: PyTree) -> Resolution:
        """A resolution of the whole leaves of `tree`, and of these elements.

        Raises:
          ValueError: a key selects nothing; a leaf is named twice, or frozen as a whole; a mask
            does not fit, or there is no such index; all of a leaf is frozen, or nothing.
          TypeError: a leaf is no array.
        """
        leaves = jax.tree.leaves(tree)
        chosen: dict[int, _Said] = {}
        named: dict[int, Hashable] = {}
        for name, said in self._said.items():
            found = resolve(said.selector, tree)
            for index in itertools.compress(range(len(leaves)), found.selected):
                if index in resolution.objects:  # it is frozen for what it is
                    continue
                path = resolution.paths[index]
                if index in chosen:
                    raise ValueError(
                        f"elements of {path!r} are named twice, by {chosen[index].key!r} and by "
                        f"{said.key!r}. Say it of a leaf once."
                    )
                if resolution.selected[index]:
                    raise ValueError(
                        f"the leaf {path!r} is frozen as a whole, and elements= names it as well, "
                        f"by {said.key!r}. Leave it out of one of them; beside trainable=, name "
                        "it among what trains."
                    )
                chosen[index], named[index] = said, name
        parts = {
            index: self._part(resolution.paths[index], named[index], said, leaves[index])
            for index, said in chosen.items()
        }
        if not parts:  # below a hole there may be such leaves
            return resolution
        key = (resolution, tuple(parts.items()))
        known = self._laid.get(key)
        return known or self._laid.keep(key, PartialResolution.of(resolution, parts))

    def _part(self, path: str, name: Hashable, said: _Said, leaf: Leaf) -> Part:
        struct = spec(leaf)
        if not isinstance(struct, jax.ShapeDtypeStruct):
            raise TypeError(f"elements of {path!r}: it is {describe(leaf)}, and no array.")
        key = (name, struct.shape, struct.dtype)
        if key not in self._parts:
            self._parts[key] = _part(path, said, struct)
        return self._parts[key]

    def __repr__(self) -> str:
        return "{" + ", ".join(f"{s.key!r}: {_shown(s.value)}" for s in self._said.values()) + "}"


# --- what a tool asks


def elements_of(frozen: Frozen, where: Where | None = None) -> Elements | None:
    """The elements that an argument `frozen` tells of: an optimizer may."""
    elements = getattr(frozen, "elements", None)
    return elements.within(where) if isinstance(elements, Elements) else None


def frozen_in_part(
    frozen: Frozen, trainable: Frozen, where: Where | None = None
) -> tuple[Selector, Elements | None]:
    """`frozen_selector`, for a tool that knows what elements are, and these."""
    selector = frozen_selector(frozen, trainable, where, in_part=True)
    return selector, elements_of(frozen, where)


def lay(
    selector: Selector,
    elements: Elements | None,
    tree: PyTree,
    *,
    to_train: bool = False,
    to_check: bool = False,
) -> Resolution:
    """What a selector and elements freeze of a tree; `resolve` says what is an error."""
    if elements is None:
        return resolve(selector, tree, to_train=to_train, to_check=to_check)
    return elements.lay(resolve(selector, tree, to_train=to_train), tree)


def resolve_in_part(
    frozen: Frozen,
    trainable: Frozen,
    tree: PyTree,
    *,
    where: Where | None = None,
    to_train: bool = False,
    to_check: bool = False,
) -> Resolution:
    """`resolve_frozen`, for a tool that knows what elements are."""
    said = frozen_in_part(frozen, trainable, where)
    return lay(*said, tree, to_train=to_train, to_check=to_check)
