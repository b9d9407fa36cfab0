"""Assigning the weights back: the classical way to hold what an optimizer has already moved."""

from __future__ import annotations

import jax
import numpy as np

from frozen_optax import _bits
from frozen_optax._elements import resolve_in_part
from frozen_optax._trees import (
    describe,
    is_hole,
    is_number,
    is_python_number,
    is_traced,
    require_alive,
)
from frozen_optax._typing import Frozen, Leaf, PyTree, Where
from frozen_optax._variables import refuse_live
from frozen_optax._where import counterparts, named_leaves


def _sharding(leaf: Leaf) -> jax.sharding.Sharding | None:
    """Where a leaf was put on purpose; None where it may go anywhere, or is not known yet."""
    if isinstance(leaf, jax.Array) and not is_traced(leaf) and leaf.committed:
        return leaf.sharding
    return None


def _differs(leaf: Leaf, reference: Leaf, is_object: bool) -> str | None:
    """How a leaf of the reference differs from the one whose place it takes, if it cannot."""
    # A struct has a shape and a dtype, and no values.
    are_arrays = _bits.is_array(leaf) and _bits.is_array(reference)
    if are_arrays and not isinstance(reference, jax.ShapeDtypeStruct):
        fits = leaf.shape == reference.shape and leaf.dtype == reference.dtype
    else:
        # One object is as good as another.
        alike = is_python_number(reference) if is_python_number(leaf) else not is_number(reference)
        fits = (is_object and alike) or type(leaf) is type(reference)
    if not fits:
        is_shape = isinstance(reference, jax.ShapeDtypeStruct)
        of_shape = " that is a shape without values" if is_shape else ""
        return f"found {describe(reference)}{of_shape}, expected {describe(leaf)}"
    here, there = _sharding(leaf), _sharding(reference)
    if here is not None and there is not None and not here.is_equivalent_to(there, np.ndim(leaf)):
        return f"found it on {there}, expected {here}"
    return None


def restore(
    params: PyTree,
    reference: PyTree,
    frozen: Frozen = None,
    *,
    trainable: Frozen = None,
    where: Where | None = None,
) -> PyTree:
    """`params` with the frozen leaves of `reference`: the very same arrays, bit for bit.

    After each step it assigns the initial weights back, whatever the optimizer did to them: the way
    that works with a training loop that cannot be changed. It does not make the step cheaper: under
    jit the final addition for a frozen leaf disappears, while its gradient, its optimizer state and
    its part in every norm stay (with a stateless optimizer such as SGD, and no norms, the gradient
    goes too). `python -m benchmarks` prints the figures. `with_frozen` saves all of it.

    Call it inside the compiled step, with the reference an argument that is not donated. Called
    outside of it, the next step must not donate the parameters, as the frozen ones are the
    reference's own.

    Args:
      params: the parameters after a step.
      reference: a tree in the structure of `params` that holds the frozen leaves. The others may be
        holes.
      frozen: the leaves that are frozen: a glob on their paths (`"encoder"`), a compiled regex, a
        `Selector`, a list of these, a predicate `(path, leaf) -> bool`, a bool, a pytree of bools,
        or the optimizer that `with_frozen` returned.
      trainable: the leaves that are not, instead of `frozen`: exactly one of the two is given.
      where: a function that returns the parameters in a larger state (`lambda state:
        state.params`), where `params` and `reference` are such states. It may return a tuple of
        several parts; paths are relative to each. All else is that of `params`.

    Returns:
      A tree in the structure of `params`. Of a leaf in which an optimizer given for `frozen`
      freezes elements these are the reference's, and the others those of `params`.

    Raises:
      TypeError: not exactly one of `frozen` and `trainable` is given, or it is no way to select
        leaves.
      ValueError: the trees differ in structure, or a frozen leaf in shape, dtype or sharding, or
        that of the reference was donated; the message names the path. Both hold the same
        `nnx.Variable`. A pattern selects nothing, or a mask does not fit.

    Example:
      >>> import frozen_optax as fo
      >>> fo.restore({"encoder": 1.5, "head": 2.5}, {"encoder": 1.0, "head": 2.0}, "encoder")
      {'encoder': 1.0, 'head': 2.5}
    """
    resolution = resolve_in_part(frozen, trainable, params, where=where)
    refuse_live(reference, params)
    leaves = jax.tree.leaves(params)
    references = counterparts(where, params, reference, "the reference")
    for (index, path), kept in zip(named_leaves(where, params), references, strict=True):
        part = resolution.parts.get(index)
        if not (resolution.selected[index] or part):
            continue
        if not resolution.numbers[index] and (kept is None or is_hole(kept)):
            continue  # a reference of arrays alone
        require_alive(path, kept)
        if difference := _differs(leaves[index], kept, not resolution.numbers[index]):
            raise ValueError(
                f"the reference does not fit the parameters at {path!r}: {difference}."
            )
        leaves[index] = kept if part is None else part.choose(kept, leaves[index])
    return resolution.unflatten(leaves)
