"""`jit(where=)`: parameters in a larger state."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from helpers import add, make_params, same_objects
from jitting import jit, make_state

import frozen_optax as fo


def test_where_names_the_parameters_and_no_more_is_frozen():
    state = make_state()
    new = jit(add, frozen="encoder", where=lambda state: state.params)(state)
    assert same_objects(state.params["encoder"], new.params["encoder"])
    assert [
        float(jax.tree.leaves(x)[0].max()) for x in (new.params["head"], new.batch_stats, new.step)
    ] == [2, 1, 1]


def test_trainable_speaks_of_the_named_places_alone():
    state = make_state()
    new = jit(add, trainable="head", where=lambda state: state.params)(state)
    assert same_objects(state.params["encoder"], new.params["encoder"])
    assert [
        float(jax.tree.leaves(x)[0].max()) for x in (new.params["head"], new.batch_stats, new.step)
    ] == [2, 1, 1]


def test_of_several_places_a_pattern_has_to_fit_one():
    state = make_state()
    step = jit(
        lambda state: (add(state), 1),
        frozen=["encoder", "**/norm"],
        where=lambda state: (state.params, state.batch_stats),
    )
    new, _ = step(state)
    assert same_objects(state.params["encoder"], new.params["encoder"])
    assert same_objects(state.batch_stats, new.batch_stats)
    assert new.params["head"]["w"][0, 0] == 2


def test_a_pattern_that_fits_no_place_is_an_error_with_all_paths():
    step = jit(add, frozen="**/nrom", where=lambda state: (state.params, state.batch_stats))
    with pytest.raises(ValueError, match=r"'\*\*/nrom'.*none of the 5 leaves.*norm"):
        step(make_state())


def largest(state):
    """The part with the larger leaf: where the parameters are is read off shapes."""
    return state["a"] if state["a"]["w"].size > state["b"]["w"].size else state["b"]


BOTH = lambda state: (state["a"], state["b"])
BY_SHAPES = {
    "where": {"frozen": "w", "where": largest},
    "a predicate": {"frozen": lambda path, leaf: leaf.size == 4},
    "a predicate where told": {"frozen": lambda path, leaf: leaf.size == 4, "where": BOTH},
    "a mask function": {"frozen": lambda tree: jax.tree.map(lambda leaf: leaf.size == 4, tree)},
}


@pytest.mark.parametrize("name", BY_SHAPES)
@pytest.mark.parametrize("donated", [False, True])
def test_what_shapes_freeze_is_found_anew_for_other_shapes(name, donated):
    step = jit(add, donate_argnums=0 if donated else None, **BY_SHAPES[name])
    part = lambda size: {"v": jnp.ones(1), "w": jnp.ones(size)}
    make = {
        "a": lambda: {"a": part(4), "b": part(2)},
        "b": lambda: {"a": part(2), "b": part(4)},
    }
    ahead = {key: step.lower(tree()).compile() for key, tree in make.items()}
    for key in "abbaab":
        for run in (step, ahead[key]):
            state = make[key]()
            new = run(state)
            assert new[key]["w"] is state[key]["w"]
            changed = jax.tree.leaves({**new, key: new[key]["v"]})
            assert all((leaf == 2).all() for leaf in changed)
            assert jax.tree.leaves(step.eval_shape(make[key]()))[0].shape == (1,)


def test_shapes_are_looked_at_in_tracing_not_at_every_call():
    asked = []

    def is_large(path, leaf):
        asked.append(path)
        return leaf.size == 4

    step = jit(add, frozen=is_large)
    state = {"a": jnp.ones(4), "b": jnp.ones(2)}
    for _ in range(5):
        state = step(state)
    assert asked == ["a", "b"]


def test_a_mask_has_the_structure_of_what_where_returns():
    state = make_state()
    both = lambda state: (state.params, state.batch_stats)
    new = jit(add, frozen=({"encoder": True, "head": False}, True), where=both)(state)
    assert same_objects(
        (state.params["encoder"], state.batch_stats), (new.params["encoder"], new.batch_stats)
    )
    assert new.params["head"]["w"][0, 0] == 2
    new = jit(add, frozen=lambda path, leaf: leaf.ndim == 1, where=both)(state)
    assert new.params["encoder"]["b"] is state.params["encoder"]["b"]
    assert new.params["encoder"]["w"] is not state.params["encoder"]["w"]


def test_a_tuple_that_is_part_of_the_state_is_one_place():
    state = {"params": (jnp.ones(1), jnp.ones(1)), "n": jnp.ones(1)}
    new = jit(add, frozen="0", where=lambda state: state["params"])(state)
    assert new["params"][0] is state["params"][0]
    assert new["params"][1] == 2
    assert new["n"] == 2


def test_where_finds_the_parameters_in_a_tuple_alone_or_first():
    state = ({"a": jnp.ones(1), "b": jnp.ones(1)}, jnp.zeros(1))
    for pack in (lambda new: new, lambda new: (new, 1.0)):
        step = jit(
            lambda state, pack=pack: pack(add(state)), frozen="a", where=lambda state: state[0]
        )
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
        jit(add, frozen="**", where=where)(make_state())


@pytest.mark.parametrize("where", [lambda state: None, lambda state: (), lambda state: {}])
def test_where_has_to_return_something(where):
    with pytest.raises(TypeError, match="where= has to return parts of the state, and returned"):
        jit(add, trainable=False, where=where)(make_state())


def test_train_state_of_flax():
    tx = fo.with_frozen(optax.adam(0.1), "encoder")
    state = TrainState.create(apply_fn=lambda variables, x: x, params=make_params(), tx=tx)

    @jit(frozen="encoder", where=lambda state: state.params, donate_argnames="state")
    def step(state, x):
        loss = lambda params: jnp.sum(x @ params["encoder"]["w"] @ params["head"]["w"])
        return state.apply_gradients(grads=fo.grad(loss, "encoder")(state.params))

    new = step(step(state, jnp.ones((1, 2))), jnp.ones((1, 2)))
    assert same_objects(state.params["encoder"], new.params["encoder"])
    assert new.step == 2
    assert state.params["head"]["w"].is_deleted()


def test_state_of_nnx_and_modules_of_equinox():
    state = nnx.state(nnx.Sequential(*(nnx.Linear(2, 2, rngs=nnx.Rngs(0)) for _ in range(2))))
    new = jit(add, frozen="layers/0")(state)
    assert same_objects(state["layers"][0], new["layers"][0])
    assert not same_objects(state["layers"][1], new["layers"][1])
    model = eqx.nn.MLP(2, 2, 2, 1, key=jax.random.key(0), activation=jnp.tanh)
    arrays, static = eqx.partition(model, eqx.is_array)
    new = jit(lambda arrays: jax.tree.map(lambda x: x + 1, arrays), frozen="layers/0")(arrays)
    assert new.layers[0].weight is model.layers[0].weight
    assert eqx.combine(new, static)(jnp.ones(2)).shape == (2,)


def test_a_state_that_is_not_first_is_told():
    step = fo.jit(lambda key, state: state, frozen="encoder", where=lambda state: state["params"])
    with pytest.raises(TypeError, match=r"where= raised .* on a leaf .*the first argument"):
        step(jax.random.key(0), {"params": make_params()})
