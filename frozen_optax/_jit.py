"""A compiled train step that takes the frozen leaves and never hands them back.

`jax.jit` copies every leaf that comes out as it went in, unless it is donated. What is compiled
(`_traced_step.py`) takes the first argument as two rows of leaves, frozen and not, and returns one
row without the frozen leaves. The caller gets back the ones that went in.

A `Step` stores; functions do the work. They stand in the order in which they are needed: what is
stored, shardings, a call, what is looked at before the first call, and the stages of a step that is
compiled ahead of time.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, ParamSpec, TypeAlias, TypeVar, overload

import jax

from frozen_optax._messages import quoted
from frozen_optax._placement import buffers, elsewhere, refuse_shared, target_of
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
from frozen_optax._selection import frozen_selector
from frozen_optax._selectors import Reads, Selector, reads, resolve
from frozen_optax._traced_step import Asked, Compiled, Outdated, compile_rows, require_up_to_date
from frozen_optax._trees import (
    Resolution,
    describe,
    is_hole,
    is_number,
    is_traced,
    leaves_if,
    objects_among,
    refuse_mutable,
    require_alive,
)
from frozen_optax._typing import Frozen, Leaf, PyTree, Where
from frozen_optax._variables import refuse_tied

P = ParamSpec("P")
R = TypeVar("R")

# Leaves that are no numbers; to jax they are static.
Objects: TypeAlias = tuple[Leaf, ...]

_MAX_MOVED = 3  # leaves named in a warning

# --- what a step stores


@dataclasses.dataclass(eq=False)
class _Stored:
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


def _jitted_for(step: _Stored, frozen: InputRow) -> Compiled:
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


class _Call(NamedTuple):
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


def _in_rows(step: _Stored, args: Sequence[Any], kwargs: dict[str, Any]) -> _Call:
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
    return _Call(*partition_rows(resolution, leaves), args[1:], kwargs)


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


def _is_outdated(step: _Stored, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a leaf is no number any more that was one in the last call, of the same structure."""
    if step.last is None:
        return False
    leaves = jax.tree.leaves(_first_by_position(step.asked, args, kwargs)[0][0])
    return objects_among(leaves) != step.last[0].objects


