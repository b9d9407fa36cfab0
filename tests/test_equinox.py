"""Equinox modules as they are: what is no array in them is frozen, whatever is said."""

import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from helpers import HOLE, host_devices, same_objects

import frozen_optax as fo

X, Y = jax.random.normal(jax.random.key(1), (8, 2)), jnp.ones((8, 2))
FIRST = ["layers/0/weight", "layers/0/bias"]
OBJECTS = ["activation", "final_activation"]


def make_model(activation: Any = jax.nn.relu) -> eqx.nn.MLP:
    return eqx.nn.MLP(2, 2, width_size=4, depth=2, activation=activation, key=jax.random.key(0))


def loss(model: eqx.nn.MLP, x: Any, y: Any) -> Any:
    return jnp.mean((jax.vmap(model)(x) - y) ** 2)


def is_first(path: str, leaf: Any) -> bool:
    return path.startswith("layers/0")


def arrays(tree: Any) -> Any:
    return eqx.filter(tree, eqx.is_array)


def spec_of_last(model: Any) -> Any:
    """What Equinox's own examples write: a tree of bools, True for what is trained."""
    spec = jax.tree.map(lambda leaf: False, model)
    where = lambda model: (model.layers[-1].weight, model.layers[-1].bias)
    return eqx.tree_at(where, spec, replace=(True, True))


class Named(eqx.Module):
    """A module with leaves of several kinds that are no arrays."""

    linear: eqx.nn.Linear
    head: eqx.nn.Linear
    name: Any
    dtype: Any
    nothing: None = None

    def __init__(self, name: Any = "mlp", dtype: Any = np.float32):
        self.linear = eqx.nn.Linear(2, 2, key=jax.random.key(0))
        self.head = eqx.nn.Linear(2, 2, key=jax.random.key(1))
        self.name, self.dtype = name, dtype

    def __call__(self, x: Any) -> Any:
        assert isinstance(self.name, str)
        return self.head(self.linear(x.astype(self.dtype)))


# --- a whole step


def test_a_step_on_a_module_and_its_state_is_proved_and_taken():
    model, tx = make_model(), fo.with_frozen(optax.adamw(1e-1), "layers/0")
    where = lambda state: state[0]

    @fo.jit(frozen=tx, where=where)
    def step(state, x, y):
        model, opt_state = state
        value, grads = fo.value_and_grad(loss, tx)(model, x, y)
        updates, opt_state = tx.update(grads, opt_state, model)
        return (eqx.apply_updates(model, updates), opt_state), value

    before = model, tx.init(model)
    found = fo.assert_step_freezes(step, before, X, Y, frozen=tx, where=where)
    assert [*found] == [f"0/{path}" for path in (*FIRST, *OBJECTS)]
    assert found["0/activation"] == "itself"
    state, value = step(before, X, Y)
    for _ in range(5):
        state, last = step(state, X, Y)
    assert last < value
    fo.assert_frozen(before, state, tx, where=where)
    assert state[0].layers[0].weight is model.layers[0].weight
    assert state[0].activation is model.activation
    assert state[0].final_activation is model.final_activation


def test_a_step_on_a_module_alone_keeps_every_bit():
    model, tx = make_model(), fo.with_frozen(optax.adamw(1e-1), "layers/0")
    odd = model.layers[0].weight.at[0].set(jnp.array([-0.0, 1e-45]))
    model = eqx.tree_at(lambda model: model.layers[0].weight, model, odd)

    @fo.jit(frozen=tx, donate_argnums=1)
    def step(model, opt_state, x, y):
        grads = fo.grad(loss, tx)(model, x, y)
        updates, opt_state = tx.update(grads, opt_state, model)
        return fo.apply_updates(model, updates), opt_state

    state = tx.init(model)
    found = fo.assert_step_freezes(step, model, state, X, Y, frozen=tx, exact=True)
    assert found == dict.fromkeys([*FIRST, *OBJECTS], "itself")
    after, _ = step(model, state, X, Y)
    fo.assert_frozen(model, after, tx)
    assert fo.fingerprint(model, tx).keys() == set(FIRST)
    fo.assert_fingerprint(after, fo.fingerprint(model, tx))


# With Equinox 0.13.0, jax 0.7.0 frees twice what is compiled for a function that is gone.
KEPT: list[Any] = []

