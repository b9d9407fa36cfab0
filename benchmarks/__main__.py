"""The benchmark suite: `python -m benchmarks`, twenty minutes on two cores; `--quick`, two.

What holding a part of a model still costs, with this library and with its peers, as ratios to the
limit: a step written by hand for the trained part alone. All contenders run side by side in one
process, in turn. A full run rewrites the figures of the README and of `docs/`. It needs `pip
install -e '.[benchmarks]'`.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks import tables
from benchmarks.measures import elsewhere
from benchmarks.suite import PARTS, accelerator, full, quick, run

HERE = Path(__file__).parent
PAGES = [HERE.parent / "README.md", *sorted((HERE.parent / "docs").glob("*.md"))]


def show(results: dict[str, Any], console: Console) -> None:
    """All sections as tables, medians as ratios to the limit."""
    console.print(tables.environment(results), highlight=False)
    for key, section in results["sections"].items():
        table = Table(title=f"{key}: {section['title']}", title_justify="left")
        measures = tables.measured(section)
        for column in ("", *(tables.MEASURES[measure] for measure in measures)):
            table.add_column(column, justify="right" if column else "left")
        for row in tables.section_rows(section, measures):
            table.add_row(*row)
        console.print(table)
    table = Table(
        title="peak process memory: parameters and state, and what a step adds to them",
        title_justify="left",
    )
    for column in ("", "held", "added"):
        table.add_column(column, justify="right" if column else "left")
    for name, figures in results["memory"].items():
        table.add_row(name, *(tables.absolute("bytes", figures[key]) for key in ("held", "grown")))
    console.print(table)
    for way, found in results["communication"].items():
        table = Table(title=f"collectives on eight devices, {way}", title_justify="left")
        for column in ("", "collectives", "bytes"):
            table.add_column(column, justify="right" if column else "left")
        for name, figures in found.items():
            table.add_row(name, *map(str, figures.values()))
        console.print(table)
    blocks = (tables.models, tables.optimizers, tables.proofs, tables.fingerprints)
    blocks += (tables.thawing, tables.hoisting, tables.cached_rows)
    for block in blocks:
        if block.__name__ in results:
            console.print(block(results), highlight=False)


def progress(console: Console) -> Callable[[int], Callable[[str], None]]:
    """A bar on the terminal."""
    columns = (
        TextColumn("{task.description:60.60}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    bar = Progress(*columns, console=console, transient=True)

    def begin(amount: int) -> Callable[[str], None]:
        task = bar.add_task("", total=amount)
        bar.start()
        return lambda text: bar.update(task, advance=1, description=text)

    return begin


def main() -> None:
    """Measures, prints, and writes a JSON file and plots; the full run also the pages' figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="less than two minutes")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for results.json and the plots (default: benchmarks/results)",
    )
    parser.add_argument(
        "--readme",
        action="store_true",
        help="measure nothing: fill the README and docs/ from results.json again",
    )
    parser.add_argument(
        "--part", choices=PARTS, help="measure this alone anew, and keep the rest of results.json"
    )
    parser.add_argument(
        "--section",
        action="append",
        choices=[section.key for section in full().sections],
        help="measure this section alone anew, and keep the rest; it may be given several times",
    )
    parser.add_argument(
        "--accelerator",
        action="store_true",
        help="on a GPU or a TPU: measure what a leaf and a byte cost there, in a table of its own",
    )
    args = parser.parse_args()
    folder = args.out or (HERE / "quick" if args.quick else HERE / "results")
    folder.mkdir(parents=True, exist_ok=True)
    path, console = folder / "results.json", Console(width=180)
    if args.accelerator:
        found = run(accelerator(), progress(console))
        path.with_stem("accelerator").write_text(json.dumps(found, indent=1) + "\n")
        console.print(tables.accelerator({"accelerator": found}), highlight=False)
        return
    if args.section:
        anew = dataclasses.replace(full(), memory=[], communication=[], parts=[])
        anew = dataclasses.replace(
            anew, sections=[s for s in anew.sections if s.key in args.section]
        )
        results = json.loads(path.read_text())
        results["sections"] |= run(anew, progress(console))["sections"]
        path.write_text(json.dumps(results, indent=1) + "\n")
    elif args.part:
        results = json.loads(path.read_text()) | elsewhere(f"benchmarks.{args.part}")
        path.write_text(json.dumps(results, indent=1) + "\n")
    elif not args.readme:
        start = time.perf_counter()
        results = run(quick() if args.quick else full(), progress(console))
        results["minutes"] = round((time.perf_counter() - start) / 60, 1)
        path.write_text(json.dumps(results, indent=1) + "\n")
    results = json.loads(path.read_text())
    show(results, console)
    from benchmarks.plots import draw  # after the measurements, which it would only weigh down

    drawn = draw(results, folder)
    console.print(
        f"{results['minutes']} minutes; wrote {path}, {', '.join(map(str, drawn))}", highlight=False
    )
    if not args.quick and not args.out:
        results["accelerator"] = json.loads(path.with_stem("accelerator").read_text())
        for page in PAGES:
            page.write_text(tables.fill(page.read_text(), results))
        console.print("filled the figures of the README and of docs/")


if __name__ == "__main__":
    main()
