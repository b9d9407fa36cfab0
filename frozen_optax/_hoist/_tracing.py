"""A function of parameters and other arguments as a split program of named inputs.

It is traced at the batch size of its arguments and at twice that, so that what depends on an
example alone can be told from what does not.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from frozen_optax import _bits
from frozen_optax._hoist._programs import flat
from frozen_optax._hoist._sizes import Sizes
from frozen_optax._hoist._split import Given, Split, split
from frozen_optax._messages import quoted
from frozen_optax._proofs._trace import Inputs, Values, abstract, is_array_or_float, is_number
from frozen_optax._selectors import Selector, resolve
from frozen_optax._trees import is_traced, paths_of
from frozen_optax._typing import Leaf, PyTree
from frozen_optax._variables import refuse_changed

_COMPUTED = object()  # stands for a leaf that the program returns
_OF_MODULES = (
    "Split the module, name what changes in live_argnums, merge it inside, and return what it has "
    "become: docs/hoisting.md has the step."
)


@dataclasses.dataclass(frozen=True)
class Traced:
    """A function as a split program, of what inputs, and how its results are put together.

    Attributes:
      split: the program.
      leaves: what was given for each of its inputs.
      size: the batch size.
      returned: the leaves of the results; a mark for each that the program computes.
      treedef: their structure.
    """

    split: Split
    leaves: Sequence[Leaf]
    size: int
    returned: Sequence[Any]
    treedef: Any

    def results(self, outputs: Sequence[Any]) -> PyTree:
        """The results of the function, of those of the program."""
        computed = iter(outputs)
        leaves = [next(computed) if leaf is _COMPUTED else leaf for leaf in self.returned]
        return jax.tree.unflatten(self.treedef, leaves)


def trace(
    fun: Callable[..., Any],
    params: PyTree,
    args: Sequence[PyTree],
    frozen: Selector,
    live: Collection[int],
) -> Traced:
    """The program of `fun(params, *args)`, of which the arguments at some places are live.

    Raises:
      TypeError: data hold a PRNG key.
      ValueError: arrays among the data have different numbers of examples; the function cannot be
        traced with twice as many, or changes a Variable in place; random numbers are drawn by data.
    """
    inputs, makes, given = _inputs(fun, params, args, frozen, live)
    avals = list(map(aval_of, inputs.leaves))
    size = _batch_size(avals, given)
    sizes = Sizes(size)
    returned: list[Any] = []

    def function(*values: Any) -> list[Any]:
        made = [make(values) for make in makes]
        before = list(map(jax.tree.leaves, made))
        leaves, treedef = jax.tree.flatten(fun(*made))
        given_back = set(map(id, leaves))
        for arg, each in zip(made, before, strict=True):
            refuse_changed(each, arg, _OF_MODULES, given_back)
        # No tracer may outlive its trace.
        kept = [_COMPUTED if is_traced(leaf) else leaf for leaf in leaves]
        returned[:] = [kept, treedef]
        return [leaf for leaf in leaves if is_traced(leaf)]

    program = flat(function, avals)  # first: what it raises is what the function raises
    kept, treedef = returned
    twin = _at_twice(function, avals, given, sizes)
    return Traced(split(program, twin, given, sizes), inputs.leaves, size, kept, treedef)


# --- arguments


def _name(fun: Callable[..., Any], place: int) -> str:
    try:
        names = list(inspect.signature(fun).parameters)
    except (TypeError, ValueError):
        names = []
    return f"{names[place]!r}" if place < len(names) else f"argument {place}"


def _inputs(
    fun: Callable[..., Any],
    params: PyTree,
    args: Sequence[PyTree],
    frozen: Selector,
    live: Collection[int],
) -> tuple[Inputs, list[Callable[[Values], PyTree]], list[Given]]:
    """All arguments as inputs of a program, and what each input is."""
    resolution = resolve(frozen, params, to_train=True)
    inputs, makes, given = Inputs(), list[Callable[[Values], PyTree]](), list[Given]()
    group, make = inputs.add("the parameters", params, is_number)
    makes.append(make)
    for path, place in zip(group.paths, group.places, strict=True):
        given.append(Given(path, "frozen" if resolution.selected[place] else "trained"))
    for place, arg in enumerate(args, 1):
        name = _name(fun, place)
        kind = "live" if place in live else "data"
        if kind == "data":
            _require_numbers(name, arg)
        group, make = inputs.add(name, arg, is_array_or_float)
        makes.append(make)
        for path, leaf in zip(group.paths, group.leaves, strict=True):
            if kind == "data" and _bits.is_key(leaf):
                raise TypeError(
                    f"{name} holds a PRNG key: the same numbers would be drawn at each step. "
                    f"Name it in live_argnums={place} and give it after the rows."
                )
            given.append(Given(f"{name} {path!r}" if path else name, kind))
    return inputs, makes, _told_apart(given)


def _require_numbers(name: str, arg: PyTree) -> None:
    """Raise for an array of strings or objects: it has an element an example, and no rows."""
    for path, leaf in zip(paths_of(arg), jax.tree.leaves(arg), strict=True):
        if isinstance(leaf, np.ndarray) and not is_array_or_float(leaf):
            place = f"{name} {path!r}" if path else name
            raise TypeError(
                f"{place} is an array of {leaf.dtype}, and rows hold numbers. Leave it out of what "
                "is prepared, or give numbers in its place: ids, indices in a table."
            )


def _told_apart(given: Sequence[Given]) -> list[Given]:
    """Inputs of which no two are alike: a path that is written in two ways stands for two."""
    seen = Counter[Given]()
    found = list[Given]()
    for each in given:
        found.append(dataclasses.replace(each, before=seen[each]))
        seen[each] += 1
    return found


def aval_of(leaf: Leaf) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a leaf, as jax takes it: host arrays of 64 bits become narrower ones."""
    aval: Any = jax.typeof(leaf) if is_traced(leaf) else abstract(leaf)
    dtype = jax.dtypes.canonicalize_dtype(aval.dtype, allow_extended_dtype=True)
    return jax.ShapeDtypeStruct(aval.shape, dtype, weak_type=bool(aval.weak_type))


