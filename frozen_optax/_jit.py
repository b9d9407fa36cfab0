"""A compiled train step that takes the frozen leaves and never hands them back: the caller keeps those he has.

`jax.jit` copies every leaf that comes out as it went in, unless it is donated, and each leaf and each node of a tree
costs at every call. So what is compiled here takes the first argument as two rows of leaves, frozen and not, and
returns one row, which leaves out the frozen leaves of the successor, whatever the step computed for them. The tree
around the leaves travels as static data of a pytree node, so jax itself keeps track of which tree came out.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from frozen_optax._bits import is_key
from frozen_optax._places import Where, Within, places
from frozen_optax._selection import Selection, Selector, frozen_selector
from frozen_optax._trees import (
    PyTree,
    Resolution,
    is_traced,
    join,
    keystr,
    remember,
    require_alive,
    require_same_structure,
)


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class _Row:
    """Leaves in a row, known by their paths, and how to make a tree of them."""

    leaves: Sequence[Any]
    paths: tuple[str, ...]
    form: Any

    def tree_flatten_with_keys(self) -> tuple[Any, Any]:
        keys = map(jax.tree_util.DictKey, self.paths)
        return tuple(zip(keys, self.leaves, strict=True)), (self.paths, self.form)

    def tree_flatten(self) -> tuple[Any, Any]:
        return self.leaves, (self.paths, self.form)

    @classmethod
    def tree_unflatten(cls, static: Any, leaves: Any) -> _Row:
        return cls(leaves, *static)


def _take_apart(resolution: Resolution, leaves: Sequence[Any]) -> tuple[_Row, _Row]:
    """The frozen leaves of a tree, and the others."""
    rest = resolution.complement
    return (
        _Row(list(itertools.compress(leaves, resolution.selected)), resolution.chosen, resolution),
        _Row(list(itertools.compress(leaves, rest.selected)), rest.chosen, resolution),
    )


def _put_together(frozen: _Row, others: _Row) -> PyTree:
    """The tree again."""
    resolution, one, other = frozen.form, iter(frozen.leaves), iter(others.leaves)
    return resolution.unflatten([next(one if selected else other) for selected in resolution.selected])


@functools.partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["number"])
@dataclasses.dataclass(frozen=True)
class _Kept:
    """Stands in a result for the frozen leaf of this number."""

    number: int


def _is_kept(node: Any) -> bool:
    return isinstance(node, _Kept)


def _leave_out(result: PyTree, first: PyTree, resolution: Resolution, where: Where | None) -> PyTree:
    """The result of a step, with a `_Kept` for each frozen leaf of the successor of the first argument."""
    expected = places(where, first)
    candidates = [result, *result[:1]] if isinstance(result, (tuple, list)) else [result]
    for candidate in candidates:
        try:
            found = places(where, candidate)
        except Exception:  # a user's function, on a tree that it was not written for
            continue
        if jax.tree.structure(found) == jax.tree.structure(expected):
            break
    else:
        difference = "where= finds other parts in it."
        try:
            require_same_structure(candidates[-1], first, "the result", "the first argument")
        except ValueError as error:
            difference = str(error)
        raise ValueError(
            "a step under frozen_optax.jit returns the successor of its first argument, alone or first in a tuple: "
            f"{difference}"
        )
    frozen = itertools.compress(range(len(resolution.selected)), resolution.selected)
    numbers = {leaf: number for number, leaf in enumerate(frozen)}
    leaves, treedef = jax.tree.flatten(result)
    for ours, theirs in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        if ours in numbers:  # the leaves of result[0] come first in result: they have the same numbers in both
            leaves[theirs] = _Kept(numbers[ours])
    return jax.tree.unflatten(treedef, leaves)


def _as_row(result: PyTree, frozen_count: int) -> _Row:
    """What is new in a result; its form is the tree, and where in the frozen leaves + the new ones each leaf stands."""
    leaves, treedef = jax.tree.flatten(result, is_leaf=_is_kept)
    number = itertools.count(frozen_count)
    order = tuple(leaf.number if _is_kept(leaf) else next(number) for leaf in leaves)
    new = [leaf for leaf in leaves if not _is_kept(leaf)]
    return _Row(new, tuple(map(str, range(len(new)))), (treedef, order))


def _from_row(frozen: Sequence[Any], row: _Row) -> PyTree:
    """The result again, the frozen leaves in their places."""
    treedef, order = row.form
    return jax.tree.unflatten(treedef, map([*frozen, *row.leaves].__getitem__, order))


def _listed(one_or_more: Any, kind: type) -> list[Any]:
    return [one_or_more] if isinstance(one_or_more, kind) else list(one_or_more or ())


def _numbers(parameters: Sequence[inspect.Parameter], argnums: Any) -> list[int]:
    """Numbers of arguments, counted from the first one."""
    by_position = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    count = 0 if any(p.kind is p.VAR_POSITIONAL for p in parameters) else len(by_position)
    return [number + count if -count <= number < 0 else number for number in _listed(argnums, int)]


def _arguments(parameters: Sequence[inspect.Parameter], argnums: Any, argnames: Any) -> tuple[set[int], set[str]]:
    """The numbers and names of the arguments that an option speaks of; as in jax, one completes the other."""
    by_both = {p.name: i for i, p in enumerate(parameters) if p.kind is p.POSITIONAL_OR_KEYWORD}
    numbers, names = set(_numbers(parameters, argnums)), set(_listed(argnames, str))
    if argnames is None:
        names = {name for name, number in by_both.items() if number in numbers}
    elif argnums is None:
        numbers = {number for name, number in by_both.items() if name in names}
    return numbers, names


def _buffers(leaf: Any) -> set[Any]:
    """Where the values of an array lie in memory."""
    if is_key(leaf):
        leaf = jax.random.key_data(leaf)
    return {(shard.device, shard.data.unsafe_buffer_pointer()) for shard in leaf.addressable_shards}


def _refuse_shared(frozen: _Row, donated: dict[str, PyTree], identify: Callable[[Any], set[Any]]) -> None:
    """Raise where a donated leaf and a frozen one are the same memory."""
    is_buffer = lambda leaf: isinstance(leaf, jax.Array) and not is_traced(leaf) and not leaf.is_deleted()
    held = zip(frozen.paths, frozen.leaves, strict=True)
    owners = {key: path for path, leaf in held if is_buffer(leaf) for key in identify(leaf)}
    for name, tree in donated.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            for key in owners.keys() & identify(leaf) if is_buffer(leaf) else ():
                raise ValueError(
                    f"the frozen leaf {owners[key]!r} is the same buffer as {join(name, keystr(path))!r}, which is to "
                    "be donated: the step would overwrite it. Freeze both (tied weights), give the one a copy of its "
                    "own (jnp.copy), or donate neither."
                )


class _Stage:
    """A traced, lowered or compiled step: all that jax has for it, and called as the step is."""

    def __init__(self, stage: Any, call: Callable[..., Any]):
        self._stage, self._call = stage, call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stage, name)

    def lower(self, **options: Any) -> _Stage:
        return _Stage(self._stage.lower(**options), self._call)

    def compile(self, *args: Any, **options: Any) -> _Stage:
        return _Stage(self._stage.compile(*args, **options), self._call)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(lambda frozen, others: self._stage, args, kwargs)


class Step:
    """What `jit` makes of a train step: it is called as the step is, and has the methods of a `jax.jit` function."""

    def __init__(self, fun: Callable[..., Any], selector: Selector, where: Where | None, options: dict[str, Any]):
        functools.update_wrapper(self, fun)
        self._fun, self._options = fun, options
        self._selector = selector if where is None else Within(selector, where)
        self._where = where
        self._sharded: dict[Any, Any] = {}
        try:
            self._parameters = list(inspect.signature(fun).parameters.values())
        except (TypeError, ValueError):  # a builtin
            self._parameters = []
        numbers, names = (options.get(name) for name in ("static_argnums", "static_argnames"))
        if 0 in _arguments(self._parameters, numbers, names)[0]:
            raise ValueError("the first argument holds the parameters, so it cannot be static.")
        numbers, names = (options.get(name) for name in ("donate_argnums", "donate_argnames"))
        self._donated = _arguments(self._parameters, numbers, names)
        self._jitted = self._jit()

    def _jit(self, **more: Any) -> Any:
        """The function of rows, compiled; the frozen leaves come before all arguments, so numbers shift by one."""

        @functools.wraps(self._fun)
        def of_rows(frozen: _Row, others: _Row, /, *args: Any, **kwargs: Any) -> Any:
            first = _put_together(frozen, others)
            result = _leave_out(self._fun(first, *args, **kwargs), first, frozen.form, self._where)
            return result if self._returns_tree else _as_row(result, len(frozen.leaves))

        if self._parameters:
            name = "frozen_" + "_".join(parameter.name for parameter in self._parameters)
            before = inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY)
            of_rows.__signature__ = inspect.Signature([before, *self._parameters])  # pyright: ignore
        options = self._options | more
        options |= {
            option: [n + 1 if n >= 0 else n for n in _numbers(self._parameters, options[option])]
            for option in ("static_argnums", "donate_argnums")
            if options.get(option) is not None
        }
        return jax.jit(of_rows, **options)

    @property
    def _returns_tree(self) -> bool:
        return "out_shardings" in self._options  # which are said of the tree, and so of no row

    def _jitted_for(self, frozen: _Row, others: _Row) -> Any:
        """The compiled function; with shardings of the first argument, one for each structure it has."""
        shardings = self._options.get("in_shardings")
        if not isinstance(shardings, (tuple, list)) or not shardings:
            return self._jitted
        resolution = frozen.form
        if resolution not in self._sharded:
            by_leaf: list[Any] = [None] * len(resolution.paths)

            def note(sharding: Any, part: PyTree) -> None:
                for leaf in jax.tree.leaves(part):
                    by_leaf[leaf] = sharding

            jax.tree.map(note, shardings[0], resolution.unflatten(range(len(by_leaf))), is_leaf=lambda x: x is None)
            shardings = (*_take_apart(resolution, by_leaf), *shardings[1:])
            remember(self._sharded, resolution, self._jit(in_shardings=shardings))
        return self._sharded[resolution]

    def _rows(self, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """The first argument as two rows, whether it was given by position or by name, and the others."""
        name = self._parameters[0].name if self._parameters else ""
        if not args and name not in kwargs:
            name = getattr(self._fun, "__name__", repr(self._fun))
            raise TypeError(f"{name} takes the parameters as its first argument, and was called without.")
        first = args[0] if args else kwargs[name]
        if not args:
            kwargs = {key: value for key, value in kwargs.items() if key != name}
        leaves, treedef = jax.tree.flatten(first)
        resolution = self._selector._resolve_flat(first, leaves, treedef)
        return *_take_apart(resolution, leaves), args[1:], kwargs

    def _donations(self, others: _Row, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, PyTree]:
        """What a call donates, under the names of the arguments; that of the first goes without saying."""
        numbers, names = self._donated
        by_position = [p.name for p in self._parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        donated = {"": others} if 0 in numbers else {}
        for number, arg in enumerate(args, 1):
            if number in numbers:
                donated[by_position[number] if number < len(by_position) else f"argument {number}"] = arg
        return donated | {name: arg for name, arg in kwargs.items() if name in names}

    def _call(self, compiled_for: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        frozen, others, args, kwargs = self._rows(args, kwargs)
        donated = self._donations(others, args, kwargs)
        if donated and not set(map(id, jax.tree.leaves(donated))).isdisjoint(map(id, frozen.leaves)):
            _refuse_shared(frozen, donated, lambda leaf: {id(leaf)})
        try:
            result = compiled_for(frozen, others)(frozen, others, *args, **kwargs)
        except RuntimeError:  # say which leaf it was
            for path, leaf in zip(frozen.paths, frozen.leaves, strict=True):
                require_alive(path, leaf)
            _refuse_shared(frozen, donated, _buffers)  # two arrays can share a buffer
            raise
        return self._from_rows(frozen.leaves, result)

    def _from_rows(self, frozen: Sequence[Any], result: Any) -> PyTree:
        return _from_row(frozen, _as_row(result, len(frozen)) if self._returns_tree else result)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One step."""
        return self._call(self._jitted_for, args, kwargs)

    def trace(self, *args: Any, **kwargs: Any) -> Any:
        """As `jax.jit` has it."""
        frozen, others, args, kwargs = self._rows(args, kwargs)
        return _Stage(self._jitted_for(frozen, others).trace(frozen, others, *args, **kwargs), self._call)

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        """As `jax.jit` has it: what it is compiled to is called as the step is."""
        frozen, others, args, kwargs = self._rows(args, kwargs)
        return _Stage(self._jitted_for(frozen, others).lower(frozen, others, *args, **kwargs), self._call)

    def eval_shape(self, *args: Any, **kwargs: Any) -> Any:
        """The shapes and dtypes of what the step returns."""
        frozen, others, args, kwargs = self._rows(args, kwargs)
        result = self._jitted_for(frozen, others).eval_shape(frozen, others, *args, **kwargs)
        return self._from_rows(jax.eval_shape(lambda leaves: leaves, frozen.leaves), result)

    def clear_cache(self) -> None:
        """Forgets all that was compiled."""
        for jitted in (self._jitted, *self._sharded.values()):
            jitted.clear_cache()


