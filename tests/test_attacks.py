"""What an attack on `with_frozen` and `jit` found: wrong in silence, wrongly refused, no help."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import host_devices

import frozen_optax as fo

LOSS = lambda p, x=1.0: jnp.sum((p["enc"]["a"] * p["enc"]["b"] * p["head"] * x - 2.0) ** 2)


def make_params():
    return {"enc": {"a": jnp.ones(3), "b": jnp.ones(3)}, "head": jnp.ones(3)}


# --- what is frozen changes after init


def test_everything_frozen_only_since_init_is_an_error():
    tx = fo.with_frozen(optax.adam(0.1), lambda path, leaf: leaf.ndim == 1)
    state = tx.init({"a": jnp.ones(3), "b": jnp.ones((3, 3))})
    params = {"a": jnp.ones(3), "b": jnp.ones(3)}
    with pytest.raises(ValueError, match="freezes all 2 leaves"):
        tx.update(params, state, params)
    values = fo.with_frozen(
        optax.adam(0.1), lambda p: jax.tree.map(lambda x: bool(np.all(np.asarray(x) != 0)), p)
    )
    begun = {"a": jnp.ones(3), "b": jnp.zeros(3)}
    with pytest.raises(ValueError, match="freezes all 2 leaves"):
        values.update(params, values.init(begun), params)
    said = fo.with_frozen(optax.adam(0.1), "**")
    with pytest.raises(ValueError, match=r"the state is not that of their `init`.*tx\.init"):
        said.update(begun, fo.with_frozen(optax.adam(0.1), "a").init(begun), begun)


def test_a_state_with_holes_is_refused_where_nothing_is_frozen():
    params = make_params()
    state = fo.with_frozen(optax.adam(0.1), "enc").init(params)
    with pytest.raises(ValueError, match=r"'0/mu/enc'.*Make a new one"):
        fo.with_frozen(optax.adam(0.1), False).update(params, state, params)


def test_host_arrays_of_64_bits_frozen_otherwise_are_an_error():
    params = {"enc": jnp.ones(3), "head": np.ones(3)}
    by_dtype = lambda path, leaf: leaf.dtype == np.float32
    with pytest.raises(ValueError, match=r"not what it freezes of them in a trace.*jnp\.asarray"):
        fo.jit(lambda p: {"enc": p["enc"], "head": p["head"] * 2}, frozen=by_dtype)(params)
    tx = fo.with_frozen(optax.sgd(0.1), by_dtype)
    with pytest.raises(ValueError, match="freezes all 2 leaves"):
        jax.jit(tx.update)(params, tx.init(params), params)


# --- states of several forms


def alike():
    """A state of two forms that prune to one: a lone hole first, then the encoder's own holes."""

    def update(updates, state, params=None):
        is_first = isinstance(state["x"], optax.MaskedNode)
        mean = updates if is_first else jax.tree.map(lambda m, g: 0.5 * m + g, state["m"], updates)
        return jax.tree.map(lambda m: -0.01 * m, mean), {"m": mean, "x": updates["enc"]}

    init = lambda params: {"m": jax.tree.map(jnp.zeros_like, params), "x": optax.MaskedNode()}
    return optax.GradientTransformation(init, update)


def gathering(count):
    """The last gradients in a row, so that the state takes as many forms."""

    def update(updates, state, params=None):
        state = (*state, updates)[-count:]
        return jax.tree.map(lambda *each: sum(each), *state), state

    return optax.GradientTransformation(lambda params: (), update)


@pytest.mark.parametrize(
    "make", [alike, lambda: gathering(2), lambda: gathering(12)], ids=["alike", "two", "many"]
)
@pytest.mark.parametrize("anew", [False, True])
def test_a_state_of_several_forms_goes_on_whoever_holds_it(make, anew):
    params = make_params()
    tx, alone = fo.with_frozen(make(), "enc"), make()
    state, expected = tx.init(params), alone.init(fo.partition(params, "enc")[0])
    for i in range(14):
        gradients = jax.tree.map(lambda leaf, i=i: leaf * (i + 1.0), params)
        tx = fo.with_frozen(make(), "enc") if anew else tx
        tx.init(params)  # another run begins
        updates, state = tx.update(gradients, state, params)
        wanted, expected = alone.update(fo.partition(gradients, "enc")[0], expected)
        assert np.array_equal(updates["head"], wanted["head"])


# --- legitimate steps


