"""Parts of leaves in training: wrappers, line searches, stages, many devices, the program."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import host_devices
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from test_elements import (
    OPTIMIZER,
    SPARSE,
    TOKENS,
    loss,
    make_params,
    mask_of,
    with_elements,
)

import frozen_optax as fo


def train(tx, params, steps=3, apply=fo.apply_updates, state=None):
    state = tx.init(params) if state is None else state
    for _ in range(steps):
        grads = jax.grad(loss)(params, TOKENS)
        updates, state = tx.update(grads, state, params)
        params = apply(params, updates)
    return params, state


# --- the state


def test_a_state_made_elsewhere_goes_on():
    params, (here, there) = make_params(), (with_elements(slice(0, 6)) for _ in range(2))
    middle, state = train(here, params)
    fo.assert_trees_bit_identical(
        train(here, middle, state=state), train(there, middle, state=state)
    )


def test_a_state_of_other_elements_cannot_be_taken_over():
    params = make_params()
    old = with_elements(slice(0, 6)).init(params)
    fo.assert_trees_bit_identical(fo.transfer_state(old, old), old)
    with pytest.raises(ValueError, match=r"[mn]u\['embed'\] .*float32\[2, 3\].* float32\[3, 3\]"):
        fo.transfer_state(old, with_elements(slice(0, 5)).init(params))


def test_hyperparameters_and_places_of_parameters_are_found_in_the_state():
    params = make_params()
    tx = with_elements(slice(0, 6), optax.inject_hyperparams(optax.adam)(learning_rate=0.1))
    state = tx.init(params)
    assert float(optax.tree_utils.tree_get(state, "learning_rate")) == pytest.approx(0.1)
    doubled = optax.tree_map_params(tx, lambda leaf: leaf + 2, state)
    assert (optax.tree_utils.tree_get(doubled, "nu")["embed"] == 2).all()
    assert float(optax.tree_utils.tree_get(doubled, "learning_rate")) == pytest.approx(0.1)


def test_without_the_parameters_slices_and_masks_go_and_functions_do_not():
    params = make_params()
    grads = jax.grad(loss)(params, TOKENS)
    tx = with_elements(slice(0, 6), optax.adam(0.1))
    state = tx.init(params)
    alike = tx.update(grads, state)[0], tx.update(grads, state, params)[0]
    np.testing.assert_array_equal(*(updates["embed"] for updates in alike))
    tx = with_elements(lambda leaf: slice(0, 6), optax.adam(0.1))
    with pytest.raises(ValueError, match=r"reads more of the parameters.*Pass the parameters"):
        tx.update(grads, tx.init(params))


def test_a_gradient_of_another_shape_or_none_is_refused_by_path():
    params, tx = make_params(), with_elements(slice(0, 6))
    grads = jax.grad(loss)(params, TOKENS)
    for wrong, message in (
        (
            jnp.ones((7, 3)),
            r"of 'embed' are frozen in the shape \(8, 3\), found .*\[7, 3\]",
        ),
        (None, "the trainable leaf 'embed' has no gradient"),
        (optax.MaskedNode(), "the trainable leaf 'embed' has no gradient"),
    ):
        with pytest.raises(ValueError, match=message):
            tx.update(grads | {"embed": wrong}, tx.init(params), params)
    frozen = fo.grad(loss, ["encoder", "embed"])(params, TOKENS)
    with pytest.raises(ValueError, match="'embed' has the gradient of a frozen one"):
        tx.update(frozen, tx.init(params), params)


# --- other optimizers around and inside


def test_a_line_search_sees_the_whole_tree_and_moves_a_part():
    params = make_params()
    tx = with_elements(SPARSE, optax.lbfgs())
    of_tokens = lambda params: loss(params, TOKENS)
    state, at, values = tx.init(params), params, []
    for _ in range(4):
        value, grads = fo.value_and_grad_from_state(of_tokens, tx)(at, state=state)
        search = {"value": value, "grad": grads, "value_fn": of_tokens}
        updates, state = tx.update(grads, state, at, **search)
        at = fo.apply_updates(at, updates)
        values.append(float(value))
        stored = optax.tree_utils.tree_get(state, "grad")["embed"]
        expected = jax.grad(of_tokens)(at)["embed"][~SPARSE]
        np.testing.assert_allclose(stored, expected, rtol=1e-4, atol=1e-4)
    fo.assert_frozen(params, at, tx)
    assert values[-1] < 0.1 * values[0]


def test_parameters_that_are_one_leaf_go_through_a_line_search():
    table = make_params()["embed"]
    of_table = lambda table: jnp.sum((table - 3.0) ** 2)
    tx = fo.with_frozen(optax.lbfgs(), elements={"**": slice(0, 6)})
    state, at = tx.init(table), table
    for _ in range(3):
        value, grads = jax.value_and_grad(of_table)(at)
        search = {"value": value, "grad": grads, "value_fn": of_table}
        updates, state = tx.update(grads, state, at, **search)
        at = fo.apply_updates(at, updates)
    np.testing.assert_array_equal(at[:6], table[:6])
    np.testing.assert_allclose(at[6:], 3.0, atol=1e-3)


def test_inside_partition_a_group_trains_a_part_of_a_leaf():
    params = make_params()
    rows = fo.with_frozen(optax.adam(0.1), elements={"embed": slice(0, 6)})
    groups = {"embed": rows, "head": optax.sgd(0.1)}
    labels = {"embed": "embed", "encoder": "encoder", "head": "head"}
    tx = fo.with_frozen(optax.partition(groups, fo.partition(labels, "encoder")[0]), "encoder")
    after, state = train(tx, params)
    fo.assert_frozen(params, after, with_elements(slice(0, 6)))
    assert optax.tree_utils.tree_get(state, "mu")["embed"].shape == (2, 3)


def test_in_a_stage_a_group_may_train_a_part_of_a_leaf():
    params = start = make_params()
    rows = {"embed": slice(0, 6)}

    def make(group, _):
        tx = optax.adam(0.1)
        return fo.with_frozen(tx, elements=rows) if group == "embed" else tx

    state = None
    for stage in fo.stages({"head": 0, "embed": 2}, stop=4):
        tx = stage.optimizer(make, before=optax.clip_by_global_norm(1.0))
        state = fo.transfer_state(state, tx.init(params))
        params, state = train(tx, params, steps=2, state=state)
    fo.assert_frozen(start, params, fo.with_frozen(OPTIMIZER, "encoder", elements=rows))


def test_in_a_stage_what_a_group_freezes_steers_no_norm():
    """Two groups call their leaves alike and freeze other rows; one freezes a leaf of its own."""
    shapes = {"kernel": (8, 3), "scale": (3,)}
    params = {group: {name: jnp.ones(shape) for name, shape in shapes.items()} for group in "abc"}
    rows = {"a": slice(0, 6), "b": slice(2, None)}

    def make(group, _):
        if group == "c":
            return fo.with_frozen(optax.sgd(1.0), "**/scale")
        return fo.with_frozen(optax.sgd(1.0), elements={"**/kernel": rows[group]})

    stage = fo.stages(dict.fromkeys("abc", 0), stop=1)[0]
    tx = stage.optimizer(make, before=optax.clip_by_global_norm(1.0))
    grads = jax.tree.map(jnp.ones_like, params)
    loud = jax.tree.map(jnp.copy, grads)
    for group, frozen in rows.items():
        loud[group]["kernel"] = loud[group]["kernel"].at[frozen].set(jnp.nan)
    loud["c"]["scale"] = jnp.full(3, jnp.nan)
    state = tx.init(params)
    quiet = tx.update(grads, state, params)
    fo.assert_trees_bit_identical(tx.update(loud, state, params), quiet)
    trained = 2 * 3 + 3 + 2 * 3 + 3 + 8 * 3
    np.testing.assert_allclose(quiet[0]["b"]["kernel"][:2], -(trained**-0.5), rtol=1e-6)
    np.testing.assert_allclose(optax.tree_utils.tree_norm(quiet[0]), 1.0, rtol=1e-6)


def test_accumulation_inside_keeps_gradients_of_the_part_alone():
    tx = with_elements(slice(0, 6), optax.MultiSteps(OPTIMIZER, 2).gradient_transformation())
    params, state = make_params(), None
    after, state = train(tx, params, steps=4)
    assert optax.tree_utils.tree_get(state, "acc_grads")["embed"].shape == (2, 3)
    fo.assert_frozen(params, after, tx)


def test_gradients_of_frozen_elements_steer_nothing():
    params, tx = make_params(), with_elements(slice(0, 6))
    grads = jax.grad(loss)(params, TOKENS)
    loud = grads | {"embed": grads["embed"].at[:6].set(jnp.nan)}
    state = tx.init(params)
    fo.assert_trees_bit_identical(tx.update(loud, state, params), tx.update(grads, state, params))


# --- transformations of jax, devices


@pytest.mark.parametrize("elements", [slice(0, 6), SPARSE], ids=["rows", "scattered"])
def test_in_a_scan_over_steps_frozen_elements_stay(elements):
    params, tx = make_params(), with_elements(elements)

    @jax.jit
    def run(params, state):
        def step(carry, _):
            params, state = carry
            grads = fo.grad(loss, tx, holes=True)(params, TOKENS)
            updates, state = tx.update(grads, state, params)
            return (fo.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), length=50)[0]

    after, _ = run(params, tx.init(params))
    fo.assert_frozen(params, after, tx)


def test_many_models_at_once_hold_the_same_elements():
    tx = with_elements(SPARSE)
    several = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf * 2]), make_params())

    def step(params):
        grads = jax.grad(loss)(params, TOKENS)
        updates, _ = tx.update(grads, tx.init(params), params)
        return fo.apply_updates(params, updates)

    after = jax.vmap(step)(several)
    for index in range(2):
        one = lambda tree, index=index: jax.tree.map(lambda leaf: leaf[index], tree)
        fo.assert_frozen(one(several), one(after), tx)


@pytest.mark.parametrize("spec", [("x",), (None, "x")], ids=["by rows", "by columns"])
@pytest.mark.parametrize("said", ["the last rows", "some rows", "scattered"])
def test_a_table_that_is_split_over_devices_trains_in_part(said, spec):
    rows, columns = 64, 16
    mesh = Mesh(np.array(host_devices(8)), "x")
    frozen = {
        "the last rows": slice(0, 61),
        "some rows": np.arange(rows) % 7 != 0,
        "scattered": np.arange(rows * columns).reshape(rows, columns) % 5 < 2,
    }[said]
    table = jnp.arange(float(rows * columns)).reshape(rows, columns) / 100
    tx = fo.with_frozen(OPTIMIZER, elements={"table": frozen})
    of_table = lambda params: jnp.sum(jnp.sin(params["table"]))

    @fo.jit(frozen=tx)
    def step(params, state):
        updates, state = tx.update(fo.grad(of_table, tx)(params), state, params)
        return fo.apply_updates(params, updates), state

    split = NamedSharding(mesh, PartitionSpec(*spec))
    ends = []
    for params in ({"table": table}, {"table": jax.device_put(table, split)}):
        after, state = params, tx.init(params)
        for _ in range(3):
            after, state = step(after, state)
        fo.assert_frozen(params, after, tx)
        assert after["table"].sharding.is_equivalent_to(params["table"].sharding, 2)
        ends.append(after["table"])
    np.testing.assert_allclose(*map(np.asarray, ends), rtol=1e-6)
    assert fo.fingerprint({"table": ends[1]}, tx) == fo.fingerprint({"table": table}, tx)


def test_modules_of_nnx_train_a_part_of_an_embedding():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(8, 3, rngs=rngs)
            self.head = nnx.Linear(3, 2, rngs=rngs)

    model = Model(nnx.Rngs(0))
    tx = fo.with_frozen(OPTIMIZER, "head/bias", elements={"embed": slice(0, 6)})
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @fo.nnx_jit(frozen=tx)
    def step(model, optimizer, tokens):
        of_model = lambda model: jnp.sum(model.head(model.embed(tokens)) ** 2)
        optimizer.update(model, nnx.grad(of_model)(model))

    before = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    before = jax.tree.map(jnp.copy, before)
    step(model, optimizer, TOKENS)
    fo.assert_frozen(before, nnx.to_pure_dict(nnx.state(model, nnx.Param)), tx)


# --- the program


def test_indices_are_of_32_bits_and_rows_need_none(x64):
    params = make_params()
    grads = jax.tree.map(jnp.ones_like, params)
    for elements, gathers in ((slice(0, 6), False), (mask_of([1, 5]), True), (SPARSE, True)):
        tx = with_elements(elements, optax.sgd(0.1))
        program = jax.make_jaxpr(tx.update)(grads, tx.init(params), params)
        assert ("gather" in str(program)) is gathers
        assert ("scatter" in str(program)) is gathers
        indices = [c for c in program.consts if np.issubdtype(np.asarray(c).dtype, np.integer)]
        assert {np.asarray(c).dtype for c in indices} <= {np.dtype(np.int32)}
        assert program.jaxpr.outvars[0].aval.dtype == params["embed"].dtype


def test_a_donated_step_writes_the_rows_that_train_in_place():
    params = {"embed": jnp.ones((1000, 64)), "head": jnp.ones((64, 2))}
    tx = fo.with_frozen(OPTIMIZER, elements={"embed": slice(0, 990)})
    of_table = lambda params, at: jnp.sum((params["embed"][at] @ params["head"]) ** 2)

    @fo.jit(frozen=tx, donate_argnums=(0, 1))
    def step(params, state, at):
        updates, state = tx.update(fo.grad(of_table, tx)(params, at), state, params)
        return fo.apply_updates(params, updates, tx), state

    lowered = step.lower(params, tx.init(params), TOKENS)
    program = lowered.compile().as_text()
    entry = program[program.index("ENTRY") :]
    made = re.findall(r"%(\S+) = f32\[1000,64\]\S* (?!parameter)", entry)
    assert len(made) == 1, made  # the table itself
    assert "update-slice" in made[0] or "update_slice" in made[0]
    fo.assert_frozen(params, step(jax.tree.map(jnp.copy, params), tx.init(params), TOKENS)[0], tx)


def test_what_is_said_is_resolved_once():
    calls = []

    def elements(leaf):
        calls.append(leaf.shape)
        return slice(0, 6)

    params, tx = make_params(), with_elements(elements)
    train(tx, params)
    assert calls == [(8, 3)]
