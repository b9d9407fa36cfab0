"""Numbers of Python's in Equinox modules: a Dropout's rate is no parameter, wherever it stands."""

import sys
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import HOLE, same_objects

import frozen_optax as fo
from frozen_optax import _trees

X, Y = jax.random.normal(jax.random.key(1), (3, 4)), jnp.ones((3, 2))
KEY = jax.random.key(2)
NUMBERS = ["dropout/p", "dropout/inference", "attention/dropout/p", "attention/dropout/inference"]


# With Equinox 0.13.0, jax 0.7.0 frees twice what is compiled for a function that is gone.
KEPT: list[Any] = []


class Model(eqx.Module):
    """What is in any transformer: attention, and a Dropout beside it."""

    dropout: eqx.nn.Dropout
    attention: eqx.nn.MultiheadAttention
    head: eqx.nn.Linear

    def __init__(self, p: Any = 0.5):
        keys = jax.random.split(jax.random.key(0))
        self.dropout = eqx.nn.Dropout(p)
        self.attention = eqx.nn.MultiheadAttention(2, 4, dropout_p=p, key=keys[0])
        self.head = eqx.nn.Linear(4, 2, key=keys[1])

    def __call__(self, x: Any, key: Any) -> Any:
        assert not isinstance(self.dropout.p, jax.Array)
        of_attention, of_dropout = jax.random.split(key)
        x = x + self.attention(x, x, x, key=of_attention)
        return jax.vmap(self.head)(self.dropout(x, key=of_dropout))


def loss(model: Model, x: Any, y: Any, key: Any) -> Any:
    return jnp.mean((model(x, key) - y) ** 2)


def with_rate(model: Any, p: Any) -> Any:
    return eqx.tree_at(lambda model: model.dropout.p, model, p)


def assert_close(left: Any, right: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3), left, right)


def train_step(tx: Any, jit: Any, traces: list[Any], **options: Any) -> Any:
    @jit(**options)
    def step(model, state, x, y, key):
        traces.append(model)
        value, grads = fo.value_and_grad(loss, tx)(model, x, y, key)
        updates, state = tx.update(grads, state, model)
        return fo.apply_updates(model, updates), state, value

    return step


# --- a whole step


def test_attention_with_dropout_goes_straight_in_and_is_proved():
    model, tx, traces = Model(), fo.with_frozen(optax.adamw(1e-1), "attention"), []
    step = train_step(tx, fo.jit, traces, frozen=tx, donate_argnums=1)
    state = tx.init(model)
    found = fo.assert_step_freezes(step, model, state, X, Y, KEY, frozen=tx, exact=True)
    assert set(found.values()) == {"itself"}
    assert set(NUMBERS) < found.keys()
    traces.clear()
    after, state, first = step(model, state, X, Y, KEY)
    for _ in range(3):
        after, state, value = step(after, state, X, Y, KEY)
    assert value < first
    assert len(traces) == 1
    fo.assert_frozen(model, after, tx)
    assert same_objects(after.attention, model.attention)
    assert after.dropout.p is model.dropout.p
    assert after.dropout.inference is False
    assert fo.fingerprint(model, tx).keys() == {
        f"attention/{name}_proj/weight" for name in ("query", "key", "value", "output")
    }
    fo.assert_fingerprint(after, fo.fingerprint(model, tx))


def test_it_trains_as_its_arrays_do_under_equinoxs_own_jit():
    model, tx = Model(), fo.with_frozen(optax.adamw(1e-1), "attention")
    arrays, static = eqx.partition(model, eqx.is_inexact_array)
    step = train_step(tx, fo.jit, [], frozen=tx)
    state, expected = tx.init(model), tx.init(arrays)
    fo.assert_trees_bit_identical(state, expected)

    @eqx.filter_jit
    def expected_step(arrays, state):
        of_arrays = lambda arrays: loss(eqx.combine(arrays, static), X, Y, KEY)
        grads = eqx.filter_grad(of_arrays)(arrays)
        updates, state = tx.update(grads, state, arrays)
        return eqx.apply_updates(arrays, updates), state

    KEPT.append(expected_step)
    for _ in range(3):
        model, state, _ = step(model, state, X, Y, KEY)
        arrays, expected = expected_step(arrays, expected)
    assert_close(model.head, arrays.head)
    assert jax.tree.structure(state) == jax.tree.structure(expected)


