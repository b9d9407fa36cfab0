"""What is frozen and what that saves: a table to read, with fields to compute with.

Nothing is allocated. A report reads shapes, dtypes and shardings alone, and `jax.eval_shape` tells what an optimizer's
state would be, so it can be had for a model that fits on no machine at hand.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from frozen_optax import _bits
from frozen_optax._optimizer import with_frozen
from frozen_optax._partition import combine, partition
from frozen_optax._selection import Selection, Selector, by_mask, frozen_selector
from frozen_optax._trees import PyTree, flatten_with_holes, is_hole, keystr, spec

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_MAX_ROWS = 30  # rows shown of the frozen part, and of the trained part
_WIDTH = 200  # of the text, which no terminal shall change; the tables take what they need of it
_MAX_PATH = 64  # columns, before a path goes on in the next line
_NOTEBOOK = "<pre style=\"white-space:pre;overflow-x:auto;font-family:Menlo,Consolas,'DejaVu Sans Mono',monospace\">"


@dataclasses.dataclass(frozen=True)
class Row:
    """Subtrees that are alike: the same leaves with the same shapes and dtypes, at paths that differ in numbers only.

    Attributes:
      path: the path that the table shows, `layers/{0..31}/mlp` for 32 subtrees.
      paths: the paths of all the subtrees.
      frozen: whether they are frozen; they are wholly frozen or wholly trained.
      leaves: how many leaves they have.
      shape: the shape of each leaf; None where leaves differ, or are no arrays.
      dtypes: the names of their dtypes, the types' names for leaves that are no arrays.
      parameters: the elements of all leaves.
      bytes: what they take, as `summary` counts it.
    """

    path: str
    paths: tuple[str, ...]
    frozen: bool
    leaves: int
    shape: tuple[int, ...] | None
    dtypes: tuple[str, ...]
    parameters: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Total:
    """What some rows have together: leaves, parameters and bytes."""

    leaves: int
    parameters: int
    bytes: int

    @classmethod
    def of(cls, rows: Iterable[Row]) -> Total:
        """The total of `rows`."""
        rows = list(rows)
        return cls(sum(r.leaves for r in rows), sum(r.parameters for r in rows), sum(r.bytes for r in rows))


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes that last through a step: activations and temporary arrays are not among them.

    Attributes:
      parameters: of all leaves, frozen and trained.
      gradients: of the leaves that are trained and can be differentiated, in their own dtypes.
      optimizer_state: of what `optimizer.init` returns; None without an optimizer, and where it cannot be told.
    """

    parameters: int
    gradients: int
    optimizer_state: int | None

    @property
    def total(self) -> int | None:
        """The sum; None where the optimizer state is."""
        return None if self.optimizer_state is None else self.parameters + self.gradients + self.optimizer_state


