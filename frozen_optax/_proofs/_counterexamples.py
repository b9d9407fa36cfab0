"""Runs of a traced program on numbers, to show what a proof could not rule out.

A proof that fails says that something may happen, and a run can show that it does. That it does
not, no run can show.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend as jex
import jax.numpy as jnp
import numpy as np

from frozen_optax._bits import is_key
from frozen_optax._jaxprs import has_while
from frozen_optax._trees import is_at_hand, is_traced

_MAX_NUMBERS = 2**24  # that go into a run


def _keys(aval: Any, seed: int) -> Any:
    keys = [jax.random.key(seed, impl=impl) for impl in ("threefry2x32", "rbg", "unsafe_rbg")]
    return jax.random.split(next(key for key in keys if key.dtype == aval.dtype), aval.shape)


def _random(aval: Any, seed: int, positive: bool) -> Any:
    if is_key(aval):
        return _keys(aval, seed)
    random = np.random.default_rng(seed)
    if not jnp.issubdtype(aval.dtype, jnp.inexact):
        return jnp.asarray(random.integers(0, 2, aval.shape)).astype(aval.dtype)
    real, imag = random.normal(size=(2, *aval.shape)).astype(np.float32)
    real = np.abs(real) + np.float32(0.1) if positive else real
    is_complex = jnp.issubdtype(aval.dtype, jnp.complexfloating)
    return jnp.asarray(real + 1j * imag if is_complex else real).astype(aval.dtype)


def _is_given(leaf: Any) -> bool:
    is_key_at_hand = (
        isinstance(leaf, jax.Array)
        and is_key(leaf)
        and not is_traced(leaf)
        and not leaf.is_deleted()
    )
    return is_key_at_hand or is_at_hand(leaf)


@dataclasses.dataclass(frozen=True)
class Runs:
    """A program that can be run on numbers of its inputs' shapes and dtypes.

    `given` are those that the user passed.
    """

    program: Any
    given: Sequence[Any]
    only_returns: bool  # what it does is in its results

    @property
    def reason_against(self) -> str | None:
        """Why there is no run, if there is none."""
        if not self.only_returns:
            return "not run, as it does more than it returns"
        if is_traced(jnp.zeros(())) or any(map(is_traced, self.program.consts)):
            return "not run inside of a function that is being traced"
        if sum(getattr(aval, "size", 0) for aval in self.program.in_avals) > _MAX_NUMBERS:
            return "too large to be run on random numbers"
        return None

    @property
    def is_at_hand(self) -> bool:
        """Whether the user passed numbers for all inputs."""
        return all(map(_is_given, self.given))

    @property
    def may_not_end(self) -> bool:
        """Whether a state that nothing leads to could keep it running for ever."""
        return has_while(self.program)

    def compiled(self, outputs: Sequence[int]) -> Callable[..., list[Any]]:
        """The program, for some of its outputs."""
        run = jex.core.jaxpr_as_fun(self.program)

        def some(*arguments: Any) -> list[Any]:
            results = run(*arguments)
            return [results[i] for i in outputs]

        return jax.jit(some)

    def numbers(self, seed: int, positive: Callable[[int], bool] = lambda i: False) -> list[Any]:
        """Random numbers for all inputs; integers, bools and keys as they were given."""
        return [
            given
            if _is_given(given) and not jnp.issubdtype(aval.dtype, jnp.inexact)
            else _random(aval, seed + i, positive(i))
            for i, (aval, given) in enumerate(zip(self.program.in_avals, self.given, strict=True))
        ]
