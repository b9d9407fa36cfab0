"""The benchmarks measure what they say: figures agree with paper, and the pages with figures."""

import dataclasses
import functools
import importlib.util
import json
import re
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from rich.console import Console

import benchmarks.__main__ as command
from benchmarks import tables
from benchmarks.contenders import CONTENDERS, OF_ROWS
from benchmarks.isolated import communication
from benchmarks.measures import compiling, nbytes, runner, spread, stepping
from benchmarks.plots import draw
from benchmarks.suite import (
    PARTS,
    Plan,
    Section,
    accelerator,
    clipped,
    full,
    quick,
    run,
    share,
    small,
)
from benchmarks.workloads import embedding, require_products, scanned, unrolled

ROOT = Path(__file__).parent.parent
WORKLOADS = {
    "unrolled": lambda: unrolled(3, 8, 2, {1}, small_leaves=True),
    "kernels": lambda: unrolled(3, 8, 2, {2}, small_leaves=False),
    "scanned": lambda: scanned(3, 8, 2, 2),
}


more = functools.partial(pytest.param, marks=pytest.mark.exhaustive)


def train(name, workload, donate=False):
    contender = CONTENDERS[name](workload, optax.adamw(1e-2))
    step, state = contender.compile_with(donate), contender.state
    state = jax.tree.map(lambda leaf: leaf.copy(), state)
    for _ in range(3):
        state = step(*state, *contender.constant, workload.batch)[: len(state)]
    return contender.whole(state)


@pytest.mark.parametrize("workload", ["unrolled", *map(more, ["kernels", "scanned"])])
@pytest.mark.parametrize("name", [n if n.startswith("fo.") else more(n) for n in CONTENDERS])
def test_contenders_train_alike_and_hold_still_what_they_freeze(name, workload):
    workload = WORKLOADS[workload]()
    whole, by_hand = train(name, workload), train("limit", workload)
    for key, group in workload.params.items():
        pairs = [(whole[key], by_hand[key])] if key in workload.trained else [(whole[key], group)]
        for ours, theirs in zip(*map(jax.tree.leaves, pairs[0]), strict=True):
            if key in workload.trained and name != "nothing frozen":
                np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
                assert not np.array_equal(ours, jax.tree.leaves(group)[0])
            elif key not in workload.trained and not CONTENDERS[name].moves:
                np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    "name", [n if n == "fo.jit" else more(n) for n in CONTENDERS if n != "limit"]
)
def test_contenders_can_be_donated(name):
    workload = WORKLOADS["unrolled"]()
    for ours, theirs in zip(
        *(jax.tree.leaves(train(name, workload, donate)) for donate in (True, False)), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("donate", [False, True])
def test_new_rows_of_a_table_train_alike_in_one_array_or_in_two(donate):
    workload, found = embedding(50, 8, 3), {}
    for contender in (CONTENDERS["limit"], *OF_ROWS):
        training = contender(workload, optax.adamw(1e-2))
        step, state = training.compile_with(donate), training.state
        state = jax.tree.map(lambda leaf: leaf.copy(), state)
        for _ in range(3):
            state = step(*state, *training.constant, workload.batch)[: len(state)]
        found[contender.name] = training.whole(state)
    for contender in OF_ROWS:
        ours, limit = found[contender.name], found["limit"]
        assert np.array_equal(ours["table"], limit["table"]) is not contender.moves
        if not contender.moves:
            np.testing.assert_allclose(ours["new"], limit["new"], rtol=1e-4, atol=1e-5)
    assert not np.array_equal(found["limit"]["new"], workload.params["new"])


@pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param(lambda: optax.adamw(1e-3), id="adamw", marks=pytest.mark.exhaustive),
        pytest.param(clipped, id="clipped"),
    ],
)
@pytest.mark.parametrize(
    "workload", [lambda: unrolled(12, 64, 8, {11}, False), lambda: scanned(12, 64, 8, 4)]
)
def test_the_program_of_the_whole_library_is_that_of_the_limit(workload, optimizer):
    workload = workload()
    ours, limit = (
        compiling(CONTENDERS[n](workload, optimizer()), workload.batch)[1]
        for n in ("fo.jit", "limit")
    )
    for exactly in ("bytes out", "bytes in", "state"):
        assert ours[exactly] == limit[exactly]
    # A GPU's compiler may lay down what an update is compared with: written once, and read once.
    constant = 0 if jax.default_backend() == "cpu" else 2 * 4 * workload.trained_count
    assert ours["bytes accessed"] <= 1.01 * limit["bytes accessed"] + constant
    # Where an update is zero the bits are kept: a comparison and a select.
    select = 6 * workload.trained_count
    assert limit["flops"] <= ours["flops"] <= limit["flops"] + select


