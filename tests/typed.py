"""Checked by pyright and never run: a decorated step has the types of the function that it was."""

from typing import Any, assert_type

import jax
import optax

import frozen_optax as fo

Params = dict[str, jax.Array]
TX = fo.with_frozen(optax.adam(1e-3), "encoder")


@fo.jit(frozen=TX, donate_argnums=0)
def decorated(params: Params, scale: float, *, count: int = 1) -> tuple[Params, jax.Array]:
    """A step under the decorator with options."""
    return params, params["head"] * scale * count


def called(params: Params) -> Params:
    """A step that `jit` is called with."""
    return params


def check(params: Params, anything: Any) -> None:
    """What the checker has to find."""
    assert_type(decorated(params, 1.0, count=2), tuple[Params, jax.Array])
    assert_type(fo.jit(called, frozen="encoder")(params), Params)
    decorated(params)  # pyright: ignore[reportCallIssue]
    decorated(params, "a")  # pyright: ignore[reportArgumentType]
    assert_type(TX.frozen & ~fo.by_path("encoder/scale"), fo.Selector)
    assert_type(TX.frozen.paths(params), list[str])
    assert_type(fo.fingerprint(params, TX), dict[str, str])
    assert_type(fo.save_trained("checkpoint", params, TX, overwrite=True), None)
    assert_type(fo.summary(params, TX).trained.parameters, int)
    TX.init(anything)
