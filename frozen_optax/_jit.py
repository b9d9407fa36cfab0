"""A compiled train step that takes the frozen leaves and never hands them back.

`jax.jit` copies every leaf that comes out as it went in, unless it is donated. What is compiled
(`_traced_step.py`) takes the first argument as two rows of leaves, frozen and not, and returns one
row without the frozen leaves. The caller gets back the ones that went in.

A `Step` stores; functions do the work. What is done at a call stands in `_calls.py`. Here are the
stages of a step that is compiled ahead of time, the step, and what users call.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any, Generic, ParamSpec, TypeVar, overload

import jax

from frozen_optax._calls import Call, Stored, jitted_for, result_of, run_step, with_rows
from frozen_optax._messages import quoted
from frozen_optax._resolution import Resolution
from frozen_optax._rows import InputRow, Static
from frozen_optax._selection import frozen_selector
from frozen_optax._selectors import Reads, Selector, reads
from frozen_optax._traced_step import Asked, Compiled, compile_rows
from frozen_optax._typing import Frozen, Where

P = ParamSpec("P")
R = TypeVar("R")

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


def _stage(step: Stored, method: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Stage:
    """What a method of the function under `jax.jit` makes of the arguments: `trace` or `lower`."""

    def run(call: Call) -> Stage:
        make = getattr(jitted_for(step, call.frozen), method)
        stage = make(call.frozen, call.others, *call.args, **call.kwargs)
        expected = call.frozen.resolution, call.frozen.static
        return Stage(stage, functools.partial(_run_compiled, step, *expected))

    return with_rows(step, run, args, kwargs)


def _run_compiled(
    step: Stored,
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

    return run_step(step, compiled_for, args, kwargs, step.asked.static.argnums)


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
        self._stored = Stored(asked, compile_rows(asked))

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else types.MethodType(self, instance)

    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        """One step."""
        step = self._stored
        return run_step(step, functools.partial(jitted_for, step), args, kwargs, set())

    def trace(self, /, *args: P.args, **kwargs: P.kwargs) -> Any:
        """As `jax.jit` has it."""
        return _stage(self._stored, "trace", args, kwargs)

    def lower(self, /, *args: P.args, **kwargs: P.kwargs) -> Any:
        """As `jax.jit` has it: what it is compiled to is called as the step is."""
        return _stage(self._stored, "lower", args, kwargs)

    def eval_shape(self, /, *args: P.args, **kwargs: P.kwargs) -> Any:
        """The shapes and dtypes of what the step returns."""
        step = self._stored

        def run(call: Call) -> Any:
            jitted = jitted_for(step, call.frozen)
            returned = jitted.eval_shape(call.frozen, call.others, *call.args, **call.kwargs)
            frozen = jax.eval_shape(lambda row: row, call.frozen)
            return result_of(step, frozen.leaves, returned)

        return with_rows(step, run, args, kwargs)

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

    A leaf in which an optimizer freezes elements is passed through whole, as one that trains; its
    elements are `with_frozen`'s and `apply_updates`' to keep.

    A leaf that is no array (a function, a string, a Python number in an Equinox module) is frozen,
    too, wherever it stands in the first argument. It is a part of the compiled step, which is
    traced again for another one.

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
    # A leaf that is frozen in part goes through whole, as one that trains.
    selector = frozen_selector(frozen, trainable, where, in_part=True)
    if fun is None:
        return lambda fun: Step(fun, selector, where, discard, options)
    return Step(fun, selector, where, discard, options)