@pytest.mark.parametrize("trained", [{0}, more({5}), {11}, more({3, 7}), more(set(range(12)))])
@pytest.mark.parametrize("small_leaves", [more(True), False])
def test_the_matrix_products_agree_with_paper(trained, small_leaves):
    workload = unrolled(12, 128, 8, trained, small_leaves)

    def require(made_for):
        compiled, figures = compiling(
            CONTENDERS["limit"](made_for, optax.adamw(1e-3)), workload.batch
        )
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
    long = {name: lambda steps=1, name=name: order.append((name, steps)) or 1.0 for name in "abc"}
    order.clear()
    assert stepping(long, 2, 100) == {name: [1.0] * 2 for name in "abc"}
    assert [steps for _, steps in order] == [1, 100] * 9
    assert spread([1.0]) == {"median": 1, "low": 1, "high": 1, "runs": 1}
    workload = WORKLOADS["kernels"]()
    contender = CONTENDERS["limit"](workload, optax.adamw(1e-2))
    assert all(runner(contender, workload.batch, donate)() > 0 for donate in (True, False))


@pytest.mark.parametrize("donate", [False, True])
def test_a_loop_is_as_many_steps_as_it_says(donate):
    workload, taken = WORKLOADS["kernels"](), []
    contender = CONTENDERS["limit"](workload, optax.adamw(1e-2))

    def compiler(step, **options):
        compiled = jax.jit(step, **options)
        return lambda *args: taken.append(compiled(*args)) or taken[-1]

    run = runner(dataclasses.replace(contender, compiler=compiler), workload.batch, donate)
    assert run(5) > 0
    assert run() > 0
    assert len(taken) == 6
    assert contender.optimizer_state(taken[-1])[0].count == 6  # each went on from the one before


@pytest.mark.exhaustive
def test_a_small_plan_from_end_to_end(tmp_path, capsys):
    lean = ["limit", "fo.jit", "optax.selective_transform"]
    plan = Plan(
        [
            Section(
                key="leaves 1000", workload=small(3), names=list(CONTENDERS), rounds=2, loops=1
            ),
            Section(
                key="leaves 1000 donated",
                workload=small(3),
                names=lean,
                rounds=2,
                loops=1,
                donate=True,
            ),
            Section(key="large last", workload=small(2), names=lean, compilations=2, rounds=2),
            Section(
                key="share 0.5", workload=share(0.5, layers=4), names=lean, rounds=2, donate=True
            ),
        ],
        memory=["fo.jit"],
        communication=["limit"],
        parts=[],
        width=16,
    )
    done = []
    results = json.loads(json.dumps(run(plan, lambda amount: done.append(amount) or done.append)))
    assert done[0] == len(done) - 1  # as much as was announced
    command.show(results, Console(width=180))
    shown = capsys.readouterr().out
    assert all(
        name in shown for name in [*CONTENDERS, "share 0.5", "peak process memory", "collectives"]
    )
    assert all(
        "loop" in results["sections"]["leaves 1000"]["contenders"][name] for name in CONTENDERS
    )
    assert all(path.stat().st_size > 10_000 for path in draw(results, tmp_path))


def test_a_measure_has_a_column_where_it_was_taken():
    figures = {
        "limit": dict.fromkeys(tables.MEASURES, 2.0),
        "fo.jit": dict.fromkeys(tables.MEASURES, 3.0),
    }
    without = {
        name: {key: value for key, value in each.items() if key != "loop"}
        for name, each in figures.items()
    }
    keys = {"leaves 1000": figures, "leaves 1000 donated": figures, "large last": without}
    sections = {key: {"contenders": contenders} for key, contenders in keys.items()}
    head, _, limit, ours = tables.costs({"sections": sections}).splitlines()
    assert head.count("step in a loop of 100") == 1
    assert limit.count("2e+03 ms") == 5
    assert ours.count("1.50") == head.count("|") - 2
    sections["leaves 1000"]["contenders"] = without
    assert "loop" not in tables.costs({"sections": sections})


def test_all_plans_name_contenders_that_exist():
    assert all(importlib.util.find_spec(f"benchmarks.{part}") for part in PARTS)
    for plan in (full(), quick(), accelerator()):
        assert set(plan.parts) <= set(PARTS)
        named = {*plan.memory, *plan.communication}.union(
            *(section.names for section in plan.sections)
        )
        assert named <= set(CONTENDERS)
        assert set(CONTENDERS) | {"torch requires_grad_"} <= set(tables.NAMES) | {
            "kauldron partial_updates"
        }


def test_the_pages_hold_the_figures_of_the_last_full_run():
    of_cpu, of_accelerator = (
        json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
        for name in ("results", "accelerator")
    )
    results = of_cpu | {"accelerator": of_accelerator}
    pages = [page.read_text() for page in command.PAGES]
    assert [tables.fill(page, results) for page in pages] == pages
    for name, block in tables.BLOCKS.items():
        (page,) = (page for page in pages if f"<!-- {name} -->" in page)
        assert block(results) in page
        emptied = page.replace(block(results), "")
        assert tables.fill(emptied, results) == page
        bare = page.replace(f"\n{block(results)}\n\n", "")  # two marks and nothing between them
        assert tables.fill(bare, results) == page
    marks = {mark for page in pages for mark in re.findall("<!-- (.*) -->", page)}
    assert marks == {*tables.BLOCKS, "end"}
