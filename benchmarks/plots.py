"""The results as pictures: what a step costs each contender, and how that grows."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from benchmarks.contenders import LEGENDS, Legend
from benchmarks.tables import MEASURES, ratio


def _bars(axes: Any, section: dict[str, Any], measure: str, title: str) -> None:
    names = [name for name in section["contenders"] if LEGENDS[name].bar][::-1]
    values = [ratio(section, name, measure) or 0.0 for name in names]
    axes.barh(names, values, color=[LEGENDS[name].colour for name in names])
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlim(0.8, max([*values, 10]) * 1.6)
    axes.set_title(title, fontsize=10)
    for name, value in zip(names, values, strict=True):
        text = f"{value:.2f}" if value < 10 else f"{value:.0f}"
        axes.text(value * 1.05, name, text, va="center", fontsize=7)
    axes.tick_params(labelsize=8)


def _line(axes: Any, legend: Legend, sections: dict[str, Any]) -> None:
    """Milliseconds a step of one contender, over the number that ends a section's key."""
    measured = {
        float(key.split()[1]): section["contenders"][legend.name]["step"]
        for key, section in sections.items()
        if legend.name in section["contenders"]
    }
    at = lambda quantile: [step[quantile] * 1e3 for step in measured.values()]
    style = {"color": legend.colour, "label": legend.name, "markersize": 4}
    axes.plot(list(measured), at("median"), "o-", **style)
    axes.fill_between(list(measured), at("low"), at("high"), color=legend.colour, alpha=0.2)


def costs(results: dict[str, Any], path: Path) -> None:
    """Every contender, as ratios to the limit."""
    small, large = (results["sections"].get(key) for key in ("leaves 1000", "large last"))
    shown = [(small, m, f"1,000 leaves: {MEASURES[m]}") for m in ("trace", "compile", "step")]
    shown += [(large, m, f"100 MB: {MEASURES[m]}") for m in ("step", "bytes accessed", "bytes out")]
    figure, grid = plt.subplots(2, 3, figsize=(13, 6.5), sharey="row", layout="constrained")
    for axes, (section, measure, title) in zip(grid.flat, shown, strict=True):
        _bars(axes, section, measure, title)
    title = "Ratio to a step written by hand for the trained layer alone"
    figure.suptitle(f"{title} (logarithmic; 1 is the limit)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def growth(results: dict[str, Any], path: Path) -> None:
    """A step by the number of leaves, and by the share of them that is frozen, in milliseconds."""
    sections = results["sections"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    halves = {
        "leaves ": (left, "leaves"),
        "share ": (right, "share of 1,000 leaves that is frozen"),
    }
    for prefix, (axes, label) in halves.items():
        growing = {key: each for key, each in sections.items() if key.startswith(prefix)}
        for legend in LEGENDS.values():
            if legend.line:
                _line(axes, legend, growing)
        axes.set_xlabel(label)
        axes.set_ylabel("ms a step (median, quartiles)")
        axes.set_yscale("log")
        axes.legend(fontsize=8)
    left.set_xscale("log")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def hoisting(results: dict[str, Any], path: Path) -> None:
    """Seconds by the number of epochs, live and from a cache; where they meet, the cache pays."""
    found = results["hoisting"]
    figure, grid = plt.subplots(1, len(found), figsize=(11, 4), layout="constrained")
    epochs = range(11)
    for axes, (trained, ways) in zip(grid, found.items(), strict=True):
        for name, figures in ways.items():
            begin = figures["prepare"]["median"] if figures["prepare"] else 0.0
            total = [begin + each * figures["epoch"]["median"] for each in epochs]
            axes.plot(epochs, total, "--" if name == "by hand" else "-", label=name)
        live, ours = ways["live"]["epoch"]["median"], ways["fo.hoist"]["epoch"]["median"]
        begin = ways["fo.hoist"]["prepare"]["median"]
        meet = begin / (live - ours)
        if meet > 0:
            axes.plot([meet], [meet * live], "ko", label=f"pays after {meet:.1f} epochs")
        layers = "layer" if trained == "1" else f"{trained} layers"
        axes.set_title(f"the last {layers} of 12 trained", fontsize=10)
        axes.set_xlabel("epochs")
        axes.set_ylabel("seconds, preparing counted")
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """All pictures that the results suffice for."""
    paths = [folder / "costs.png"]
    costs(results, paths[0])
    if any(key.startswith("share ") for key in results["sections"]):
        paths.append(folder / "growth.png")
        growth(results, paths[1])
    if "hoisting" in results:
        paths.append(folder / "hoisting.png")
        hoisting(results, paths[-1])
    return paths