def _with_rows(
    step: _Stored,
    run: Callable[[_Call], Any],
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


def _result(step: _Stored, frozen: Sequence[Leaf], returned: OutputRow | PyTree) -> PyTree:
    """The result of the step, the frozen leaves in their places."""
    if step.asked.returns_tree:
        is_place = lambda node: is_kept(node) or is_hole(node)
        returned = as_row(*jax.tree.flatten(returned, is_leaf=is_place), len(frozen))
    return from_row(frozen, returned)


def _donations(asked: Asked, call: _Call, skipped: set[int]) -> dict[str, PyTree]:
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


def _explain(asked: Asked, call: _Call, skipped: set[int], error: Exception) -> None:
    """Raise, with its path, for the leaf that an error of the runtime is about, if one is."""
    if "deleted" in str(error):
        for path, leaf in zip(call.frozen.paths, call.frozen.leaves, strict=True):
            require_alive(path, leaf)
    if "donate" in str(error):
        refuse_shared(call.frozen, _donations(asked, call, skipped), buffers)


def _run(
    step: _Stored,
    compiled_for: Callable[[InputRow], Compiled],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    skipped: set[int],
) -> Any:
    """One step, by a compiled function that takes all arguments but those skipped."""

    def run(call: _Call) -> Any:
        resolution = call.frozen.resolution
        if resolution is not step.checked:
            _look_once(step, call, skipped)
        compiled = compiled_for(call.frozen)
        try:
            returned = compiled(call.frozen, call.others, *call.args, **call.kwargs)
        # A ValueError comes from a step that was compiled ahead of time.
        except (RuntimeError, ValueError) as error:
            _explain(step.asked, call, skipped, error)
            raise
        return _result(step, call.frozen.leaves, returned)

    return _with_rows(step, run, args, kwargs)


# --- before the first call


def _look_once(step: _Stored, call: _Call, skipped: set[int]) -> None:
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
    if not step.has_told:
        _tell_of_moves(step, call)
    step.checked = call.frozen.resolution


def _refuse_other_shardings(step: _Stored, call: _Call) -> None:
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

    jitted = _jitted_for(step, call.frozen)
    result = jitted.eval_shape(call.frozen, call.others, *call.args, **call.kwargs)
    jax.tree.map(compare, said, result, is_leaf=lambda node: node is None)


def _moved(asked: Asked, call: _Call) -> Iterator[str]:
    """The frozen leaves that are not where the step needs them, and where they are."""
    resolution, frozen = call.frozen.resolution, call.frozen.leaves
    others = (*call.others.leaves, *jax.tree.leaves((call.args, call.kwargs)))
    target = target_of([*frozen, *others])
    shardings, _ = partition_leaves(resolution, _in_shardings(asked, resolution))
    for path, leaf, sharding in zip(call.frozen.paths, frozen, shardings, strict=True):
        if place := elsewhere(leaf, sharding, target):
            yield f"{path!r} ({place})"


def _tell_of_moves(step: _Stored, call: _Call) -> None:
    """Warn of frozen leaves that are moved at each call."""
    moved = list(_moved(step.asked, call))
    if not moved:
        return
    step.has_told = True
    shown = ", ".join(moved[:_MAX_MOVED])
    if len(moved) > _MAX_MOVED:
        shown += f", and {len(moved) - _MAX_MOVED} more"
    warnings.warn(
        f"frozen leaves are moved to where the step runs, at each of its calls: {shown}. Move them "
        "once, before the first step: params = jax.device_put(params, sharding), or on a single "
        "device jax.device_put(params).",
        stacklevel=7,  # where the step was called
    )


# --- stages


class Stage:
    """A traced, lowered or compiled step: all that jax has for it, and called as the step is."""

    def __init__(self, stage: Any, run: Callable[..., Any]):
        self._stage, self._run = stage, run

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # while it is copied it has no stage yet
            raise AttributeError(
                f"a stage of a frozen_optax.jit step has no {name}. What jax takes apart "
                "(jax.export.export, serialize_executable) takes the step under jax.jit: "
                "jax.jit(step)."
            )
        return getattr(self._stage, name)

    def lower(self, **options: Any) -> Stage:
        return Stage(self._stage.lower(**options), self._run)

    def compile(self, *args: Any, **options: Any) -> Stage:
        return Stage(self._stage.compile(*args, **options), self._run)

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        return self._run(self._stage, args, kwargs)


def _stage(step: _Stored, method: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Stage:
    """What a method of the function under `jax.jit` makes of the arguments: `trace` or `lower`."""

    def run(call: _Call) -> Stage:
        make = getattr(_jitted_for(step, call.frozen), method)
        stage = make(call.frozen, call.others, *call.args, **call.kwargs)
        expected = call.frozen.resolution, call.frozen.static
        return Stage(stage, functools.partial(_run_compiled, step, *expected))

    return _with_rows(step, run, args, kwargs)


def _run_compiled(
    step: _Stored,
    expected: Resolution,
    static: Static,
    compiled: Compiled,
    args: Sequence[Any],
    kwargs: dict[str, Any],
) -> Any:
    """One step, by a function that was compiled ahead of time for what was frozen then."""
    if reads(step.asked.selector) is not Reads.STRUCTURE:
        step.last = None  # nothing is traced, which would tell that other leaves are frozen

    def compiled_for(frozen: InputRow) -> Compiled:
        resolution = frozen.resolution
        if resolution == expected and frozen.static != static:
            pairs = zip(resolution.objects, frozen.static, static, strict=True)
            changed = [resolution.paths[index] for index, leaf, was in pairs if leaf != was]
            raise TypeError(
                f"this step was compiled for other leaves that are no arrays: {quoted(changed)}."
            )
        if resolution != expected:
            raise TypeError(
                "this step was compiled for a first argument of another structure, or in which "
                f"other leaves are frozen: {quoted(expected.chosen) or 'none'}, and now "
                f"{quoted(resolution.chosen) or 'none'}."
            )
        return compiled

    return _run(step, compiled_for, args, kwargs, step.asked.static.argnums)


# --- the step


class Step(Generic[P, R]):
    """What `jit` makes of a train step.

    It is called as the step is, and has the methods of a `jax.jit` function.
    """

    __wrapped__: Callable[P, R]

    def __init__(
        self,
        fun: Callable[P, R],
        selector: Selector,
        where: Where | None,
        discard: bool,
        options: dict[str, Any],
    ):
        functools.update_wrapper(self, fun, updated=())
        asked = Asked.of(fun, selector, where, discard, options)
        self._stored = _Stored(asked, compile_rows(asked))

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else types.MethodType(self, instance)

    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        """One step."""
        step = self._stored
        return _run(step, functools.partial(_jitted_for, step), args, kwargs, set())

    def trace(self, /, *args: P.args, **kwargs: P.kwargs) -> Any:
        """As `jax.jit` has it."""
        return _stage(self._stored, "trace", args, kwargs)

    def lower(self, /, *args: P.args, **kwargs: P.kwargs) -> Any:
        """As `jax.jit` has it: what it is compiled to is called as the step is."""
        return _stage(self._stored, "lower", args, kwargs)

    def eval_shape(self, /, *args: P.args, **kwargs: P.kwargs) -> Any:
        """The shapes and dtypes of what the step returns."""
        step = self._stored

        def run(call: _Call) -> Any:
            jitted = _jitted_for(step, call.frozen)
            returned = jitted.eval_shape(call.frozen, call.others, *call.args, **call.kwargs)
            frozen = jax.eval_shape(lambda row: row, call.frozen)
            return _result(step, frozen.leaves, returned)

        return _with_rows(step, run, args, kwargs)

    def clear_cache(self) -> None:
        """Forgets all that was compiled."""
        for jitted in (self._stored.jitted, *self._stored.sharded.values()):
            jitted.clear_cache()


# --- what users call


@overload
def jit(
    fun: Callable[P, R],
    /,
    *,
    frozen: Frozen = None,
    trainable: Frozen = None,
    where: Where | None = None,
    discard: bool = False,
    **options: Any,
) -> Step[P, R]: ...


@overload
def jit(
    fun: None = None,
    /,
    *,
    frozen: Frozen = None,
    trainable: Frozen = None,
    where: Where | None = None,
    discard: bool = False,
    **options: Any,
) -> Callable[[Callable[P, R]], Step[P, R]]: ...


def jit(
    fun: Callable[..., Any] | None = None,
    /,
    *,
    frozen: Frozen = None,
    trainable: Frozen = None,
    where: Where | None = None,
    discard: bool = False,
    **options: Any,
) -> Any:
    """`jax.jit` for a train step: frozen leaves go in and never come out.

    The step takes the parameters, or a state that holds them (a Flax `TrainState`, a tuple, a
    dataclass), as its first argument and returns their successor, alone or first in a tuple. In
    what the caller gets back, each frozen leaf of the successor is the very object that was passed
    in. It is neither copied, nor dispatched, nor donated.

    A leaf that is no array (a function, a string) is frozen, too, wherever it stands in the first
    argument. It is a part of the compiled step, which is traced again for another one.

    The step has to leave the frozen leaves as they are, or to add nothing but zero to them. That is
    seen when it is traced, and costs a second trace where a frozen leaf comes out as another array
    (as from `optax.apply_updates`). What it makes else of a frozen leaf would be computed and
    thrown away: a moving average that never happens, a count of random numbers that stands still,
    an optimizer that trains what is frozen here. That is an error.

    Args:
      fun: the step; leave it out to use `jit` as a decorator.
      frozen: the leaves that are frozen. Best is the optimizer that `with_frozen` returned, so that
        it is said once. It may also be a glob on their paths (`"encoder"`), a compiled regex, a
        `Selector`, a list of these, a predicate `(path, leaf) -> bool`, a bool, or a pytree of
        bools. False is for a step in which nothing is frozen.
      trainable: the leaves that are not, instead of `frozen`: exactly one of the two is given.
        Outside of what `where` names nothing is frozen.
      where: a function that returns the parameters in the first argument: `lambda state:
        state.params`. It may return a tuple of several parts, such as parameters and batch
        statistics. Paths are relative to each, a pattern has to select something in one of them,
        and a mask has the structure of what `where` returns. It is called on trees of
        `jax.ShapeDtypeStruct`, too.
      discard: whether what the step makes of frozen leaves may be thrown away: they are frozen
        whatever it does.
      **options: those of `jax.jit`, by its names. Numbers, names and shardings count in the step's
        own signature. `donate_argnums` takes the trainable leaves of the first argument and all
        else that it holds, never a frozen leaf, so several runs can share one frozen backbone.

    Returns:
      The compiled step. It has the methods `lower`, `trace`, `eval_shape` and `clear_cache` of a
      `jax.jit` function, and what `lower(...).compile()` returns is called as the step is. It is
      traced again when `jax.jit` would be. A frozen leaf stays where it is: one on the host (a
      numpy array), on fewer devices than the step runs on, or under other shardings than
      `in_shardings`, is moved at each call. A warning tells of it once.

    Raises:
      TypeError: not exactly one of `frozen` and `trainable` is given, or it is no way to select
        leaves. When called: a leaf is a `jax.Ref`, or is no array and cannot be hashed. And
        whatever `jax.jit` raises.
      ValueError: the first argument is static. When called: a pattern selects nothing, or a mask
        does not fit; everything is frozen and nobody said so (`"**"`, `True`); the step does not
        return the successor of its first argument, or makes something else of a frozen leaf; a
        frozen leaf is the same buffer as one to be donated, or `out_shardings` contradicts its own;
        an `nnx.Variable` stands at two places. The message names the paths.

    Example:
      >>> import frozen_optax as fo, jax.numpy as jnp
      >>> @fo.jit(frozen="base", donate_argnums=0)
      ... def step(params, x):
      ...     return {"base": params["base"], "scale": params["scale"] + x}
      >>> params = {"base": jnp.array([-0.0, 1.0]), "scale": jnp.array(2.0)}
      >>> new = step(params, 0.5)
      >>> new["base"] is params["base"], float(new["scale"])
      (True, 2.5)
    """
    if fun is not None and not callable(fun):
        raise TypeError(
            f"jit takes a function, found {fun!r}. What is frozen goes by name: "
            f"jit(step, frozen={fun!r})."
        )
    selector = frozen_selector(frozen, trainable, where)
    if fun is None:
        return lambda fun: Step(fun, selector, where, discard, options)
    return Step(fun, selector, where, discard, options)
