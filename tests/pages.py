"""The README and the pages of `docs/`, and the tables in them."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


def read(page):
    return (ROOT / page).read_text()


def section(page, heading):
    """What a page says under a heading of the second level."""
    return read(page).split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def table(page, heading):
    """The header of the first table under a heading, and its rows by their first cell."""
    lines = re.findall(r"^\|.*\|$", section(page, heading), re.M)
    header, _, *rows = map(cells, lines)
    return header, {row[0].strip("`"): row[1:] for row in rows}
