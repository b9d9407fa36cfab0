"""Assigning the weights back: the classical way to hold weights that an optimizer has already moved."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from frozen_optax import _bits
from frozen_optax._selection import Selection, frozen_selector
from frozen_optax._trees import PyTree, describe, is_traced, refuse_live, require_alive


def _sharding(leaf: Any) -> Any:
    """Where a leaf was put on purpose; None where it may go anywhere, or is not known yet."""
    if isinstance(leaf, jax.Array) and not is_traced(leaf) and leaf.committed:
        return leaf.sharding
    return None


def _differs(leaf: Any, reference: Any) -> str | None:
    if not (_bits.is_array(leaf) and _bits.is_array(reference)) or isinstance(reference, jax.ShapeDtypeStruct):
        same = type(leaf) is type(reference)
        return None if same else f"found {describe(reference)}, expected {describe(leaf)}"
    if leaf.shape != reference.shape or leaf.dtype != reference.dtype:
        return f"found {describe(reference)}, expected {describe(leaf)}"
    here, there = _sharding(leaf), _sharding(reference)
    if here is not None and there is not None and not here.is_equivalent_to(there, np.ndim(leaf)):
        return f"found it on {there}, expected {here}"
    return None


def restore(params: PyTree, reference: PyTree, frozen: Selection = None, *, trainable: Selection = None) -> PyTree:
    """`params` with the frozen leaves of `reference`: the very same arrays, bit for bit.

    After each step it assigns the initial weights back, whatever the optimizer did to them: the way that works with a
    training loop that cannot be changed. It does not make the step cheaper: under jit the final addition for a frozen
    leaf disappears, while its gradient, its optimizer state and its part in every norm stay (with a stateless optimizer
    such as SGD, and no norms, the gradient goes too). `python -m benchmarks` prints the figures. `with_frozen`
    saves all of it.

    Call it inside the compiled step, with the reference an argument that is not donated. Called outside of it, the next
    step must not donate the parameters, as the frozen ones are the reference's own.

    Args:
      params: the parameters after a step.
      reference: a tree in the structure of `params` that holds the frozen leaves. The others may be holes.
      frozen: what is frozen, as `freeze` takes it.
      trainable: what is not frozen, instead.

    Returns:
      A tree in the structure of `params`.

    Raises:
      ValueError: the trees differ in structure, or a frozen leaf in shape, dtype or sharding, or that of the reference
        was donated; the message names the path. Both hold the same `nnx.Variable`. Selection errors as `freeze`.

    Example:
      >>> import frozen_optax as fo
      >>> fo.restore({"encoder": 1.5, "head": 2.5}, {"encoder": 1.0, "head": 2.0}, "encoder")
      {'encoder': 1.0, 'head': 2.5}
    """
    resolution = frozen_selector(frozen, trainable)._resolve(params)
    refuse_live(reference, params)
    leaves = jax.tree.leaves(params)
    references = resolution.up_to(reference, "the reference")
    for path, is_frozen, leaf, kept in zip(resolution.paths, resolution.selected, leaves, references, strict=True):
        if not is_frozen:
            continue
        require_alive(path, kept)
        if difference := _differs(leaf, kept):
            raise ValueError(f"the reference does not fit the parameters at {path!r}: {difference}.")
    columns = zip(resolution.selected, leaves, references, strict=True)
    return resolution.unflatten([kept if is_frozen else leaf for is_frozen, leaf, kept in columns])
