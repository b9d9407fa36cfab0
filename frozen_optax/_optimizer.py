"""A whole optimizer over the trainable part: its state, its norms and its extra arguments.

The wrapped optimizer never sees a frozen leaf, so nothing it does can reach one, and nothing in a frozen gradient can
reach it. It sees a hole for each frozen leaf, as under `optax.masked`, so masks over the whole tree still fit. What is
stored between steps is the optimizer's own state with one hole for a wholly frozen subtree: state leaves are the same
either way, and nodes cost time at every call of a compiled function.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from frozen_optax import _bits
from frozen_optax._selection import Selection, frozen_selector
from frozen_optax._transforms import is_placeholder, resolve_update
from frozen_optax._trees import Resolution, describe, is_hole, remember, require_same_structure, up_to


def _each(function: Callable[..., Any], params: Any, *rest: Any) -> Any:
    """`function` over a tree of parameters, or over both trees of `optax.lookahead`, whose gradients are of one."""
    if isinstance(params, optax.LookaheadParams):
        return optax.LookaheadParams(*map(function, params, *rest))
    return function(params, *rest)


def trees_of(params: Any) -> tuple[Any, ...]:
    """The trees of parameters: both of `optax.lookahead`, the one that gradients are of first."""
    return tuple(params) if isinstance(params, optax.LookaheadParams) else (params,)


def _one(params: Any) -> Any:
    return trees_of(params)[0]


def _pieces(resolution: Resolution, tree: Any) -> list[Any] | None:
    """What stands in `tree` at each parameter's place, if the parameters' structure is a prefix of it."""
    if jax.tree_util.treedef_is_leaf(resolution.treedef):  # a prefix of everything says nothing
        return None
    try:
        return resolution.up_to(tree, "")
    except ValueError:
        return None


def _is_tangent(resolution: Resolution, params: list[Any], tree: Any) -> bool:
    """Whether `tree` is like the parameters, leaf for leaf: batch axes may stand in front, holes for what is frozen."""

    def like(param: Any, piece: Any, frozen: bool) -> bool:
        if piece is None or is_hole(piece):
            return frozen
        shape, expected = jnp.shape(piece), jnp.shape(param)
        return len(shape) >= len(expected) and shape[len(shape) - len(expected) :] == expected

    pieces = None if is_hole(tree) else _pieces(resolution, tree)
    if pieces is None or not jax.tree_util.all_leaves(p for p in pieces if p is not None and not is_hole(p)):
        return False
    return all(map(like, params, pieces, resolution.selected))


def _zero_tangent(leaf: Any) -> Any:
    return jnp.zeros_like(leaf) if _bits.is_differentiable(leaf) else np.zeros(jnp.shape(leaf), jax.dtypes.float0)


class _OnTrainable:
    """A function of the whole tree as a function of the trainable part, whose results are cut back to it.

    Its first argument that is a trainable part is made whole with the frozen parameters. Further ones are directions,
    and get zeros. An extra argument that was cut and is handed on is what it was before.
    """

    def __init__(self, function: Any, resolution: Resolution, params: list[Any] | None, cut: list[tuple[Any, Any]]):
        self.__wrapped__ = function  # optimizers read the signature to see which arguments are its
        self._resolution, self._params, self._cut = resolution, params, cut

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__wrapped__, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        resolution, params = self._resolution, self._params
        fillings = iter([params])

        def whole(tree: Any) -> Any:
            for part, original in self._cut:
                if tree is part:
                    return original
            if jax.tree.structure(tree) != resolution.holed:
                return tree
            if params is None:
                raise ValueError(
                    f"{getattr(self, '__name__', self.__wrapped__)!r} takes the whole tree and the frozen values "
                    "are not known. Pass the parameters: update(updates, state, params, ...)."
                )
            return resolution.fill(next(fillings, None) or map(_zero_tangent, params), jax.tree.leaves(tree))

        result = self.__wrapped__(*map(whole, args), **{name: whole(value) for name, value in kwargs.items()})
        is_tangent = lambda node: params is not None and _is_tangent(resolution, params, node)
        back = lambda node: resolution.cut(resolution.up_to(node, "the result")) if is_tangent(node) else node
        return jax.tree.map(back, result, is_leaf=is_tangent)


def _cut_extra_args(resolution: Resolution, params: list[Any] | None, extra_args: dict[str, Any]) -> dict[str, Any]:
    """The extra arguments as an optimizer over the trainable part needs them."""
    if not any(resolution.selected):
        return extra_args
    pieces = {name: _pieces(resolution, value) for name, value in extra_args.items()}
    cut = {name: (resolution.cut(part), extra_args[name]) for name, part in pieces.items() if part is not None}
    functions = {name: value for name, value in extra_args.items() if name not in cut and callable(value)}
    return {
        **extra_args,
        **{name: part for name, (part, _) in cut.items()},
        **{name: _OnTrainable(each, resolution, params, list(cut.values())) for name, each in functions.items()},
    }


def with_extra_args(optimizer: Any) -> optax.GradientTransformationExtraArgs:
    """`optax.with_extra_args_support`, by what `update` takes and not by class: `optax.MultiSteps` takes them, too."""
    if not (callable(getattr(optimizer, "init", None)) and callable(getattr(optimizer, "update", None))):
        raise TypeError(
            f"with_frozen takes an optimizer and what is frozen, found {optimizer!r} for the optimizer: expected an "
            "optax.GradientTransformation, such as optax.adam(1e-3)."
        )
    parameters = inspect.signature(optimizer.update).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return optax.GradientTransformationExtraArgs(optimizer.init, optimizer.update)
    return optax.with_extra_args_support(optimizer)


def with_frozen(
    optimizer: optax.GradientTransformation, frozen: Selection = None, *, trainable: Selection = None
) -> optax.GradientTransformationExtraArgs:
    """`optimizer` over the trainable part of the parameters: the frozen part is neither moved, read, nor paid for.

    Whatever `optimizer` is (a chain with weight decay, clipping by global norm, noise, a line search, a wrapper):

    - frozen leaves get an update that is known to be zero while tracing. `frozen_optax.apply_updates` does nothing for
      it, so they keep every bit, of any dtype. With `optax.apply_updates` they keep what `p + (-0.0)` keeps.
    - trained leaves take the trajectory that `optimizer` gives when it is handed them alone. Frozen gradients may be
      anything: NaN, `float0`, `None` for a leaf, a hole for a leaf or a subtree.
    - the state is the optimizer's own state over the trainable part, one hole (`optax.MaskedNode`) standing for a
      wholly frozen subtree, so `optax.tree_utils.tree_get` and the like find in it what they always do. With everything
      frozen there is nothing to run: the state is an `optax.EmptyState`, and `optax.tree_map_params` does not fit it.

    For `optax.lookahead` the parameters are a pair of trees; what is frozen is said of one and holds for both.

    It promises this as the outermost transform. A wrapper put around it sees the frozen leaves again; the README tells
    wrapper by wrapper what holds then.

    Args:
      optimizer: any gradient transformation.
      frozen: what is frozen, as `freeze` takes it.
      trainable: what is not frozen, instead.

    Returns:
      A transformation whose `update(updates, state, params=None, **extra_args)` returns updates in the structure of
      `params`. Among the extra arguments, a callable (`value_fn`, `obj_fn`, `grad_fn`) is called with the whole tree,
      frozen values in place (of several arguments in the parameters' structure the first; the others are directions
      and have zeros there), and what it returns in that structure is cut back to the trainable part; a pytree that the
      parameters' structure is a prefix of (`grad`) is cut; arrays are passed as they are.

    Raises:
      TypeError: not exactly one of `frozen` and `trainable` is given, or it is no way to select leaves. At `init`: a
        frozen leaf is a Python scalar, or a 64-bit host array without x64, which no compiled function keeps.
      ValueError: at `init`, or at the first update: a pattern selects nothing, a mask does not fit. At `update`: the
        tree or the state is not that of `init`; a trainable leaf has no gradient; the parameters are missing where they
        are needed. The message names the path.

    Example:
      >>> import frozen_optax as fo, jax, jax.numpy as jnp, optax
      >>> params = {"encoder": {"w": jnp.array([-0.0, 1.0])}, "head": {"w": jnp.ones(2)}}
      >>> tx = fo.with_frozen(optax.adamw(0.1), "encoder")
      >>> state = tx.init(params)
      >>> optax.tree_utils.tree_get(state, "mu")
      {'encoder': MaskedNode(), 'head': {'w': Array([0., 0.], dtype=float32)}}
      >>> loss = lambda p: jnp.sum(p["encoder"]["w"] * p["head"]["w"])
      >>> updates, state = tx.update(jax.grad(loss)(params), state, params)
      >>> fo.apply_updates(params, updates)["encoder"]["w"].tolist()
      [-0.0, 1.0]
    """
    selector = frozen_selector(frozen, trainable)
    inner = with_extra_args(optimizer)
    structures: dict[Any, Any] = {}  # (the trainable part's, a stored state's) -> that state's as `inner` made it

    def store(resolution: Resolution, state: Any) -> Any:
        if resolution.is_whole:
            return state
        leaves, treedef = jax.tree.flatten(state)
        stored = resolution.prune(treedef)
        remember(structures, (resolution.holed, stored), treedef)
        return jax.tree.unflatten(stored, leaves)

    def load(resolution: Resolution, state: Any, trainable_part: Any) -> Any:
        if resolution.is_whole:
            return state
        leaves, stored = jax.tree.flatten(state)
        if (resolution.holed, stored) not in structures:  # made elsewhere: read from a checkpoint, say
            fresh = store(resolution, jax.eval_shape(inner.init, trainable_part))
            try:
                require_same_structure(state, fresh, "the optimizer state", "a fresh one for these parameters")
            except ValueError as error:
                raise ValueError(
                    f"{error} Was it made for another choice of frozen leaves, or for another tree? Make a new one: "
                    "tx.init(params)."
                ) from None
        return jax.tree.unflatten(structures[resolution.holed, stored], leaves)

    def cut(resolution: Resolution, tree: Any) -> Any:
        return resolution.cut(resolution.up_to(tree, "the parameters"))

    def init_fn(params: Any) -> Any:
        if is_placeholder(params):
            return inner.init(params)
        resolution = selector._resolve(_one(params))
        leaves = jax.tree.leaves(_one(params))
        _bits.refuse_inexact(resolution, leaves)
        _bits.refuse_untrainable(resolution, leaves)
        if resolution.nothing_left:  # not every optimizer takes an empty tree
            return optax.EmptyState()
        return store(resolution, inner.init(_each(lambda tree: cut(resolution, tree), params)))

    def update_fn(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        resolution = resolve_update(selector, updates, _one(params))
        gradients = resolution.up_to(updates, "updates")
        for path, gradient in zip(resolution.complement.chosen, resolution.rest(gradients), strict=True):
            if gradient is None or is_hole(gradient) or getattr(gradient, "dtype", None) == jax.dtypes.float0:
                raise ValueError(
                    f"the trainable leaf {path!r} has no gradient, found {describe(gradient)}. Differentiate with "
                    "respect to it, or freeze it."
                )
        like = updates if params is None else params
        if resolution.nothing_left:
            return jax.tree.map(_bits.known_zero, like), state
        leaves = None if params is None else jax.tree.leaves(_one(params))
        trainable_params = None if params is None else _each(lambda tree: cut(resolution, tree), params)
        trainable_updates = resolution.cut(gradients)
        new, inner_state = inner.update(
            trainable_updates,
            load(resolution, state, trainable_updates if params is None else trainable_params),
            trainable_params,
            **_cut_extra_args(resolution, leaves, extra_args),
        )

        def whole(like: Any, trained: Any) -> Any:
            trained = up_to(resolution.holed, trained, "the optimizer's updates", "those it was given")
            return resolution.fill(map(_bits.known_zero, resolution.up_to(like, "the parameters")), trained)

        return _each(whole, like, new), store(resolution, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
