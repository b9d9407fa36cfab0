"""Staged thawing: a schedule of groups, and what each group's optimizer sees."""

import functools
import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from helpers import assert_same_bits

import frozen_optax as fo
from benchmarks.catalogue import EXTRA_ARGS, NAMES, extra_args, make

STARTS = {"head": 0, "encoder/layer_1": 2, "encoder/layer_0": 4}


def make_params() -> dict[str, Any]:
    kernel = jax.random.normal(jax.random.key(0), (3, 3))
    return {
        "embed": jnp.array([-0.0, 1e-45, 2.0]),
        "encoder": {"layer_0": {"w": kernel + 1}, "layer_1": {"w": kernel + 2}},
        "head": {"b": jnp.array([1.0, -1.0, 0.5]), "w": kernel},
    }


def gradients(step: int, params: Any) -> Any:
    """Something that hangs on the step and on the parameters, leaf by leaf."""
    return jax.tree.map(lambda leaf: jnp.sin(leaf + step) + 0.1, params)


def run(stages: Any, steps: int, optimizer: Any, before: Any = None) -> list[Any]:
    """The parameters before each step and after the last one, op by op."""
    params, state, taken = make_params(), None, []
    for stage in stages:
        tx = stage.optimizer(lambda group, start: optimizer(), before)
        state = fo.transfer_state(state, tx.init(params))
        for step in range(stage.start, min(steps, stage.stop or steps)):
            taken.append(params)
            updates, state = tx.update(gradients(step, params), state, params)
            params = fo.apply_updates(params, updates)
    return [*taken, params]


def group_of(params: Any, key: str) -> Any:
    for name in key.split("/"):
        params = params[name]
    return params


def bits(tree: Any) -> dict[str, Any]:
    name = lambda path: jax.tree_util.keystr(path)
    return {name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


# --- the schedule


def test_stages_follow_one_another() -> None:
    stages = fo.stages(STARTS, stop=6)
    assert [(stage.start, stage.stop) for stage in stages] == [(0, 2), (2, 4), (4, 6)]
    assert [stage.groups for stage in stages] == [
        ("head",),
        ("head", "encoder/layer_1"),
        ("head", "encoder/layer_1", "encoder/layer_0"),
    ]
    assert [stages.at(step).start for step in range(6)] == [0, 0, 2, 2, 4, 4]
    assert fo.stages(STARTS)[-1].stop is None
    assert fo.stages(STARTS).at(10**9).start == 4
    for step in (-1, 6):
        with pytest.raises(ValueError, match=f"step {step} is in no stage: .* 0 to step 5"):
            stages.at(step)
    with pytest.raises(ValueError, match=r"a step is an integer, found 2\.0"):
        stages.at(2.0)
    assert stages.at(np.int64(2)).start == 2


def test_a_group_is_frozen_again_at_the_end_of_its_pair() -> None:
    stages = fo.stages({"head": (0, 2), "encoder": 2, "embed": (1, 3)})
    assert [(stage.start, stage.stop, stage.groups) for stage in stages] == [
        (0, 1, ("head",)),
        (1, 2, ("head", "embed")),
        (2, 3, ("encoder", "embed")),
        (3, None, ("encoder",)),
    ]
    stages = fo.stages({"head": (0, 2), "encoder": (2, 5)})
    assert [(stage.start, stage.stop) for stage in stages] == [(0, 2), (2, 5)]


def test_a_stage_says_what_is_frozen_to_every_tool() -> None:
    params = make_params()
    stage = fo.stages(STARTS)[1]
    assert stage.frozen.paths(params) == ["embed", "encoder/layer_0/w"]
    assert stage.labels(params) == {
        "embed": "frozen",
        "encoder": {"layer_0": {"w": "frozen"}, "layer_1": {"w": "encoder/layer_1"}},
        "head": {"b": "head", "w": "head"},
    }
    tx = stage.optimizer(lambda group, start: optax.adamw(0.1))

    @fo.jit(frozen=tx, where=lambda both: both[0])
    def step(both: Any) -> Any:
        params, state = both
        updates, state = tx.update(fo.grad(total, tx)(params), state, params)
        return fo.apply_updates(params, updates), state

    def total(params: Any) -> Any:
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))

    both = params, tx.init(params)
    fo.assert_step_freezes(step, both, frozen=tx, where=lambda both: both[0], exact=True)
    fo.assert_update_freezes(tx, params, tx)
    after, _ = step(both)
    fo.assert_frozen(params, after, stage.frozen)
    everything = fo.stages(dict.fromkeys(["embed", "encoder", "head"], 0))[0]
    assert everything.frozen.paths(params) == []


