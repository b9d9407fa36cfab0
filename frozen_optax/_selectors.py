"""Selectors: what chooses leaves, and how choices combine.

A selector is resolved against a tree once for each structure and gives a `Resolution`: the leaves'
paths and, leaf by leaf, whether it is selected. Everything else in the library reads resolutions
and never paths.

A path is `jax.tree_util.keystr(path, simple=True, separator="/")`. All matching is on that string,
so Haiku's keys, which hold slashes, read as if they were nested, and two leaves that share a path
are selected together.
"""

from __future__ import annotations

import abc
import dataclasses
import enum
import functools
import itertools
import re
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import numpy as np

from frozen_optax._globs import Glob, nearest_paths
from frozen_optax._messages import quoted
from frozen_optax._resolution import Resolution
from frozen_optax._trees import Memory, View, describe, is_inexact_array, spec
from frozen_optax._typing import Leaf, PyTree, TreeDef


class Reads(enum.IntEnum):
    """What of a tree a selector looks at, hence for how long its answer holds."""

    STRUCTURE = 0
    SHAPES = 1  # and dtypes
    VALUES = 2


class Selector(abc.ABC):
    """A choice of leaves.

    Selectors are made by `by_path`, `by_mask` and `by_predicate` and combined with `|`, `&` and
    `~`. A selector is a value: it prints as the code that makes it, compares by its parts, and is
    hashable where they are. It works on any pytree, of arrays, tracers or `jax.ShapeDtypeStruct`,
    and remembers what it selected for the last few tree structures, so that tracing a step again
    does not match the patterns again (a mask function, which may read values, is called each time).

    To select nothing is an error, also for a part of a combination, unless it is said in a word:
    `by_mask(False)`, `by_predicate(..., may_be_empty=True)`.

    Example:
      >>> import frozen_optax as fo
      >>> params = {"encoder": {"kernel": 1.0, "bias": 2.0}, "head": {"kernel": 3.0, "bias": 4.0}}
      >>> selector = fo.by_path("encoder") & ~fo.by_path("**/bias")
      >>> selector
      by_path('encoder') & ~by_path('**/bias')
      >>> selector.mask(params)
      {'encoder': {'bias': False, 'kernel': True}, 'head': {'bias': False, 'kernel': False}}
      >>> selector.paths(params)
      ['encoder/kernel']
    """

    @abc.abstractmethod
    def _select(self, view: View) -> np.ndarray:
        """A bool for each leaf."""

    @property
    def _reads(self) -> Reads:
        """What the answer depends on."""
        return Reads.STRUCTURE

    @property
    def _may_be_empty(self) -> bool:
        """Whether it is said that there may be nothing to select."""
        return False

    @property
    def _may_be_all(self) -> bool:
        """Whether it is said that every leaf may be selected."""
        return False

    @functools.cached_property
    def _memory(self) -> Memory[Resolution]:
        return Memory()

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # pyright: ignore

    def _resolve(self, tree: PyTree) -> Resolution:
        """The selection for `tree`, from memory when such a tree was seen before."""
        leaves, treedef = jax.tree.flatten(tree)
        key = self._key(leaves, treedef)
        if key is not None and (known := self._memory.get(key)):
            return known
        view = View.of(tree)
        selected = tuple(self._choose(view).tolist())
        resolution = Resolution(treedef, view.paths, selected, bool(view.holes))
        return resolution if key is None else self._memory.keep(key, resolution)

    def _considered(self, resolution: Resolution, tree: PyTree) -> Sequence[int]:
        """The indices of all leaves that there are to select from."""
        return range(len(resolution.paths))

    def _refuse_all(self, resolution: Resolution, tree: PyTree) -> None:
        """Raise if all is selected, and it is not said that it may be."""
        # Below a hole there may be leaves that are trained.
        if self._may_be_all or resolution.has_holes:
            return
        indices = self._considered(resolution, tree)
        if not all(resolution.selected[index] for index in indices):
            return
        # What is no number is frozen by nature, and says nothing.
        frozen = [resolution.paths[index] for index in indices if resolution.numbers[index]]
        if frozen:
            raise ValueError(
                f"{self!r} freezes all {len(frozen)} leaves ({quoted(frozen)}), so there is "
                "nothing to train. If that is meant, say so: frozen='**'."
            )

    def _refuse_objects(self, paths: Sequence[str]) -> None:
        """Raise for a selection of nothing but leaves that are no numbers, if nobody says so."""
        if not self._may_be_empty:
            raise ValueError(
                f"{self!r} selects nothing but what is no array ({quoted(paths)}) and is frozen in "
                f"any case. {self._if_meant}"
            )

    def _key(self, leaves: Sequence[Leaf], treedef: TreeDef) -> Hashable | None:
        """What of a tree the answer depends on; None where that cannot be kept."""
        if self._reads is Reads.VALUES:
            return None
        specs = tuple(map(spec, leaves)) if self._reads is Reads.SHAPES else ()
        if not all(isinstance(each, jax.ShapeDtypeStruct) for each in specs):
            return None  # it would keep a function alive
        # The text, as the keys of two trees may be equal and not the same: True and 1.
        return treedef, str(treedef), specs

    def _choose(self, view: View) -> np.ndarray:
        """As `_select`; an error if that is nothing, and it is not said that it may be."""
        selected = self._select(view)
        if view.paths and not selected.any() and not (view.holes or self._may_be_empty):
            raise ValueError(self._selects_nothing(view.paths))
        return selected

    def _selects_nothing(self, paths: Sequence[str]) -> str:
        return (
            f"{self!r} selects nothing: none of the {len(paths)} leaves, {quoted(paths)}. "
            f"{self._if_meant}"
        )

    @property
    def _if_meant(self) -> str:
        """What to write where there is to be nothing."""
        return (
            "Where nothing is to be frozen, write frozen=False; a check needs something to look at."
        )

    def mask(self, tree: PyTree) -> PyTree:
        """Bools in exactly the structure of `tree`, True where selected.

        `None` and holes stay what they are. The bound method serves as it is wherever a mask
        function is taken: `optax.masked(tx, selector.mask)`. Optax calls it on gradients, too:
        where dtypes matter to a predicate, hand over `selector.mask(params)`.

        Args:
          tree: a pytree of arrays, tracers or `jax.ShapeDtypeStruct`.

        Raises:
          ValueError: a pattern selects nothing, or a mask does not fit; the message names it.
        """
        resolution = self._resolve(tree)
        return resolution.unflatten(resolution.selected)

    def filter_spec(self, tree: PyTree) -> PyTree:
        """Bools in the structure of `tree`, True where selected and a float or complex array.

        What Equinox calls a filter spec, for `eqx.partition`, `eqx.filter` and what else takes one.
        Under `mask` the functions and numbers of a module are selected, too, wherever nobody says
        that they are not (`~selector`), and nothing can be differentiated by them.

        Args:
          tree: as for `mask`, with any leaves in it.

        Raises:
          ValueError: as for `mask`; or nothing that is selected is a float or complex array.

        Example:
          >>> import equinox as eqx, frozen_optax as fo, jax
          >>> model = eqx.nn.MLP(2, 1, width_size=4, depth=1, key=jax.random.key(0))
          >>> trained, rest = eqx.partition(model, fo.by_path("layers/1").filter_spec(model))
          >>> trained.layers[0].weight is None, trained.activation is None
          (True, True)
          >>> (~fo.by_path("layers/1")).filter_spec(model).activation
          False
        """
        resolution = self._resolve(tree)
        pairs = zip(resolution.selected, jax.tree.leaves(tree), strict=True)
        spec = [chosen and is_inexact_array(leaf) for chosen, leaf in pairs]
        if any(resolution.selected) and not (any(spec) or resolution.has_holes):
            raise ValueError(
                f"{self!r} selects no float or complex array, but {quoted(resolution.chosen)}: "
                "there is nothing to differentiate by."
            )
        return resolution.unflatten(spec)

    def labels(self, tree: PyTree, selected: Any = "frozen", rest: Any = "trainable") -> PyTree:
        """Labels in the structure of `tree`, for `optax.partition`.

        Args:
          tree: as for `mask`.
          selected: the label of the selected leaves.
          rest: the label of all others.

        Example:
          >>> import frozen_optax as fo
          >>> fo.by_path("encoder").labels({"encoder": 1.0, "head": 2.0})
          {'encoder': 'frozen', 'head': 'trainable'}
        """
        resolution = self._resolve(tree)
        labels = [selected if chosen else rest for chosen in resolution.selected]
        return resolution.unflatten(labels)

    def paths(self, tree: PyTree) -> list[str]:
        """The paths of the selected leaves, in the tree's order."""
        return list(self._resolve(tree).chosen)

    def __or__(self, other: Selector | str | re.Pattern[str]) -> Selector:
        if not isinstance(other, _OPERANDS):
            return NotImplemented
        return Union((self, _as_operand(other)))

    def __ror__(self, other: str | re.Pattern[str]) -> Selector:
        if not isinstance(other, _OPERANDS):
            return NotImplemented
        return _as_operand(other) | self

    def __and__(self, other: Selector | str | re.Pattern[str]) -> Selector:
        if not isinstance(other, _OPERANDS):
            return NotImplemented
        return Intersection((self, _as_operand(other)))

    def __rand__(self, other: str | re.Pattern[str]) -> Selector:
        if not isinstance(other, _OPERANDS):
            return NotImplemented
        return _as_operand(other) & self

    def __invert__(self) -> Selector:
        return Rest(self)

    def __bool__(self) -> bool:
        raise TypeError(
            f"{self!r} is neither true nor false. Selectors combine with |, & and ~, not with or, "
            "and, not; where a mask function is wanted, give selector.mask."
        )


