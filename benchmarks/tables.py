"""The results as tables of ratios, on the terminal and in the README."""

from collections.abc import Iterable
from typing import Any

Row = list[str]

MEASURES = {
    "trace": "trace",
    "compile": "lower + compile",
    "step": "step",
    "flops": "FLOPs",
    "bytes accessed": "bytes accessed",
    "bytes out": "bytes out",
    "state": "optimizer state",
}
NAMES = {  # how the README calls them
    "limit": "the limit, by hand",
    "fo.jit": "`fo.jit`, `fo.value_and_grad`, `fo.with_frozen`, `fo.apply_updates`",
    "fo.jit, optax.apply_updates": "the same with `optax.apply_updates`",
    "fo.value_and_grad": "the same with `jax.jit`",
    "fo.with_frozen": "`fo.with_frozen`, `jax.grad`, `jax.jit`",
    "chain(tx, fo.freeze)": "`optax.chain(tx, fo.freeze(...))`",
    "fo.restore": "`fo.restore` after the step",
    "chain(tx, optax.freeze)": "`optax.chain(tx, optax.freeze(...))`",
    "chain(masked(set_to_zero), tx)": "`optax.chain(optax.masked(set_to_zero(), ...), tx)`",
    "optax.selective_transform": "`optax.selective_transform`",
    "chain(clip, optax.selective_transform)": "the same, clipping outside of it",
    "eqx.partition": "Equinox, `eqx.partition`",
    "nnx.DiffState": "Flax NNX, `DiffState` and `wrt`",
    "kauldron partial_updates": "kauldron, `partial_updates`",
    "torch requires_grad_": "PyTorch, `requires_grad_(False)`",
    "nothing frozen": "nothing frozen",
}


def _median(value: Any) -> float:
    return value["median"] if isinstance(value, dict) else value


def ratio(section: dict[str, Any], name: str, measure: str) -> float | None:
    """A contender's figure over the limit's; None where there is no telling."""
    ours, limit = (_median(section["contenders"][each].get(measure, 0)) for each in (name, "limit"))
    return ours / limit if ours and limit else None


def shown(number: float | None) -> str:
    """A ratio in three digits or so."""
    return (
        "-"
        if number is None
        else f"{number:.2f}"
        if number < 10
        else f"{number:.1f}"
        if number < 100
        else f"{number:.0f}"
    )


def section_rows(section: dict[str, Any], measures: Iterable[str] = MEASURES) -> list[Row]:
    """A row for each contender, its ratios in the columns; the limit itself in seconds and bytes."""
    rows = []
    for name in section["contenders"]:
        figures = section["contenders"][name]
        if name == "limit":
            rows.append(["limit", *(absolute(measure, _median(figures[measure])) for measure in measures)])
        else:
            rows.append([name, *(shown(ratio(section, name, measure)) for measure in measures)])
    return rows


def absolute(measure: str, value: float) -> str:
    """A figure with its unit."""
    if measure in ("trace", "compile", "step"):
        return f"{value * 1e3:.3g} ms"
    prefixes = iter("KMGT")
    prefix = ""
    while value >= 1000:
        value, prefix = value / 1000, next(prefixes)
    return f"{value:.3g} {prefix}{'' if measure == 'flops' else 'B'}".rstrip()


def _markdown(head: Row, rows: list[Row]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines).replace("|  |", "| |")


def _named(rows: list[Row]) -> list[Row]:
    return [[NAMES[name], *rest] for name, *rest in rows]


def costs(results: dict[str, Any]) -> str:
    """The main table: what a leaf costs, and what its bytes cost."""
    small, large = (results["sections"][key] for key in ("leaves 1000", "large last"))
    times, bytes_ = ("trace", "compile", "step"), ("flops", "bytes accessed", "bytes out", "state", "step")
    head = ["", *(f"1,000 leaves: {MEASURES[m]}" for m in times), *(f"100 MB: {MEASURES[m]}" for m in bytes_)]
    left, right = section_rows(small, times), {name: rest for name, *rest in section_rows(large, bytes_)}
    return _markdown(head, _named([[name, *rest, *right[name]] for name, *rest in left]))


