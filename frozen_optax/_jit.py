"""A compiled train step that takes the frozen leaves and never hands them back: the caller keeps those he has.

`jax.jit` copies every leaf that comes out as it went in, unless it is donated. What is compiled here takes the first
argument as two rows of leaves, frozen and not, and returns one row, which leaves out the frozen leaves of the
successor, whatever the step computed for them.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import operator
import types
from collections.abc import Callable, Sequence
from typing import Any

import jax

from frozen_optax._bits import is_key
from frozen_optax._places import Where, Within
from frozen_optax._rows import Row, as_row, from_row, is_kept, leave_out, put_together, successor_of, take_apart
from frozen_optax._selection import Selection, Selector, frozen_selector
from frozen_optax._trees import (
    PyTree,
    Resolution,
    is_hole,
    is_traced,
    join,
    keystr,
    leaves_if,
    require_alive,
)


def _listed(one_or_more: Any) -> list[Any]:
    try:
        return [one_or_more] if isinstance(one_or_more, str) else [operator.index(one_or_more)]
    except TypeError:
        return list(one_or_more)


class _Signature:
    """The arguments of a step: what jax's options say of them by number, by name, or by either as jax completes it."""

    def __init__(self, fun: Callable[..., Any]):
        try:
            self.parameters = list(inspect.signature(fun).parameters.values())
        except (TypeError, ValueError):  # a builtin
            self.parameters = []
        by_number = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self.by_number = [p.name for p in self.parameters if p.kind in by_number]
        self.by_both = {p.name: i for i, p in enumerate(self.parameters) if p.kind is p.POSITIONAL_OR_KEYWORD}
        self.is_open = not self.parameters or any(p.kind is p.VAR_POSITIONAL for p in self.parameters)
        if not self.by_number and not self.is_open:
            raise TypeError("the step takes no argument by position, and the parameters are its first.")

    def complete(self, argnums: Any, argnames: Any) -> tuple[set[int], set[str]]:
        """The numbers and the names of the arguments that an option speaks of."""
        numbers: set[int] = set(argnums or ())
        names: set[str] = set(argnames or ())
        if argnames is None:
            names = {name for name, number in self.by_both.items() if number in numbers}
        elif argnums is None:
            numbers = {number for name, number in self.by_both.items() if name in names}
        return numbers, names

    def count(self, option: str, argnums: Any) -> list[int]:
        """Numbers, counted from the first argument."""
        count = len(self.by_number)
        for number in argnums if not self.is_open else ():
            if not -count <= number < count:
                raise ValueError(f"{option} names the argument {number}, and the step takes {count} by position.")
        return [number + count if number < 0 and not self.is_open else number for number in argnums]

    def name(self, number: int) -> str:
        """What to call an argument."""
        return self.by_number[number] if number < len(self.by_number) else f"argument {number}"


def _buffers(leaf: Any) -> set[Any]:
    """Where the values of an array lie in memory."""
    if is_key(leaf):
        leaf = jax.random.key_data(leaf)
    return {(shard.device, shard.data.unsafe_buffer_pointer()) for shard in leaf.addressable_shards}


def _refuse_shared(frozen: Row, donated: dict[str, PyTree], identify: Callable[[Any], set[Any]]) -> None:
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
        if name.startswith("_"):  # while it is copied it has no stage yet
            raise AttributeError(name)
        return getattr(self._stage, name)

    def lower(self, **options: Any) -> _Stage:
        return _Stage(self._stage.lower(**options), self._call)

    def compile(self, *args: Any, **options: Any) -> _Stage:
        return _Stage(self._stage.compile(*args, **options), self._call)

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        return self._call(self._stage, args, kwargs)


