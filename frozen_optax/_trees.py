"""Pytrees as the library walks them: leaves, paths, holes, how two structures compare."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

from frozen_optax._typing import KeyPath, Leaf, PyTree, TreeDef

_MAX_REMEMBERED = 16  # structures: parameters, gradients with holes, a few models

T = TypeVar("T")


def is_hole(node: PyTree) -> bool:
    """Whether `node` stands for a leaf or subtree that is not there."""
    return isinstance(node, optax.MaskedNode)


def is_traced(leaf: Leaf) -> bool:
    """Whether the values of `leaf` are not known yet."""
    return isinstance(leaf, jax.core.Tracer)


def is_mutable(aval: Any) -> bool:
    """Whether an abstract value is that of a mutable array (`jax.Ref`)."""
    return "Ref" in type(aval).__name__  # each version of jax has another name for it


def is_at_hand(leaf: Leaf) -> bool:
    """Whether `leaf` is a number or an array of them whose values can be read."""
    if isinstance(leaf, jax.Array):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return not (is_key or is_traced(leaf) or leaf.is_deleted())
    return isinstance(leaf, (bool, int, float, complex, np.ndarray, np.generic))


# Types of which every instance is a number or an array of them.
_NUMBERS = (jax.Array, jax.core.Tracer, jax.ShapeDtypeStruct, bool, int, float, complex)


def is_number(leaf: Leaf) -> bool:
    """Whether `leaf` is a number or an array of them, or stands for one.

    Anything else a tree may hold (a function, a name, a dtype, an array of texts) can be neither
    trained nor compiled.
    """
    if isinstance(leaf, (np.ndarray, np.generic)):
        return leaf.dtype.kind not in "OSTUMm"  # objects, texts, times
    if isinstance(leaf, _NUMBERS):
        return True
    # A type is no array, though np.float32 has a shape and a dtype.
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype") and not isinstance(leaf, type)


def is_inexact_array(leaf: Leaf) -> bool:
    """Whether `leaf` is an array of floats or complex numbers, or stands for one."""
    dtype = getattr(leaf, "dtype", None) if is_number(leaf) else None
    return dtype is not None and jnp.issubdtype(dtype, jnp.inexact)


def is_python_number(leaf: Leaf) -> bool:
    """Whether `leaf` is a number of Python's own, and none of numpy's, some of which are, too."""
    return isinstance(leaf, (bool, int, float, complex)) and not isinstance(leaf, np.generic)


def in_modules(tree: PyTree) -> frozenset[int]:
    """The indices of the leaves that stand in a module of Equinox's."""
    equinox = sys.modules.get("equinox")  # without which there is none
    if equinox is None:
        return frozenset()
    is_module = lambda node: isinstance(node, equinox.Module)
    found: set[int] = set()
    count = 0
    for node in jax.tree.leaves(tree, is_leaf=is_module):
        first, count = count, count + (len(jax.tree.leaves(node)) if is_module(node) else 1)
        if is_module(node):
            found.update(range(first, count))
    return frozenset(found)


def objects_among(
    leaves: Sequence[Leaf], in_modules: Callable[[], Collection[int]]
) -> tuple[int, ...]:
    """The indices of the leaves of a tree that are objects, and no parameters by nature.

    These are the leaves that are no numbers; and numbers of Python's in a module of Equinox's, the
    rate of a Dropout, where there are arrays beside them. There a parameter is an array, whatever
    differentiates or compiles the module, and all else is a part of the program.

    It looks at types first, of which there are few: this is done for each tree.

    Args:
      leaves: those of the tree.
      in_modules: tells which of them stand in such a module, if it is asked.
    """
    kinds = set(map(type, leaves))
    doubtful = {kind for kind in kinds if not issubclass(kind, _NUMBERS)}
    others = [i for i, leaf in enumerate(leaves) if type(leaf) in doubtful and not is_number(leaf)]
    if not any(issubclass(kind, (int, float, complex)) for kind in kinds):
        return tuple(others)
    inside = in_modules()
    numbers = [i for i, leaf in enumerate(leaves) if i in inside and is_python_number(leaf)]
    if len(numbers) + len(others) == len(leaves):  # labels, or a mask
        return tuple(others)
    return tuple(sorted([*others, *numbers]))


def objects_in(tree: PyTree) -> frozenset[int]:
    """The same of a tree, where no `Resolution` tells."""
    return frozenset(objects_among(jax.tree.leaves(tree), functools.partial(in_modules, tree)))


def program_key(leaf: Leaf) -> Hashable:
    """What tells an object from others that are equal to it, and make another program.

    To Python 0, 0.0, -0.0 and False are equal. One that was changed in place is equal to itself,
    and to one that is as it is now.
    """
    return (type(leaf), repr(leaf)) if is_python_number(leaf) else hash(leaf)