def test_its_gradient_and_update_are_none_as_equinox_has_them():
    model, tx = Model(), fo.with_frozen(optax.adam(1e-1), "attention")
    expected = eqx.filter_grad(loss)(model, X, Y, KEY)
    for holes in (False, True):
        grads = fo.grad(loss, tx, holes=holes)(model, X, Y, KEY)
        assert grads.dropout.p is grads.dropout.inference is None
        assert_close(grads.head, expected.head)
    found = [tx.update(g, tx.init(model), model)[0] for g in (grads, expected)]
    assert [updates.dropout.p for updates in found] == [None, None]
    assert_close(found[0].head, found[1].head)
    assert eqx.apply_updates(model, found[1]).dropout is not None
    moved = fo.apply_updates(model, found[0])
    assert moved.dropout.p is model.dropout.p
    proved = fo.assert_update_freezes(tx, model, tx)
    assert {proved[path] for path in NUMBERS} == {"absent"}


@pytest.mark.exhaustive  # it is compiled for long; tests/test_equinox.py has a line search, too
def test_a_line_search_calls_its_function_with_the_module():
    model, tx = Model(), fo.with_frozen(optax.lbfgs(), "attention")
    of_model = lambda model: loss(model, X, Y, KEY)
    state, first = tx.init(model), of_model(model)
    for _ in range(3):
        value, grads = fo.value_and_grad_from_state(of_model, tx)(model, state=state)
        search = {"value": value, "grad": grads, "value_fn": of_model}
        updates, state = tx.update(grads, state, model, **search)
        model = fo.apply_updates(model, updates)
    assert of_model(model) < first


def test_a_direction_has_none_in_its_place():
    seen: list[Any] = []

    def update(updates, state, params=None, *, product_fn, **extra):
        return product_fn(params, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda params: (), update)
    model, tx = Model(), fo.with_frozen(inner, "attention")
    product = lambda model, direction: seen.append(direction) or direction
    grads = fo.grad(loss, tx)(model, X, Y, KEY)
    tx.update(grads, tx.init(model), model, product_fn=product)
    assert seen[0].dropout.p is seen[0].attention.dropout.inference is None
    fo.assert_trees_bit_identical(seen[0].head, grads.head)


def test_the_other_tools_take_it_for_no_parameter(tmp_path):
    model = Model()
    rows = {row.path: row for row in fo.summary(model, "attention", optax.adam(1e-1)).rows}
    assert rows["dropout"].frozen
    assert (rows["dropout"].parameters, rows["dropout"].bytes) == (0, 0)
    trained, frozen = fo.partition(model, "attention")
    assert (trained.dropout.p, frozen.dropout.p) == (HOLE, 0.5)
    assert same_objects(fo.combine(trained, frozen), model)
    assert fo.restore(with_rate(model, 1), model, "attention").dropout.p == 0.5
    with pytest.raises(ValueError, match=r"'dropout/p': found a leaf float32\[\]"):
        fo.restore(model, with_rate(model, jnp.array(0.5)), "attention")
    with pytest.raises(AssertionError, match=r"dropout/p: a leaf of type float became a leaf of"):
        fo.assert_frozen(model, with_rate(model, 1), "attention", expect_movement=False)
    with pytest.raises(AssertionError, match=r"dropout/p: .* 0\.5 .* became 0\.25"):
        fo.assert_frozen(model, with_rate(model, 0.25), "attention", expect_movement=False)
    # A checkpoint has the arrays: another rate, and evaluation, load it as well.
    fo.save_trained(tmp_path / "head", model, "attention")
    other = eqx.nn.inference_mode(with_rate(model, 0.25))
    loaded = fo.load_trained(tmp_path / "head", other)
    assert (loaded.dropout.p, loaded.dropout.inference) == (0.25, True)
    fo.assert_trees_bit_identical(loaded.head, model.head)


