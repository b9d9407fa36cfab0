"""What is frozen is said once, to the optimizer; what disagrees is an error with both sides."""

import dataclasses
import inspect
import json
import re
import tempfile
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import host_devices, make_params
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

import frozen_optax as fo


def loss_fn(params):
    return jnp.sum((params["encoder"]["w"] @ params["head"]["w"]) ** 2)


def loss_of(params, x):
    x = jnp.sort(x, axis=1)  # of the data alone
    return jnp.sum((x @ params["encoder"]["w"] @ params["head"]["w"]) ** 2)


def moved(params):
    return {**params, "head": {"w": params["head"]["w"] + 1}}


# --- the optimizer says what is frozen, everywhere

TX = fo.with_frozen(optax.adamw(0.1), "encoder")


def saved(**said):
    """What a checkpoint says of its leaves."""
    with tempfile.TemporaryDirectory() as folder:
        fo.save_trained(f"{folder}/head", make_params(), **said)
        (manifest,) = Path(folder).glob("head/*/manifest/metadata")
        body = json.loads(manifest.read_text())
        return {entry["path"]: entry for entry in body["trained"]}, body["frozen"]


ROOMS = {
    "freeze": lambda **said: fo.freeze(**said).update(
        make_params(), optax.EmptyState(), make_params()
    )[0],
    "with_frozen": lambda **said: fo.with_frozen(optax.sgd(0.1), **said).update(
        make_params(), fo.with_frozen(optax.sgd(0.1), **said).init(make_params()), make_params()
    )[0],
    "partition": lambda **said: fo.partition(make_params(), **said),
    "restore": lambda **said: fo.restore(
        jax.tree.map(lambda leaf: leaf * 2, make_params()), make_params(), **said
    ),
    "value_and_grad": lambda **said: fo.value_and_grad(loss_fn, **said)(make_params()),
    "grad": lambda **said: fo.grad(loss_fn, holes=True, **said)(make_params()),
    "jit": lambda **said: fo.jit(lambda params: (moved(params), 1), discard=True, **said)(
        make_params()
    ),
    "apply_updates": lambda **said: fo.apply_updates(
        make_params(), {"encoder": optax.MaskedNode(), "head": optax.MaskedNode()}, **said
    ),
    "hoist": lambda **said: (
        fo.hoist(loss_of, **said).prepare(make_params(), make_params()["encoder"]["w"].T).each
    ),
    "assert_frozen": lambda **said: fo.assert_frozen(make_params(), moved(make_params()), **said),
    "fingerprint": lambda **said: fo.fingerprint(make_params(), **said),
    "save_trained": saved,
    "assert_update_freezes": lambda **said: fo.assert_update_freezes(TX, make_params(), **said),
    "assert_step_freezes": lambda **said: fo.assert_step_freezes(moved, make_params(), **said),
    "summary": lambda **said: str(fo.summary(make_params(), **said)),
}


@pytest.mark.parametrize("room", ROOMS)
def test_the_optimizer_does_as_any_argument_called_frozen(room):
    expected, found = ROOMS[room](frozen="encoder"), ROOMS[room](frozen=TX)
    assert jax.tree.structure(expected) == jax.tree.structure(found)
    if not isinstance(expected, str):
        chex.assert_trees_all_equal(
            *(
                {
                    str(i): leaf
                    for i, leaf in enumerate(jax.tree.leaves(t))
                    if not isinstance(leaf, str)
                }
                for t in (expected, found)
            )
        )


@pytest.mark.parametrize("room", ROOMS)
def test_an_optimizer_that_forgets_is_told_which_remembers(room):
    for other in (
        optax.adamw(0.1),
        optax.chain(TX),
        optax.MultiSteps(TX, 2).gradient_transformation(),
        jax.tree.map(lambda x: x, TX),
    ):
        with pytest.raises(
            TypeError, match=r"only the one that with_frozen returned does.*optax\.chain"
        ):
            ROOMS[room](frozen=other)
    with pytest.raises(TypeError, match=r"says what is frozen, not what is trainable"):
        ROOMS[room](trainable=TX)


