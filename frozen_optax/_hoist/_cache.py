"""`Hoisted.cache`: the rows of a whole data set, computed once, in memory or on disk."""

from __future__ import annotations

import contextlib
import itertools
import operator
import os
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from frozen_optax._fingerprints import fingerprint
from frozen_optax._hoist._belongs import belongings
from frozen_optax._hoist._cache_columns import (
    Column,
    Error,
    as_narrow,
    column_of,
    narrowed,
    widened,
)
from frozen_optax._hoist._cache_files import Directory, Files, opened
from frozen_optax._hoist._preparation import Batch, Preparation, on_host
from frozen_optax._hoist._rows import Rows
from frozen_optax._messages import Fault, listed
from frozen_optax._selectors import Selector
from frozen_optax._typing import PyTree

_T = TypeVar("_T")


class Cache:
    """The rows of a data set; made by `Hoisted.cache`.

    `cache[indices]` are the `Rows` of some examples, on the host, `len(cache)` is how many there
    are, and `print(cache)` says what they take and what keeping them narrower has changed.
    """

    def __init__(
        self,
        plan: Preparation,
        columns: Sequence[Column],
        errors: Sequence[Error],
        store: _Memory | Files,
        selector: Selector,
        frozen: Mapping[str, str],
        path: str | None,
    ):
        self._kept, self._shared = plan.shapes.kept, plan.shared
        self._columns, self._errors, self._store, self._path = columns, errors, store, path
        self._selector, self._fingerprint = selector, frozen

    def __len__(self) -> int:
        return len(self._store.arrays[0])

    def __getitem__(self, indices: Any) -> Rows:
        """The rows at some indices, an array of integers or a slice, in their order.

        Raises:
          IndexError: there is no such row.
          TypeError: `indices` are no array of integers and no slice.
          ValueError: a file of the cache was cut off, or is damaged in the block of a row, which
            the message names.
        """
        wanted = self._indices(indices)
        self._store.require(wanted)
        each = (array.take(wanted, axis=0) for array in self._store.arrays)
        each = (widened(*pair) for pair in zip(self._columns, each, strict=True))
        return Rows(tuple(each), self._shared, self._kept)

    def check(self, params: PyTree) -> None:
        """Raise where the rows are not of the frozen leaves of these parameters.

        Raises:
          ValueError: some hold other bits; the message names their paths.
        """
        now = fingerprint(params, self._selector)
        names = dict.fromkeys([*self._fingerprint, *now])
        pairs = [(name, self._fingerprint.get(name), now.get(name)) for name in names]
        faults = [Fault(name, f"{a} became {b}") for name, a, b in pairs if a != b]
        if faults:
            heading = f"{len(faults)} of {len(names)} frozen leaves are others than in the cache:"
            lines = listed(heading, faults)
            lines.append("Its rows are of no use with them. Build a cache of these parameters.")
            raise ValueError("\n".join(lines))

    @property
    def bytes_per_example(self) -> int:
        """What a row takes where it is kept."""
        return sum(column.row_bytes for column in self._columns)

    @property
    def errors(self) -> dict[str, tuple[float, float]]:
        """The largest error that keeping rows narrower has made.

        Of each array that is kept so, in words, the absolute error and that relative to the number.
        """
        return {
            f"array {i}, {column}": (error.absolute, error.relative)
            for i, (column, error) in enumerate(zip(self._columns, self._errors, strict=True))
            if column.stored != column.dtype
        }

    def __repr__(self) -> str:
        where = "in memory" if self._path is None else f"at {self._path!r}"
        total = len(self) * self.bytes_per_example
        lines = [
            f"{len(self):,} rows {where}, {self.bytes_per_example:,} bytes each, {total:,} in all"
        ]
        for name, (absolute, relative) in self.errors.items():
            lines.append(f"  {name}: off by at most {absolute:.3g}, {relative:.3g} of the number")
        return "\n".join(lines)

    def _indices(self, indices: Any) -> np.ndarray:
        if isinstance(indices, slice):
            return np.arange(*indices.indices(len(self)))
        found = np.asarray(indices)
        if found.ndim != 1 or (found.size and not np.issubdtype(found.dtype, np.integer)):
            raise TypeError(
                "rows are taken by an array of integers or a slice, found "
                f"{found.dtype}{list(found.shape)}. For a single example, cache[i : i + 1]; for a "
                "mask, cache[numpy.flatnonzero(mask)]."
            )
        return found.astype(np.int64)


