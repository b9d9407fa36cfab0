"""`hoist`: a function of parameters and data as one of parameters and rows, computed before."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from frozen_optax import _bits
from frozen_optax._hoist import _report
from frozen_optax._hoist._cache import Cache, build
from frozen_optax._hoist._cut import border, equations_for, variables_of
from frozen_optax._hoist._programs import flat, part_of
from frozen_optax._hoist._rows import COUNT, ArrayOf, Kept, Rows, Said, join, require_rows
from frozen_optax._hoist._sizes import Batch, Sizes
from frozen_optax._hoist._split import Given, Split, split
from frozen_optax._messages import quoted
from frozen_optax._proofs._trace import Inputs, abstract, is_array_or_float, is_number
from frozen_optax._selection import frozen_selector
from frozen_optax._selectors import Selector, resolve
from frozen_optax._signature import as_list
from frozen_optax._trees import is_traced
from frozen_optax._typing import Frozen, Leaf, PyTree
from frozen_optax._variables import refuse_changed

_COMPUTED = object()  # stands for a leaf that the program returns
_OF_MODULES = (
    "Split the module, name what changes in live_argnums, merge it inside, and return what it has "
    "become: docs/hoisting.md has the step."
)


def hoist(
    fun: Callable[..., Any],
    frozen: Frozen = None,
    *,
    trainable: Frozen = None,
    live_argnums: int | Sequence[int] = (),
) -> Hoisted:
    """Splits a function in what frozen parameters and data determine, and the rest.

    The first part is computed once for a data set, `rows = hoisted.prepare(params, *args)`; each
    step then computes the rest from the rows, `hoisted(params, rows, *live_args)`, which equals
    `fun(params, *args)`: bit-identical op by op, to rounding under `jax.jit`. It is differentiable
    in the trainable leaves.

    What is hoisted is found in the program, and is shown to keep examples apart: row i depends on
    example i alone. What is not shown to stays where it is: statistics over the batch, what depends
    on the batch size or on its order, effects. `hoisted.report(params, *args)` tells what is gained
    and where it ended.

    Whose values change between `prepare` and a step is for the caller to know: frozen parameters
    must be the same. Data that change at each step (augmentation, dropout keys, a step counter) are
    named in `live_argnums`.

    Args:
      fun: a function of the parameters and other positional arguments, of which the first axis of
        each array counts examples. Python integers, bools and strings in them are part of the
        program, arrays without axes and floats are numbers for all examples.
      frozen: the leaves that are frozen: a glob on their paths (`"encoder"`), a compiled regex, a
        `Selector`, a list of these, a predicate `(path, leaf) -> bool`, a bool, a pytree of bools,
        or the optimizer that `with_frozen` returned.
      trainable: the leaves that are not, instead of `frozen`: exactly one of the two is given.
      live_argnums: the positions of arguments of `fun` that change at each step.

    Returns:
      A `Hoisted`.

    Raises:
      TypeError: not exactly one of `frozen` and `trainable` is given, or it is no way to select
        leaves.
      ValueError: `live_argnums` names the parameters or a negative position. When called, see
        `Hoisted`.

    Example:
      >>> import frozen_optax as fo, jax.numpy as jnp
      >>> params = {"encoder": jnp.ones((4, 3)), "head": jnp.ones(3)}
      >>> loss = lambda params, x, y: jnp.mean((x @ params["encoder"] @ params["head"] - y) ** 2)
      >>> x, y = jnp.ones((8, 4)), jnp.zeros(8)
      >>> hoisted = fo.hoist(loss, "encoder")
      >>> rows = hoisted.prepare(params, x, y)
      >>> len(rows), rows.bytes_per_example
      (8, 16)
      >>> value, grads = fo.value_and_grad(hoisted, "encoder")(params, rows[:4])
      >>> float(value) == float(loss(params, x[:4], y[:4]))
      True
    """
    places = tuple(sorted(set(as_list(live_argnums))))
    if any(place < 1 for place in places):
        raise ValueError(
            f"live_argnums is {live_argnums}: it names arguments after the parameters, which are "
            "argument 0, by their positions from 1 on."
        )
    return Hoisted(fun, frozen_selector(frozen, trainable), places)


@dataclasses.dataclass(frozen=True)
class _Traced:
    """A function as a split program, and how its results are put together."""

    split: Split
    size: int
    returned: Sequence[Any]
    treedef: Any

    def results(self, outputs: Sequence[Any]) -> PyTree:
        computed = iter(outputs)
        leaves = [next(computed) if leaf is _COMPUTED else leaf for leaf in self.returned]
        return jax.tree.unflatten(self.treedef, leaves)


class Hoisted:
    """A function whose frozen part is computed once; made by `hoist`.

    `hoisted(params, rows, *live_args)` equals `fun(params, *args)`. Neither it nor `prepare` is
    compiled: put them into `jax.jit`, as you would `fun`.
    """

    def __init__(self, fun: Callable[..., Any], frozen: Selector, live: tuple[int, ...]):
        self._fun = fun
        self._selector = frozen
        self._live = live

    def __repr__(self) -> str:
        return f"hoist({self._fun!r}, {self._selector!r}, live_argnums={self._live})"

    def __call__(self, params: PyTree, rows: Rows, *live_args: PyTree) -> Any:
        """What `fun` returns of the arguments that the rows were prepared of.

        Raises:
          TypeError: `rows` are none, or another number of live arguments is given.
          ValueError: the rows are of another program, another selection, or of parameters of other
            shapes; a frozen leaf is differentiated.
        """
        require_rows(rows)
        if len(live_args) != len(self._live):
            raise TypeError(
                f"{len(live_args)} arguments were given after the rows, and live_argnums names "
                f"{len(self._live)}."
            )
        sizes = {array.shape[0] for array in rows.each}
        if len(sizes) != 1:
            raise ValueError(f"the arrays of the rows have different lengths: {sorted(sizes)}.")
        size = sizes.pop()
        leaves = [
            each.at(size) if isinstance(each, ArrayOf) else each.value for each in rows.kept.leaves
        ]
        args = self._in_order(jax.tree.unflatten(rows.kept.treedef, leaves), live_args)
        inputs, makes, given = self._inputs(params, args)
        self._guard(inputs, given)
        traced = self._trace(inputs, makes, given)
        return traced.results(_rest(traced, rows, inputs.leaves))

    def prepare(self, params: PyTree, *args: PyTree, live: Sequence[PyTree] | None = None) -> Rows:
        """What frozen parameters and data determine of the function, an example a row.

        Args:
          params: all parameters; of what is not frozen, shapes are enough.
          *args: the other arguments of `fun`, without those of `live_argnums`.
          live: arrays of the shapes and dtypes of those, or `jax.ShapeDtypeStruct`; each is taken
            for one PRNG key otherwise. Their values are not read.

        Returns:
          `Rows`, which hold what the rest needs of these arguments, too: labels, masks.

        Raises:
          TypeError: an argument is a PRNG key that is not named in `live_argnums`.
          ValueError: arguments have different numbers of examples, or `fun` cannot be traced with
            twice as many; random numbers are drawn by data; nothing can be hoisted: the message
            names the operation that it ended at.
        """
        if live is None:
            live = [jax.eval_shape(lambda: jax.random.key(0)) for _ in self._live]
        whole = self._in_order(args, live)
        inputs, makes, given = self._inputs(params, whole)
        traced = self._trace(inputs, makes, given)
        each, shared = border(traced.split)
        self._require_gain(traced.split, each, shared)
        values = _hoisted_values(traced, each, shared, inputs.leaves)
        data = tuple(self._data(whole))
        leaves, treedef = jax.tree.flatten(data)
        kept = Kept(tuple(each) or (COUNT,), tuple(shared), treedef, tuple(map(_kept_leaf, leaves)))
        if not each:
            values = [jnp.zeros((traced.size, 0), bool), *values]
        return Rows(tuple(values[: len(kept.each)]), tuple(values[len(kept.each) :]), kept)

    def join(self, parts: Sequence[Rows]) -> Rows:
        """The rows of several batches, one after the other; the last may be smaller.

        Raises:
          TypeError: what is given are no rows.
          ValueError: there are none, or they are of different programs or weights.
        """
        return join(parts)

    def cache(
        self,
        params: PyTree,
        batches: Iterable[tuple[PyTree, ...]],
        path: str | os.PathLike[str] | None = None,
        *,
        dtype: Any = None,
        live: Sequence[PyTree] | None = None,
        progress: bool | None = None,
    ) -> Cache:
        """The rows of a whole data set, in memory or on disk: `cache[indices]` for each step.

        `prepare` is compiled once and run on each batch; a smaller one is filled up for it. A cache
        on disk is found complete the next time, or gone on with where it stopped, whenever that
        was. It belongs to the frozen leaves, the traced program with its constants, the versions of
        jax and jaxlib, the backend, the matmul precision, and the data: the batches are given each
        time, and are compared with those that it was built of; it serves no other. Every block of
        rows is compared with a checksum when a row of it is first read.

        Args:
          params: all parameters, as for `prepare`.
          batches: an iterable of tuples of the arguments that `prepare` takes. They are of one
            structure, none has more examples than the first, and their rows are numbered in this
            order, across batches.
          path: of a directory, which is made; None keeps the rows in memory. One process builds it
            at a time, any number read it.
          dtype: a narrower dtype that float rows are kept in, `jnp.bfloat16`, but for those of one
            number an example. They come back in their own, and `print(cache)` says how far off.
          live: as for `prepare`.
          progress: whether a bar is shown; None shows it if the standard error is a terminal.

        Returns:
          A `Cache`: `cache[indices]`, `len(cache)`, `cache.check(params)`.

        Raises:
          TypeError: a batch is no tuple, or `dtype` none of floats; or as `prepare`.
          ValueError: there are no batches; one is of another structure than the first; the cache at
            `path` belongs to something else, and the message names what differs, or it is damaged,
            or something else is there; a number has no place in `dtype`; or as `prepare`.
          BlockingIOError: the cache at `path` is being built.
          NotImplementedError: it is not complete, and the system has no `fcntl` to lock it.

        Example:
          >>> import frozen_optax as fo, jax.numpy as jnp, numpy as np, tempfile
          >>> params = {"encoder": jnp.ones((4, 3)), "head": jnp.ones(3)}
          >>> loss = lambda params, x: jnp.mean((x @ params["encoder"] @ params["head"]) ** 2)
          >>> batches = [(np.ones((8, 4), np.float32),), (np.zeros((5, 4), np.float32),)]
          >>> hoisted, path = fo.hoist(loss, "encoder"), tempfile.mkdtemp()
          >>> cache = hoisted.cache(params, batches, path)
          >>> float(hoisted(params, cache[np.array([0, 12])]))
          72.0
          >>> hoisted.cache({**params, "encoder": jnp.zeros((4, 3))}, batches, path)
          Traceback (most recent call last):
            ...
          ValueError: the cache at ... belongs to something else, 1 of ... things differ:
            the frozen leaf 'encoder': float32[4,3] ..., and the cache was built with ...
          Give another path, or remove the directory to build the cache anew.
        """
        options: dict[str, Any] = {"dtype": dtype, "live": live, "progress": progress}
        return build(self.prepare, self._selector, params, batches, path, **options)

    def report(self, params: PyTree, *args: PyTree) -> _report.Report:
        """What is gained by hoisting, before anything is computed: shapes are enough.

        Args:
          params: all parameters.
          *args: all other arguments of `fun`, those of `live_argnums` too.

        Returns:
          A `Report`, to be printed.

        Raises:
          TypeError, ValueError: as `prepare`, but for nothing to hoist, which it says.
        """
        inputs, makes, given = self._inputs(params, args)
        traced = self._trace(inputs, makes, given)
        return _report.report(traced.split, traced.size, border(traced.split))

    # --- arguments

    def _in_order(self, data: Sequence[PyTree], live: Sequence[PyTree]) -> list[PyTree]:
        """All arguments after the parameters as `fun` takes them."""
        if len(live) != len(self._live):
            raise TypeError(f"live has {len(live)} items, and live_argnums names {self._live}.")
        args = list(data)
        for place, arg in zip(self._live, live, strict=True):
            if place - 1 > len(args):
                raise TypeError(
                    f"live_argnums names argument {place}, and {len(data)} arguments are given "
                    "besides the live ones."
                )
            args.insert(place - 1, arg)
        return args

    def _data(self, args: Sequence[PyTree]) -> list[PyTree]:
        return [arg for place, arg in enumerate(args, 1) if place not in self._live]

    def _name(self, place: int) -> str:
        try:
            names = list(inspect.signature(self._fun).parameters)
        except (TypeError, ValueError):
            names = []
        return f"{names[place]!r}" if place < len(names) else f"argument {place}"

    def _inputs(
        self, params: PyTree, args: Sequence[PyTree]
    ) -> tuple[Inputs, list[Any], list[Given]]:
        """All arguments as inputs of a program, and what each input is."""
        resolution = resolve(self._selector, params, to_train=True)
        inputs, makes, given = Inputs(), list[Any](), list[Given]()
        group, make = inputs.add("the parameters", params, is_number)
        makes.append(make)
        for path, place in zip(group.paths, group.places, strict=True):
            given.append(Given(path, "frozen" if resolution.selected[place] else "trained"))
        for place, arg in enumerate(args, 1):
            name = self._name(place)
            kind = "live" if place in self._live else "data"
            group, make = inputs.add(name, arg, is_array_or_float)
            makes.append(make)
            for path, leaf in zip(group.paths, group.leaves, strict=True):
                if kind == "data" and _bits.is_key(leaf):
                    raise TypeError(
                        f"{name} holds a PRNG key: the same numbers would be drawn at each step. "
                        f"Name it in live_argnums={place} and give it after the rows."
                    )
                given.append(Given(f"{name} {path!r}" if path else name, kind))
        return inputs, makes, given

    def _guard(self, inputs: Inputs, given: Sequence[Given]) -> None:
        """Raise where a frozen leaf is differentiated: a part of its gradient is in the rows."""
        pairs = zip(inputs.leaves, given, strict=True)
        frozen = [(leaf, each.name) for leaf, each in pairs if each.kind == "frozen"]
        frozen = [(leaf, name) for leaf, name in frozen if is_traced(leaf)]
        frozen = [(leaf, name) for leaf, name in frozen if _bits.is_differentiable(leaf)]
        if frozen:
            leaves, names = zip(*frozen, strict=True)
            _undifferentiated(names)(*leaves)

    # --- programs

    def _trace(self, inputs: Inputs, makes: Sequence[Any], given: Sequence[Given]) -> _Traced:
        avals = list(map(_aval, inputs.leaves))
        size = _batch_size(avals, given)
        sizes = Sizes(size)
        returned: list[Any] = []

        def function(*values: Any) -> list[Any]:
            args = [make(values) for make in makes]
            before = list(map(jax.tree.leaves, args))
            leaves, treedef = jax.tree.flatten(self._fun(*args))
            given_back = set(map(id, leaves))
            for arg, each in zip(args, before, strict=True):
                refuse_changed(each, arg, _OF_MODULES, given_back)
            # No tracer may outlive its trace.
            kept = [_COMPUTED if is_traced(leaf) else leaf for leaf in leaves]
            returned[:] = [kept, treedef]
            return [leaf for leaf in leaves if is_traced(leaf)]

        program = flat(function, avals)  # first: what it raises is what the function raises
        kept, treedef = returned
        twin = self._at_twice(function, avals, given, sizes)
        return _Traced(split(program, twin, given, sizes), size, kept, treedef)

    def _at_twice(
        self, function: Any, avals: Sequence[Any], given: Sequence[Given], sizes: Sizes
    ) -> Any:
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

    def _require_gain(self, split: Split, each: Sequence[str], shared: Sequence[str]) -> None:
        """Raise where rows would hold what was given, and nothing that was computed."""
        given = {split.values[var].digest for var in split.jaxpr.invars}
        if set(each) <= given and set(shared) <= given:
            raise ValueError(
                "nothing can be hoisted: what the frozen parameters and the data determine is no "
                f"more than what is given. {_report.ends(split)} Train the function itself."
            )


def _aval(leaf: Leaf) -> jax.ShapeDtypeStruct:
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


def _may_be_key(aval: Any) -> bool:
    return aval.dtype == jnp.uint32 and aval.shape in ((2,), (4,))


def _with_batch(aval: Any, size: int) -> Any:
    return jax.ShapeDtypeStruct((size, *aval.shape[1:]), aval.dtype, weak_type=aval.weak_type)


def _kept_leaf(leaf: Leaf) -> ArrayOf | Said:
    if not is_array_or_float(leaf):
        return Said.of(leaf)
    aval = _aval(leaf)
    has_batch = bool(aval.shape)
    return ArrayOf(tuple(aval.shape[1:]), has_batch, aval.dtype, bool(aval.weak_type))


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


# --- the two halves


def _named(split: Split, digests: Sequence[str]) -> dict[str, Any]:
    """A variable for each digest."""
    wanted = set(digests)
    found: dict[str, Any] = {}
    for var, value in split.values.items():
        if value.digest in wanted:
            found.setdefault(value.digest, var)
    return found


def _hoisted_values(
    traced: _Traced, each: Sequence[str], shared: Sequence[str], leaves: Sequence[Leaf]
) -> list[Any]:
    """The arrays of some digests, the examples of each along its first axis."""
    split = traced.split
    named = _named(split, [*each, *shared])
    outvars = [named[digest] for digest in (*each, *shared)]
    eqns = equations_for(split, outvars, set())
    invars = [*split.jaxpr.constvars, *split.jaxpr.invars]
    read = {var for eqn in eqns for var in split.read(eqn.invars)} | set(outvars)
    values = dict(zip(invars, [*split.consts, *leaves], strict=True))
    needed = [var for var in invars if var in read]
    arrays = part_of(split.jaxpr, needed, eqns, outvars)(*(values[var] for var in needed))
    return [
        _to_rows(array, split.values[var].batch) for array, var in zip(arrays, outvars, strict=True)
    ]


def _to_rows(array: Any, batch: Batch | None) -> Any:
    array = jnp.asarray(array)
    if batch is None or batch == (0, 1):
        return array
    array = jnp.moveaxis(array, batch.axis, 0)
    return array if batch.block == 1 else array.reshape(-1, batch.block, *array.shape[1:])


def _from_rows(array: Any, batch: Batch | None, shape: tuple[int, ...]) -> Any:
    if batch is None or batch == (0, 1):
        return array
    if batch.block > 1:
        array = array.reshape(-1, *array.shape[2:])
    return jnp.moveaxis(array, 0, batch.axis).reshape(shape)


def _rest(traced: _Traced, rows: Rows, leaves: Sequence[Leaf]) -> list[Any]:
    """The results of the program, from rows and from what is given beside them."""
    split = traced.split
    kept = dict(zip((*rows.kept.each, *rows.kept.shared), (*rows.each, *rows.shared), strict=True))
    of_rows = {var: kept[v.digest] for var, v in split.values.items() if v.digest in kept}
    for var, array in of_rows.items():
        value = split.values[var]
        of_rows[var] = _from_rows(array, value.batch, var.aval.shape)
    values = dict(zip(split.jaxpr.constvars, split.consts, strict=True))
    given = zip(split.jaxpr.invars, leaves, split.given, strict=True)
    values.update((var, leaf) for var, leaf, each in given if each.kind != "data")
    values.update(of_rows)

    outvars = split.read(split.jaxpr.outvars)
    live = list(filter(split.is_live, split.eqns))
    eqns = equations_for(split, variables_of(split, live), set(values))
    chosen = {*map(id, eqns), *map(id, live)}
    eqns = [eqn for eqn in split.eqns if id(eqn) in chosen]
    made = {var for eqn in eqns for var in eqn.outvars}
    read = {var for eqn in eqns for var in split.read(eqn.invars)} | set(outvars)
    missing = [
        given.name
        for var, given in zip(split.jaxpr.invars, split.given, strict=True)
        if var in read and var not in values
    ]
    if missing:
        raise ValueError(
            f"the rows do not hold what this function needs of {', '.join(missing)}: they were "
            "prepared by another function, of another selection, of parameters of other shapes, or "
            "it is another program with this batch size. Prepare them by this hoisted function."
        )
    needed = [var for var in values if var in read and var not in made]
    return part_of(split.jaxpr, needed, eqns, split.jaxpr.outvars)(*(values[v] for v in needed))
