"""Random programs on hostile numbers: what is claimed of their results is compared with runs.

A program is a list of operations, each seeded on its own, over whatever has been computed before.
Half of them take an input, move, view or cast it, and take that back, rightly or nearly so: what a
proof must tell apart. The others are for possible values and dependencies: constants, comparisons,
reductions, branches, loops.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend as jex
import jax.numpy as jnp
import numpy as np
from choices import (
    Choice,
    dtype_of,
    has_axes,
    is_bool,
    is_complex,
    is_float,
    is_integer,
    is_real,
)
from helpers import host_devices
from hostile import FLOATS, INTEGERS, SHAPES
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jax.interpreters import mlir
from moves import MOVES

P = jax.sharding.PartitionSpec


def there_and_back(c: Choice) -> list[Any]:
    """Up to three moves of an array, something that should not change it, and the way back."""
    x, ways, kept = c.array(), [], []
    for _ in range(int(c.random.integers(1, 4))):
        move, _ = c.of([pair for pair in MOVES if pair[1](x)])
        x, back = move(c, x)
        ways.append(back)
        kept.append(x)
    if c.chance(0.5):
        x = unchanged(c, x)
        kept.append(x)
    for back in reversed(ways):
        x = back(x)
        kept.append(x)
    return kept


# --- what should not change an array, or nearly


def a_zero(c: Choice, dtype: Any, shape: tuple[int, ...]) -> Any:
    """Something that is zero, or is not always so."""
    zeros = jnp.zeros(shape, dtype)
    options: list[Callable[[], Any]] = [
        lambda: zeros,
        lambda: zeros,
        lambda: -zeros,
        lambda: zeros + zeros,
        lambda: zeros * jnp.ones(shape, dtype),
        lambda: c.array(lambda y: (jnp.shape(y), dtype_of(y)) == (shape, dtype)) * zeros,
        lambda: jnp.sin(zeros) if jnp.issubdtype(dtype, jnp.inexact) else zeros,
        lambda: jnp.where(c.array(is_bool), 0, 0).astype(dtype),
        lambda: jnp.ones(shape, dtype),
        lambda: jnp.sum(zeros),
        lambda: 0.0 if jnp.issubdtype(dtype, jnp.inexact) else 0,
        lambda: jnp.zeros(shape, "float32"),
        lambda: jnp.abs(zeros),
    ]
    return c.of(options)()


def plus_zero(c: Choice, x: Any) -> Any:
    shape = (4, 2) if not has_axes(x) and c.chance(0.5) else jnp.shape(x)
    zero = a_zero(c, dtype_of(x), shape)
    if is_bool(x):
        return lax.bitwise_xor(x, jnp.zeros(jnp.shape(x), bool))
    operation = c.of([jnp.add, jnp.subtract, lambda x, z: z + x, jnp.add])
    if is_integer(x) and c.chance(0.4):
        operation = c.of([jnp.bitwise_or, jnp.bitwise_xor])
    return operation(x, zero)


def times_one(c: Choice, x: Any) -> Any:
    one = jnp.ones((), dtype_of(x)) if c.chance(0.8) else jnp.full((), 2, dtype_of(x))
    one = jnp.broadcast_to(one, jnp.shape(x))
    options = [lambda: x * one, lambda: one * x, lambda: x * 1, lambda: x**1]
    if jnp.issubdtype(dtype_of(x), jnp.inexact):
        options += [lambda: x / one, lambda: one / x]
    return c.of(options)()


def handed(c: Choice, x: Any) -> Any:
    options: list[Callable[[], Any]] = [
        lambda: jnp.copy(x),
        lambda: lax.optimization_barrier(x),
        lambda: lax.optimization_barrier((c.array(), x))[1],
        lambda: checkpoint_name(x, "x"),
        lambda: lax.stop_gradient(x),
        lambda: jax.device_put(x),
        lambda: lax.reduce_precision(x, 8, 7) if is_float(x) else x,
        lambda: lax.conj(x) if is_complex(x) else x,
        lambda: with_layout_constraint(jnp.copy(x), Layout(tuple(range(jnp.ndim(x))))),
    ]
    if c.mesh is not None:
        is_divided = has_axes(x) and jnp.shape(x)[0] % c.mesh.size == 0
        sharding = jax.sharding.NamedSharding(c.mesh, P("d") if is_divided else P())
        options.append(lambda: lax.with_sharding_constraint(x, sharding))
        options.append(lambda: jax.device_put(x, sharding))
        if c.mesh.size == 1:  # two meshes in one program are of one size
            options.append(lambda: resharded(c, x))
    return c.of(options)()


def resharded(c: Choice, x: Any) -> Any:
    """Over a mesh whose axes are a part of the type, and back."""
    typed = (jax.sharding.AxisType.Explicit,)
    explicit = jax.make_mesh((1,), ("e",), axis_types=typed, devices=host_devices(1))
    whole, split = (jax.sharding.NamedSharding(explicit, P(*axes)) for axes in ((), ("e",)))
    y = jax.sharding.reshard(x, split)
    if c.chance(0.5):
        y = jax.sharding.auto_axes(lambda y: y, out_sharding=split)(y)
    return jax.sharding.reshard(y, whole)


def selected(c: Choice, x: Any) -> Any:
    other = x if c.chance(0.5) else c.like(x)
    shape = jnp.shape(x)
    condition = c.of(
        [
            lambda: jnp.ones(shape, bool),
            lambda: jnp.zeros(shape, bool),
            lambda: c.array(lambda y: is_bool(y) and jnp.shape(y) in ((), shape)),
            lambda: jnp.equal(x, x),
        ]
    )()
    return jnp.where(condition, x, other)


def body(c: Choice, depth: int = 1) -> Callable[[Any], Any]:
    """A function of one array that may not change it."""
    kinds = [lambda x: x, *(functools.partial(f, c) for f in (plus_zero, times_one, handed))]

    def moved_and_back(x: Any) -> Any:
        move, _ = c.of([pair for pair in MOVES if pair[1](x)])
        y, back = move(c, x)
        return back(y)

    kinds += [moved_and_back, moved_and_back, lambda x: -x, lambda x: c.array()]
    chosen = c.of(kinds)

    def same_kind(x: Any) -> Any:
        y = chosen(x)
        if (jnp.shape(y), dtype_of(y)) != (jnp.shape(x), dtype_of(x)):
            return x
        return y

    return same_kind


def called(c: Choice, x: Any) -> Any:
    function = body(c)
    with_jvp = jax.custom_jvp(function)
    with_jvp.defjvp(lambda primals, tangents: (function(*primals), *tangents))
    with_vjp = jax.custom_vjp(function)
    with_vjp.defvjp(lambda x: (function(x), None), lambda _, g: (g,))
    wrappers = [jax.jit(function), jax.checkpoint(function), with_jvp, with_vjp]
    return c.of(wrappers)(x)


def differentiated(c: Choice, x: Any) -> Any:
    """The sum of two cotangents, of which one may be zero."""
    zero = a_zero(c, dtype_of(x), jnp.shape(x))
    _, pullback = jax.vjp(lambda y: (y, lax.stop_gradient(y) if c.chance(0.3) else y), x)
    return pullback((x, jnp.broadcast_to(zero, jnp.shape(x)).astype(dtype_of(x))))[0]


def branched(c: Choice, x: Any) -> Any:
    left = body(c)
    right = left if c.chance(0.4) else body(c)
    if c.chance(0.3):
        index = c.array(lambda y: dtype_of(y) == jnp.int32 and not has_axes(y))
        return lax.switch(index, [left, right, lambda x: x], x)
    is_constant = c.chance(0.3)
    condition = jnp.bool_(c.chance(0.5)) if is_constant else c.array(
        lambda y: is_bool(y) and not has_axes(y)
    )  # fmt: skip
    return lax.cond(condition, left, right, x)


def looped(c: Choice, x: Any) -> Any:
    function = body(c)
    count = int(c.random.integers(0, 4))

    def until(limit: Callable[[], Any], turn: Callable[[Any], Any]) -> Any:
        goes_on = lambda state: state[0] < limit()
        return lax.while_loop(goes_on, lambda state: (state[0] + 1, turn(state[1])), (0, x))[1]

    options: list[Callable[[], Any]] = [
        lambda: lax.fori_loop(0, count, lambda i, y: function(y), x),
        lambda: until(lambda: count, function),
        lambda: until(lambda: clipped(c), lambda y: y),
        lambda: until(lambda: clipped(c), function),
        lambda: lax.fori_loop(0, count, lambda i, s: s[::-1], (x, c.like(x)))[0],
        lambda: lax.scan(lambda y, _: (function(y), y), x, length=count)[0],
        lambda: lax.scan(lambda y, _: (x, y), c.like(x), length=count)[0],
    ]
    return c.of(options)()


def clipped(c: Choice) -> Any:
    found = c.array(lambda y: dtype_of(y) == jnp.int32 and not has_axes(y))
    return jnp.clip(found, 0, 3)


def scanned(c: Choice, x: Any) -> Any:
    function, reverse = body(c), c.chance(0.4)
    carried = c.array()
    options: list[Callable[[], Any]] = [
        lambda: lax.scan(lambda s, y: (s, function(y)), carried, x, reverse=reverse)[1],
        lambda: lax.scan(lambda s, y: (y, s), x[0], x, reverse=reverse)[1],
        lambda: lax.scan(lambda s, y: (y, y), x[0], x, reverse=reverse)[0],
        lambda: lax.scan(lambda s, y: (s + 1, jnp.where(s < 9, y, y)), 0, x, unroll=2)[1],
        lambda: lax.scan(lambda s, ys: (s, ys[0]), 0, (x, c.like(x)))[1],
        lambda: jax.lax.map(function, x),
        lambda: jax.vmap(function)(x),
    ]
    return c.of(options)()


def on_devices(c: Choice, x: Any) -> Any:
    if c.mesh is None:
        raise LookupError("one device")
    specs = [P(), P("d"), P(None, "d")]
    into = c.of([s for s in specs if len(s) <= jnp.ndim(x)])
    out = into if c.chance(0.7) else c.of([s for s in specs if len(s) <= jnp.ndim(x)])
    function = body(c)
    options: list[Callable[[Any], Any]] = [
        function,
        function,
        lambda x: lax.ppermute(x, "d", [(i, (i + 1) % c.mesh.size) for i in range(c.mesh.size)]),
        lambda x: jnp.where(lax.axis_index("d") == 0, x, x),
        lambda x: lax.rev(x, (0,)),
    ]
    if dtype_of(x) in (jnp.float32, jnp.int32):  # XLA on CPU aborts on some others
        options.append(lambda x: lax.psum(x, "d"))
        options.append(lambda x: lax.psum(jnp.zeros_like(x), "d") + x)
    return jax.shard_map(
        c.of(options), mesh=c.mesh, in_specs=into, out_specs=out, check_vma=c.chance(0.5)
    )(x)


def rewritten(c: Choice, x: Any) -> Any:
    zero = jnp.int32(0)
    options: list[Callable[[], Any]] = [
        lambda: lax.dynamic_update_slice(x, x[:1], (zero,) * jnp.ndim(x)),
        lambda: lax.dynamic_slice(x, (zero,) * jnp.ndim(x), jnp.shape(x)),
        lambda: x.at[0].set(x[0]),
        lambda: x.at[0].set(c.like(x)[0]),
        lambda: x.at[0].apply(lambda y: y),
        lambda: raised(x),
        lambda: lax.dynamic_update_slice(x, c.like(x)[1:2], (zero,) * jnp.ndim(x)),
        lambda: x[jnp.arange(jnp.shape(x)[0])],
        lambda: lax.sort(x) if is_real(x) else x,
        lambda: lax.sort((x, c.like(x)), num_keys=1)[1] if is_real(x) else x,
        lambda: jnp.take(x, c.array(is_integer), axis=0, mode="fill"),
    ]
    return c.of(options)()


def unchanged(c: Choice, x: Any) -> Any:
    """An array that may be as it was."""
    kinds = [
        (plus_zero, lambda x: True),
        (times_one, lambda x: not is_bool(x)),
        (handed, lambda x: True),
        (selected, lambda x: True),
        (called, lambda x: True),
        (differentiated, lambda x: jnp.issubdtype(dtype_of(x), jnp.inexact)),
        (branched, lambda x: True),
        (looped, lambda x: True),
        (scanned, has_axes),
        (on_devices, has_axes),
        (rewritten, has_axes),
    ]
    kind, _ = c.of([pair for pair in kinds if pair[1](x)])
    return kind(c, x)


def raised(x: Any) -> Any:
    """The first of an array computed anew, in place.

    Behind a barrier: the compiler of jaxlib 0.7.0 never ends folding this of a constant.
    """
    first = lax.optimization_barrier(x).at[0]
    return first.apply(lambda y: (y + y + 1).astype(dtype_of(y)))


def one_unchanged(c: Choice) -> list[Any]:
    return [unchanged(c, c.array())]


# --- primitives that are not jax's own


@functools.cache
def impostor(name: str, does: str) -> jex.core.Primitive:
    """A user's primitive with the name of one of jax's, which does something else."""
    function = {"negates": jnp.negative, "adds": lambda x: x + 1, "turns": jnp.ravel}[does]
    primitive = jex.core.Primitive(name)
    primitive.def_impl(function)
    primitive.def_abstract_eval(
        lambda aval: jax.core.ShapedArray(
            (math.prod(aval.shape),) if does == "turns" else aval.shape, aval.dtype
        )
    )
    mlir.register_lowering(primitive, mlir.lower_fun(function, multiple_results=False))
    return primitive


NAMES = ["copy", "name", "reshard", "tile", "stack", "transpose", "mul", "sin", "jit", "select_n"]


def of_a_user(c: Choice) -> list[Any]:
    x = c.array(lambda x: not is_bool(x))
    return [impostor(c.of(NAMES), c.of(["negates", "adds", "turns"])).bind(x)]


# --- possible values, dependencies


def a_constant(c: Choice, dtype: Any, shape: tuple[int, ...]) -> Any:
    """One number everywhere, or two in turn."""
    value = c.of([0, 0, 1, 2, -1, 0.5, -0.0, 3e38, 1e-45])
    with np.errstate(all="ignore"):
        number = np.asarray(value).astype(dtype)
    is_even = np.arange(math.prod(shape)).reshape(shape) % 2 == 0
    pair = np.where(is_even, number, np.asarray(c.of([0, 0, 1, 3])).astype(dtype)).astype(dtype)
    return jnp.asarray(pair if c.chance(0.4) else np.full(shape, number))


def constant(c: Choice) -> list[Any]:
    return [a_constant(c, c.of([*FLOATS, *INTEGERS, "bool", "complex64"]), c.of(SHAPES))]


def of_constants(c: Choice) -> list[Any]:
    """What is computed of constants, and of one that is not: possible values."""
    dtype = c.of(
        ["float32", "float32", "float32", "bfloat16", "int32", "uint8", "bool", "complex64"]
    )
    pair = [a_constant(c, dtype, (4, 2)) for _ in range(2)]
    with contextlib.suppress(LookupError):
        pair.append(c.like(pair[0]))
    kinds = [computed, computed, computed, lambda c: [rewritten(c, c.of(c.arrays))]]
    results = []
    for seed in c.random.integers(2**31, size=6):
        only = Choice([int(seed)], pair, c.mesh)
        with contextlib.suppress(LookupError, TypeError, ValueError):  # not of this dtype
            results += only.of(kinds)(only)
    return [*pair[:2], *results]


UNARY = [
    *[jnp.sin, jnp.tan, jnp.arcsin, jnp.arctan, jnp.sinh, jnp.arcsinh, jnp.tanh, jnp.arctanh],
    *[jnp.expm1, jnp.log1p, jnp.sqrt, jnp.cbrt, jnp.square, jnp.sign, jnp.floor, jnp.ceil],
    *[jnp.round, jnp.negative, jnp.abs, jnp.exp, jnp.cos, jnp.isfinite, jnp.cumsum, jnp.conj],
    *[
        lax.erf,
        lambda x: x**2,
        lambda x: x**3,
        lambda x: lax.integer_pow(x, -2),
        jnp.log,
        jnp.exp,
        lax.cbrt,
    ],
    *[lambda x: lax.reduce_precision(x, 4, 3), lambda x: lax.reduce_precision(x, 8, 23)],
]
BINARY = [
    *[jnp.add, jnp.subtract, jnp.multiply, jnp.divide, jnp.maximum, jnp.minimum],
    *[jnp.equal, jnp.not_equal, jnp.less, jnp.less_equal, jnp.greater, jnp.greater_equal],
    *[jnp.subtract, lax.rem, lax.pow, lax.nextafter, lambda x, y: lax.clamp(x, y, x)],
]
BITWISE = [lax.bitwise_and, lax.bitwise_or, lax.bitwise_xor, lax.shift_left]
REDUCTIONS = [
    *[jnp.sum, jnp.max, jnp.min, jnp.prod, jnp.argmax],
    *[lambda x: jnp.max(x, axis=0), lambda x: lax.cummax(x, 0), lambda x: lax.cummin(x, 0)],
    *[lambda x: lax.cummax(x, 0, reverse=True), lambda x: lax.cumsum(x, 0, reverse=True)],
]


def computed(c: Choice) -> list[Any]:
    kind = c.of(
        ["unary", "unary", "binary", "binary", "bitwise", "reduction", "bools", "same", "complex"]
    )
    if kind == "unary":
        return [c.of(UNARY)(c.array(lambda x: is_float(x) or is_complex(x)))]
    if kind == "binary":
        x = c.array(lambda x: not is_bool(x))
        return [c.of(BINARY)(x, c.like(x))]
    if kind == "same":
        x = c.array()
        return [c.of([lax.eq, lax.le, lax.ge, lax.ne])(x, x)]
    if kind == "bitwise":
        x = c.array(lambda x: is_integer(x) or is_bool(x))
        return [c.of(BITWISE)(x, c.like(x)), lax.bitwise_not(x)]
    if kind == "complex":
        x = c.array(lambda x: dtype_of(x) == jnp.float32)
        return [lax.complex(x, c.like(x))]
    if kind == "reduction":
        return [c.of(REDUCTIONS)(c.array(lambda x: has_axes(x) and is_real(x) and not is_bool(x)))]
    x = c.array(lambda x: has_axes(x) and (is_bool(x) or is_integer(x)))
    reduction = c.of([jnp.bitwise_and.reduce, jnp.bitwise_or.reduce])
    return [reduction(x, axis=None), jnp.any(x), jnp.all(x)]


OPERATIONS = [
    *[there_and_back] * 12,
    *[one_unchanged] * 10,
    *[constant] * 3,
    of_a_user,
    *[computed] * 4,
    *[of_constants] * 6,
]


@dataclasses.dataclass
class Program:
    """A function of a list of arrays that does some random operations, always the same."""

    seed: int
    length: int
    mesh: Any = None
    left_out: set[int] = dataclasses.field(default_factory=set)

    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        return self._run(inputs, is_trial=False)

    def _run(self, inputs: Sequence[Any], is_trial: bool) -> list[Any]:
        arrays = list(inputs)
        for i in range(self.length):
            if i in self.left_out:
                continue
            choice = Choice([self.seed, i], arrays, self.mesh)
            try:
                results = choice.of(OPERATIONS)(choice)
            except Exception:
                if not is_trial:
                    raise
                self.left_out.add(i)
                continue
            arrays.extend(x for x in results if 0 < math.prod(jnp.shape(x)) <= 64)
        return arrays[len(inputs) :]

    def leave_out_what_fails(self, inputs: Sequence[Any]) -> None:
        """Operations that jax refuses, on arrays like these, are no part of the program."""
        jax.eval_shape(functools.partial(self._run, is_trial=True), inputs)
