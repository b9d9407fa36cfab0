"""Faults are put into the rules one by one, and random programs have to find each.

A program shows a fault if something else is claimed of it than without, and a run says otherwise.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from claims import Case, mesh_of

from frozen_optax._jaxprs import opened, subprograms
from frozen_optax._proofs import (
    _constants,
    _control,
    _interpreter,
    _known,
    _primitives,
    _provenance,
    _rules,
)
from frozen_optax._proofs import _trace as _tracing
from frozen_optax._proofs._known import Dependencies, Known
from frozen_optax._proofs._provenance import Loss
from frozen_optax._proofs._rules import Rule, _elements_of, _facts

PROGRAMS = 500  # in which a fault has to show
RULES, PARAMETERS = _rules.RULES, {name: rule.parameters for name, rule in _rules.RULES.items()}


@functools.cache
def case(seed):
    return Case(seed, mesh=mesh_of(4))


def rule(name, known):
    """Another rule for a primitive."""
    parameters = PARAMETERS.get(name, "accuracy axis_name perm")
    return lambda patch: patch.setitem(RULES, name, Rule(known, parameters))


def accepts_all(name):
    parameters = PARAMETERS[name]
    return lambda patch: patch.setitem(RULES, name, Rule(RULES[name].known, parameters))


def replaced(module, name, value):
    return lambda patch: patch.setattr(module, name, value)


def moved_without(name):
    """Another move than the one that the parameters tell of."""

    def known(equation, output):
        params = {**equation.params, name: None}
        eqn = equation.eqn.replace(params=params)
        return _provenance.moved(eqn, equation.forwarded, output)

    return known


def at_no_loss(function):
    def known(*args):
        found = function(*args)
        return found and dataclasses.replace(found, losses=Loss.NOTHING)

    return known


def unmoved(eqn, operands, output):
    return operands[0]


def without_dependency_on_which(cases, through, which=None, losses=Loss.NOTHING):
    return _known.join(cases, through, None, losses)


def first_case(equation, run):
    return [equation.operands[1]]


def one_turn(begin, turn, through):
    return list(turn(list(begin)))


def no_turn(begin, turn, through):
    return list(begin)


def parts_in_any_order(known, whole_of, *_):
    forwarded = known.forwarded
    if forwarded is None or forwarded.source not in whole_of:
        return dataclasses.replace(known, forwarded=None)
    return whole_of[forwarded.source]


def any_part(known, whole_of, *_):
    return next(iter(whole_of.values()), known)


def first_source_alone(cls, sources, through=""):
    sources = list(sources)
    return (
        Dependencies(sources[0].inputs, through, (sources[0],)) if sources else _known.INDEPENDENT
    )


def zero_if_one_is(equation, output):
    is_zero = any(map(_constants.is_zero, equation.possible, equation.dtypes))
    return _constants.zeros(equation.dtype) if is_zero else None


def cast_without_a_look_back(dtype):
    return lambda x: np.asarray(x).astype(dtype)


def either_part(real, imag):
    return real and imag and real.rewritten()


def without_weak_types(leaf):
    return jax.ShapeDtypeStruct(np.shape(leaf), jax.numpy.result_type(leaf))


sum_of = _rules._of_each(_constants.sum_of)
handed = _control.handed_on

FAULTS = {
    # What an attack has found once.
    "reshape: its dimensions are not read": rule(
        "reshape", _facts(_elements_of(), moved_without("dimensions"))
    ),
    "narrow floats are moved without a loss": replaced(
        _provenance, "moved", at_no_loss(_provenance.moved)
    ),
    "a user's primitive is trusted for its name": replaced(
        _primitives, "is_of_jax", lambda primitive: True
    ),
    "a scalar that is broadcast stays what it was": replaced(
        _rules, "_operands_of_arithmetic", lambda equation: equation.forwarded
    ),
    # Moves.
    "moves: nothing is moved": replaced(_provenance, "moved", unmoved),
    "conj: handed on": rule("conj", handed),
    "cumsum: handed on": rule("cumsum", handed),
    "optimization_barrier: in reverse": rule(
        "optimization_barrier", lambda equation, run: list(equation.operands)[::-1]
    ),
    # Written otherwise.
    "a cast keeps what it does not hold": replaced(_constants, "holds", lambda new, own: True),
    "complex: of any two parts": replaced(_provenance, "complex_of_parts", either_part),
    "convert_element_type: of what it does not hold": replaced(
        _constants, "converted", cast_without_a_look_back
    ),
    # Arithmetic.
    "add: 0.0 adds nothing to -0.0": replaced(_constants, "additive_identities", _constants.zeros),
    "add: at no loss": rule(
        "add", _facts(sum_of, _rules._on_both_sides(at_no_loss(_provenance.plus_nothing)))
    ),
    "sub: from zero, too": rule("sub", _facts(sum_of, _rules._plus_nothing)),
    "div: one over it, too": rule("div", _facts(_rules._unknown, _rules._times_one)),
    "mul: by whatever is constant": replaced(
        _constants, "is_one", lambda known, dtype: known is not None
    ),
    "mul: zero times anything is zero": rule("mul", _facts(zero_if_one_is, _rules._times_one)),
    "neg: of zero it is zero": rule("neg", _facts(_elements_of())),
    "eq: a NaN equals itself": replaced(_rules, "is_float", lambda dtype: False),
    "exp: zero of zeros": rule("exp", _rules._ZERO_OF_ZEROS),
    "cos: zero of zeros": rule("cos", _rules._ZERO_OF_ZEROS),
    "integer_pow: to any power": accepts_all("integer_pow"),
    # Elements.
    "dynamic_update_slice: of the first": rule("dynamic_update_slice", _facts(_elements_of(0))),
    "pad: without the padding": rule("pad", _facts(_elements_of(0))),
    "reduce_or: of integers": rule("reduce_or", _facts(_elements_of())),
    "rem: elements of the operands": rule("rem", _facts(_elements_of())),
    "scatter: whatever its function does": accepts_all("scatter"),
    "scatter: without the updates": rule("scatter", _facts(_elements_of(0))),
    "sort: the second as the first": rule("sort", _facts(_elements_of(0))),
    # Choices.
    "select_n: the first": rule("select_n", first_case),
    "a choice does not depend on what decides": replaced(
        _control, "join", without_dependency_on_which
    ),
    "only the first operand has an effect": replaced(
        Dependencies, "on", classmethod(first_source_alone)
    ),
    # Loops and devices.
    "loops: one turn": replaced(_control, "_fixpoint", one_turn),
    "loops: no turn": replaced(_control, "_fixpoint", no_turn),
    "parts: moved in themselves": replaced(_control, "_of_all_parts", parts_in_any_order),
    "parts: of another array": replaced(_control, "_of_all_parts", any_part),
    "ppermute: handed on": rule("ppermute", handed),
    "psum: handed on": rule("psum", handed),
    "bools are always true": replaced(_constants, "BOTH", _constants.TRUE),
}


@functools.cache
def names(seed):
    """The primitives of a program, those of its loops and branches among them."""
    return set(_names(case(seed).program))


def _names(program):
    for eqn in opened(program)[0].eqns:
        yield eqn.primitive.name
        for inner in subprograms(eqn):
            yield from _names(inner)


def is_shown_by(seed, monkeypatch, put_back):
    """Whether a run of a program contradicts what is claimed with a fault, and not without it."""
    whole = case(seed)
    with monkeypatch.context() as patch:
        put_back(patch)
        claims = _interpreter.interpret(whole.program, whole.is_spread)
        pairs = zip(claims, whole.claims, strict=True)
        differing = [i for i, pair in enumerate(pairs) if not Known.agrees(*pair)]
        try:
            for i in differing[:4]:
                whole.alone([i], claims).check()
        except AssertionError:
            return True
    return False


@pytest.mark.exhaustive
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_is_put_back_is_found(fault, monkeypatch):
    primitive, _, _ = fault.partition(":")
    for seed in range(PROGRAMS):
        if primitive in RULES and primitive not in names(seed):
            continue
        if is_shown_by(seed, monkeypatch, FAULTS[fault]):
            return
    raise AssertionError(f"{PROGRAMS} programs have not shown: {fault}")


def test_programs_are_traced_with_weak_types(monkeypatch):
    monkeypatch.setattr(_tracing, "abstract", without_weak_types)
    with pytest.raises(AssertionError, match="jax traces no"):
        trace_all(range(20))


def trace_all(seeds):
    for seed in seeds:
        Case(seed).check_that_it_is_what_jax_traces()
