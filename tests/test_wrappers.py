"""optax's wrappers inside `with_frozen`, and around it, where docs/wrappers.md tells what holds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
import trying
from pages import table

import frozen_optax as fo

more = functools.partial(pytest.param, marks=pytest.mark.exhaustive)

STEPS = 4


def make_params():
    table = np.random.default_rng(0).normal(size=200).astype(jnp.result_type(float))
    odd = np.array([-0.0, np.finfo(table.dtype).smallest_subnormal], table.dtype)
    return {
        "encoder": {"kernel": jnp.asarray(np.concatenate([odd, table]))},
        "head": {"kernel": jnp.array([1.0, -2.0, 3.0])},
    }


def adamw():
    return optax.adamw(0.1, weight_decay=0.1)


# --- inside


LABELS = {"encoder": {"kernel": "a"}, "head": {"kernel": "b"}}
MASK = {"encoder": {"kernel": True}, "head": {"kernel": True}}
by_size = functools.partial(jax.tree.map, lambda leaf: leaf.size > 1)

INSIDE = {
    "partition with labels of the whole tree": lambda: optax.partition(
        {"a": optax.sgd(1.0), "b": adamw()}, LABELS
    ),
    "partition with a label function": lambda: optax.partition(
        {"all": adamw()}, lambda params: "all"
    ),
    "masked with a mask of the whole tree": lambda: optax.masked(adamw(), MASK),
    "masked with a prefix mask": lambda: optax.masked(adamw(), {"encoder": False, "head": True}),
    "masked with a mask function": lambda: optax.masked(adamw(), by_size),
    "weight decay with a mask of the whole tree": lambda: optax.adamw(
        0.1, weight_decay=0.1, mask=MASK
    ),
    "MultiSteps": lambda: optax.MultiSteps(adamw(), 2).gradient_transformation(),
    "apply_if_finite": lambda: optax.apply_if_finite(adamw(), 2),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adamw)(
        learning_rate=lambda count: 0.1 / (count + 1)
    ),
    "flatten": lambda: optax.flatten(adamw()),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(0.1), adamw()),
    "named_chain": lambda: optax.named_chain(
        ("clip", optax.clip_by_global_norm(0.1)), ("adamw", adamw())
    ),
    "sam": lambda: optax.contrib.sam(
        adamw(), optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
    ),
    "sam opaque": lambda: optax.contrib.sam(adamw(), optax.sgd(0.05), opaque_mode=True),
    "schedule_free": lambda: optax.contrib.schedule_free(optax.sgd(0.1), 0.1),
    "mechanize": lambda: optax.contrib.mechanize(adamw()),
    "reduce_on_plateau": lambda: optax.chain(adamw(), optax.contrib.reduce_on_plateau(patience=1)),
    "with_frozen": lambda: fo.with_frozen(adamw(), fo.by_mask(False)),
}


def trainable_loss(head, scale=1.0):
    return scale * jnp.sum(jnp.sin(head["kernel"]) ** 2)


def extra_args(name, params, gradient_of):
    if "opaque" in name:
        return {"grad_fn": lambda params, _: gradient_of(params)}
    return {"value": jnp.asarray(1.0)} if "plateau" in name else {}


def run(name, tx, params, encoder_gradient):
    """A few steps, on the trainable part alone where `params` has no encoder."""

    def gradient_of(params):
        gradient = {"head": jax.grad(trainable_loss)(params["head"])}
        if "encoder" in params:
            gradient["encoder"] = {
                "kernel": jnp.full_like(params["encoder"]["kernel"], encoder_gradient)
            }
        return gradient

    lookahead = name.startswith("optax.lookahead")
    params = optax.LookaheadParams.init_synced(params) if lookahead else params
    state = tx.init(params)
    with jax.disable_jit():
        for _ in range(STEPS):
            one = params.fast if lookahead else params
            updates, state = tx.update(
                gradient_of(one), state, params, **extra_args(name, one, gradient_of)
            )
            params = fo.apply_updates(params, updates)
    return params.fast if lookahead else params


def same_bits(left, right):
    left, right = map(np.asarray, (left, right))
    return left.dtype == right.dtype == jnp.result_type(float) and left.tobytes() == right.tobytes()


def restricted(name):
    """The optimizer `name` for the trainable part alone: labels and masks without the encoder."""
    if name == "partition with labels of the whole tree":
        return optax.partition({"a": optax.sgd(1.0), "b": adamw()}, {"head": {"kernel": "b"}})
    if "of the whole tree" in name or "prefix" in name:
        mask = {"head": {"kernel": True}}
        return (
            optax.adamw(0.1, weight_decay=0.1, mask=mask)
            if "decay" in name
            else optax.masked(adamw(), mask)
        )
    return INSIDE[name]()


@pytest.mark.parametrize("encoder_gradient", [more(3.0), jnp.nan, more(jnp.inf)], ids=str)
@pytest.mark.parametrize("name", INSIDE)
def test_inside_every_wrapper_trains_the_rest_as_if_alone(name, encoder_gradient, x64):
    params = make_params()
    after = run(name, fo.with_frozen(INSIDE[name](), "encoder"), params, encoder_gradient)
    alone = run(name, restricted(name), {"head": params["head"]}, encoder_gradient)
    fo.assert_trees_bit_identical(after["encoder"], params["encoder"])
    fo.assert_trees_bit_identical(after["head"], alone["head"])
    assert not same_bits(after["head"]["kernel"], params["head"]["kernel"])
    assert (
        after["head"]["kernel"].dtype
        == after["encoder"]["kernel"].dtype
        == (jnp.float64 if x64 else jnp.float32)
    )


def test_lookahead_inside_holds_frozen_leaves_of_both_trees(x64):
    params = optax.LookaheadParams.init_synced(make_params())
    tx = fo.with_frozen(optax.lookahead(adamw(), sync_period=2, slow_step_size=0.5), "encoder")
    state = tx.init(params)
    for _ in range(STEPS):
        updates, state = tx.update(params.fast, state, params)
        params = fo.apply_updates(params, updates)
    for tree in params:
        fo.assert_frozen(make_params(), tree, "encoder")
    assert isinstance(params, optax.LookaheadParams)


def test_schedule_free_inside_evaluates_the_trainable_part(x64):
    params = make_params()
    alone, tx = (optax.contrib.schedule_free(optax.sgd(0.1), 0.1) for _ in range(2))
    tx = fo.with_frozen(tx, "encoder")
    state, head = tx.init(params), {"head": params["head"]}
    alone_state = alone.init(head)
    for _ in range(3):
        updates, state = tx.update(params, state, params)
        params = fo.apply_updates(params, updates)
        updates, alone_state = alone.update(head, alone_state, head)
        head = optax.apply_updates(head, updates)

    trainable, frozen = fo.partition(params, "encoder", prune=True)
    evaluated = fo.combine(optax.contrib.schedule_free_eval_params(state, trainable), frozen)
    expected = optax.contrib.schedule_free_eval_params(alone_state, head)
    fo.assert_trees_bit_identical(evaluated["head"], expected["head"])
    fo.assert_trees_bit_identical(evaluated["encoder"], make_params()["encoder"])


def test_an_injected_hyperparameter_can_be_read_and_set(x64):
    params = make_params()
    tx = fo.with_frozen(optax.inject_hyperparams(optax.sgd)(learning_rate=0.5), "encoder")
    state = optax.tree_utils.tree_set(tx.init(params), learning_rate=jnp.asarray(0.25))
    assert optax.tree_utils.tree_get(state, "learning_rate") == 0.25
    updates, _ = tx.update(params, state, params)
    np.testing.assert_array_equal(updates["head"]["kernel"], -0.25 * params["head"]["kernel"])


def test_tree_map_params_maps_the_trainable_leaves_of_the_state():
    params = make_params()
    tx = fo.with_frozen(optax.adam(0.1), "encoder")
    named = optax.tree_map_params(
        tx, lambda leaf: "param", tx.init(params), transform_non_params=lambda leaf: "other"
    )
    assert named[0].mu == {"encoder": optax.MaskedNode(), "head": {"kernel": "param"}}
    assert named[0].count == "other"


def test_tree_map_params_takes_whole_trees_with_is_leaf():
    params = make_params()
    specs = {"encoder": {"kernel": "sharded"}, "head": {"kernel": "replicated"}}
    is_hole = lambda node: isinstance(node, optax.MaskedNode)
    tx = fo.with_frozen(optax.adam(0.1), "encoder")
    keep_holes = lambda leaf, spec: leaf if is_hole(leaf) else spec
    mapped = optax.tree_map_params(tx, keep_holes, tx.init(params), specs, is_leaf=is_hole)
    assert mapped[0].nu == {"encoder": optax.MaskedNode(), "head": {"kernel": "replicated"}}


# --- outside

AROUND = {
    "optax.chain(optax.clip_by_global_norm(...), ·)": lambda tx: optax.chain(
        optax.clip_by_global_norm(0.1), tx
    ),
    "optax.chain(·, optax.clip_by_global_norm(...))": lambda tx: optax.chain(
        tx, optax.clip_by_global_norm(0.01)
    ),
    "optax.chain(·, optax.scale(...))": lambda tx: optax.chain(tx, optax.scale(0.5)),
    "optax.chain(·, optax.add_decayed_weights(...))": lambda tx: optax.chain(
        tx, optax.add_decayed_weights(-0.1)
    ),
    "optax.chain(·, optax.add_noise(...))": lambda tx: optax.chain(
        tx, optax.add_noise(0.1, 0.5, key=jax.random.key(0))
    ),
    "optax.chain(·, optax.apply_every(...))": lambda tx: optax.chain(tx, optax.apply_every(2)),
    "optax.chain(·, optax.ema(...))": lambda tx: optax.chain(tx, optax.ema(0.9)),
    "optax.chain(·, optax.keep_params_nonnegative())": lambda tx: optax.chain(
        tx, optax.keep_params_nonnegative()
    ),
    "optax.chain(·, optax.contrib.reduce_on_plateau())": lambda tx: optax.chain(
        tx, optax.contrib.reduce_on_plateau()
    ),
    "optax.named_chain": lambda tx: optax.named_chain(("inner", tx)),
    "optax.partition": lambda tx: optax.partition({"all": tx}, "all"),
    "optax.masked": lambda tx: optax.masked(
        tx, lambda params: jax.tree.map(lambda _: True, params)
    ),
    "optax.MultiSteps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "optax.inject_hyperparams": lambda tx: optax.inject_hyperparams(lambda rate: tx)(rate=0.1),
    "optax.apply_if_finite": lambda tx: optax.apply_if_finite(tx, 2),
    "optax.conditionally_mask": lambda tx: optax.conditionally_mask(
        tx, lambda step, **_: step % 2 == 0
    ),
    "optax.conditionally_transform": lambda tx: optax.conditionally_transform(
        tx, lambda step, **_: step % 2 == 0
    ),
    "optax.lookahead": lambda tx: optax.lookahead(tx, sync_period=2, slow_step_size=0.5),
    "optax.flatten": optax.flatten,
    "optax.contrib.sam": lambda tx: optax.contrib.sam(tx, optax.sgd(0.05)),
    "optax.contrib.sam(opaque_mode=True)": lambda tx: optax.contrib.sam(
        tx, optax.sgd(0.05), opaque_mode=True
    ),
    "optax.contrib.schedule_free": lambda tx: optax.contrib.schedule_free(tx, 0.1),
    "optax.contrib.mechanize": optax.contrib.mechanize,
    "optax.contrib.split_real_and_imaginary": optax.contrib.split_real_and_imaginary,
}


def outside(name):
    """What holds in 32 bits and in 64, where a steering shows that float32 rounds away."""
    answers = []
    for x64 in (False, True):
        with trying.precision(x64=x64):
            answers.append(outside_in_one_precision(name))
    return [min(cells) for cells in zip(*answers, strict=True)]  # "no" comes before "yes"


def outside_in_one_precision(name):
    """Whether frozen leaves keep their bits, trained ones their way, both under a frozen NaN."""
    wrap, params = AROUND[name], make_params()
    answers = []
    for encoder_gradient in (3.0, jnp.nan):
        alone = run(name, wrap(adamw()), {"head": params["head"]}, encoder_gradient)
        try:
            after = run(name, wrap(fo.with_frozen(adamw(), "encoder")), params, encoder_gradient)
        except ValueError as error:
            if "selects nothing" not in str(error):
                raise
            return ["error"] * 3
        kept = same_bits(after["encoder"]["kernel"], params["encoder"]["kernel"])
        own_way = same_bits(after["head"]["kernel"], alone["head"]["kernel"])
        answers.append((kept, own_way))
    (kept, own_way), under_nan = answers
    return ["yes" if answer else "no" for answer in (kept, own_way, all(under_nan))]


def rows():
    return table("docs/wrappers.md", "Wrappers around `with_frozen`")[1]


@pytest.mark.parametrize("name", [more(n) if i % 4 else n for i, n in enumerate(AROUND)])
def test_outside_with_frozen_a_wrapper_does_what_the_page_says(name):
    assert rows()[name] == outside(name)


def test_the_page_has_a_row_for_each_wrapper():
    assert set(rows()) == set(AROUND)
