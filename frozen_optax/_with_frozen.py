"""A whole optimizer over the trainable part: its state, its norms and its extra arguments.

The wrapped optimizer never sees a frozen leaf, so nothing it does can reach one, and nothing in a
frozen gradient can reach it. It sees a hole for each frozen leaf, as under `optax.masked`, so masks
over the whole tree still fit. What is stored between steps is the optimizer's own state with one
hole for a wholly frozen subtree: state leaves are the same either way, and nodes cost time at every
call of a compiled function.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax

from frozen_optax import _bits
from frozen_optax._elements import Elements, elements_of, lay
from frozen_optax._extra_args import cut_extra_args, with_extra_args
from frozen_optax._freeze import is_placeholder, resolve_without_params
from frozen_optax._parts import held
from frozen_optax._resolution import Resolution
from frozen_optax._selection import frozen_selector
from frozen_optax._selectors import Selector
from frozen_optax._state_layout import StateLayout, forms, tells
from frozen_optax._trees import describe, is_hole, up_to
from frozen_optax._typing import Frozen, Leaf, PyTree


def _each(function: Callable[..., PyTree], params: PyTree, *rest: PyTree) -> PyTree:
    """`function` over a tree of parameters, or over both trees of `optax.lookahead`."""
    if isinstance(params, optax.LookaheadParams):
        return optax.LookaheadParams(*map(function, params, *rest))
    return function(params, *rest)


def trees_of(params: PyTree) -> tuple[PyTree, ...]:
    """The trees of parameters: both of `optax.lookahead`, the one that gradients are of first."""
    return tuple(params) if isinstance(params, optax.LookaheadParams) else (params,)


def _one(params: PyTree) -> PyTree:
    """The tree that gradients are of."""
    return trees_of(params)[0]


def _trainable(resolution: Resolution, params: PyTree) -> PyTree:
    """The trainable part as the optimizer sees it, with a hole for each frozen leaf."""
    cut = lambda tree: resolution.cut(resolution.up_to(tree, "the parameters"))
    return _each(cut, params)


def _whole(resolution: Resolution, like: PyTree, trained: PyTree) -> PyTree:
    """The updates of all parameters, from those that the optimizer gives the trainable part."""
    trained = up_to(resolution.holed, trained, "the optimizer's updates", "those it was given")
    frozen = map(_bits.known_zero, resolution.up_to(like, "the parameters"))
    return resolution.fill(frozen, trained)


def _refuse_untrainable(resolution: Resolution, leaves: list[Leaf], allow_int: bool) -> None:
    """Raise for a trainable leaf that is no number.

    Or, unless that is allowed, for one that cannot be moved a little.
    """
    resolution = resolution.of_leaves
    _bits.refuse_untrainable(resolution, leaves)
    for path, leaf in zip(resolution.complement.chosen, resolution.rest(leaves), strict=True):
        if _bits.is_key(leaf):
            raise TypeError(
                f"the trainable leaf {path!r} is {describe(leaf)}, a random key. Freeze it."
            )
        if not (allow_int or _bits.is_differentiable(leaf)):
            raise TypeError(
                f"the trainable leaf {path!r} is {describe(leaf)}, neither float nor complex: "
                "weight decay and steps of less than one would truncate it. Freeze it, or say that "
                "it may be trained: with_frozen(..., allow_int=True)."
            )


def _refuse_missing(resolution: Resolution, gradients: list[Leaf], allow_zero: bool) -> None:
    """Raise where a trainable leaf has no gradient.

    Or, unless that is allowed, where it has the one that `fo.grad` gives a frozen leaf.
    """
    trainable = resolution.of_leaves.rest(gradients)
    for path, gradient in zip(resolution.complement.chosen, trainable, strict=True):
        is_float0 = getattr(gradient, "dtype", None) == jax.dtypes.float0
        if gradient is None or is_hole(gradient) or is_float0:
            raise ValueError(
                f"the trainable leaf {path!r} has no gradient, found {describe(gradient)}. "
                "Differentiate with respect to it, or freeze it."
            )
        if not allow_zero and _bits.is_made_zero(gradient):
            raise ValueError(
                f"the trainable leaf {path!r} has the gradient of a frozen one, known to be zero: "
                "the gradient was told that it is frozen and the optimizer was not, which would go "
                "on to decay it. Say it once, fo.value_and_grad(loss, tx), or allow it: "
                "with_frozen(..., allow_zero=True)."
            )


def _explain_labels(error: ValueError) -> None:
    """Raise for `optax.partition` that was given labels of frozen leaves, and no group for them."""
    if "no corresponding transformation" in str(error):
        raise ValueError(
            f"{str(error).strip()} Inside with_frozen no label freezes: the groups share the "
            "trainable leaves. Cut the labels as the parameters are cut: "
            "optax.partition(groups, fo.partition(labels, frozen)[0]), or give a function that "
            "labels the leaves that it is called with."
        ) from error


def _refuse_trained(state: PyTree) -> None:
    """Raise for a state that holds something where nothing is trained."""
    if jax.tree.leaves(state):
        raise ValueError(
            "all leaves are frozen by now, and the state is not that of their `init`: it holds "
            f"{describe(jax.tree.leaves(state)[0])} of leaves that were trained. Make a new one: "
            "tx.init(params)."
        )


class FrozenOptimizer(optax.GradientTransformationExtraArgs):
    """What `with_frozen` returns: a gradient transformation that remembers what it holds still.

    Attributes:
      frozen: the `Selector` of the frozen leaves. A copy that was put together from `init` and
        `update` has none.
      elements: what is frozen within leaves, None if nothing is.
      inner: the optimizer that it wraps.
    """

    frozen: Selector
    elements: Elements | None = None
    inner: optax.GradientTransformation


def with_frozen(
    optimizer: optax.GradientTransformation,
    frozen: Frozen = None,
    *,
    trainable: Frozen = None,
    elements: Any = None,
    allow_int: bool = False,
    allow_zero: bool = False,
) -> FrozenOptimizer:
    """`optimizer` over the trainable part: the frozen part is neither moved, read, nor paid for.

    Whatever `optimizer` is (a chain with weight decay, clipping by global norm, noise, a line
    search, a wrapper):

    - frozen leaves get an update that is known to be zero while tracing.
      `frozen_optax.apply_updates` does nothing for it, so they keep every bit, of any dtype. With
      `optax.apply_updates` they keep what `p + (-0.0)` keeps.
    - trained leaves take the trajectory that `optimizer` gives when it is handed them alone. Frozen
      gradients may be anything: NaN, `float0`, `None` for a leaf, a hole for a leaf or a subtree.
    - the state is the optimizer's own state over the trainable part, one hole (`optax.MaskedNode`)
      standing for a wholly frozen subtree, so `optax.tree_utils.tree_get` and the like find in it
      what they always do. With everything frozen there is nothing to run: the state is an
      `optax.EmptyState`, and `optax.tree_map_params` does not fit it.

    A leaf that is no array (the activation function in an Equinox module, and there a Python number
    as well, the rate of a Dropout) is frozen whatever is said, and its update is None, as
    `eqx.apply_updates` has it.

    Elements within a leaf are frozen by `elements`. To the optimizer such a leaf is what trains of
    it, and nothing else: whole rows and blocks are a smaller array of the same rank, scattered
    elements a vector. So frozen elements have no state, enter no norm, and no optimizer can move
    them; one that couples elements (Adafactor, Muon, LAMB) couples those of the smaller array. Its
    update has the shape of the leaf, and in frozen elements the number that adds nothing.

    For `optax.lookahead` the parameters are a pair of trees; what is frozen is said of one and
    holds for both.

    It promises this as the outermost transform. A wrapper put around it sees the frozen leaves
    again; `docs/wrappers.md` tells wrapper by wrapper what holds then.

    What is frozen is said here once: everywhere an argument is called `frozen`, what this returns
    will do, as in `fo.jit(frozen=tx)`, `fo.value_and_grad(loss, tx)`, `fo.assert_frozen(before,
    after, tx)`.

    Args:
      optimizer: any gradient transformation.
      frozen: the leaves that are frozen: a glob on their paths (`"encoder"`), a compiled regex, a
        `Selector`, a list of these, a predicate `(path, leaf) -> bool`, a bool, a pytree of bools,
        or the optimizer that `with_frozen` returned.
      trainable: the leaves that are not, instead of `frozen`: exactly one of the two is given, or
        with `elements` none, and then nothing is frozen as a whole.
      elements: a mapping from selections, as `frozen` takes them, to what is frozen within their
        leaves: a boolean array over the leading axes (True is frozen), of the length of the first
        axis for rows or of the leaf's shape; a slice of the first axis, or a list of indices of it;
        or a function of the leaf's `jax.ShapeDtypeStruct` that returns one of these. It is a part
        of the program and cannot be traced. Elements that train and form no block are gathered and
        scattered, by four bytes of indices for each of their rows (for each element and axis, where
        they are no rows) in the compiled program.
      allow_int: whether trainable leaves may be other than float and complex: integers, which an
        optimizer truncates.
      allow_zero: whether a trainable leaf may have the gradient that `fo.grad` gives a frozen one.

    Returns:
      A transformation whose `update(updates, state, params=None, **extra_args)` returns updates in
      the structure of `params`, and whose `frozen` is the `Selector` of the frozen leaves. Among
      the extra arguments, a callable (`value_fn`, `obj_fn`, `grad_fn`) is called with the whole
      tree, frozen values in place (of several arguments in the parameters' structure the first; the
      others are directions and have zeros there), and what it returns in that structure is cut back
      to the trainable part; a pytree that the parameters' structure is a prefix of (`grad`) is cut;
      arrays are passed as they are.

    Raises:
      TypeError: not exactly one of `frozen` and `trainable` is given, or it is no way to select
        leaves; `elements` is no mapping to masks, slices, indices or functions, or is traced. At
        `init`: a frozen leaf is a Python scalar outside of such modules, or a 64-bit host array
        without x64, which no compiled function keeps; a trainable leaf is neither float nor
        complex.
      ValueError: at `init`, or at the first update: a pattern selects nothing, a mask does not fit,
        everything is frozen and nobody said so (`"**"`, `True`); `optax.partition` has labels of
        frozen leaves and no group for them; of `elements`, a mask has another shape, an index is
        out of range, all of a leaf or nothing of it is frozen, a leaf is named twice, or frozen as
        a whole as well. At `update`: the tree or the state is not that of
        `init`; a trainable leaf has no gradient, or that of a frozen one; the parameters are
        missing where they are needed. The message names the path.

    Example:
      >>> import frozen_optax as fo, jax, jax.numpy as jnp, optax
      >>> params = {"encoder": {"w": jnp.array([-0.0, 1.0])}, "head": {"w": jnp.ones(2)}}
      >>> tx = fo.with_frozen(optax.adamw(0.1), "encoder")
      >>> state = tx.init(params)
      >>> optax.tree_utils.tree_get(state, "mu")
      {'encoder': MaskedNode(), 'head': {'w': Array([0., 0.], dtype=float32)}}
      >>> loss = lambda p: jnp.sum(p["encoder"]["w"] * p["head"]["w"])
      >>> updates, state = tx.update(fo.grad(loss, tx)(params), state, params)
      >>> fo.apply_updates(params, updates)["encoder"]["w"].tolist()
      [-0.0, 1.0]
    """
    inner = with_extra_args(optimizer)
    of_elements = elements_of(frozen) if elements is None else Elements.of(elements)
    if elements is not None and elements_of(frozen) is not None:
        raise TypeError(
            f"the optimizer given for frozen= has elements of its own, {elements_of(frozen)!r}. "
            "Leave elements= out, or give tx.frozen."
        )
    if elements is not None and frozen is None and trainable is None:
        frozen = False
    selector = frozen_selector(frozen, trainable, in_part=True)
    layout = StateLayout()

    def resolve_frozen(params: PyTree) -> Resolution:
        return lay(selector, of_elements, params, to_train=True)

    def init_fn(params: PyTree) -> PyTree:
        if is_placeholder(params):  # optax asks where parameters go, and there are none to freeze
            return inner.init(params)
        resolution = resolve_frozen(_one(params))
        leaves = jax.tree.leaves(_one(params))
        _bits.refuse_unkeepable(held(resolution), leaves)
        _refuse_untrainable(resolution, leaves, allow_int)
        if resolution.nothing_left:  # not every optimizer takes an empty tree
            return optax.EmptyState()
        try:
            made = inner.init(_trainable(resolution, params))
        except ValueError as error:
            _explain_labels(error)
            raise
        return layout.store_first(resolution, made)

    def resolve_updates(updates: PyTree, state: PyTree) -> Resolution:
        """What is frozen, where the parameters are not passed: a state may tell what `init` saw."""

        def is_settled(resolution: Resolution) -> bool:
            fresh = jax.eval_shape(lambda: inner.init(_trainable(resolution, updates)))
            return tells(resolution, state, fresh)

        resolution = resolve_without_params(selector, updates, is_settled)
        if of_elements is None:
            return resolution
        if of_elements.reads_more:
            raise ValueError(
                f"elements={of_elements!r} reads more of the parameters than their paths and "
                "shapes, which gradients need not have. Pass the parameters: update(updates, "
                "state, params)."
            )
        return of_elements.lay(resolution, updates)

    def update_fn(
        updates: PyTree, state: PyTree, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, PyTree]:
        if params is None:
            resolution = resolve_updates(updates, state)
        else:
            resolution = resolve_frozen(_one(params))
        gradients = resolution.up_to(updates, "updates")
        _refuse_missing(resolution, gradients, allow_zero)
        # Updates have the shapes and dtypes of the parameters, as far as these are known.
        like = updates if params is None else params
        if resolution.nothing_left:
            _refuse_trained(state)
            return jax.tree.map(_bits.known_zero, like), state

        trainable_updates = resolution.cut(gradients)
        trainable_params: PyTree = None
        leaves = None
        if params is not None:
            trainable_params = _trainable(resolution, params)
            leaves = jax.tree.leaves(_one(params))
        extra_args = cut_extra_args(resolution, leaves, extra_args)

        def begin() -> PyTree:
            return inner.init(trainable_updates if params is None else trainable_params)

        def step(state: PyTree) -> tuple[PyTree, PyTree]:
            return inner.update(trainable_updates, state, trainable_params, **extra_args)

        # A stored state has fewer holes than the optimizer's own. Where these are not remembered,
        # the optimizer is asked, by a trace of its own `init` and `update`.
        state_forms = lambda: forms(begin, lambda state: step(state)[1])
        made = layout.load(resolution, state, state_forms)
        trained, next_state = step(made)
        whole = _each(functools.partial(_whole, resolution), like, trained)
        return whole, layout.store(resolution, next_state, (state, made), state_forms)

    transformation = FrozenOptimizer(init_fn, update_fn)
    transformation.frozen = selector
    transformation.elements = of_elements
    transformation.inner = optimizer
    return transformation