def step_of(body, tx):
    def step(params, state, *args, **kwargs):
        params = body(params, *args, **kwargs)
        updates, state = tx.update(fo.grad(LOSS, tx)(params), state, params)
        return optax.apply_updates(params, updates), state

    return step


def stopped(params):
    return {"enc": jax.lax.stop_gradient(params["enc"]), "head": params["head"]}


def popped(params, batch):
    assert batch.pop("x").shape == ()
    return params


def appended(params, batch):
    batch.append(len(batch))
    assert len(batch) == 2
    return params


def static(params, *, n):
    assert isinstance(n, (np.bool_, np.int64, jax.ShapeDtypeStruct))
    return params


LEGITIMATE = {
    "gradients stopped": (stopped, (), {}, {}),
    "an argument popped": (popped, ({"x": jnp.ones(())},), {}, {}),
    "an argument appended to": (appended, ([jnp.ones(())],), {}, {}),
    "a static bool of numpy": (static, (), {"n": np.bool_(True)}, {"static_argnames": "n"}),
    "a static integer of numpy": (static, (), {"n": np.int64(2)}, {"static_argnames": "n"}),
    "a static shape": (
        static,
        (),
        {"n": jax.ShapeDtypeStruct((2,), "float32")},
        {"static_argnames": "n"},
    ),
}


@pytest.mark.parametrize("name", LEGITIMATE)
def test_a_legitimate_step_is_accepted_though_it_is_traced_twice(name):
    body, args, kwargs, options = LEGITIMATE[name]
    tx, params = fo.with_frozen(optax.adam(0.1), "enc"), make_params()
    new, _ = fo.jit(step_of(body, tx), frozen=tx, **options)(
        params, tx.init(params), *args, **kwargs
    )
    assert new["enc"]["a"] is params["enc"]["a"]
    assert not np.array_equal(new["head"], params["head"])


@pytest.mark.parametrize("by_name", [False, True])
def test_an_optimizer_may_be_a_static_argument(by_name):
    tx, params = fo.with_frozen(optax.adam(0.1), "enc"), make_params()

    def step(params, state, tx):
        updates, state = tx.update(fo.grad(LOSS, tx)(params), state, params)
        return optax.apply_updates(params, updates), state

    jitted = (
        fo.jit(step, frozen=tx, static_argnames="tx")
        if by_name
        else fo.jit(step, frozen=tx, static_argnums=2)
    )
    new, _ = (
        jitted(params, tx.init(params), tx=tx) if by_name else jitted(params, tx.init(params), tx)
    )
    assert new["enc"]["a"] is params["enc"]["a"]


def test_with_jit_disabled_a_step_may_look_at_values():
    tx, params = fo.with_frozen(optax.adam(0.1), "enc"), make_params()

    def looks(params):
        assert float(LOSS(params)) > 0
        return params

    with jax.disable_jit():
        new, _ = fo.jit(step_of(looks, tx), frozen=tx)(params, tx.init(params))
    assert new["enc"]["a"] is params["enc"]["a"]


# --- looked at with the selection that it has


SMALL = lambda path, leaf: leaf.ndim < 2 and path != "z"
TREES = {
    "a": {"a": jnp.ones(3), "b": jnp.ones((2, 2)), "z": jnp.ones(3)},
    "b": {"a": np.ones((2, 2), np.float32), "b": jnp.ones(3), "z": jnp.ones(3)},
}


def large_doubled(params):
    return {key: leaf if leaf.ndim < 2 and key != "z" else leaf * 2 for key, leaf in params.items()}


def test_a_first_call_of_other_shapes_than_lowered_is_its_own():
    step = fo.jit(large_doubled, frozen=SMALL)
    compiled = step.lower(TREES["a"]).compile()
    assert step(TREES["b"])["b"] is TREES["b"]["b"]  # no warning of "a", which is trained here
    with pytest.raises(TypeError, match=r"other leaves are frozen: 'a', and now 'b'"):
        compiled(TREES["b"])


def test_what_is_committed_elsewhere_is_left_to_jax():
    mesh = jax.sharding.Mesh(np.array(host_devices(2)), "x")
    split, whole = (
        jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)) for axes in (["x"], [])
    )
    params = jax.device_put({"e": jnp.ones((2, 2)), "h": jnp.ones((2, 2))}, whole)
    step = fo.jit(
        lambda p: p | {"h": p["h"] + 1}, frozen="e", in_shardings=({"e": split, "h": whole},)
    )
    with pytest.raises(ValueError, match="Sharding passed to"):
        step(params)


