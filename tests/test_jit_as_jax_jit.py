"""Where `jit` is what `jax.jit` is: when it traces, ahead of time, inside other transformations."""

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
from flax import struct
from helpers import add, host_devices, make_params, same_objects
from jitting import jit, make_state

import frozen_optax as fo
from frozen_optax._trees import leaves_if


def test_traced_again_exactly_when_jax_jit_would():
    counts = {"ours": 0, "theirs": 0}

    def count(name):
        def step(params, x, *, flag=0):
            counts[name] += 1
            return add(params, x)

        return step

    ours = jit(count("ours"), frozen="encoder", static_argnames="flag")
    theirs = jax.jit(count("theirs"), static_argnames="flag")
    params, wide = (
        make_params(),
        {"encoder": {"w": jnp.ones((3, 3))}, "head": {"w": jnp.ones((3, 3))}},
    )
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
        (jax.device_put(params, host_devices()[1]), 1.0, {}),
    ]
    with pytest.warns(UserWarning, match="on the host"):
        ours(calls[8][0], 1.0)
    theirs(calls[8][0], 1.0)
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

    @jit(frozen="encoder", where=lambda state: state.params)
    def step(state):
        traced.append(state.factor)
        return kind(add(state.params, state.factor), state.factor)

    params = make_params()
    found = [
        step(kind(params, factor)).params["head"]["w"][0, 0].tolist()
        for factor in (1.0, 2.0, 2.0, 3.0, 1.0)
    ]
    assert found == [2, 3, 3, 4, 2]
    assert traced == [1, 2, 3]


class Pair(NamedTuple):
    left: Any
    right: Any


class OtherPair(NamedTuple):
    left: Any
    right: Any


def test_a_known_structure_is_told_from_any_other():
    hole, ordered, default = optax.MaskedNode(), collections.OrderedDict, collections.defaultdict
    trees = [1.0, None, hole]
    trees += [[], [1.0], [1.0, 2.0], [[1.0]]]
    trees += [(), (1.0,), (1.0, 2.0), (1.0, (2.0,))]
    trees += [Pair(1.0, 2.0), OtherPair(1.0, 2.0), Pair(1.0, None), Pair(1.0, (2.0,))]
    trees += [{}, {0: 1.0}, {"a": 1.0}, {"b": 1.0}, {"a": 1.0, "b": 2.0}]
    trees += [{"a": None}, {"a": [1.0]}, {"a": hole}]
    trees += [
        ordered(a=1.0, b=2.0),
        ordered(b=1.0, a=2.0),
        default(list, a=1.0),
        default(int, a=1.0),
    ]
    for kind in (Flaxen, Equine, Registered):
        trees += [kind(1.0, 2.0), kind(1.0, 3.0)]
    trees += [Registered([1.0], 2.0)]
    for known, other in itertools.product(trees, trees):
        leaves = leaves_if(jax.tree.structure(known), other)
        if jax.tree.structure(known) != jax.tree.structure(other):
            assert leaves is None, (known, other)
        elif type(known) is type(
            other
        ):  # to jax, dataclasses of two types with the same fields are the same
            assert leaves == jax.tree.leaves(other), (known, other)


def test_a_training_loop_traces_once():
    tx = fo.with_frozen(optax.adamw(0.1), "encoder")

    @jit(frozen="encoder", donate_argnums=(0, 1))
    @chex.assert_max_traces(n=1)
    def step(params, state, x):
        grads = fo.grad(lambda p: jnp.sum(x @ p["encoder"]["w"] @ p["head"]["w"]), "encoder")(
            params
        )
        updates, state = tx.update(grads, state, params)
        return fo.apply_updates(params, updates), state

    params, state = make_params(), tx.init(make_params())
    for i in range(5):
        params, state = step(params, state, jnp.ones((1, 2)) * i)


