"""`hoist`: a function of parameters and data as one of parameters and rows, computed before."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from frozen_optax._hoist import _report
from frozen_optax._hoist._cache import Cache, build
from frozen_optax._hoist._cut import border
from frozen_optax._hoist._halves import hoisted_values, rest
from frozen_optax._hoist._rows import COUNT, ArrayOf, Kept, Rows, Said, join, require_rows
from frozen_optax._hoist._split import Split
from frozen_optax._hoist._tracing import Traced, aval_of, refuse_differentiated, trace
from frozen_optax._proofs._trace import is_array_or_float
from frozen_optax._selection import frozen_selector
from frozen_optax._selectors import Selector
from frozen_optax._signature import as_list
from frozen_optax._typing import Frozen, Leaf, PyTree

_TAKEN_FOR_KEYS = (
    "Arguments of live_argnums were taken for PRNG keys. If they are something else, give their "
    "shapes and dtypes: live=(jax.ShapeDtypeStruct((), jnp.int32),)."
)


def hoist(
    fun: Callable[..., Any],
    frozen: Frozen = None,
    *,
    trainable: Frozen = None,
    live_argnums: int | Sequence[int] = (),
    has_aux: bool = False,
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
      has_aux: whether `fun` returns a pair of a value and auxiliary data. What it returns is
        returned in any case; said here, it is looked at when `fun` is traced.

    Returns:
      A `Hoisted`.

    Raises:
      TypeError: not exactly one of `frozen` and `trainable` is given, or it is no way to select
        leaves.
      ValueError: `live_argnums` names the parameters or a negative position. When called, see
        `Hoisted`; a `TypeError`, too, if `has_aux` was said of a function that returns no pair.

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
    selector = frozen_selector(frozen, trainable)
    return Hoisted(_returning_a_pair(fun) if has_aux else fun, selector, places)


def _returning_a_pair(fun: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(fun)
    def checked(*args: PyTree) -> Any:
        results = fun(*args)
        if not isinstance(results, tuple) or len(results) != 2:
            raise TypeError(
                f"has_aux=True says that {fun!r} returns a pair of a value and auxiliary data, and "
                f"it returned {type(results).__name__!r}."
            )
        return results

    return checked


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
        sizes = {array.shape[:1] for array in rows.each}
        if len(sizes) != 1 or () in sizes:
            raise ValueError(
                f"the arrays of the rows have {sorted(sizes)} as lengths, expected one of all. For "
                "a function of a single example, as under jax.vmap, pick rows[i : i + 1] within."
            )
        ((size,),) = sizes
        leaves = [
            each.at(size) if isinstance(each, ArrayOf) else each.value for each in rows.kept.leaves
        ]
        args = self._in_order(jax.tree.unflatten(rows.kept.treedef, leaves), live_args)
        traced = self._trace(params, args)
        refuse_differentiated(traced)
        return traced.results(rest(traced.split, rows, traced.leaves))

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
        if is_told_nothing := live is None:
            live = [jax.eval_shape(lambda: jax.random.key(0)) for _ in self._live]
        whole = self._in_order(args, live)
        try:
            traced = self._trace(params, whole)
        except Exception as error:
            if self._live and is_told_nothing:
                error.add_note(_TAKEN_FOR_KEYS)
            raise
        each, shared = border(traced.split)
        _require_gain(traced.split, each, shared)
        values = hoisted_values(traced.split, each, shared, traced.leaves)
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
        traced = self._trace(params, args)
        return _report.report(traced.split, traced.size, border(traced.split))

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

    def _trace(self, params: PyTree, args: Sequence[PyTree]) -> Traced:
        return trace(self._fun, params, args, self._selector, self._live)


def _require_gain(split: Split, each: Sequence[str], shared: Sequence[str]) -> None:
    """Raise where rows would hold what was given, and nothing that was computed."""
    given = {split.values[var].digest for var in split.jaxpr.invars}
    if set(each) <= given and set(shared) <= given:
        raise ValueError(
            "nothing can be hoisted: what the frozen parameters and the data determine is no "
            f"more than what is given. {_report.ends(split)} Train the function itself."
        )


def _kept_leaf(leaf: Leaf) -> ArrayOf | Said:
    if not is_array_or_float(leaf):
        return Said.of(leaf)
    aval = aval_of(leaf)
    has_batch = bool(aval.shape)
    return ArrayOf(tuple(aval.shape[1:]), has_batch, aval.dtype, bool(aval.weak_type))
