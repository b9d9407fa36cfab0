"""The Variables of NNX modules as one row of arrays, and a step as a function of that row."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn, TypeAlias

import jax
import numpy as np
from flax import nnx

from frozen_optax._messages import quoted
from frozen_optax._nnx._graph import (
    flat_state,
    frozen_among,
    is_module,
    is_variable,
    parameters_of,
    raw_value_getter,
    variables_at,
)
from frozen_optax._selectors import Reads, Selector, reads
from frozen_optax._signature import Signature, as_list
from frozen_optax._trees import View, join, keystr
from frozen_optax._typing import PyTree, TreeDef

# The arguments of a call, by position and by name.
Arguments: TypeAlias = tuple[Sequence[Any], dict[str, Any]]

# --- the Variables of all modules as one argument


# jax prints what it finds to be different, and what these hold is as large as the modules.
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Layout:
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
class Row:
    """What the Variables hold. To jax each is known by its path."""

    values: Sequence[PyTree]
    layout: Layout

    @classmethod
    def of_state(cls, state: PyTree, layout: Layout) -> Row:
        """What the Variables of a state hold."""
        value_of = raw_value_getter()
        at = [node for _, node in flat_state(state)]
        return cls([value_of(n) if is_variable(n) else n for n in at], layout)

    def state(self) -> PyTree:
        """The state again, as `nnx.split` has it."""
        return jax.tree.unflatten(self.layout.treedef, jax.tree.leaves(list(self.values)))

    def tree_flatten_with_keys(self) -> tuple[Iterable[Any], Layout]:
        keys = map(jax.tree_util.DictKey, self.layout.paths)
        return tuple(zip(keys, self.values, strict=True)), self.layout

    def tree_flatten(self) -> tuple[Sequence[PyTree], Layout]:
        return self.values, self.layout

    @classmethod
    def tree_unflatten(cls, layout: Layout, values: Sequence[PyTree]) -> Row:
        return cls(values, layout)


@dataclasses.dataclass(frozen=True, repr=False)
class InRow(Selector):
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


def take_modules(arguments: Arguments) -> tuple[list[Any], Arguments]:
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


def first_of(fun: Callable[..., Any], arguments: Arguments) -> Any:
    """The first argument, which holds the model."""
    args, kwargs = arguments
    if args:
        return args[0]
    names = Signature(fun).positional
    if names and names[0] in kwargs:
        return kwargs[names[0]]
    raise TypeError("nnx_jit takes the model as the first argument of a step, and found none.")


def names_of(fun: Callable[..., Any], arguments: Arguments) -> list[str]:
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


class Outdated(Exception):
    """What is frozen was found for Variables of other shapes than those that are traced."""


def frozen_in(
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


def function_of_row(fun: Callable[..., Any], selector: Selector, wrt: Any) -> Callable[..., Any]:
    """A step that changes modules in place, as a function of the row that returns the next one."""

    @functools.wraps(fun)
    def of_row(row: Row, /, *args: Any, **kwargs: Any) -> tuple[Row, Any]:
        layout = row.layout
        modules = nnx.merge(layout.graphdef, row.state())
        given = _put_modules(modules, (args, kwargs))
        if reads(selector) is Reads.SHAPES:
            model = first_of(fun, given)
            if frozen_in(selector, wrt, model, modules, row.state()) != layout.frozen:
                raise Outdated
        result = fun(*given[0], **given[1])
        _refuse_modules(result, modules)
        graphdef, state = nnx.split(modules)
        if graphdef != layout.graphdef or jax.tree.structure(state) != layout.treedef:
            _refuse_other_structure(row.state(), state)
        return Row.of_state(state, layout), result

    if parameters := Signature(fun).parameters:
        name = "modules"
        while any(parameter.name == name for parameter in parameters):
            name += "_"
        before = inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY)
        of_row.__signature__ = inspect.Signature([before, *parameters])  # pyright: ignore
    return of_row


def options_of_row(fun: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
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
