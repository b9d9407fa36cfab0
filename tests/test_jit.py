"""`jit`: frozen leaves go in and never come out, and all else is as `jax.jit` has it."""

import collections
import copy
import dataclasses
import functools
import inspect
import itertools
from typing import Any, NamedTuple

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, struct
from flax.training.train_state import TrainState
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import frozen_optax as fo
from frozen_optax._trees import leaves_if


def make_params():
    return {"encoder": {"b": jnp.array([-0.0, 1e-45]), "w": jnp.ones((2, 2))}, "head": {"w": jnp.ones((2, 2))}}


def add(tree: Any, number: Any = 1) -> Any:
    return jax.tree.map(lambda leaf: leaf + number, tree)


def same(before: Any, after: Any) -> bool:
    return all(x is y for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))


# --- what comes back


@pytest.mark.parametrize(
    "leaf",
    [
        jnp.array([-0.0, 1e-45, jnp.nan]),
        jnp.arange(3),
        jnp.array([True, False]),
        jax.random.key(0),
        jnp.ones(3, jnp.float8_e4m3fn),
        jnp.ones(3, jnp.int4),
        jnp.zeros((0, 3)),
        np.array([1.0, 1e-300]),
        np.arange(3),
        np.float64(0.1),
        0.1,
        True,
        2**24 + 1,
    ],
    ids=lambda leaf: f"{type(leaf).__name__}-{getattr(leaf, 'dtype', '')}",
)
def test_a_frozen_leaf_of_any_kind_comes_back_as_the_same_object(leaf):
    step = fo.jit(lambda params, x: ({"base": params["base"], "scale": params["scale"] * x}, x), frozen="base")
    (new, _), params = step({"base": leaf, "scale": jnp.ones(2)}, 2.0), {"base": leaf}
    assert new["base"] is params["base"]
    assert new["scale"].tolist() == [2, 2]


@pytest.mark.parametrize("damage", [jnp.zeros_like, lambda x: x + jnp.nan, lambda x: x[:0], lambda x: x.astype("bool")])
def test_what_the_step_computes_for_a_frozen_leaf_is_discarded(damage):
    step = fo.jit(lambda params: {**add(params), "encoder": jax.tree.map(damage, params["encoder"])}, frozen="encoder")
    params = make_params()
    new = step(params)
    assert same(params["encoder"], new["encoder"])
    assert new["head"]["w"][0, 0] == 2


def test_trained_leaves_and_all_else_are_what_jax_jit_returns():
    tx = fo.with_frozen(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1)), "encoder")
    loss = lambda params, x: jnp.sum((x @ params["encoder"]["w"] @ params["head"]["w"]) ** 2)

    def step(params, state, x):
        value, grads = fo.value_and_grad(loss, "encoder")(params, x)
        updates, state = tx.update(grads, state, params)
        return fo.apply_updates(params, updates), state, {"loss": value, "list": [value, None, "x"][:2]}

    ours, theirs = fo.jit(step, frozen="encoder"), jax.jit(step)
    first = second = (make_params(), tx.init(make_params()))
    for i in range(3):
        *first, a = ours(*first, jnp.ones((1, 2)) * i)
        *second, b = theirs(*second, jnp.ones((1, 2)) * i)
    fo.assert_trees_bit_identical((first, a), (second, b))


def test_only_what_is_not_frozen_goes_out_of_the_program():
    traced = fo.jit(lambda params: (add(params), jnp.zeros(())), frozen="encoder").trace(make_params())
    assert [str(aval) for aval in traced.jaxpr.out_avals] == ["float32[2,2]", "float32[]"]
    compiled = traced.lower().compile()
    assert compiled.memory_analysis().output_size_in_bytes < 40  # head/w and a number


@pytest.mark.parametrize("frozen", [False, "**"])
def test_nothing_or_everything_may_be_frozen(frozen):
    params = make_params()
    new = fo.jit(add, frozen=frozen)(params)
    assert same(params, new) is (frozen == "**")
    assert jax.tree.structure(new) == jax.tree.structure(params)
    if not frozen:
        fo.assert_trees_bit_identical(new, jax.jit(add)(params))


def test_a_lone_array_is_a_tree_of_parameters():
    w = jnp.ones(2)
    new, loss = fo.jit(lambda w, x: (w * x, x), frozen="**")(w, 2.0)
    assert new is w
    assert loss == 2
    assert fo.jit(lambda w: w * 2, frozen=False)(w).tolist() == [2, 2]


def test_holes_and_none_in_the_parameters_stay_what_they_are():
    params = {"a": None, "b": optax.MaskedNode(), "c": {}, "d": jnp.ones(1), "e": jnp.ones(1)}
    new = fo.jit(add, frozen="d")(params)
    assert new["d"] is params["d"]
    assert jax.tree.structure(new) == jax.tree.structure(params)
    assert new["e"] == 2


class Result(NamedTuple):
    params: Any
    loss: Any