OPTIMIZERS = {
    "adam": (lambda: optax.adam(1e-1), {}),
    "clipped": (lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-1)), {}),
    "lookahead": (lambda: optax.lookahead(optax.adam(1e-1), 2, 0.5), {}),
    "sam": (lambda: optax.contrib.sam(optax.adam(1e-1), optax.sgd(0.1), sync_period=2), {}),
    "opaque sam": (
        lambda: optax.contrib.sam(optax.adam(1e-1), optax.sgd(0.1), opaque_mode=True),
        {"grad_fn": lambda model, _: fo.grad(loss, "layers/0")(model, X, Y)},
    ),
    "lbfgs": (lambda: optax.lbfgs(), {"value_fn": lambda model: loss(model, X, Y)}),
    "masked": (lambda: optax.masked(optax.adamw(1e-1), fo.by_path("**/weight").mask), {}),
}


@pytest.mark.parametrize("jit", [fo.jit, eqx.filter_jit], ids=["fo.jit", "eqx.filter_jit"])
@pytest.mark.parametrize(
    "name",
    [
        name if name in ("clipped", "sam") else pytest.param(name, marks=pytest.mark.exhaustive)
        for name in OPTIMIZERS
    ],
)
def test_a_module_trains_as_its_arrays_do(name, jit):
    make, extra = OPTIMIZERS[name]
    tx = fo.with_frozen(make(), "layers/0")
    model = make_model()
    _, static = eqx.partition(model, eqx.is_inexact_array)

    def update(model, state):
        params = model[0] if name == "lookahead" else model
        value, grads = fo.value_and_grad(loss, tx)(eqx.combine(params, static), X, Y)
        line_search = {"value": value, "grad": grads} if name == "lbfgs" else {}
        updates, state = tx.update(grads, state, model, **extra, **line_search)
        return fo.apply_updates(model, updates), state

    def train(step, model):
        if name == "lookahead":
            model = optax.LookaheadParams(model, model)
        state = tx.init(model)
        for _ in range(3):
            model, state = step(model, state)
        return model, state

    compiled = fo.jit(update, frozen=False) if jit is fo.jit else jit(update)
    KEPT.append(compiled)
    whole, state = train(compiled, model)
    fo.assert_frozen(model, whole[0] if name == "lookahead" else whole, tx)
    assert jax.tree.structure(whole) == jax.tree.structure(train(update, model)[0])
    if name in ("opaque sam", "lbfgs"):  # their functions are of the whole module
        return
    expected, expected_state = train(jax.jit(update), arrays(model))
    fo.assert_trees_bit_identical(state, expected_state)
    fo.assert_trees_bit_identical(arrays(whole), expected)


def test_a_line_search_reads_its_gradient_from_the_state():
    model, tx = make_model(jnp.tanh), fo.with_frozen(optax.lbfgs(), "layers/0")
    state, first = tx.init(model), loss(model, X, Y)
    for _ in range(3):
        value, grads = fo.value_and_grad_from_state(loss, tx)(model, X, Y, state=state)
        assert grads.activation is None
        search = {"value": value, "grad": grads, "value_fn": lambda model: loss(model, X, Y)}
        updates, state = tx.update(grads, state, model, **search)
        model = fo.apply_updates(model, updates)
    assert loss(model, X, Y) < first


def test_a_state_is_that_of_the_arrays_alone():
    model, make = make_model(), lambda: fo.with_frozen(optax.adam(1e-1), "layers/0")
    state = make().init(model)
    fo.assert_trees_bit_identical(state, make().init(eqx.filter(model, eqx.is_inexact_array)))
    grads = eqx.filter_grad(loss)(model, X, Y)  # None for what is no array, as Equinox has it
    found = [make().update(grads, state, params) for params in (model, arrays(model), None)]
    fo.assert_trees_bit_identical(*found)
    assert found[0][0].activation is None


def test_a_gradient_is_none_where_there_is_no_array():
    model = make_model()
    for holes in (False, True):
        grads = fo.grad(loss, "layers/0", holes=holes)(model, X, Y)
        assert grads.activation is grads.final_activation is None
        assert (grads.layers[0].weight == HOLE) is holes if holes else True
    expected = eqx.filter_grad(loss)(model, X, Y)
    fo.assert_trees_bit_identical(grads.layers[1:], expected.layers[1:])