class Step:
    """What `jit` makes of a train step: it is called as the step is, and has the methods of a `jax.jit` function."""

    def __init__(self, fun: Callable[..., Any], selector: Selector, where: Where | None, options: dict[str, Any]):
        functools.update_wrapper(self, fun, updated=())
        self._fun, self._where = fun, where
        self._selector = selector if where is None else Within(selector, where)
        self._signature = signature = _Signature(fun)
        self._options: dict[str, Any] = {
            option: _listed(value) if option.endswith(("_argnums", "_argnames")) and value is not None else value
            for option, value in options.items()
        }
        for option in ("static_argnums", "donate_argnums"):
            if self._options.get(option) is not None:
                self._options[option] = signature.count(option, self._options[option])
        said = lambda kind: (self._options.get(f"{kind}_{by}") for by in ("argnums", "argnames"))
        self._static, self._donated = (signature.complete(*said(kind)) for kind in ("static", "donate"))
        if 0 in self._static[0]:
            raise ValueError("the first argument holds the parameters, so it cannot be static.")
        if any(self._donated) and not self._options.setdefault("keep_unused", True):
            raise ValueError(
                "keep_unused=False together with donation: a frozen leaf that the program does not read could share a "
                "buffer with a donated one, and nothing would notice. Leave keep_unused out."
            )
        self._sharded: dict[Any, Any] = {}
        self._last: Resolution | None = None
        self._checked: Resolution | None = None  # the one whose first call had no buffer at two places
        self._jitted = self._jit()

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else types.MethodType(self, instance)

    def _jit(self, **more: Any) -> Any:
        """The function of rows, compiled; the frozen leaves come before all arguments, so numbers shift by one."""

        @functools.wraps(self._fun)
        def of_rows(frozen: Row, others: Row, /, *args: Any, **kwargs: Any) -> Any:
            result = self._fun(put_together(frozen, others), *args, **kwargs)
            first = put_together(frozen, others)  # the step may have put other things into the one it was given
            leaves, treedef = leave_out(result, successor_of(result, first, self._where), frozen.form)
            if self._returns_tree:
                return jax.tree.unflatten(treedef, leaves)
            return as_row(leaves, treedef, len(frozen.leaves))

        if parameters := self._signature.parameters:
            name = "frozen_" + "_".join(parameter.name for parameter in parameters)
            before = inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY)
            of_rows.__signature__ = inspect.Signature([before, *parameters])  # pyright: ignore
        options: dict[str, Any] = self._options | more
        for option in ("static_argnums", "donate_argnums"):
            if numbers := options.get(option):
                options[option] = [number + 1 if number >= 0 else number for number in numbers]
        return jax.jit(of_rows, **options)

    @property
    def _returns_tree(self) -> bool:
        return "out_shardings" in self._options  # which are said of the tree, and so of no row

    def _jitted_for(self, frozen: Row, others: Row) -> Any:
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

            try:
                jax.tree.map(note, shardings[0], resolution.unflatten(range(len(by_leaf))), is_leaf=lambda x: x is None)
            except ValueError as error:
                raise ValueError(f"in_shardings[0] is no prefix of the first argument: {error}") from None
            shardings = (*take_apart(resolution, by_leaf), *shardings[1:])
            self._sharded[resolution] = self._jit(in_shardings=shardings)
        return self._sharded[resolution]

    def _rows(self, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """The first argument as two rows, whether it was given by position or by name, and the others."""
        name = next(iter(self._signature.by_both), "")
        if not args and self._signature.by_both.get(name) == 0 and name in kwargs:
            args = (kwargs[name],)
            kwargs = {key: value for key, value in kwargs.items() if key != name}
        if not args:
            name = getattr(self._fun, "__name__", repr(self._fun))
            raise TypeError(f"{name} takes the parameters as its first argument, and was called without one.")
        first = args[0]
        resolution = self._last  # in training the next tree is like the last one
        leaves = leaves_if(resolution.treedef, first) if resolution else None
        if resolution is None or leaves is None:
            leaves, treedef = jax.tree.flatten(first)
            resolution = self._selector._resolve_flat(first, leaves, treedef)
            self._last = resolution if self._selector._reads == 0 else None
        return *take_apart(resolution, leaves), args[1:], kwargs

    def _donations(self, others: Row, args: Any, kwargs: Any, skipped: set[int]) -> dict[str, PyTree]:
        """What a call donates, under the names of the arguments; that of the first goes without saying."""
        numbers, names = self._donated
        donated = {"": others} if 0 in numbers else {}
        given = (number for number in itertools.count(1) if number not in skipped)
        donated |= {self._signature.name(n): arg for n, arg in zip(given, args, strict=False) if n in numbers}
        return donated | {name: arg for name, arg in kwargs.items() if name in names}

    def _call(self, compiled_for: Callable[..., Any], args: Any, kwargs: Any, skipped: set[int]) -> Any:
        """One step, by a compiled function that takes all arguments but those skipped."""
        frozen, others, args, kwargs = self._rows(args, kwargs)
        if any(self._donated) and frozen.form is not self._checked:
            # The runtime sees it at any call. Here it is seen before the first compilation, and before the runtime has
            # begun on some of several devices: after that, jax 0.7.0 can wait for the others for ever.
            _refuse_shared(frozen, self._donations(others, args, kwargs, skipped), lambda leaf: {id(leaf)})
            self._checked = frozen.form
        try:
            result = compiled_for(frozen, others)(frozen, others, *args, **kwargs)
        except (RuntimeError, ValueError) as error:  # the latter from a step that was compiled ahead of time
            if "deleted" in str(error):  # say which leaf it was
                for path, leaf in zip(frozen.paths, frozen.leaves, strict=True):
                    require_alive(path, leaf)
            if "donate" in str(error):
                _refuse_shared(frozen, self._donations(others, args, kwargs, skipped), _buffers)
            raise
        return self._from_rows(frozen.leaves, result)

    def _call_compiled(self, compiled: Any, args: Any, kwargs: Any) -> Any:
        return self._call(lambda *_: compiled, args, kwargs, self._static[0])  # it is called without those

    def _from_rows(self, frozen: Sequence[Any], result: Any) -> PyTree:
        if self._returns_tree:
            result = as_row(*jax.tree.flatten(result, is_leaf=lambda x: is_kept(x) or is_hole(x)), len(frozen))
        return from_row(frozen, result)

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """One step."""
        return self._call(self._jitted_for, args, kwargs, set())

    def trace(self, /, *args: Any, **kwargs: Any) -> Any:
        """As `jax.jit` has it."""
        frozen, others, args, kwargs = self._rows(args, kwargs)
        return _Stage(self._jitted_for(frozen, others).trace(frozen, others, *args, **kwargs), self._call_compiled)

    def lower(self, /, *args: Any, **kwargs: Any) -> Any:
        """As `jax.jit` has it: what it is compiled to is called as the step is."""
        frozen, others, args, kwargs = self._rows(args, kwargs)
        return _Stage(self._jitted_for(frozen, others).lower(frozen, others, *args, **kwargs), self._call_compiled)

    def eval_shape(self, /, *args: Any, **kwargs: Any) -> Any:
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
        something in one of them, and a mask has the structure of what `where` returns. It is called on trees of
        `jax.ShapeDtypeStruct`, too.
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
    if fun is not None and not callable(fun):
        raise TypeError(f"jit takes a function, found {fun!r}. What is frozen goes by name: jit(step, frozen={fun!r}).")
    if where is not None and not callable(where):
        raise TypeError(f"where= is a function, found {where!r}. Write where=lambda state: state.params.")
    selector = frozen_selector(frozen, trainable)
    if fun is None:
        return lambda fun: jit(fun, frozen=selector, where=where, **options)
    return Step(fun, selector, where, options)