@dataclasses.dataclass(frozen=True, repr=False)
class Summary:
    """What `summary` returns. It prints as a table in a terminal, in a notebook and with `rich`.

    Attributes:
      rows: the subtrees, in the order of the tree; all of them, also where the table shows fewer.
      memory: bytes with the frozen part frozen, over all devices, each array counted once.
      memory_without_freezing: the same if every leaf were trained by the same optimizer.
      memory_per_device: an estimate of the bytes on one device, as `summary` describes it.
      memory_per_device_without_freezing: the same if every leaf were trained.
      note: why the optimizer has no state without freezing, where that cannot be told; else empty.
    """

    rows: tuple[Row, ...]
    memory: Memory
    memory_without_freezing: Memory
    memory_per_device: Memory
    memory_per_device_without_freezing: Memory
    note: str

    @property
    def trained(self) -> Total:
        """What is trained."""
        return Total.of(row for row in self.rows if not row.frozen)

    @property
    def frozen(self) -> Total:
        """What is frozen."""
        return Total.of(row for row in self.rows if row.frozen)

    @property
    def all(self) -> Total:
        """Trained and frozen."""
        return Total.of(self.rows)

    @property
    def trained_fraction(self) -> float:
        """The part of the parameters that is trained, 0.0 to 1.0; 0.0 where there are none."""
        return self.trained.parameters / max(self.all.parameters, 1)

    def __rich__(self) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        return Group(_leaves_table(self), Text(), _memory_table(self), *([Text(self.note)] if self.note else []))

    def __str__(self) -> str:
        lines = _recorded(self).export_text(styles=False).splitlines()
        return "\n".join(line.rstrip() for line in lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return _recorded(self).export_html(inline_styles=True, code_format=_NOTEBOOK + "{code}</pre>")


def _recorded(summary: Summary) -> Any:
    """A console that has printed `summary` to nowhere, the same on every terminal."""
    from rich.console import Console

    console = Console(
        file=io.StringIO(), record=True, width=_WIDTH, force_terminal=False, force_jupyter=False, legacy_windows=False
    )
    console.print(summary)
    return console


def _table(headings: Sequence[str], left: Iterable[int], sections: Iterable[Iterable[Sequence[Any]]]) -> Table:
    """A table with lines of plain ASCII, the columns in `left` set to the left and the others to the right."""
    from rich.box import Box
    from rich.table import Table

    rule, empty = " -- \n", "    \n"
    box = Box(empty + empty + rule + empty + rule + empty + empty + empty, ascii=True)
    table = Table(box=box, show_edge=False, pad_edge=False, header_style="bold")
    for i, heading in enumerate(headings):
        if i in left:
            table.add_column(heading, overflow="fold", max_width=_MAX_PATH)
        else:
            table.add_column(heading, justify="right", no_wrap=True)
    for section in map(list, sections):
        for i, cells in enumerate(section):
            table.add_row(*cells, end_section=i == len(section) - 1)
    return table


def _count(row: Row | Total) -> str:
    return f"{row.leaves:,} {'leaf' if row.leaves == 1 else 'leaves'}"


def _cells(row: Row | Total, name: str, leaves: str, dtype: str = "", status: str = "") -> list[Any]:
    from rich.text import Text

    style = "green" if status == "trained" else ""
    return [Text(cell, style) for cell in (name, leaves, dtype, f"{row.parameters:,}", _size(row.bytes), status)]


def _leaves_table(summary: Summary) -> Table:
    shown, hidden = [], []
    for status, frozen in (("trained", False), ("frozen", True)):
        rows = [(i, row) for i, row in enumerate(summary.rows) if row.frozen == frozen]
        for i, row in rows[:_MAX_ROWS]:
            times = f"{row.leaves:,} x " if row.leaves > 1 else ""
            leaves = _count(row) if row.shape is None else f"{times}{row.shape}"
            names = ", ".join(row.dtypes) if len(row.dtypes) <= 3 else f"{len(row.dtypes)} dtypes"
            shown.append((i, _cells(row, row.path or "(the root)", leaves, names, status)))
        if more := rows[_MAX_ROWS:]:
            total = Total.of(row for _, row in more)
            hidden.append(_cells(total, f"({len(more):,} more rows)", _count(total), status=status))
    totals = [
        (f"trained, {100 * summary.trained_fraction:.3g}%", summary.trained),
        ("frozen", summary.frozen),
        ("all", summary.all),
    ]
    return _table(
        ["path", "leaves", "dtype", "parameters", "bytes", ""],
        left=(0, 2, 5),
        sections=[
            [cells for _, cells in sorted(shown, key=lambda pair: pair[0])] + hidden,
            [_cells(total, name, _count(total)) for name, total in totals],
        ],
    )


def _memory_table(summary: Summary) -> Table:
    columns = {"with freezing": summary.memory, "without": summary.memory_without_freezing}
    if summary.memory_per_device.parameters != summary.memory.parameters:
        columns["with, per device"] = summary.memory_per_device
        columns["without, per device"] = summary.memory_per_device_without_freezing

    def cells(field: str) -> list[str]:
        return [field.replace("_", " "), *(_size(getattr(memory, field)) for memory in columns.values())]

    sections = [["parameters", "gradients"]]
    if summary.memory.total is not None:
        sections = [["parameters", "gradients", "optimizer_state"], ["total"]]
    return _table(["memory", *columns], left=(0,), sections=[map(cells, section) for section in sections])


def _size(count: int | None) -> str:
    """Bytes as people read them: three digits and a unit."""
    if count is None:
        return "n/a"
    power = min(max(count.bit_length() - 1, 0) // 10, 5)
    value = count / 1024**power
    digits = 0 if not power or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {['B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB'][power]}"


def _bytes(spec: Any) -> int:
    """What an array takes, elements of less than a byte packed; nothing for what is no array."""
    if not _bits.is_array(spec):
        return 0
    return -(-math.prod(spec.shape) * _bits.width(spec.dtype) // 8)


class _Leaf(NamedTuple):
    """A leaf as a row needs it; `keys` ends with the leaf's index, so that no two are the same."""

    keys: tuple[Any, ...]
    frozen: bool
    shape: tuple[int, ...] | None
    dtype: str
    parameters: int
    bytes: int

    @classmethod
    def of(cls, keys: tuple[Any, ...], frozen: bool, spec: Any) -> _Leaf:
        if not _bits.is_array(spec):
            return cls(keys, frozen, None, type(spec).__name__, 0, 0)
        return cls(keys, frozen, tuple(spec.shape), str(spec.dtype), math.prod(spec.shape), _bytes(spec))


def _whole(leaf: Any) -> Any:
    """What has the shape and dtype of a leaf; `jax.eval_shape` takes 64 bits without x64 from numpy's arrays only."""
    return leaf if isinstance(leaf, (np.ndarray, np.generic)) else spec(leaf)


def _shard(path: str, leaf: Any, whole: Any) -> Any:
    """The shape and dtype of what one device holds of a leaf: all of it, if it has no sharding."""
    if (sharding := getattr(leaf, "sharding", None)) is None:
        return whole
    try:
        return jax.ShapeDtypeStruct(sharding.shard_shape(whole.shape), whole.dtype)
    except ValueError as error:
        raise ValueError(f"the leaf at {path!r} cannot be sharded as it says: {error}") from error


def _subtrees(leaves: list[_Leaf], depth: int) -> Iterator[tuple[str, list[_Leaf]]]:
    """The largest subtrees that are wholly frozen or wholly trained, once the tree has branched `depth` times."""
    first, last = leaves[0].keys, leaves[-1].keys
    level = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))
    if len(leaves) == 1:
        yield keystr(first[:-1]), leaves
    elif depth <= 0 and len({leaf.frozen for leaf in leaves}) == 1:
        yield keystr(first[:level]), leaves
    else:
        for _, below in itertools.groupby(leaves, key=lambda leaf: leaf.keys[level]):
            yield from _subtrees(list(below), depth - 1)


def _ranges(numbers: list[str]) -> str:
    """Numbers as a shell would write them: `{0..30,32}`; one number as it is."""
    if len(numbers) == 1:
        return numbers[0]
    ordered = enumerate(sorted(numbers, key=int))
    runs = [[n for _, n in run] for _, run in itertools.groupby(ordered, key=lambda pair: int(pair[1]) - pair[0])]
    texts = [f"{run[0]}..{run[-1]}" if len(run) > 2 else ",".join(run) for run in runs]
    if len(texts) > 6:
        texts[3:-1] = ["..."]
    return "{" + ",".join(texts) + "}"


def _fold(alike: list[tuple[str, list[_Leaf]]]) -> Iterator[tuple[str, list[tuple[str, list[_Leaf]]]]]:
    """Paths that differ in numbers only, as few patterns as say exactly which they are.

    The last numbers are folded first: `a/0/b/{0..3}` and `a/1/b/{0..3}` are then equal but for one number again.
    """
    words = re.split("[0-9]+", alike[0][0])
    folded: dict[tuple[str, ...], list[Any]] = {}
    for subtree in alike:
        folded.setdefault(tuple(re.findall("[0-9]+", subtree[0])), []).append(subtree)
    for i in reversed(range(len(words) - 1)):
        same: dict[Any, list[Any]] = {}
        for numbers, subtrees in folded.items():
            same.setdefault((numbers[:i], numbers[i + 1 :]), []).append((numbers[i], subtrees))
        folded = {
            (*before, _ranges([number for number, _ in found]), *after): [s for _, subtrees in found for s in subtrees]
            for (before, after), found in same.items()
        }
    for numbers, subtrees in folded.items():
        yield "".join(word + number for word, number in zip(words, [*numbers, ""], strict=True)), subtrees


def _rows(leaves: list[_Leaf], depth: int) -> tuple[Row, ...]:
    alike: dict[Any, list[tuple[str, list[_Leaf]]]] = {}
    for path, below in _subtrees(leaves, depth) if leaves else ():
        inside = tuple((keystr(leaf.keys[:-1])[len(path) :], leaf.shape, leaf.dtype) for leaf in below)
        alike.setdefault((re.sub("[0-9]+", "0", path), below[0].frozen, inside), []).append((path, below))
    rows = []
    for path, subtrees in itertools.chain.from_iterable(map(_fold, alike.values())):
        inside = [leaf for _, below in subtrees for leaf in below]
        shapes = {leaf.shape for leaf in inside}
        row = Row(
            path=path,
            paths=tuple(path for path, _ in subtrees),
            frozen=inside[0].frozen,
            leaves=len(inside),
            shape=inside[0].shape if len(shapes) == 1 else None,
            dtypes=tuple(dict.fromkeys(leaf.dtype for leaf in inside)),
            parameters=sum(leaf.parameters for leaf in inside),
            bytes=sum(leaf.bytes for leaf in inside),
        )
        rows.append((min(leaf.keys[-1] for leaf in inside), row))
    return tuple(row for _, row in sorted(rows, key=lambda pair: pair[0]))


def _memory(
    params: PyTree, specs: list[Any], selector: Selector, optimizer: optax.GradientTransformation | None
) -> Memory:
    """What `params` take to train, their leaves having the shapes of `specs`."""
    resolution = selector._resolve(params)
    trained = resolution.rest(specs)
    state = None
    if optimizer is not None:
        _bits.refuse_untrainable(resolution, specs)
        init = with_frozen(optimizer, selector).init
        rest = partition(params, selector)[1]  # as it is: what is frozen need not be an array
        made = jax.eval_shape(lambda part: init(combine(part, rest)), jax.tree.unflatten(resolution.holed, trained))
        state = sum(map(_bytes, jax.tree.leaves(made)))
    return Memory(
        parameters=sum(map(_bytes, specs)),
        gradients=sum(_bytes(s) for s in trained if _bits.is_array(s) and jnp.issubdtype(s.dtype, jnp.inexact)),
        optimizer_state=state,
    )


def _compared(
    params: PyTree, specs: list[Any], selector: Selector, optimizer: optax.GradientTransformation | None
) -> tuple[Memory, Memory, str]:
    """The memory with freezing and without, and why the latter cannot be told."""
    memory, nothing = _memory(params, specs, selector, optimizer), by_mask(False)
    try:
        return memory, _memory(params, specs, nothing, optimizer), ""
    except Exception as error:  # whatever an optimizer raises for leaves that it was not made for
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        note = f"n/a: without freezing the optimizer cannot be initialised: {reason}"
        return memory, _memory(params, specs, nothing, None), note


def summary(
    params: PyTree,
    frozen: Selection = None,
    optimizer: optax.GradientTransformation | None = None,
    *,
    trainable: Selection = None,
    depth: int = 1,
) -> Summary:
    """What is frozen, what is trained, and what it takes: a table, and its numbers as fields.

    A row is a subtree that is wholly frozen or wholly trained, the largest there is. Subtrees that are alike and whose
    paths differ in numbers only share a row: `layers/{0..31}/mlp`. Of very many rows the table shows the first 30 that
    are frozen and the first 30 that are trained; `Summary.rows` has all.

    Every element of every array counts as a parameter, whatever its dtype: quantised weights are integers. A PRNG key
    counts as one, a leaf that is no array as none. Bytes are those of the data: int4 and its like are packed, as on
    accelerators (a CPU takes a byte for each), and a PRNG key takes its key data.

    The memory per device is an estimate, by these rules:

    - of each parameter a device holds one shard, `sharding.shard_shape(shape)`; all of it, if there is no sharding;
    - of the gradients it holds the same shards, in the parameters' dtypes, for those that are trained and float;
    - of the optimizer state it holds what `optimizer.init` returns for these shards: moments are sharded as their
      parameters are, counts and the like are there on every device.

    Activations and temporary arrays come on top. Where layers lie on different devices the estimate is too high: each
    device is taken to hold a shard of every leaf.

    Args:
      params: arrays of jax or numpy, or `jax.ShapeDtypeStruct`s; they may have shardings, on an `AbstractMesh` too.
      frozen: what is frozen, as `freeze` takes it.
      optimizer: the optimizer that you would wrap, bare: `optax.adamw(1e-3)`. What `with_frozen` already wraps keeps
        no state for what is frozen, so both columns are the same.
      trainable: what is not frozen, instead.
      depth: how often the tree branches before subtrees become rows, however uniform they are. 1 shows the top-level
        modules, 0 a wholly frozen tree as a single row, a large number each leaf. A level at which the tree does not
        branch does not count, so `{"params": {...}}` reads like what is in it.

    Returns:
      A `Summary`. Without freezing, an optimizer may have no state for leaves that are no floats: the field is None
      then, shown as n/a, and `Summary.note` tells the reason.

    Raises:
      TypeError: not exactly one of `frozen` and `trainable` is given, or it is no way to select leaves. With an
        optimizer: a frozen leaf is one that `with_frozen` refuses, such as a Python scalar.
      ValueError: a pattern selects nothing, a mask does not fit, a leaf's shape cannot be divided as its sharding says.

    Example:
      >>> import frozen_optax as fo, jax.numpy as jnp, optax
      >>> block = {"kernel": jnp.ones((64, 64)), "bias": jnp.ones(64)}
      >>> params = {"encoder": {"block_0": block, "block_1": block}, "head": {"kernel": jnp.ones((64, 10))}}
      >>> report = fo.summary(params, "encoder/*/kernel", optax.adam(1e-3))
      >>> report
      path                               leaves   dtype     parameters      bytes
      -------------------------------------------------------------------------------------
      encoder/block_{0,1}/bias        2 x (64,)   float32          128      512 B   trained
      encoder/block_{0,1}/kernel   2 x (64, 64)   float32        8,192   32.0 KiB   frozen
      head/kernel                      (64, 10)   float32          640   2.50 KiB   trained
      -------------------------------------------------------------------------------------
      trained, 8.57%                   3 leaves                    768   3.00 KiB
      frozen                           2 leaves                  8,192   32.0 KiB
      all                              5 leaves                  8,960   35.0 KiB
      <BLANKLINE>
      memory            with freezing    without
      ------------------------------------------
      parameters             35.0 KiB   35.0 KiB
      gradients              3.00 KiB   35.0 KiB
      optimizer state        6.00 KiB   70.0 KiB
      ------------------------------------------
      total                  44.0 KiB    140 KiB
      >>> report.trained.parameters, report.memory.optimizer_state, report.memory_without_freezing.optimizer_state
      (768, 6148, 71684)
    """
    selector = frozen_selector(frozen, trainable)
    resolution = selector._resolve(params)
    leaves = jax.tree.leaves(params)
    keys = [(*path, i) for i, (path, _) in enumerate(p for p in flatten_with_holes(params) if not is_hole(p[1]))]
    whole = list(map(_whole, leaves))
    shard = list(map(_shard, resolution.paths, leaves, whole))
    compared = _compared(params, whole, selector, optimizer)
    per_device = compared if shard == whole else _compared(params, shard, selector, optimizer)
    return Summary(
        rows=_rows(list(map(_Leaf.of, keys, resolution.selected, whole)), depth),
        memory=compared[0],
        memory_without_freezing=compared[1],
        memory_per_device=per_device[0],
        memory_per_device_without_freezing=per_device[1],
        note=compared[2] or per_device[2],
    )
