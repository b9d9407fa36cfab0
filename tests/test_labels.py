"""An optimizer for each group inside `with_frozen`: the frozen leaves belong to none."""

import jax
import jax.numpy as jnp
import optax
import pytest

import frozen_optax as fo

PARAMS = {"backbone": {"lora": jnp.ones(2), "w": jnp.ones(2)}, "head": jnp.ones(2)}
LABELS = {"backbone": {"lora": "adapters", "w": "frozen"}, "head": "head"}
FROZEN = "backbone/w"


def groups():
    return {"head": optax.adamw(1e-1), "adapters": optax.sgd(1.0)}


def of_path(params):
    """Labels as a function that looks at each path, `frozen` among them."""
    leaf = lambda path, _: LABELS["head"] if "head" in str(path) else of_backbone[str(path[-1].key)]
    of_backbone = LABELS["backbone"]
    return jax.tree_util.tree_map_with_path(leaf, params)


def selected(params):
    return fo.by_path("head").labels(params, "head", "adapters")


WAYS = {
    "labels cut as the parameters": fo.partition(LABELS, FROZEN)[0],
    "a function of the path": of_path,
    "the labels of a selector": selected,
    "another group for what is frozen": LABELS | {"backbone": "adapters"},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("jit", [lambda update: update, jax.jit], ids=["eager", "jit"])
def test_each_group_has_its_optimizer_and_none_the_frozen_leaf(way, jit):
    tx = fo.with_frozen(
        optax.chain(optax.clip_by_global_norm(10.0), optax.partition(groups(), WAYS[way])), FROZEN
    )
    gradients = jax.tree.map(jnp.ones_like, PARAMS)
    updates, state = jit(tx.update)(gradients, tx.init(PARAMS), PARAMS)
    assert updates["backbone"]["lora"].tolist() == [-1.0, -1.0]
    expected, _ = optax.adamw(1e-1).update(jnp.ones(2), optax.adamw(1e-1).init(jnp.ones(2)), 1.0)
    assert jnp.allclose(updates["head"], expected)
    after = fo.apply_updates(PARAMS, updates)
    fo.assert_frozen(PARAMS, after, tx)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == 2 * 2 + 1
    assert fo.assert_update_freezes(tx, PARAMS, tx) == {FROZEN: "a constant -0.0"}


@pytest.mark.parametrize("labels", [LABELS, lambda params: LABELS], ids=["a tree", "a function"])
def test_labels_of_frozen_leaves_say_what_to_write(labels):
    tx = fo.with_frozen(optax.partition(groups(), labels), FROZEN)
    advice = r"optax\.partition\(groups, fo\.partition\(labels, frozen\)\[0\]\)"
    with pytest.raises(ValueError, match=rf"(?s)'frozen'.*no label freezes.*{advice}"):
        tx.init(PARAMS)


def test_what_an_optimizer_refuses_else_comes_through():
    def init(params):
        raise ValueError("mine")

    tx = fo.with_frozen(optax.GradientTransformation(init, optax.identity().update), FROZEN)
    with pytest.raises(ValueError, match=r"^mine$"):
        tx.init(PARAMS)