def keystr(path: KeyPath) -> str:
    """The path of a leaf as users write it: `encoder/layer_0/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def key_of(entry: Any) -> Any:
    """A key of a path, as jax has it, as NNX has it: a name or an index."""
    for field in ("key", "idx", "name"):
        if hasattr(entry, field):
            return getattr(entry, field)
    return keystr((entry,))


def variable_type() -> Any:
    """`nnx.Variable`, or no type at all: one cannot exist before its module is imported."""
    nnx = sys.modules.get("flax.nnx")
    return nnx.Variable if nnx else ()


def _walk(
    node: PyTree, path: KeyPath = (), holder: PyTree = None
) -> Iterator[tuple[KeyPath, Leaf, PyTree]]:
    """Leaves and holes in order, each with its key path and the NNX Variable that holds it."""
    variable = variable_type()
    stop = lambda n: is_hole(n) or (isinstance(n, variable) and n is not node)
    for keys, leaf in jax.tree_util.tree_flatten_with_path(node, is_leaf=stop)[0]:
        full = path + (keys[1:] if isinstance(node, variable) else keys)
        if isinstance(leaf, variable) and leaf is not node:
            yield from _walk(leaf, full, leaf)
        else:
            yield full, leaf, holder


def flatten_with_holes(node: PyTree) -> Iterator[tuple[KeyPath, Leaf]]:
    """Leaves and holes in order, each with its key path.

    The `value` key of an NNX Variable is no part of it.
    """
    for path, leaf, _ in _walk(node):
        yield path, leaf


def paths_of(tree: PyTree) -> list[str]:
    """The paths of the leaves, in order."""
    return [keystr(path) for path, node in flatten_with_holes(tree) if not is_hole(node)]


def refuse_mutable(tree: PyTree) -> None:
    """Raise where a leaf can be written to, by whoever holds it."""
    for path, leaf in zip(paths_of(tree), jax.tree.leaves(tree), strict=True):
        if is_mutable(getattr(leaf, "aval", None)):
            raise TypeError(
                f"the leaf {path!r} is a mutable array (jax.Ref), which a step can write to "
                "wherever it is frozen. Pass the array that it holds, ref[...]."
            )


class Memory(Generic[T]):
    """The last few answers to a question.

    They make it faster and nothing else: what is forgotten is found out again. It is no pytree and
    compares by identity, so a program that copies what holds it shares it, or begins a new one.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, T] = {}

    def get(self, key: Hashable) -> T | None:
        """The answer that is remembered; none for a key that cannot be hashed or compared."""
        try:
            return self._known.get(key)
        except (TypeError, ValueError):
            return None

    def keep(self, key: Hashable, value: T) -> T:
        """Remembers `value`, and the last few others, and returns it."""
        try:
            if key not in self._known and len(self._known) >= _MAX_REMEMBERED:
                self._known.pop(next(iter(self._known)), None)
            self._known[key] = value
        except (TypeError, ValueError):
            pass
        return value


def spec(leaf: Leaf) -> Leaf:
    """Shape and dtype of an array-like, whatever it is made of; any other leaf as it is."""
    # A type is no array, though np.float32 has a shape and a dtype.
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype") and not isinstance(leaf, type):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    if isinstance(leaf, (bool, int, float, complex)):
        return jax.ShapeDtypeStruct((), jax.dtypes.canonicalize_dtype(np.result_type(leaf)))
    return leaf


@dataclasses.dataclass(frozen=True)
class View:
    """A tree as selectors see it.

    Attributes:
      tree: the tree itself.
      paths: of its leaves.
      holes: the paths of its holes.
      keys: of its leaves, key paths as jax has them.
      holders: the NNX Variables that hold its leaves, None for others.
    """

    tree: PyTree
    paths: tuple[str, ...]
    holes: tuple[str, ...]
    keys: tuple[KeyPath, ...]
    holders: tuple[PyTree, ...]

    @classmethod
    def of(cls, tree: PyTree) -> View:
        """A tree with its paths from the root."""
        walked = list(_walk(tree))
        leaves = [(keys, holder) for keys, node, holder in walked if not is_hole(node)]
        return cls(
            tree,
            paths=tuple(keystr(keys) for keys, _ in leaves),
            holes=tuple(keystr(keys) for keys, node, _ in walked if is_hole(node)),
            keys=tuple(keys for keys, _ in leaves),
            holders=tuple(holder for _, holder in leaves),
        )

    @classmethod
    def of_several(cls, tree: PyTree, views: Iterable[View]) -> View:
        """A tree whose parts are seen on their own, so that paths are relative to each."""
        views = list(views)
        chain = itertools.chain.from_iterable
        return cls(
            tree,
            paths=tuple(chain(view.paths for view in views)),
            holes=tuple(chain(view.holes for view in views)),
            keys=tuple(chain(view.keys for view in views)),
            holders=tuple(chain(view.holders for view in views)),
        )

    @functools.cached_property
    def specs(self) -> tuple[Leaf, ...]:
        """Shapes and dtypes, leaf by leaf.

        For what an NNX Variable holds it is a Variable of that class, which holds the shape and the
        dtype.
        """

        def held(leaf: Leaf, holder: PyTree) -> PyTree:
            treedef = None if holder is None else jax.tree.structure(holder)
            if treedef is None or treedef.num_leaves != 1:
                return spec(leaf)
            return treedef.unflatten([spec(leaf)])

        return tuple(map(held, jax.tree.leaves(self.tree), self.holders))


