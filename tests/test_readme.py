"""What the README says is so: its code runs, its table of promises is measured, its commands are the checks'."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from test_wrappers import readme_table

import frozen_optax as fo

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
MASK = {"encoder": True, "head": False}

WAYS = {
    "fo.with_frozen": lambda tx: fo.with_frozen(tx, "encoder"),
    "optax.selective_transform": lambda tx: optax.selective_transform(tx, freeze_mask=MASK),
    "optax.freeze before": lambda tx: optax.chain(optax.freeze(MASK), tx),
    "optax.freeze after": lambda tx: optax.chain(tx, optax.freeze(MASK)),
}


def apply_of(way):
    return fo.apply_updates if way.startswith("fo.") else optax.apply_updates


def make_params():
    odd = np.array([0x80000000, 1, 0x7F800001, 0x7FC00123], np.uint32).view(np.float32)
    return {"encoder": {"a": jnp.asarray(odd), "b": jnp.arange(4.0)}, "head": jnp.array([1.0, 2.0])}


def train(way, optimizer, params, gradients, steps=3, **extra_args):
    tx = optax.with_extra_args_support(WAYS[way](optimizer))
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(gradients, state, params, **extra_args)
        params = apply_of(way)(params, updates)
    return params


def bits(tree):
    return [np.asarray(leaf).view(np.uint32).tolist() for leaf in jax.tree.leaves(tree)]


def ones(params):
    return jax.tree.map(jnp.ones_like, params)


def odd_bits_survive(way):
    params = make_params()
    tx = WAYS[way](optax.sgd(0.1))
    updates, _ = jax.jit(tx.update)(ones(params), tx.init(params), params)
    return bits(jax.jit(apply_of(way))(params, updates)["encoder"]) == bits(params["encoder"])


def weight_decay_moves_nothing(way):
    params = make_params()
    after = train(way, optax.adamw(0.1, weight_decay=0.1), params, ones(params))
    return bits(after["encoder"]["b"]) == bits(params["encoder"]["b"])


def nothing_steers_clipping(way):
    params = make_params()
    clipped = optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1))
    small = ones(params)
    large = small | {"encoder": jax.tree.map(lambda leaf: 9 * leaf, small["encoder"])}
    return bits(train(way, clipped, params, small)["head"]) == bits(train(way, clipped, params, large)["head"])


def a_trained_nan_stays_out_of_frozen_leaves(way):
    params = make_params()
    clipped = optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1))
    after = train(way, clipped, params, ones(params) | {"head": jnp.full(2, jnp.nan)})
    return bits(after["encoder"]["b"]) == bits(params["encoder"]["b"])


def a_frozen_nan_stays_out_of_trained_leaves(way):
    params = make_params()
    clipped = optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1))
    nans = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), params["encoder"])
    return bool(np.isfinite(train(way, clipped, params, ones(params) | {"encoder": nans})["head"]).all())


def extra_arguments_work(way):
    params = {"encoder": jnp.ones(2), "head": jnp.ones(2)}
    loss = lambda params: jnp.sum((params["encoder"] * params["head"]) ** 2)
    value, gradients = jax.value_and_grad(loss)(params)
    try:
        train(way, optax.lbfgs(), params, gradients, steps=1, value=value, grad=gradients, value_fn=loss)
        train(way, optax.contrib.sophia(0.1), params, gradients, steps=1, obj_fn=loss)
    except Exception:
        return False
    return True


def any_leaf_may_be_frozen(way):
    encoder = {"steps": jnp.array(3), "mask": jnp.array([True]), "key": jax.random.key(0)}
    params = {"encoder": encoder, "head": jnp.ones(2)}
    gradients = jax.grad(lambda params: jnp.sum(params["head"] ** 2), allow_int=True)(params)
    try:
        after = train(way, optax.adamw(0.1), params, gradients)
        fo.assert_frozen(params, after, "encoder")
    except Exception:
        return False
    return True


def no_state_for_frozen_leaves(way):
    params = make_params()
    state = WAYS[way](optax.adam(0.1)).init(params)
    return sum(leaf.size for leaf in jax.tree.leaves(state)) == 2 * params["head"].size + 1


PROMISES = {
    "-0.0, subnormals and NaN payloads survive when update and apply are compiled apart": odd_bits_survive,
    "weight decay moves no frozen leaf": weight_decay_moves_nothing,
    "frozen gradients do not steer clipping by global norm": nothing_steers_clipping,
    "a NaN in a trained gradient stays out of frozen leaves": a_trained_nan_stays_out_of_frozen_leaves,
    "a NaN in a frozen gradient stays out of trained leaves": a_frozen_nan_stays_out_of_trained_leaves,
    "L-BFGS and Sophia get their extra arguments": extra_arguments_work,
    "integers, bools and PRNG keys may be frozen": any_leaf_may_be_frozen,
    "no optimizer state for frozen leaves": no_state_for_frozen_leaves,
}


@pytest.mark.parametrize("promise", PROMISES)
def test_the_table_of_promises_is_measured(promise):
    measured = ["yes" if PROMISES[promise](way) else "no" for way in WAYS]
    assert readme_table("What it promises")[promise] == measured


def test_every_promise_of_the_table_is_measured():
    assert set(PROMISES) <= set(readme_table("What it promises"))
    header = re.search(r"## What it promises.*?\n\| \| (.*?) \|\n", README, re.S)
    assert [name.replace("`", "") for name in header[1].split(" | ")] == list(WAYS)


BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.M | re.S)


def test_the_code_runs_as_it_stands():
    names = {}
    for block in BLOCKS:  # one that imports nothing goes on from the one before
        names = {"__name__": "readme"} if "import" in block else names
        exec(compile(block, "README.md", "exec"), names)
    assert len(BLOCKS) == 7


def test_all_names_are_listed_and_no_others():
    listed = re.findall(r"`(\w+)`", README.split("## All names")[1].split("\n## ")[0])
    assert sorted(listed) == sorted(fo.__all__)


def test_the_checks_run_the_command_for_the_tests():
    command = next(line for line in README.splitlines() if "-m pytest" in line)
    assert command in (ROOT / ".ci" / "run").read_text()