# Functions, and not methods, as users see the methods of a selector.


def reads(selector: Selector) -> Reads:
    """What of a tree a selector looks at."""
    return selector._reads  # pyright: ignore[reportPrivateUsage]


def resolve(
    selector: Selector, tree: PyTree, *, to_train: bool = False, to_check: bool = False
) -> Resolution:
    """Which leaves of `tree` a selector selects; they are the frozen ones, wherever that matters.

    A leaf that is no number, beside others that are (the activation function of an Equinox module),
    can only be frozen, so it is, whatever the selector says; and so is a number of Python's in such
    a module. Whether anything is selected, and
    whether all is, is judged without such leaves. In a tree of nothing else (labels, shardings)
    leaves are selected like any other.

    Args:
      selector: what chooses.
      tree: a pytree of arrays, tracers or `jax.ShapeDtypeStruct`.
      to_train: whether the others are to be trained. It is an error then if there are none and
        nobody said so.
      to_check: whether the selected leaves are to be checked. It is an error then if there are
        none, whoever said so.

    Raises:
      ValueError: one of these errors, a pattern selects nothing, or a mask does not fit.
    """
    resolution = selector._resolve(tree)  # pyright: ignore[reportPrivateUsage]
    leaves = jax.tree.leaves(tree)
    objects = resolution.objects_among(leaves)
    chosen: Sequence[bool] = resolution.selected
    if objects and (to_check or len(objects) < len(leaves)):
        said, resolution = resolution.chosen, resolution.with_objects(objects)
        chosen = list(itertools.compress(resolution.selected, resolution.numbers))
        if said and not (any(chosen) or resolution.has_holes or to_check):
            selector._refuse_objects(said)  # pyright: ignore[reportPrivateUsage]
    if to_check and not any(chosen):
        raise ValueError(
            f"{selector!r} selects nothing: none of {len(chosen)} {_arrays(objects)}. There is "
            "nothing to check, and such a check would always pass. For every leaf write '**'."
        )
    if to_train:
        selector._refuse_all(resolution, tree)  # pyright: ignore[reportPrivateUsage]
    return resolution


