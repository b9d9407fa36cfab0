"""`jit` throws nothing away that a step computes: a frozen leaf comes out unchanged or raises."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from helpers import make_params, same_objects

import frozen_optax as fo

THROWN_AWAY = (
    r"frozen here, and the step makes something else of them:(?s:.*){path}(?s:.*)discard=True"
)


def refuses(path):
    return pytest.raises(ValueError, match=THROWN_AWAY.format(path=re.escape(path)))


def loss_fn(params, x):
    return jnp.sum((x @ params["encoder"]["w"] + params["encoder"]["b"]) @ params["head"]["w"])


def train(optimizer, gradient, apply=fo.apply_updates, **options):
    """One step as users write it; `gradient` and `options` may contradict the optimizer."""

    @fo.jit(**options)
    def step(params, state, x):
        updates, state = optimizer.update(gradient(loss_fn)(params, x), state, params)
        return apply(params, updates), state

    params = make_params()
    new, _ = step(params, optimizer.init(params), jnp.ones((1, 2)))
    return params, new


# --- what stays


@pytest.mark.parametrize("apply", [fo.apply_updates, optax.apply_updates], ids=["exact", "optax"])
@pytest.mark.parametrize(
    "gradient", [jax.grad, lambda loss: fo.grad(loss, "encoder")], ids=["of all", "of the head"]
)
def test_a_step_that_freezes_the_same_everywhere_is_accepted(apply, gradient):
    tx = fo.with_frozen(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1)), "encoder")
    params, new = train(tx, gradient, apply, frozen=tx)
    assert same_objects(params["encoder"], new["encoder"])
    assert not np.array_equal(params["head"]["w"], new["head"]["w"])


KEPT = {
    "handed through": lambda tree: tree,
    "plus zero": lambda tree: jax.tree.map(lambda leaf: leaf + 0.0, tree),
    "through another jit": jax.jit(lambda tree: tree),
    "through a scan": lambda tree: jax.lax.scan(lambda carry, _: (carry, None), tree, None, 3)[0],
    "through a condition": lambda tree: jax.lax.cond(
        tree["w"][0, 0] > 0, lambda t: t, lambda t: t, tree
    ),
    "through remat": jax.checkpoint(lambda tree: tree),
    "restored": lambda tree: fo.restore(jax.tree.map(lambda leaf: leaf * 2, tree), tree, "**"),
}


@pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT)
def test_a_leaf_as_another_tracer_of_itself_is_accepted(kept):
    step = fo.jit(
        lambda params: {"encoder": kept(params["encoder"]), "head": params["head"]},
        frozen="encoder",
    )
    params = make_params()
    assert same_objects(params["encoder"], step(params)["encoder"])


def test_a_step_that_hands_frozen_leaves_through_traces_once():
    step = fo.jit(
        chex.assert_max_traces(lambda params: {**params, "head": params["encoder"]["w"]}, n=1),
        frozen="encoder",
    )
    params = {**make_params(), "head": jnp.ones((2, 2))}
    step(step(params))


def test_with_jit_disabled_changes_are_seen_all_the_same():
    tx = fo.with_frozen(optax.adamw(0.1), "encoder")
    with jax.disable_jit():
        params, new = train(tx, jax.grad, optax.apply_updates, frozen=tx)
        with refuses("head/w"):
            train(tx, jax.grad, optax.apply_updates, frozen="**")
    assert same_objects(params["encoder"], new["encoder"])


def test_inside_another_trace_no_tracer_leaks():
    tx = fo.with_frozen(optax.sgd(0.1), "encoder")
    params, scale = make_params(), jnp.ones(2)

    @jax.jit
    def outer(params, scale):
        def step(params, x):
            gradients = jax.grad(loss_fn)(params, x * scale)  # closes over a tracer
            updates, _ = tx.update(gradients, tx.init(params), params)
            return optax.apply_updates(params, updates)

        return fo.jit(step, frozen=tx)(params, jnp.ones((1, 2)))

    with jax.checking_leaks():
        new = outer(params, scale)
    fo.assert_frozen(params, new, tx)


# --- what does not

DAMAGE = {
    "scaled": lambda leaf: leaf * 2,
    "zeros": jnp.zeros_like,
    "cut": lambda leaf: leaf[:0],
    "cast": lambda leaf: leaf.astype("bool"),
    "a constant": lambda leaf: np.ones(leaf.shape, leaf.dtype),
    "nan": lambda leaf: leaf + jnp.nan,
    "from the host": lambda leaf: jax.pure_callback(
        lambda x: x, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), leaf
    ),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_what_is_made_of_a_frozen_leaf_is_refused_unless_said(damage):
    def step(params):
        return {
            "encoder": jax.tree.map(damage, params["encoder"]),
            "head": {"w": params["head"]["w"] + 1},
        }

    params = make_params()
    with refuses("encoder/w"):
        fo.jit(step, frozen="encoder")(params)
    new = fo.jit(step, frozen="encoder", discard=True)(params)
    assert same_objects(params["encoder"], new["encoder"])
    assert new["head"]["w"][0, 0] == 2


@pytest.mark.parametrize("frozen", ["**", "head", ["encoder", "head/w"]])
def test_freezing_more_in_the_step_than_in_the_optimizer_fails(frozen):
    tx = fo.with_frozen(optax.adamw(0.1), "encoder/b")
    with pytest.raises(
        ValueError, match=r"the step makes something else of them|there is nothing to train"
    ):
        train(tx, jax.grad, frozen=frozen)


@pytest.mark.parametrize("where", ["call", "trace", "lower", "eval_shape"])
def test_a_bare_optimizer_is_refused_wherever_the_step_is_traced(where):
    tx = optax.adamw(0.1)

    def step(params, state, x):
        updates, state = tx.update(jax.grad(loss_fn)(params, x), state, params)
        return fo.apply_updates(params, updates), state

    params, jitted = make_params(), fo.jit(step, frozen="encoder")
    with refuses("encoder/w"):
        (jitted if where == "call" else getattr(jitted, where))(
            params, tx.init(params), jnp.ones((1, 2))
        )


def test_the_error_says_what_reaches_the_leaf_however_given():
    def step(params, x, *, scale):
        return {"base": params["base"] + x * scale, "head": params["head"]}

    with pytest.raises(
        ValueError,
        match=r"depends on x through mul.*, add\n    depends on scale through mul.*, add",
    ):
        fo.jit(step, frozen="base")({"base": jnp.ones(2), "head": jnp.ones(2)}, 2.0, scale=3.0)


def test_leaves_that_change_places_are_refused():
    swapped = lambda params: {"a": params["b"], "b": params["a"], "head": params["head"]}
    with pytest.raises(ValueError, match=r"  a: .*\n    is b"):
        fo.jit(swapped, frozen=["a", "b"])(
            {"a": jnp.ones(2), "b": jnp.ones(2), "head": jnp.ones(2)}
        )


def test_a_moving_average_that_would_never_happen_is_refused():
    tx = fo.with_frozen(optax.adam(0.1), "target")

    def step(params, x):
        target = optax.incremental_update(params["online"], params["target"], 0.1)
        return {"online": params["online"] + x, "target": target}

    params = {"online": jnp.ones(2), "target": jnp.zeros(2)}
    with refuses("target"):
        fo.jit(step, frozen=tx)(params, 1.0)
    assert fo.jit(step, frozen=False)(params, 1.0)["target"][0] == np.float32(0.1)


class Adapted(nnx.Module):
    """A frozen layer with an adapter, batch statistics and dropout, as NNX users have it."""

    def __init__(self, rngs):
        self.base = nnx.LoRA(2, 1, 2, base_module=nnx.Linear(2, 2, rngs=rngs), rngs=rngs)
        self.norm = nnx.BatchNorm(2, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.norm(self.base(x)))


def test_counts_and_statistics_of_nnx_do_not_stop_in_silence():
    model = Adapted(nnx.Rngs(0))
    adapters = fo.by_path("**/lora_*")
    tx = fo.with_frozen(optax.adamw(0.1), ~adapters)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    def step(state, x):
        model, optimizer = state
        optimizer.update(model, nnx.grad(lambda model: jnp.sum(model(x) ** 2))(model))
        return model, optimizer

    x = jnp.arange(8.0).reshape(4, 2)
    for frozen in (tx, ~adapters):
        with refuses("dropout/rngs/count"):
            fo.jit(step, frozen=frozen, where=lambda state: state[0])((model, optimizer), x)
    jitted = fo.jit(step, frozen=tx, where=lambda state: nnx.state(state[0], nnx.Param))
    new, _ = jitted((model, optimizer), x)
    fo.assert_frozen(nnx.state(model, nnx.Param), nnx.state(new, nnx.Param), tx)
    assert new.dropout.rngs.count[...] == model.dropout.rngs.count[...] + 1
    assert not np.array_equal(new.norm.mean[...], model.norm.mean[...])


def test_a_linen_train_state_is_accepted_stepping_by_optax():
    tx = fo.with_frozen(optax.adamw(0.1), "encoder")
    state = TrainState.create(apply_fn=loss_fn, params=make_params(), tx=tx)

    @fo.jit(frozen=tx, where=lambda state: state.params)
    def step(state, x):
        return state.apply_gradients(grads=fo.grad(state.apply_fn, tx)(state.params, x))

    new = step(state, jnp.ones((1, 2)))
    assert same_objects(new.params["encoder"], state.params["encoder"])
    fo.assert_frozen(state, new, tx, where=lambda state: state.params)


# --- the proof looks at the step's own function


@pytest.mark.parametrize("discard", [False, True])
def test_a_proof_of_a_jit_step_is_of_its_function(discard):
    params = make_params()
    doubled = fo.jit(
        lambda p: jax.tree.map(lambda leaf: leaf * 2, p), frozen="encoder", discard=discard
    )
    with pytest.raises(AssertionError, match=r"encoder/w: refuted"):
        fo.assert_step_freezes(doubled, params, frozen="encoder")
    kept = fo.jit(
        lambda p: {**p, "head": {"w": p["head"]["w"] * 2}}, frozen="encoder", discard=discard
    )
    assert fo.assert_step_freezes(kept, params, frozen="encoder") == {
        "encoder/b": "itself",
        "encoder/w": "itself",
    }
