"""The results as tables of ratios, on the terminal, in the README and in the pages of `docs/`."""

import re
from collections.abc import Iterable
from typing import Any

from benchmarks.contenders import LEGENDS
from benchmarks.measures import LOOP

Row = list[str]

MEASURES = {
    "trace": "trace",
    "compile": "lower + compile",
    "step": "step",
    "loop": f"step in a loop of {LOOP}",
    "flops": "FLOPs",
    "bytes accessed": "bytes accessed",
    "bytes out": "bytes out",
    "state": "optimizer state",
}
NAMES = {name: legend.title for name, legend in LEGENDS.items()}  # how the pages call them


def _median(value: Any) -> float:
    return value["median"] if isinstance(value, dict) else value


def ratio(section: dict[str, Any], name: str, measure: str) -> float | None:
    """A contender's figure over the limit's; None where there is no telling."""
    ours, limit = (_median(section["contenders"][each].get(measure, 0)) for each in (name, "limit"))
    return ours / limit if ours and limit else None


def shown(number: float | None) -> str:
    """A ratio in three digits or so."""
    if number is None:
        return "-"
    digits = 2 if number < 10 else 1 if number < 100 else 0
    return f"{number:.{digits}f}"


def measured(section: dict[str, Any], measures: Iterable[str] = MEASURES) -> list[str]:
    """Those measures that a section has: not each is taken everywhere, nor was it always."""
    return [measure for measure in measures if measure in section["contenders"]["limit"]]


def section_rows(section: dict[str, Any], measures: Iterable[str] = MEASURES) -> list[Row]:
    """A row for each contender: ratios in the columns, and seconds and bytes for the limit."""
    rows = []
    for name, figures in section["contenders"].items():
        if name == "limit":
            each = (absolute(measure, _median(figures[measure])) for measure in measures)
        else:
            each = (shown(ratio(section, name, measure)) for measure in measures)
        rows.append([name, *each])
    return rows


def absolute(measure: str, value: float) -> str:
    """A figure with its unit."""
    if measure in ("trace", "compile", "step", "loop"):
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


def _by_name(section: dict[str, Any], measures: Iterable[str]) -> dict[str, Row]:
    return {name: rest for name, *rest in section_rows(section, measures)}


def _leaves_and_bytes(
    results: dict[str, Any],
    of_leaves: Iterable[str],
    of_bytes: Iterable[str],
    names: Iterable[str] | None = None,
) -> str:
    """What a leaf costs, beside what its bytes cost; all contenders, or those of some names."""
    small, large = (results["sections"][key] for key in ("leaves 1000", "large last"))
    of_leaves, of_bytes = measured(small, of_leaves), measured(large, of_bytes)
    head = ["", *(f"1,000 leaves: {MEASURES[measure]}" for measure in of_leaves)]
    head += [f"100 MB: {MEASURES[measure]}" for measure in of_bytes]
    left, right = _by_name(small, of_leaves), _by_name(large, of_bytes)
    rows = [[name, *left[name], *right[name]] for name in names or left]
    return _markdown(head, _named(rows))


def short(results: dict[str, Any]) -> str:
    """The README's table: the limit, this library, optax's two ways, and no freezing at all."""
    of_bytes = ("bytes accessed", "state", "step")
    names = (
        "limit",
        "fo.jit",
        "optax.selective_transform",
        "chain(tx, optax.freeze)",
        "nothing frozen",
    )
    return _leaves_and_bytes(results, ("trace", "compile", "step"), of_bytes, names)


def costs(results: dict[str, Any]) -> str:
    """The main table: every contender."""
    of_leaves = ("trace", "compile", "step", "loop")
    of_bytes = ("flops", "bytes accessed", "bytes out", "state", "step", "loop")
    return _leaves_and_bytes(results, of_leaves, of_bytes)


def clipped(results: dict[str, Any]) -> str:
    """The same bytes, with clipping by global norm in the chain."""
    measures = ("flops", "bytes accessed", "bytes out", "step")
    rows = section_rows(results["sections"]["large clipped"], measures)
    return _markdown(["", *(MEASURES[m] for m in measures)], _named(rows))


def elements(results: dict[str, Any]) -> str:
    """Ten new rows of a table, by one array with the old ones or by two."""
    kept, donated = (results["sections"][key] for key in ("rows", "rows donated"))
    measures = ("state", "bytes accessed", "step")
    left, right = _by_name(kept, measures), _by_name(donated, measures[1:])
    head = ["", *(MEASURES[m] for m in measures)]
    head += [f"donated: {MEASURES[m]}" for m in measures[1:]]
    rows = _named([[name, *left[name], *right[name]] for name in left])
    rows[0][0] = "two arrays, chosen between at look-up, by hand"
    return _markdown(head, rows)


