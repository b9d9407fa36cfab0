"""What is frozen and what that saves, found out without the arrays.

Nothing is allocated. A report reads shapes, dtypes and shardings alone, and `jax.eval_shape` tells what an optimizer's
state would be, so it can be had for a model that fits on no machine at hand.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from frozen_optax import _bits
from frozen_optax._optimizer import with_frozen
from frozen_optax._partition import combine, partition
from frozen_optax._selection import Selection, Selector, by_mask, frozen_selector
from frozen_optax._summary import Memory, Row, Summary
from frozen_optax._trees import PyTree, flatten_with_holes, is_hole, keystr, spec


def _bytes(spec: Any) -> int:
    """What an array takes, elements of less than a byte packed; nothing for what is no array."""
    if not _bits.is_array(spec):
        return 0
    return -(-math.prod(spec.shape) * _bits.width(spec.dtype) // 8)


class _Leaf(NamedTuple):
    """A leaf as a row needs it; `keys` ends with the leaf's index, so that no two are the same."""

    keys: tuple[Any, ...]
    frozen: bool
    shape: tuple[int, ...] | None
    dtype: str
    parameters: int
    bytes: int

    @classmethod
    def of(cls, keys: tuple[Any, ...], frozen: bool, spec: Any) -> _Leaf:
        if not _bits.is_array(spec):
            return cls(keys, frozen, None, type(spec).__name__, 0, 0)
        return cls(keys, frozen, tuple(spec.shape), str(spec.dtype), math.prod(spec.shape), _bytes(spec))


def _whole(leaf: Any) -> Any:
    """What has the shape and dtype of a leaf; `jax.eval_shape` takes 64 bits without x64 from numpy's arrays only."""
    return leaf if isinstance(leaf, (np.ndarray, np.generic)) else spec(leaf)


def _shard(path: str, leaf: Any, whole: Any) -> Any:
    """The shape and dtype of what one device holds of a leaf: all of it, if it has no sharding."""
    if (sharding := getattr(leaf, "sharding", None)) is None:
        return whole
    try:
        return jax.ShapeDtypeStruct(sharding.shard_shape(whole.shape), whole.dtype)
    except ValueError as error:
        raise ValueError(f"the leaf at {path!r} cannot be sharded as it says: {error}") from error


def _subtrees(leaves: list[_Leaf], depth: int) -> Iterator[tuple[str, list[_Leaf]]]:
    """The largest subtrees that are wholly frozen or wholly trained, once the tree has branched `depth` times."""
    first, last = leaves[0].keys, leaves[-1].keys
    level = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))
    if len(leaves) == 1:
        yield keystr(first[:-1]), leaves
    elif depth <= 0 and len({leaf.frozen for leaf in leaves}) == 1:
        yield keystr(first[:level]), leaves
    else:
        for _, below in itertools.groupby(leaves, key=lambda leaf: leaf.keys[level]):
            yield from _subtrees(list(below), depth - 1)


def _ranges(numbers: list[str]) -> str:
    """Numbers as a shell would write them: `{0..30,32}`; one number as it is."""
    if len(numbers) == 1:
        return numbers[0]
    ordered = enumerate(sorted(numbers, key=int))
    runs = [[n for _, n in run] for _, run in itertools.groupby(ordered, key=lambda pair: int(pair[1]) - pair[0])]
    texts = [f"{run[0]}..{run[-1]}" if len(run) > 2 else ",".join(run) for run in runs]
    if len(texts) > 6:
        texts[3:-1] = ["..."]
    return "{" + ",".join(texts) + "}"


def _fold(alike: list[tuple[str, list[_Leaf]]]) -> Iterator[tuple[str, list[tuple[str, list[_Leaf]]]]]:
    """Paths that differ in numbers only, as few patterns as say exactly which they are.

    The last numbers are folded first: `a/0/b/{0..3}` and `a/1/b/{0..3}` are then equal but for one number again.
    """
    words = re.split("[0-9]+", alike[0][0])
    folded: dict[tuple[str, ...], list[Any]] = {}
    for subtree in alike:
        folded.setdefault(tuple(re.findall("[0-9]+", subtree[0])), []).append(subtree)
    for i in reversed(range(len(words) - 1)):
        same: dict[Any, list[Any]] = {}
        for numbers, subtrees in folded.items():
            same.setdefault((numbers[:i], numbers[i + 1 :]), []).append((numbers[i], subtrees))
        folded = {
            (*before, _ranges([number for number, _ in found]), *after): [s for _, subtrees in found for s in subtrees]
            for (before, after), found in same.items()
        }
    for numbers, subtrees in folded.items():
        yield "".join(word + number for word, number in zip(words, [*numbers, ""], strict=True)), subtrees


