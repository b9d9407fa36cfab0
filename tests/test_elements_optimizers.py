"""Every optimizer over a part of a leaf goes as it does over that part, as an array of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from kinds import FEW, each

import frozen_optax as fo
from benchmarks.catalogue import extra_args, make

STEPS = 3
ROWS = slice(0, 4)  # of the table, frozen
SPARSE = np.arange(12).reshape(4, 3) % 5 < 2  # where the mask is True it is frozen
ELEMENTS = {"table": ROWS, "masked": SPARSE}
# -0.0, a subnormal, a signalling NaN, a quiet one with a payload
ODD = np.array([0x80000000, 1, 0x7FA00001, 0xFFC00123], np.uint32).view(np.float32)


def parts():
    """What trains, as a tree of its own: whole leaves, rows, and scattered elements."""
    keys = jax.random.split(jax.random.key(1), 3)
    return {
        "kernel": jax.random.normal(keys[0], (3, 4)),
        "masked": jax.random.normal(keys[1], (int((~SPARSE).sum()),)),
        "table": 1.0 + jax.random.uniform(keys[2], (2, 3)),
    }


def whole(parts):
    """The same within larger leaves, what is frozen being what no arithmetic keeps."""
    table = np.resize(ODD, (6, 3)).copy()
    table[4:] = parts["table"]
    masked = np.resize(ODD, SPARSE.shape).copy()
    masked[~SPARSE] = parts["masked"]
    return {
        "frozen": jnp.asarray(ODD),
        "kernel": parts["kernel"],
        "masked": jnp.asarray(masked),
        "table": jnp.asarray(table),
    }


def parts_of(whole):
    return {
        "kernel": whole["kernel"],
        "masked": whole["masked"][np.nonzero(~SPARSE)],
        "table": whole["table"][4:],
    }


def loss(parts):
    hidden = jnp.tanh(parts["table"] @ parts["kernel"])
    return jnp.mean((hidden - 0.5) ** 2) + jnp.mean(jnp.sin(parts["masked"]))


def whole_loss(params):
    return loss(parts_of(params))


def hostile(gradient):
    """The gradients of the whole tree, those of frozen elements being of every kind."""
    table = jnp.full((6, 3), jnp.nan).at[4:].set(gradient["table"])
    masked = jnp.full(SPARSE.shape, 1e30).at[~SPARSE].set(gradient["masked"])
    return {"frozen": None, "kernel": gradient["kernel"], "masked": masked, "table": table}


def for_lookahead(name, params):
    return optax.LookaheadParams.init_synced(params) if name == "lookahead" else params


def fast(params):
    return params.fast if isinstance(params, optax.LookaheadParams) else params


def run(name, tx, params, loss, gradient_of, apply):
    params = for_lookahead(name, params)
    state = tx.init(params)
    for _ in range(STEPS):
        one = fast(params)
        gradient = gradient_of(one)
        args = extra_args(name, loss, one, gradient)
        updates, state = tx.update(gradient, state, params, **args)
        params = apply(params, updates)
    return params, state


@pytest.mark.parametrize("name", each(FEW | {"adafactor", "lbfgs", "lamb", "sm3", "chain"}))
def test_op_by_op_parts_go_as_arrays_of_their_own(name):
    start = whole(parts())
    tx = fo.with_frozen(make(name), "frozen", elements=ELEMENTS)
    with jax.disable_jit():
        alone, alone_state = run(
            name, make(name), parts(), loss, jax.grad(loss), optax.apply_updates
        )
        params, state = run(
            name,
            tx,
            start,
            whole_loss,
            lambda params: hostile(jax.grad(loss)(parts_of(params))),
            fo.apply_updates,
        )
    both = zip(params, alone, strict=True) if name == "lookahead" else [(params, alone)]
    for tree, expected in both:
        fo.assert_trees_bit_identical(parts_of(tree), expected)
        fo.assert_frozen(start, tree, tx, expect_movement=False)
    shapes = lambda tree: [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]
    assert shapes(state) == shapes(alone_state)
