"""Freezing inside a chain: transforms that make the updates of frozen leaves nothing.

`optax.masked` over `optax.set_to_zero`, with three corrections. The zero is the additive identity
of IEEE 754, which is -0.0: `p + 0.0` turns -0.0 into 0.0. It has the parameter's shape and dtype,
not the gradient's, which for integers is `float0`. And that every pattern selects something is
checked at `init`.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from frozen_optax import _bits
from frozen_optax._resolution import Resolution
from frozen_optax._selection import by_path, frozen_selector
from frozen_optax._selectors import Reads, Selector, reads, resolve
from frozen_optax._typing import Frozen, Leaf, PyTree


@functools.cache
def _placeholder_type() -> type:
    """The type of what `optax.tree_map_params` hands to `init` in place of parameters."""
    seen: list[type] = []

    def init(params: PyTree) -> PyTree:
        seen.append(type(params))
        return ()

    optax.tree_map_params(init, lambda leaf: leaf, ())
    return seen[0]


def is_placeholder(params: PyTree) -> bool:
    """Whether `init` was called by `optax.tree_map_params`, and not with parameters.

    It wants to see where in the state parameters go.
    """
    return isinstance(params, _placeholder_type())


def _set_to_additive_identity() -> optax.GradientTransformation:
    """`optax.set_to_zero` of the zero that adds nothing, in the parameter's shape and dtype."""

    def identity(like: Leaf) -> Leaf:
        if not _bits.is_array(like) or not _bits.has_additive_identity(like.dtype):
            return _bits.known_zero(like)
        if not _bits.has_negative_zero(like.dtype):
            return optax.set_to_zero().update(like, optax.EmptyState())[0]
        zero = complex(-0.0, -0.0) if jnp.iscomplexobj(like) else -0.0
        return jnp.full_like(like, zero)

    def update_fn(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        return jax.tree.map(identity, updates if params is None else params), state

    return optax.GradientTransformation(optax.init_empty_state, update_fn)


def resolve_without_params(
    selector: Selector, updates: PyTree, is_settled: Callable[[Resolution], bool] | None = None
) -> Resolution:
    """The selection at `update`, where the parameters are missing.

    Paths are the same in the updates. Shapes and dtypes need not be: what a predicate or a mask
    function makes of them counts only if it `is_settled` that `init` found the same.
    """
    if reads(selector) is Reads.STRUCTURE:
        try:
            return resolve(selector, updates)
        except ValueError as error:
            raise ValueError(
                f"{error} The parameters were not passed, so it was the updates that were asked."
            ) from None
    if is_settled is not None:
        # An error says that it does not select of the updates what it should.
        with contextlib.suppress(ValueError, TypeError):
            resolution = resolve(selector, updates)
            if is_settled(resolution):
                return resolution
    raise ValueError(
        f"{selector!r} reads the parameters' shapes and dtypes, which gradients need not have. "
        "Pass the parameters: update(updates, state, params). Where the loop does not, freeze by a "
        "mask made beforehand: selector.mask(params)."
    )


def _freeze(selector: Selector) -> optax.GradientTransformation:
    def init_fn(params: PyTree) -> optax.EmptyState:
        if not is_placeholder(params):
            _bits.refuse_unkeepable(resolve(selector, params), jax.tree.leaves(params))
        return optax.EmptyState()

    def update_fn(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        if params is None:
            resolution = resolve_without_params(selector, updates)
        else:
            resolution = resolve(selector, params)
        updates = resolution.unflatten(resolution.up_to(updates, "updates"))
        mask = resolution.unflatten(resolution.selected)
        masked = optax.masked(_set_to_additive_identity(), mask)
        updates, _ = masked.update(updates, optax.MaskedState(optax.EmptyState()), params)
        return updates, state

    return optax.GradientTransformation(init_fn, update_fn)


def freeze(frozen: Frozen = None, *, trainable: Frozen = None) -> optax.GradientTransformation:
    """A transform for `optax.chain` that makes the update of every frozen leaf nothing.

    It keeps no state. The update of a frozen leaf becomes the additive identity in the parameter's
    shape and dtype: -0.0 for floats and in both parts of complex numbers, 0 for integers and for
    the fnuz floats, False for bools. PRNG keys, e8m0 and the 6-bit floats have none; they get a
    `float0` array, which `frozen_optax.apply_updates` understands and arithmetic refuses.

    What a place in a chain can promise:

    - *Before an optimizer* it zeroes gradients. It cannot stop what moves weights without them:
      weight decay, noise, moments carried over. A `clip_by_global_norm` after it multiplies its
      zeros by NaN when a trained gradient is NaN.
    - *After an optimizer* nothing moves, but frozen gradients have been in every norm on the way,
      so they steer the trained part, and the optimizer keeps state for the frozen part.
    - `with_frozen` does both, and keeps no state for what is frozen. Prefer it wherever the
      optimizer is yours to wrap.

    What follows in the chain can undo the zero: `optax.scale(-1)` makes it 0.0,
    `optax.add_decayed_weights` adds to it. `frozen_optax.apply_updates` keeps every bit under any
    zero. `optax.apply_updates` computes `p + u`: inside one jit XLA removes it; outside it flushes
    subnormals and quiets signalling NaNs on CPU.

    Args:
      frozen: the leaves that are frozen: a glob on their paths (`"encoder"`), a compiled regex that
        matches the whole path, a `Selector`, a list of these, a predicate `(path, leaf) -> bool`, a
        bool, a pytree of bools in the parameters' structure or a prefix of it, a function of the
        parameters that returns one, a filter of `flax.nnx` or a type of its Variables, or the
        optimizer that `with_frozen` returned.
      trainable: the leaves that are not, instead of `frozen`: exactly one of the two is given.

    Returns:
      An `optax.GradientTransformation`.

    Raises:
      TypeError: not exactly one of `frozen` and `trainable` is given, or it is no way to select
        leaves.
      ValueError: at `init`, or at the first update: the selection, or a part of it, selects nothing
        and does not say so (`False`); a mask does not fit; the message names it. At `update`: a
        predicate or mask function needs the parameters and they are not passed.

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

    Before an optimizer it cannot stop weight decay, after one it does not keep frozen gradients out
    of norms: `freeze` says what each place in a chain promises, and `with_frozen` does both.

    Args:
      *patterns: globs or compiled regexes, at least one.

    Raises:
      TypeError: a pattern is neither.
      ValueError: a glob cannot be read or, at `init`, a pattern selects nothing.

    Example:
      >>> import frozen_optax as fo, jax.numpy as jnp, optax
      >>> tx = optax.chain(optax.sgd(0.1), fo.freeze_by_path("encoder", "**/bias"))
      >>> layer = {"kernel": jnp.ones(2), "bias": jnp.ones(1)}
      >>> state = tx.init({"encoder": layer, "head": layer})
    """
    return _freeze(by_path(*patterns))


def freeze_all() -> optax.GradientTransformation:
    """`freeze` for every leaf: last in a chain, it holds a whole network at its initial values.

    Before an optimizer it zeroes all gradients, and weight decay or noise move the weights all the
    same; `freeze` says more.

    Example:
      >>> import frozen_optax as fo, jax.numpy as jnp, optax
      >>> tx = optax.chain(optax.adamw(0.1), fo.freeze_all())
      >>> params = jnp.ones(2)
      >>> updates, _ = tx.update(params, tx.init(params), params)
      >>> updates.tolist()
      [-0.0, -0.0]
    """
    return _freeze(by_path("**"))