@pytest.mark.parametrize(
    "pack",
    [
        lambda new: new,
        lambda new: (new,),
        lambda new: (new, jnp.zeros(())),
        lambda new: [new, new],
        lambda new: (new, (new, 1)),
        lambda new: Result(new, 0),
    ],
)
def test_the_successor_is_found_alone_or_first(pack):
    params = make_params()
    result = fo.jit(lambda params: pack(add(params)), frozen="encoder")(params)
    expected = jax.jit(lambda params: pack(add(params)))(params)
    assert jax.tree.structure(result) == jax.tree.structure(expected)
    new = result if isinstance(result, dict) else result[0]
    assert same(params["encoder"], new["encoder"])
    assert new["head"]["w"][0, 0] == 2


def test_parameters_in_a_tuple_are_no_result_of_two():
    params = (jnp.ones(1), (jnp.ones(1), jnp.ones(1)))
    for pack in (lambda new: new, lambda new: (new, 3.0)):
        result = fo.jit(lambda params, pack=pack: pack(add(params)), frozen=["0", "1/0"])(params)
        new = result if len(jax.tree.leaves(result)) == 3 else result[0]
        assert new[0] is params[0]
        assert new[1][0] is params[1][0]
        assert new[1][1] == 2


# --- where


@struct.dataclass
class State:
    params: Any
    batch_stats: Any
    step: Any


def make_state() -> State:
    norm = {"norm": {"mean": jnp.zeros(2)}}
    return State(make_params(), {"encoder": norm, "head": {"norm": {"mean": jnp.zeros(2)}}}, jnp.array(0))


def test_where_names_the_parameters_in_a_state_and_nothing_else_is_frozen():
    state = make_state()
    new = fo.jit(add, frozen="encoder", where=lambda state: state.params)(state)
    assert same(state.params["encoder"], new.params["encoder"])
    assert [float(jax.tree.leaves(x)[0].max()) for x in (new.params["head"], new.batch_stats, new.step)] == [2, 1, 1]


def test_trainable_speaks_of_the_named_places_alone():
    state = make_state()
    new = fo.jit(add, trainable="head", where=lambda state: state.params)(state)
    assert same(state.params["encoder"], new.params["encoder"])
    assert [float(jax.tree.leaves(x)[0].max()) for x in (new.params["head"], new.batch_stats, new.step)] == [2, 1, 1]


def test_several_places_may_be_named_and_a_pattern_has_to_fit_one_of_them():
    state = make_state()
    step = fo.jit(
        lambda state: (add(state), 1),
        frozen=["encoder", "**/norm"],
        where=lambda state: (state.params, state.batch_stats),
    )
    new, _ = step(state)
    assert same(state.params["encoder"], new.params["encoder"])
    assert same(state.batch_stats, new.batch_stats)
    assert new.params["head"]["w"][0, 0] == 2


def test_a_pattern_that_fits_no_place_is_an_error_with_the_paths_of_all():
    step = fo.jit(add, frozen="**/nrom", where=lambda state: (state.params, state.batch_stats))
    with pytest.raises(ValueError, match=r"'\*\*/nrom'.*none of the 5 leaves.*norm"):
        step(make_state())


def test_a_mask_has_the_structure_of_what_where_returns():
    state = make_state()
    both = lambda state: (state.params, state.batch_stats)
    new = fo.jit(add, frozen=({"encoder": True, "head": False}, True), where=both)(state)
    assert same((state.params["encoder"], state.batch_stats), (new.params["encoder"], new.batch_stats))
    assert new.params["head"]["w"][0, 0] == 2
    new = fo.jit(add, frozen=lambda path, leaf: leaf.ndim == 1, where=both)(state)
    assert new.params["encoder"]["b"] is state.params["encoder"]["b"]
    assert new.params["encoder"]["w"] is not state.params["encoder"]["w"]


def test_a_tuple_that_is_part_of_the_state_is_one_place():
    state = {"params": (jnp.ones(1), jnp.ones(1)), "n": jnp.ones(1)}
    new = fo.jit(add, frozen="0", where=lambda state: state["params"])(state)
    assert new["params"][0] is state["params"][0]
    assert new["params"][1] == 2
    assert new["n"] == 2


def test_where_finds_the_parameters_in_a_tuple_alone_or_first():
    state = ({"a": jnp.ones(1), "b": jnp.ones(1)}, jnp.zeros(1))
    for pack in (lambda new: new, lambda new: (new, 1.0)):
        step = fo.jit(lambda state, pack=pack: pack(add(state)), frozen="a", where=lambda state: state[0])
        result = step(state)
        new = result if isinstance(result[0], dict) else result[0]
        assert new[0]["a"] is state[0]["a"]
        assert new[0]["b"] == 2


@pytest.mark.parametrize(
    ("where", "found"),
    [
        (lambda state: 3, "a leaf of type int at 'the root'"),
        (lambda state: (state.params, 1.0), "a leaf of type float at '1'"),
        (lambda state: {"a": jnp.ones(2)}, r"a leaf float32\[2\] at 'a'"),
    ],
)
def test_where_has_to_return_parts_of_the_state(where, found):
    with pytest.raises(TypeError, match=f"where= has to return parts of the state, found {found}"):
        fo.jit(add, frozen="**", where=where)(make_state())