def join(path: str, key: str) -> str:
    """The path of a child. One without a key, as in an NNX Variable, has its parent's path."""
    return f"{path}/{key}" if path and key else path or key


def require_alive(path: str, *leaves: Leaf) -> None:
    """Raise where the values of an array are gone."""
    for leaf in leaves:
        if isinstance(leaf, jax.Array) and not is_traced(leaf) and leaf.is_deleted():
            raise ValueError(
                f"the array at {path!r} was donated and its values are gone. Keep a copy of it "
                "before the step: jax.tree.map(jnp.copy, params)."
            )


def children(node: PyTree) -> tuple[list[tuple[str, PyTree]], TreeDef]:
    """The children of a node with their keys, one level down, and the node's own structure.

    The `value` key of an NNX Variable is no part of a path, and is left empty.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda n: n is not node)
    hidden = 1 if isinstance(node, variable_type()) else 0
    return [(keystr(path[hidden:]), child) for path, child in flat], treedef


def describe(node: PyTree) -> str:
    """One node or leaf in a few words, for an error message."""
    if node is None or is_hole(node):
        return "None" if node is None else "a hole (MaskedNode)"
    if hasattr(node, "shape") and hasattr(node, "dtype") and not isinstance(node, type):
        return f"a leaf {node.dtype}{list(node.shape)}"
    if jax.tree_util.all_leaves([node]):
        return f"a leaf of type {type(node).__name__}"
    keys = [key for key, _ in children(node)[0]]
    shown = ", ".join(keys[:6]) + (", ..." if len(keys) > 6 else "")
    return f"a {type(node).__name__} of {len(keys)} ({shown})"


class Mismatch(Exception):
    """A prefix and a tree part ways: the path, what stands in the prefix, what in the tree."""


def align(prefix: PyTree, tree: PyTree, path: str = "") -> Iterator[PyTree]:
    """What stands in `tree` at each leaf of `prefix`; a hole stands for every leaf below it."""
    if jax.tree_util.all_leaves([prefix]):
        yield tree
        return
    expected, expected_def = children(prefix)
    found, found_def = children(tree)
    if is_hole(tree):
        yield from (tree for _ in jax.tree.leaves(prefix))
    elif expected_def != found_def:
        raise Mismatch(path or "the root", describe(prefix), describe(tree))
    else:
        for (key, left), (_, right) in zip(expected, found, strict=True):
            yield from align(left, right, join(path, key))


def up_to(treedef: TreeDef, tree: PyTree, name: str, other: str = "the parameters") -> list[PyTree]:
    """What stands in `tree` at each leaf of a structure.

    Raises:
      ValueError: `tree` has another structure. The message names the path, and the two trees as
        `name` and `other`.
    """
    try:
        return treedef.flatten_up_to(tree)
    except (ValueError, TypeError):
        pass
    # There is one hole for a whole subtree, or it is an error, and jax's own names no path.
    try:
        return list(align(numbered(treedef), tree))
    except Mismatch as mismatch:
        path, expected, found = mismatch.args
        raise ValueError(
            f"{name} and {other} differ in structure at {path!r}: found {found}, expected "
            f"{expected}."
        ) from None


def leaves_if(treedef: TreeDef, tree: PyTree) -> list[Leaf] | None:
    """The leaves of a tree if it has that structure.

    That is cheaper than to flatten it and to compare its structure.
    """
    try:
        leaves = treedef.flatten_up_to(tree)
    except (ValueError, TypeError):
        return None
    return leaves if jax.tree_util.all_leaves(leaves) else None


def require_same_structure(tree: PyTree, reference: PyTree, name: str, other: str) -> None:
    """Raise, with the path, where a tree has another structure than a reference."""
    treedef, expected = jax.tree.structure(tree), jax.tree.structure(reference)
    if treedef == expected:
        return
    up_to(expected, tree, name, other)
    try:
        list(align(tree, reference))  # the tree may go deeper than the reference
    except Mismatch as mismatch:
        path, found, wanted = mismatch.args
        raise ValueError(
            f"{name} and {other} differ in structure at {path!r}: found {found}, expected {wanted}."
        ) from None
    raise ValueError(
        f"{name} and {other} differ in structure: found {treedef}, expected {expected}."
    )


def numbered(treedef: TreeDef) -> PyTree:
    """A tree of that structure."""
    return jax.tree.unflatten(treedef, range(treedef.num_leaves))