def test_selections_are_judged_without_it():
    model = Model()
    nothing = r"by_path\('dropout'\) selects nothing but what is no array \('dropout/p', "
    for room in (fo.partition, fo.summary):
        with pytest.raises(ValueError, match=nothing):
            room(model, "dropout")
    with pytest.raises(ValueError, match=nothing):
        fo.with_frozen(optax.adam(1e-1), "dropout").init(model)
    with pytest.raises(ValueError, match=r"freezes all 6 leaves .*nothing to train"):
        fo.with_frozen(optax.adam(1e-1), ["attention", "head"]).init(model)
    labels = fo.stages({"head": 0, "attention": 5})[1].labels(model).attention
    assert (labels.dropout.p, labels.query_proj.weight) == ("frozen", "attention")


def test_batch_norm_has_a_flag_and_a_state_of_arrays():
    norm, stats = eqx.nn.make_with_state(eqx.nn.BatchNorm)(4, axis_name="batch", mode="ema")
    model = {"norm": norm, "head": eqx.nn.Linear(4, 2, key=KEY)}
    tx = fo.with_frozen(optax.adam(1e-1), "norm")

    def of_batch(model, stats, x, y):
        one = lambda x, stats: model["norm"](x, stats)
        normed, stats = jax.vmap(one, (0, None), (0, None), axis_name="batch")(x, stats)
        return jnp.mean((jax.vmap(model["head"])(normed) - y) ** 2), stats

    @fo.jit(frozen=tx, where=lambda state: state[0])
    def step(state, opt_state, x, y):
        model, stats = state
        (_, stats), grads = fo.value_and_grad(of_batch, tx, has_aux=True)(model, stats, x, y)
        updates, opt_state = tx.update(grads, opt_state, model)
        return (fo.apply_updates(model, updates), stats), opt_state

    (after, later), _ = step((model, stats), tx.init(model), X, Y)
    assert same_objects(after["norm"], norm)
    before, now = (jax.tree.leaves(each) for each in (stats, later))
    assert not all(np.array_equal(left, right) for left, right in zip(before, now, strict=True))


# --- which numbers these are


class Holder(eqx.Module):
    w: Any
    more: Any


def test_numbers_below_a_module_are_its_objects_and_others_are_not():
    tree = {"scale": 1.0, "model": Holder(jnp.ones(2), [0.5, {"flag": True}]), "last": 2}
    trained, frozen = fo.partition(tree, "model/w")
    assert (trained["scale"], trained["last"]) == (1.0, 2)
    assert trained["model"].more == [HOLE, {"flag": HOLE}]
    assert frozen["model"].more == [0.5, {"flag": True}]
    grads = fo.grad(lambda tree: tree["scale"] * jnp.sum(tree["model"].w), ["model/w", "last"])
    assert (grads(tree)["scale"], grads(tree)["model"].more) == (2.0, [None, {"flag": None}])


def test_arrays_of_numpy_and_its_scalars_are_arrays_in_a_module_too():
    model = Holder(jnp.ones(2), [np.float64(0.5), np.ones(()), np.int32(1)])
    trained, _ = fo.partition(model, "w")
    assert trained.more == model.more
    assert isinstance(model.more[0], float)  # as numpy has it


def test_a_module_of_nothing_else_is_as_any_tree():
    model = Holder(1.0, 2.0)
    assert fo.fingerprint(model, "w").keys() == {"w"}
    step = fo.jit(lambda model: Holder(model.w, model.more + 1), frozen="w")
    after = step(model)
    assert (after.w, float(after.more)) == (1.0, 3.0)
    fo.assert_frozen(model, after, "w")
    assert fo.partition(Holder(False, True), "w")[0].more is True  # a mask