def test_groups_of_any_kind() -> None:
    params = make_params()
    bias = fo.by_path("**/b")
    kernel = re.compile("head/w")
    small = lambda path, leaf: path == "embed"
    stages = fo.stages({bias: 0, kernel: 1, small: 2})
    assert stages[2].groups == (bias, kernel, small)
    assert stages[2].frozen.paths(params) == ["encoder/layer_0/w", "encoder/layer_1/w"]
    assert stages[0].labels(params)["head"] == {"b": "by_path('**/b')", "w": "frozen"}
    made = []
    stages[1].optimizer(lambda *given: made.append(given) or optax.sgd(0.1)).init(params)
    assert made == [(bias, 0), (kernel, 1)]


def test_groups_without_a_name_are_told_apart_by_number() -> None:
    kernel, bias = (lambda name: lambda path, leaf: path == name)("head/w"), lambda path, leaf: (
        path == "head/b"
    )  # fmt: skip
    stages = fo.stages({kernel: 0, "embed": 1, functools.partial(named, "head/b"): 2, bias: (2, 3)})
    assert stages[0].labels({"head": {"w": 1.0, "b": 2.0}, "embed": 3.0}) == {
        "head": {"w": "group 0", "b": "frozen"},
        "embed": "frozen",
    }


def named(name: str, path: str, leaf: Any) -> bool:
    return path == name


def test_a_group_may_name_a_function_of_a_module() -> None:
    key = jax.random.key(0)
    layers = [
        eqx.nn.Linear(2, 2, key=key),
        eqx.nn.Lambda(jax.nn.relu),
        eqx.nn.Linear(2, 2, key=key),
    ]
    model = eqx.nn.Sequential(layers)
    stages = fo.stages({("layers/1", "layers/2"): 0, "layers/0": 2}, stop=4)
    tx = stages[0].optimizer(lambda *_: optax.sgd(0.1))
    grads = fo.grad(lambda model: jnp.sum(model(jnp.ones(2))), tx)(model)
    updates, _ = tx.update(grads, tx.init(model), model)
    after = eqx.apply_updates(model, updates)
    fo.assert_frozen(model, after, "layers/0")
    assert not np.array_equal(after.layers[2].bias, model.layers[2].bias)
    assert stages[0].labels(model).layers[1].fn == "frozen"


