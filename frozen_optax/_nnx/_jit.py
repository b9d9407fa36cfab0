"""A step of Flax NNX, which changes its modules in place, compiled as `jit` compiles a step.

The Variables of all modules become one row of arrays, `jit` compiles a function of that row, and
what comes out of it is put back into the Variables that are not frozen.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, ParamSpec, TypeVar

import jax
from flax import nnx

from frozen_optax._jit import Stage, Step
from frozen_optax._nnx._graph import (
    Structure,
    flat_state,
    is_variable,
    raw_value_getter,
    set_raw_value,
    variables_at,
)
from frozen_optax._nnx._row import (
    Arguments,
    InRow,
    Layout,
    Outdated,
    Row,
    first_of,
    frozen_in,
    function_of_row,
    names_of,
    options_of_row,
    take_modules,
)
from frozen_optax._selectors import Reads, Selector, reads
from frozen_optax._trees import join
from frozen_optax._typing import PyTree, TreeDef

P = ParamSpec("P")
R = TypeVar("R")

# --- what is remembered of modules


_MAX_KNOWN = 8  # models that one step goes around


class _Known:
    """Modules whose Variables have been looked up, so that the next call need not walk them.

    It holds on to parts of the modules: `drop` is called when the first of them is gone.
    """

    def __init__(
        self,
        layout: Layout,
        modules: Sequence[Any],
        places: TreeDef,
        structure: Structure,
        variables: Sequence[Any],
        drop: Callable[[Any], None],
    ):
        self._layout = layout
        self._places = places
        self._variables = variables
        self._raw_value = raw_value_getter()
        self._structure = structure
        self._holding = jax.tree.structure(self._values())
        self._roots = [weakref.ref(module, drop) for module in modules]
        pairs = zip(variables, layout.frozen, strict=True)
        self._trained = [(i, variable) for i, (variable, frozen) in enumerate(pairs) if not frozen]

    def __deepcopy__(self, memo: Any) -> None:
        """A copy of a step looks at its modules anew."""
        return

    def _values(self) -> list[PyTree]:
        return list(map(self._raw_value, self._variables))

    def row(self, modules: Sequence[Any], places: TreeDef) -> Row | None:
        """What the Variables hold, if these are the modules, still put together as they were.

        They have to stand at the same places of the arguments: the first is the one that is frozen.
        """
        if places != self._places:
            return None
        pairs = zip(self._roots, modules, strict=True)
        if not (all(root() is module for root, module in pairs) and self._structure.is_unchanged()):
            return None
        values = self._values()
        return Row(values, self._layout) if jax.tree.structure(values) == self._holding else None

    def put(self, row: Row) -> None:
        """Puts what a step has made into the Variables that are not frozen."""
        for index, variable in self._trained:
            set_raw_value(variable, row.values[index])


# --- the step


class NnxStep(Generic[P, R]):
    """What `nnx_jit` makes of a train step. It is called as the step is."""

    __wrapped__: Callable[P, R]

    def __init__(
        self,
        fun: Callable[P, R],
        selector: Selector,
        wrt: Any,
        discard: bool,
        options: dict[str, Any],
    ):
        functools.update_wrapper(self, fun, updated=())
        self._selector, self._wrt = selector, wrt
        self._of_row = function_of_row(fun, selector, wrt)
        options = options_of_row(fun, options)
        self._make = functools.partial(Step, self._of_row, InRow(selector), None, discard, options)
        self._layouts: dict[Hashable, Layout] = {}  # one for each that is compiled
        self._steps: dict[Layout, Step[..., Any]] = {}  # one for each, which goes on as it began
        # By where the modules lie in memory, which is theirs until they are gone, and so is this.
        self._known: dict[tuple[int, ...], _Known] = {}

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else types.MethodType(self, instance)

    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        """One step. The modules are changed in place."""
        return self._run(self._compiled, args, kwargs)

    def trace(self, /, *args: P.args, **kwargs: P.kwargs) -> Stage:
        """As `jax.jit` has it."""
        return self._stage("trace", args, kwargs)

    def lower(self, /, *args: P.args, **kwargs: P.kwargs) -> Stage:
        """As `jax.jit` has it: what it is compiled to is called as the step is."""
        return self._stage("lower", args, kwargs)

    def clear_cache(self) -> None:
        """Forgets all that was compiled."""
        self._known.clear()
        for step in self._steps.values():
            step.clear_cache()

    def _step_for(self, row: Row) -> Step[..., Any]:
        step = self._steps.get(row.layout)
        return self._steps.setdefault(row.layout, self._make()) if step is None else step

    def _compiled(self, row: Row, /, *args: Any, **kwargs: Any) -> Any:
        return self._step_for(row)(row, *args, **kwargs)

    def _run(self, step: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        modules, others = take_modules((args, kwargs))
        row, put = self._look(modules, others, (args, kwargs))
        try:
            row, result = step(row, *others[0], **others[1])
        except Outdated:
            self._known.clear()
        else:
            put(row)
            return result
        row, put = self._look(modules, others, (args, kwargs))
        try:
            row, result = step(row, *others[0], **others[1])
        except Outdated:
            raise ValueError(
                f"what {self._selector!r} freezes of these modules is not what it freezes of them "
                "in a trace, where arrays on the host have other dtypes: 32 bits where 64 are not "
                "enabled. Put jnp.asarray(...) of them into their Variables."
            ) from None
        put(row)
        return result

    def _stage(self, method: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Stage:
        modules, others = take_modules((args, kwargs))
        row, _ = self._look(modules, others, (args, kwargs))
        make = getattr(self._step_for(row), method)
        return Stage(make(row, *others[0], **others[1]), self._run)

    def _look(
        self, modules: Sequence[Any], others: Arguments, arguments: Arguments
    ) -> tuple[Row, Callable[[Row], None]]:
        """The row of the modules, and how to put the next one into them."""
        places = jax.tree.structure(others)
        key = tuple(map(id, modules))
        known = self._known.get(key)
        if known is not None and (row := known.row(modules, places)) is not None:
            return row, known.put
        row = self._row(modules, arguments, self._selector)
        at = dict(variables_at(list(modules)))
        variables = [at.get(path) for path, _ in flat_state(row.state())]
        structure = Structure(modules)
        is_slow = (
            not structure.is_known
            or any(variable is None for variable in variables)  # an array is itself an attribute
            or any(map(is_variable, modules))  # which no weak reference can be made to
            or reads(self._selector) is Reads.VALUES
        )
        if is_slow:  # NNX's own way
            return row, lambda row: nnx.update(list(modules), row.state())
        owner = weakref.ref(self)

        def drop(_: Any) -> None:
            if (step := owner()) is not None:
                step._known.pop(key, None)

        known = _Known(row.layout, modules, places, structure, variables, drop)
        for oldest in list(self._known)[: 1 - _MAX_KNOWN]:
            self._known.pop(oldest, None)
        self._known[key] = known
        return row, known.put

    def _row(self, modules: Sequence[Any], arguments: Arguments, selector: Selector) -> Row:
        """The row of the modules, as NNX takes them apart."""
        model = first_of(self.__wrapped__, arguments)
        graphdef, state = nnx.split(list(modules))
        frozen = frozen_in(selector, self._wrt, model, modules, state)
        names = names_of(self.__wrapped__, arguments)
        paths = [
            join(names[index], "/".join(map(str, path))) for (index, *path), _ in flat_state(state)
        ]
        layout = Layout(graphdef, jax.tree.structure(state), tuple(paths), frozen)
        key = (layout.graphdef, layout.treedef, layout.paths, layout.frozen)
        layout = self._layouts.setdefault(key, layout)
        return Row.of_state(state, layout)

    def opened(
        self, args: Sequence[Any], selector: Selector, wrt: Any = None
    ) -> tuple[Callable[..., Any], tuple[Any, ...], Selector]:
        """The step as a function of arrays, its arguments, and what is frozen of the first."""
        if wrt is not None and wrt != self._wrt:
            raise ValueError(
                f"the filter was made with wrt={wrt!r}, and the step with wrt={self._wrt!r}. Say "
                "the same to both."
            )
        modules, (others, _) = take_modules((args, {}))
        return self._of_row, (self._row(modules, (args, {}), selector), *others), InRow(selector)