def _rows(leaves: list[_Leaf], depth: int) -> tuple[Row, ...]:
    alike: dict[Any, list[tuple[str, list[_Leaf]]]] = {}
    for path, below in _subtrees(leaves, depth) if leaves else ():
        inside = tuple((keystr(leaf.keys[:-1])[len(path) :], leaf.shape, leaf.dtype) for leaf in below)
        alike.setdefault((re.sub("[0-9]+", "0", path), below[0].frozen, inside), []).append((path, below))
    rows = []
    for path, subtrees in itertools.chain.from_iterable(map(_fold, alike.values())):
        inside = [leaf for _, below in subtrees for leaf in below]
        shapes = {leaf.shape for leaf in inside}
        row = Row(
            path=path,
            paths=tuple(path for path, _ in subtrees),
            frozen=inside[0].frozen,
            leaves=len(inside),
            shape=inside[0].shape if len(shapes) == 1 else None,
            dtypes=tuple(dict.fromkeys(leaf.dtype for leaf in inside)),
            parameters=sum(leaf.parameters for leaf in inside),
            bytes=sum(leaf.bytes for leaf in inside),
        )
        rows.append((min(leaf.keys[-1] for leaf in inside), row))
    return tuple(row for _, row in sorted(rows, key=lambda pair: pair[0]))


def _memory(
    params: PyTree, specs: list[Any], selector: Selector, optimizer: optax.GradientTransformation | None
) -> Memory:
    """What `params` take to train, their leaves having the shapes of `specs`."""
    resolution = selector._resolve(params)
    trained = resolution.rest(specs)
    state = None
    if optimizer is not None:
        _bits.refuse_untrainable(resolution, specs)
        init = with_frozen(optimizer, selector).init
        rest = partition(params, selector)[1]  # as it is: what is frozen need not be an array
        made = jax.eval_shape(lambda part: init(combine(part, rest)), jax.tree.unflatten(resolution.holed, trained))
        state = sum(map(_bytes, jax.tree.leaves(made)))
    return Memory(
        parameters=sum(map(_bytes, specs)),
        gradients=sum(_bytes(s) for s in trained if _bits.is_array(s) and jnp.issubdtype(s.dtype, jnp.inexact)),
        optimizer_state=state,
    )


def _compared(
    params: PyTree, specs: list[Any], selector: Selector, optimizer: optax.GradientTransformation | None
) -> tuple[Memory, Memory, str]:
    """The memory with freezing and without, and why the latter cannot be told."""
    memory, nothing = _memory(params, specs, selector, optimizer), by_mask(False)
    try:
        return memory, _memory(params, specs, nothing, optimizer), ""
    except Exception as error:  # whatever an optimizer raises for leaves that it was not made for
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        note = f"n/a: without freezing the optimizer cannot be initialised: {reason}"
        return memory, _memory(params, specs, nothing, None), note