# --- however it is said

SAID = {
    "glob": {"frozen": "layers/0"},
    "names a function, too": {"frozen": ["layers/0", "activation"]},
    "regex": {"frozen": re.compile("layers/0/.*")},
    "predicate of the path": {"frozen": is_first},
    "predicate of the shape": {"frozen": lambda path, leaf: leaf.shape in [(4, 2), (4,)]},
    "mask": {"frozen": lambda model: fo.by_predicate(is_first).mask(model)},
    "rest": {"frozen": ~fo.by_path("layers/[12]")},
    "trainable": {"trainable": "layers/[12]"},
    "trainable names a function": {"trainable": ["layers/[12]", "activation"]},
    "trainable predicate": {"trainable": lambda path, leaf: leaf.ndim == 1},
    "trainable mask": {"trainable": spec_of_last},
    "everything": {"frozen": "**"},
    "nothing": {"frozen": False},
    "everything is trained": {"trainable": "**"},
}


@pytest.mark.parametrize("said", SAID)
def test_what_is_no_array_is_frozen_however_it_is_said(said):
    model, selection = make_model(), SAID[said]
    trainable, frozen = fo.partition(model, **selection)
    assert trainable.activation == HOLE
    assert frozen.activation is model.activation
    assert same_objects(fo.combine(trainable, frozen), model)
    tx = fo.with_frozen(optax.adam(1e-1), **selection)

    @fo.jit(frozen=tx)
    def step(model, state):
        updates, state = tx.update(fo.grad(loss, **selection)(model, X, Y), state, model)
        assert updates.activation is None
        return fo.apply_updates(model, updates), state

    after, _ = step(model, tx.init(model))
    assert after.activation is model.activation
    rows = fo.summary(model, **selection, optimizer=optax.adam(1e-1)).rows
    assert all(row.frozen for row in rows if row.path in OBJECTS)
    moved = eqx.tree_at(lambda model: model.activation, model, jnp.tanh)
    if said not in ("nothing", "everything is trained"):
        with pytest.raises(AssertionError, match=r"\n  activation: .* became"):
            fo.assert_frozen(model, moved, **selection, expect_movement=False)
    assert fo.restore(moved, model, **selection).activation is model.activation
    assert fo.restore(moved, arrays(model), **selection).activation is jnp.tanh


def test_selections_are_judged_by_arrays():
    model = make_model()
    nothing = r"by_path\('activation'\) selects nothing but what is no array \('activation'\)"
    for room in (fo.partition, fo.summary, fo.grad(loss, "activation")):
        with pytest.raises(ValueError, match=nothing):
            room(model, X, Y) if room.__name__ == "loss" else room(model, "activation")
    with pytest.raises(ValueError, match=nothing):
        fo.with_frozen(optax.adam(1e-1), "activation").init(model)
    with pytest.raises(ValueError, match=nothing):
        fo.jit(lambda model: model, frozen="activation")(model)
    everything = r"freezes all 6 leaves \('layers/0/weight'.* nothing to train"
    for said in ({"frozen": "layers"}, {"trainable": ["activation", "final_activation"]}):
        with pytest.raises(ValueError, match=everything):
            fo.with_frozen(optax.adam(1e-1), **said).init(model)
    only = r"selects nothing: none of 6 leaves that are arrays"
    proof = lambda frozen: fo.assert_step_freezes(lambda model: model, model, frozen=frozen)
    frozen_of = lambda frozen: fo.assert_frozen(model, model, frozen, expect_movement=False)
    for check in (proof, frozen_of, lambda frozen: fo.fingerprint(model, frozen)):
        with pytest.raises(ValueError, match=only):
            check("activation")
        with pytest.raises(ValueError, match=only):
            check(False)
    with pytest.raises(ValueError, match="none of 0 leaves that are arrays"):
        fo.fingerprint({"activation": jnp.tanh}, "**")


def test_labels_and_other_trees_without_an_array_are_parted_as_they_say():
    labels = {"encoder": "slow", "head": "fast"}
    assert fo.partition(labels, "encoder") == (
        {"encoder": HOLE, "head": "fast"},
        {"encoder": "slow", "head": HOLE},
    )


# --- under fo.jit


