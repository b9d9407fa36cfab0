"""`with_frozen`: its extra arguments, its errors, where it compiles, and what flows through it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import host_devices

import frozen_optax as fo


def make_params():
    return {
        "encoder": {"kernel": jnp.array([-0.0, 1.5]), "steps": jnp.array(3)},
        "head": {"kernel": jnp.array([1.0, 2.0]), "bias": jnp.array(0.5)},
        "nothing": None,
    }


def step(tx, gradients, params, **extra_args):
    updates, _ = tx.update(gradients, tx.init(params), params, **extra_args)
    return fo.apply_updates(params, updates)


def probe(record):
    """An optimizer that writes down what it is given."""

    def update(updates, state, params=None, **extra_args):
        record.update(updates=updates, params=params, extra_args=extra_args)
        return updates, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


HOLES = {"encoder": {"kernel": optax.MaskedNode(), "steps": optax.MaskedNode()}}


# --- what the optimizer sees


def test_the_optimizer_sees_a_hole_for_each_frozen_leaf():
    record = {}
    tx = fo.with_frozen(probe(record), "encoder")
    params = make_params()
    step(tx, params, params)
    assert record["updates"]["encoder"] == record["params"]["encoder"] == HOLES["encoder"]
    assert record["params"]["nothing"] is None
    assert record["params"]["head"]["kernel"] is params["head"]["kernel"]


def test_trainable_says_the_same_as_frozen_the_other_way_round():
    params = make_params()
    one, other = (
        fo.with_frozen(optax.adam(0.1), **names)
        for names in ({"frozen": "encoder"}, {"trainable": "head"})
    )
    assert jax.tree.structure(one.init(params)) == jax.tree.structure(other.init(params))
    fo.assert_trees_bit_identical(step(one, params, params), step(other, params, params))


def test_frozen_updates_are_zeros_that_take_no_memory():
    params = make_params() | {"big": jax.ShapeDtypeStruct((1 << 20, 1 << 20), jnp.bfloat16)}
    updates, _ = fo.with_frozen(probe({}), trainable="head").update(
        params, optax.EmptyState(), params
    )
    assert updates["big"].shape == (1 << 20, 1 << 20)
    assert updates["big"].dtype == jnp.bfloat16
    assert np.signbit(updates["encoder"]["kernel"]).all()
    assert updates["encoder"]["steps"] == 0
    assert updates["encoder"]["steps"].dtype == jnp.int32


def test_uncompiled_steps_return_the_very_same_frozen_leaves():
    params = make_params()
    after = step(fo.with_frozen(optax.adamw(0.1), "encoder"), params, params)
    assert after["encoder"]["kernel"] is params["encoder"]["kernel"]


def test_gradients_may_have_one_hole_for_a_whole_frozen_subtree():
    params = make_params()
    tx = fo.with_frozen(optax.sgd(0.5), "encoder")
    pruned, _ = fo.partition(params, "encoder", prune=True)
    fo.assert_trees_bit_identical(step(tx, pruned, params), step(tx, params, params))


def test_a_frozen_gradient_is_not_computed():
    params = {"encoder": jnp.ones((8, 8)), "head": jnp.ones((8, 2))}
    x = jnp.ones((4, 8))
    loss = lambda params: jnp.sum((x @ params["encoder"] @ params["head"]) ** 2)

    def flops(tx):
        def train(params, state):
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return fo.apply_updates(params, updates), state

        return jax.jit(train).lower(params, tx.init(params)).compile().cost_analysis()["flops"]

    clipped = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1))
    assert flops(fo.with_frozen(clipped, "encoder")) < 0.8 * flops(
        optax.chain(clipped, fo.freeze_by_path("encoder"))
    )


# --- without parameters


def test_an_optimizer_that_needs_no_parameters_runs_without_them():
    params = make_params()
    tx = fo.with_frozen(optax.sgd(0.5), "encoder")
    updates, _ = tx.update(params, tx.init(params))
    np.testing.assert_array_equal(updates["head"]["kernel"], -0.5 * params["head"]["kernel"])
    assert np.signbit(updates["encoder"]["kernel"]).all()


@pytest.mark.parametrize(
    "frozen", [lambda path, leaf: leaf.ndim < 1, fo.by_mask(lambda p: jax.tree.map(jnp.ndim, p))]
)
@pytest.mark.parametrize("make", [lambda frozen: fo.with_frozen(optax.sgd(0.5), frozen), fo.freeze])
def test_without_parameters_a_predicate_asks_for_them(make, frozen):
    with pytest.raises(
        ValueError, match=r"reads the parameters' shapes and dtypes.*Pass the parameters"
    ):
        make(frozen).update(make_params(), optax.EmptyState())


# --- extra arguments


def test_a_functions_gradients_over_the_whole_tree_are_cut():
    record, params = {}, make_params()

    def value_and_grad_fn(params, scale):
        assert params["encoder"]["steps"].dtype == jnp.int32
        assert params["nothing"] is None
        return scale * params["head"]["bias"], (
            jax.tree.map(jnp.ones_like, params),
            {"loss": jnp.ones(())},
        )

    tx = fo.with_frozen(probe(record), "encoder")
    tx.update(params, tx.init(params), params, value_and_grad_fn=value_and_grad_fn)
    value, (gradients, aux) = record["extra_args"]["value_and_grad_fn"](record["params"], scale=2.0)
    assert value == 1.0
    assert gradients["encoder"] == HOLES["encoder"]
    assert gradients["head"]["kernel"].tolist() == [1.0, 1.0]
    assert aux == {"loss": 1.0}


def test_a_functions_batch_of_gradients_is_cut():
    record, params = {}, make_params()
    tx = fo.with_frozen(probe(record), "encoder")
    per_example = lambda params: jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), params)
    tx.update(params, tx.init(params), params, grad_fn=per_example)
    gradients = record["extra_args"]["grad_fn"](record["params"])
    assert gradients["encoder"] == HOLES["encoder"]
    assert gradients["head"]["kernel"].shape == (3, 2)


def test_a_result_in_their_structure_by_chance_is_left_alone():
    record = {}
    params = (jnp.ones((2, 2)), jnp.ones(2))
    tx = fo.with_frozen(probe(record), fo.by_path("0"))
    tx.update(
        params,
        tx.init(params),
        params,
        loss_and_accuracy=lambda params: (jnp.ones(()), jnp.zeros(())),
    )
    loss, accuracy = record["extra_args"]["loss_and_accuracy"](record["params"])
    assert (loss, accuracy) == (1.0, 0.0)


def test_a_tree_in_their_structure_is_cut_and_arrays_are_not():
    record, params = {}, make_params()
    tags = {
        "encoder": {"kernel": "a", "steps": ("b", "c")},
        "head": {"kernel": "d", "bias": "e"},
        "nothing": None,
    }
    tx = fo.with_frozen(probe(record), "encoder")
    value = jnp.ones((2, 2))
    tx.update(
        params,
        tx.init(params),
        params,
        grad=params,
        tags=tags,
        value=value,
        other={"x": value},
        flag=True,
    )
    given = record["extra_args"]
    assert given["grad"]["encoder"] == given["tags"]["encoder"] == HOLES["encoder"]
    assert given["tags"]["head"] == {"kernel": "d", "bias": "e"}
    assert given["value"] is value
    assert given["other"]["x"] is value
    assert given["flag"] is True


def test_a_cut_tree_is_whole_again_for_the_users_function():
    seen, params = {}, (jnp.ones(3), jnp.full(3, 2.0))
    batch = (jnp.arange(3.0), jnp.arange(3.0) + 1)  # of the parameters' structure, by chance

    def loss(params, batch):
        seen["batch"] = batch
        return jnp.sum(params[0] * params[1] * batch[0]) ** 2 + jnp.sum((params[1] - batch[1]) ** 2)

    tx = fo.with_frozen(optax.lbfgs(), fo.by_path("0"))
    value, gradients = jax.value_and_grad(loss)(params, batch)
    after = step(tx, gradients, params, value=value, grad=gradients, value_fn=loss, batch=batch)
    fo.assert_trees_bit_identical(seen["batch"], batch)
    assert loss(after, batch) < value


def test_a_function_keeps_its_signature_which_optimizers_read():
    params = make_params()

    def loss(params, x):
        return jnp.sum((params["head"]["kernel"] * x) ** 2)

    tx = fo.with_frozen(optax.lbfgs(), "encoder")
    value, gradients = jax.value_and_grad(loss, allow_int=True)(params, 2.0)
    after = step(tx, gradients, params, value=value, grad=gradients, value_fn=loss, x=2.0)
    assert loss(after, 2.0) < value


def test_a_function_of_the_whole_tree_needs_the_parameters():
    record, params = {}, make_params()
    tx = fo.with_frozen(probe(record), "encoder")
    tx.update(params, tx.init(params), grad_fn=lambda params: params)
    trainable, _ = fo.partition(params, "encoder")
    with pytest.raises(
        ValueError,
        match=r"takes the whole tree and the frozen values are not known\. Pass the param",
    ):
        record["extra_args"]["grad_fn"](trainable)


# --- errors


def test_a_pattern_that_selects_nothing_is_an_error_at_init():
    with pytest.raises(
        ValueError, match=r"by_path\('encodr'\) selects nothing: .* none of the 4 leaves.*'encoder'"
    ):
        fo.with_frozen(optax.sgd(0.1), "encodr").init(make_params())


def test_a_mask_of_another_structure_names_the_path():
    with pytest.raises(ValueError, match=r"differ in structure at 'encoder'.*kernel, steps"):
        fo.with_frozen(
            optax.sgd(0.1), {"encoder": {"weight": True}, "head": False, "nothing": None}
        ).init(make_params())


@pytest.mark.parametrize(
    "names", [{}, {"frozen": "encoder", "trainable": "head"}], ids=["neither", "both"]
)
def test_exactly_one_of_frozen_and_trainable_is_given(names):
    with pytest.raises(TypeError, match="exactly one of the two"):
        fo.with_frozen(optax.sgd(0.1), **names)


@pytest.mark.parametrize("wrong", [3, 2.5, object()], ids=["int", "float", "object"])
def test_a_selector_of_a_wrong_type_says_what_is_expected(wrong):
    with pytest.raises(TypeError, match="expected a Selector, a glob, a compiled regex"):
        fo.with_frozen(optax.sgd(0.1), wrong)


def test_a_tree_changed_between_init_and_update_names_the_path():
    params = make_params()
    tx = fo.with_frozen(optax.adam(0.1), "encoder")
    state = tx.init(params)
    grown = params | {"head": params["head"] | {"scale": jnp.ones(2)}}
    with pytest.raises(
        ValueError, match=r"updates and the parameters differ in structure at 'head'"
    ):
        tx.update(params, state, grown)
    with pytest.raises(
        ValueError, match=r"the optimizer state and .* differ in structure at '0/mu/head'"
    ):
        tx.update(grown, state, grown)


def test_a_state_of_another_choice_of_leaves_names_the_path():
    params = make_params()
    state = fo.with_frozen(
        optax.adam(0.1),
        "head/bias",
    ).init({"head": params["head"]})
    with pytest.raises(
        ValueError, match=r"the optimizer state and .* differ in structure at '0/mu/head"
    ):
        fo.with_frozen(optax.adam(0.1), "head/kernel").update(
            {"head": params["head"]}, state, {"head": params["head"]}
        )


@pytest.mark.parametrize("missing", [None, optax.MaskedNode()], ids=["None", "hole"])
def test_a_trainable_leaf_without_a_gradient_is_named(missing):
    params = make_params()
    gradients = params | {"head": {"kernel": missing, "bias": jnp.ones(())}}
    with pytest.raises(ValueError, match=r"the trainable leaf 'head/kernel' has no gradient"):
        step(fo.with_frozen(optax.sgd(0.1), "encoder"), gradients, params)


@pytest.mark.parametrize(
    ("leaf", "found"),
    [
        (1.5, "the Python float 1.5"),
        (3, "the Python int 3"),
        (True, "the Python bool True"),
        (np.ones(2), "a float64 array on the host"),
        (np.int64(3), "a int64 array on the host"),
    ],
    ids=str,
)
def test_a_leaf_no_compiled_function_keeps_is_refused_by_path(leaf, found):
    params = {"encoder": {"scale": leaf}, "head": jnp.ones(2)}
    with pytest.raises(TypeError, match=rf"the frozen leaf 'encoder/scale' is {found}"):
        fo.with_frozen(optax.sgd(0.1), "encoder").init(params)
    # What is trained is the optimizer's business.
    fo.with_frozen(optax.sgd(0.1), "head", allow_int=True).init(params)


def test_an_optimizer_that_returns_another_structure_is_an_error():
    broken = optax.stateless(lambda updates, params: jax.tree.leaves(updates))
    with pytest.raises(
        ValueError, match="the optimizer's updates and those it was given differ in structure"
    ):
        step(fo.with_frozen(broken, "encoder"), make_params(), make_params())


# --- where it compiles


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize(
    "tx",
    [
        fo.with_frozen(optax.adamw(0.1), "encoder"),
        optax.chain(optax.adamw(0.1), fo.freeze("encoder/kernel")),
    ],
)
def test_a_step_lowers_for_every_platform(platform, tx):
    params = make_params()
    params["encoder"] = {"kernel": jnp.ones(2), "half": jnp.ones(2, jnp.bfloat16)}
    tx = fo.with_frozen(tx, "encoder/half")

    def train(params, state):
        updates, state = tx.update(params, state, params)
        return fo.apply_updates(params, updates), state

    lowered = jax.jit(train).trace(params, tx.init(params)).lower(lowering_platforms=(platform,))
    assert "func" in lowered.as_text()


def test_sharded_frozen_leaves_need_no_communication():
    devices = host_devices()
    mesh = jax.sharding.Mesh(devices, ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    params = {
        "encoder": jax.device_put(jnp.arange(64.0), sharding),
        "head": jax.device_put(jnp.arange(64.0), sharding),
    }
    tx = fo.with_frozen(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)), "encoder")

    @jax.jit
    def train(params, state):
        updates, state = tx.update(params, state, params)
        return fo.apply_updates(params, updates), state

    after, _ = train(params, tx.init(params))
    fo.assert_frozen(params, after, "encoder")
    assert after["encoder"].sharding.is_equivalent_to(sharding, 1)


def test_init_and_update_work_on_shapes_alone():
    params = jax.eval_shape(make_params)
    tx = fo.with_frozen(optax.adam(0.1), "encoder")
    state = jax.eval_shape(tx.init, params)
    updates, _ = jax.eval_shape(tx.update, params, state, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


def test_the_selection_is_made_once_for_a_structure():
    calls = []

    def predicate(path, leaf):
        calls.append(path)
        return path.startswith("encoder")

    params = make_params()
    tx = fo.with_frozen(optax.sgd(0.1), predicate)
    state = tx.init(params)
    for _ in range(3):
        jax.make_jaxpr(lambda params: tx.update(params, state, params)[0])(params)
    assert len(calls) == 4


# --- what optimizers do with their extra arguments


def hands_on(call):
    """An optimizer whose updates are what `call(value_fn, params, updates, batch)` returns."""

    def update(updates, state, params=None, *, value_fn, batch=None, **_):
        return call(value_fn, params, updates, batch), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


@pytest.mark.parametrize(
    "call",
    [lambda f, p, b: f(p, b), lambda f, p, b: f(p, batch=b), lambda f, p, b: f(batch=b, params=p)],
)
def test_a_batch_of_the_parameters_structure_is_whole_again(call):
    params = (jnp.array([10.0, 20.0]), jnp.array([3.0, 4.0]))
    batch = (jnp.array([1.0, 1.0]), jnp.array([5.0, 5.0]))

    def loss(params, batch):
        return jnp.sum((params[1] * batch[0] - batch[1]) ** 2) + 0 * params[0].sum()

    gradient = lambda value_fn, params, updates, batch: jax.grad(
        lambda p: call(value_fn, p, batch)
    )(params)
    tx = fo.with_frozen(hands_on(gradient), (True, False))
    updates, _ = tx.update(params, tx.init(params), params, value_fn=loss, batch=batch)
    np.testing.assert_array_equal(updates[1], jax.grad(loss)(params, batch)[1])


def test_a_direction_has_zeros_in_its_frozen_part():
    params = {
        "encoder": jnp.array([2.0, 3.0]),
        "steps": jnp.array(3),
        "head": jnp.array([1.0, 2.0]),
    }
    loss = lambda params: jnp.sum((params["encoder"] * params["head"]) ** 2) + 0 * params["steps"]
    hvp = lambda params, direction: jax.jvp(
        jax.grad(loss, allow_int=True), (params,), (direction,)
    )[1]
    tx = fo.with_frozen(
        hands_on(lambda hvp, params, updates, batch: hvp(params, updates)), trainable="head"
    )
    updates, _ = tx.update(params, tx.init(params), params, value_fn=hvp)
    np.testing.assert_array_equal(updates["head"], 2 * params["encoder"] ** 2 * params["head"])


@pytest.mark.parametrize(
    "wrap", [lambda tx: tx, lambda tx: tx.gradient_transformation()], ids=["class", "transform"]
)
def test_multi_steps_hands_its_extra_arguments_on(wrap):
    params = {"encoder": jnp.ones(2), "head": jnp.array([3.0, 4.0])}
    loss = lambda params: jnp.sum(params["encoder"] * (params["head"] - 1) ** 2)
    value, gradients = jax.value_and_grad(loss)(params)
    tx = fo.with_frozen(wrap(optax.MultiSteps(optax.lbfgs(), 2)), "encoder")
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(
            gradients, state, params, value=value, grad=gradients, value_fn=loss
        )
    assert loss(fo.apply_updates(params, updates)) < value


def test_an_object_that_is_called_keeps_its_attributes():
    class Loss:
        scale = 2.0

        def __call__(self, params):
            return self.scale * jnp.sum(params["head"] ** 2) + 0 * params["encoder"].sum()

    params = {"encoder": jnp.ones(2), "head": jnp.ones(2)}
    gradient = lambda loss, params, updates, batch: jax.tree.map(
        lambda g: g / loss.scale, jax.grad(loss)(params)
    )
    tx = fo.with_frozen(hands_on(gradient), "encoder")
    updates, _ = tx.update(params, tx.init(params), params, value_fn=Loss())
    assert updates["head"].tolist() == [2.0, 2.0]


# --- more errors


SWAPPED, UNCALLED = ("encoder", optax.adam(0.1)), (optax.adam, "encoder")


@pytest.mark.parametrize("arguments", [SWAPPED, UNCALLED], ids=["swapped", "uncalled"])
def test_what_is_no_optimizer_says_what_is_expected(arguments):
    with pytest.raises(
        TypeError, match=r"for the optimizer: expected an optax.GradientTransformation"
    ):
        fo.with_frozen(*arguments)


def test_an_integer_that_is_to_be_trained_is_named():
    params = {"encoder": jnp.ones(2), "steps": jnp.array(3)}
    gradients = {"encoder": jnp.ones(2), "steps": np.zeros((), jax.dtypes.float0)}
    with pytest.raises(
        TypeError, match=r"'steps' is a leaf int32\[\], neither float nor complex.*allow_int=True"
    ):
        step(fo.with_frozen(optax.sgd(0.1), "encoder"), gradients, params)
    with pytest.raises(ValueError, match="the trainable leaf 'steps' has no gradient"):
        step(fo.with_frozen(optax.sgd(0.1), "encoder", allow_int=True), gradients, params)


def test_without_parameters_an_error_about_the_updates_says_so():
    tx = fo.with_frozen(optax.sgd(0.1), "encoder")
    state = tx.init({"encoder": jnp.ones(2), "head": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"selects nothing.*The parameters were not passed"):
        tx.update({"encoder": None, "head": jnp.ones(2)}, state)


def test_freezing_everything_accepts_holes_without_parameters():
    params = {"encoder": jnp.ones(2)}
    tx = fo.with_frozen(optax.adam(0.1), "**")
    holes, _ = fo.partition(params, "**")
    updates, _ = tx.update(holes, tx.init(params))
    assert updates == holes


# --- one transformation, many trees


def test_one_transformation_serves_several_selections():
    tx = fo.with_frozen(optax.adam(0.1), lambda path, leaf: leaf.ndim > 1)
    trees = [{"a": jnp.ones((2, 2)), "b": jnp.ones(2)}, {"a": jnp.ones(2), "b": jnp.ones((2, 2))}]
    states = [tx.init(tree) for tree in trees]
    for tree, state, frozen in zip(trees * 2, states * 2, ["a", "b"] * 2, strict=True):
        updates, _ = tx.update(tree, state, tree)
        fo.assert_frozen(tree, fo.apply_updates(tree, updates), frozen)


def test_a_state_may_change_its_structure_after_the_first_step():
    def update(updates, state, params=None):
        return updates, {"seen": updates, "last": state.get("seen")}

    params = {"encoder": {"a": jnp.ones(2), "b": jnp.ones(2)}, "head": jnp.ones(2)}
    tx = fo.with_frozen(optax.GradientTransformation(lambda params: {}, update), "encoder")
    state = tx.init(params)
    for _ in range(3):
        _, state = tx.update(params, state, params)
    assert state["last"]["encoder"] == optax.MaskedNode()
    assert state["last"]["head"].tolist() == [1.0, 1.0]


def test_updates_are_applied_under_explicit_sharding():
    mesh = jax.make_mesh(
        (4,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,), devices=host_devices(4)
    )
    with jax.set_mesh(mesh) if hasattr(jax, "set_mesh") else jax.sharding.use_mesh(mesh):
        put = lambda leaf: jax.device_put(
            leaf, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
        )
        params = {"encoder": put(jnp.arange(8.0)), "head": put(jnp.ones(8))}
        tx = fo.with_frozen(optax.sgd(0.1), "encoder")
        updates = jax.jit(lambda params: tx.update(params, tx.init(params), params)[0])(params)
        after = fo.apply_updates(params, updates)
        fo.assert_frozen(params, after, "encoder")
        assert after["head"].sharding.spec == params["head"].sharding.spec


def test_parameters_without_their_frozen_part_use_the_same_state():
    params = {"encoder": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, "head": jnp.ones(2)}
    tx = fo.with_frozen(optax.adamw(0.1), "encoder")
    holed, pruned = (fo.partition(params, "encoder", prune=prune)[0] for prune in (False, True))
    states = [tx.init(tree) for tree in (params, holed, pruned)]
    assert len({jax.tree.structure(state) for state in states}) == 1
    expected, _ = tx.update(params, states[0], params)
    for tree in (holed, pruned):
        for state in states:
            updates, _ = fo.with_frozen(optax.adamw(0.1), "encoder").update(tree, state, tree)
            fo.assert_trees_bit_identical(updates["head"], expected["head"])
            tx.update(tree, state, tree)


def test_a_tree_without_an_array_cannot_be_trained():
    tree = {"act": jax.nn.relu, "name": "encoder"}
    with pytest.raises(TypeError, match=r"the trainable leaf 'act' is no array.*no array beside"):
        fo.with_frozen(optax.adam(0.1), "name").init(tree)
    with pytest.raises(TypeError, match=r"the trainable leaf 'act' is no array"):
        fo.summary(tree, "name", optax.adam(0.1))


def test_a_state_for_another_choice_says_to_make_a_new_one():
    params = make_params()
    for old, new in (("encoder", "head"), ("head", "encoder")):
        state = fo.with_frozen(optax.adam(0.1), old, allow_int=True).init(params)
        message = r"the optimizer state and a fresh one .*Make a new one: tx\.init"
        message += r".* what the old one had gathered is lost"
        with pytest.raises(ValueError, match=message):
            fo.with_frozen(optax.adam(0.1), new, allow_int=True).update(params, state, params)