def clipped(results: dict[str, Any]) -> str:
    """The same bytes, with clipping by global norm in the chain."""
    measures = ("flops", "bytes accessed", "bytes out", "step")
    rows = section_rows(results["sections"]["large clipped"], measures)
    return _markdown(["", *(MEASURES[m] for m in measures)], _named(rows))


def ways(results: dict[str, Any]) -> str:
    """The three classical ways, beside no freezing at all."""
    measures, names = ("flops", "bytes accessed", "state"), ("nothing frozen", "fo.restore", "chain(tx, fo.freeze)")
    rows = {name: rest for name, *rest in section_rows(results["sections"]["large last"], measures)}
    chosen = [[name, *rows[name]] for name in (*names, "fo.with_frozen", "fo.jit")]
    return _markdown(["", *(MEASURES[m] for m in measures)], _named(chosen))


def optimizers(results: dict[str, Any]) -> str:
    """How many optimizers each way of freezing fails."""
    kinds = {"moves": "frozen leaves move", "steered": "frozen gradients steer", "raises": "raises"}
    found = results["optimizers"]
    rows = [[f"`{way}`", *(str(len(names[kind])) for kind in kinds)] for way, names in found.items()]
    return _markdown(["", *kinds.values()], rows)


def scale(results: dict[str, Any]) -> str:
    """What changes with leaves and layers, and what it is on many devices."""
    sections, today = results["sections"], "optax.selective_transform"
    rows = [
        ("step, 100 leaves", "leaves 100", "step"),
        ("step, 10,000 leaves", "leaves 10000", "step"),
        ("lower + compile, 10,000 leaves", "leaves 10000", "compile"),
        ("step, 100 MB, the first layer trained", "large first", "step"),
        ("step, 100 MB, donated", "large donated", "step"),
        ("step, 100 MB, `optax.MultiSteps`", "large accumulated", "step"),
        ("step, `scan` over stacked layers with adapters", "scan", "step"),
        *(
            (f"step, 1,000 leaves, {float(key.split()[1]):.1%} frozen", key, "step")
            for key in sections
            if "share" in key
        ),
    ]
    lines = [
        [text, *(shown(ratio(sections[key], name, measure)) for name in ("fo.jit", today))]
        for text, key, measure in rows
    ]
    grown = results["memory"]
    peak = lambda name: (grown[name]["held"] + grown[name]["grown"]) / sum(grown["limit"].values())
    lines.append(["peak process memory, 100 MB", shown(peak("fo.jit")), shown(peak(today))])
    for way, found in results["communication"].items():
        less = lambda name, found=found: shown(found[name]["bytes"] / found["limit"]["bytes"])
        lines.append([f"bytes communicated, 8 devices, {way}", less("fo.jit"), less(today)])
    return _markdown(["", NAMES["fo.jit"], NAMES[today]], lines)


def models(results: dict[str, Any]) -> str:
    """Bytes on each of 256 devices."""
    rows = []
    for title, model in results["models"].items():
        for kind in ("kept", "donated"):
            for name, figures in model[kind].items():
                new = figures["out"] - figures["aliased"]
                what = f"{NAMES[name]}{', donated' if kind == 'donated' else ''}"
                rows.append([title, what, *(absolute("bytes", v) for v in (figures["in"], new, figures["temporary"]))])
    return _markdown(["", "", "parameters and state", "written anew", "temporary"], rows)


def environment(results: dict[str, Any]) -> str:
    """Where the figures come from."""
    found = results["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return f"Measured with {versions}; {found['device']}, {found['cores']} cores, {found['processor']}."


BLOCKS = {block.__name__: block for block in (costs, clipped, ways, optimizers, scale, models, environment)}


def fill(text: str, results: dict[str, Any]) -> str:
    """A text with each block between its two marks, `<!-- name -->` and `<!-- end -->`, made anew from the results."""
    for name, block in BLOCKS.items():
        start, end = f"<!-- {name} -->\n", "\n<!-- end -->"
        before, mark, rest = text.partition(start)
        if mark:
            text = before + start + "\n" + block(results) + "\n" + end + rest.partition(end)[2]
    return text