def test_every_argument_called_frozen_is_looked_at_here():
    names = [name for name in fo.__all__ if inspect.isfunction(getattr(fo, name))]
    arguments = {name: inspect.signature(getattr(fo, name)).parameters for name in names}
    said = {name for name in names if {"frozen", "trainable"} <= set(arguments[name])}
    elsewhere = {"nnx_jit", "nnx_filter", "value_and_grad_from_state"}
    assert said == {*ROOMS} | elsewhere
    # These want the optimizer alone: only that says of which elements a fingerprint is.
    of_elements = {"assert_fingerprint", "watch_fingerprint"}
    assert {name for name in names if "frozen" in arguments[name]} == said | of_elements


def test_value_and_grad_from_state_takes_the_optimizer_too():
    tx = fo.with_frozen(optax.lbfgs(), "encoder")
    params = make_params()
    value, grads = fo.value_and_grad_from_state(loss_fn, tx)(params, state=tx.init(params))
    chex.assert_trees_all_equal((value, grads), fo.value_and_grad(loss_fn, tx)(params))


# --- parts that disagree


def test_gradients_frozen_for_a_trainable_leaf_are_refused():
    params = make_params()
    grads = fo.grad(loss_fn, "head")(params)
    for update in (
        TX.update,
        lambda *args: jax.jit(lambda params, state: TX.update(grads, state, params))(*args[:0:-1]),
    ):
        with pytest.raises(
            ValueError, match=r"'head/w' has the gradient of a frozen one.*allow_zero=True"
        ):
            update(grads, TX.init(params), params)
    allowed = fo.with_frozen(optax.adamw(0.1), "encoder", allow_zero=True)
    updates, _ = allowed.update(grads, allowed.init(params), params)
    assert (updates["head"]["w"] != 0).all()  # it decays


@pytest.mark.parametrize(
    "zero", [np.zeros(()), np.float32(0), jnp.zeros(()), np.asarray(jnp.zeros(()))], ids=repr
)
def test_a_gradient_that_happens_to_be_zero_is_a_gradient(zero):
    params = {"encoder": jnp.ones(()), "head": jnp.ones(())}
    tx = fo.with_frozen(optax.sgd(0.1), "encoder")
    updates, _ = tx.update({"encoder": zero, "head": zero}, tx.init(params), params)
    assert updates["head"] == 0


@pytest.mark.parametrize("leaf", [jnp.arange(5), jnp.array([True]), 3, True], ids=repr)
def test_a_trainable_leaf_that_cannot_move_a_little_is_refused(leaf):
    with pytest.raises(
        TypeError, match=r"the trainable leaf 'n' is .* neither float nor complex.*allow_int=True"
    ):
        fo.with_frozen(optax.adamw(0.1), "encoder").init({"encoder": jnp.ones(2), "n": leaf})


def test_integers_are_trained_if_it_is_said():
    params = {"encoder": jnp.ones(2), "n": jnp.arange(5)}
    tx = fo.with_frozen(optax.sgd(1.0), "encoder", allow_int=True)
    updates, _ = tx.update(
        {"encoder": jnp.ones(2), "n": -jnp.ones(5, jnp.int32)}, tx.init(params), params
    )
    assert fo.apply_updates(params, updates)["n"].tolist() == [1, 2, 3, 4, 5]


def test_a_line_search_state_of_other_leaves_is_refused():
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    loss = lambda params: jnp.sum(params["a"] * params["b"])
    state = fo.with_frozen(optax.lbfgs(), "a").init(params)
    with pytest.raises(
        ValueError, match=r"no gradient of the 1 trainable leaves: .*'b'.*store_grad=True"
    ):
        fo.value_and_grad_from_state(loss, "b")(params, state=state)
    resized = {"a": jnp.ones(2), "b": jnp.ones(3)}
    with pytest.raises(
        ValueError, match=r"that at 'b' has the shape \(2,\), and the parameter \(3,\)"
    ):
        fo.value_and_grad_from_state(loss, "a")(resized, state=state)


# --- selections of nothing and of everything

