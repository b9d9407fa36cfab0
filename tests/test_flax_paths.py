"""Globs and paths read the same in Linen and NNX."""

from typing import Any

import jax
import optax
import pytest
from flax.core import FrozenDict
from flax.training.train_state import TrainState
from flax_runs import (
    FLAVOURS,
    HOLD,
    OPTIMIZERS,
    PATHS,
    How,
    Net,
    assert_encoder_held_and_head_moved,
    bits,
    flat,
    linen_params,
    linen_step,
)

import frozen_optax as fo


@pytest.mark.parametrize("jit", [False, True])
def test_paths_read_the_same_at_init_and_at_update(flavour: str, jit: bool) -> None:
    seen: list[list[tuple[str, Any, Any]]] = []

    def predicate(path: str, leaf: Any) -> bool:
        if not seen or path == seen[-1][0][0]:
            seen.append([])
        seen[-1].append((path, leaf.shape, leaf.dtype))
        return path.startswith("encoder/")

    run = FLAVOURS[flavour](fo.with_frozen(optax.adamw(0.1), predicate), How(jit=jit, steps=2))
    expected = [path.replace("layers_", "layers/") if flavour == "nnx" else path for path in PATHS]
    assert [[path for path, _, _ in once] for once in seen] == [expected] * len(seen)
    assert seen == [seen[0]] * len(seen)
    assert set(run.before) == set(expected)


@pytest.mark.parametrize(
    ("frozen", "moved"),
    [
        (
            "encoder/layers{}0",
            {"encoder/layers{}1/bias", "encoder/layers{}1/kernel", "head/bias", "head/kernel"},
        ),
        (["encoder", "**/bias"], {"head/kernel"}),
        ("**/kernel", {"encoder/layers{}0/bias", "encoder/layers{}1/bias", "head/bias"}),
    ],
)
def test_globs_name_layers_and_leaves(flavour: str, frozen: Any, moved: set[str]) -> None:
    mark = "/" if flavour == "nnx" else "_"
    frozen = (
        [glob.format(mark) for glob in frozen] if isinstance(frozen, list) else frozen.format(mark)
    )
    run = FLAVOURS[flavour](fo.with_frozen(optax.sgd(0.1), frozen), How(steps=1))
    changed = {
        path for path, leaf in run.before.items() if (bits(leaf) != bits(run.after[path])).any()
    }
    assert changed == {path.format(mark) for path in moved}


@pytest.mark.parametrize("way", ["with_frozen", "freeze_by_path after"])
def test_a_typo_is_an_error_where_the_optimizer_is_made(flavour: str, way: str) -> None:
    wrong = {
        "with_frozen": fo.with_frozen(optax.adam(0.1), "encodr"),
        "freeze_by_path after": optax.chain(optax.adam(0.1), fo.freeze_by_path("encodr")),
    }[way]
    with pytest.raises(ValueError, match=r"'encodr'\) selects nothing.*'encoder"):
        FLAVOURS[flavour](wrong, How(steps=0))


def test_frozen_dicts_read_as_dicts() -> None:
    params = FrozenDict(linen_params())
    state = TrainState.create(
        apply_fn=Net().apply, params=params, tx=HOLD["with_frozen"](OPTIMIZERS["adamw"])
    )
    new = jax.jit(linen_step)(state)
    assert isinstance(new.params, FrozenDict)
    assert_encoder_held_and_head_moved(flat(params), flat(new.params))
    assert fo.by_path("**").paths(params) == PATHS
