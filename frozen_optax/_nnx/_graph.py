"""The Variables of NNX modules: where they stand, which are frozen, whether they are the same."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from frozen_optax._selectors import Selector, resolve
from frozen_optax._trees import describe, key_of
from frozen_optax._typing import PyTree

Path = tuple[Any, ...]  # of keys, as NNX has them: names and indices

_MARKS = ("_object__", "_pytree__")  # attributes that NNX keeps for itself

# --- what NNX calls differently from version to version


def _is_node(node: PyTree) -> bool:
    """Whether `node` is of NNX's own kind: a module, an optimizer, a metric, `nnx.Rngs`."""
    return isinstance(node, nnx.Pytree if hasattr(nnx, "Pytree") else nnx.Object)


def raw_value_getter() -> Callable[[Any], PyTree]:
    """A function that reads what a Variable holds, as it is: no hook of a getter, no cast."""
    if hasattr(nnx.Variable, "get_raw_value"):
        return operator.methodcaller("get_raw_value")
    return operator.attrgetter("raw_value")


def metadata_getter() -> Callable[[Any], dict[str, Any]]:
    """A function that reads what a Variable says of itself: hooks, tags, shardings.

    This is done for each Variable at each call, and NNX's own function makes a copy. It is what is
    called where NNX keeps it elsewhere.
    """
    if "_var_metadata" in getattr(nnx.Variable, "__slots__", ()):
        return operator.attrgetter("_var_metadata")
    return operator.methodcaller("get_metadata")


def set_raw_value(variable: Any, value: PyTree) -> None:
    """Puts something into a Variable, as it is."""
    if hasattr(nnx.Variable, "set_raw_value"):
        variable.set_raw_value(value)
    else:
        variable.raw_value = value


# --- where Variables stand


def is_variable(node: PyTree) -> bool:
    """Whether `node` is an `nnx.Variable`."""
    return isinstance(node, nnx.Variable)


def is_module(node: PyTree) -> bool:
    """Whether `node` is one of what a step of NNX changes in place."""
    return _is_node(node) or is_variable(node)


def _items(node: Any) -> Iterable[tuple[Any, Any]] | None:
    """The keys and children of what may hold a Variable, in NNX's order; None of anything else."""
    if isinstance(node, (list, tuple)):
        names = getattr(node, "_fields", None)
        return zip(names, node, strict=True) if names else enumerate(node)
    if hasattr(nnx, "List") and isinstance(node, nnx.List):
        return enumerate(node)
    if isinstance(node, Mapping):
        return sorted(node.items(), key=operator.itemgetter(0))
    if _is_node(node):
        own = ((k, v) for k, v in vars(node).items() if not k.startswith(_MARKS))
        return sorted(own, key=operator.itemgetter(0))
    if jax.tree_util.all_leaves([node]):
        return None
    # Any other node that jax knows, a dataclass for example.
    flat, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda n: n is not node)
    return ((key_of(path[0]), child) for path, child in flat)


def variables_at(node: PyTree) -> Iterator[tuple[Path, Any]]:
    """Pairs of a path and the Variable there, of which the first is NNX's own.

    One that is shared comes at several paths, as does each below a module that is shared: where
    one is met again, by the first paths from there. A module in each of many that are themselves
    shared has a path for each way to it, and these may be more than anybody can count.
    """
    return _variables(node, (), (), {}, is_again=False)


def _variables(
    node: PyTree, path: Path, above: tuple[int, ...], met: dict[int, Any], is_again: bool
) -> Iterator[tuple[Path, Any]]:
    if is_variable(node):
        yield path, node
        return
    items = _items(node)
    if items is None or id(node) in above:  # modules may hold one another
        return
    if id(node) in met:
        if not is_again:
            yield from _variables(node, path, above, {}, is_again=True)
        return
    met[id(node)] = node  # and not its id alone, which may be that of another one later
    for key, child in items:
        yield from _variables(child, (*path, key), (*above, id(node)), met, is_again)


def flat_state(state: PyTree) -> list[tuple[Path, Any]]:
    """Paths and Variables of what `nnx.split` returns as the state, in its order."""
    flat = jax.tree_util.tree_leaves_with_path(state, is_leaf=is_variable)
    return [(tuple(map(key_of, path)), node) for path, node in flat]


def _held_by(node: Any) -> Mapping[Any, Any]:
    """The attributes of a module by their names; of a mapping what is in it.

    Of a mapping of another kind (nnx.State) it is what it stores that stays.
    """
    return node if isinstance(node, dict) else vars(node)


