"""What the tests of proofs share: parameters, ways to freeze, steps and optimizers to be proved."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import frozen_optax as fo

PAGE = " ".join((Path(__file__).parent.parent / "docs" / "proofs.md").read_text().split())
MASK = {"encoder": True, "head": False}


def make_params():
    kernel, head = jax.random.split(jax.random.key(0))
    return {
        "encoder": {"kernel": jax.random.normal(kernel, (3, 4)), "table": jnp.full((4,), 2.0)},
        "head": {"bias": jnp.full((3,), 0.1), "kernel": jax.random.normal(head, (4, 3))},
    }


def loss(params):
    hidden = jnp.tanh(params["encoder"]["kernel"] + params["encoder"]["table"])
    return jnp.mean((hidden @ params["head"]["kernel"] + params["head"]["bias"] - 0.5) ** 2)


def verdict(check: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """The message of the error, or nothing where it is proved."""
    try:
        check(*args, **kwargs)
    except AssertionError as error:
        return str(error)
    return ""


WAYS = {
    "with_frozen": lambda tx: fo.with_frozen(tx, "encoder"),
    "optax.freeze before": lambda tx: optax.chain(optax.freeze(MASK), tx),
    "fo.freeze after": lambda tx: optax.chain(tx, fo.freeze("encoder")),
    "fo.freeze between": lambda tx: optax.chain(
        optax.clip_by_global_norm(1.0), fo.freeze("encoder"), tx
    ),
    "optax.freeze and a scale after": lambda tx: optax.chain(
        tx, optax.freeze(MASK), optax.scale(-1.0)
    ),
}
STEERED, MOVED = "trained leaves have an update that", "frozen leaves have an update that"


def kernel_to(function: Callable[..., Any], *more: Any) -> Callable[..., Any]:
    """A step that does this to one frozen leaf, and trains the rest."""

    def step(params, x):
        new = jax.tree.map(lambda p: p - 0.1 * x, params["head"])
        kernel = params["encoder"]["kernel"]
        return {"encoder": params["encoder"] | {"kernel": function(kernel, x, *more)}, "head": new}

    return step


ITSELF, ODD, SIGN = "itself", "itself but for odd bits", "itself up to the sign of zero"


def arguments():
    params = make_params()
    params["head"]["twin"] = params["encoder"]["kernel"] + 1.0
    return params, jnp.array(0.5)


def of_base(function: Callable[..., Any]) -> Callable[..., Any]:
    """A step that does this to the frozen leaf."""
    return lambda params: params | {"base": function(params["base"], params["head"])}


def known(*numbers: float, dtype: Any = "float32") -> Callable[[Any], Any]:
    """An array of these numbers that is an output of the program, to be known by its rules."""
    return lambda head: jnp.where(
        False, head[: len(numbers)].astype(dtype), np.array(numbers, dtype)
    )


HEAD = jnp.array([0.5, -1.0, 2.0])
FLOATS = jnp.arange(3.0)


def transformation(update: Callable[..., Any], init: Any = ()) -> optax.GradientTransformation:
    return optax.GradientTransformation(lambda params: init, update)


def steering(function: Callable[..., Any]) -> optax.GradientTransformation:
    """The update of the trained leaf is a function of it and of the frozen gradient."""
    return transformation(
        lambda g, s, p=None: ({"base": jnp.zeros(3), "head": function(g["head"], g["base"])}, s)
    )