@pytest.mark.parametrize("where", [lambda state: None, lambda state: (), lambda state: {}])
def test_where_has_to_return_something(where):
    with pytest.raises(TypeError, match="where= has to return parts of the state, and returned"):
        fo.jit(add, trainable=False, where=where)(make_state())


def test_train_state_of_flax():
    tx = fo.with_frozen(optax.adam(0.1), "encoder")
    state = TrainState.create(apply_fn=lambda variables, x: x, params=make_params(), tx=tx)

    @fo.jit(frozen="encoder", where=lambda state: state.params, donate_argnames="state")
    def step(state, x):
        loss = lambda params: jnp.sum(x @ params["encoder"]["w"] @ params["head"]["w"])
        return state.apply_gradients(grads=fo.grad(loss, "encoder")(state.params))

    new = step(step(state, jnp.ones((1, 2))), jnp.ones((1, 2)))
    assert same(state.params["encoder"], new.params["encoder"])
    assert new.step == 2
    assert state.params["head"]["w"].is_deleted()


def test_state_of_nnx_and_modules_of_equinox():
    state = nnx.state(nnx.Sequential(*(nnx.Linear(2, 2, rngs=nnx.Rngs(0)) for _ in range(2))))
    new = fo.jit(add, frozen="layers/0")(state)
    assert same(state["layers"][0], new["layers"][0])
    assert not same(state["layers"][1], new["layers"][1])
    model = eqx.nn.MLP(2, 2, 2, 1, key=jax.random.key(0), activation=jnp.tanh)
    arrays, static = eqx.partition(model, eqx.is_array)
    new = fo.jit(lambda arrays: jax.tree.map(lambda x: x + 1, arrays), frozen="layers/0")(arrays)
    assert new.layers[0].weight is model.layers[0].weight
    assert eqx.combine(new, static)(jnp.ones(2)).shape == (2,)


# --- which leaf is whose


def test_a_step_that_changes_its_argument_in_place_still_gets_the_right_leaves():
    def in_place(state):
        state["metrics"] = jnp.float32(9)
        state["params"]["a"] = state["params"]["a"] * 0
        state["params"]["b"] = state["params"]["b"] + 1
        return state

    state = {"cache": jnp.ones(1), "params": {"a": jnp.float32(1), "b": jnp.float32(2)}}
    new = fo.jit(in_place, frozen="a", where=lambda state: state["params"])(state)
    assert new["params"]["a"] is state["params"]["a"]
    assert (new["params"]["b"], new["metrics"], sorted(new)) == (3, 9, ["cache", "metrics", "params"])

    def apart(state):
        state.pop("cache")
        params = state.pop("params")
        return {"cache": jnp.float32(0), "params": {"a": params["a"] * 0, "b": params["b"] + 1}}

    for where, frozen in ((lambda state: state["params"], "a"), (None, "params/a")):
        new = fo.jit(apart, frozen=frozen, where=where)(state)
        assert new["params"]["a"] is state["params"]["a"]
        assert (new["params"]["b"], new["cache"]) == (3, 0)

    def grows(params):
        params["0"] = jnp.float32(9)
        return params

    with pytest.raises(ValueError, match=r"differ in structure at 'the root'.*found a dict of 3 \(0, a, b\)"):
        fo.jit(grows, frozen="a")({"a": jnp.ones(1), "b": jnp.ones(1)})


def test_a_module_that_grows_while_it_runs_is_another_structure():
    class Model(nnx.Module):
        def __init__(self):
            self.a, self.b = nnx.Linear(2, 2, rngs=nnx.Rngs(0)), nnx.Linear(2, 2, rngs=nnx.Rngs(0))

    def step(model):
        model.a.hidden = nnx.Intermediate(jnp.ones(2))
        return model

    if jax.tree_util.all_leaves([Model()]):  # modules are no pytrees in older versions of Flax
        return
    with pytest.raises(ValueError, match="differ in structure"):
        fo.jit(step, frozen="b")(Model())


def test_the_successor_is_the_state_and_not_what_stands_at_its_place_in_the_result():
    params = {"base": jnp.array(3.0), "head": jnp.array(4.0)}
    grads = fo.jit(
        lambda state: ((state[0] + 1, add(state[1])), jax.tree.map(lambda x: x * 0 - 5, state[1])),
        frozen="base",
        where=lambda state: state[1],
    )
    (count, new), other = grads((jnp.array(0), params))
    assert (count, new["head"], other) == (1, 5, {"base": -5, "head": -5})
    assert new["base"] is params["base"]
    number = jnp.array(3.0)
    step = fo.jit(lambda s: ((s[0] + 1, s[1] * 2), jnp.float32(7)), frozen="**", where=lambda s: s[1])
    (count, new), loss = step((jnp.array(0), number))
    assert (count, loss) == (1, 7)
    assert new is number
    with pytest.raises(ValueError, match="returns the successor"):
        fo.jit(lambda s: (jnp.float32(7), s), frozen="**", where=lambda s: s[0])((number, number))


