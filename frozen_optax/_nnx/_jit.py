"""A step of Flax NNX, which changes its modules in place, compiled as `jit` compiles a step.

The Variables of all modules become one row of arrays, `jit` compiles a function of that row, and
what comes out of it is put back into the Variables that are not frozen.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, Generic, NoReturn, ParamSpec, TypeAlias, TypeVar

import jax
import numpy as np
from flax import nnx

from frozen_optax._jit import Stage, Step
from frozen_optax._messages import quoted
from frozen_optax._nnx._graph import (
    Structure,
    flat_state,
    frozen_among,
    is_module,
    is_variable,
    parameters_of,
    raw_value_getter,
    set_raw_value,
    variables_at,
)
from frozen_optax._selectors import Reads, Selector, reads
from frozen_optax._signature import Signature, as_list
from frozen_optax._trees import View, join, keystr
from frozen_optax._typing import PyTree, TreeDef

P = ParamSpec("P")
R = TypeVar("R")

# The arguments of a call, by position and by name.
Arguments: TypeAlias = tuple[Sequence[Any], dict[str, Any]]

# --- the Variables of all modules as one argument


# jax prints what it finds to be different, and what these hold is as large as the modules.
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _Layout:
    """How modules are put together around what their Variables hold. It compares by identity.

    Attributes:
      graphdef: the modules without it, as `nnx.split` has them.
      treedef: the structure of the state that `nnx.split` takes out of them.
      paths: of the Variables.
      frozen: which of them are frozen.
    """

    graphdef: Any
    treedef: TreeDef
    paths: tuple[str, ...]
    frozen: tuple[bool, ...]


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, repr=False)
class _Row:
    """What the Variables hold. To jax each is known by its path."""

    values: Sequence[PyTree]
    layout: _Layout

    @classmethod
    def of_state(cls, state: PyTree, layout: _Layout) -> _Row:
        """What the Variables of a state hold."""
        value_of = raw_value_getter()
        at = [node for _, node in flat_state(state)]
        return cls([value_of(n) if is_variable(n) else n for n in at], layout)

    def state(self) -> PyTree:
        """The state again, as `nnx.split` has it."""
        return jax.tree.unflatten(self.layout.treedef, jax.tree.leaves(list(self.values)))

    def tree_flatten_with_keys(self) -> tuple[Iterable[Any], _Layout]:
        keys = map(jax.tree_util.DictKey, self.layout.paths)
        return tuple(zip(keys, self.values, strict=True)), self.layout

    def tree_flatten(self) -> tuple[Sequence[PyTree], _Layout]:
        return self.values, self.layout

    @classmethod
    def tree_unflatten(cls, layout: _Layout, values: Sequence[PyTree]) -> _Row:
        return cls(values, layout)


@dataclasses.dataclass(frozen=True, repr=False)
class _InRow(Selector):
    """The frozen leaves of a row, which its layout tells. `part` has selected them."""

    part: Selector

    @property
    def _may_be_empty(self) -> bool:
        return True  # what is an error was one when the layout was made

    @property
    def _may_be_all(self) -> bool:
        return True

    def _select(self, view: View) -> np.ndarray:
        counts = [len(jax.tree.leaves(value)) for value in view.tree.values]
        return np.repeat(np.array(view.tree.layout.frozen, bool), counts)

    def __repr__(self) -> str:
        return repr(self.part)


# --- arguments with and without modules


@functools.partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["index"])
@dataclasses.dataclass(frozen=True)
class _Place:
    """Stands in an argument for a module, by its index among all of them."""

    index: int


def _take_modules(arguments: Arguments) -> tuple[list[Any], Arguments]:
    """The modules in the arguments of a call, and the arguments with a place for each."""
    modules: list[Any] = []

    def take(node: PyTree) -> PyTree:
        if not is_module(node):
            return node
        modules.append(node)
        return _Place(len(modules) - 1)

    return modules, jax.tree.map(take, arguments, is_leaf=is_module)


def _put_modules(modules: Sequence[Any], arguments: Arguments) -> Arguments:
    """The arguments again."""
    is_place = lambda node: isinstance(node, _Place)
    put = lambda node: modules[node.index] if is_place(node) else node
    return jax.tree.map(put, arguments, is_leaf=is_place)


def _first(fun: Callable[..., Any], arguments: Arguments) -> Any:
    """The first argument, which holds the model."""
    args, kwargs = arguments
    if args:
        return args[0]
    names = Signature(fun).positional
    if names and names[0] in kwargs:
        return kwargs[names[0]]
    raise TypeError("nnx_jit takes the model as the first argument of a step, and found none.")


def _names(fun: Callable[..., Any], arguments: Arguments) -> list[str]:
    """What to call the modules, in their order: by argument, of which the first has no name."""
    args, kwargs = arguments
    signature = Signature(fun)
    by_name = {signature.name(argnum): arg for argnum, arg in enumerate(args)}
    by_name |= dict(sorted(kwargs.items()))
    first = signature.name(0)
    names: list[str] = []
    for name, argument in by_name.items():
        for path, node in jax.tree_util.tree_leaves_with_path(argument, is_leaf=is_module):
            if is_module(node):
                names.append(join("" if name == first else name, keystr(path)))
    return names


# --- the function of the row


class _Outdated(Exception):
    """What is frozen was found for Variables of other shapes than those that are traced."""


def _frozen_in(
    selector: Selector, wrt: Any, model: PyTree, modules: Sequence[Any], state: PyTree
) -> tuple[bool, ...]:
    """Which of the Variables in the state of some modules are frozen. No other than parameters."""
    frozen = frozen_among(selector, parameters_of(model, wrt))
    at = dict(variables_at(list(modules)))
    is_parameter = nnx.filterlib.to_predicate(wrt)
    for path, node in flat_state(state):
        if at.get(path) is None and is_variable(node) and is_parameter(path[1:], node):
            raise ValueError(
                f"the parameter {'/'.join(map(str, path[1:]))!r} stands in a node of another kind "
                "than modules, lists, dicts and pytrees, in which it cannot be told whether it is "
                "frozen."
            )
    return tuple(frozen.get(id(at.get(path)), False) for path, _ in flat_state(state))


def _refuse_modules(result: PyTree, modules: Sequence[Any]) -> None:
    """Raise where a step returns what it was given to be changed in place."""
    own = {id(variable) for _, variable in variables_at(list(modules))}
    for path, node in jax.tree_util.tree_leaves_with_path(result, is_leaf=is_module):
        if id(node) in own or (is_module(node) and not is_variable(node)):
            raise TypeError(
                f"the step returns {type(node).__name__}, a module or a part of one, at "
                f"{keystr(path) or 'the root'!r} of its result, and modules are changed in place: "
                "the caller has it. Return what else there is, or nothing."
            )


def _refuse_other_structure(before: PyTree, after: PyTree) -> NoReturn:
    """Raise for a step that puts modules together anew, with the Variables that tell of it."""
    paths = [{"/".join(map(str, path[1:])) for path, _ in flat_state(s)} for s in (before, after)]
    changed = sorted(paths[0] ^ paths[1])
    what = f"Variables come or go: {quoted(changed)}" if changed else "an attribute is set"
    raise ValueError(
        f"the step puts its modules together in another way: {what} (as by sow, or model.eval()). "
        "It may change what Variables hold; do the rest before the step."
    )


def _of_row(fun: Callable[..., Any], selector: Selector, wrt: Any) -> Callable[..., Any]:
    """A step that changes modules in place, as a function of the row that returns the next one."""

    @functools.wraps(fun)
    def of_row(row: _Row, /, *args: Any, **kwargs: Any) -> tuple[_Row, Any]:
        layout = row.layout
        modules = nnx.merge(layout.graphdef, row.state())
        given = _put_modules(modules, (args, kwargs))
        if reads(selector) is Reads.SHAPES:
            model = _first(fun, given)
            if _frozen_in(selector, wrt, model, modules, row.state()) != layout.frozen:
                raise _Outdated
        result = fun(*given[0], **given[1])
        _refuse_modules(result, modules)
        graphdef, state = nnx.split(modules)
        if graphdef != layout.graphdef or jax.tree.structure(state) != layout.treedef:
            _refuse_other_structure(row.state(), state)
        return _Row.of_state(state, layout), result

    if parameters := Signature(fun).parameters:
        name = "modules"
        while any(parameter.name == name for parameter in parameters):
            name += "_"
        before = inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY)
        of_row.__signature__ = inspect.Signature([before, *parameters])  # pyright: ignore
    return of_row


def _of_row_options(fun: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
    """Options of `jax.jit` for the function of the row, which comes before all arguments."""
    options = dict(options)
    for option in ("in_shardings", "out_shardings"):
        if options.pop(option, None) is not None:
            raise TypeError(
                f"nnx_jit takes no {option}: what Variables hold stays where it is. Put it there "
                "before the first step: nnx.update(model, jax.device_put(nnx.state(model), ...))."
            )
    signature = Signature(fun)
    numbers = options.get("donate_argnums"), options.get("donate_argnames")
    as_lists = [None if said is None else as_list(said) for said in numbers]
    if as_lists[0] is not None:
        as_lists[0] = signature.from_the_first("donate_argnums", as_lists[0])
    donates_modules = 0 in signature.complete(*as_lists).argnums
    for option in ("static_argnums", "donate_argnums"):
        if options.get(option) is not None:
            argnums = signature.from_the_first(option, as_list(options[option]))
            options[option] = [argnum + 1 for argnum in argnums]
    if donates_modules:
        options["donate_argnums"] = [0, *(options.get("donate_argnums") or ())]
    return options


# --- what is remembered of modules


_MAX_KNOWN = 8  # models that one step goes around


class _Known:
    """Modules whose Variables have been looked up, so that the next call need not walk them.

    It holds on to parts of the modules: `drop` is called when the first of them is gone.
    """

    def __init__(
        self,
        layout: _Layout,
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

    def row(self, modules: Sequence[Any], places: TreeDef) -> _Row | None:
        """What the Variables hold, if these are the modules, still put together as they were.

        They have to stand at the same places of the arguments: the first is the one that is frozen.
        """
        if places != self._places:
            return None
        pairs = zip(self._roots, modules, strict=True)
        if not (all(root() is module for root, module in pairs) and self._structure.is_unchanged()):
            return None
        values = self._values()
        return _Row(values, self._layout) if jax.tree.structure(values) == self._holding else None

    def put(self, row: _Row) -> None:
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
        self._of_row = _of_row(fun, selector, wrt)
        options = _of_row_options(fun, options)
        self._make = functools.partial(Step, self._of_row, _InRow(selector), None, discard, options)
        self._layouts: dict[Hashable, _Layout] = {}  # one for each that is compiled
        self._steps: dict[_Layout, Step[..., Any]] = {}  # one for each, which goes on as it began
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

    def _step_for(self, row: _Row) -> Step[..., Any]:
        step = self._steps.get(row.layout)
        return self._steps.setdefault(row.layout, self._make()) if step is None else step

    def _compiled(self, row: _Row, /, *args: Any, **kwargs: Any) -> Any:
        return self._step_for(row)(row, *args, **kwargs)

    def _run(self, step: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        modules, others = _take_modules((args, kwargs))
        row, put = self._look(modules, others, (args, kwargs))
        try:
            row, result = step(row, *others[0], **others[1])
        except _Outdated:
            self._known.clear()
        else:
            put(row)
            return result
        row, put = self._look(modules, others, (args, kwargs))
        try:
            row, result = step(row, *others[0], **others[1])
        except _Outdated:
            raise ValueError(
                f"what {self._selector!r} freezes of these modules is not what it freezes of them "
                "in a trace, where arrays on the host have other dtypes: 32 bits where 64 are not "
                "enabled. Put jnp.asarray(...) of them into their Variables."
            ) from None
        put(row)
        return result

    def _stage(self, method: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Stage:
        modules, others = _take_modules((args, kwargs))
        row, _ = self._look(modules, others, (args, kwargs))
        make = getattr(self._step_for(row), method)
        return Stage(make(row, *others[0], **others[1]), self._run)

    def _look(
        self, modules: Sequence[Any], others: Arguments, arguments: Arguments
    ) -> tuple[_Row, Callable[[_Row], None]]:
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

    def _row(self, modules: Sequence[Any], arguments: Arguments, selector: Selector) -> _Row:
        """The row of the modules, as NNX takes them apart."""
        model = _first(self.__wrapped__, arguments)
        graphdef, state = nnx.split(list(modules))
        frozen = _frozen_in(selector, self._wrt, model, modules, state)
        names = _names(self.__wrapped__, arguments)
        paths = [
            join(names[index], "/".join(map(str, path))) for (index, *path), _ in flat_state(state)
        ]
        layout = _Layout(graphdef, jax.tree.structure(state), tuple(paths), frozen)
        key = (layout.graphdef, layout.treedef, layout.paths, layout.frozen)
        layout = self._layouts.setdefault(key, layout)
        return _Row.of_state(state, layout)

    def opened(
        self, args: Sequence[Any], selector: Selector, wrt: Any = None
    ) -> tuple[Callable[..., Any], tuple[Any, ...], Selector]:
        """The step as a function of arrays, its arguments, and what is frozen of the first."""
        if wrt is not None and wrt != self._wrt:
            raise ValueError(
                f"the filter was made with wrt={wrt!r}, and the step with wrt={self._wrt!r}. Say "
                "the same to both."
            )
        modules, (others, _) = _take_modules((args, {}))
        return self._of_row, (self._row(modules, (args, {}), selector), *others), _InRow(selector)