def jit(
    fun: Callable[..., Any] | None = None,
    /,
    *,
    frozen: Selection = None,
    trainable: Selection = None,
    where: Where | None = None,
    **options: Any,
) -> Any:
    """`jax.jit` for a train step: frozen leaves go in and never come out.

    The step takes the parameters, or a state that holds them (a Flax `TrainState`, a tuple, a dataclass), as its first
    argument and returns their successor, alone or first in a tuple. In what the caller gets back, each frozen leaf of
    the successor is the very object that was passed in. What the step computed for it is discarded, so it is frozen
    whatever the step does; and it is neither copied, nor dispatched, nor donated.

    Args:
      fun: the step; leave it out to use `jit` as a decorator.
      frozen: what is frozen, as `freeze` takes it.
      trainable: what is not frozen, instead. Outside of what `where` names nothing is frozen.
      where: says where in the first argument the parameters are: `lambda state: state.params`. It may return a tuple
        of several parts, such as parameters and batch statistics. Paths are relative to each, a pattern has to select
        something in one of them, and a mask has the structure of what `where` returns.
      **options: those of `jax.jit`, by its names. Numbers, names and shardings count in the step's own signature.
        `donate_argnums` takes the trainable leaves of the first argument and all else that it holds, never a frozen
        leaf, so several runs can share one frozen backbone.

    Returns:
      The compiled step. It has the methods `lower`, `trace`, `eval_shape` and `clear_cache` of a `jax.jit` function,
      and what `lower(...).compile()` returns is called as the step is. It is traced again when `jax.jit` would be. A
      frozen leaf stays where it is: one on the host (a numpy array, a Python number), or under other shardings than
      `in_shardings`, is moved at each call.

    Raises:
      TypeError, ValueError: as `freeze` and `jax.jit`; the first argument is static. When called: the step does not
        return the successor of its first argument; a frozen leaf is the same buffer as one to be donated. The message
        names the paths.

    Example:
      >>> import frozen_optax as fo, jax.numpy as jnp
      >>> @fo.jit(frozen="base", donate_argnums=0)
      ... def step(params, x):
      ...     return {"base": params["base"] * 0, "scale": params["scale"] + x}
      >>> params = {"base": jnp.array([-0.0, 1.0]), "scale": jnp.array(2.0)}
      >>> new = step(params, 0.5)
      >>> new["base"] is params["base"], float(new["scale"])
      (True, 2.5)
    """
    selector = frozen_selector(frozen, trainable)
    if fun is None:
        return lambda fun: Step(fun, selector, where, options)
    return Step(fun, selector, where, options)