def test_other_parts_of_a_state_may_change_their_structure():
    state = State(make_params(), {}, None)
    step = lambda state: (state.replace(params=add(state.params), batch_stats={"mean": jnp.zeros(2)}, step=1), 2)
    new, _ = fo.jit(step, frozen="encoder", where=lambda state: state.params)(state)
    assert same(state.params["encoder"], new.params["encoder"])
    assert (new.params["head"]["w"][0, 0], new.step, list(new.batch_stats)) == (2, 1, ["mean"])


class Unregistered(list):
    pass


def test_a_result_that_is_no_pytree_is_jax_s_own_error():
    with pytest.raises((TypeError, ValueError), match=r"(?s)Unregistered"):
        fo.jit(lambda params: Unregistered([params, 3]), frozen="encoder")(make_params())


@struct.dataclass
class Checked:
    a: Any
    b: Any

    def __post_init__(self):
        assert self.a.ndim == 1

    @fo.jit(frozen="a")
    def step(self, x):
        """A step as a method of the state."""
        return self.replace(b=self.b + x)


def test_a_state_that_checks_its_fields_and_a_step_that_is_its_method():
    state = Checked(jnp.ones(1), jnp.ones(2))
    new = state.step(2.0)
    assert new.a is state.a
    assert new.b.tolist() == [3, 3]
    new = fo.jit(lambda state: state.replace(b=state.b + 1), frozen=True, where=lambda state: state.a)(state)
    assert new.a is state.a
    assert new.b.tolist() == [2, 2]


# --- errors


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda params: params["head"], "differ in structure at 'the root'.*found a dict of 1"),
        (lambda params: ({"encoder": params["encoder"]}, 1), "differ in structure at 'the root'.*found a dict of 1"),
        (lambda params: {**params, "encoder": {"w": 1}}, "differ in structure at 'encoder'"),
        (lambda params: {**params, "head": {"w": [1, 2]}}, "differ in structure at 'head/w'"),
        (lambda params: (1.0, params), "differ in structure"),
        (lambda params: None, "differ in structure"),
        (lambda params: (), "differ in structure"),
    ],
)
def test_another_structure_is_an_error_that_says_so(result, message):
    with pytest.raises(ValueError, match=f"(?s)returns the successor of its first argument.*{message}"):
        fo.jit(result, frozen="encoder")(make_params())


def test_a_state_in_which_where_finds_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"returns the successor.*differ in structure"):
        fo.jit(lambda state: state.params, frozen="encoder", where=lambda state: state.params)(make_state())


def test_a_pattern_that_selects_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"by_path\('encodr'\) selects nothing.*encoder"):
        fo.jit(add, frozen="encodr")(make_params())


def test_what_is_frozen_has_to_be_said():
    with pytest.raises(TypeError, match="exactly one of the two: neither"):
        fo.jit(add)
    with pytest.raises(TypeError, match="exactly one of the two: both"):
        fo.jit(add, frozen="a", trainable="b")


def test_an_unknown_option_and_a_missing_argument_are_type_errors():
    with pytest.raises(TypeError, match="donut"):
        fo.jit(add, frozen="encoder", donut=0)
    with pytest.raises(TypeError, match="add takes the parameters as its first argument"):
        fo.jit(add, frozen="encoder")()


def test_a_step_needs_an_argument_by_position():
    with pytest.raises(TypeError, match="takes no argument by position"):
        fo.jit(lambda *, params: params, frozen="encoder")
    with pytest.raises(TypeError, match=r"jit takes a function, found 'encoder'.*jit\(step, frozen='encoder'\)"):
        fo.jit("encoder")
    with pytest.raises(TypeError, match="where= is a function, found 'params'"):
        fo.jit(add, frozen="encoder", where="params")


@pytest.mark.parametrize("option", ["donate_argnums", "static_argnums"])
@pytest.mark.parametrize("number", [-3, 2])
def test_a_number_that_no_argument_has_is_an_error(option, number):
    with pytest.raises(ValueError, match=f"{option} names the argument {number}, and the step takes 2 by position"):
        fo.jit(lambda params, x: params, frozen="encoder", **{option: number})


@pytest.mark.parametrize("option", [{"static_argnums": 0}, {"static_argnums": -2}, {"static_argnames": ("params",)}])
def test_the_first_argument_cannot_be_static(option):
    with pytest.raises(ValueError, match="the first argument holds the parameters, so it cannot be static"):
        fo.jit(lambda params, x: params, frozen="encoder", **option)


def test_a_leaf_that_jax_cannot_take_is_named():
    with pytest.raises(TypeError, match="encoder/f"):
        fo.jit(lambda params: params, frozen="encoder")({"encoder": {"f": jnp.sum}, "head": 1.0})


def test_what_the_step_raises_comes_through():
    def step(params):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        fo.jit(step, frozen="encoder")(make_params())


# --- jax's options count in the step's own signature