def _children_of(node: Any) -> Iterable[Any]:
    """What a module, a mapping or a sequence holds; nothing of anything else."""
    if isinstance(node, Mapping) or _is_node(node):
        return [child for key, child in _held_by(node).items() if not str(key).startswith(_MARKS)]
    return node if isinstance(node, (list, tuple)) else ()


def _holds_itself(module: Any) -> bool:
    """Whether a module stands in itself, at any depth: as the parent of its layers, say."""
    seen: set[int] = set()
    pending = [module]
    while pending:
        node = pending.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        for child in _children_of(node):
            if child is module:
                return True
            pending.append(child)
    return False


class Structure:
    """Tells whether modules are still put together as they were, at a price for each call.

    What NNX itself does at each call, to walk all modules in Python, costs many times a step of
    1,000 leaves. Here the attributes of all modules are compared with those that there were, object
    by object, and so are the types of modules and Variables, and what these say of themselves. It
    is done without a line of Python for each module.

    Attributes:
      is_known: whether all can be seen in this way. A node that NNX does not know, such as a
        dataclass, may be changed in place by nobody knows which means. And a module that holds
        itself would be kept alive by what is kept here of it, for ever.
    """

    def __init__(self, modules: Sequence[Any]):
        self.is_known = True
        self._containers: list[Collection[Any]] = []
        self._mappings: list[Mapping[Any, Any]] = []
        self._variables: list[Any] = []
        self._nodes: list[Any] = []
        seen: set[int] = set()
        pending: list[Any] = list(modules)
        while pending:
            node = pending.pop()
            if id(node) in seen:
                continue
            seen.add(id(node))
            if is_variable(node):
                self._variables.append(node)
            elif isinstance(node, Mapping) or _is_node(node):
                held = _held_by(node)
                if not any(node is module for module in modules):  # which it must not keep alive
                    self._nodes.append(node)
                self._mappings.append(held)
                self._containers.append(held.values())  # a live view of what is there
            elif isinstance(node, (list, tuple)):
                if isinstance(node, list):  # a tuple never holds anything else
                    self._containers.append(node)
            elif not jax.tree_util.all_leaves([node]) and node is not None:
                self.is_known = False
            pending += _children_of(node)
        self.is_known = self.is_known and not any(map(_holds_itself, modules))
        self._metadata_of = metadata_getter()
        self._children = list(itertools.chain.from_iterable(self._containers))
        self._facts = self._look()
        # Those of this moment, and not the very dicts, which may be changed in place.
        self._metadata = list(map(dict, map(self._metadata_of, self._variables)))

    def _look(self) -> tuple[list[Any], ...]:
        """What is compared as a whole: sizes, names, types."""
        return (
            list(map(len, self._containers)),
            list(map(tuple, self._mappings)),
            list(map(type, self._nodes)),
            list(map(type, self._variables)),
        )

    def is_unchanged(self) -> bool:
        """Whether each container holds the very objects that it held, by the same names."""
        if self._look() != self._facts:
            return False
        children = itertools.chain.from_iterable(self._containers)
        if not all(map(operator.is_, children, self._children)):
            return False
        return list(map(self._metadata_of, self._variables)) == self._metadata


# --- which of them are frozen


def parameters_of(model: PyTree, wrt: Any) -> dict[Path, Any]:
    """The Variables of a model that are of the kind `wrt`, each at all of its paths."""
    is_parameter = nnx.filterlib.to_predicate(wrt)
    found = {path: each for path, each in variables_at(model) if is_parameter(path, each)}
    if not found:
        raise ValueError(
            f"there is no parameter in {describe(model)}: expected a module first, with Variables "
            f"of wrt={wrt!r}."
        )
    return found


def frozen_among(selector: Selector, parameters: dict[Path, Any]) -> dict[int, bool]:
    """Of each of the parameters of a model, by the id of its Variable, whether it is frozen.

    A Variable that is shared stands at several paths. It is one array, so it is frozen at all of
    them or at none.
    """
    tree = nnx.from_flat_state(parameters)
    resolution = resolve(selector, tree, to_train=True)
    selected = iter(zip(resolution.paths, resolution.selected, strict=True))
    frozen: dict[int, bool] = {}
    seen: dict[int, str] = {}
    for variable in jax.tree.leaves(tree, is_leaf=is_variable):
        count = len(jax.tree.leaves(variable))
        for path, is_frozen in itertools.islice(selected, count):
            if frozen.setdefault(id(variable), is_frozen) != is_frozen:
                other = seen[id(variable)]
                held, trained = (path, other) if is_frozen else (other, path)
                raise ValueError(
                    f"one nnx.Variable is frozen at {held!r} and not at {trained!r}, and it is one "
                    "array. Freeze it at both, or at neither."
                )
            seen[id(variable)] = path
    return frozen