@pytest.mark.parametrize(
    ("starts", "stop", "message"),
    [
        ({}, None, "at least one group"),
        ({"head": -1}, None, r"'head' has the step -1"),
        ({"head": 0.5}, None, r"'head' has the step 0\.5"),
        ({"head": True}, None, r"'head' has the step True"),
        ({"head": (0, None)}, None, r"'head' has the step None\. A step is an integer"),
        ({"head": 0}, -3, r"the argument stop has the step -3"),
        ({"head": (0, 1, 2)}, None, r"'head' has \(0, 1, 2\), expected one step or a pair"),
        ({"head": (3, 3)}, None, r"'head' is to train from step 3 to step 3"),
        ({"head": (3, 2)}, None, r"'head' is to train from step 3 to step 2"),
        ({"head": 2}, None, "nothing trains from step 0 to step 2"),
        ({"head": (0, 2), "encoder": 4}, None, "nothing trains from step 2 to step 4"),
        ({"head": (0, 2)}, 4, "nothing trains from step 2 to step 4"),
        ({"head": 0, "encoder": 5}, 5, "'encoder' would begin at step 5 and never train"),
        ({"frozen": 0}, None, "cannot be called 'frozen'"),
        ({"by_path('head')": 0, fo.by_path("head"): 1}, None, "two groups are called"),
    ],
)
def test_a_schedule_that_cannot_be_is_an_error(starts: Any, stop: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fo.stages(starts, stop)


def test_a_group_that_is_nothing_or_overlaps_is_an_error_at_once() -> None:
    params = make_params()
    adam = lambda group, start: optax.adam(0.1)
    first = fo.stages({"head": 0, "decoder": 9})[0]  # not only in the stage in which it begins
    with pytest.raises(ValueError, match=r"'decoder'\) selects nothing"):
        first.optimizer(adam).init(params)
    first = fo.stages({"head": 0, "**/w": 9})[0]
    with pytest.raises(ValueError, match=r"'head' and '\*\*/w' overlap, at 'head/w'"):
        first.optimizer(adam).init(params)
    with pytest.raises(ValueError, match="overlap"):
        first.frozen.mask(params)
    with pytest.raises(TypeError, match="cannot select leaves by 3"):
        fo.stages({3: 0})
    with pytest.raises(
        ValueError, match=r"leave it out of one, by_path\('\*\*'\) & ~by_path\('head"
    ):
        fo.stages({"head": 0, "**": 1})[0].frozen.mask(params)


def test_what_is_no_schedule_and_no_way_to_make_optimizers_is_told() -> None:
    with pytest.raises(TypeError, match=r"stages take a dict, such as .*found .*list"):
        fo.stages([("head", 0), ("encoder", 5)])
    with pytest.raises(TypeError, match=r"takes a function of a group and the step.*lambda group"):
        fo.stages({"head": 0})[0].optimizer(optax.adam(0.1))


# --- what is trained

# Those with extra arguments are called by `optax.partition` with those of the whole tree.
# `lookahead` trains a pair of trees, which `optax.partition` does not take apart.
USUAL = {"adam", "adamw", "chain", "polyak_sgd"}  # the chain clips by the norm of its group
ALONE = [name for name in NAMES if name not in {*EXTRA_ARGS, "lookahead"}]


@pytest.mark.parametrize(
    "name",
    [name if name in USUAL else pytest.param(name, marks=pytest.mark.exhaustive) for name in ALONE],
)
def test_a_thawed_group_is_trained_as_if_alone(name: str) -> None:
    optimizer = lambda: make(name)
    taken = run(fo.stages(STARTS), 6, optimizer)
    for key, start in STARTS.items():
        untouched = bits(group_of(make_params(), key))
        for params in taken[: start + 1]:
            assert_same_bits(bits(group_of(params, key)), untouched)
        params = group_of(make_params(), key)
        state = optimizer().init(params)
        for step in range(start, 6):
            updates, state = optimizer().update(gradients(step, params), state, params)
            params = optax.apply_updates(params, updates)
            assert_same_bits(bits(group_of(taken[step + 1], key)), bits(params))
    for params in taken:
        assert_same_bits(bits(params["embed"]), bits(make_params()["embed"]))


def squares(params: Any) -> Any:
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves((params["encoder"], params["head"])))


def run_on_losses(make_tx: Any, name: str) -> list[Any]:
    """As `run`, for optimizers that are told more than gradients."""
    params, state, taken = make_params(), None, []
    for stage in fo.stages(STARTS, stop=6):
        tx = make_tx(stage)
        state = fo.transfer_state(state, tx.init(params))
        for _ in range(stage.start, stage.stop):
            taken.append(params)
            grads = fo.grad(squares, tx)(params)
            more = extra_args(name, squares, params, grads)
            updates, state = tx.update(grads, state, params, **more)
            params = fo.apply_updates(params, updates)
    return [*taken, params]


def assert_still_until_their_start(taken: list[Any]) -> None:
    for key, start in STARTS.items():
        untouched = bits(group_of(make_params(), key))
        for params in taken[: start + 1]:
            assert_same_bits(bits(group_of(params, key)), untouched)
        for before, after in zip(
            untouched.values(), bits(group_of(taken[-1], key)).values(), strict=True
        ):
            assert not np.array_equal(before, after)


# A line search needs the loss of all that it moves: it is no optimizer of one group.
SEARCHES = ["lbfgs", "scale_by_backtracking_linesearch", "scale_by_zoom_linesearch"]


@pytest.mark.parametrize(
    "name",
    [
        name if name in USUAL else pytest.param(name, marks=pytest.mark.exhaustive)
        for name in EXTRA_ARGS
        if name not in SEARCHES
    ],
)
def test_a_group_is_still_until_its_start_with_extra_arguments(name: str) -> None:
    taken = run_on_losses(lambda stage: stage.optimizer(lambda *_: make(name)), name)
    assert_still_until_their_start(taken)


@pytest.mark.exhaustive
def test_a_line_search_goes_through_stages_as_one_optimizer() -> None:
    taken = run_on_losses(lambda stage: fo.with_frozen(optax.lbfgs(), stage.frozen), "lbfgs")
    assert_still_until_their_start(taken)
    values = [float(squares(params)) for params in taken]
    assert values == sorted(values, reverse=True)


