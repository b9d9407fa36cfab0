"""A call of a step under `jit`: what is stored between calls, and what is done at each.

It stands in the order in which it is needed: what is stored, shardings, a call, and what is looked
at before the first one.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax

from frozen_optax._messages import warn
from frozen_optax._placement import buffers, elsewhere, refuse_shared, target_of
from frozen_optax._resolution import Resolution
from frozen_optax._rows import (
    InputRow,
    OutputRow,
    Static,
    as_row,
    from_row,
    is_kept,
    partition_leaves,
    partition_rows,
)
from frozen_optax._selectors import Reads, reads, resolve
from frozen_optax._traced_step import Asked, Compiled, Outdated, compile_rows, require_up_to_date
from frozen_optax._trees import (
    describe,
    is_hole,
    is_number,
    is_traced,
    leaves_if,
    objects_in,
    refuse_mutable,
    require_alive,
)
from frozen_optax._typing import Leaf, PyTree
from frozen_optax._variables import refuse_tied

# Leaves that are no numbers; to jax they are static.
Objects: TypeAlias = tuple[Leaf, ...]

_MAX_MOVED = 3  # leaves named in a warning

# --- what a step stores


@dataclasses.dataclass(eq=False)
class Stored:
    """What is stored between calls: what was asked for, what is compiled, what need not be redone.

    Attributes:
      asked: what `jit` was asked for.
      jitted: the function of rows under `jax.jit`.
      sharded: the same with shardings of the first argument, for each resolution and what is
        static in it.
      last: which leaves were frozen in the last call, and those of them that are no numbers.
      checked: the same, of the last call of which all was looked at.
      has_told: whether it was told of leaves that are moved at each call.
    """

    asked: Asked
    jitted: Compiled
    sharded: dict[tuple[Resolution, Static], Compiled] = dataclasses.field(default_factory=dict)
    last: tuple[Resolution, Objects] | None = None
    checked: Resolution | None = None
    has_told: bool = False


# --- its shardings


def _in_shardings(asked: Asked, resolution: Resolution) -> list[PyTree]:
    """What `in_shardings` says of each leaf of the first argument, None where it says nothing."""
    by_leaf: list[PyTree] = [None] * len(resolution.paths)
    said = asked.options.get("in_shardings")
    if isinstance(said, (tuple, list)):
        said = said[0] if said else None
    if said is None:
        return by_leaf

    def note(sharding: PyTree, part: PyTree) -> None:
        for index in jax.tree.leaves(part):
            by_leaf[index] = sharding

    indices = resolution.unflatten(range(len(by_leaf)))
    try:
        jax.tree.map(note, said, indices, is_leaf=lambda node: node is None)
    except ValueError as error:
        raise ValueError(f"in_shardings[0] is no prefix of the first argument: {error}") from None
    return by_leaf


def jitted_for(step: Stored, frozen: InputRow) -> Compiled:
    """The function of rows under `jax.jit`.

    Shardings are said of a tree, and jax needs them of rows, which depend on what is frozen. So
    with shardings of the first argument there is one function for each kind of row.
    """
    said = step.asked.options.get("in_shardings")
    if not isinstance(said, (tuple, list)) or not said:
        return step.jitted
    key = frozen.resolution, frozen.static
    if key not in step.sharded:
        by_leaf = _in_shardings(step.asked, frozen.resolution)
        for index, leaf in zip(frozen.resolution.objects, frozen.objects, strict=True):
            by_leaf[index] = leaf  # it has no sharding, and is a part of the row
        of_first = partition_rows(frozen.resolution, by_leaf)
        step.sharded[key] = compile_rows(step.asked, in_shardings=(*of_first, *said[1:]))
    return step.sharded[key]


# --- a call


class Call(NamedTuple):
    """The arguments of a call, the first of them in rows."""

    frozen: InputRow
    others: InputRow
    args: Sequence[Any]
    kwargs: dict[str, Any]


def _refuse_unfit(asked: Asked, first: PyTree) -> None:
    """Raise for a first argument that no compiled step can take and hand back."""
    if jax.tree_util.all_leaves([first]) and not is_number(first):
        raise TypeError(
            f"{asked.name} takes the parameters as its first argument, found {describe(first)}. If "
            "that is the self of a method, compile the bound method: "
            "self.step = fo.jit(self._step, frozen=...)."
        )
    refuse_tied(first)
    refuse_mutable(first)


def _first_by_position(
    asked: Asked, args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[Sequence[Any], dict[str, Any]]:
    """The arguments, the first one by position, as it may also be given by name."""
    if args:
        return args, kwargs
    for name, argnum in asked.signature.argnums.items():
        if argnum == 0 and name in kwargs:
            others = {key: value for key, value in kwargs.items() if key != name}
            return (kwargs[name],), others
    raise TypeError(
        f"{asked.name} takes the parameters as its first argument, and was called without one."
    )


def _in_rows(step: Stored, args: Sequence[Any], kwargs: dict[str, Any]) -> Call:
    """The arguments with the first in rows. This is the path of every call: it has to be short."""
    args, kwargs = _first_by_position(step.asked, args, kwargs)
    first = args[0]
    resolution, objects = step.last or (None, ())  # in training the next tree is like the last one
    leaves = leaves_if(resolution.treedef, first) if resolution else None
    if leaves is not None and objects and not _has_objects(resolution, leaves, objects):
        leaves = None
    if resolution is None or leaves is None:
        leaves = jax.tree.leaves(first)
        _refuse_unfit(step.asked, first)
        resolution = resolve(step.asked.selector, first, to_train=True)
        objects = tuple(leaves[index] for index in resolution.objects)
        _refuse_unhashable(resolution, objects)
        # What hangs on values may be another choice for the next tree of this structure.
        step.last = None if reads(step.asked.selector) is Reads.VALUES else (resolution, objects)
    return Call(*partition_rows(resolution, leaves), args[1:], kwargs)


def _has_objects(resolution: Resolution | None, leaves: Sequence[Leaf], objects: Objects) -> bool:
    """Whether these are the leaves that are no numbers, at their places."""
    assert resolution is not None  # which knows the places
    places = resolution.objects
    return all(leaves[index] is last for index, last in zip(places, objects, strict=True))


def _refuse_unhashable(resolution: Resolution, objects: Objects) -> None:
    for index, leaf in zip(resolution.objects, objects, strict=True):
        try:
            hash(leaf)
        except TypeError:
            raise TypeError(
                f"the leaf {resolution.paths[index]!r} is {describe(leaf)}, no array of numbers, "
                "so it is a part of the compiled step, and cannot be hashed, which tells whether "
                "to compile anew. Leave it out of the first argument, or give its class __hash__ "
                "and __eq__."
            ) from None


def _is_outdated(step: Stored, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a leaf is no number any more that was one in the last call, of the same structure."""
    if step.last is None:
        return False
    first = _first_by_position(step.asked, args, kwargs)[0][0]
    return objects_in(first) != frozenset(step.last[0].objects)