def _batch_size(avals: Sequence[Any], given: Sequence[Given]) -> int:
    found: dict[int, str] = {}
    for aval, each in zip(avals, given, strict=True):
        if each.kind == "data" and aval.shape:
            found.setdefault(aval.shape[0], each.name)
    if len(found) != 1:
        told = ", ".join(f"{size} in {name}" for size, name in found.items()) or "none at all"
        raise ValueError(
            f"the first axis of each array in the arguments counts examples, found {told}. Name "
            "what is no data in live_argnums, or close over it."
        )
    (size,) = found
    if size < 1:
        raise ValueError("there are no examples in the arguments.")
    return size


# --- at another batch size


def _at_twice(function: Any, avals: Sequence[Any], given: Sequence[Given], sizes: Sizes) -> Any:
    """The same function at twice as many examples.

    Of a live argument it is not known whether its first axis counts them: it does if that makes
    a program, and it may hold as many words of a key by chance.
    """
    errors = list[Exception]()
    for counts in (lambda aval: True, lambda aval: not _may_be_key(aval), lambda aval: False):
        larger = [
            _with_batch(aval, sizes.other)
            if aval.shape[:1] == (sizes.size,)
            and (each.kind == "data" or (each.kind == "live" and counts(aval)))
            else aval
            for aval, each in zip(avals, given, strict=True)
        ]
        try:
            return flat(function, larger)
        except Exception as error:  # of whatever kind the function raises
            errors.append(error)
    raise ValueError(
        f"the function cannot be traced with {sizes.other} examples instead of {sizes.size}, "
        "which is how it is found out what depends on an example alone. Write it for any batch "
        "size, and name what is no data (a key) in live_argnums. It raised "
        f"{type(errors[0]).__name__}: {errors[0]}"
    ) from errors[0]


def _may_be_key(aval: Any) -> bool:
    return aval.dtype == jnp.uint32 and aval.shape in ((2,), (4,))


def _with_batch(aval: Any, size: int) -> Any:
    return jax.ShapeDtypeStruct((size, *aval.shape[1:]), aval.dtype, weak_type=aval.weak_type)


# --- what must not be differentiated


def refuse_differentiated(traced: Traced) -> None:
    """Raise where a frozen leaf is differentiated: a part of its gradient is in the rows."""
    frozen: list[Leaf] = []
    names: list[str] = []
    for leaf, given in zip(traced.leaves, traced.split.given, strict=True):
        if given.kind == "frozen" and is_traced(leaf) and _bits.is_differentiable(leaf):
            frozen.append(leaf)
            names.append(given.name)
    if frozen:
        _undifferentiated(names)(*frozen)


def _undifferentiated(names: Sequence[str]) -> Callable[..., Any]:
    """A function of leaves that is nothing, and an error where one of them is differentiated."""

    @jax.custom_jvp
    def guard(*leaves: Any) -> Any:
        return jnp.zeros(())

    def rule(primals: Sequence[Any], tangents: Sequence[Any]) -> Any:
        zero = jax.custom_derivatives.SymbolicZero
        pairs = zip(tangents, names, strict=True)
        moved = [name for tangent, name in pairs if not isinstance(tangent, zero)]
        if moved:
            raise ValueError(
                f"the frozen leaves {quoted(moved)} are differentiated, and what they made is in "
                "the rows: their gradient would be wrong. Use fo.value_and_grad(hoisted, frozen), "
                "with what hoist was told is frozen."
            )
        out = guard(*primals)
        return out, jnp.zeros_like(out)

    guard.defjvp(rule, symbolic_zeros=True)
    return guard