def counted(frozen, **options):
    """A step that adds one to what is not frozen, and a list that grows with each trace of it."""
    traces: list[Any] = []

    @fo.jit(frozen=frozen, **options)
    def step(model):
        traces.append(model)
        trained, rest = fo.partition(model, frozen)
        return fo.combine(jax.tree.map(lambda leaf: leaf + 1, trained), rest)

    return step, traces


def test_another_function_is_another_program_and_the_same_is_not():
    step, traces = counted("layers/0")
    models = [make_model(activation) for activation in (jnp.tanh, jax.nn.relu)]
    for model in models * 3:
        for _ in range(2):
            new = step(model)
            assert new.activation is model.activation
            model = new
    assert len(traces) == 2
    assert [model.activation for model in traces] == [jnp.tanh, jax.nn.relu]


@pytest.mark.parametrize("names", [("a", "b"), (("a", 1), ("a", 2))], ids=["text", "equal tuples"])
def test_leaves_that_are_equal_are_one_program(names):
    make = lambda name: Named(Label(name))
    step, traces = counted("linear")
    for name in (*names, *names):
        model = make(name)
        assert step(model).name is model.name  # equal to the one that was traced, and not it
    assert len(traces) == 2


class Label:
    """A leaf that compares by what it says."""

    def __init__(self, said: Any):
        self.said = said

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Label) and self.said == other.said

    def __hash__(self) -> int:
        return hash(self.said)


def test_a_leaf_that_becomes_an_array_or_ceases_to_be_one():
    step, traces = counted("linear")
    odd = {"linear": jnp.ones(2), "head": jnp.ones(2)}
    trees = [odd | {"name": name} for name in ("text", jnp.ones(1), "text", np.ones(1), "other")]
    for tree in trees:
        new = step(tree)
        same = new["name"] is tree["name"]
        assert same is isinstance(tree["name"], str)
    assert len(traces) == 3  # arrays of jax and of numpy are one program, as are equal texts


def test_a_leaf_that_cannot_be_hashed_is_named():
    step, _ = counted("linear")
    with pytest.raises(TypeError, match=r"'name' is a leaf <U1\[1\].* cannot be hashed"):
        step(Named(np.array(["a"])))
    with pytest.raises(TypeError, match=r"'name' is a leaf of type set.* cannot be hashed"):
        step(Named({1}))


def test_a_step_that_puts_another_function_there_is_refused():
    @fo.jit(frozen="layers/0")
    def step(model):
        return eqx.tree_at(lambda model: model.activation, model, jnp.tanh)

    with pytest.raises(ValueError, match=r"activation: whatever it was, it becomes a leaf of type"):
        step(make_model())
    with pytest.raises(AssertionError, match=r"1 of 4 frozen leaves are not proved"):
        fo.assert_step_freezes(step, make_model(), frozen="layers/0")


def test_what_is_no_array_beside_the_parameters_comes_back_too():
    @fo.jit(frozen="layers/0", where=lambda state: state["model"])
    def step(state):
        count = state["count"] + 1
        return state | {"count": count}, state["name"]

    state = {"model": make_model(), "count": jnp.array(0), "name": "run", "act": jnp.tanh}
    new, name = step(state)
    assert (new["act"], new["name"], name, int(new["count"])) == (jnp.tanh, "run", "run", 1)
    assert new["model"].activation is state["model"].activation


def test_a_step_compiled_ahead_of_time_is_for_its_functions():
    step, traces = counted("layers/0")
    model = make_model()
    compiled = step.lower(model).compile()
    assert same_objects(compiled(model).layers[0], model.layers[0])
    assert len(traces) == 1
    with pytest.raises(TypeError, match=r"compiled for other leaves .*: 'activation'\."):
        compiled(make_model(jnp.tanh))
    shapes = step.eval_shape(model)
    assert shapes.activation is model.activation
    assert shapes.layers[1].weight.shape == (4, 4)


def test_shardings_of_a_module_are_of_its_arrays():
    there = jax.sharding.SingleDeviceSharding(host_devices()[1])
    step, _ = counted("layers/0", in_shardings=(there,), out_shardings=there)
    model = jax.device_put(arrays(make_model()), there)
    for activation in (jnp.tanh, jax.nn.relu):
        whole = eqx.combine(model, eqx.filter(make_model(activation), eqx.is_array, inverse=True))
        new = step(whole)
        assert new.activation is activation
        assert new.layers[0].weight is whole.layers[0].weight
        assert new.layers[1].weight.sharding == there