@pytest.mark.parametrize(
    "option", [{"static_argnums": 1}, {"static_argnums": (1,)}, {"static_argnums": -2}, {"static_argnames": "power"}]
)
@pytest.mark.parametrize("by_name", [False, True])
def test_static_arguments(option, by_name):
    def step(params, power, x):
        assert isinstance(power, int)
        return jax.tree.map(lambda leaf: (leaf + x) ** power, params)

    jitted = fo.jit(step, frozen="encoder", **option)
    new = jitted(make_params(), x=1.0, power=2) if by_name else jitted(make_params(), 2, 1.0)
    assert new["head"]["w"][0, 0] == 4


@pytest.mark.parametrize(
    ("option", "donated"),
    [
        ({}, ""),
        ({"donate_argnums": 0}, "p"),
        ({"donate_argnums": (0, 1)}, "ps"),
        ({"donate_argnums": (1,)}, "s"),
        ({"donate_argnums": -2}, "s"),
        ({"donate_argnums": -3}, "p"),
        ({"donate_argnames": "params"}, "p"),
        ({"donate_argnames": ("params", "state")}, "ps"),
        ({"donate_argnums": np.int64(0)}, "p"),
        ({"donate_argnums": range(2)}, "ps"),
    ],
)
@pytest.mark.parametrize("by_name", [False, True])
def test_donation_takes_what_is_trained_and_never_a_frozen_leaf(option, donated, by_name):
    def step(params, state, x):
        return add(params, x), add(state, x)

    jitted = fo.jit(step, frozen="encoder", **option)
    params, state = make_params(), {"mu": jnp.ones((3, 3))}
    new, _ = jitted(params=params, state=state, x=1.0) if by_name else jitted(params, state, 1.0)
    assert params["head"]["w"].is_deleted() == ("p" in donated)
    assert state["mu"].is_deleted() == ("s" in donated)
    assert same(params["encoder"], new["encoder"])
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(new))


def test_arguments_by_keyword_only_and_in_a_row():
    @fo.jit(frozen="encoder", donate_argnames="scale", static_argnames="power")
    def step(params, *rest, scale, power=1, **more):
        return add(params, scale * power + sum(rest) + sum(more.values())), scale

    scale = jnp.array(3.0)
    assert step(make_params(), 1.0, 2.0, scale=scale, power=2, a=1.0)[0]["head"]["w"][0, 0] == 11
    assert scale.is_deleted()


def test_one_frozen_backbone_serves_several_runs_that_donate():
    step = fo.jit(add, frozen="encoder", donate_argnums=0)
    backbone = make_params()["encoder"]
    runs = [{"encoder": backbone, "head": {"w": jnp.full((2, 2), float(i))}} for i in range(3)]
    for _ in range(3):
        runs = [step(run) for run in runs]
    assert [float(run["head"]["w"][0, 0]) for run in runs] == [3, 4, 5]
    assert all(same(run["encoder"], backbone) for run in runs)


SHARDINGS = {
    "one for all": lambda s: s,
    "one for each argument": lambda s: (s, s),
    "a list": lambda s: [s, s],
    "a prefix": lambda s: ({"encoder": s, "head": s}, None),
    "in full": lambda s: ({"encoder": {"b": s, "w": s}, "head": {"w": s}}, s),
    "with gaps": lambda s: ({"encoder": None, "head": s}, None),
}


@pytest.mark.parametrize("spread", SHARDINGS.values(), ids=SHARDINGS)
def test_shardings_are_said_of_the_trees_that_the_step_takes_and_returns(spread):
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    sharded = NamedSharding(mesh, P("x"))
    params = jax.device_put(make_params(), sharded)
    step = fo.jit(
        lambda params, x: (add(params), x * 2),
        frozen="encoder",
        in_shardings=spread(sharded),
        out_shardings=(lambda s: s[0] if isinstance(s, list) else s)(spread(sharded)) if spread else None,
    )
    (new, x), expected = step(params, jnp.ones(2)), sharded
    assert same(params["encoder"], new["encoder"])
    assert new["head"]["w"].sharding.is_equivalent_to(expected, 2)
    assert x.tolist() == [2, 2]
    assert new["head"]["w"][0, 0] == 2


def test_shardings_that_do_not_fit_are_an_error_that_says_which():
    with pytest.raises(ValueError, match=r"in_shardings\[0\] is no prefix of the first argument"):
        fo.jit(add, frozen="encoder", in_shardings=({"encoder": None, "tail": None},))(make_params())


def test_shardings_of_two_structures():
    sharded = NamedSharding(Mesh(np.array(jax.devices()[:2]), ("x",)), P("x"))
    step = fo.jit(add, frozen="encoder", in_shardings=(sharded,), out_shardings=sharded)
    for params in (make_params(), {"encoder": jnp.ones(2), "more": jnp.ones(2), "head": jnp.ones(2)}):
        for _ in range(2):
            new = step(params)
            assert same(params["encoder"], new["encoder"])
            assert jax.tree.leaves(new["head"])[0].sharding.is_equivalent_to(sharded, 1)
    step.clear_cache()
    assert step(make_params())["head"]["w"][0, 0] == 2


