"""What of a program frozen parameters and data determine, and where that ends.

Each array of a flat program is one of three: *shared*, made of frozen parameters and constants
alone; *of the examples*, made of these and of data, each example's part of its own; or *live*.
What is not live has a digest that names how it is made, whatever the batch size: two programs that
make it in one way give it one digest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jax.extend.core import JaxprEqn

from frozen_optax._hoist._programs import is_literal
from frozen_optax._hoist._rowwise import Step, keeps_apart
from frozen_optax._hoist._sizes import Batch, Differs, Sizes, digest, words_for
from frozen_optax._jaxprs import (
    Jaxpr,
    Program,
    has_hidden_effects,
    needed,
    only_returns,
    opened,
    subprograms,
)
from frozen_optax._trees import is_mutable, is_traced

_RANDOM = ("random_", "threefry", "rng_")  # how the names of primitives begin that draw numbers
# The same, of those that call the host, or run over several devices.
_ELSEWHERE = (
    "pure_callback",
    "io_callback",
    "ffi_call",
    "shard_map",
    "axis_index",
    "psum",
    "pmax",
    "pmin",
    "ppermute",
    "pbroadcast",
    "all_gather",
    "all_to_all",
    "ragged_all_to_all",
    "reduce_scatter",
    "psum_scatter",
    "pvary",
)


@dataclasses.dataclass(frozen=True)
class Given:
    """An input of a program.

    Attributes:
      name: its path, or that of its argument.
      kind: `"frozen"`, `"trained"`, `"data"` or `"live"`.
      before: how many inputs before it have its name: `{"a/b": ..., "a": {"b": ...}}`.
    """

    name: str
    kind: str
    before: int = 0


@dataclasses.dataclass(frozen=True)
class Value:
    """What is known of one array.

    Attributes:
      digest: how it is made; None if it is live.
      batch: where the examples lie in it.
      size: its bytes, or those of one example's part.
      made_of: the kinds of inputs that it is made of.
      cause: why it is live: in words, what it began with.
    """

    digest: str | None = None
    batch: Batch | None = None
    size: int = 0
    made_of: frozenset[str] = frozenset()
    cause: str = ""


@dataclasses.dataclass(frozen=True)
class Stop:
    """An operation at which what can be hoisted ends, and why."""

    primitive: str
    shape: tuple[int, ...]
    cause: str
    is_of_data_as_given: bool

    def __str__(self) -> str:
        return f"{self.primitive} {list(self.shape)}: {self.cause}"


@dataclasses.dataclass(frozen=True)
class Split:
    """A flat program, and what is known of each of its arrays."""

    jaxpr: Jaxpr
    consts: Sequence[Any]
    given: Sequence[Given]
    values: Mapping[Any, Value]
    eqns: Sequence[JaxprEqn]  # that its results need, or that have effects
    stops: Sequence[Stop]

    def is_live(self, eqn: JaxprEqn) -> bool:
        """Whether an equation cannot be hoisted."""
        return any(self.values[var].digest is None for var in eqn.outvars) or bool(eqn.effects)

    def read(self, atoms: Sequence[Any]) -> list[Any]:
        """The variables among some operands."""
        return [atom for atom in atoms if not is_literal(atom)]


def split(program: Program, twin: Program, given: Sequence[Given], sizes: Sizes) -> Split:
    """Follows a program from its inputs to where it has to be computed anew at each step.

    Args:
      program: flat, at the first batch size.
      twin: the same function, at the second.
      given: what each input is.
      sizes: both batch sizes.

    Raises:
      ValueError: random numbers are drawn by data.
    """
    (jaxpr, consts), (other, other_consts) = opened(program), opened(twin)
    values: dict[Any, Value] = {}
    for i, var in enumerate(jaxpr.constvars):
        found = other_consts[i] if i < len(other_consts) else None
        values[var] = _constant(consts[i], found, var.aval)
    for var, mate, each in zip(jaxpr.invars, other.invars, given, strict=True):
        values[var] = _input(var.aval, mate.aval, each, sizes)

    mates = dict(zip(jaxpr.invars, other.invars, strict=True))
    mates.update(zip(jaxpr.constvars, other.constvars, strict=False))
    eqns, twins = needed(jaxpr), needed(other)
    stops = list[Stop]()
    in_step = True
    for i, eqn in enumerate(eqns):
        mate = twins[i] if i < len(twins) else None
        in_step = in_step and mate is not None and _is_mate(eqn, mate)
        operands = [_literal(a) if is_literal(a) else values[a] for a in eqn.invars]
        if in_step and mate is not None:
            results = _results(Step(eqn, mate, sizes), operands, _reads_the_same(eqn, mate, mates))
            mates.update(zip(eqn.outvars, mate.outvars, strict=True))
        else:
            cause = "from here on the program is another with another batch size"
            results = _all_live(eqn, _cause_among(operands) or cause)
        values.update(zip(eqn.outvars, results, strict=True))
        if any(value.digest is None for value in results):
            stops += _stop(eqn, operands, results[0].cause if results else "it has an effect")
    return Split(jaxpr, consts, given, values, eqns, stops)


def _is_mate(eqn: JaxprEqn, mate: JaxprEqn) -> bool:
    counts = [(len(each.invars), len(each.outvars)) for each in (eqn, mate)]
    return eqn.primitive is mate.primitive and counts[0] == counts[1]


def _reads_the_same(eqn: JaxprEqn, mate: JaxprEqn, mates: Mapping[Any, Any]) -> bool:
    """Whether each operand is the same array, or the same number, in both programs."""
    return all(
        is_literal(other) and _literal(one).digest == _literal(other).digest
        if is_literal(one)
        else mates.get(one) is other
        for one, other in zip(eqn.invars, mate.invars, strict=True)
    )


def _constant(array: Any, other: Any, aval: Any) -> Value:
    if is_traced(array) or is_traced(other):
        return Value(cause="a value of a transformation around it")
    if is_mutable(aval):
        return Value(cause="an array that can be written to")
    try:
        words = words_for(array)
        if words != words_for(other):
            return Value(cause="a constant that depends on the batch size")
    except Differs as difference:
        return Value(cause=str(difference))
    return Value(digest("constant", words), None, _bytes(aval))


def _literal(atom: Any) -> Value:
    return Value(digest("literal", words_for(atom.val), str(atom.aval.dtype)))


def _input(aval: Any, other: Any, given: Given, sizes: Sizes) -> Value:
    if given.kind in ("trained", "live") or is_mutable(aval):
        return Value(cause=given.name)
    batch = sizes.batch(aval, other)
    size = _bytes(aval) // (sizes.size if batch else 1)
    words = digest(given.kind, given.name, str(given.before), sizes.aval(aval, other))
    return Value(words, batch, size, frozenset({given.kind}))


def _bytes(aval: Any) -> int:
    return getattr(aval, "size", 0) * getattr(getattr(aval, "dtype", None), "itemsize", 0)


def _cause_among(operands: Sequence[Value]) -> str:
    return next((value.cause for value in operands if value.digest is None), "")


def _all_live(eqn: JaxprEqn, cause: str) -> list[Value]:
    return [Value(cause=cause) for _ in eqn.outvars]


def _results(step: Step, operands: Sequence[Value], reads_the_same: bool) -> list[Value]:
    """What is known of the results of an equation that both programs have."""
    eqn = step.eqn
    made_of = frozenset[str]().union(*(value.made_of for value in operands))
    if cause := _cause_among(operands):
        return _all_live(eqn, cause)
    if eqn.effects or has_hidden_effects(eqn) or not all(map(only_returns, subprograms(eqn))):
        return _all_live(eqn, "it has an effect")
    if _within(eqn, _ELSEWHERE):
        return _all_live(eqn, "it runs on the host or over several devices")
    if "data" in made_of and _within(eqn, _RANDOM):
        return _refuse_random(eqn, step)
    name = eqn.primitive.name
    try:
        if not reads_the_same:
            raise Differs("it depends on the batch size")
        params = step.sizes.params(eqn.params, step.twin.params)
        pairs = zip(eqn.outvars, step.twin.outvars, strict=True)
        avals = [(one.aval, other.aval) for one, other in pairs]
        batches = [step.sizes.batch(*pair) for pair in avals]
        words = [step.sizes.aval(*pair) for pair in avals]
        if not keeps_apart(step):
            raise Differs("it mixes examples, or nothing is known of it")
    except Differs as difference:
        return _all_live(eqn, f"{name}: {difference}")
    how = digest(name, params, *(str(value.digest) for value in operands))
    return [
        Value(
            digest(how, str(i), words[i]),
            batch,
            _bytes(avals[i][0]) // (step.sizes.size if batch else 1),
            made_of,
        )
        for i, batch in enumerate(batches)
    ]


def _within(eqn: JaxprEqn, names: Sequence[str]) -> bool:
    """Whether a primitive of which the name begins so is in an equation."""
    if eqn.primitive.name.startswith(tuple(names)):
        return True
    return any(_within(each, names) for sub in subprograms(eqn) for each in opened(sub)[0].eqns)


def _refuse_random(eqn: JaxprEqn, step: Step) -> list[Value]:
    if any(subprograms(eqn)):  # of which it is not known that they draw by the data
        return _all_live(eqn, f"{eqn.primitive.name}: it draws random numbers")
    raise ValueError(
        f"{eqn.primitive.name} draws random numbers by data that would be kept: the same would be "
        "drawn at each step. Name the argument that it draws them by in live_argnums."
    )


def _stop(eqn: JaxprEqn, operands: Sequence[Value], cause: str) -> list[Stop]:
    """Where an equation is live, and something of the examples that it reads is not."""
    ended = [value for value in operands if value.digest is not None and value.batch]
    if not ended:
        return []
    shape = getattr(eqn.outvars[0].aval, "shape", ()) if eqn.outvars else ()
    as_given = all(value.made_of == frozenset({"data"}) for value in ended)
    return [Stop(eqn.primitive.name, tuple(shape), cause, as_given)]
