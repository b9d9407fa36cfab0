"""The benchmark suite measures what it says: contenders train alike, figures agree with paper, the README with both."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from rich.console import Console

import benchmarks.__main__ as command
from benchmarks import tables
from benchmarks.contenders import CONTENDERS, MOVES
from benchmarks.isolated import communication
from benchmarks.measures import compiling, nbytes, runner, spread, stepping
from benchmarks.plots import draw
from benchmarks.suite import PARTS, Plan, Section, clipped, full, quick, run, share, small
from benchmarks.workloads import require_products, scanned, unrolled

ROOT = Path(__file__).parent.parent
WORKLOADS = {
    "unrolled": lambda: unrolled(3, 8, 2, {1}, small_leaves=True),
    "kernels": lambda: unrolled(3, 8, 2, {2}, small_leaves=False),
    "scanned": lambda: scanned(3, 8, 2, 2),
}


def train(name, workload, donate=False):
    contender = CONTENDERS[name](workload, optax.adamw(1e-2))
    step, state = contender.compile_with(donate), contender.state
    state = jax.tree.map(lambda leaf: leaf.copy(), state)
    for _ in range(3):
        state = step(*state, *contender.constant, workload.batch)[: len(state)]
    return contender.whole(state)


@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.parametrize("name", CONTENDERS)
def test_contenders_train_alike_and_hold_still_what_they_freeze(name, workload):
    workload = WORKLOADS[workload]()
    whole, by_hand = train(name, workload), train("limit", workload)
    for key, group in workload.params.items():
        pairs = [(whole[key], by_hand[key])] if key in workload.trained else [(whole[key], group)]
        for ours, theirs in zip(*map(jax.tree.leaves, pairs[0]), strict=True):
            if key in workload.trained and name != "nothing frozen":
                np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
                assert not np.array_equal(ours, jax.tree.leaves(group)[0])
            elif key not in workload.trained and name not in MOVES:
                np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", [name for name in CONTENDERS if name != "limit"])
def test_contenders_can_be_donated(name):
    workload = WORKLOADS["unrolled"]()
    for ours, theirs in zip(*(jax.tree.leaves(train(name, workload, donate)) for donate in (True, False)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer", [lambda: optax.adamw(1e-3), clipped], ids=["adamw", "clipped"])
@pytest.mark.parametrize("workload", [lambda: unrolled(12, 64, 8, {11}, False), lambda: scanned(12, 64, 8, 4)])
def test_the_program_of_the_whole_library_is_that_of_the_limit(workload, optimizer):
    workload = workload()
    ours, limit = (compiling(CONTENDERS[n](workload, optimizer()), workload.batch)[1] for n in ("fo.jit", "limit"))
    for exactly in ("bytes out", "bytes in", "state"):
        assert ours[exactly] == limit[exactly]
    assert ours["bytes accessed"] <= 1.01 * limit["bytes accessed"]
    select = 6 * workload.trained_count  # where an update is zero the bits are kept: a comparison and a select
    assert limit["flops"] <= ours["flops"] <= limit["flops"] + select


@pytest.mark.parametrize("trained", [{0}, {5}, {11}, {3, 7}, set(range(12))])
@pytest.mark.parametrize("small_leaves", [True, False])
def test_the_matrix_products_agree_with_paper(trained, small_leaves):
    workload = unrolled(12, 128, 8, trained, small_leaves)

    def require(made_for):
        compiled, figures = compiling(CONTENDERS["limit"](made_for, optax.adamw(1e-3)), workload.batch)
        require_products(workload, compiled.as_text(), figures["flops"])

    require(workload)
    if trained == {11}:  # the last one by name, had the names not been padded, is the tenth
        with pytest.raises(ValueError, match=r"takes 13 matrix products.*compiled takes 15"):
            require(dataclasses.replace(workload, trained=frozenset({"layer_00009"})))


def test_no_frozen_gradient_is_communicated():
    found = communication(["limit", "fo.jit", "nothing frozen"])["parameters on each device"]
    trained = unrolled(4, 64, 64, {3}, small_leaves=True).part(trained=True)
    assert found["limit"]["bytes"] == nbytes(trained)
    assert found["fo.jit"] == found["limit"]
    assert found["nothing frozen"]["bytes"] == 4 * nbytes(trained)


def test_steps_go_on_from_each_other_in_turn():
    order = []
    runners = {name: lambda name=name: order.append(name) or float(len(order)) for name in "abc"}
    times = stepping(runners, 20)
    turns = ["".join(order[i : i + 6]) for i in range(0, len(order), 6)]
    assert len(turns) == 21
    assert all(turn[::2] == turn[1::2] and len(set(turn)) == 3 for turn in turns)
    assert len(set(turns)) > 3  # the order changes
    assert times["a"] == [1 + i for i in range(len(order)) if order[i] == "a" and i % 2 and i > 5]
    assert spread([1.0]) == {"median": 1, "low": 1, "high": 1, "runs": 1}
    workload = WORKLOADS["kernels"]()
    contender = CONTENDERS["limit"](workload, optax.adamw(1e-2))
    assert all(runner(contender, workload.batch, donate)() > 0 for donate in (True, False))


def test_a_small_plan_from_end_to_end(tmp_path, capsys):
    lean = ["limit", "fo.jit", "optax.selective_transform"]
    plan = Plan(
        [
            Section("leaves 1000", small(3), list(CONTENDERS), rounds=2),
            Section("large last", small(2), lean, compilations=2, rounds=2),
            Section("share 0.5", share(0.5, layers=4), lean, rounds=2, donate=True),
        ],
        memory=["fo.jit"],
        communication=["limit"],
        parts=[],
        width=16,
    )
    done = []
    results = json.loads(json.dumps(run(plan, lambda amount: done.append(amount) or done.append)))
    assert done[0] == len(done) - 1  # as much as was announced
    command.show(results, Console(width=150))
    shown = capsys.readouterr().out
    assert all(name in shown for name in [*CONTENDERS, "share 0.5", "peak process memory", "collectives"])
    assert all(path.stat().st_size > 10_000 for path in draw(results, tmp_path))


def test_the_full_plan_and_the_quick_one_name_contenders_that_exist():
    assert all(importlib.util.find_spec(f"benchmarks.{part}") for part in PARTS)
    for plan in (full(), quick()):
        assert set(plan.parts) <= set(PARTS)
        named = {*plan.memory, *plan.communication}.union(*(section.names for section in plan.sections))
        assert named <= set(CONTENDERS)
        assert set(CONTENDERS) | {"torch requires_grad_"} <= set(tables.NAMES) | {"kauldron partial_updates"}


def test_the_readme_holds_the_figures_of_the_last_full_run_and_no_others():
    results = json.loads((ROOT / "benchmarks" / "results" / "results.json").read_text())
    readme = (ROOT / "README.md").read_text()
    assert tables.fill(readme, results) == readme
    for name, block in tables.BLOCKS.items():
        assert f"<!-- {name} -->" in readme
        assert block(results) in readme
    emptied = readme.replace(tables.costs(results), "")
    assert tables.fill(emptied, results) == readme