# --- buffers that stand at two places


def tied(kind):
    w = jnp.ones((2, 2))
    return w, {"same array": w, "another array": w.addressable_data(0), "put again": jax.device_put(w, w.device)}[kind]


@pytest.mark.parametrize("kind", ["same array", "another array", "put again"])
@pytest.mark.parametrize("used", [True, False])
def test_a_buffer_at_a_frozen_and_at_a_donated_place_is_refused_with_both_paths(kind, used):
    frozen, trained = tied(kind)
    params = {"embed": {"table": frozen}, "head": {"w": trained}}

    def step(params):
        new = add(params["head"])
        return {"embed": params["embed"], "head": add(new, params["embed"]["table"]) if used else new}

    with pytest.raises(ValueError, match=r"'embed/table' is the same buffer as 'head/w'.*jnp\.copy"):
        fo.jit(step, frozen="embed", donate_argnums=0)(params)
    assert not frozen.is_deleted()
    assert not trained.is_deleted()
    assert fo.jit(step, frozen="embed")(params)["embed"]["table"] is frozen
    assert fo.jit(step, frozen="**", donate_argnums=0)(params)["head"]["w"] is trained


@pytest.mark.parametrize("by_name", [False, True])
def test_a_donated_state_that_holds_a_frozen_leaf_is_refused_with_both_paths(by_name):
    def step(params, ema):
        return add(params), add(ema)

    params = make_params()
    ema = {"ema": {**params, "head": {"w": jnp.zeros((2, 2))}}}
    jitted = fo.jit(step, frozen="encoder", donate_argnums=(0, 1))
    with pytest.raises(ValueError, match="'encoder/b' is the same buffer as 'ema/ema/encoder/b'"):
        jitted(params, ema=ema) if by_name else jitted(params, ema)
    new, _ = fo.jit(step, frozen="encoder", donate_argnums=0)(params, ema)
    assert same(new["encoder"], params["encoder"])


def test_donation_keeps_what_lets_the_runtime_see_a_shared_buffer():
    with pytest.raises(ValueError, match="keep_unused=False together with donation"):
        fo.jit(add, frozen="encoder", donate_argnums=0, keep_unused=False)
    params = make_params()
    assert same(params["encoder"], fo.jit(add, frozen="encoder", keep_unused=False)(params)["encoder"])
    assert same(params["encoder"], fo.jit(add, frozen="encoder", donate_argnums=0, keep_unused=True)(params)["encoder"])


@pytest.mark.parametrize("spec", [P("x"), P()], ids=["split", "replicated"])
def test_a_buffer_at_two_places_on_eight_devices_is_refused_and_nothing_is_lost(spec):
    mesh = Mesh(np.array(jax.devices()[:8]), "x")
    assert mesh.size == 8
    w, other = (jax.device_put(jnp.ones((16, 2)), NamedSharding(mesh, spec)) for _ in range(2))
    step = fo.jit(chex.assert_max_traces(add, n=0), frozen="embed", donate_argnums=0)  # before anything is compiled
    with pytest.raises(ValueError, match="'embed/table' is the same buffer as 'head/w'"):
        step({"embed": {"table": w}, "head": {"b": other, "w": w}})
    assert not w.is_deleted()
    assert not other.is_deleted()


def test_a_buffer_that_stands_at_two_places_later_in_training_is_refused():
    step = fo.jit(lambda params: add(params), frozen="encoder", donate_argnums=0)
    params = step(step(make_params()))
    w = params["encoder"]["w"]
    with pytest.raises(ValueError, match="'encoder/w' is the same buffer as 'head/w'"):
        step({"encoder": params["encoder"], "head": {"w": w}})
    assert not w.is_deleted()


def test_a_frozen_leaf_that_was_donated_elsewhere_is_named():
    params = make_params()
    params["encoder"]["w"].delete()
    with pytest.raises(ValueError, match="'encoder/w' was donated"):
        fo.jit(lambda params: add(params, params["encoder"]["w"].sum()), frozen="encoder")(params)


def test_equal_numbers_at_two_places_are_no_tie():
    new = fo.jit(lambda p: add(p), frozen="a", donate_argnums=0)({"a": 1, "b": 1, "c": jnp.ones(1)})
    assert new["a"] == 1
    assert new["b"] == 2


# --- as jax.jit


