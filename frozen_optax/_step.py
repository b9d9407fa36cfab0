"""The step itself: applying updates so that nothing that is not updated changes a bit."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from frozen_optax import _bits
from frozen_optax._trees import PyTree, describe, paths_of, up_to


def _sum(param: Any, update: Any) -> Any:
    return jnp.asarray(param + update).astype(jnp.asarray(param).dtype)


@jax.custom_jvp
def _exact_sum(param: Any, update: Any) -> Any:
    return _bits.select_bits(update == 0, jnp.asarray(param), _sum(param, update))


@_exact_sum.defjvp
def _exact_sum_jvp(primals: Any, tangents: Any) -> Any:
    # It is a sum, to be differentiated as one: bits have no derivative.
    return _exact_sum(*primals), jax.jvp(_sum, primals, tangents)[1]


def _apply(param: Any, update: Any) -> Any:
    if _bits.is_known_zero(update):
        return param
    if not _bits.is_array(update) and not isinstance(update, (bool, int, float, complex)):
        raise TypeError(f"an update is an array, found {describe(update)}")
    shape = jnp.shape(param)
    if np.broadcast_shapes(shape, jnp.shape(update)) != shape:
        raise TypeError(f"an update of shape {jnp.shape(update)} for a parameter of shape {shape}")
    if 0 in shape:
        return param
    dtype = jnp.asarray(param).dtype
    if not jnp.issubdtype(dtype, jnp.inexact) and jnp.result_type(update) == dtype:
        return _sum(param, update)  # among integers of one type p + 0 is p
    return _exact_sum(param, update)


def apply_updates(params: PyTree, updates: PyTree) -> PyTree:
    """`optax.apply_updates`, except that a zero update leaves every bit of the parameter as it was.

    Where the update is known to be zero while tracing (the frozen leaves after `with_frozen`; `None`, holes and
    `float0`) there is no operation at all: the parameter itself is returned, whatever it is. Elsewhere it is
    `(p + u).astype(p.dtype)`, and where an element of `u` is 0 or -0.0 the bits of that element of `p`. It is
    differentiated as the sum it is.

    Args:
      params: a pytree of parameters.
      updates: a pytree in the structure of `params`; a hole may stand for a leaf or for a whole subtree.

    Returns:
      The new parameters, in the structure, shapes and dtypes of `params`.

    Raises:
      ValueError: the trees differ in structure; the message names the path.
      TypeError: an update that is not nothing for a leaf no arithmetic can touch (a PRNG key, a function), or one of a
        shape that does not fit; the message names the path.

    Example:
      >>> import frozen_optax as fo, jax.numpy as jnp
      >>> fo.apply_updates(jnp.array([-0.0, 1.0]), jnp.array([0.0, 0.5])).tolist()
      [-0.0, 1.5]
    """
    leaves, treedef = jax.tree.flatten(params)
    new = []
    for i, (param, update) in enumerate(zip(leaves, up_to(treedef, updates, "updates"), strict=True)):
        try:
            new.append(_apply(param, update))
        except (TypeError, ValueError) as error:
            raise TypeError(f"cannot update the parameter at {paths_of(params)[i]!r}: {error}.") from error
    return jax.tree.unflatten(treedef, new)
