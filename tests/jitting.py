"""Steps of `jit` that change every leaf, so that what comes back shows what was frozen."""

import functools
from typing import Any

import jax.numpy as jnp
from flax import struct
from helpers import make_params

import frozen_optax as fo

# What these steps change of what is frozen is thrown away. Where it is refused: test_changes.py.
jit = functools.partial(fo.jit, discard=True)


@struct.dataclass
class State:
    params: Any
    batch_stats: Any
    step: Any


def make_state() -> State:
    norm = {"norm": {"mean": jnp.zeros(2)}}
    return State(
        make_params(), {"encoder": norm, "head": {"norm": {"mean": jnp.zeros(2)}}}, jnp.array(0)
    )


class Trainer:
    @fo.jit(frozen="encoder")
    def step(self, params):
        return params
