"""The results as pictures: what a step costs each contender, and how that grows."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from benchmarks.tables import MEASURES, ratio

COLOURS = {"fo.jit": "#1b7837", "optax.selective_transform": "#c2703d", "chain(tx, optax.freeze)": "#8c6bb1"}
LEFT_OUT = {"fo.jit, optax.apply_updates", "chain(tx, fo.freeze)", "chain(masked(set_to_zero), tx)", "limit"}


def _bars(axes: Any, section: dict[str, Any], measure: str, title: str) -> None:
    names = [name for name in section["contenders"] if name not in LEFT_OUT][::-1]
    values = [ratio(section, name, measure) or 0.0 for name in names]
    axes.barh(names, values, color=["#1b7837" if name.startswith("fo.") else "#b0b0b0" for name in names])
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlim(0.8, max([*values, 10]) * 1.6)
    axes.set_title(title, fontsize=10)
    for name, value in zip(names, values, strict=True):
        axes.text(value * 1.05, name, f"{value:.2f}" if value < 10 else f"{value:.0f}", va="center", fontsize=7)
    axes.tick_params(labelsize=8)


def costs(results: dict[str, Any], path: Path) -> None:
    """Every contender, as ratios to the limit."""
    small, large = (results["sections"].get(key) for key in ("leaves 1000", "large last"))
    shown = [(small, m, f"1,000 leaves: {MEASURES[m]}") for m in ("trace", "compile", "step")]
    shown += [(large, m, f"100 MB: {MEASURES[m]}") for m in ("step", "bytes accessed", "bytes out")]
    figure, grid = plt.subplots(2, 3, figsize=(13, 6.5), sharey="row", layout="constrained")
    for axes, (section, measure, title) in zip(grid.flat, shown, strict=True):
        _bars(axes, section, measure, title)
    figure.suptitle("Ratio to a step written by hand for the trained layer alone (logarithmic; 1 is the limit)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def growth(results: dict[str, Any], path: Path) -> None:
    """A step by the number of leaves, and by the share of them that is frozen, in milliseconds."""
    sections = results["sections"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axes, prefix, label in ((left, "leaves ", "leaves"), (right, "share ", "share of 1,000 leaves that is frozen")):
        keys = [key for key in sections if key.startswith(prefix)]
        for name in ("limit", *COLOURS):
            points = [
                (float(k.split()[1]), sections[k]["contenders"][name]["step"])
                for k in keys
                if name in sections[k]["contenders"]
            ]
            xs, steps = [x for x, _ in points], [step for _, step in points]
            middle = [step["median"] * 1e3 for step in steps]
            colour = COLOURS.get(name, "black")
            axes.plot(xs, middle, "o-", color=colour, label=name, markersize=4)
            axes.fill_between(
                xs, [s["low"] * 1e3 for s in steps], [s["high"] * 1e3 for s in steps], color=colour, alpha=0.2
            )
        axes.set_xlabel(label)
        axes.set_ylabel("ms a step (median, quartiles)")
        axes.set_yscale("log")
        axes.legend(fontsize=8)
    left.set_xscale("log")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """All pictures that the results suffice for."""
    paths = [folder / "costs.png"]
    costs(results, paths[0])
    if any(key.startswith("share ") for key in results["sections"]):
        paths.append(folder / "growth.png")
        growth(results, paths[1])
    return paths