def ways(results: dict[str, Any]) -> str:
    """The three classical ways, beside no freezing at all."""
    measures = ("flops", "bytes accessed", "state")
    names = ("nothing frozen", "fo.restore", "chain(tx, fo.freeze)", "fo.with_frozen", "fo.jit")
    rows = _by_name(results["sections"]["large last"], measures)
    chosen = [[name, *rows[name]] for name in names]
    return _markdown(["", *(MEASURES[m] for m in measures)], _named(chosen))


def optimizers(results: dict[str, Any]) -> str:
    """How many optimizers each way of freezing fails."""
    kinds = {"moves": "frozen leaves move", "steered": "frozen gradients steer", "raises": "raises"}
    found = results["optimizers"]
    rows = [
        [re.sub(r"^(\S+)", r"`\1`", way), *(str(len(names[kind])) for kind in kinds)]
        for way, names in found.items()
    ]
    return _markdown(["", *kinds.values()], rows)


def scale(results: dict[str, Any]) -> str:
    """What changes with leaves and layers, and what it is on many devices."""
    sections = results["sections"]
    names = ("fo.jit", "optax.selective_transform", "chain(tx, optax.freeze)")

    def ratios(section: dict[str, Any], measure: str) -> Row:
        known = section["contenders"]
        return [shown(ratio(section, name, measure) if name in known else None) for name in names]

    steps = {
        "step, 100 leaves": "leaves 100",
        "step, 10,000 leaves": "leaves 10000",
        "step, 100 MB, the first layer trained": "large first",
        "step, 100 MB, donated": "large donated",
        "step, 100 MB, `optax.MultiSteps`": "large accumulated",
        "step, `scan` over stacked layers with adapters": "scan",
    }
    for key in sections:
        if key.startswith("share"):
            frozen = float(key.split()[1])
            steps[f"step, 1,000 leaves, {frozen:.1%} frozen"] = key
    rows = [[text, *ratios(sections[key], "step")] for text, key in steps.items()]
    donated = sections.get("leaves 1000 donated")
    if donated and measured(donated, ["loop"]):
        rows.append([f"{MEASURES['loop']}, 1,000 leaves, donated", *ratios(donated, "loop")])
    peak = {name: each["held"] + each["grown"] for name, each in results["memory"].items()}
    of_limit = (shown(peak[name] / peak["limit"]) for name in names)
    rows.append(["peak process memory, 100 MB", *of_limit])
    for way, found in results["communication"].items():
        of_limit = (shown(found[name]["bytes"] / found["limit"]["bytes"]) for name in names)
        rows.append([f"bytes communicated on 8 devices, {way}", *of_limit])
    return _markdown(["", *(NAMES[name] for name in names)], rows)


def models(results: dict[str, Any]) -> str:
    """Bytes on each of 256 devices."""
    rows = []
    for title, model in results["models"].items():
        frozen, trained = model["weights"] / 1e9, model["trained"] / 1e6
        count = f"{title}, {frozen:.1f} billion frozen, {trained:.0f} million trained"
        for kind, said in (("kept", ""), ("donated", ", donated")):
            for name, figures in model[kind].items():
                sizes = (figures["in"], figures["out"] - figures["aliased"])
                rows.append([count, f"{NAMES[name]}{said}", *map(_bytes, sizes)])
    return _markdown(["", "", "parameters and state", "written anew at a step"], rows)


def fingerprints(results: dict[str, Any]) -> str:
    """What a fingerprint takes beside a plain read."""
    rows = []
    for dtype, each in results["fingerprints"].items():
        ours, read = _median(each["fingerprint"]), _median(each["read"])
        rows.append([f"`{dtype}`", f"{ours * 1e3:.0f} ms", shown(ours / read)])
    return _markdown(["", "`fo.fingerprint` of 100 MB", "ratio to `jnp.sum`"], rows)


def cached_rows(results: dict[str, Any]) -> str:
    """What rows of a cache take beside numpy's indexing of the memory-mapped file."""
    rows = []
    for width, sizes in results["cached_rows"].items():
        for size, each in sizes.items():
            ours, raw = _median(each["cache"]), _median(each["memmap"])
            what = f"{size} rows of {int(width) / 1e3:.1f} KB"
            rows.append([what, f"{ours * 1e6:.0f} microseconds", shown(ours / raw)])
    return _markdown(["", "`cache[indices]`", "ratio to `numpy.memmap`"], rows)


