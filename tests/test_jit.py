"""`jit`: frozen leaves go in and never come out, and all else comes back as `jax.jit` has it."""

import contextlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, struct
from helpers import add, make_params, same_objects
from jitting import State, jit

import frozen_optax as fo


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
    step = jit(
        lambda params, x: ({"base": params["base"], "scale": params["scale"] * x}, x), frozen="base"
    )
    warned = contextlib.nullcontext()
    if isinstance(leaf, np.ndarray):
        warned = pytest.warns(UserWarning, match=r"'base' \(on the host\)")
    with warned:
        new, _ = step({"base": leaf, "scale": jnp.ones(2)}, 2.0)
    assert new["base"] is leaf
    assert new["scale"].tolist() == [2, 2]


@pytest.mark.parametrize(
    "damage", [jnp.zeros_like, lambda x: x + jnp.nan, lambda x: x[:0], lambda x: x.astype("bool")]
)
def test_what_the_step_computes_for_a_frozen_leaf_is_discarded(damage):
    step = jit(
        lambda params: {**add(params), "encoder": jax.tree.map(damage, params["encoder"])},
        frozen="encoder",
    )
    params = make_params()
    new = step(params)
    assert same_objects(params["encoder"], new["encoder"])
    assert new["head"]["w"][0, 0] == 2


def test_trained_leaves_and_all_else_are_what_jax_jit_returns():
    tx = fo.with_frozen(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1)), "encoder")
    loss = lambda params, x: jnp.sum((x @ params["encoder"]["w"] @ params["head"]["w"]) ** 2)

    def step(params, state, x):
        value, grads = fo.value_and_grad(loss, "encoder")(params, x)
        updates, state = tx.update(grads, state, params)
        return (
            fo.apply_updates(params, updates),
            state,
            {"loss": value, "list": [value, None, "x"][:2]},
        )

    ours, theirs = jit(step, frozen="encoder"), jax.jit(step)
    first = second = (make_params(), tx.init(make_params()))
    for i in range(3):
        *first, a = ours(*first, jnp.ones((1, 2)) * i)
        *second, b = theirs(*second, jnp.ones((1, 2)) * i)
    fo.assert_trees_bit_identical((first, a), (second, b))


def test_only_what_is_not_frozen_goes_out_of_the_program():
    traced = jit(lambda params: (add(params), jnp.zeros(())), frozen="encoder").trace(make_params())
    assert [str(aval) for aval in traced.jaxpr.out_avals] == ["float32[2,2]", "float32[]"]
    compiled = traced.lower().compile()
    assert compiled.memory_analysis().output_size_in_bytes < 40  # head/w and a number


@pytest.mark.parametrize("frozen", [False, "**"])
def test_nothing_or_everything_may_be_frozen(frozen):
    params = make_params()
    new = jit(add, frozen=frozen)(params)
    assert same_objects(params, new) is (frozen == "**")
    assert jax.tree.structure(new) == jax.tree.structure(params)
    if not frozen:
        fo.assert_trees_bit_identical(new, jax.jit(add)(params))


def test_a_lone_array_is_a_tree_of_parameters():
    w = jnp.ones(2)
    new, loss = jit(lambda w, x: (w * x, x), frozen="**")(w, 2.0)
    assert new is w
    assert loss == 2
    assert jit(lambda w: w * 2, frozen=False)(w).tolist() == [2, 2]


def test_holes_and_none_in_the_parameters_stay_what_they_are():
    params = {"a": None, "b": optax.MaskedNode(), "c": {}, "d": jnp.ones(1), "e": jnp.ones(1)}
    new = jit(add, frozen="d")(params)
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
    result = jit(lambda params: pack(add(params)), frozen="encoder")(params)
    expected = jax.jit(lambda params: pack(add(params)))(params)
    assert jax.tree.structure(result) == jax.tree.structure(expected)
    new = result if isinstance(result, dict) else result[0]
    assert same_objects(params["encoder"], new["encoder"])
    assert new["head"]["w"][0, 0] == 2


def test_parameters_in_a_tuple_are_no_result_of_two():
    params = (jnp.ones(1), (jnp.ones(1), jnp.ones(1)))
    for pack in (lambda new: new, lambda new: (new, 3.0)):
        result = jit(lambda params, pack=pack: pack(add(params)), frozen=["0", "1/0"])(params)
        new = result if len(jax.tree.leaves(result)) == 3 else result[0]
        assert new[0] is params[0]
        assert new[1][0] is params[1][0]
        assert new[1][1] == 2


