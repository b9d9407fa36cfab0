"""The step itself: applying updates so that nothing that is not updated changes a bit."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from frozen_optax import _bits
from frozen_optax._trees import PyTree, keystr, up_to


def _apply(param: Any, update: Any) -> Any:
    if _bits.is_known_zero(update):
        return param
    new = jnp.asarray(param + update).astype(jnp.asarray(param).dtype)
    if new.shape != jnp.shape(param):
        raise TypeError(f"an update of shape {jnp.shape(update)} for a parameter of shape {jnp.shape(param)}")
    if not jnp.issubdtype(new.dtype, jnp.inexact) and jnp.result_type(update) == new.dtype:
        return new  # among integers of one type p + 0 is p
    return _bits.select_bits(update == 0, jnp.asarray(param), new)


def apply_updates(params: PyTree, updates: PyTree) -> PyTree:
    """`optax.apply_updates`, except that a zero update leaves every bit of the parameter as it was.

    Where the update is known to be zero while tracing (the frozen leaves after `with_frozen`; `None`, holes and
    `float0`) there is no operation at all: the parameter itself is returned, whatever it is. Elsewhere it is
    `(p + u).astype(p.dtype)`, and where an element of `u` is 0 or -0.0 the bits of that element of `p`.

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
        except TypeError as error:
            path = keystr(jax.tree_util.tree_leaves_with_path(params)[i][0])
            raise TypeError(f"cannot update the parameter at {path!r}: {error}.") from error
    return jax.tree.unflatten(treedef, new)