def test_strings_and_dtypes_are_there_as_they_are():
    model, tx = Named(), fo.with_frozen(optax.adam(1e-1), "linear")

    @fo.jit(frozen=tx, donate_argnums=(0, 1))
    def step(model, state):
        updates, state = tx.update(fo.grad(loss, tx)(model, X, Y), state, model)
        return fo.apply_updates(model, updates), state

    before = jax.tree.map(lambda leaf: leaf.copy() if eqx.is_array(leaf) else leaf, model)
    after, _ = step(model, tx.init(model))
    fo.assert_frozen(before, after, tx)
    assert (after.name, after.dtype) == ("mlp", np.float32)
    assert fo.summary(model, tx).frozen.parameters == 6


# --- what Equinox takes


def test_a_filter_spec_is_of_arrays_that_can_be_trained():
    model, frozen = make_model(), fo.by_path("layers/0")
    spec = (~frozen).filter_spec(model)
    assert jax.tree.structure(spec) == jax.tree.structure(model)
    assert [spec.activation, spec.layers[0].weight, spec.layers[1].weight] == [False, False, True]
    assert (~frozen).mask(model).activation  # which is why there is another
    trained, rest = eqx.partition(model, spec)
    assert trained.activation is None
    assert same_objects(eqx.combine(trained, rest), model)

    @eqx.filter_value_and_grad
    def of_trained(trained, rest):
        return loss(eqx.combine(trained, rest), X, Y)

    value, grads = of_trained(trained, rest)
    expected = fo.value_and_grad(loss, frozen)(model, X, Y)
    assert value == expected[0]
    fo.assert_trees_bit_identical(grads.layers[1:], expected[1].layers[1:])


def test_a_filter_spec_leaves_out_what_is_no_float():
    tree = {"table": jnp.arange(3), "key": jax.random.key(0), "rate": 0.5, "w": jnp.ones(2)}
    tree |= {"host": np.ones(2, np.float32), "name": "text", "there": None}
    assert fo.by_path("**").filter_spec(tree) == dict.fromkeys(tree, False) | {
        "w": True,
        "host": True,
        "there": None,
    }
    with pytest.raises(ValueError, match=r"selects no float or complex array, but 'name', 'rate'"):
        fo.by_path("name", "rate").filter_spec(tree)
    with pytest.raises(ValueError, match="matches none of the 6 leaves"):
        fo.by_path("lora").filter_spec(tree)


def test_a_proof_of_an_optimizer_knows_that_a_function_is_not_moved():
    model = make_model()
    tx = fo.with_frozen(optax.adamw(1e-1), "layers/0")
    found = fo.assert_update_freezes(tx, model, tx)
    assert found == dict.fromkeys(FIRST, "a constant -0.0") | dict.fromkeys(OBJECTS, "absent")

    def update(updates, state, params=None):
        known, _ = tx.update(updates, tx.init(params), params)
        return eqx.tree_at(lambda u: u.activation, known, jnp.ones(()), is_leaf=is_none), state

    is_none = lambda node: node is None
    moves = optax.GradientTransformation(optax.init_empty_state, update)
    with pytest.raises(
        AssertionError, match=r"activation: refuted.*\n.*the parameter a leaf of type"
    ):
        fo.assert_update_freezes(moves, model, "layers/0")


class Rate:
    """A leaf that is no number, compared by what it holds."""

    def __init__(self, value):
        self.value = value

    def __eq__(self, other):
        return isinstance(other, Rate) and self.value == other.value

    def __hash__(self):
        return hash(self.value)


def test_an_object_changed_in_place_is_another_program():
    @fo.jit(frozen="w")
    def step(tree):
        return tree | {"head": tree["head"] * tree["rate"].value}

    tree = {"w": jnp.ones(1), "head": jnp.ones(1), "rate": Rate(2.0)}
    compiled = step.lower(tree).compile()
    assert step(tree)["head"] == compiled(tree)["head"] == 2
    tree["rate"].value = 5.0
    assert step(tree)["head"] == 5
    assert step(tree | {"rate": Rate(5.0)})["head"] == 5
    with pytest.raises(TypeError, match="compiled for other leaves that are no arrays: 'rate'"):
        compiled(tree)