# --- where= compares what it names


def test_other_parts_may_differ_in_the_checks_as_in_jit():
    before = {"p": make_params(), "o": ()}
    after = {"p": make_params() | {"head": jnp.zeros(3)}, "o": (jnp.ones(2),)}
    where = lambda state: state["p"]
    fo.assert_frozen(before, after, "enc", where=where)
    moved = {**after, "p": jax.tree.map(lambda leaf: leaf * 2, after["p"])}
    restored = fo.restore(moved, before, "enc", where=where)
    assert restored["p"]["enc"]["a"] is before["p"]["enc"]["a"]
    assert restored["o"] is moved["o"] or np.array_equal(restored["o"][0], moved["o"][0])
    with pytest.raises(AssertionError, match="enc/a"):
        fo.assert_frozen(before, moved, "enc", where=where)
    with pytest.raises(
        ValueError, match=r"the tree after and what where= names differ in structure at 'enc'"
    ):
        fo.assert_frozen(
            before, {"p": {"enc": {}, "head": jnp.ones(3)}, "o": ()}, "enc", where=where
        )


# --- NNX, where types are lost


class Adapted(nnx.Module):
    def __init__(self, rngs):
        self.base = nnx.Linear(4, 4, rngs=rngs)
        self.lora = nnx.LoRA(4, 2, 4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, x):
        return self.head(self.drop(self.base(x) + self.lora(x)))


BY_TYPE = {
    "not a type": {"frozen": nnx.Not(nnx.LoRAParam)},
    "a path or a type": {"frozen": nnx.Any(nnx.PathContains("base"), nnx.LoRAParam)},
    "a type": {"trainable": nnx.LoRAParam},
    "a path and a type": {"frozen": nnx.All(nnx.PathContains("lora"), nnx.LoRAParam)},
}


@pytest.mark.parametrize("name", BY_TYPE)
@pytest.mark.parametrize("optimizer", [optax.adamw, optax.sgd])
def test_a_filter_by_type_is_refused_where_arrays_are_bare(optimizer, name):
    model = Adapted(nnx.Rngs(0))
    hosted = nnx.Optimizer(model, fo.with_frozen(optimizer(0.1), **BY_TYPE[name]), wrt=nnx.Param)
    gradients = nnx.grad(lambda model: jnp.sum(model(jnp.ones((2, 4))) ** 2))(model)
    with pytest.raises(
        ValueError, match=r"selects nothing that could be told.*nnx\.Optimizer hands bare arrays"
    ):
        hosted.update(model, gradients)
    by_path = fo.with_frozen(optimizer(0.1), nnx.Not(nnx.PathContains("lora")))
    hosted = nnx.Optimizer(model, by_path, wrt=nnx.Param)
    before = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    hosted.update(model, gradients)
    fo.assert_frozen(before, nnx.to_pure_dict(nnx.state(model, nnx.Param)), by_path)


def test_a_gradient_that_loses_counts_of_numbers_is_refused():
    model, x = Adapted(nnx.Rngs(0)), jnp.ones((2, 4))
    loss = lambda model: jnp.sum(model(x) ** 2)
    frozen = ["base", "drop"]
    with pytest.raises(
        ValueError, match=r"the nnx.Variable at 'drop/rngs/count' in place.*nnx\.value_and_grad"
    ):
        fo.value_and_grad(loss, frozen)(model)
    model.eval()
    assert fo.grad(loss, frozen)(model).lora.lora_b[...].shape == (2, 4)


# --- words


def test_an_optimizer_of_another_class_is_told_which_remembers():
    tx = fo.with_frozen(optax.sgd(0.1), "enc")
    with pytest.raises(TypeError, match="only the one that with_frozen returned does"):
        fo.jit(lambda p: p, frozen=optax.MultiSteps(tx, 2))
    step = fo.jit(lambda p: p | {"head": p["head"] + 1}, frozen=tx.frozen & ~fo.by_path("enc/a"))
    assert step(make_params())["head"][0] == 2


def test_a_key_that_is_to_be_trained_is_not_told_to_be_allowed():
    with pytest.raises(TypeError, match=r"'key' is .*, a random key\. Freeze it\."):
        fo.with_frozen(optax.sgd(0.1), "enc").init({"enc": jnp.ones(2), "key": jax.random.key(0)})
