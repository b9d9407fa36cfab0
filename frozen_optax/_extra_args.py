"""The extra arguments of an optimizer's `update`, as one over the trainable part needs them.

A tree over the parameters is cut to the trainable part. A function of the parameters is called with
the whole tree, and what it returns is cut. All else is handed on.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from frozen_optax import _bits
from frozen_optax._parts import trained_shapes
from frozen_optax._resolution import Resolution
from frozen_optax._trees import is_hole, is_number
from frozen_optax._typing import Array, Leaf, PyTree


def with_extra_args(optimizer: Any) -> optax.GradientTransformationExtraArgs:
    """`optax.with_extra_args_support`, by what `update` takes and not by class.

    `optax.MultiSteps` takes extra arguments, too, and is of no such class.
    """
    has_both = all(callable(getattr(optimizer, name, None)) for name in ("init", "update"))
    if not has_both:
        raise TypeError(
            f"with_frozen takes an optimizer and what is frozen, found {optimizer!r} for the "
            "optimizer: expected an optax.GradientTransformation, such as optax.adam(1e-3)."
        )
    parameters = inspect.signature(optimizer.update).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return optax.GradientTransformationExtraArgs(optimizer.init, optimizer.update)
    return optax.with_extra_args_support(optimizer)


def _pieces(resolution: Resolution, tree: PyTree) -> list[PyTree] | None:
    """What stands in `tree` at each parameter's place; None if it has not their structure.

    It may go deeper. Parameters that are a single leaf are a prefix of anything, which says
    nothing; what has the shape of one that trains in part is taken for such a leaf.
    """
    if jax.tree_util.treedef_is_leaf(resolution.treedef):
        shapes = [part.shape for part in resolution.parts.values()]
        return [tree] if is_number(tree) and jnp.shape(tree) in shapes else None
    try:
        return resolution.up_to(tree, "")
    except ValueError:
        return None


def _is_absent(piece: PyTree) -> bool:
    return piece is None or is_hole(piece)


def _is_tangent(resolution: Resolution, params: list[Leaf], tree: PyTree) -> bool:
    """Whether `tree` is like the parameters, leaf for leaf.

    Batch axes may stand in front, and holes for what is frozen.
    """
    pieces = None if is_hole(tree) else _pieces(resolution, tree)
    if pieces is None:
        return False
    if not jax.tree_util.all_leaves(piece for piece in pieces if not _is_absent(piece)):
        return False
    for param, piece, frozen in zip(params, pieces, resolution.selected, strict=True):
        if _is_absent(piece):
            if not frozen:
                return False
            continue
        if not (is_number(param) and is_number(piece)):
            if piece is not param:
                return False
            continue
        shape, expected = jnp.shape(piece), jnp.shape(param)
        batch_axes = len(shape) - len(expected)
        if batch_axes < 0 or shape[batch_axes:] != expected:
            return False
    return True


def _zero_tangent(leaf: Leaf, is_number: bool) -> Array | None:
    if not is_number:
        return None
    if _bits.is_differentiable(leaf):
        return jnp.zeros_like(leaf)
    return np.zeros(jnp.shape(leaf), jax.dtypes.float0)


class _OnTrainable:
    """A function of the whole tree as a function of the trainable part, its results cut back to it.

    Its first argument that is a trainable part is made whole with the frozen parameters. Further
    ones are directions, and get zeros. An extra argument that was cut and is handed on is what it
    was before.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        resolution: Resolution,
        params: list[Leaf] | None,
        cut: list[tuple[PyTree, PyTree]],
    ):
        # Optimizers read the signature to see which of the extra arguments are its own.
        self.__wrapped__ = function
        self._resolution, self._params, self._cut = resolution, params, cut

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__wrapped__, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        fillings = iter([self._params])
        whole_args = [self._whole(arg, fillings) for arg in args]
        whole_kwargs = {name: self._whole(arg, fillings) for name, arg in kwargs.items()}
        result = self.__wrapped__(*whole_args, **whole_kwargs)
        return jax.tree.map(self._back, result, is_leaf=self._is_tangent)

    def _whole(self, tree: PyTree, fillings: Iterator[list[Leaf] | None]) -> PyTree:
        """The whole tree, where an argument is a trainable part.

        `fillings` has the frozen parameters, for the first such argument.
        """
        for part, original in self._cut:
            if tree is part:
                return original
        if not self._is_trainable_part(tree):
            return tree
        if self._params is None:
            raise ValueError(
                f"{getattr(self, '__name__', self.__wrapped__)!r} takes the whole tree and the "
                "frozen values are not known. Pass the parameters: "
                "update(updates, state, params, ...)."
            )
        zeros = map(_zero_tangent, self._params, self._resolution.numbers)
        return self._resolution.fill(next(fillings, None) or zeros, jax.tree.leaves(tree))

    def _is_trainable_part(self, tree: PyTree) -> bool:
        """Whether `tree` is what is trained. A single leaf that is no part of one never is."""
        if jax.tree.structure(tree) != self._resolution.holed:
            return False
        pairs = zip(jax.tree.leaves(tree), trained_shapes(self._resolution), strict=True)
        return all(shape is None or jnp.shape(leaf) == shape for leaf, shape in pairs)

    def _is_tangent(self, node: PyTree) -> bool:
        return self._params is not None and _is_tangent(self._resolution, self._params, node)

    def _back(self, node: PyTree) -> PyTree:
        """The trainable part, where a result is over the whole tree."""
        if not self._is_tangent(node):
            return node
        return self._resolution.cut(self._resolution.up_to(node, "the result"))


def cut_extra_args(
    resolution: Resolution, params: list[Leaf] | None, extra_args: dict[str, Any]
) -> dict[str, Any]:
    """The extra arguments for the trainable part; without `params` no function can be called."""
    if not (any(resolution.selected) or resolution.parts):
        return extra_args
    found = dict(extra_args)
    cut: list[tuple[PyTree, PyTree]] = []
    functions: dict[str, Callable[..., Any]] = {}
    for name, arg in extra_args.items():
        pieces = _pieces(resolution, arg)
        if pieces is not None:
            found[name] = resolution.cut(pieces)
            cut.append((found[name], arg))
        elif callable(arg):
            functions[name] = arg
    for name, function in functions.items():
        found[name] = _OnTrainable(function, resolution, params, cut)
    return found