def test_traced_again_exactly_when_jax_jit_would():
    counts = {"ours": 0, "theirs": 0}

    def count(name):
        def step(params, x, *, flag=0):
            counts[name] += 1
            return add(params, x)

        return step

    ours = fo.jit(count("ours"), frozen="encoder", static_argnames="flag")
    theirs = jax.jit(count("theirs"), static_argnames="flag")
    params, wide = make_params(), {"encoder": {"w": jnp.ones((3, 3))}, "head": {"w": jnp.ones((3, 3))}}
    calls = [
        (params, 1.0, {}),
        (make_params(), 2.0, {}),
        (params, jnp.array(1.0), {}),  # no longer weakly typed
        (params, np.float32(3), {}),
        (wide, 1.0, {}),
        (jax.tree.map(lambda x: x.astype("bfloat16"), params), 1.0, {}),
        ({**params, "more": jnp.ones(1)}, 1.0, {}),
        ({**params, "encoder": jnp.ones(1)}, 1.0, {}),
        (jax.tree.map(np.asarray, params), 1.0, {}),
        (params, 1.0, {"flag": 1}),
        (params, 1.0, {"flag": 0}),
        (jax.device_put(params, jax.devices()[1]), 1.0, {}),
    ]
    for first, x, options in calls * 2:
        ours(first, x, **options)
        theirs(first, x, **options)
        assert counts["ours"] == counts["theirs"]


class Flaxen(struct.PyTreeNode):
    params: Any
    factor: float = struct.field(pytree_node=False, default=1.0)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["params"], meta_fields=["factor"])
@dataclasses.dataclass
class Registered:
    params: Any
    factor: float = 1.0


class Equine(eqx.Module):
    params: Any
    factor: float = eqx.field(static=True, default=1.0)


@pytest.mark.parametrize("kind", [Flaxen, Registered, Equine])
def test_a_static_field_of_the_state_that_changes_is_seen(kind):
    traced = []

    @fo.jit(frozen="encoder", where=lambda state: state.params)
    def step(state):
        traced.append(state.factor)
        return kind(add(state.params, state.factor), state.factor)

    params = make_params()
    found = [step(kind(params, factor)).params["head"]["w"][0, 0].tolist() for factor in (1.0, 2.0, 2.0, 3.0, 1.0)]
    assert found == [2, 3, 3, 4, 2]
    assert traced == [1, 2, 3]


class Pair(NamedTuple):
    left: Any
    right: Any


class OtherPair(NamedTuple):
    left: Any
    right: Any


def test_a_known_structure_is_told_from_any_other():
    trees = [
        1.0, None, [], (), {}, [1.0], (1.0,), {"a": 1.0}, {"b": 1.0}, {"a": 1.0, "b": 2.0}, {"a": None}, {"a": [1.0]},
        {0: 1.0}, [[1.0]], [1.0, 2.0], (1.0, 2.0), (1.0, (2.0,)), Pair(1.0, 2.0), OtherPair(1.0, 2.0), Pair(1.0, None),
        Pair(1.0, (2.0,)), collections.OrderedDict(a=1.0, b=2.0), collections.OrderedDict(b=1.0, a=2.0),
        collections.defaultdict(list, a=1.0), collections.defaultdict(int, a=1.0), optax.MaskedNode(),
        {"a": optax.MaskedNode()}, Flaxen(1.0, 2.0), Flaxen(1.0, 3.0), Equine(1.0, 2.0), Equine(1.0, 3.0),
        Registered(1.0, 2.0), Registered(1.0, 3.0), Registered([1.0], 2.0),
    ]  # fmt: skip
    for known, other in itertools.product(trees, trees):
        leaves = leaves_if(jax.tree.structure(known), other)
        if jax.tree.structure(known) != jax.tree.structure(other):
            assert leaves is None, (known, other)
        elif type(known) is type(other):  # to jax, dataclasses of two types with the same fields are the same
            assert leaves == jax.tree.leaves(other), (known, other)


def test_a_training_loop_traces_once():
    tx = fo.with_frozen(optax.adamw(0.1), "encoder")

    @fo.jit(frozen="encoder", donate_argnums=(0, 1))
    @chex.assert_max_traces(n=1)
    def step(params, state, x):
        grads = fo.grad(lambda p: jnp.sum(x @ p["encoder"]["w"] @ p["head"]["w"]), "encoder")(params)
        updates, state = tx.update(grads, state, params)
        return fo.apply_updates(params, updates), state

    params, state = make_params(), tx.init(make_params())
    for i in range(5):
        params, state = step(params, state, jnp.ones((1, 2)) * i)


def test_a_mask_function_is_asked_at_each_call():
    step = fo.jit(add, frozen=fo.by_mask(lambda params: jax.tree.map(lambda leaf: bool(leaf.max() < 2), params)))
    params = {"a": jnp.ones(1), "b": jnp.full(1, 2.0)}
    new = step(params)
    assert new["a"] is params["a"]
    assert new["b"] == 3
    new = step({"a": jnp.full(1, 5.0), "b": params["a"]})
    assert new["a"] == 6
    assert new["b"] is params["a"]