def with_rows(
    step: Stored,
    run: Callable[[Call], Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
) -> Any:
    """`run` for the arguments with the first in rows.

    Where the arguments are of other shapes than the last ones, other leaves may be frozen. A trace
    tells, and then it is run again.
    """
    try:
        return run(_in_rows(step, args, kwargs))
    except Outdated:
        step.last = None
    except TypeError:  # of jax, for what it cannot take
        if not _is_outdated(step, args, kwargs):
            raise
        step.last = None
    try:
        return run(_in_rows(step, args, kwargs))
    except Outdated:
        raise ValueError(
            f"what {step.asked.selector!r} freezes of these arguments is not what it freezes of "
            "them in a trace, where arrays on the host have other dtypes: 32 bits where 64 are not "
            "enabled. Pass jnp.asarray(...) of them."
        ) from None


def result_of(step: Stored, frozen: Sequence[Leaf], returned: OutputRow | PyTree) -> PyTree:
    """The result of the step, the frozen leaves in their places."""
    if step.asked.returns_tree:
        is_place = lambda node: is_kept(node) or is_hole(node)
        returned = as_row(*jax.tree.flatten(returned, is_leaf=is_place), len(frozen))
    return from_row(frozen, returned)


def _donations(asked: Asked, call: Call, skipped: set[int]) -> dict[str, PyTree]:
    """What a call donates, under the names of the arguments; that of the first goes without saying.

    Positions in `skipped` are those of static arguments, which a step that was compiled ahead of
    time is called without.
    """
    donated = {"": call.others} if 0 in asked.donated.argnums else {}
    argnums = (argnum for argnum in itertools.count(1) if argnum not in skipped)
    for argnum, arg in zip(argnums, call.args, strict=False):
        if argnum in asked.donated.argnums:
            donated[asked.signature.name(argnum)] = arg
    by_name = asked.donated.argnames
    return donated | {name: arg for name, arg in call.kwargs.items() if name in by_name}


def _explain(asked: Asked, call: Call, skipped: set[int], error: Exception) -> None:
    """Raise, with its path, for the leaf that an error of the runtime is about, if one is."""
    if "deleted" in str(error):
        for path, leaf in zip(call.frozen.paths, call.frozen.leaves, strict=True):
            require_alive(path, leaf)
    if "donate" in str(error):
        refuse_shared(call.frozen, _donations(asked, call, skipped), buffers)


def run_step(
    step: Stored,
    compiled_for: Callable[[InputRow], Compiled],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    skipped: set[int],
) -> Any:
    """One step, by a compiled function that takes all arguments but those skipped."""

    def run(call: Call) -> Any:
        resolution = call.frozen.resolution
        is_new = resolution is not step.checked
        if is_new:
            _look_once(step, call, skipped)
        compiled = compiled_for(call.frozen)
        try:
            returned = compiled(call.frozen, call.others, *call.args, **call.kwargs)
        # A ValueError comes from a step that was compiled ahead of time.
        except (RuntimeError, ValueError) as error:
            _explain(step.asked, call, skipped, error)
            raise
        if is_new and resolution is step.checked:
            # A step may name devices itself (`shard_map`), which no argument is on yet.
            _tell_of_moves(step, call, jax.tree.leaves(returned))
        return result_of(step, call.frozen.leaves, returned)

    return with_rows(step, run, args, kwargs)


# --- before the first call


def _look_once(step: Stored, call: Call, skipped: set[int]) -> None:
    """What is looked at before the first step and, as it costs time, at no other."""
    asked = step.asked
    require_up_to_date(asked, call.frozen, call.others)
    if any(map(is_traced, (*call.frozen.leaves, *call.others.leaves))):
        return  # tracers have no buffers, and are nowhere
    if any(asked.donated):
        # The runtime sees it at any call. Here it is seen before the first compilation, and before
        # the runtime has begun on some of several devices: after that, jax 0.7.0 can wait for the
        # others for ever.
        donated = _donations(asked, call, skipped)
        refuse_shared(call.frozen, donated, lambda leaf: {id(leaf)})
    _refuse_other_shardings(step, call)
    _tell_of_moves(step, call, jax.tree.leaves((call.others, call.args, call.kwargs)))
    step.checked = call.frozen.resolution


def _refuse_other_shardings(step: Stored, call: Call) -> None:
    """Raise where `out_shardings` says of a frozen leaf what it is not."""
    said = step.asked.options.get("out_shardings")
    if said is None:
        return

    def compare(sharding: PyTree, part: PyTree) -> None:
        if not isinstance(sharding, jax.sharding.Sharding):
            return
        for kept in filter(is_kept, jax.tree.leaves(part, is_leaf=is_kept)):
            leaf = call.frozen.leaves[kept.index]
            if not isinstance(leaf, jax.Array):
                continue
            if not leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
                path = call.frozen.paths[kept.index]
                raise ValueError(
                    f"out_shardings says {sharding} of the frozen leaf {path!r}, which is handed "
                    f"back as it came, with {leaf.sharding}. Put it there before the first step "
                    "(jax.device_put), or say None of it."
                )

    jitted = jitted_for(step, call.frozen)
    result = jitted.eval_shape(call.frozen, call.others, *call.args, **call.kwargs)
    jax.tree.map(compare, said, result, is_leaf=lambda node: node is None)


def _moved(asked: Asked, call: Call, others: Sequence[Leaf]) -> Iterator[str]:
    """The frozen leaves that are not where the step needs them, and where they are."""
    resolution, frozen = call.frozen.resolution, call.frozen.leaves
    target = target_of([*frozen, *others])
    shardings, _ = partition_leaves(resolution, _in_shardings(asked, resolution))
    for path, leaf, sharding in zip(call.frozen.paths, frozen, shardings, strict=True):
        if place := elsewhere(leaf, sharding, target):
            yield f"{path!r} ({place})"


def _tell_of_moves(step: Stored, call: Call, others: Sequence[Leaf]) -> None:
    """Warn once of frozen leaves that are moved at each call, as others of its leaves lie."""
    moved = [] if step.has_told else list(_moved(step.asked, call, others))
    if not moved:
        return
    step.has_told = True
    shown = ", ".join(moved[:_MAX_MOVED])
    if len(moved) > _MAX_MOVED:
        shown += f", and {len(moved) - _MAX_MOVED} more"
    warn(
        f"frozen leaves are moved to where the step runs, at each of its calls: {shown}. Move them "
        "once, before the first step: params = jax.device_put(params, sharding), or on a single "
        "device jax.device_put(params)."
    )