def summary(
    params: PyTree,
    frozen: Selection = None,
    optimizer: optax.GradientTransformation | None = None,
    *,
    trainable: Selection = None,
    depth: int = 1,
) -> Summary:
    """What is frozen, what is trained, and what it takes: a table, and its numbers as fields.

    A row is a subtree that is wholly frozen or wholly trained, the largest there is. Subtrees that are alike and whose
    paths differ in numbers only share a row: `layers/{0..31}/mlp`. Of very many rows the table shows the first 30 that
    are frozen and the first 30 that are trained; `Summary.rows` has all.

    Every element of every array counts as a parameter, whatever its dtype: quantised weights are integers. A PRNG key
    counts as one, a leaf that is no array as none. Bytes are those of the data: int4 and its like are packed, as on
    accelerators (a CPU takes a byte for each), and a PRNG key takes its key data.

    The memory per device is an estimate, by these rules:

    - of each parameter a device holds one shard, `sharding.shard_shape(shape)`; all of it, if there is no sharding;
    - of the gradients it holds the same shards, in the parameters' dtypes, for those that are trained and float;
    - of the optimizer state it holds what `optimizer.init` returns for these shards: moments are sharded as their
      parameters are, counts and the like are there on every device.

    Activations and temporary arrays come on top. Where layers lie on different devices the estimate is too high: each
    device is taken to hold a shard of every leaf.

    Args:
      params: arrays of jax or numpy, or `jax.ShapeDtypeStruct`s; they may have shardings, on an `AbstractMesh` too.
      frozen: what is frozen, as `freeze` takes it.
      optimizer: the optimizer that you would wrap, bare: `optax.adamw(1e-3)`. What `with_frozen` already wraps keeps
        no state for what is frozen, so both columns are the same.
      trainable: what is not frozen, instead.
      depth: how often the tree branches before subtrees become rows, however uniform they are. 1 shows the top-level
        modules, 0 a wholly frozen tree as a single row, a large number each leaf. A level at which the tree does not
        branch does not count, so `{"params": {...}}` reads like what is in it.

    Returns:
      A `Summary`. Without freezing, an optimizer may have no state for leaves that are no floats: the field is None
      then, shown as n/a, and `Summary.note` tells the reason.

    Raises:
      TypeError: not exactly one of `frozen` and `trainable` is given, or it is no way to select leaves. With an
        optimizer: a frozen leaf is one that `with_frozen` refuses, such as a Python scalar.
      ValueError: a pattern selects nothing, a mask does not fit, a leaf's shape cannot be divided as its sharding says.

    Example:
      >>> import frozen_optax as fo, jax.numpy as jnp, optax
      >>> block = {"kernel": jnp.ones((64, 64)), "bias": jnp.ones(64)}
      >>> params = {"encoder": {"block_0": block, "block_1": block}, "head": {"kernel": jnp.ones((64, 10))}}
      >>> report = fo.summary(params, "encoder/*/kernel", optax.adam(1e-3))
      >>> report
      path                               leaves   dtype     parameters      bytes
      -------------------------------------------------------------------------------------
      encoder/block_{0,1}/bias        2 x (64,)   float32          128      512 B   trained
      encoder/block_{0,1}/kernel   2 x (64, 64)   float32        8,192   32.0 KiB   frozen
      head/kernel                      (64, 10)   float32          640   2.50 KiB   trained
      -------------------------------------------------------------------------------------
      trained, 8.57%                   3 leaves                    768   3.00 KiB
      frozen                           2 leaves                  8,192   32.0 KiB
      all                              5 leaves                  8,960   35.0 KiB
      <BLANKLINE>
      memory            with freezing    without
      ------------------------------------------
      parameters             35.0 KiB   35.0 KiB
      gradients              3.00 KiB   35.0 KiB
      optimizer state        6.00 KiB   70.0 KiB
      ------------------------------------------
      total                  44.0 KiB    140 KiB
      >>> report.trained.parameters, report.memory.optimizer_state, report.memory_without_freezing.optimizer_state
      (768, 6148, 71684)
    """
    selector = frozen_selector(frozen, trainable)
    resolution = selector._resolve(params)
    leaves = jax.tree.leaves(params)
    keys = [(*path, i) for i, (path, _) in enumerate(p for p in flatten_with_holes(params) if not is_hole(p[1]))]
    whole = list(map(_whole, leaves))
    shard = list(map(_shard, resolution.paths, leaves, whole))
    compared = _compared(params, whole, selector, optimizer)
    per_device = compared if shard == whole else _compared(params, shard, selector, optimizer)
    return Summary(
        rows=_rows(list(map(_Leaf.of, keys, resolution.selected, whole)), depth),
        memory=compared[0],
        memory_without_freezing=compared[1],
        memory_per_device=per_device[0],
        memory_per_device_without_freezing=per_device[1],
        note=compared[2] or per_device[2],
    )