def test_lowered_and_compiled_ahead_of_time():
    def step(params, state, power):
        return add(params, power), add(state), power

    params, state = make_params(), {"mu": jnp.zeros(2)}
    jitted = fo.jit(step, frozen="encoder", donate_argnums=(0, 1))
    shapes = jax.eval_shape(lambda: (make_params(), {"mu": jnp.zeros(2)}))
    for lowered in (jitted.lower(*shapes, 1.0), jitted.trace(params, state, 1.0).lower()):
        assert "encoder/b" not in lowered.as_text().split("return")[-1]
        compiled = lowered.compile()
        assert compiled.cost_analysis()["flops"] > 0
        params, state = make_params(), {"mu": jnp.zeros(2)}
        new, state, _ = compiled(params, state, 1.0)
        assert same(params["encoder"], new["encoder"])
        assert params["head"]["w"].is_deleted()
        assert new["head"]["w"][0, 0] == 2
    with pytest.raises(ValueError, match="'encoder/b' is the same buffer as 'state/mu'"):
        compiled(new, {"mu": new["encoder"]["b"]}, 1.0)


def test_compiled_ahead_of_time_static_arguments_are_left_out_and_donated_ones_are_checked():
    def step(params, power, state, x):
        return add(params, x.sum() ** power), state * 2

    jitted = fo.jit(step, frozen="encoder", static_argnums=1, donate_argnums=2)
    params = make_params()
    w = params["encoder"]["w"]
    compiled = jitted.lower(params, 2, jnp.ones((2, 2)), w).compile()
    with pytest.raises(ValueError, match="'encoder/w' is the same buffer as 'state'"):
        compiled(params, w, jnp.ones((2, 2)))
    new, _ = compiled(params, jnp.ones((2, 2)), w)
    assert same(params["encoder"], new["encoder"])
    assert new["head"]["w"][0, 0] == 17


def test_stages_and_steps_can_be_copied():
    step = fo.jit(add, frozen="encoder")
    params = make_params()
    assert same(copy.copy(step)(params)["encoder"], params["encoder"])
    assert same(copy.copy(step.lower(params)).compile()(params)["encoder"], params["encoder"])


def test_an_object_that_is_called_keeps_its_attributes_to_itself():
    class Trainer:
        def __init__(self):
            self._rows = self._jit = self._call = self._options = 7

        def __call__(self, params, *, self_=1):
            return add(params, self._rows)

    assert fo.jit(Trainer(), frozen="encoder")(make_params())["head"]["w"][0, 0] == 8
    assert fo.jit(lambda params, **more: add(params, more["self"]), frozen="encoder")(make_params(), self=2.0)


def test_a_step_s_own_runtime_error_is_not_mistaken():
    def step(params):
        raise RuntimeError("mine")

    params = make_params()
    params["encoder"]["w"].delete()
    with pytest.raises(RuntimeError, match="mine"):
        fo.jit(step, frozen="encoder")(params)


def test_eval_shape_is_that_of_jax():
    params = make_params() | {"key": jax.random.key(0), "scalar": 1.0}
    step = lambda params: ({**params, "head": add(params["head"])}, params["head"]["w"].sum())
    assert fo.jit(step, frozen=["encoder", "key", "scalar"]).eval_shape(params) == jax.eval_shape(step, params)


def test_the_step_keeps_its_name_text_and_signature():
    def train(params, x: int = 3):
        """Text."""
        return params

    step = fo.jit(train, frozen="encoder")
    assert (step.__name__, step.__doc__, step.__wrapped__) == ("train", "Text.", train)
    assert inspect.signature(step) == inspect.signature(train)
    assert "jit_train" in step.lower(make_params()).as_text()


def test_a_function_without_a_name_or_a_signature():
    params = make_params()
    assert fo.jit(functools.partial(add, number=2), frozen="encoder")(params)["head"]["w"][0, 0] == 3
    new = fo.jit(dataclasses.replace, frozen="encoder", where=lambda state: state.params)(make_state())
    assert new.params["head"]["w"][0, 0] == 1


def test_inside_other_transformations():
    step = fo.jit(lambda params, x: (add(params, x), x * 2), frozen="encoder")
    params = make_params()

    @jax.jit
    def outer(params):
        for _ in range(3):
            params, _ = step(params, 1.0)
        return params

    fo.assert_frozen(params, outer(params), "encoder")
    assert outer(params)["head"]["w"][0, 0] == 4
    heads, out = jax.vmap(lambda x: (step(params, x)[0]["head"]["w"], x))(jnp.arange(3.0))
    assert heads[:, 0, 0].tolist() == [1, 2, 3]
    assert out.tolist() == [0, 1, 2]
    carried, _ = jax.lax.scan(lambda params, x: (step(params, x)[0], x), params, jnp.ones(4))
    fo.assert_frozen(params, carried, "encoder")
    assert carried["head"]["w"][0, 0] == 5
    grads = jax.grad(lambda params: sum(jnp.sum(leaf) for leaf in jax.tree.leaves(step(params, 1.0)[0])))(params)
    assert all((leaf == 1).all() for leaf in jax.tree.leaves(grads))
    with jax.disable_jit():
        assert same(step(params, 1.0)[0]["encoder"], params["encoder"])


def test_a_tie_of_tracers_is_nobody_s_buffer():
    step = fo.jit(add, frozen="a", donate_argnums=0)
    new = jax.jit(lambda w: step({"a": w, "b": w}))(jnp.ones(1))
    assert new["a"] == 1
    assert new["b"] == 2
