"""Which workloads are measured, with which contenders, and how often."""

import dataclasses
import importlib
import importlib.util
import os
import platform
import time
from collections.abc import Callable
from typing import Any

import chex
import equinox
import flax
import jax
import optax

from benchmarks.contenders import (
    CLIPPED_OUTSIDE,
    CONTENDERS,
    OF_ROWS,
    TORCH,
    Contender,
    adamw,
)
from benchmarks.measures import LOOP, Figures, compiling, elsewhere, runner, spread, stepping
from benchmarks.workloads import Workload, embedding, require_products, scanned, unrolled

LEAN = [
    "limit",
    "fo.jit",
    "fo.value_and_grad",
    "fo.with_frozen",
    "chain(tx, optax.freeze)",
    "optax.selective_transform",
]
FAST = ["limit", "fo.jit", "fo.value_and_grad", "optax.selective_transform"]
FEW = ["limit", "fo.jit", "optax.selective_transform"]
TIMES = ("trace", "compile", "step")
PATIENCE = 2.0  # seconds to compile, above which it is measured once
# What modules of this package measure in their own process, and can measure anew by themselves.
PARTS = {
    "models": "models of 70 and 671 billion weights, compiled ahead of time",
    "claims": "every optimizer, step by step",
    "fingerprints": "fingerprints",
    "cached_rows": "rows of a cache",
    "proofs": "proofs",
    "thawing": "thawing in stages",
    "hoisting": "the frozen part computed once",
}


def clipped() -> optax.GradientTransformation:
    """The same behind clipping by global norm."""
    return optax.chain(optax.clip_by_global_norm(1.0), adamw())


