"""What is compiled: a step as a function of rows of leaves, and what is seen while it is traced.

The first argument comes as two rows, frozen and not. One row goes out, which leaves out the frozen
leaves of the successor, whatever the step computed for them.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax

from frozen_optax._proofs._changes import refuse_discards
from frozen_optax._resolution import Resolution
from frozen_optax._rows import InputRow, as_row, combine_rows, leave_out
from frozen_optax._selectors import Reads, Selector, reads, resolve
from frozen_optax._signature import Arguments, Signature, as_list
from frozen_optax._typing import PyTree, Where
from frozen_optax._where import successor_of

# A function that jax has compiled, or will when it is called; jax has no public name for its type.
Compiled: TypeAlias = Any


@dataclasses.dataclass(frozen=True, eq=False)
class Asked:
    """What `jit` was asked for.

    Attributes:
      fun: the step.
      selector: the frozen leaves of its first argument.
      where: where in the first argument the parameters are.
      discard: whether what it makes of frozen leaves may be thrown away.
      signature: its parameters.
      options: those of `jax.jit`, about the step's own arguments.
      static: the arguments that are static.
      donated: those that are donated. Of the first, only what is not frozen.
    """

    fun: Callable[..., Any]
    selector: Selector
    where: Where | None
    discard: bool
    signature: Signature
    options: dict[str, Any]
    static: Arguments
    donated: Arguments

    @property
    def name(self) -> str:
        """What to call the step."""
        return getattr(self.fun, "__name__", repr(self.fun))

    @property
    def returns_tree(self) -> bool:
        """Whether the compiled function returns the result as a tree, and not as a row."""
        return "out_shardings" in self.options  # which are said of the tree, and so of no row

    @classmethod
    def of(
        cls,
        fun: Callable[..., Any],
        selector: Selector,
        where: Where | None,
        discard: bool,
        options: dict[str, Any],
    ) -> Asked:
        signature = Signature(fun)
        options = dict(options)
        for option, said in options.items():
            if option.endswith(("_argnums", "_argnames")) and said is not None:
                options[option] = as_list(said)
        for option in ("static_argnums", "donate_argnums"):
            if options.get(option) is not None:
                options[option] = signature.from_the_first(option, options[option])
        static = signature.complete(options.get("static_argnums"), options.get("static_argnames"))
        donated = signature.complete(options.get("donate_argnums"), options.get("donate_argnames"))
        if 0 in static.argnums:
            raise ValueError("the first argument holds the parameters, so it cannot be static.")
        # jax drops an argument that the program does not read, and compares its buffer with none: a
        # frozen leaf that is also donated elsewhere would be overwritten. So all are kept.
        if any(donated) and not options.setdefault("keep_unused", True):
            raise ValueError(
                "keep_unused=False together with donation: a frozen leaf that the program does not "
                "read could share a buffer with a donated one, and nothing would notice. Leave "
                "keep_unused out."
            )
        return cls(fun, selector, where, discard, signature, options, static, donated)


# --- the function that is compiled


class Outdated(Exception):
    """What is frozen was found for leaves of other shapes or dtypes than those that are traced."""


def require_up_to_date(asked: Asked, frozen: InputRow, others: InputRow) -> None:
    """Raise if other leaves are frozen by now, as the selector reads shapes and they have changed.

    A call looks at the structure alone, as looking at each leaf costs time. What has other shapes
    is traced anew, so a trace is the place to look at them.
    """
    if reads(asked.selector) is not Reads.SHAPES:
        return
    if resolve(asked.selector, combine_rows(frozen, others)) != frozen.resolution:
        raise Outdated


class _OtherArguments:
    """The arguments of a step but the first, as they were before the step could change them."""

    def __init__(self, asked: Asked, args: Sequence[Any], kwargs: dict[str, Any]):
        self._fun = asked.fun
        self._by_position: list[str] = []
        self._by_name = list(kwargs)
        self._static: dict[str, Any] = {}
        traced: dict[str, PyTree] = {}
        for argnum, arg in enumerate(args, 1):
            name = asked.signature.name(argnum)
            self._by_position.append(name)
            (self._static if argnum in asked.static.argnums else traced)[name] = arg
        for name, arg in kwargs.items():
            (self._static if name in asked.static.argnames else traced)[name] = arg
        self._names = list(traced)
        self._leaves, self._treedef = jax.tree.flatten(list(traced.values()))

    def traced(self) -> dict[str, PyTree]:
        """Those that are not static, by their names, in new containers."""
        values = jax.tree.unflatten(self._treedef, self._leaves)
        return dict(zip(self._names, values, strict=True))

    def call(self, first: PyTree, *traced: PyTree) -> Any:
        """The step on a first argument, and on these in place of those that are not static."""
        every = self._static | dict(zip(self._names, traced, strict=True))
        by_position = [every[name] for name in self._by_position]
        return self._fun(first, *by_position, **{name: every[name] for name in self._by_name})


def _in_doubt(
    resolution: Resolution, first: PyTree, result: PyTree, successor: Sequence[tuple[int, int]]
) -> Resolution | None:
    """The frozen leaves that come out as other tracers than went in, if there are any.

    They may still be what went in: `p + 0` is another tracer. One that is the same is not looked at
    any more, so a step that hands its frozen leaves on is traced once.
    """
    before, after = jax.tree.leaves(first), jax.tree.leaves(result)
    others = {
        ours
        for ours, theirs in successor
        if resolution.selected[ours] and after[theirs] is not before[ours]
    }
    if not others:
        return None
    selected = tuple(index in others for index in range(len(before)))
    return dataclasses.replace(resolution, selected=selected)


def _of_rows(asked: Asked) -> Callable[..., Any]:
    """The step as a function of the first argument in two rows, and of the others."""

    @functools.wraps(asked.fun)
    def of_rows(frozen: InputRow, others: InputRow, /, *args: Any, **kwargs: Any) -> Any:
        require_up_to_date(asked, frozen, others)
        resolution = frozen.resolution
        arguments = _OtherArguments(asked, args, kwargs)
        result = asked.fun(combine_rows(frozen, others), *args, **kwargs)
        # Made anew, as the step may have put other things into the one that it was given.
        first = combine_rows(frozen, others)
        successor = successor_of(result, first, asked.where)
        in_doubt = None if asked.discard else _in_doubt(resolution, first, result, successor)
        if in_doubt is not None:
            named = {asked.signature.name(0): first, **arguments.traced()}
            refuse_discards(arguments.call, named, in_doubt, asked.where)
        nodes, treedef = leave_out(result, successor, resolution, frozen.objects)
        if asked.returns_tree:
            return jax.tree.unflatten(treedef, nodes)
        return as_row(nodes, treedef, len(frozen.leaves))

    # jax reads the names of arguments from the signature. There is one more here, and no other may
    # have its name.
    if parameters := asked.signature.parameters:
        name = "frozen_" + "_".join(parameter.name for parameter in parameters)
        before = inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY)
        of_rows.__signature__ = inspect.Signature([before, *parameters])  # pyright: ignore
    return of_rows


def compile_rows(asked: Asked, **more: Any) -> Compiled:
    """The function of rows under `jax.jit`."""
    options = asked.options | more
    for option in ("static_argnums", "donate_argnums"):
        if argnums := options.get(option):
            # The frozen leaves come before all arguments. What counts from the last stays.
            options[option] = [argnum + 1 if argnum >= 0 else argnum for argnum in argnums]
    return jax.jit(_of_rows(asked), **options)