NOTHING = {
    "a predicate": lambda path, leaf: isinstance(leaf, nnx.Param),
    "a mask": {"encoder": {"b": False, "w": False}, "head": {"w": False}},
    "a mask function": lambda params: jax.tree.map(lambda leaf: leaf.ndim > 7, params),
    "two patterns that share no leaf": fo.by_path("encoder") & fo.by_path("head"),
    "not everything": ~fo.by_path("encoder", "head"),
    "a predicate inside of not": ~fo.by_predicate(lambda path, leaf: False),
    "a list": [lambda path, leaf: False],
    "one of a list": [lambda path, leaf: False, "encoder"],
    "a type of another model": nnx.LoRAParam,
}


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("nothing", NOTHING)
def test_any_selection_that_selects_nothing_is_an_error(room, nothing):
    with pytest.raises(ValueError, match="selects nothing"):
        ROOMS[room](frozen=NOTHING[nothing])


MAY_BE_EMPTY = fo.by_predicate(lambda path, leaf: False, may_be_empty=True)
SAID = {
    "False": False,
    "a mask function that returns False": lambda params: False,
    "generic code": MAY_BE_EMPTY,
    "generic code, combined": MAY_BE_EMPTY & fo.by_path("encoder"),
    "not everything, in a word": ~fo.by_path("**"),
}


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("said", SAID)
def test_nothing_is_frozen_if_said_and_checks_of_nothing_fail(room, said):
    if room in ("assert_frozen", "fingerprint", "assert_update_freezes", "assert_step_freezes"):
        with pytest.raises(ValueError, match=r"selects nothing.*a check would always pass"):
            ROOMS[room](frozen=SAID[said])
    else:
        ROOMS[room](frozen=SAID[said])


def test_naming_all_that_trains_is_no_error():
    params = make_params()
    for trainable in ("**", True, ["encoder", "head"], {"encoder": True, "head": True}):
        assert jax.tree.leaves(fo.partition(params, trainable=trainable)[1]) == []
        tx = fo.with_frozen(optax.sgd(0.1), trainable=trainable)
        updates, _ = tx.update(params, tx.init(params), params)
        assert (updates["encoder"]["w"] != 0).all()


EVERYTHING = {
    "a list": ["encoder", "head"],
    "a pattern": "*/*",
    "a mask": {"encoder": True, "head": True},
    "a predicate": lambda path, leaf: True,
    "either": fo.by_path("encoder") | fo.by_path("head"),
    "not nothing": ~fo.by_predicate(lambda path, leaf: path == "encoder/w")
    | fo.by_path("encoder/w"),
}


@pytest.mark.parametrize("everything", EVERYTHING)
@pytest.mark.parametrize("room", ["with_frozen", "value_and_grad", "grad", "jit", "assert_frozen"])
def test_freezing_everything_unsaid_is_an_error_in_training(room, everything):
    with pytest.raises(
        ValueError, match=r"freezes all 3 leaves.*'encoder/b'.*nothing to train.*frozen='\*\*'"
    ):
        ROOMS[room](frozen=EVERYTHING[everything])


@pytest.mark.parametrize(
    "everything", ["**", "*", True, fo.by_path("encoder") | "**", ~fo.by_mask(False)], ids=repr
)
@pytest.mark.parametrize("room", ROOMS)
def test_everything_is_frozen_if_that_is_said(room, everything):
    if room == "assert_frozen":
        fo.assert_frozen(make_params(), make_params(), everything)
    elif room == "assert_step_freezes":
        fo.assert_step_freezes(lambda params: params, make_params(), frozen=everything)
    elif room == "assert_update_freezes":
        fo.assert_update_freezes(fo.freeze_all(), make_params(), everything)
    else:
        ROOMS[room](frozen=everything)


def test_all_that_where_names_may_not_be_frozen_unsaid():
    state = {"params": make_params(), "count": jnp.zeros(())}
    step = lambda state: {**state, "count": state["count"] + 1}
    with pytest.raises(ValueError, match=r"freezes all 3 leaves.*'params/encoder/b'"):
        fo.jit(step, frozen=["encoder", "head"], where=lambda state: state["params"])(state)
    assert fo.jit(step, frozen="**", where=lambda state: state["params"])(state)["count"] == 1


