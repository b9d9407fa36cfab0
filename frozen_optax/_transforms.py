"""Freezing inside a chain: transforms that replace the updates of frozen leaves by the number that adds nothing.

`optax.masked` over `optax.set_to_zero`, with three corrections. The zero is the additive identity of IEEE 754, which
is -0.0: `p + 0.0` turns -0.0 into 0.0. It has the parameter's shape and dtype, not the gradient's, which for integers
is `float0`. And that every pattern selects something is checked at `init`.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from frozen_optax import _bits
from frozen_optax._selection import Selection, Selector, by_path, frozen_selector


@functools.cache
def _placeholder_type() -> type:
    """The type of what `optax.tree_map_params` hands to `init` in place of parameters."""
    seen: list[type] = []
    optax.tree_map_params(lambda params: (seen.append(type(params)), ())[1], lambda x: x, ())
    return seen[0]


def is_placeholder(params: Any) -> bool:
    """Whether `init` was called by `optax.tree_map_params`, to see where parameters go, and not with parameters."""
    return isinstance(params, _placeholder_type())


def _set_to_additive_identity() -> optax.GradientTransformation:
    """`optax.set_to_zero`, in the parameter's shape and dtype, with the sign of zero that adds nothing."""

    def identity(like: Any) -> Any:
        if not _bits.is_array(like) or not _bits.has_additive_identity(like.dtype):
            return _bits.known_zero(like)
        if not _bits.negative_zero(like.dtype):
            return optax.set_to_zero().update(like, optax.EmptyState())[0]
        return jnp.full_like(like, complex(-0.0, -0.0) if jnp.iscomplexobj(like) else -0.0)

    def update_fn(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.tree.map(identity, updates if params is None else params), state

    return optax.GradientTransformation(optax.init_empty_state, update_fn)


def resolve_update(selector: Selector, updates: Any, params: Any) -> Any:
    """The selection at `update`, where the parameters may be missing."""
    if params is not None:
        return selector._resolve(params)
    if selector._reads > 0:
        raise ValueError(
            f"{selector!r} reads the parameters' shapes and dtypes, which gradients need not have. Pass the "
            "parameters: update(updates, state, params)."
        )
    try:
        return selector._resolve(updates)
    except ValueError as error:
        raise ValueError(f"{error} The parameters were not passed, so it was the updates that were asked.") from None


def _freeze(selector: Selector) -> optax.GradientTransformation:
    def init_fn(params: Any) -> optax.EmptyState:
        if not is_placeholder(params):
            _bits.refuse_inexact(selector._resolve(params), jax.tree.leaves(params))
        return optax.EmptyState()

    def update_fn(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        resolution = resolve_update(selector, updates, params)
        updates = resolution.unflatten(resolution.up_to(updates, "updates"))
        masked = optax.masked(_set_to_additive_identity(), resolution.unflatten(resolution.selected))
        updates, _ = masked.update(updates, optax.MaskedState(optax.EmptyState()), params)
        return updates, state

    return optax.GradientTransformation(init_fn, update_fn)


def freeze(frozen: Selection = None, *, trainable: Selection = None) -> optax.GradientTransformation:
    """A transform for `optax.chain` that makes the update of every frozen leaf nothing. It keeps no state.

    The update of a frozen leaf becomes the additive identity in the parameter's shape and dtype: -0.0 for floats and
    in both parts of complex numbers, 0 for integers and for the fnuz floats, False for bools. PRNG keys, e8m0
    and the 6-bit floats have none; they get a `float0` array, which `frozen_optax.apply_updates` understands and
    arithmetic refuses.

    What a place in a chain can promise:

    - *Before an optimizer* it zeroes gradients. It cannot stop what moves weights without them: weight decay, noise,
      moments carried over. A `clip_by_global_norm` after it multiplies its zeros by NaN when a trained gradient is NaN.
    - *After an optimizer* nothing moves, but frozen gradients have been in every norm on the way, so they steer the
      trained part, and the optimizer keeps state for the frozen part.
    - `with_frozen` does both, and keeps no state for what is frozen. Prefer it wherever the optimizer is yours to wrap.

    What follows in the chain can undo the zero: `optax.scale(-1)` makes it 0.0, `optax.add_decayed_weights` adds to it.
    `frozen_optax.apply_updates` keeps every bit under any zero. `optax.apply_updates` computes `p + u`: inside one jit
    XLA removes it; outside it flushes subnormals and quiets signalling NaNs on CPU.

    Args:
      frozen: what is frozen: a `Selector`, a glob, a compiled regex, a list of these, a predicate `(path, leaf)`, a
        bool, or a pytree of bools with the parameters' structure or a prefix of it.
      trainable: what is not frozen, instead.

    Returns:
      An `optax.GradientTransformation`.

    Raises:
      TypeError: not exactly one of `frozen` and `trainable` is given, or it is no way to select leaves.
      ValueError: at `init`, or at the first update: a pattern selects nothing, a mask does not fit; the message names
        it. At `update`: a predicate or mask function needs the parameters and they are not passed.

    Example:
      >>> import frozen_optax as fo, jax, jax.numpy as jnp, optax
      >>> params = {"encoder": jnp.ones(2), "head": jnp.ones(2)}
      >>> tx = optax.chain(optax.sgd(0.5), fo.freeze(trainable="head"))
      >>> updates, _ = tx.update(params, tx.init(params), params)
      >>> jax.tree.map(lambda u: u.tolist(), updates)
      {'encoder': [-0.0, -0.0], 'head': [-0.5, -0.5]}
    """
    return _freeze(frozen_selector(frozen, trainable))


def freeze_by_path(*patterns: str | re.Pattern[str]) -> optax.GradientTransformation:
    """`freeze` for leaves named by globs and compiled regexes, as `by_path` reads them.

    Before an optimizer it cannot stop weight decay, after one it does not keep frozen gradients out of norms: `freeze`
    says what each place in a chain promises, and `with_frozen` does both.

    Args:
      *patterns: globs or compiled regexes, at least one.

    Raises:
      TypeError: a pattern is neither.
      ValueError: a glob cannot be read or, at `init`, a pattern selects nothing.

    Example:
      >>> import frozen_optax as fo, jax.numpy as jnp, optax
      >>> tx = optax.chain(optax.sgd(0.1), fo.freeze_by_path("encoder", "**/bias"))
      >>> state = tx.init({"encoder": {"kernel": jnp.ones(2)}, "head": {"kernel": jnp.ones(2), "bias": jnp.ones(1)}})
    """
    return _freeze(by_path(*patterns))


def freeze_all() -> optax.GradientTransformation:
    """`freeze` for every leaf: last in a chain, it holds a whole network at its initial values.

    Before an optimizer it zeroes all gradients, and weight decay or noise move the weights all the same; `freeze` says
    more.

    Example:
      >>> import frozen_optax as fo, jax.numpy as jnp, optax
      >>> tx = optax.chain(optax.adamw(0.1), fo.freeze_all())
      >>> params = jnp.ones(2)
      >>> updates, _ = tx.update(params, tx.init(params), params)
      >>> updates.tolist()
      [-0.0, -0.0]
    """
    return _freeze(by_path("**"))