def test_without_equinox_no_tree_is_looked_through(monkeypatch):
    looked: list[Any] = []
    in_modules = _trees.in_modules
    seen = lambda tree: looked.append(tree) or in_modules(tree)
    for room in sys.modules.copy().values():
        if getattr(room, "in_modules", None) is in_modules:
            monkeypatch.setattr(room, "in_modules", seen)
    selector = fo.by_path("w")
    for tree in ({"w": jnp.ones(2), "b": jnp.ones(2)}, Holder(jnp.ones(2), jnp.ones(2))):
        fo.partition(tree, selector)
    assert not looked  # there is no number of Python's in them
    model = Holder(jnp.ones(2), [jnp.ones(2), 0.5])
    for _ in range(3):
        fo.partition(model, selector)
        fo.grad(lambda model: jnp.sum(model.w * model.more[0]), selector)(model)
    assert len(looked) == 1  # found once for a structure
    monkeypatch.delitem(sys.modules, "equinox")
    fo.partition({"w": jnp.ones(2), "b": 0.5}, selector)
    assert _trees.in_modules(model) == frozenset()


# --- under fo.jit


def rates(model: Model) -> Any:
    return model.dropout.p, model.dropout.inference


def test_another_rate_is_another_program_and_the_same_is_not():
    traces: list[Any] = []

    @fo.jit(frozen="attention", where=lambda state: state[0])
    def step(state):
        traces.append(state[0])
        model, more = state
        return (eqx.tree_at(lambda m: m.head.bias, model, model.head.bias + 1), more)

    kinds = [0.0, -0.0, 0, False, 0.5, float("nan"), float("-inf")]
    models = [with_rate(Model(), kind) for kind in kinds]
    for model in models * 2:
        after, more = step((model, Model(0.25)))
        assert after.dropout.p is model.dropout.p
        assert more.dropout.p == 0.25
    assert [str(model.dropout.p) for model in traces] == list(map(str, kinds))
    evaluated = eqx.nn.inference_mode(models[4])
    for model in (evaluated, models[4], evaluated):
        assert step((model, Model(0.25)))[0].dropout.inference is model.dropout.inference
    assert len(traces) == len(kinds) + 1


def test_a_step_that_sets_another_rate_is_refused_and_the_same_is_not():
    @fo.jit(frozen="attention", static_argnames="p")
    def step(model, p):
        return with_rate(model, p)

    model = Model(0.3)
    assert step(model, p=float("0.3")).dropout.p is model.dropout.p
    with pytest.raises(ValueError, match=r"dropout/p: whatever it was, it becomes a leaf of type"):
        step(model, p=0.25)
    halved = lambda model: with_rate(model, model.dropout.p / 2)
    with pytest.raises(AssertionError, match="1 of 8 frozen leaves are not proved"):
        fo.assert_step_freezes(halved, model, frozen="attention")


def test_numbers_that_a_step_returns_elsewhere_are_arrays_as_ever():
    model = Model()

    @fo.jit(frozen="attention", where=lambda state: state["model"])
    def step(state):
        rate = state["model"].dropout.p
        return state, (rate, False, 2), {"rate": rate}

    state = {"model": model, "average": Model(0.25), "scale": 0.5}
    new, numbers, more = step(state)
    assert new["average"].dropout.p is state["average"].dropout.p
    assert new["average"].dropout.inference is False
    for number in (*numbers, more["rate"], new["scale"]):
        assert isinstance(number, jax.Array)


def test_a_rate_that_becomes_an_array_is_a_parameter():
    traces: list[Any] = []

    @fo.jit(frozen="w")
    def step(model):
        traces.append(model)
        return Holder(model.w, jax.tree.map(lambda leaf: leaf, model.more))

    for more in (0.5, jnp.array(0.5), np.ones(2)):
        model = Holder(jnp.ones(2), [jnp.ones(1), more])
        kept = step(model).more[1] is more
        assert kept is isinstance(more, float)
    assert [isinstance(model.more[1], float) for model in traces] == [True, False, False]


def test_a_step_compiled_ahead_of_time_is_for_its_rates():
    step = fo.jit(lambda model: model, frozen="attention")
    model = Model()
    compiled = step.lower(model).compile()
    assert same_objects(compiled(model).attention, model.attention)
    with pytest.raises(TypeError, match=r"compiled for other leaves .*: 'dropout/p', 'attention"):
        compiled(Model(0.25))
    assert step.eval_shape(model).dropout.p is model.dropout.p
