"""Whether an operation keeps the examples apart: one entry a primitive.

A rule is asked about an equation of which some operand knows of the examples, or some result has
their axis. It says True where each example's part of each result is made of the same example's part
of the operands and of what all examples share, in the same way for each. Where the examples lie is
known from the shapes; a rule says that they are still in that order, and that nothing is mixed.

A primitive without a rule, and one that is only called like one of jax's, mixes all there is. So a
primitive that nobody has entered can leave a computation where it is, and cannot make it wrong.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from jax.extend.core import JaxprEqn

from frozen_optax._hoist._sizes import Batch, Sizes
from frozen_optax._jaxprs import Program, needed, opened, subprograms
from frozen_optax._proofs._primitives import is_of_jax

MaybeBatch: TypeAlias = Batch | None


@dataclasses.dataclass(frozen=True)
class Step:
    """An equation at two batch sizes, and where the examples lie in what it takes and gives."""

    eqn: JaxprEqn
    twin: JaxprEqn
    sizes: Sizes

    @property
    def params(self) -> Mapping[str, Any]:
        """The parameters of the primitive."""
        return self.eqn.params

    def shape(self, operand: int) -> tuple[int, ...]:
        """The shape of an operand."""
        return self.eqn.invars[operand].aval.shape  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def shape_of_result(self) -> tuple[int, ...]:
        """The shape of the first result."""
        return self.eqn.outvars[0].aval.shape  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def ins(self) -> list[MaybeBatch]:
        """Where the examples lie in each operand."""
        return self._batches(self.eqn.invars, self.twin.invars)

    @property
    def outs(self) -> list[MaybeBatch]:
        """Where they lie in each result, by its shape."""
        return self._batches(self.eqn.outvars, self.twin.outvars)

    def _batches(self, one: Sequence[Any], other: Sequence[Any]) -> list[MaybeBatch]:
        pairs = zip(one, other, strict=True)
        return [self.sizes.batch(left.aval, right.aval) for left, right in pairs]


Rule: TypeAlias = Callable[[Step], bool]


def keeps_apart(step: Step) -> bool:
    """Whether an equation makes each example's part of its results of that example's alone."""
    if not is_of_jax(step.eqn.primitive):
        return False
    if not any(step.ins) and not any(step.outs) and not any(subprograms(step.eqn)):
        return True  # it knows nothing of the examples, and has nothing within that could
    rule = RULES.get(step.eqn.primitive.name)
    return rule is not None and rule(step)


def all_keep_apart(program: Program, twin: Program, sizes: Sizes) -> bool:
    """Whether all equations of a program do."""
    (jaxpr, _), (other, _) = opened(program), opened(twin)
    pairs = zip(needed(jaxpr), needed(other), strict=True)
    return all(keeps_apart(Step(eqn, twin, sizes)) for eqn, twin in pairs)


# --- element by element, and moves


def _each_element(step: Step) -> bool:
    """What holds the examples has them where the result has, the rest is the same for all."""
    out, shape = step.outs[0], step.shape_of_result
    if not out:
        return False
    for i, batch in enumerate(step.ins):
        own = step.shape(i)
        if not own:  # a single number
            continue
        if len(own) != len(shape) or any(n not in (1, m) for n, m in zip(own, shape, strict=True)):
            return False
        if batch != out and (batch is not None or own[out.axis] != 1):
            return False
    return True


def _each_of_several(step: Step) -> bool:
    """Each result is the operand at its place."""
    return step.ins == step.outs


def _broadcast(step: Step) -> bool:
    """A new axis holds the same for all; one that holds the examples is the one it was."""
    if not step.ins[0]:
        return True
    axis, block = step.ins[0]
    place = step.params["broadcast_dimensions"][axis]
    return step.outs[0] == (place, block) and step.shape(0)[axis] == step.shape_of_result[place]


def _reshape(step: Step) -> bool:
    """As elements keep their order, examples do where as much lies around them as before."""
    before, after = step.ins[0], step.outs[0]
    if step.params.get("dimensions") is not None or not before or not after:
        return False
    outside = math.prod(step.shape(0)[: before.axis])
    return outside == math.prod(step.shape_of_result[: after.axis])


def _transpose(step: Step) -> bool:
    before, after = step.ins[0], step.outs[0]
    if not before or not after:
        return False
    return step.params["permutation"][after.axis] == before.axis and before.block == after.block


def _without(batch: Batch, axes: Sequence[int]) -> Batch:
    """Where the examples lie when other axes are gone."""
    return Batch(batch.axis - sum(axis < batch.axis for axis in axes), batch.block)


def _axes_go(name: str) -> Rule:
    """Some axes are reduced or dropped; all operands are alike, or single numbers."""

    def rule(step: Step) -> bool:
        lie = {batch for i, batch in enumerate(step.ins) if step.shape(i)}
        if len(lie) != 1 or None in lie:
            return False
        (batch,) = lie
        axes = [axis % len(step.shape(0)) for axis in step.params[name]]
        assert batch is not None
        return batch.axis not in axes and set(step.outs) == {_without(batch, axes)}

    return rule


def _one_other_axis(name: str, default: int | None = None) -> Rule:
    """Something is done along an axis; all that has axes has the examples along the same other."""

    def rule(step: Step) -> bool:
        lie = {batch for i, batch in enumerate(step.ins) if step.shape(i)} | set(step.outs)
        if len(lie) != 1 or None in lie:
            return False
        (batch,) = lie
        assert batch is not None
        axis = step.params.get(name, default)
        if axis is None:
            return False
        return axis % len(step.shape_of_result) != batch.axis

    return rule


def _unstack(step: Step) -> bool:
    batch, axis = step.ins[0], step.params["axis"]
    return bool(batch) and batch.axis != axis and set(step.outs) == {_without(batch, [axis])}


def _stack(step: Step) -> bool:
    batch, axis = step.outs[0], step.params["axis"]
    return bool(batch) and batch.axis != axis and set(step.ins) == {_without(batch, [axis])}


def _tile(step: Step) -> bool:
    """The whole, as often for each example; or as often along an axis that is not theirs."""
    batch = step.ins[0]
    if not batch:
        return True
    return bool(batch) and step.params["reps"][batch.axis] == 1 and step.outs == [batch]


def _rev(step: Step) -> bool:
    batch = step.ins[0]
    return bool(batch) and batch.axis not in step.params["dimensions"] and step.outs == [batch]


def _iota(step: Step) -> bool:
    """It counts along an axis, and the examples are along another."""
    return bool(step.outs[0]) and step.params["dimension"] != step.outs[0].axis


def _slice(step: Step) -> bool:
    """All of the examples are taken, in their order."""
    batch = step.ins[0]
    if not batch or step.outs != [batch]:
        return False
    strides = step.params["strides"]
    return strides is None or strides[batch.axis] == 1


def _pad(step: Step) -> bool:
    batch = step.ins[0]
    is_alone = bool(batch) and tuple(step.params["padding_config"][batch.axis]) == (0, 0, 0)
    return is_alone and not step.ins[1] and step.outs == [batch]


def _dynamic_slice(step: Step) -> bool:
    """All of the examples are taken: wherever it is said to begin, it begins at the first."""
    return bool(step.ins[0]) and not any(step.ins[1:]) and step.outs == [step.ins[0]]


def _dynamic_update_slice(step: Step) -> bool:
    array, update, *starts = step.ins
    return bool(array) and array == update and not any(starts) and step.outs == [array]


def _gather(step: Step) -> bool:
    array, indices = step.ins
    numbers, out = step.params["dimension_numbers"], step.outs[0]
    if not out:
        return False
    looked_up = [i for i in range(len(step.shape_of_result)) if i not in numbers.offset_dims]
    paired, with_pairs = numbers.operand_batching_dims, numbers.start_indices_batching_dims
    if indices:
        if indices.axis == len(step.shape(1)) - 1 or indices.block != out.block:
            return False
        if array:  # each example looks into its own part
            if array.axis not in paired or array.block != indices.block:
                return False
            if with_pairs[paired.index(array.axis)] != indices.axis:
                return False
        return out.axis == looked_up[indices.axis]
    # The same parts of each example's are taken, of all of them, wherever it is said to begin.
    window = _window_axes(step, numbers.collapsed_slice_dims, paired)
    if not array or array.axis not in window:
        return False
    return out == (numbers.offset_dims[window.index(array.axis)], array.block)


def _window_axes(step: Step, *others: Sequence[int]) -> list[int]:
    """The axes of the first operand of which a window is looked up or written."""
    left_out = {axis for each in others for axis in each}
    return [axis for axis in range(len(step.shape(0))) if axis not in left_out]


def _scatter(step: Step) -> bool:
    array, indices, updates = step.ins
    numbers, out = step.params["dimension_numbers"], step.outs[0]
    if not array or not updates or out != array or step.params["update_consts"]:
        return False
    if updates.block != array.block:
        return False
    paired, with_pairs = numbers.operand_batching_dims, numbers.scatter_indices_batching_dims
    in_windows = numbers.update_window_dims
    if indices:  # each example is written to where it says
        if array.axis not in paired or indices.block != array.block:
            return False
        if with_pairs[paired.index(array.axis)] != indices.axis:
            return False
        looked_up = [i for i in range(len(step.shape(2))) if i not in in_windows]
        return updates.axis == looked_up[indices.axis]
    # The same parts of each example's are written, of all of them.
    window = _window_axes(step, numbers.inserted_window_dims, paired)
    return array.axis in window and updates.axis == in_windows[window.index(array.axis)]


# --- products


def _dot(step: Step) -> bool:
    ((left_summed, right_summed), (left_paired, right_paired)) = step.params["dimension_numbers"]
    left, right = step.ins
    out = step.outs[0]
    if not out:
        return False
    if out.axis < len(left_paired):
        here = Batch(left_paired[out.axis], out.block), Batch(right_paired[out.axis], out.block)
        return (left, right) == here
    free = [
        (side, axis)
        for side, done in ((0, (*left_summed, *left_paired)), (1, (*right_summed, *right_paired)))
        for axis in range(len(step.shape(side)))
        if axis not in done
    ]
    side, axis = free[out.axis - len(left_paired)]
    mine, others = step.ins[side], step.ins[1 - side]
    return mine == (axis, out.block) and others is None


def _convolution(step: Step) -> bool:
    numbers = step.params["dimension_numbers"]
    images, kernel = step.ins
    if not images or kernel or step.params["batch_group_count"] != 1:
        return False
    is_first = images.axis == numbers.lhs_spec[0]
    return is_first and step.outs == [Batch(numbers.out_spec[0], images.block)]


def _window(step: Step) -> bool:
    """A window over some axes that is one example long."""
    batch = step.ins[0]
    if not batch or {each for i, each in enumerate(step.ins) if step.shape(i)} != {batch}:
        return False
    params = step.params
    ones = ("window_dimensions", "window_strides", "base_dilation", "window_dilation")
    is_one = all(params[name][batch.axis] == 1 for name in ones if params.get(name) is not None)
    is_bare = tuple(params["padding"][batch.axis]) == (0, 0) if "padding" in params else True
    return is_one and is_bare and set(step.outs) == {batch}


def _fourier(step: Step) -> bool:
    batch, transformed = step.ins[0], len(step.params["fft_lengths"])
    return bool(batch) and batch.axis < len(step.shape(0)) - transformed and step.outs == [batch]


# --- programs


def _calls(name: str) -> Rule:
    """The program that a parameter holds is run on the operands."""

    def rule(step: Step) -> bool:
        return all_keep_apart(step.params[name], step.twin.params[name], step.sizes)

    return rule


def _branches(step: Step) -> bool:
    pairs = zip(step.params["branches"], step.twin.params["branches"], strict=True)
    return all(all_keep_apart(one, other, step.sizes) for one, other in pairs)


def _while(step: Step) -> bool:
    return all(_calls(name)(step) for name in ("cond_jaxpr", "body_jaxpr"))


def _scan(step: Step) -> bool:
    inner = opened(step.params["jaxpr"])[0]
    # What is scanned over, and what is stacked, has an axis more outside.
    is_scanned = _have_less_axes(step.eqn.invars, inner.invars)
    is_stacked = _have_less_axes(step.eqn.outvars, inner.outvars)
    over_examples = [
        batch is not None and batch.axis == 0
        for batch, scanned in zip(step.ins, is_scanned, strict=True)
        if scanned
    ]
    if not any(over_examples):
        if step.params["length"] != step.twin.params["length"]:
            return False
        return _calls("jaxpr")(step)
    # One example after the other, as `jax.lax.map` does: nothing is carried from one to the next.
    # So what it does with one knows nothing of how many there are.
    of_one = dataclasses.replace(step.sizes, may_count=False)
    pair = ({"jaxpr": each["jaxpr"]} for each in (step.params, step.twin.params))
    of_one.params(*pair)
    shared = [batch for batch, scanned in zip(step.ins, is_scanned, strict=True) if not scanned]
    return (
        all(over_examples)
        and all(is_stacked)
        and not any(shared)
        and {*step.outs, *step.ins} - {None} == {Batch(0)}
    )


def _have_less_axes(outside: Sequence[Any], inside: Sequence[Any]) -> list[bool]:
    rank = lambda var: len(getattr(var.aval, "shape", ()))
    return [rank(a) > rank(b) for a, b in zip(outside, inside, strict=True)]


# --- the table


def _names(words: str) -> frozenset[str]:
    return frozenset(words.split())


ELEMENTWISE = _names(
    "abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e"
    " bitcast_convert_type cbrt ceil clamp clz complex conj convert_element_type cos"
    " cosh digamma div eq eq_to erf erf_inv erfc exp exp2 expm1 floor ge gt igamma igamma_grad_a"
    " igammac imag integer_pow is_finite le le_to lgamma log log1p log2 logistic lt lt_to max min"
    " mul ne neg nextafter not one_minus_square or polygamma population_count pow real"
    " reduce_precision"
    " regularized_incomplete_beta rem round rsqrt select_n shift_left shift_right_arithmetic"
    " shift_right_logical sign sin sinh sqrt square sub tan tanh xor zeta"
)

# They return what they are given.
_HANDED_ON = _names(
    "copy copy_p device_put name optimization_barrier sharding_constraint stop_gradient"
)

# They put elements in other places, or leave some out, and compute nothing.
MOVES = _HANDED_ON | _names(
    "broadcast_in_dim concatenate dynamic_slice dynamic_update_slice gather iota pad reshape rev"
    " scatter slice split squeeze stack tile transpose unstack"
)

REDUCTIONS = _names(
    "argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum reduce_xor"
)

_SCATTERS = _names("scatter scatter-add scatter-max scatter-min scatter-mul scatter-sub")
_CUMULATIVE = _names("cumlogsumexp cummax cummin cumprod cumsum")
_WINDOWS = _names("reduce_window reduce_window_max reduce_window_min reduce_window_sum")

RULES: Mapping[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, _each_element),
    **dict.fromkeys(_HANDED_ON, _each_of_several),
    # Moves.
    "broadcast_in_dim": _broadcast,
    "concatenate": _one_other_axis("dimension"),
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "gather": _gather,
    "iota": _iota,
    "pad": _pad,
    "reshape": _reshape,
    "rev": _rev,
    **dict.fromkeys(_SCATTERS, _scatter),
    "slice": _slice,
    "split": _one_other_axis("axis"),
    "squeeze": _axes_go("dimensions"),
    "stack": _stack,
    "tile": _tile,
    "transpose": _transpose,
    "unstack": _unstack,
    # Along axes.
    **dict.fromkeys(REDUCTIONS, _axes_go("axes")),
    **dict.fromkeys(_CUMULATIVE, _one_other_axis("axis")),
    "reduce": _axes_go("dimensions"),
    "sort": _one_other_axis("dimension"),
    "top_k": _one_other_axis("axis", -1),  # some versions know of the last one alone
    # Products and windows.
    "conv_general_dilated": _convolution,
    "dot_general": _dot,
    "fft": _fourier,
    **dict.fromkeys(_WINDOWS, _window),
    # Programs.
    "checkpoint": _calls("jaxpr"),
    "cond": _branches,
    "custom_jvp_call": _calls("call_jaxpr"),
    "custom_vjp_call": _calls("call_jaxpr"),
    "jit": _calls("jaxpr"),
    "remat2": _calls("jaxpr"),
    "scan": _scan,
    "while": _while,
}