@pytest.mark.parametrize(
    "check", [fo.assert_fingerprint, lambda tree, empty: fo.watch_fingerprint(empty)]
)
def test_a_fingerprint_of_nothing_fits_nothing(check):
    with pytest.raises(ValueError, match="the fingerprint is of no leaves"):
        check(make_params(), {})


# --- filters of NNX


@dataclasses.dataclass(frozen=True)
class PathRegex:
    """A filter as users of NNX write it."""

    pattern: str

    def __call__(self, path, leaf):
        return re.fullmatch(self.pattern, "/".join(str(key) for key in path)) is not None


class Model(nnx.Module):
    def __init__(self, rngs):
        self.llm = nnx.LoRA(2, 1, 2, base_module=nnx.Linear(2, 2, rngs=rngs), rngs=rngs)
        self.layers = (
            nnx.List([nnx.Linear(2, 2, rngs=rngs)])
            if hasattr(nnx, "List")
            else [nnx.Linear(2, 2, rngs=rngs)]
        )
        self.norm = nnx.BatchNorm(2, rngs=rngs)


LORA = ["llm/lora_a", "llm/lora_b"]
LLM = ["llm/base_module/bias", "llm/base_module/kernel", *LORA]
LAYERS = ["layers/0/bias", "layers/0/kernel"]
STATISTICS = ["norm/mean", "norm/var"]
SCALES = ["norm/bias", "norm/scale"]

FILTERS = {
    "a type": (nnx.LoRAParam, LORA),
    "OfType": (nnx.OfType(nnx.BatchStat), STATISTICS),
    "PathContains": (nnx.PathContains("llm"), LLM),
    "PathContains an index": (nnx.PathContains(0), LAYERS),
    "Not": (nnx.Not(nnx.OfType(nnx.Param)), STATISTICS),
    "All of a function": (nnx.All(PathRegex(r"llm/.*"), nnx.LoRAParam), LORA),
    "Not of a function": (
        nnx.Not(lambda path, leaf: path[0] == "llm"),
        [*LAYERS, *SCALES, *STATISTICS],
    ),
    "Any": (nnx.Any(nnx.LoRAParam, nnx.BatchStat), [*LORA, *STATISTICS]),
    "a list": ([nnx.LoRAParam, "norm", PathRegex], None),
    "a list that is right": ([nnx.LoRAParam, "norm"], [*LORA, *SCALES, *STATISTICS]),
    "a predicate by type": (
        lambda path, leaf: isinstance(leaf, nnx.LoRAParam) and leaf.shape == (2, 1),
        LORA[:1],
    ),
    "a predicate by type and dtype": (
        lambda path, leaf: type(leaf) is nnx.Param and leaf.dtype == "float32",
        None,
    ),
}


@pytest.mark.parametrize("name", [name for name, (_, paths) in FILTERS.items() if paths])
def test_a_filter_of_nnx_selects_what_it_selects_there(name):
    selection, paths = FILTERS[name]
    state = nnx.state(Model(nnx.Rngs(0)))
    frozen = fo.partition(state, selection)[1]
    found = fo.by_path("**").paths(frozen)
    assert found == sorted(paths)
    if not isinstance(selection, list) and not name.startswith("a predicate"):
        expected = (
            nnx.filter_state(state, selection)
            if hasattr(nnx, "filter_state")
            else nnx.split_state(state, selection, ...)[0]
        )
        assert fo.by_path("**").paths(expected) == found
        by_tx = fo.with_frozen(optax.sgd(0.1), selection)
        assert by_tx.frozen.paths(state) == found


NOT_KEYS = {
    "openpi's": PathRegex(".*llm.*"),
    "an index": lambda path, leaf: path[0] == "llm",
    "the last key": lambda path, leaf: path[-1] == "kernel",
    "all keys": lambda path, leaf: any(key == "llm" for key in path),
    "a tuple of them": lambda path, leaf: "llm" in tuple(path),
}