def build(
    prepare: Callable[..., Rows],
    selector: Selector,
    params: PyTree,
    batches: Iterable[Batch],
    path: str | os.PathLike[str] | None,
    *,
    dtype: Any,
    live: Sequence[PyTree] | None,
    progress: bool | None,
) -> Cache:
    """The cache of a data set: computed, gone on with, or found complete. See `Hoisted.cache`."""
    narrow = as_narrow(dtype)
    frozen = fingerprint(params, selector)
    total = operator.length_hint(batches) or None
    drawn = iter(batches)
    first = next(drawn, None)
    if first is None:
        raise ValueError(
            "there are no batches. Give an iterable of tuples of arguments; an iterator that was "
            "used up has to be made anew."
        )
    plan = Preparation(prepare, selector, params, first, live)
    columns = [column_of(each.shape[1:], each.dtype, narrow) for each in plan.shapes.each]
    all_batches = itertools.chain([first], drawn)
    with _progress(progress, total) as advance:
        if path is None:
            memory = _Memory(columns, (total or 1) * plan.size)
            _fill(memory, columns, plan, all_batches, advance)
            return Cache(plan, columns, memory.errors, memory, selector, frozen, None)
        directory = os.path.abspath(os.fspath(path))
        words = belongings(frozen, plan.frozen, plan.shapes.kept, columns, first)
        with opened(directory, words, columns) as store:
            _fill(store, columns, plan, all_batches, advance)
    files = Files(directory, store.manifest, columns)
    return Cache(plan, columns, store.errors, files, selector, frozen, directory)


def _fill(
    store: _Memory | Directory,
    columns: Sequence[Column],
    plan: Preparation,
    batches: Iterable[Batch],
    advance: Callable[[], None],
) -> None:
    """Goes through all data, computes the rows that are not there, and ends the store."""
    there = store.rows

    def begun() -> Iterator[tuple[Sequence[Any], slice]]:
        """Of each batch its rows, on a device only begun, and which of them are not there."""
        seen = 0
        for number, batch in enumerate(batches):
            arrays = plan.arrays(number, batch)
            store.see(arrays)
            count = len(arrays[0])
            seen += count
            missing = min(seen - there, count)
            yield plan.rows(batch) if missing > 0 else (), slice(count - missing, count)

    row = there
    for arrays, missing in _one_behind(begun()):
        if arrays:
            rows = [on_host(array)[missing] for array in arrays]
            trios = zip(columns, rows, store.errors, strict=True)
            store.append([narrowed(column, each, row, error) for column, each, error in trios])
            row += len(rows[0])
        advance()
    store.finish()


def _one_behind(items: Iterable[_T]) -> Iterator[_T]:
    """Each item when the next one has been drawn: what it has begun goes on meanwhile."""
    held: list[_T] = []
    for item in items:
        held.append(item)
        if len(held) > 1:
            yield held.pop(0)
    yield from held


class _Memory:
    """Rows in memory: arrays with room for as many as are expected, or else ever more."""

    def __init__(self, columns: Sequence[Column], expected: int):
        self.arrays = [np.empty((expected, *column.shape), column.stored) for column in columns]
        self.errors = [Error() for _ in columns]
        self.rows = 0

    def see(self, arrays: Sequence[Any]) -> None:
        """Compares nothing: there is nothing yet."""

    def append(self, arrays: Sequence[np.ndarray]) -> None:
        """Puts rows behind those that are there."""
        first, self.rows = self.rows, self.rows + len(arrays[0])
        for i, array in enumerate(arrays):
            if self.rows > len(self.arrays[i]):
                self.arrays[i] = _with_room(self.arrays[i], first, 2 * self.rows)
            self.arrays[i][first : self.rows] = array

    def finish(self) -> None:
        """Leaves off the room that was not needed. It was not written to and takes no memory."""
        self.arrays = [array[: self.rows] for array in self.arrays]

    def require(self, indices: np.ndarray) -> None:
        """Raises nothing."""


def _with_room(array: np.ndarray, rows: int, room: int) -> np.ndarray:
    larger = np.empty((room, *array.shape[1:]), array.dtype)
    larger[:rows] = array[:rows]
    return larger


@contextlib.contextmanager
def _progress(is_wanted: bool | None, total: int | None) -> Generator[Callable[[], None]]:
    """What is called after each batch, and moves a bar on the terminal if there is to be one."""
    if not (sys.stderr.isatty() if is_wanted is None else is_wanted):
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    shown = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*shown, console=Console(stderr=True)) as bar:
        task = bar.add_task("batches", total=total)
        yield lambda: bar.advance(task)
