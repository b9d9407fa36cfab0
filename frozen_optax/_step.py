"""The step itself: gradients of what is trained, and updates applied so that nothing else changes a bit."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from frozen_optax import _bits
from frozen_optax._selection import Selection, frozen_selector
from frozen_optax._trees import PyTree, Resolution, describe, paths_of, up_to


def _sum(param: Any, update: Any) -> Any:
    return jnp.asarray(param + update).astype(jnp.asarray(param).dtype)


@jax.custom_jvp
def _differentiable_sum(param: Any, update: Any) -> Any:
    param, update = jnp.asarray(param), jnp.asarray(update)
    is_zero = jnp.broadcast_to(jax.lax.eq(update, jax.lax.full_like(update, 0)), param.shape)
    return _bits.select_bits(is_zero, param, _sum(param, update))


@_differentiable_sum.defjvp
def _jvp(primals: Any, tangents: Any) -> Any:
    # It is a sum, to be differentiated as one: bits have no derivative.
    return _differentiable_sum(*primals), jax.jvp(_sum, primals, tangents)[1]


# Compiled, it is one dispatch for a leaf where nothing else is compiled, and is traced once for all leaves of a shape.
_exact_sum = jax.jit(_differentiable_sum)


def _apply(param: Any, update: Any) -> Any:
    if _bits.is_known_zero(update):
        return param
    if not _bits.is_array(update) and not isinstance(update, (bool, int, float, complex)):
        raise TypeError(f"an update is an array, found {describe(update)}")
    shape = jnp.shape(param)
    if np.broadcast_shapes(shape, jnp.shape(update)) != shape:
        raise TypeError(f"an update of shape {jnp.shape(update)} for a parameter of shape {shape}")
    return param if 0 in shape else _exact_sum(param, update)


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
    for i, pair in enumerate(zip(leaves, up_to(treedef, updates, "updates"), strict=True)):
        try:
            new.append(_apply(*pair))
        except (TypeError, ValueError) as error:
            raise TypeError(f"cannot update the parameter at {paths_of(params)[i]!r}: {error}.") from error
    return jax.tree.unflatten(treedef, new)


def _gradient(resolution: Resolution, params: list[Any], trained: list[Any], holes: bool) -> Any:
    """The gradient of the whole tree from those of the trainable leaves."""
    if holes:
        return jax.tree.unflatten(resolution.holed, trained)
    return resolution.fill(map(_bits.known_zero, params), trained)


def value_and_grad(
    fun: Callable[..., Any],
    frozen: Selection = None,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    holomorphic: bool = False,
    *,
    trainable: Selection = None,
    holes: bool = False,
) -> Callable[..., tuple[Any, Any]]:
    """`jax.value_and_grad` with respect to the trainable leaves alone.

    Frozen leaves are not differentiated, while tracing and not by the compiler's grace, so they may be of any dtype:
    integers, bools, PRNG keys need no `allow_int`. The gradient has the full structure. That of a frozen leaf is zero
    in its shape and dtype, known to be zero while tracing: `with_frozen` and `apply_updates` do nothing for it.

    Args:
      fun: a function of the parameters and other arguments that returns a scalar, as `jax.value_and_grad` takes it.
      frozen: what is frozen, as `freeze` takes it.
      argnums: which positional arguments to differentiate; a pattern is relative to each of them.
      has_aux: whether `fun` returns a pair of the scalar and auxiliary data.
      holomorphic: whether `fun` is promised to be holomorphic.
      trainable: what is not frozen, instead.
      holes: leave a hole (`optax.MaskedNode`) for each frozen leaf instead of a zero. Zeros that leave a compiled
        function, or are carried through a `scan`, become arrays that take memory; holes do not. Every function here
        accepts them, and `with_frozen` outermost; optax's own wrappers around it do not.

    Returns:
      A function of the arguments of `fun` that returns what `jax.value_and_grad(fun, ...)` does.

    Raises:
      TypeError, ValueError: as `freeze`. When called: `argnums` names an argument that is not given by position, or a
        trainable leaf is no float or complex number; the message names it.

    Example:
      >>> import frozen_optax as fo, jax.numpy as jnp
      >>> params = {"base": jnp.arange(3), "scale": jnp.array(2.0)}
      >>> value, grads = fo.value_and_grad(lambda p: p["scale"] * p["base"].sum(), "base")(params)
      >>> float(value), float(grads["scale"]), grads["base"].tolist()
      (6.0, 3.0, [0, 0, 0])
    """
    selector = frozen_selector(frozen, trainable)
    places = (argnums,) if isinstance(argnums, int) else tuple(argnums)

    @functools.wraps(fun)
    def value_and_grad_of_trainable(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if any(not -len(args) <= place < len(args) for place in places):
            raise TypeError(f"argnums is {argnums}, and {len(args)} arguments were given by position.")
        at = [place % len(args) for place in places]
        leaves = [jax.tree.leaves(args[place]) for place in at]
        resolutions = [selector._resolve(args[place]) for place in at]

        for resolution, each in zip(resolutions, leaves, strict=True):
            for path, leaf in resolution.rest(zip(resolution.paths, each, strict=True)):
                if not _bits.is_differentiable(leaf):
                    found = describe(leaf)
                    raise TypeError(f"cannot differentiate by the trainable leaf {path!r}, {found}. Freeze it.")

        def of_trainable(*trained: Any) -> Any:
            whole = list(args)
            for place, resolution, frozen_leaves, part in zip(at, resolutions, leaves, trained, strict=True):
                whole[place] = resolution.fill(frozen_leaves, part)
            return fun(*whole, **kwargs)

        parts = [resolution.rest(each) for resolution, each in zip(resolutions, leaves, strict=True)]
        differentiate = jax.value_and_grad(of_trainable, tuple(range(len(at))), has_aux, holomorphic)
        value, grads = differentiate(*parts)
        columns = zip(resolutions, leaves, grads, strict=True)
        grads = tuple(_gradient(*column, holes) for column in columns)
        return value, grads[0] if isinstance(argnums, int) else grads

    return value_and_grad_of_trainable


def grad(
    fun: Callable[..., Any],
    frozen: Selection = None,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    holomorphic: bool = False,
    *,
    trainable: Selection = None,
    holes: bool = False,
) -> Callable[..., Any]:
    """`jax.grad` with respect to the trainable leaves alone; all as `value_and_grad` has it.

    Returns:
      A function of the arguments of `fun` that returns the gradient, or with `has_aux` the gradient and the auxiliary
      data.

    Example:
      >>> import frozen_optax as fo, jax.numpy as jnp
      >>> params = {"base": jnp.arange(3), "scale": jnp.array(2.0)}
      >>> grads = fo.grad(lambda p: p["scale"] * p["base"].sum(), trainable="scale", holes=True)(params)
      >>> grads["base"], float(grads["scale"])
      (MaskedNode(), 3.0)
    """
    both = value_and_grad(fun, frozen, argnums, has_aux, holomorphic, trainable=trainable, holes=holes)

    @functools.wraps(fun)
    def grad_of_trainable(*args: Any, **kwargs: Any) -> Any:
        value, grads = both(*args, **kwargs)
        return (grads, value[1]) if has_aux else grads

    return grad_of_trainable


def value_and_grad_from_state(
    fun: Callable[..., Any], frozen: Selection = None, *, trainable: Selection = None, holes: bool = False
) -> Callable[..., tuple[Any, Any]]:
    """`optax.value_and_grad_from_state` for a line search inside `with_frozen`.

    A line search that has stored the value and the gradient at the point it accepted saves computing them again.
    Optax's own function raises there, as the stored gradient has holes and a computed one has none.

    Args:
      fun: a function of the parameters and other arguments that returns a scalar.
      frozen: what is frozen, as `freeze` takes it.
      trainable: what is not frozen, instead.
      holes: as `value_and_grad` has it.

    Returns:
      A function `(params, *args, state, **kwargs)` that returns value and gradient: from `state` if it holds a finite
      value, computed otherwise.

    Raises:
      TypeError, ValueError: as `freeze`. When called: `state` holds no value and gradient of the trainable leaves.

    Example:
      >>> import frozen_optax as fo, jax.numpy as jnp, optax
      >>> loss = lambda p: jnp.sum((p["base"] * p["scale"] - 1.0) ** 2)
      >>> tx = fo.with_frozen(optax.lbfgs(), "base")
      >>> params = {"base": jnp.array([1.0, 2.0]), "scale": jnp.zeros(2)}
      >>> state = tx.init(params)
      >>> for _ in range(5):
      ...     value, grads = fo.value_and_grad_from_state(loss, "base")(params, state=state)
      ...     updates, state = tx.update(grads, state, params, value=value, grad=grads, value_fn=loss)
      ...     params = fo.apply_updates(params, updates)
      >>> bool(loss(params) < 1e-3)
      True
    """
    selector = frozen_selector(frozen, trainable)
    computed = value_and_grad(fun, selector, holes=True)

    @functools.wraps(fun)
    def from_state(params: Any, *args: Any, state: Any, **kwargs: Any) -> tuple[Any, Any]:
        resolution = selector._resolve(params)
        value, grads = (optax.tree_utils.tree_get(state, name) for name in ("value", "grad"))
        stored = jax.tree.leaves(grads)
        if value is None or grads is None or len(stored) != resolution.holed.num_leaves:
            raise ValueError(
                f"the state holds no value, or no gradient of the {resolution.holed.num_leaves} trainable leaves. Use "
                "a line search that stores them (store_grad=True) inside with_frozen, with the same leaves frozen."
            )

        def compute() -> tuple[Any, list[Any]]:
            value, grads = computed(params, *args, **kwargs)
            return value, jax.tree.leaves(grads)

        value, trained = jax.lax.cond(jnp.isfinite(value), lambda: (value, stored), compute)
        return value, _gradient(resolution, jax.tree.leaves(params), trained, holes)

    return from_state
