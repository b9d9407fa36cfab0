"""What is frozen and what that saves, found out without the arrays.

Nothing is allocated. A report reads shapes, dtypes and shardings alone, and `jax.eval_shape` tells
what an optimizer's state would be, so it can be had for a model that fits on no machine at hand.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
import optax

from frozen_optax import _bits
from frozen_optax._elements import Elements, frozen_in_part, lay
from frozen_optax._resolution import Resolution
from frozen_optax._selection import by_mask
from frozen_optax._selectors import Selector
from frozen_optax._summary_table import Memory, Row, Summary
from frozen_optax._trees import flatten_with_holes, is_hole, keystr, spec
from frozen_optax._typing import Frozen, KeyPath, Leaf, PyTree
from frozen_optax._with_frozen import with_frozen


def _bytes(spec: Leaf) -> int:
    """What an array takes, elements of less than a byte packed; nothing for what is no array."""
    if not _bits.is_array(spec):
        return 0
    bits = math.prod(spec.shape) * _bits.width(spec.dtype)
    return -(-bits // 8)  # rounded up


class _Leaf(NamedTuple):
    """A leaf as a row needs it.

    Attributes:
      keys: its key path, and its index at the end, so that no two are the same.
      frozen: whether it is frozen.
      shape: None for what is no array.
      dtype: its name; that of the type for what is no array.
      parameters: how many elements it has.
      bytes: what they take.
    """

    keys: KeyPath
    frozen: bool
    shape: tuple[int, ...] | None
    dtype: str
    parameters: int
    bytes: int

    @classmethod
    def of(cls, keys: KeyPath, frozen: bool, spec: Leaf) -> _Leaf:
        if not _bits.is_array(spec):
            return cls(keys, frozen, None, type(spec).__name__, 0, 0)
        shape = tuple(spec.shape)
        return cls(keys, frozen, shape, str(spec.dtype), math.prod(shape), _bytes(spec))


def _whole(leaf: Leaf) -> Leaf:
    """What has the shape and dtype of a leaf."""
    # Without x64, `jax.eval_shape` takes 64 bits from numpy's arrays only.
    return leaf if isinstance(leaf, (np.ndarray, np.generic)) else spec(leaf)


def _refuse_symbolic(paths: Sequence[str], leaves: Sequence[Leaf]) -> None:
    for path, leaf in zip(paths, leaves, strict=True):
        if _bits.is_array(leaf) and not all(isinstance(length, int) for length in leaf.shape):
            raise TypeError(
                f"the leaf at {path!r} has the symbolic shape {tuple(leaf.shape)}, and a summary "
                "counts elements. Give it shapes of numbers."
            )


def _shard(path: str, leaf: Leaf, whole: Leaf) -> Leaf:
    """The shape and dtype of what one device holds of a leaf: all of it, if it has no sharding."""
    if (sharding := getattr(leaf, "sharding", None)) is None:
        return whole
    try:
        return jax.ShapeDtypeStruct(sharding.shard_shape(whole.shape), whole.dtype)
    except ValueError as error:
        raise ValueError(f"the leaf at {path!r} cannot be sharded as it says: {error}") from error


def _leaves_of(
    resolution: Resolution, key_paths: Sequence[KeyPath], specs: Sequence[Leaf]
) -> Iterator[_Leaf]:
    """The leaves; one that is frozen in part is two, what is frozen and what is trained."""
    number = itertools.count()
    for index, (keys, each) in enumerate(zip(key_paths, specs, strict=True)):
        part = resolution.parts.get(index)
        if part is None:
            yield _Leaf.of((*keys, next(number)), resolution.selected[index], each)
            continue
        for frozen, shape in ((True, part.frozen_shape), (False, part.trained_shape)):
            struct = jax.ShapeDtypeStruct(shape, each.dtype)
            yield _Leaf.of((*keys, next(number)), frozen, struct)


class _Subtree(NamedTuple):
    """A part of the tree that is wholly frozen or wholly trained."""

    path: str
    leaves: list[_Leaf]

    @property
    def inside(self) -> tuple[tuple[str, tuple[int, ...] | None, str], ...]:
        """What is in it: the path of each leaf from here, its shape and its dtype."""
        return tuple(
            (keystr(leaf.keys[:-1])[len(self.path) :], leaf.shape, leaf.dtype)
            for leaf in self.leaves
        )


def _subtrees(leaves: list[_Leaf], depth: int) -> Iterator[_Subtree]:
    """The largest subtrees that are wholly frozen or wholly trained.

    Others are divided, and so are these until the tree has branched `depth` times.
    """
    first, last = leaves[0].keys, leaves[-1].keys
    level = 0  # at which the tree branches
    while level < min(len(first), len(last)) and first[level] == last[level]:
        level += 1
    if len(leaves) == 1:
        yield _Subtree(keystr(first[:-1]), leaves)
    elif depth <= 0 and len({leaf.frozen for leaf in leaves}) == 1:
        yield _Subtree(keystr(first[:level]), leaves)
    else:
        for _, below in itertools.groupby(leaves, key=lambda leaf: leaf.keys[level]):
            yield from _subtrees(list(below), depth - 1)


def _ranges(numbers: list[str]) -> str:
    """Numbers as a shell would write them: `{0..30,32}`; one number as it is."""
    if len(numbers) == 1:
        return numbers[0]
    # Within a run, a number less its index is the same.
    ordered = enumerate(sorted(numbers, key=int))
    by_run = itertools.groupby(ordered, key=lambda pair: int(pair[1]) - pair[0])
    runs = [[number for _, number in run] for _, run in by_run]
    texts = [f"{run[0]}..{run[-1]}" if len(run) > 2 else ",".join(run) for run in runs]
    if len(texts) > 6:
        texts[3:-1] = ["..."]
    return "{" + ",".join(texts) + "}"


def _fold(alike: list[_Subtree]) -> Iterator[tuple[str, list[_Subtree]]]:
    """Paths that differ in numbers only, as few patterns as say exactly which they are.

    The last numbers are folded first: `a/0/b/{0..3}` and `a/1/b/{0..3}` are then equal but for one
    number again.
    """
    words = re.split("[0-9]+", alike[0].path)
    folded: dict[tuple[str, ...], list[_Subtree]] = {}
    for subtree in alike:
        folded.setdefault(tuple(re.findall("[0-9]+", subtree.path)), []).append(subtree)
    for place in reversed(range(len(words) - 1)):
        folded = _fold_at(place, folded)
    for numbers, subtrees in folded.items():
        pairs = zip(words, [*numbers, ""], strict=True)
        yield "".join(word + number for word, number in pairs), subtrees


def _fold_at(
    place: int, folded: dict[tuple[str, ...], list[_Subtree]]
) -> dict[tuple[str, ...], list[_Subtree]]:
    """Subtrees by the numbers of their paths, those together that differ in the one at a place."""
    same: dict[tuple[tuple[str, ...], tuple[str, ...]], dict[str, list[_Subtree]]] = {}
    for numbers, subtrees in folded.items():
        around = numbers[:place], numbers[place + 1 :]
        same.setdefault(around, {})[numbers[place]] = subtrees
    return {
        (*before, _ranges(list(found)), *after): list(itertools.chain.from_iterable(found.values()))
        for (before, after), found in same.items()
    }


def _row(path: str, subtrees: list[_Subtree]) -> Row:
    """Subtrees that are alike, as one row of the table."""
    leaves = [leaf for subtree in subtrees for leaf in subtree.leaves]
    shapes = {leaf.shape for leaf in leaves}
    return Row(
        path=path,
        paths=tuple(subtree.path for subtree in subtrees),
        frozen=leaves[0].frozen,
        leaves=len(leaves),
        shape=leaves[0].shape if len(shapes) == 1 else None,
        dtypes=tuple(dict.fromkeys(leaf.dtype for leaf in leaves)),
        parameters=sum(leaf.parameters for leaf in leaves),
        bytes=sum(leaf.bytes for leaf in leaves),
    )


def _rows(leaves: list[_Leaf], depth: int) -> tuple[Row, ...]:
    """The rows of the table, in the order of the tree."""
    alike: dict[Hashable, list[_Subtree]] = {}
    for subtree in _subtrees(leaves, depth) if leaves else ():
        kind = re.sub("[0-9]+", "0", subtree.path), subtree.leaves[0].frozen, subtree.inside
        alike.setdefault(kind, []).append(subtree)
    rows: list[tuple[int, Row]] = []
    for path, subtrees in itertools.chain.from_iterable(map(_fold, alike.values())):
        first = min(leaf.keys[-1] for subtree in subtrees for leaf in subtree.leaves)
        rows.append((first, _row(path, subtrees)))
    rows.sort(key=lambda pair: pair[0])
    return tuple(row for _, row in rows)


def _trained_specs(resolution: Resolution, specs: Sequence[Leaf]) -> list[Leaf]:
    """Shapes and dtypes, of a leaf that is frozen in part those of what trains."""
    found = list(specs)
    for index, part in resolution.parts.items():
        found[index] = jax.ShapeDtypeStruct(part.trained_shape, specs[index].dtype)
    return found


def _memory(
    params: PyTree,
    specs: list[Leaf],
    said: tuple[Selector, Elements | None],
    optimizer: optax.GradientTransformation | None,
) -> Memory:
    """What `params` take to train, their leaves having the shapes of `specs`."""
    resolution = lay(*said, params)
    trained = resolution.of_leaves.rest(specs)
    state = None
    if optimizer is not None:
        _bits.refuse_untrainable(resolution, specs)
        selector, of_state = said[0], trained
        if resolution.parts:  # each device holds state for all that trains of such a leaf
            whole = resolution.unflatten(resolution.selected)
            selector = by_mask(whole if any(resolution.selected) else False)
            of_state = resolution.of_leaves.rest(_trained_specs(resolution, specs))
        # Integers are counted, whether or not it makes sense to train them.
        tx = with_frozen(optimizer, selector, allow_int=True)
        # What is frozen is taken as it is: it need not be an array.
        leaves = jax.tree.leaves(params)
        init = lambda trained: tx.init(resolution.of_leaves.fill(leaves, trained))
        made = jax.eval_shape(init, of_state)
        state = sum(map(_bytes, jax.tree.leaves(made)))
    has_gradient = lambda spec: _bits.is_array(spec) and _bits.is_differentiable(spec)
    return Memory(
        parameters=sum(map(_bytes, specs)),
        gradients=sum(map(_bytes, filter(has_gradient, trained))),
        optimizer_state=state,
    )


class _Compared(NamedTuple):
    """The memory with freezing and without; why there is no state in the latter, if it is so."""

    with_freezing: Memory
    without: Memory
    note: str


def _compared(
    params: PyTree,
    specs: list[Leaf],
    said: tuple[Selector, Elements | None],
    optimizer: optax.GradientTransformation | None,
) -> _Compared:
    """The memory with freezing and without."""
    memory, nothing = _memory(params, specs, said, optimizer), (by_mask(False), None)
    try:
        return _Compared(memory, _memory(params, specs, nothing, optimizer), "")
    except Exception as error:  # whatever an optimizer raises for leaves that it was not made for
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        note = f"n/a: without freezing the optimizer cannot be initialised: {reason}"
        return _Compared(memory, _memory(params, specs, nothing, None), note)


def summary(
    params: PyTree,
    frozen: Frozen = None,
    optimizer: optax.GradientTransformation | None = None,
    *,
    trainable: Frozen = None,
    depth: int = 1,
) -> Summary:
    """What is frozen, what is trained, and what it takes: a table, and its numbers as fields.

    A row is a subtree that is wholly frozen or wholly trained, the largest there is. Subtrees that
    are alike and whose paths differ in numbers only share a row: `layers/{0..31}/mlp`. Of very many
    rows the table shows the first 30 that are frozen and the first 30 that are trained;
    `Summary.rows` has all.

    Every element of every array counts as a parameter, whatever its dtype: quantised weights are
    integers. A PRNG key counts as one, a leaf that is no array as none. Bytes are those of the
    data: int4 and its like are packed, as on accelerators (a CPU takes a byte for each), and a PRNG
    key takes its key data.

    The memory per device is an estimate, by these rules:

    - of each parameter a device holds one shard, `sharding.shard_shape(shape)`; all of it, if there
      is no sharding;
    - of the gradients it holds the same shards, in the parameters' dtypes, for those that are
      trained and float;
    - of the optimizer state it holds what `optimizer.init` returns for these shards: moments are
      sharded as their parameters are, counts and the like are there on every device, and so is the
      state of elements that train within a leaf.

    A leaf in which elements are frozen has two rows, what is frozen and what is trained, and counts
    as a leaf in both; its gradient is that of the whole leaf.

    Activations and temporary arrays come on top. Where layers lie on different devices the estimate
    is too high: each device is taken to hold a shard of every leaf.

    Args:
      params: arrays of jax or numpy, or `jax.ShapeDtypeStruct`s; they may have shardings, on an
        `AbstractMesh` too.
      frozen: the leaves that are frozen: a glob on their paths (`"encoder"`), a compiled regex, a
        `Selector`, a list of these, a predicate `(path, leaf) -> bool`, a bool, a pytree of bools,
        or the optimizer that `with_frozen` returned.
      optimizer: the optimizer that is wrapped, `optax.adamw(1e-3)`, or what `with_frozen` returned,
        of which it is taken.
      trainable: the leaves that are not, instead of `frozen`: exactly one of the two is given.
      depth: how often the tree branches before subtrees become rows, however uniform they are. 1
        shows the top-level modules, 0 a wholly frozen tree as a single row, a large number each
        leaf. A level at which the tree does not branch does not count, so `{"params": {...}}` reads
        like what is in it.

    Returns:
      A `Summary`. Without freezing, an optimizer may have no state for leaves that are no floats:
      the field is None then, shown as n/a, and `Summary.note` tells the reason.

    Raises:
      TypeError: not exactly one of `frozen` and `trainable` is given, or it is no way to select
        leaves; a leaf has a symbolic shape. With an
        optimizer: a frozen leaf is one that `with_frozen` refuses, such as a Python scalar.
      ValueError: a pattern selects nothing, a mask does not fit, a leaf's shape cannot be divided
        as its sharding says.

    Example:
      >>> import frozen_optax as fo, jax.numpy as jnp, optax
      >>> block = {"kernel": jnp.ones((64, 64)), "bias": jnp.ones(64)}
      >>> head = {"kernel": jnp.ones((64, 10))}
      >>> params = {"encoder": {"block_0": block, "block_1": block}, "head": head}
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
      >>> report.trained.parameters, report.memory.optimizer_state
      (768, 6148)
      >>> report.memory_without_freezing.optimizer_state
      71684
    """
    said = frozen_in_part(frozen, trainable)
    optimizer = getattr(optimizer, "inner", None) or optimizer
    resolution = lay(*said, params)
    leaves = jax.tree.leaves(params)
    _refuse_symbolic(resolution.paths, leaves)
    key_paths = [keys for keys, node in flatten_with_holes(params) if not is_hole(node)]
    pairs = zip(leaves, resolution.numbers, strict=True)
    whole = [_whole(leaf) if is_number else leaf for leaf, is_number in pairs]
    shard = list(map(_shard, resolution.paths, leaves, whole))
    everywhere = _compared(params, whole, said, optimizer)
    per_device = everywhere if shard == whole else _compared(params, shard, said, optimizer)
    return Summary(
        rows=_rows(list(_leaves_of(resolution, key_paths, whole)), depth),
        memory=everywhere.with_freezing,
        memory_without_freezing=everywhere.without,
        memory_per_device=per_device.with_freezing,
        memory_per_device_without_freezing=per_device.without,
        note=everywhere.note or per_device.note,
    )
