"""What each way of freezing holds under Flax, and what `with_frozen` promises besides."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax_runs import (
    BEFORE,
    HOLD,
    OPTIMIZERS,
    PATHS,
    How,
    alone,
    assert_close,
    assert_encoder_held_and_head_moved,
    below,
    bits,
    differ,
    linen_params,
    relic_bits,
    train,
    used,
)
from helpers import assert_same_bits


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "clipped adam"])
@pytest.mark.parametrize("way", HOLD)
def test_frozen_leaves_keep_their_bits_and_the_others_move(
    flavour: str, way: str, optimizer: str
) -> None:
    run = train(flavour, way, optimizer)
    assert_encoder_held_and_head_moved(run.before, run.after)


@pytest.mark.parametrize("way", ["with_frozen", "freeze after", "restore"])
def test_frozen_leaves_keep_their_bits_when_the_state_is_donated(flavour: str, way: str) -> None:
    run = train(flavour, way, "adamw", How(donate=True))
    assert_encoder_held_and_head_moved(run.before, run.after)
    assert_same_bits(run.after, train(flavour, way, "adamw").after)


@pytest.mark.parametrize("way", ["with_frozen", "freeze_by_path after", "freeze after"])
def test_eager_steps_flush_subnormals_and_keep_other_bits(
    flavour: str, way: str, x64: bool
) -> None:
    run = train(flavour, way, "adamw", How(jit=False, steps=2))
    relic = bits(run.after["encoder/relic"])
    kept = [0, 4]  # -0.0, -inf
    np.testing.assert_array_equal(relic[kept], relic_bits()[kept])
    # `optax.apply_updates` computes p + (-0.0) of a subnormal and of a quiet NaN.
    if jax.default_backend() == "cpu":
        assert (relic[1], relic[2]) == (0, relic_bits()[2])
    else:
        assert np.isnan(run.after["encoder/relic"][2])  # a GPU has one NaN for all
    assert_same_bits(used(run.before), used(run.after))


def test_eager_steps_keep_every_bit_with_restore(flavour: str, x64: bool) -> None:
    run = train(flavour, "restore", "adamw", How(jit=False, steps=2))
    assert_encoder_held_and_head_moved(run.before, run.after)


@pytest.mark.parametrize("way", ["with_frozen", "freeze after"])
def test_a_train_state_with_fo_apply_updates_keeps_every_bit(way: str, x64: bool) -> None:
    run = train("linen", way, "adamw", How(jit=False, exact=True, steps=2))
    assert_encoder_held_and_head_moved(run.before, run.after)


# --- what with_frozen promises besides, and the others do not


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "clipped adam", "clipped momentum"])
def test_with_frozen_takes_the_trajectory_of_the_head_alone(
    flavour: str, optimizer: str, x64: bool
) -> None:
    run = train(flavour, "with_frozen", optimizer)
    assert_encoder_held_and_head_moved(run.before, run.after)
    assert_close(below(run.after, "head"), alone(flavour, optimizer))


def test_lbfgs_searches_along_the_head_alone(flavour: str) -> None:
    how = How(extra=True, steps=2)
    run = train(flavour, "with_frozen", "lbfgs", how)
    assert_encoder_held_and_head_moved(run.before, run.after)
    assert_close(below(run.after, "head"), alone(flavour, "lbfgs", how), rtol=1e-3)


def test_frozen_gradients_steer_a_head_clipped_with_them(
    flavour: str,
) -> None:
    expected = alone(flavour, "clipped momentum")
    for way in ("freeze after", "restore"):
        assert differ(below(train(flavour, way, "clipped momentum").after, "head"), expected)
    for way in BEFORE:
        assert_close(below(train(flavour, way, "clipped momentum").after, "head"), expected)


def test_a_frozen_nan_reaches_the_head_by_clipping_alone(
    flavour: str,
) -> None:
    expected = alone(flavour, "clipped momentum")
    held = train(flavour, "with_frozen", "clipped momentum", How(poison=True))
    assert_encoder_held_and_head_moved(held.before, held.after)
    assert_close(below(held.after, "head"), expected)
    assert_close(
        below(train(flavour, "freeze before", "clipped momentum", How(poison=True)).after, "head"),
        expected,
    )
    assert np.isnan(
        train(flavour, "freeze after", "clipped momentum", How(poison=True)).after["head/kernel"]
    ).all()


@pytest.mark.parametrize("way", BEFORE)
def test_freeze_before_adamw_moves_weights_by_decay(flavour: str, way: str) -> None:
    run = train(flavour, way, "adamw")
    kernels = [path for path in below(run.before, "encoder") if path.endswith("kernel")]
    assert len(kernels) == 2
    for path in kernels:
        np.testing.assert_allclose(
            run.after[path], run.before[path] * (1 - 0.05 * 0.1) ** 3, rtol=1e-5
        )


@pytest.mark.parametrize("optimizer", ["sgd", "clipped adam"])
@pytest.mark.parametrize("way", BEFORE)
def test_freeze_before_an_optimizer_without_decay_keeps_values(
    flavour: str, way: str, optimizer: str
) -> None:
    run = train(flavour, way, optimizer)
    for path, leaf in used(run.before).items():
        np.testing.assert_array_equal(leaf, run.after[path], err_msg=path)


@pytest.mark.parametrize("way", BEFORE)
def test_freeze_before_sgd_loses_the_sign_of_zero_outside_jit(flavour: str, way: str) -> None:
    run = train(flavour, way, "sgd", How(jit=False, steps=1))
    # scale(-lr) made the update 0.0, and -0.0 + 0.0 is 0.0.
    assert bits(run.after["encoder/relic"])[0] == 0


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_state_of_with_frozen_has_the_heads_leaves_alone(flavour: str, optimizer: str) -> None:
    shapes = lambda tree: [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]
    moments = {"sgd": 0, "adamw": 2, "clipped adam": 2, "clipped momentum": 1, "lbfgs": 5}[
        optimizer
    ]
    for how in (How(steps=0), How(extra=True, steps=2) if optimizer == "lbfgs" else How()):
        state = train(flavour, "with_frozen", optimizer, how).opt_state
        assert shapes(state) == shapes(OPTIMIZERS[optimizer].init({"head": linen_params()["head"]}))
        paths = [
            jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)
        ]
        assert not [path for path in paths if "encoder" in path]
        nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, optax.MaskedNode))
        holes = [node for node in nodes if isinstance(node, optax.MaskedNode)]
        assert len(holes) == moments  # one for the whole encoder


def test_the_state_of_freeze_last_has_the_whole_models_leaves(
    flavour: str,
) -> None:
    state = train(flavour, "freeze after", "adamw", How(steps=0)).opt_state
    assert len(jax.tree.leaves(state)) == 1 + 2 * len(PATHS)