def accumulated() -> optax.GradientTransformation:
    """The same once in four steps."""
    return optax.MultiSteps(adamw(), 4).gradient_transformation()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """One workload, and how its contenders are measured."""

    key: str
    workload: Callable[[], Workload]
    names: list[str]
    compilations: int = 1
    rounds: int = 20
    loops: int = 0  # rounds of many steps with one wait at the end
    optimizer: Callable[[], optax.GradientTransformation] = adamw
    more: tuple[Contender, ...] = ()  # that make sense in this section alone
    donate: bool = False
    reference: bool = False  # PyTorch beside it, where it is installed


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that one run measures."""

    sections: list[Section]
    memory: list[str]
    communication: list[str]
    parts: list[str]  # of PARTS
    width: int = 1024  # of the layers whose memory is measured


def small(layers: int, trained: set[int] | None = None) -> Callable[[], Workload]:
    """Layers whose arithmetic is nothing: what is measured is what each leaf costs."""
    return lambda: unrolled(layers, 8, 2, trained or {layers - 1}, small_leaves=True)


def large(trained: set[int], layers: int = 24, width: int = 1024) -> Callable[[], Workload]:
    """Kernels of 4 MB, 100 MB in all."""
    return lambda: unrolled(layers, width, 8, trained, small_leaves=False)


def share(frozen: float, layers: int = 1000) -> Callable[[], Workload]:
    """A leaf a layer, of which a share is frozen, from the first one on."""
    first = min(layers - 1, round(layers * frozen))
    return lambda: unrolled(layers, 8, 2, set(range(first, layers)), small_leaves=False)


SHARES = (0, 0.5, 0.9, 0.99, 0.999)


def full() -> Plan:
    """Everything, in about twenty minutes on two cores."""
    everyone = list(CONTENDERS)
    last = large({23})
    sections = [
        Section(
            key="leaves 100",
            workload=small(25),
            names=everyone,
            compilations=3,
            rounds=100,
            reference=True,
        ),
        Section(
            key="leaves 1000",
            workload=small(250),
            names=everyone,
            compilations=3,
            rounds=60,
            loops=7,
            reference=True,
        ),
        Section(
            key="leaves 1000 donated",
            workload=small(250),
            names=[*FAST, "fo.nnx_jit", "nnx.DiffState"],
            rounds=40,
            loops=7,
            donate=True,
        ),
        Section(key="leaves 10000", workload=small(2500), names=FEW, rounds=15),
        Section(
            key="large last",
            workload=last,
            names=everyone,
            compilations=3,
            rounds=30,
            loops=3,
            reference=True,
        ),
        Section(key="large middle", workload=large({12}), names=LEAN),
        Section(key="large first", workload=large({0}), names=LEAN),
        Section(
            key="large clipped",
            workload=last,
            names=everyone,
            optimizer=clipped,
            more=(CLIPPED_OUTSIDE,),
        ),
        Section(
            key="large donated",
            workload=last,
            names=[*LEAN, "fo.nnx_jit", "nnx.DiffState"],
            donate=True,
        ),
        Section(key="large accumulated", workload=last, names=LEAN, optimizer=accumulated),
        Section(
            key="scan",
            workload=lambda: scanned(24, 512, 8, 8),
            names=everyone,
            compilations=3,
        ),
    ]
    for donate in (False, True):
        of_rows = Section(
            key="rows donated" if donate else "rows",
            workload=lambda: embedding(50_000, 256, 10),
            names=["limit"],
            more=OF_ROWS,
            optimizer=clipped,
            rounds=30,
            donate=donate,
        )
        sections.append(of_rows)
    shares = [
        Section(key=f"share {frozen}", workload=share(frozen), names=FEW) for frozen in SHARES
    ]
    return Plan(
        sections=[*sections, *shares],
        memory=[*LEAN, "eqx.partition", "nnx.DiffState", "nothing frozen"],
        communication=everyone,
        parts=list(PARTS),
    )


def quick() -> Plan:
    """What decides, in less than two minutes on two cores."""
    last = large({23})
    sections = [
        Section(
            key="leaves 100",
            workload=small(25),
            names=list(CONTENDERS),
            compilations=3,
            rounds=60,
            reference=True,
        ),
        Section(
            key="leaves 1000",
            workload=small(250),
            names=FAST,
            compilations=3,
            rounds=40,
            loops=3,
        ),
        Section(key="large last", workload=last, names=LEAN, rounds=15, reference=True),
        Section(key="large clipped", workload=last, names=LEAN, rounds=10, optimizer=clipped),
    ]
    return Plan(
        sections=sections,
        memory=FEW,
        communication=LEAN,
        parts=[],
    )


def accelerator() -> Plan:
    """What leaves and bytes cost on a GPU or a TPU: kernels of 67 MB, 1.6 GB in all."""
    names = [*LEAN, "nothing frozen", "fo.nnx_jit", "nnx.DiffState"]
    sections = [
        Section(key="leaves 1000", workload=small(250), names=names, rounds=40, loops=5),
        Section(key="large last", workload=large({23}, width=4096), names=names, rounds=40),
        Section(
            key="large donated",
            workload=large({23}, width=4096),
            names=[name for name in names if name != "nothing frozen"],
            rounds=40,
            donate=True,
        ),
    ]
    return Plan(sections=sections, memory=[], communication=[], parts=[])


def environment() -> dict[str, Any]:
    """Versions and machine."""
    with open("/proc/cpuinfo") as info:
        models = {line.split(":")[1].strip() for line in info if line.startswith("model name")}
    modules = {"jax": jax, "optax": optax, "flax": flax, "equinox": equinox, "chex": chex}
    return {
        "versions": {"python": platform.python_version()}
        | {name: m.__version__ for name, m in modules.items()},
        "device": jax.devices()[0].platform,
        "kind": jax.devices()[0].device_kind,
        "machine": platform.machine(),
        "processor": ", ".join(sorted(models)),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
    }


def measure(section: Section, advance: Callable[[str], None]) -> dict[str, Any]:
    """The figures of each contender of a section."""
    workload = section.workload()
    makers = {name: CONTENDERS[name] for name in section.names}
    makers |= {contender.name: contender for contender in section.more}
    trainings = {name: make(workload, section.optimizer()) for name, make in makers.items()}
    compilations: dict[str, list[Figures]] = {name: [] for name in makers}
    for _ in range(section.compilations):
        for name, training in trainings.items():
            advance(f"{section.key}: compile {name}")
            if compilations[name] and compilations[name][0]["compile"] > PATIENCE:
                continue
            compiled, figures = compiling(training, workload.batch, section.donate)
            compilations[name].append(figures)
            if name == "limit":
                require_products(workload, compiled.as_text(), figures["flops"])
    runners = {
        name: runner(training, workload.batch, section.donate)
        for name, training in trainings.items()
    }
    loops = stepping(runners, section.loops, LOOP) if section.loops else {}
    advance(f"{section.key}: loop")
    if section.reference and importlib.util.find_spec("torch"):
        torch_reference = importlib.import_module("benchmarks.torch_reference")
        runners[TORCH.name] = torch_reference.runner(workload)
    steps = stepping(runners, section.rounds)
    advance(f"{section.key}: step")
    table: dict[str, Any] = {name: {"step": spread(times)} for name, times in steps.items()}
    for name, times in loops.items():
        table[name]["loop"] = spread(times)
    for name, runs in compilations.items():
        last = runs[-1]
        table[name] |= {key: value for key, value in last.items() if key not in TIMES}
        table[name] |= {key: spread(run[key] for run in runs) for key in ("trace", "compile")}
    return {"title": workload.title, "contenders": table}


def _amount(plan: Plan) -> int:
    each = [(len(s.names) + len(s.more)) * s.compilations + 2 for s in plan.sections]
    return sum(each) + len(plan.memory) + 1 + len(plan.parts)


def run(plan: Plan, progress: Callable[[int], Callable[[str], None]]) -> dict[str, Any]:
    """Measures all of a plan; `progress` is told how much there is to do, and then what is done."""
    advance = progress(_amount(plan))
    results: dict[str, Any] = {"environment": environment(), "sections": {}}
    for section in plan.sections:
        start = time.perf_counter()
        results["sections"][section.key] = measure(section, advance)
        results["sections"][section.key]["seconds"] = round(time.perf_counter() - start)
    results["memory"] = {}
    for name in plan.memory:
        results["memory"][name] = elsewhere(
            "benchmarks.isolated", "memory", name, "--width", str(plan.width)
        )
        advance(f"memory: {name}")
    if plan.communication:
        results["communication"] = elsewhere(
            "benchmarks.isolated", "communication", *plan.communication
        )
    advance("communication")
    for part in plan.parts:
        advance(PARTS[part])
        results |= elsewhere(f"benchmarks.{part}")
    return results