def proofs(results: dict[str, Any]) -> str:
    """What proofs take beside tracing what they are about."""
    rows = [
        [title, *(f"{_median(each[kind]):.2g} s" for kind in ("trace", "step", "update"))]
        for title, each in results["proofs"].items()
    ]
    return _markdown(
        ["", "tracing the step", "`assert_step_freezes`", "`assert_update_freezes`"], rows
    )


def hoisting(results: dict[str, Any]) -> str:
    """What epochs take from a cache, made by hand or by `fo.hoist`, beside live ones."""
    titles = {"live": "live", "by hand": "cached by hand", "fo.hoist": "`fo.hoist`"}
    rows = []
    for trained, found in results["hoisting"].items():
        live = _median(found["live"]["epoch"])
        for name, title in titles.items():
            figures = found[name]
            prepare = _median(figures["prepare"]) if figures["prepare"] else 0.0
            epoch = _median(figures["epoch"])
            ten = prepare + 10 * epoch
            what = f"the last {trained} of 12" if int(trained) > 1 else "the last of 12"
            each = [f"{prepare * 1e3:.0f} ms", f"{epoch * 1e3:.0f} ms"]
            faster = f"{10 * live / ten:.1f} times"
            breaks = f"{prepare / (live - epoch):.1f}" if name != "live" else "-"
            kept = f"{figures['bytes']:,}" if name != "live" else "-"
            rows.append([what, title, *each, faster, breaks, kept])
    head = ["layers trained", "", "preparing", "an epoch", "ten epochs, as fast as live"]
    return _markdown([*head, "pays after epochs", "bytes an example"], rows)


def accelerator(results: dict[str, Any]) -> str:
    """What a step costs on an accelerator: by the leaf, by the byte, and donated."""
    found = results["accelerator"]
    small, large, donated = (
        found["sections"][key] for key in ("leaves 1000", "large last", "large donated")
    )
    columns = {
        "1,000 leaves: lower + compile": _by_name(small, ["compile"]),
        "1,000 leaves: step": _by_name(small, ["step"]),
        f"1,000 leaves: {MEASURES['loop']}": _by_name(small, ["loop"]),
        "1.6 GB: bytes accessed": _by_name(large, ["bytes accessed"]),
        "1.6 GB: step": _by_name(large, ["step"]),
        "1.6 GB: step, donated": _by_name(donated, ["step"]),
    }
    rows = [
        [name, *(column.get(name, ["-"])[0] for column in columns.values())]
        for name in small["contenders"]
    ]
    where = found["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    table = _markdown(["", *columns], _named(rows))
    return f"{table}\n\nMeasured with {versions}; {where['kind']}."


def thawing(results: dict[str, Any]) -> str:
    """What stages in one program take beside a program for each."""
    found = results["thawing"]
    titles = {
        "alone": "a program for each stage",
        "switch": "one program, stages as branches",
        "conditionally_mask": "one program, `optax.conditionally_mask`",
    }
    each_of = lambda name: [found[name]["compile"], *map(_median, found[name]["steps"])]
    limit, rows = each_of("alone"), []
    for name, title in titles.items():
        figures = each_of(name)
        if name == "alone":
            each = [f"{figures[0]:.2g} s", *(absolute("step", figure) for figure in figures[1:])]
        else:
            each = [shown(a / b) for a, b in zip(figures, limit, strict=True)]
        rows.append([title, *each])
    head = ["time of the processor", "lower + compile, all stages"]
    head += ["step: 1 of 24 layers", "step: 12 layers", "step: all"]
    return _markdown(head, rows)


def environment(results: dict[str, Any]) -> str:
    """Where the figures come from."""
    found = results["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    machine = f"{found['device']}, {found['cores']} cores, {found['processor']}"
    return f"Measured with {versions}; {machine}."


BLOCKS = {
    block.__name__: block
    for block in (
        short,
        costs,
        clipped,
        elements,
        ways,
        optimizers,
        scale,
        models,
        proofs,
        fingerprints,
        thawing,
        hoisting,
        cached_rows,
        accelerator,
        environment,
    )
}


def fill(text: str, results: dict[str, Any]) -> str:
    """A text with what is between two marks, `<!-- name -->` and `<!-- end -->`, made anew."""
    for name, block in BLOCKS.items():
        start, end = f"<!-- {name} -->\n", "<!-- end -->"
        before, mark, rest = text.partition(start)
        if mark:
            text = before + start + "\n" + block(results) + "\n\n" + end + rest.partition(end)[2]
    return text
