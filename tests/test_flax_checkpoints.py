"""Training that is saved and loaded goes on bit for bit."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, serialization
from flax.training.train_state import TrainState
from flax_runs import (
    OPTIMIZERS,
    Net,
    NnxNet,
    below,
    flat,
    linen_params,
    linen_step,
    nnx_pair,
    nnx_step,
    weights,
)
from helpers import assert_same_bits

import frozen_optax as fo


def by_state_dict(state: Any, fresh: Any, directory: Any) -> Any:
    return serialization.from_state_dict(fresh, serialization.to_state_dict(state))


def by_msgpack(state: Any, fresh: Any, directory: Any) -> Any:
    return serialization.from_bytes(fresh, serialization.to_bytes(state))


def by_orbax(state: Any, fresh: Any, directory: Any) -> Any:
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory / "checkpoint", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(directory / "checkpoint", fresh)


@pytest.mark.parametrize(
    "frozen", ["encoder", ["encoder/layers_0", "**/bias", "encoder/relic"], "**"]
)
@pytest.mark.parametrize("carry", [by_state_dict, by_msgpack, by_orbax])
def test_a_saved_train_state_continues_bit_for_bit(carry: Any, frozen: Any, tmp_path: Any) -> None:
    make = lambda seed: TrainState.create(
        apply_fn=Net().apply,
        params=linen_params(seed),
        tx=fo.with_frozen(OPTIMIZERS["clipped adam"], frozen),
    )
    step = jax.jit(linen_step)
    halfway = step(step(make(0)))
    fresh = make(1)  # other values, and an optimizer that has seen no state yet
    loaded = carry(halfway, jax.tree.map(jnp.asarray, fresh), tmp_path)
    assert jax.tree.structure(loaded.opt_state) == jax.tree.structure(halfway.opt_state)
    assert_same_bits(flat(halfway.params), flat(loaded.params))
    expected, continued = step(step(halfway)), step(step(loaded))
    assert_same_bits(flat(expected.params), flat(continued.params))
    assert_same_bits(
        flat(halfway.params["encoder"]["layers_0"]), flat(continued.params["encoder"]["layers_0"])
    )
    assert int(continued.step) == 4
    for left, right in zip(
        jax.tree.leaves(expected.opt_state), jax.tree.leaves(continued.opt_state), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(left), np.asarray(right))


def merged(pair: Any, fresh: Any, directory: Any) -> Any:
    state = jax.tree.map(np.asarray, nnx.state(pair))
    return nnx.merge(nnx.split(fresh)[0], state)


def pure_dict(pair: Any, fresh: Any, directory: Any) -> Any:
    saved = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(pair)))
    state = nnx.state(fresh)
    nnx.replace_by_pure_dict(state, saved)
    nnx.update(fresh, state)
    return fresh


def nnx_orbax(pair: Any, fresh: Any, directory: Any) -> Any:
    import orbax.checkpoint as ocp

    graphdef, state = nnx.split(fresh)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory / "checkpoint", nnx.state(pair))
        checkpointer.wait_until_finished()
        return nnx.merge(graphdef, checkpointer.restore(directory / "checkpoint", state))


@pytest.mark.parametrize(
    "frozen", ["encoder", ["encoder/layers/0", "**/bias", "encoder/relic"], "**"]
)
@pytest.mark.parametrize("carry", [merged, pure_dict, nnx_orbax])
def test_a_saved_nnx_model_and_optimizer_continue_bit_for_bit(
    carry: Any, frozen: Any, tmp_path: Any
) -> None:
    step = nnx.jit(nnx_step)
    pair = nnx_pair(0, frozen)
    step(*pair)
    step(*pair)
    loaded = carry(pair, nnx_pair(1, frozen), tmp_path)
    assert_same_bits(weights(pair[0]), weights(loaded[0]))
    for each in (pair, loaded):
        step(*each)
        step(*each)
    assert_same_bits(weights(pair[0]), weights(loaded[0]))
    first = weights(NnxNet(nnx.Rngs(0)))
    assert_same_bits(
        below(first, "encoder/layers/0"), below(weights(loaded[0]), "encoder/layers/0")
    )
    for left, right in zip(
        *(jax.tree.leaves(nnx.state(each[1])) for each in (pair, loaded)), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(left), np.asarray(right))