@pytest.mark.parametrize("name", NOT_KEYS)
@pytest.mark.parametrize(
    "of", [fo.by_predicate, lambda f: [f], lambda f: ~fo.by_predicate(f)], ids=["it", "list", "not"]
)
def test_a_filter_that_might_be_a_predicate_is_refused_by_name(name, of):
    with pytest.raises(
        TypeError,
        match=r"reads its path as a tuple of keys.*'llm/base_module/bias'.*nnx\.All\(filter\)",
    ):
        fo.partition({"llm": {"base_module": {"bias": 1.0}}}, of(NOT_KEYS[name]))


def test_what_a_predicate_may_do_with_its_path():
    tree = {"llm": {"kernel": 1.0, "bias": 2.0}}
    for predicate in (
        lambda path, leaf: path.split("/")[-1] == "bias",
        lambda path, leaf: path[-4:] == "bias",
        lambda path, leaf: re.search("bias$", path) is not None,
        lambda path, leaf: (
            "bias" in path and path in {"llm/bias"} and f"{path}!" == "llm/bias!" and len(path) == 8
        ),
    ):
        assert fo.by_predicate(predicate).paths(tree) == ["llm/bias"]


# --- leaves that are moved at each call


def test_frozen_host_leaves_are_told_of_once_with_the_remedy():
    params = make_params()
    step = fo.jit(moved, frozen="encoder")
    on_host = {**params, "encoder": jax.tree.map(np.asarray, params["encoder"])}
    with pytest.warns(
        UserWarning, match=r"'encoder/b' \(on the host\), 'encoder/w' .*jax\.device_put"
    ) as told:
        step(on_host)
    assert len(told) == 1
    assert told[0].filename == __file__
    step(on_host)  # where a warning is an error
    step(jax.device_put(params))


def of_jit(params):
    return fo.jit(moved, frozen="encoder"), params


def of_stage(params):
    return fo.jit(moved, frozen="encoder").lower(params).compile(), params


def of_nnx_jit(params):
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    model.kernel = nnx.Param(params["encoder"]["w"])
    return fo.nnx_jit(lambda model: None, frozen="kernel"), model


def of_nnx_stage(params):
    step, model = of_nnx_jit(params)
    return step.lower(model).compile(), model


@pytest.mark.parametrize("make", [of_jit, of_stage, of_nnx_jit, of_nnx_stage])
def test_the_warning_points_at_the_call_however_it_is_made(make):
    params = make_params()
    step, first = make({**params, "encoder": jax.tree.map(np.asarray, params["encoder"])})
    with pytest.warns(UserWarning, match="at each of its calls") as told:
        step(first)
    assert [(each.filename, each.lineno) for each in told] == [(__file__, THE_CALL)]


THE_CALL = inspect.getsourcelines(test_the_warning_points_at_the_call_however_it_is_made)[1] + 5


def test_a_backbone_on_one_device_beside_eight_is_told_of():
    mesh = Mesh(np.array(host_devices(8)), "x")
    put = lambda tree: jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))
    params = make_params()
    with pytest.warns(UserWarning, match=r"'encoder/b' \(on 1 of 8 devices\)"):
        fo.jit(moved, frozen="encoder")({**params, "head": put(params["head"])})
    fo.jit(moved, frozen="encoder")(put(params))
    fo.jit(moved, frozen="encoder")(jax.device_put(params, host_devices()[3]))


def test_a_backbone_beside_devices_that_the_step_names_is_told_of():
    mesh = Mesh(np.array(host_devices(8)), "x")
    on_each = PartitionSpec()
    step = jax.shard_map(moved, mesh=mesh, in_specs=on_each, out_specs=on_each)
    params = make_params()
    step = fo.jit(step, frozen="encoder", donate_argnums=0)
    with pytest.warns(UserWarning, match=r"'encoder/b' \(on 1 of 8 devices\)") as told:
        params = step(params)
    assert [each.filename for each in told] == [__file__]
    step(params)  # where a warning is an error