def _arrays(objects: Sequence[int]) -> str:
    """What to call leaves of which the objects were left out."""
    return "leaves that are arrays" if objects else "leaves"


def name_of(function: PyTree | Callable[..., PyTree]) -> str:
    """What to call a function; anything else as it prints."""
    return getattr(function, "__qualname__", repr(function))


def _repr(pattern: str | re.Pattern[str]) -> str:
    """As `repr`, which cuts a regex off after 200 characters."""
    if isinstance(pattern, str):
        return repr(pattern)
    flags = repr(re.compile("", pattern.flags)).removeprefix("re.compile(''").removesuffix(")")
    return f"re.compile({pattern.pattern!r}{flags})"


def _as_regex(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"the regex {pattern!r} cannot be read: {error}. With search=True each pattern is a "
            "regex; a glob goes in a by_path of its own, by_path(...) | by_path(..., search=True)."
        ) from None


@dataclasses.dataclass(frozen=True, repr=False)
class ByPath(Selector):
    """The leaves whose path one of the patterns matches.

    With `search` all of them are regexes, and match wherever they are found in a path.
    """

    patterns: tuple[str | re.Pattern[str], ...]
    search: bool = False

    def __post_init__(self) -> None:
        for pattern in self.patterns:
            if not isinstance(pattern, (str, re.Pattern)):
                raise TypeError(
                    f"by_path takes globs and compiled regexes, found {describe(pattern)}: "
                    f"{pattern!r}."
                )
            if isinstance(pattern, re.Pattern) and not isinstance(pattern.pattern, str):
                raise TypeError(f"by_path matches text, found the bytes regex {pattern!r}.")
            if isinstance(pattern, str):  # one that cannot be read is an error where it is written
                _ = _as_regex(pattern) if self.search else Glob(pattern).regex

    @property
    def _may_be_all(self) -> bool:
        def is_every_leaf(pattern: str | re.Pattern[str]) -> bool:
            if isinstance(pattern, re.Pattern):
                return pattern.pattern == ".*"
            return pattern == ".*" if self.search else pattern in ("**", "*")

        return any(map(is_every_leaf, self.patterns))

    @functools.cached_property
    def _matchers(self) -> list[Glob | re.Pattern[str]]:
        read = _as_regex if self.search else Glob
        return [read(pattern) if isinstance(pattern, str) else pattern for pattern in self.patterns]

    def _select(self, view: View) -> np.ndarray:
        selected = np.zeros(len(view.paths), bool)
        for pattern, matcher in zip(self.patterns, self._matchers, strict=True):
            regex = matcher.regex if isinstance(matcher, Glob) else matcher
            match = regex.search if self.search else regex.fullmatch
            matches = np.array([match(path) is not None for path in view.paths], bool)
            if not matches.any() and not self._may_match_unseen(matcher, view):
                raise ValueError(self._matches_nothing(pattern, matcher, view.paths))
            selected |= matches
        return selected

    def _matches_nothing(
        self,
        pattern: str | re.Pattern[str],
        matcher: Glob | re.Pattern[str],
        paths: Sequence[str],
    ) -> str:
        if isinstance(matcher, Glob):
            nearest = nearest_paths(matcher.glob, paths, None)
        else:
            nearest = nearest_paths(matcher.pattern, paths, matcher, self.search)
        found = f"{ByPath((pattern,), self.search)!r} selects nothing: it matches none of the"
        return f"{found} {len(paths)} leaves. {nearest}".rstrip()

    @staticmethod
    def _may_match_unseen(matcher: Glob | re.Pattern[str], view: View) -> bool:
        """Whether it could match what lies below a hole, or is right for a tree without leaves."""
        if isinstance(matcher, re.Pattern):  # no telling what a regex could match below a hole
            return bool(view.holes)
        matches_the_root = matcher.regex.fullmatch("") is not None
        return matches_the_root or any(map(matcher.may_match_below, view.holes))

    def __repr__(self) -> str:
        search = ", search=True" if self.search else ""
        return f"by_path({', '.join(map(_repr, self.patterns))}{search})"