def test_state_of_what_is_frozen_again_is_dropped_or_kept() -> None:
    """By default a state holds what is trained; kept by hand it goes on in another schedule."""
    params, adam = make_params(), lambda *_: optax.adam(0.1)
    first, second = fo.stages({"head": (0, 2), "encoder": 2}, stop=4)
    states, state = [], None
    for stage in (first, second):
        tx = stage.optimizer(adam)
        state = fo.transfer_state(state, tx.init(params), may_be_empty=True)
        for step in range(stage.start, stage.stop):
            updates, state = tx.update(gradients(step, params), state, params)
            params = fo.apply_updates(params, updates)
        states.append(state)
    kept, last = states
    assert set(fo.plan_transfer(kept, last).dropped) == set(bits(kept))
    both = fo.stages({"head": 0, "encoder": 0})[0].optimizer(adam).init(params)
    fresh = fo.transfer_state(last, both)
    assert not any("'head'" in path for path in fo.plan_transfer(last, both).carried)
    taken_up = bits(fo.transfer_state(last, fo.transfer_state(kept, both)))
    counts = {path: int(leaf) for path, leaf in taken_up.items() if path.endswith("count")}
    assert list(counts.values()) == [2, 2]
    for path, leaf in bits(kept).items():
        assert taken_up[path] is leaf
        assert not np.array_equal(bits(fresh)[path], leaf)
    for path, leaf in bits(last).items():
        assert taken_up[path] is leaf


def test_before_sees_all_that_trains_together() -> None:
    stages = fo.stages(STARTS)
    taken = run(stages, 3, lambda: optax.sgd(1.0), optax.clip_by_global_norm(0.01))
    for step in range(3):
        moved = jax.tree.map(jnp.subtract, taken[step + 1], taken[step])
        np.testing.assert_allclose(
            np.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(moved))), 0.01, rtol=1e-3
        )


def first_steps_of_encoder(make_tx: Any, start: int) -> np.ndarray:
    """How far the first ten steps go of what is thawed after so many steps, by a constant slope."""
    params, state, lengths = {"encoder": jnp.ones(3), "head": jnp.ones(3)}, None, []
    for stage in fo.stages({"head": 0, "encoder": start}, stop=start + 10):
        tx = make_tx(stage)
        state = fo.transfer_state(state, tx.init(params))
        update = jax.jit(tx.update)
        for step in range(stage.start, stage.stop):
            updates, state = update(params, state, params)
            if step >= start:
                lengths.append(-float(updates["encoder"][0]))
    return np.array(lengths)


def test_a_shared_count_steps_too_far_and_one_a_group_does_not() -> None:
    rate = 0.1
    own = first_steps_of_encoder(lambda stage: stage.optimizer(lambda *_: optax.adam(rate)), 500)
    shared = first_steps_of_encoder(
        lambda stage: fo.with_frozen(optax.adam(rate), stage.frozen), 500
    )
    np.testing.assert_allclose(own, rate, rtol=1e-3)  # a step of Adam is at most its rate
    # By paper: (1 - b1^k) / sqrt((1 - b2^k) / (1 - b2^(500 + k))) of it, as the count is old.
    k = np.arange(1, 11)
    expected = (1 - 0.9**k) / np.sqrt((1 - 0.999**k) / (1 - 0.999 ** (500 + k)))
    np.testing.assert_allclose(shared / rate, expected, rtol=1e-3)
    assert 3 < (shared / own).mean() < 4


# --- into another process, and into another run


@pytest.mark.parametrize("at", range(7))
def test_a_run_resumed_at_any_step_ends_the_same(at: int, tmp_path: Any) -> None:
    stages = fo.stages(STARTS, stop=6)
    optimizer = lambda stage: stage.optimizer(lambda *_: optax.adamw(0.1), optax.clip(1.0))

    def train(params: Any, state: Any, first: int, stop: int) -> Any:
        for stage in stages:
            steps = range(max(first, stage.start), min(stop, stage.stop))
            if not steps:
                continue
            tx = optimizer(stage)
            state = fo.transfer_state(state, tx.init(params))
            for step in steps:
                updates, state = tx.update(gradients(step, params), state, params)
                params = fo.apply_updates(params, updates)
        return params, state

    expected, _ = train(make_params(), None, 0, 6)
    params, state = train(make_params(), None, 0, at)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "saved", {"params": params, "state": state})
        checkpointer.wait_until_finished()
        # The state is that of the last step that was taken.
        like = None if not at else optimizer(stages.at(at - 1)).init(make_params())
        target = {"params": make_params(), "state": like}
        restored = checkpointer.restore(tmp_path / "saved", target)
    params, _ = train(restored["params"], restored["state"], at, 6)
    assert_same_bits(bits(params), bits(expected))
