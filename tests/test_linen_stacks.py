"""Linen as it is scaled up: scanned and rematerialised stacks, boxed parameters, fp8 scales."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax.linen import fp8_ops
from flax.training.train_state import TrainState
from helpers import same_objects

import frozen_optax as fo

X, Y = jax.random.normal(jax.random.key(1), (8, 16)), jnp.ones((8, 16))
OVERWRITTEN = "_overwrite_with_gradient"


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        scale = self.param("scale", nn.initializers.ones, (16,))
        return nn.relu(nn.Dense(16, name="inner")(x)) + x * scale, None


class Stack(nn.Module):
    """Three blocks whose parameters are stacked, computed again in the backward pass."""

    @nn.compact
    def __call__(self, x):
        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        x, _ = nn.scan(nn.remat(Block), length=3, **axes)(name="blocks")(x, None)
        return nn.Dense(16, name="head")(x)


class Layers(nn.Module):
    """A base and a head."""

    options: tuple = ()

    @nn.compact
    def __call__(self, x):
        dense = lambda name: nn.Dense(16, name=name, **dict(self.options))
        return dense("head")(nn.relu(dense("base")(x)))


BOX = nn.with_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
BOXED = Layers((("kernel_init", BOX),))
FP8 = Layers((("dot_general_cls", fp8_ops.Fp8DirectDotGeneralOp),))
STACKS = {
    "a scanned stack": (Stack(), "blocks", ["inner/bias", "inner/kernel", "scale"]),
    "a part of each block": (Stack(), "blocks/inner", ["bias", "kernel"]),
    "all but a part of each": (Stack(), ["head", "blocks/inner"], None),
    "boxed parameters": (BOXED, "base", ["bias", "kernel/value"]),
    "a box": (BOXED, "base/kernel", ["value"]),
    "boxes by a regex": (BOXED, re.compile("base/kernel/value"), None),
}


def make_state(model, tx):
    variables = model.init(jax.random.key(0), X)
    params = variables if OVERWRITTEN in variables else variables["params"]
    return TrainState.create(apply_fn=model.apply, params=params, tx=tx)


def loss_of(state, x, y):
    def loss(params):
        variables = params if OVERWRITTEN in params else {"params": params}
        return jnp.mean((state.apply_fn(variables, x) - y) ** 2)

    return loss


@pytest.mark.parametrize("name", STACKS)
def test_a_stack_trains_what_is_not_frozen(name):
    model, frozen, paths = STACKS[name]
    tx = fo.with_frozen(optax.adamw(1e-1), frozen)
    state, where = make_state(model, tx), lambda state: state.params

    @fo.jit(frozen=tx, where=where, donate_argnums=0)
    def step(state, x, y):
        return state.apply_gradients(grads=fo.grad(loss_of(state, x, y), tx)(state.params))

    found = fo.assert_step_freezes(step, state, X, Y, frozen=tx, where=where)
    assert [*found] == [f"params/{path}" for path in tx.frozen.paths(state.params)]
    if paths is not None:
        assert tx.frozen.paths(state.params) == [f"{frozen}/{path}" for path in paths]
    before = jax.tree.map(jnp.copy, state)
    after = step(state, X, Y)
    fo.assert_frozen(before, after, tx, where=where)
    chosen = fo.partition(after.params, tx)[1], fo.partition(state.params, tx)[1]
    assert same_objects(*chosen)
    assert jax.tree.structure(after) == jax.tree.structure(before)
    for path, old, new in zip(
        fo.by_path("**").paths(before.params),
        jax.tree.leaves(before.params),
        jax.tree.leaves(after.params),
        strict=True,
    ):
        assert bool((old != new).any()) == (path not in tx.frozen.paths(before.params)), path


def test_boxes_keep_their_names_and_may_be_opened():
    tx = fo.with_frozen(optax.adamw(1e-1), "base/kernel")
    state = make_state(BOXED, tx)
    grads = fo.grad(loss_of(state, X, Y), tx)(state.params)
    updates, _ = tx.update(grads, state.opt_state, state.params)
    new = fo.apply_updates(state.params, updates)
    assert new["head"]["kernel"].names == ("embed", "mlp")
    assert new["base"]["kernel"].value is state.params["base"]["kernel"].value
    assert tx.frozen.paths(nn.unbox(state.params)) == ["base/kernel"]
    specs = nn.get_partition_spec(state.params)
    assert jax.tree.leaves(fo.partition(specs, "base/kernel")[1]) == [specs["base"]["kernel"]]


def test_fp8_scales_of_a_frozen_layer_go_on():
    tx = fo.with_frozen(optax.adamw(1e-1), "base")
    state, where = make_state(FP8, tx), lambda state: state.params["params"]

    @fo.jit(frozen=tx, where=where)
    def step(state, x, y):
        grads = fo.grad(loss_of(state, x, y), "params/base")(state.params)
        return state.apply_gradients(grads=grads)

    found = fo.assert_step_freezes(step, state, X, Y, frozen=tx, where=where)
    assert [*found] == ["params/params/base/bias", "params/params/base/kernel"]
    after = state
    for _ in range(3):
        after = step(after, X, Y)
    fo.assert_frozen(state, after, tx, where=where)
    assert same_objects(state.params["params"]["base"], after.params["params"]["base"])
    for layer in ("base", "head"):
        scales = after.params[OVERWRITTEN][layer]["Fp8DirectDotGeneralOp_0"]
        assert (scales["input_amax_history"] != 0).any()
        assert (scales["kernel_scale"] > 0).all()


@pytest.mark.parametrize("said", [{"frozen": "**/base"}, {"trainable": "params/head"}])
@pytest.mark.parametrize("holes", [False, True])
def test_fp8_scales_are_not_overwritten_with_zero(said, holes):
    state = make_state(FP8, optax.sgd(1.0))
    loss = loss_of(state, X, Y)
    with pytest.raises(ValueError, match=r"'_overwrite_with_gradient/.*would make them zero"):
        fo.grad(loss, **said, holes=holes)(state.params)
    fo.grad(loss, trainable=["params/head", OVERWRITTEN])(state.params)