def test_a_leaf_not_sharded_as_in_shardings_says_is_told_of():
    mesh = Mesh(np.array(host_devices(2)), "x")
    split = NamedSharding(mesh, PartitionSpec("x"))
    with pytest.warns(UserWarning, match=r"'encoder/b' \(not sharded as in_shardings says\)"):
        fo.jit(moved, frozen="encoder", in_shardings=(split,))(make_params())


@pytest.mark.parametrize(
    "spread", [lambda s: s, lambda s: {"encoder": s, "head": None}], ids=["one for all", "a tree"]
)
def test_contradicting_out_shardings_are_refused_undonated(spread):
    mesh = Mesh(np.array(host_devices(2)), "x")
    split = NamedSharding(mesh, PartitionSpec("x"))
    params = jax.device_put(make_params(), NamedSharding(mesh, PartitionSpec()))
    step = fo.jit(moved, frozen="encoder", out_shardings=spread(split), donate_argnums=0)
    with pytest.raises(
        ValueError, match=r"out_shardings says .* of the frozen leaf 'encoder/b'.*jax\.device_put"
    ):
        step(params)
    assert not params["head"]["w"].is_deleted()
    there = jax.device_put(make_params(), split)
    assert step(there)["encoder"]["b"] is there["encoder"]["b"]
    unsaid = fo.jit(moved, frozen="encoder", out_shardings={"encoder": None, "head": split})
    assert unsaid(params)["head"]["w"].sharding.is_equivalent_to(split, 2)
    assert isinstance(make_params()["encoder"]["b"].sharding, SingleDeviceSharding)


# --- where= in the checks


@dataclasses.dataclass
class State:
    params: dict
    statistics: dict
    count: jax.Array


jax.tree_util.register_dataclass(
    State, data_fields=["params", "statistics", "count"], meta_fields=[]
)
WHERE = lambda state: (state.params, state.statistics)


def make_state(number=1.0):
    statistics = {"encoder": {"mean": jnp.zeros(2)}, "head": {"mean": jnp.zeros(2)}}
    return State(
        {**make_params(), "head": {"w": jnp.full((2, 2), number)}}, statistics, jnp.array(number)
    )


def test_checks_and_restore_look_where_they_are_told():
    before, after = make_state(), make_state(2.0)
    fo.assert_frozen(before, after, "encoder", where=WHERE)
    fo.assert_frozen(before, after, trainable="head", where=WHERE)
    moved_on = dataclasses.replace(
        before, statistics=jax.tree.map(lambda leaf: leaf + 1, before.statistics)
    )
    with pytest.raises(AssertionError, match=r"1 of 3 frozen leaves(?s:.*)encoder/mean"):
        fo.assert_frozen(before, moved_on, "encoder", where=WHERE)
    with pytest.raises(
        AssertionError, match="no trainable leaf moved: all 2"
    ):  # the count is no parameter
        fo.assert_frozen(
            before, dataclasses.replace(before, count=jnp.array(3)), "encoder", where=WHERE
        )
    put_back = fo.restore(moved_on, before, "encoder", where=WHERE)
    assert put_back.statistics["encoder"]["mean"] is before.statistics["encoder"]["mean"]
    assert put_back.statistics["head"]["mean"] is moved_on.statistics["head"]["mean"]
    with pytest.raises(ValueError, match="selects nothing"):
        fo.restore(before, before, "params/encoder", where=WHERE)
    with pytest.raises(TypeError, match="where= is a function"):
        fo.assert_frozen(before, after, "encoder", where="params")


def test_a_fingerprint_in_a_state_is_that_of_the_parameters():
    state = make_state()
    backbone = fo.fingerprint(state, "encoder", where=lambda state: state.params)
    assert backbone == fo.fingerprint(state.params, "encoder")
    fo.assert_fingerprint(state.params, backbone)
    fo.assert_fingerprint(state, backbone, where=lambda state: state.params)
    both = fo.fingerprint(state, "**/w", where=WHERE)
    assert sorted(both) == ["encoder/w", "head/w"]
    check = fo.watch_fingerprint(both, every=1, where=WHERE)
    check(state)
    check(make_state(2.0))
    with pytest.raises(AssertionError, match=r"at call 2: (?s:.*)head/w"):
        check.finish()
