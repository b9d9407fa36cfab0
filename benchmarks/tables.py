"""The results as tables of ratios, on the terminal and in the README."""

import re
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
    "fo.jit": "**this library**, as in the first example",
    "fo.jit, optax.apply_updates": "with `optax.apply_updates`",
    "fo.value_and_grad": "with `jax.jit`",
    "fo.with_frozen": "with `jax.jit` and `jax.grad`",
    "chain(tx, fo.freeze)": "`optax.chain(tx, fo.freeze(...))`",
    "fo.restore": "`fo.restore` after the step",
    "chain(tx, optax.freeze)": "`optax.chain(tx, optax.freeze(...))`",
    "chain(masked(set_to_zero), tx)": "`optax.chain(optax.masked(set_to_zero(), ...), tx)`",
    "optax.selective_transform": "`optax.selective_transform`",
    "chain(clip, optax.selective_transform)": "`optax.selective_transform`, clipping outside of it",
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


def _bytes(value: float) -> str:
    return absolute("bytes", value)


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
    rows = [
        [re.sub(r"^(\S+)", r"`\1`", way), *(str(len(names[kind])) for kind in kinds)] for way, names in found.items()
    ]
    return _markdown(["", *kinds.values()], rows)


def scale(results: dict[str, Any]) -> str:
    """What changes with leaves and layers, and what it is on many devices."""
    sections, shown_names = results["sections"], ("fo.jit", "optax.selective_transform", "chain(tx, optax.freeze)")
    steps = {
        "step, 100 leaves": "leaves 100",
        "step, 10,000 leaves": "leaves 10000",
        "step, 100 MB, the first layer trained": "large first",
        "step, 100 MB, donated": "large donated",
        "step, 100 MB, `optax.MultiSteps`": "large accumulated",
        "step, `scan` over stacked layers with adapters": "scan",
        **{f"step, 1,000 leaves, {float(k.split()[1]):.1%} frozen": k for k in sections if k.startswith("share")},
    }
    lines = []
    for text, key in steps.items():
        known = sections[key]["contenders"]
        lines.append([text, *(shown(ratio(sections[key], n, "step") if n in known else None) for n in shown_names)])
    peak = {name: each["held"] + each["grown"] for name, each in results["memory"].items()}
    lines.append(["peak process memory, 100 MB", *(shown(peak[name] / peak["limit"]) for name in shown_names)])
    for way, found in results["communication"].items():
        each = (shown(found[name]["bytes"] / found["limit"]["bytes"]) for name in shown_names)
        lines.append([f"bytes communicated on 8 devices, {way}", *each])
    return _markdown(["", *(NAMES[name] for name in shown_names)], lines)


def models(results: dict[str, Any]) -> str:
    """Bytes on each of 256 devices."""
    rows = []
    for title, model in results["models"].items():
        count = f"{title}, {model['weights'] / 1e9:.1f} billion frozen, {model['trained'] / 1e6:.0f} million trained"
        for kind in ("kept", "donated"):
            for name, figures in model[kind].items():
                sizes = (figures["in"], figures["out"] - figures["aliased"])
                rows.append([count, f"{NAMES[name]}{', donated' * (kind == 'donated')}", *map(_bytes, sizes)])
    return _markdown(["", "", "parameters and state", "written anew at a step"], rows)


def fingerprints(results: dict[str, Any]) -> str:
    """What a fingerprint takes beside a plain read."""
    rows = [
        [
            f"`{dtype}`",
            f"{_median(each['fingerprint']) * 1e3:.0f} ms",
            shown(_median(each["fingerprint"]) / _median(each["read"])),
        ]
        for dtype, each in results["fingerprints"].items()
    ]
    return _markdown(["", "`fo.fingerprint` of 100 MB", "ratio to `jnp.sum`"], rows)


def proofs(results: dict[str, Any]) -> str:
    """What proofs take beside tracing what they are about."""
    rows = [
        [title, *(f"{_median(each[kind]):.2g} s" for kind in ("trace", "step", "update"))]
        for title, each in results["proofs"].items()
    ]
    return _markdown(["", "tracing the step", "`assert_step_freezes`", "`assert_update_freezes`"], rows)


def environment(results: dict[str, Any]) -> str:
    """Where the figures come from."""
    found = results["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return f"Measured with {versions}; {found['device']}, {found['cores']} cores, {found['processor']}."


BLOCKS = {
    block.__name__: block
    for block in (costs, clipped, ways, optimizers, scale, models, proofs, fingerprints, environment)
}


def fill(text: str, results: dict[str, Any]) -> str:
    """A text with each block between its two marks, `<!-- name -->` and `<!-- end -->`, made anew from the results."""
    for name, block in BLOCKS.items():
        start, end = f"<!-- {name} -->\n", "\n<!-- end -->"
        before, mark, rest = text.partition(start)
        if mark:
            text = before + start + "\n" + block(results) + "\n" + end + rest.partition(end)[2]
    return text