def _in_brackets(selector: Selector) -> str:
    return f"({selector!r})" if isinstance(selector, Combined) else repr(selector)


@dataclasses.dataclass(frozen=True, repr=False)
class Combined(Selector):
    """Of several selectors."""

    parts: tuple[Selector, ...]

    @property
    def _reads(self) -> Reads:
        return max(part._reads for part in self.parts)


class Union(Combined):
    """The leaves that any of several selects."""

    @property
    def _may_be_empty(self) -> bool:
        return all(part._may_be_empty for part in self.parts)

    @property
    def _may_be_all(self) -> bool:
        return any(part._may_be_all for part in self.parts)

    def _select(self, view: View) -> np.ndarray:
        return np.any([part._choose(view) for part in self.parts], axis=0)

    def __repr__(self) -> str:
        return " | ".join(map(_in_brackets, self.parts))


class Intersection(Combined):
    """The leaves that all of several select."""

    @property
    def _may_be_empty(self) -> bool:
        return any(part._may_be_empty for part in self.parts)

    @property
    def _may_be_all(self) -> bool:
        return all(part._may_be_all for part in self.parts)

    def _select(self, view: View) -> np.ndarray:
        return np.all([part._choose(view) for part in self.parts], axis=0)

    def __repr__(self) -> str:
        return " & ".join(map(_in_brackets, self.parts))


@dataclasses.dataclass(frozen=True, repr=False)
class Rest(Selector):
    """The leaves that another does not select."""

    part: Selector
    # Where the trainable leaves were named it is no error if these are all: there is no more to
    # freeze.
    may_be_empty: bool = dataclasses.field(default=False, compare=False)

    @property
    def _reads(self) -> Reads:
        return self.part._reads

    @property
    def _may_be_empty(self) -> bool:
        return self.may_be_empty or self.part._may_be_all

    @property
    def _may_be_all(self) -> bool:
        return self.part._may_be_empty

    def _select(self, view: View) -> np.ndarray:
        return ~self.part._choose(view)

    def _resolve(self, tree: PyTree) -> Resolution:
        # Remembered there, as `trainable=` makes a new negation at each use.
        resolution = self.part._resolve(tree).complement
        may_be_empty = resolution.has_holes or self._may_be_empty
        if resolution.paths and not (any(resolution.selected) or may_be_empty):
            raise ValueError(self._selects_nothing(resolution.paths))
        return resolution

    def __invert__(self) -> Selector:
        return self.part

    def __repr__(self) -> str:
        return f"~{_in_brackets(self.part)}"


_OPERANDS = (Selector, str, re.Pattern)


def _as_operand(operand: Selector | str | re.Pattern[str]) -> Selector:
    return operand if isinstance(operand, Selector) else ByPath((operand,))