def test_a_mask_function_is_asked_at_each_call():
    step = jit(
        add,
        frozen=fo.by_mask(lambda params: jax.tree.map(lambda leaf: bool(leaf.max() < 2), params)),
    )
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
    jitted = jit(step, frozen="encoder", donate_argnums=(0, 1))
    shapes = jax.eval_shape(lambda: (make_params(), {"mu": jnp.zeros(2)}))
    for lowered in (jitted.lower(*shapes, 1.0), jitted.trace(params, state, 1.0).lower()):
        assert "encoder/b" not in lowered.as_text().split("return")[-1]
        compiled = lowered.compile()
        assert compiled.cost_analysis()["flops"] > 0
        params, state = make_params(), {"mu": jnp.zeros(2)}
        new, state, _ = compiled(params, state, 1.0)
        assert same_objects(params["encoder"], new["encoder"])
        assert params["head"]["w"].is_deleted()
        assert new["head"]["w"][0, 0] == 2
    with pytest.raises(ValueError, match="'encoder/b' is the same buffer as 'state/mu'"):
        compiled(new, {"mu": new["encoder"]["b"]}, 1.0)


def test_ahead_of_time_static_is_left_out_and_donated_checked():
    def step(params, power, state, x):
        return add(params, x.sum() ** power), state * 2

    jitted = jit(step, frozen="encoder", static_argnums=1, donate_argnums=2)
    params = make_params()
    w = params["encoder"]["w"]
    compiled = jitted.lower(params, 2, jnp.ones((2, 2)), w).compile()
    with pytest.raises(ValueError, match="'encoder/w' is the same buffer as 'state'"):
        compiled(params, w, jnp.ones((2, 2)))
    new, _ = compiled(params, jnp.ones((2, 2)), w)
    assert same_objects(params["encoder"], new["encoder"])
    assert new["head"]["w"][0, 0] == 17


def test_stages_and_steps_can_be_copied():
    step = jit(add, frozen="encoder")
    params = make_params()
    assert same_objects(copy.copy(step)(params)["encoder"], params["encoder"])
    assert same_objects(
        copy.copy(step.lower(params)).compile()(params)["encoder"], params["encoder"]
    )


def test_an_object_that_is_called_keeps_its_attributes_to_itself():
    class Trainer:
        def __init__(self):
            self._rows = self._jit = self._call = self._options = 7

        def __call__(self, params, *, self_=1):
            return add(params, self._rows)

    assert jit(Trainer(), frozen="encoder")(make_params())["head"]["w"][0, 0] == 8
    assert jit(lambda params, **more: add(params, more["self"]), frozen="encoder")(
        make_params(), self=2.0
    )


def test_a_step_s_own_runtime_error_is_not_mistaken():
    def step(params):
        raise RuntimeError("mine")

    params = make_params()
    params["encoder"]["w"].delete()
    with pytest.raises(RuntimeError, match="mine"):
        jit(step, frozen="encoder")(params)


def test_eval_shape_is_that_of_jax():
    params = make_params() | {"key": jax.random.key(0), "scalar": 1.0}
    step = lambda params: ({**params, "head": add(params["head"])}, params["head"]["w"].sum())
    assert jit(step, frozen=["encoder", "key", "scalar"]).eval_shape(params) == jax.eval_shape(
        step, params
    )


def test_the_step_keeps_its_name_text_and_signature():
    def train(params, x: int = 3):
        """Text."""
        return params

    step = jit(train, frozen="encoder")
    assert (step.__name__, step.__doc__, step.__wrapped__) == ("train", "Text.", train)
    assert inspect.signature(step) == inspect.signature(train)
    assert "jit_train" in step.lower(make_params()).as_text()


def test_a_function_without_a_name_or_a_signature():
    params = make_params()
    assert jit(functools.partial(add, number=2), frozen="encoder")(params)["head"]["w"][0, 0] == 3
    new = jit(dataclasses.replace, frozen="encoder", where=lambda state: state.params)(make_state())
    assert new.params["head"]["w"][0, 0] == 1


def test_inside_other_transformations():
    step = jit(lambda params, x: (add(params, x), x * 2), frozen="encoder")
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
    grads = jax.grad(
        lambda params: sum(jnp.sum(leaf) for leaf in jax.tree.leaves(step(params, 1.0)[0]))
    )(params)
    assert all((leaf == 1).all() for leaf in jax.tree.leaves(grads))
    with jax.disable_jit():
        assert same_objects(step(params, 1.0)[0]["encoder"], params["encoder"])


def test_a_tie_of_tracers_is_nobody_s_buffer():
    step = jit(add, frozen="a", donate_argnums=0)
    new = jax.jit(lambda w: step({"a": w, "b": w}))(jnp.ones(1))
    assert new["a"] == 1
    assert new["b"] == 2
