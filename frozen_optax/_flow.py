"""What the results of a traced program are, whatever its inputs: constants, inputs handed through, or what they read.

An abstract interpretation of a jaxpr, array by array. Three things are kept of each, and in doubt each says less:

- `among`: a few numbers, one of which every element is.
- `same`: the input whose elements these are, moved about or written in another way, and what that may have cost.
- `reads`: which inputs can have an effect on it, with the way from each.

A primitive that has no rule reads its operands and is nothing in particular: a new one can make a proof fail, and
cannot make it wrong.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax.extend as jex
import numpy as np

from frozen_optax import _handed, _numbers
from frozen_optax._bits import width
from frozen_optax._numbers import Among, has_numbers, is_float


@dataclasses.dataclass(frozen=True, eq=False)
class Reads:
    """The inputs that can have an effect on an array, as a set of bits, and through which primitive of which arrays."""

    inputs: int = 0
    through: str = ""
    sources: tuple[Reads, ...] = ()

    def trail(self, wanted: int) -> tuple[int, list[str]]:
        """The nearest of the wanted inputs, of which at least one is read, and the primitives on the way from it."""
        queue: collections.deque[tuple[Reads, Any]] = collections.deque([(self, None)])
        seen = {id(self)}
        while queue:
            node, way = queue.popleft()
            if not node.sources and node.inputs & wanted:
                steps = []
                while way:
                    step, way = way
                    steps.append(step)
                return node.inputs.bit_length() - 1, steps
            for source in node.sources:
                if source.inputs & wanted and id(source) not in seen:
                    seen.add(id(source))
                    queue.append((source, (node.through, way) if node.through else way))
        raise LookupError("none of these inputs is read")


NOTHING = Reads()


def _reads(through: str, sources: Iterable[Reads]) -> Reads:
    reading = tuple({id(source): source for source in sources if source.inputs}.values())
    if not reading:
        return NOTHING
    return Reads(functools.reduce(operator.or_, (each.inputs for each in reading)), through, reading)


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """What is known of an array."""

    among: Among = None
    same: _handed.Same | None = None
    reads: Reads = NOTHING

    def agrees(self, other: Value) -> bool:
        """Whether as much is known of the one as of the other."""
        if self.same is None or other.same is None:
            is_same = self.same is other.same
        else:
            is_same = self.same.is_like(other.same) and self.same.costs == other.same.costs
        return is_same and self.among == other.among and self.reads.inputs == other.reads.inputs

    @property
    def is_constant(self) -> bool:
        """Whether all elements are one known number."""
        return self.among is not None and len(self.among) <= 1


def _settled(aval: Any, value: Value) -> Value:
    """What is known of an array of this shape and dtype."""
    if 0 in getattr(aval, "shape", ()):
        return Value(frozenset(), value.same)
    among = None if value.among == frozenset() else value.among  # of elements that are not there
    if among is None and getattr(aval, "dtype", None) == np.bool_:
        among = _numbers.BOTH
    value = dataclasses.replace(value, among=among)
    return dataclasses.replace(value, reads=NOTHING) if value.is_constant else value


def _one_of(cases: Sequence[Value], through: str, which: Value | None = None, costs: int = 0) -> Value:
    """What is known of one of several values, whichever it is."""
    first, sames = cases[0].same, [case.same for case in cases]
    among = _numbers.union(case.among for case in cases)
    if among is not None and len(among) == 1:
        return Value(among)
    reads = _reads(through, (value.reads for value in (*cases, *([which] if which else ()))))
    if first is None or not all(map(first.is_like, sames)):
        return Value(among, None, reads)
    same = first.at_cost(costs, *(same.costs for same in sames if same))
    return Value(among, same, reads if same.costs else cases[0].reads)  # what has a cost may depend on which it is


def _opened(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


_CALLS = {
    *("jit", "pjit", "closed_call", "core_call", "core_closed_call", "remat", "remat2", "checkpoint"),
    *("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"),
}
_CALLED = ("jaxpr", "call_jaxpr", "fun_jaxpr")

_HANDING = {
    *("copy", "copy_p", "optimization_barrier", "device_put", "sharding_constraint", "layout_constraint"),
    *("reshard", "mesh_cast", "name", "pvary", "pcast"),
}


def _is_mutable(aval: Any) -> bool:
    return "Ref" in type(aval).__name__


def _is_seen(eqn: Any) -> bool:
    """Whether all that an equation does is in its results: no mutable arrays, no calls of the host but to print."""
    if any(_is_mutable(variable.aval) for variable in (*eqn.invars, *eqn.outvars)):
        return False
    return all("Debug" in type(effect).__name__ for effect in eqn.effects)


class Flow:
    """An interpreter of one program; `is_seen` as long as all that it does is in its results."""

    def __init__(self) -> None:
        self.is_seen = True
        self._numbers = itertools.count(-2, -1)  # of what stands for a part of an array: those of no input

    def run(self, jaxpr: Any, arguments: Sequence[Value]) -> list[Value]:
        """What a program returns for these arguments."""
        jaxpr, consts = _opened(jaxpr)
        dtype_of = lambda aval: None if _is_mutable(aval) else getattr(aval, "dtype", None)
        of_array = lambda aval, array: Value(_numbers.of_array(array, dtype_of(aval)))
        known = {v: of_array(v.aval, const) for v, const in zip(jaxpr.constvars, consts, strict=True)}
        known.update(zip(jaxpr.invars, arguments, strict=True))

        def read(atom: Any) -> Value:
            return of_array(atom.aval, atom.val) if isinstance(atom, jex.core.Literal) else known[atom]

        for eqn in jaxpr.eqns:
            self.is_seen = self.is_seen and _is_seen(eqn)
            results = self._equation(eqn, list(map(read, eqn.invars)))
            known.update((v, _settled(v.aval, value)) for v, value in zip(eqn.outvars, results, strict=True))
        return list(map(read, jaxpr.outvars))

    def _equation(self, eqn: Any, values: list[Value]) -> list[Value]:
        name = eqn.primitive.name
        called = next((eqn.params[key] for key in _CALLED if eqn.params.get(key) is not None), None)
        if name in _CALLS and called is not None and len(_opened(called)[0].invars) == len(values):
            return self.run(called, values)
        if name in _HANDING and len(values) == len(eqn.outvars):
            return values
        rule = {"scan": self._scan, "while": self._while, "cond": self._cond, "shard_map": self._shard_map}.get(name)
        if rule:
            return rule(eqn, values)
        if name == "select_n":
            return [self._select(eqn, *values)]
        return self._primitive(eqn, values)

    def _primitive(self, eqn: Any, values: list[Value]) -> list[Value]:
        name, params = eqn.primitive.name, eqn.params
        old, new = ([getattr(v.aval, "dtype", None) for v in variables] for variables in (eqn.invars, eqn.outvars))
        sames, known = [value.same for value in values], [value.among for value in values]
        through, same = name, None
        if name in _handed.MOVING:
            among, reads = _numbers.after(name, params, known, old, new[0]), _reads("", (v.reads for v in values))
            return [Value(among, _handed.moved(eqn, sames, i), reads) for i in range(len(new))]
        if name == "convert_element_type":
            same, through = sames[0] and _handed.converted(sames[0], new[0]), f"a cast to {new[0]}"
        elif name == "bitcast_convert_type":
            through = ""
            same = sames[0] and _handed.bitcast(sames[0], old[0], new[0])
        elif name in ("real", "imag"):
            same = sames[0] and (None if sames[0].written else dataclasses.replace(sames[0], written=(name,)))
        elif name == "complex":
            same = _handed.whole(*sames)
        elif name in ("add", "add_any", "sub", "or", "xor", "mul", "div") and has_numbers(new[0]) and {*old} == {*new}:
            same = _handed.with_nothing_added(name, sames, known, new[0])
        if name in ("eq", "le", "ge") and eqn.invars[0] is eqn.invars[1] and not is_float(old[0]):
            among = _numbers.TRUE
        else:
            among = _numbers.after(name, params, known, old, new[0]) if new else None
        reads = _reads(through, (value.reads for value in values))
        return [Value(among, same, reads), *(Value(reads=reads) for _ in new[1:])][: len(new)]

    def _select(self, eqn: Any, which: Value, *cases: Value) -> Value:
        possible = {int(_numbers.number(eqn.invars[0].aval.dtype, each)) for each in which.among or ()}
        if not possible or not possible <= set(range(len(cases))):
            possible = set(range(len(cases)))
        chosen, dtype = [cases[i] for i in sorted(possible)], eqn.outvars[0].aval.dtype
        costs = _handed.ODD_BITS if is_float(dtype) and width(dtype) <= 16 else 0
        if len(chosen) == 1:
            return dataclasses.replace(chosen[0], same=chosen[0].same and chosen[0].same.at_cost(costs))
        return _one_of(chosen, "select_n", which, costs)

    def _cond(self, eqn: Any, values: list[Value]) -> list[Value]:
        which, *operands = values
        branches = eqn.params["branches"]
        if which.among is not None and len(which.among) == 1:
            (content,) = which.among
            index = int(_numbers.number(eqn.invars[0].aval.dtype, content))
            return self.run(branches[min(max(index, 0), len(branches) - 1)], operands)
        results = [self.run(branch, operands) for branch in branches]
        return [_one_of(cases, "cond", which) for cases in zip(*results, strict=True)]

    def _looped(self, begin: list[Value], body: Callable[[list[Value]], list[Value]], name: str) -> list[Value]:
        """What is known of what a loop carries, after any number of turns."""
        carry = begin
        while True:
            after = [_one_of(pair, name) for pair in zip(carry, body(carry), strict=True)]
            if all(map(Value.agrees, carry, after)):
                return carry
            carry = after

    def _while(self, eqn: Any, values: list[Value]) -> list[Value]:
        of_cond, of_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        cond_consts, body_consts = values[:of_cond], values[of_cond : of_cond + of_body]
        body = lambda carry: self.run(eqn.params["body_jaxpr"], [*body_consts, *carry])
        carry = self._looped(values[of_cond + of_body :], body, "while")
        (goes_on,) = self.run(eqn.params["cond_jaxpr"], [*cond_consts, *carry])
        stays = lambda value: value.is_constant or (value.same is not None and not value.same.costs)
        return [  # how often it turns has an effect on all that does not stay as it is
            each if stays(each) else dataclasses.replace(each, reads=_reads("while", (each.reads, goes_on.reads)))
            for each in carry
        ]

    def _parts(self, jaxpr: Any, first: int, values: Sequence[Value]) -> tuple[list[Value], dict[int, Value]]:
        """A value that stands for a part of each array, as a program sees it, and what each of them is a part of."""
        avals = [variable.aval for variable in _opened(jaxpr)[0].invars[first:]]
        whole = {next(self._numbers): value for value in values}
        parts = [
            dataclasses.replace(value, same=_handed.Same(number, aval) if hasattr(aval, "shape") else None)
            for aval, (number, value) in zip(avals, whole.items(), strict=True)
        ]
        return parts, whole

    def _put_together(self, value: Value, whole: dict[int, Value]) -> Value:
        """What is known of an array of all parts: where each is what it was, it is what it was."""
        same = value.same
        if same is None or same.input not in whole or not same.is_input:
            return dataclasses.replace(value, same=None)
        before = whole[same.input]
        reads = _reads("", (before.reads, value.reads)) if same.costs else before.reads
        return Value(value.among, before.same and before.same.at_cost(same.costs), reads)

    def _scan(self, eqn: Any, values: list[Value]) -> list[Value]:
        jaxpr = eqn.params["jaxpr"]
        inner, rank = _opened(jaxpr)[0], lambda variable: len(getattr(variable.aval, "shape", ()))
        has_turns = lambda pair: rank(pair[0]) > rank(pair[1])  # the one outside has an axis more
        of_xs = sum(map(has_turns, zip(eqn.invars, inner.invars, strict=True)))
        of_ys = sum(map(has_turns, zip(eqn.outvars, inner.outvars, strict=True)))
        of_carry = len(eqn.outvars) - of_ys
        of_consts = len(values) - of_xs - of_carry
        consts, begin = values[:of_consts], values[of_consts : of_consts + of_carry]
        parts, whole = self._parts(jaxpr, of_consts + of_carry, values[of_consts + of_carry :])
        run = lambda carry: self.run(jaxpr, [*consts, *carry, *parts])
        carry = self._looped(begin, lambda carry: run(carry)[:of_carry], "scan")
        results = run(carry)[of_carry:]
        is_part = lambda value: value.same is not None and value.same.input in whole
        carry = [dataclasses.replace(value, same=None) if is_part(value) else value for value in carry]
        return [*carry, *(self._put_together(value, whole) for value in results)]

    def _shard_map(self, eqn: Any, values: list[Value]) -> list[Value]:
        jaxpr, specs, out_specs = (eqn.params.get(key) for key in ("jaxpr", "in_specs", "out_specs"))
        if jaxpr is None or specs is None or out_specs is None or len(specs) != len(values):
            reads = _reads("shard_map", (value.reads for value in values))
            return [Value(reads=reads) for _ in eqn.outvars]
        parts, whole = self._parts(jaxpr, 0, values)
        split = dict(zip(whole, specs, strict=True))
        return [
            self._put_together(value, {n: v for n, v in whole.items() if split[n] == spec})
            for value, spec in zip(self.run(jaxpr, parts), out_specs, strict=True)
        ]


def flow(closed_jaxpr: Any) -> tuple[list[Value], bool]:
    """What is known of each result of a program, whatever its inputs; and whether its results are all that it does."""
    program = Flow()
    inputs = enumerate(closed_jaxpr.in_avals)
    arguments = [_settled(aval, Value(None, _handed.Same(i, aval), Reads(1 << i))) for i, aval in inputs]
    return program.run(closed_jaxpr, arguments), program.is_seen
