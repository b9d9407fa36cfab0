"""A report as fields to compute with, and as tables: on a terminal, as text, in a notebook."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

_MAX_ROWS = 30  # rows shown of the frozen part, and of the trained part
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_WIDTH = 200  # of the text, which no terminal shall change; the tables take what they need of it
_MAX_PATH = 64  # columns, before a path goes on in the next line
_FONTS = "Menlo,Consolas,'DejaVu Sans Mono',monospace"
_NOTEBOOK = f'<pre style="white-space:pre;overflow-x:auto;font-family:{_FONTS}">'


@dataclasses.dataclass(frozen=True)
class Row:
    """Subtrees that are alike, as one row of the table.

    They have the same leaves with the same shapes and dtypes, at paths that differ in numbers only.

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
        return cls(
            leaves=sum(row.leaves for row in rows),
            parameters=sum(row.parameters for row in rows),
            bytes=sum(row.bytes for row in rows),
        )


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes that last through a step: activations and temporary arrays are not among them.

    Attributes:
      parameters: of all leaves, frozen and trained.
      gradients: of the leaves that are trained and can be differentiated, in their own dtypes.
      optimizer_state: of what `optimizer.init` returns; None without an optimizer, and where it
        cannot be told.
    """

    parameters: int
    gradients: int
    optimizer_state: int | None

    @property
    def total(self) -> int | None:
        """The sum; None where the optimizer state is."""
        if self.optimizer_state is None:
            return None
        return self.parameters + self.gradients + self.optimizer_state


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

        note = [Text(self.note)] if self.note else []
        return Group(_leaves_table(self), Text(), _memory_table(self), *note)

    def __str__(self) -> str:
        lines = _recorded(self).export_text(styles=False).splitlines()
        return "\n".join(line.rstrip() for line in lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return _recorded(self).export_html(
            inline_styles=True, code_format=_NOTEBOOK + "{code}</pre>"
        )


def _recorded(summary: Summary) -> Console:
    """A console that has printed `summary` to nowhere, the same on every terminal."""
    from rich.console import Console

    console = Console(
        file=io.StringIO(),
        record=True,
        width=_WIDTH,
        force_terminal=False,
        force_jupyter=False,
        legacy_windows=False,
    )
    console.print(summary)
    return console


def _table(
    headings: Sequence[str],
    left: Iterable[int],
    sections: Iterable[Iterable[Sequence[RenderableType]]],
) -> Table:
    """A table with lines of plain ASCII.

    The columns in `left` are set to the left, and the others to the right.
    """
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


def _cells(
    row: Row | Total, name: str, leaves: str, dtype: str = "", status: str = ""
) -> list[RenderableType]:
    from rich.text import Text

    style = "green" if status == "trained" else ""
    cells = [name, leaves, dtype, f"{row.parameters:,}", _size(row.bytes), status]
    return [Text(cell, style) for cell in cells]


def _leaves_table(summary: Summary) -> Table:
    shown: list[tuple[int, list[RenderableType]]] = []
    hidden: list[list[RenderableType]] = []
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
        return [
            field.replace("_", " "),
            *(_size(getattr(memory, field)) for memory in columns.values()),
        ]

    sections = [["parameters", "gradients"]]
    if summary.memory.total is not None:
        sections = [["parameters", "gradients", "optimizer_state"], ["total"]]
    return _table(
        ["memory", *columns], left=(0,), sections=[map(cells, section) for section in sections]
    )


def _size(count: int | None) -> str:
    """Bytes as people read them: three digits and a unit."""
    if count is None:
        return "n/a"
    power = min(max(count.bit_length() - 1, 0) // 10, len(_UNITS) - 1)
    value = count / 1024**power
    if power == 0 or value >= 99.95:
        return f"{value:.0f} {_UNITS[power]}"
    digits = 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {_UNITS[power]}"