# --- which leaf is whose


def test_a_step_may_change_its_argument_in_place():
    def in_place(state):
        state["metrics"] = jnp.float32(9)
        state["params"]["a"] = state["params"]["a"] * 0
        state["params"]["b"] = state["params"]["b"] + 1
        return state

    state = {"cache": jnp.ones(1), "params": {"a": jnp.float32(1), "b": jnp.float32(2)}}
    new = jit(in_place, frozen="a", where=lambda state: state["params"])(state)
    assert new["params"]["a"] is state["params"]["a"]
    assert (new["params"]["b"], new["metrics"], sorted(new)) == (
        3,
        9,
        ["cache", "metrics", "params"],
    )

    def apart(state):
        state.pop("cache")
        params = state.pop("params")
        return {"cache": jnp.float32(0), "params": {"a": params["a"] * 0, "b": params["b"] + 1}}

    for where, frozen in ((lambda state: state["params"], "a"), (None, "params/a")):
        new = jit(apart, frozen=frozen, where=where)(state)
        assert new["params"]["a"] is state["params"]["a"]
        assert (new["params"]["b"], new["cache"]) == (3, 0)

    def grows(params):
        params["0"] = jnp.float32(9)
        return params

    with pytest.raises(
        ValueError, match=r"differ in structure at 'the root'.*found a dict of 3 \(0, a, b\)"
    ):
        jit(grows, frozen="a")({"a": jnp.ones(1), "b": jnp.ones(1)})


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
        jit(step, frozen="b")(Model())


def test_the_successor_is_the_state_whatever_place_it_has():
    params = {"base": jnp.array(3.0), "head": jnp.array(4.0)}
    grads = jit(
        lambda state: ((state[0] + 1, add(state[1])), jax.tree.map(lambda x: x * 0 - 5, state[1])),
        frozen="base",
        where=lambda state: state[1],
    )
    (count, new), other = grads((jnp.array(0), params))
    assert (count, new["head"], other) == (1, 5, {"base": -5, "head": -5})
    assert new["base"] is params["base"]
    number = jnp.array(3.0)
    step = jit(lambda s: ((s[0] + 1, s[1] * 2), jnp.float32(7)), frozen="**", where=lambda s: s[1])
    (count, new), loss = step((jnp.array(0), number))
    assert (count, loss) == (1, 7)
    assert new is number
    with pytest.raises(ValueError, match="returns the successor"):
        jit(lambda s: (jnp.float32(7), s), frozen="**", where=lambda s: s[0])((number, number))


def test_other_parts_of_a_state_may_change_their_structure():
    state = State(make_params(), {}, None)

    def step(state):
        statistics = {"mean": jnp.zeros(2)}
        return state.replace(params=add(state.params), batch_stats=statistics, step=1), 2

    new, _ = jit(step, frozen="encoder", where=lambda state: state.params)(state)
    assert same_objects(state.params["encoder"], new.params["encoder"])
    assert (new.params["head"]["w"][0, 0], new.step, list(new.batch_stats)) == (2, 1, ["mean"])


class Unregistered(list):
    pass


def test_a_result_that_is_no_pytree_is_jax_s_own_error():
    with pytest.raises((TypeError, ValueError), match=r"(?s)Unregistered"):
        jit(lambda params: Unregistered([params, 3]), frozen="encoder")(make_params())


@struct.dataclass
class Checked:
    a: Any
    b: Any

    def __post_init__(self):
        assert self.a.ndim == 1

    @jit(frozen="a")
    def step(self, x):
        """A step as a method of the state."""
        return self.replace(b=self.b + x)


def test_a_state_may_check_its_fields_and_a_step_be_its_method():
    state = Checked(jnp.ones(1), jnp.ones(2))
    new = state.step(2.0)
    assert new.a is state.a
    assert new.b.tolist() == [3, 3]
    new = jit(lambda state: state.replace(b=state.b + 1), frozen=True, where=lambda state: state.a)(
        state
    )
    assert new.a is state.a
    assert new.b.tolist() == [2, 2]
