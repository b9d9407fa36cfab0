"""One entry a primitive: what is known of its results, from what is known of its operands.

A rule gives all three facts (possible values, the input that is forwarded, dependencies) and names
every parameter that it has read, and those that change no value. An equation with a parameter that
its rule does not name, or does not accept, has no rule; nor has a primitive that is not jax's own.
Of such an equation nothing is claimed: its results depend on all operands and may be anything. So
a primitive that nobody has entered can make a proof fail, and cannot make it wrong.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, cast

import numpy as np
from jax.extend.core import JaxprEqn

from frozen_optax._bits import width
from frozen_optax._proofs import _constants, _control, _primitives, _provenance
from frozen_optax._proofs._constants import Possible, is_float
from frozen_optax._proofs._equations import Equation, Params, Run
from frozen_optax._proofs._known import Known
from frozen_optax._proofs._provenance import Forwarded


@dataclasses.dataclass(frozen=True)
class Rule:
    """What is known of the results of a primitive, and the parameters that were read for it."""

    known: Callable[[Equation, Run], list[Known] | None]  # None claims nothing
    parameters: str = ""  # their names, apart by spaces
    accepts: Callable[[Params], bool] = lambda params: True

    def holds_for(self, eqn: JaxprEqn) -> bool:
        """Whether each parameter of an equation has been read."""
        named = self.parameters.split()
        return set(eqn.params) <= set(named) and self.accepts(eqn.params)


def apply(eqn: JaxprEqn, operands: Sequence[Known], run: Run) -> list[Known]:
    """What is known of the results of an equation; `run` says it of a program that it calls."""
    equation = Equation(eqn, operands)
    rule = RULES.get(equation.name)
    if rule is not None and rule.holds_for(eqn) and _primitives.is_of_jax(eqn.primitive):
        known = rule.known(equation, run)
        if known is not None:
            return known
    return _anything(equation)


def _anything(equation: Equation) -> list[Known]:
    dependencies = equation.depending_on_all(equation.name)
    return [Known(dependencies=dependencies) for _ in equation.eqn.outvars]


# --- possible values, of the result of that number


PossibleOf: TypeAlias = Callable[[Equation, int], Possible]


def _unknown(equation: Equation, output: int) -> Possible:
    return None


def _of_each(function: Callable[..., _constants.Result]) -> PossibleOf:
    """What a function makes of single numbers, element by element."""

    def possible(equation: Equation, output: int) -> Possible:
        return _constants.of_each(function, equation.possible, equation.dtypes, equation.dtype)

    return possible


def _elements_of(*operands: int) -> PossibleOf:
    """Elements of some of the operands, and no others; of all of them where none is named."""

    def possible(equation: Equation, output: int) -> Possible:
        if not _constants.has_numbers(equation.dtype):
            return None
        chosen = [equation.possible[i] for i in operands] if operands else equation.possible
        return _constants.union(chosen)

    return possible


def _sorted(equation: Equation, output: int) -> Possible:
    return equation.possible[output]


def _zero_of_zeros(equation: Equation, output: int) -> Possible:
    """Zero if all operands are; of which sign may depend on the platform."""
    are_zeros = all(map(_constants.is_zero, equation.possible, equation.dtypes))
    return _constants.zeros(equation.dtype) if are_zeros else None


def _of_bools(equation: Equation, output: int) -> Possible:
    """One of them. Of integers, `and` and `or` make new numbers."""
    return equation.possible[0] if equation.dtype == np.bool_ else None


def _converted(equation: Equation, output: int) -> Possible:
    return _of_each(_constants.converted(equation.dtype))(equation, output)


def _viewed(equation: Equation, output: int) -> Possible:
    old, new = equation.dtypes[0], equation.dtype
    if not _constants.has_numbers(old) or not _constants.has_numbers(new):
        return None
    if width(old) != width(new):
        return None
    return _of_each(lambda number: np.asarray(number).view(new))(equation, output)


def _reflexive(function: Callable[..., Any]) -> PossibleOf:
    """A comparison that holds of a number and itself, unless it is a NaN."""

    def possible(equation: Equation, output: int) -> Possible:
        left, right = equation.eqn.invars
        if left is right and not is_float(equation.dtypes[0]):
            return _constants.TRUE
        return _of_each(function)(equation, output)

    return possible


# --- the input that is forwarded, as the result of that number


ForwardedOf: TypeAlias = Callable[[Equation, int], Forwarded | None]


def _none(equation: Equation, output: int) -> Forwarded | None:
    return None


def _moved(equation: Equation, output: int) -> Forwarded | None:
    return _provenance.moved(equation.eqn, equation.forwarded, output)


def _operands_of_arithmetic(equation: Equation) -> list[Forwarded | None]:
    """The inputs that the operands are, if they are arrays of the result's shape and dtype.

    Of one that is converted or broadcast on the way, the elements are not those of the result.
    """
    if set(equation.dtypes) != {equation.dtype} or not _constants.has_numbers(equation.dtype):
        return [None, None]
    shapes = [cast(Any, variable.aval).shape for variable in equation.eqn.invars]
    of_result = cast(Any, equation.eqn.outvars[0].aval).shape
    return [
        forwarded if shape == of_result else None
        for forwarded, shape in zip(equation.forwarded, shapes, strict=True)
    ]


Neutral: TypeAlias = Callable[[Forwarded | None, Possible, Any], Forwarded | None]


def _on_both_sides(with_neutral: Neutral) -> ForwardedOf:
    """Of `x o n` and of `n o x`, of which `with_neutral` says that n changes nothing."""

    def forwarded(equation: Equation, output: int) -> Forwarded | None:
        left, right = _operands_of_arithmetic(equation)
        of_left, of_right = equation.possible
        dtype = equation.dtype
        return with_neutral(left, of_right, dtype) or with_neutral(right, of_left, dtype)

    return forwarded


_plus_nothing = _on_both_sides(_provenance.plus_nothing)
_times_one = _on_both_sides(_provenance.times_one)


def _minus_nothing(equation: Equation, output: int) -> Forwarded | None:
    left, _ = _operands_of_arithmetic(equation)
    _, subtracted = equation.possible
    dtype = equation.dtype
    added = _constants.of_each(np.negative, [subtracted], [dtype], dtype)
    if added is None and _constants.is_zero(subtracted, dtype):
        added = _constants.zeros(dtype)
    return _provenance.plus_nothing(left, added, dtype)


def _over_one(equation: Equation, output: int) -> Forwarded | None:
    left, _ = _operands_of_arithmetic(equation)
    return _provenance.times_one(left, equation.possible[1], equation.dtype)


def _cast(equation: Equation, output: int) -> Forwarded | None:
    return _provenance.converted(equation.forwarded[0], equation.dtype)


def _bitcast(equation: Equation, output: int) -> Forwarded | None:
    return _provenance.bitcast(equation.forwarded[0], equation.dtypes[0], equation.dtype)


def _part(equation: Equation, output: int) -> Forwarded | None:
    return _provenance.part_of_complex(equation.forwarded[0], equation.name)


def _complex(equation: Equation, output: int) -> Forwarded | None:
    return _provenance.complex_of_parts(*equation.forwarded)


# --- all three facts, one by one


def _facts(
    possible: PossibleOf = _unknown,
    forwarded: ForwardedOf = _none,
    through: Callable[[Equation], str] = lambda equation: equation.name,
) -> Callable[[Equation, Run], list[Known]]:
    """Of an equation that reads all its operands; `through` is what a reader is told it does."""

    def known(equation: Equation, run: Run) -> list[Known]:
        dependencies = equation.depending_on_all(through(equation))
        outputs = range(len(equation.eqn.outvars))
        return [Known(possible(equation, i), forwarded(equation, i), dependencies) for i in outputs]

    return known


def _in_silence(equation: Equation) -> str:
    return ""


def _a_cast(equation: Equation) -> str:
    return f"a cast to {equation.dtype}"


# Elements are moved, and nothing else is done.
_MOVES = _facts(_elements_of(), _moved, _in_silence)

_ZERO_OF_ZEROS = _facts(_zero_of_zeros)
_PRODUCT = _facts(_of_each(_constants.product_of), _times_one)
_CAST = _facts(_converted, _cast, _a_cast)


# --- the table


def _no(parameter: str) -> Callable[[Params], bool]:
    return lambda params: params.get(parameter) is None


def _is_power(params: Params) -> bool:
    return params["y"] > 0


# The parameters of versions from 0.7 on. Those of placement, of derivatives and of names, and the
# compiler's options, change no value.
_SCATTER = (
    "update_jaxpr update_consts dimension_numbers mode out_sharding indices_are_sorted"
    " unique_indices"
)
_SCAN = "jaxpr length reverse unroll linear _split_transpose num_consts num_carry ft_in ft_out"
_SHARD_MAP = "jaxpr in_specs out_specs mesh check_vma manual_axes newly_manual_axes"
_JIT = (
    "jaxpr name inline keep_unused donated_invars ctx_mesh in_shardings out_shardings in_layouts"
    " out_layouts compiler_options_kvs"
)
_REMAT = "jaxpr prevent_cse differentiated policy"
_JVP = "call_jaxpr jvp_jaxpr_fun num_consts symbolic_zeros"
_VJP = "call_jaxpr fwd_jaxpr_thunk bwd num_consts out_trees symbolic_zeros"

RULES: Mapping[str, Rule] = {
    # Arithmetic.
    "add": Rule(_facts(_of_each(_constants.sum_of), _plus_nothing)),
    "add_any": Rule(_facts(_of_each(_constants.sum_of), _plus_nothing)),
    "sub": Rule(_facts(_of_each(_constants.difference_of), _minus_nothing)),
    "mul": Rule(_PRODUCT, "out_dtype", _no("out_dtype")),
    "div": Rule(_facts(_of_each(_constants.quotient_of), _over_one)),
    "neg": Rule(_facts(_of_each(np.negative))),
    "abs": Rule(_facts(_of_each(_constants.magnitude_of))),
    "max": Rule(_facts(_of_each(_constants.larger_of))),
    "min": Rule(_facts(_of_each(_constants.smaller_of))),
    "clamp": Rule(_facts(_of_each(_constants.clamped))),
    "is_finite": Rule(_facts(_of_each(np.isfinite))),
    # Bits and bools.
    "and": Rule(_facts(_of_each(np.bitwise_and))),
    "or": Rule(_facts(_of_each(np.bitwise_or), _plus_nothing)),
    "xor": Rule(_facts(_of_each(np.bitwise_xor), _plus_nothing)),
    "not": Rule(_facts(_of_each(np.bitwise_not))),
    "eq": Rule(_facts(_reflexive(np.equal))),
    "ne": Rule(_facts(_of_each(np.not_equal))),
    "lt": Rule(_facts(_of_each(np.less))),
    "le": Rule(_facts(_reflexive(np.less_equal))),
    "gt": Rule(_facts(_of_each(np.greater))),
    "ge": Rule(_facts(_reflexive(np.greater_equal))),
    "reduce_and": Rule(_facts(_of_bools), "axes out_sharding"),
    "reduce_or": Rule(_facts(_of_bools), "axes out_sharding"),
    # Zero of zeros.
    "asinh": Rule(_ZERO_OF_ZEROS),
    "asin": Rule(_ZERO_OF_ZEROS),
    "atan": Rule(_ZERO_OF_ZEROS),
    "atanh": Rule(_ZERO_OF_ZEROS),
    "cbrt": Rule(_ZERO_OF_ZEROS, "accuracy", _no("accuracy")),
    "ceil": Rule(_ZERO_OF_ZEROS),
    "conj": Rule(_ZERO_OF_ZEROS, "input_dtype"),
    "cumsum": Rule(_ZERO_OF_ZEROS, "axis reverse"),
    "erf": Rule(_ZERO_OF_ZEROS),
    "expm1": Rule(_ZERO_OF_ZEROS, "accuracy", _no("accuracy")),
    "floor": Rule(_ZERO_OF_ZEROS),
    "integer_pow": Rule(_ZERO_OF_ZEROS, "y", _is_power),
    "log1p": Rule(_ZERO_OF_ZEROS, "accuracy", _no("accuracy")),
    "psum": Rule(_ZERO_OF_ZEROS, "axes axis_index_groups"),
    "psum_invariant": Rule(_ZERO_OF_ZEROS, "axes axis_index_groups"),
    "reduce_precision": Rule(_ZERO_OF_ZEROS, "exponent_bits mantissa_bits"),
    "reduce_sum": Rule(_ZERO_OF_ZEROS, "axes out_sharding"),
    "round": Rule(_ZERO_OF_ZEROS, "rounding_method"),
    "sign": Rule(_ZERO_OF_ZEROS),
    "sin": Rule(_ZERO_OF_ZEROS, "accuracy", _no("accuracy")),
    "sinh": Rule(_ZERO_OF_ZEROS),
    "sqrt": Rule(_ZERO_OF_ZEROS, "accuracy", _no("accuracy")),
    "square": Rule(_ZERO_OF_ZEROS),
    "tan": Rule(_ZERO_OF_ZEROS, "accuracy", _no("accuracy")),
    "tanh": Rule(_ZERO_OF_ZEROS, "accuracy", _no("accuracy")),
    # Written otherwise.
    "convert_element_type": Rule(_CAST, "new_dtype weak_type sharding"),
    "bitcast_convert_type": Rule(_facts(_viewed, _bitcast, _in_silence), "new_dtype"),
    "real": Rule(_facts(_of_each(np.real), _part)),
    "imag": Rule(_facts(_of_each(np.imag), _part)),
    "complex": Rule(_facts(_unknown, _complex)),
    # Moves: whatever their parameters are, the primitive itself is run on the places.
    "broadcast_in_dim": Rule(_MOVES, "shape broadcast_dimensions sharding"),
    "concatenate": Rule(_MOVES, "dimension"),
    "reshape": Rule(_MOVES, "new_sizes dimensions sharding"),
    "rev": Rule(_MOVES, "dimensions"),
    "slice": Rule(_MOVES, "start_indices limit_indices strides"),
    "split": Rule(_MOVES, "sizes axis"),
    "squeeze": Rule(_MOVES, "dimensions"),
    "stack": Rule(_MOVES, "axis"),
    "tile": Rule(_MOVES, "reps"),
    "transpose": Rule(_MOVES, "permutation"),
    "unstack": Rule(_MOVES, "axis"),
    # Elements of the operands, in places that may depend on numbers.
    "cummax": Rule(_facts(_elements_of(0)), "axis reverse"),
    "cummin": Rule(_facts(_elements_of(0)), "axis reverse"),
    "dynamic_slice": Rule(_facts(_elements_of(0)), "slice_sizes"),
    "dynamic_update_slice": Rule(_facts(_elements_of(0, 1))),
    "pad": Rule(_facts(_elements_of(0, 1)), "padding_config"),
    "reduce_max": Rule(_facts(_elements_of(0)), "axes out_sharding"),
    "reduce_min": Rule(_facts(_elements_of(0)), "axes out_sharding"),
    # Unless it applies a function to them.
    "scatter": Rule(_facts(_elements_of(0, 2)), _SCATTER, _no("update_jaxpr")),
    "sort": Rule(_facts(_sorted), "dimension is_stable num_keys"),
    "select_n": Rule(_control.select),
    # Handed on.
    "copy": Rule(_control.handed_on),
    "device_put": Rule(_control.placed, "devices srcs copy_semantics"),
    "layout_constraint": Rule(_control.handed_on, "layout"),
    "mesh_cast": Rule(_control.handed_to_other_devices, "dst_sharding"),
    "name": Rule(_control.handed_on, "name"),
    "optimization_barrier": Rule(_control.handed_on),
    "pvary": Rule(_control.handed_on, "axes axis_index_groups"),
    "reshard": Rule(_control.handed_to_other_devices, "dst_sharding concrete_mesh"),
    "sharding_constraint": Rule(_control.placed, "sharding layout context_mesh unconstrained_dims"),
    "stop_gradient": Rule(_control.handed_on),
    # Programs.
    "jit": Rule(_control.calls("jaxpr"), _JIT),
    "remat2": Rule(_control.calls("jaxpr"), _REMAT),
    "custom_jvp_call": Rule(_control.calls("call_jaxpr"), _JVP),
    "custom_vjp_call": Rule(_control.calls("call_jaxpr"), _VJP),
    "cond": Rule(_control.branches, "branches"),
    "while": Rule(_control.while_loop, "cond_nconsts cond_jaxpr body_nconsts body_jaxpr"),
    "scan": Rule(_control.scan, _SCAN),
    "shard_map": Rule(_control.shard_map, _SHARD_MAP),
}
