"""A step with the installed package alone: `use.py FOLDER`, which it must be installed under."""

import importlib.metadata
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

import frozen_optax as fo

assert Path(sys.argv[1]).resolve() in Path(fo.__file__).resolve().parents, fo.__file__
assert (Path(fo.__file__).parent / "py.typed").exists()
assert importlib.metadata.version("frozen-optax") == fo.__version__

params = {"encoder": {"kernel": jnp.full((4, 4), -0.0)}, "head": {"kernel": jnp.ones((4, 2))}}
tx = fo.with_frozen(optax.adamw(1e-3), "encoder")


@fo.jit(frozen=tx)
def train_step(params, state, x):
    """A step for the head, as in the README."""
    value, grads = fo.value_and_grad(loss, tx)(params, x)
    updates, state = tx.update(grads, state, params)
    return fo.apply_updates(params, updates), state, value


def loss(params, x):
    """A loss that reads both."""
    return jnp.mean((jnp.tanh(1 + x @ params["encoder"]["kernel"]) @ params["head"]["kernel"]) ** 2)


after, state, value = train_step(params, tx.init(params), jnp.ones((8, 4)))
fo.assert_frozen(params, after, tx)
assert after["encoder"]["kernel"] is params["encoder"]["kernel"]
print(f"frozen_optax from {fo.__file__} with jax {jax.__version__}: a step, loss {value:.3f}")
