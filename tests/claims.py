"""What is claimed of a random program, compared with its runs on hostile numbers."""

import copy

import jax
import jax.extend as jex
import jax.numpy as jnp
import ml_dtypes  # noqa: F401 (numpy knows its types by name then)
import numpy as np
from helpers import host_devices
from hostile import FLOATS, hostile, random_inputs
from programs import Program

from frozen_optax._jaxprs import is_on_several_devices, needed, opened
from frozen_optax._proofs import _constants
from frozen_optax._proofs._provenance import Loss
from frozen_optax._proofs._trace import Inputs, is_number, trace

LENGTH = 14  # operations of a program


def raw(array):
    """The bits of an array, element by element."""
    host = np.ascontiguousarray(np.asarray(array))
    return host.reshape(-1).view(f"V{host.dtype.itemsize}")


def is_ordinary(numbers):
    """Whether arithmetic keeps a number as it is: it is no NaN, and not subnormal."""
    if numbers.dtype.kind == "c":
        return is_ordinary(numbers.real) & is_ordinary(numbers.imag)
    if not jnp.issubdtype(numbers.dtype, jnp.floating):
        return np.ones(numbers.shape, bool)
    with np.errstate(all="ignore"):
        size = np.abs(numbers.astype(np.float64))
        return ~np.isnan(size) & ((size == 0) | (size >= float(jnp.finfo(numbers.dtype).tiny)))


def written(numbers, ways, dtype):
    """Numbers of an input as a program has written them."""
    for way in ways:
        if way in ("real", "imag"):
            numbers = np.ascontiguousarray(getattr(numbers, way))
        elif way == "bits":
            numbers = numbers.view(dtype)
        else:
            with np.errstate(all="ignore"):
                numbers = numbers.astype(dtype)
    return numbers


def are_alike(expected, output, losses):
    """Whether numbers are the same, but for what may be lost."""
    if expected.dtype.kind == "c":
        real = are_alike(expected.real.copy(), output.real.copy(), losses)
        return real & are_alike(expected.imag.copy(), output.imag.copy(), losses)
    alike = raw(expected) == raw(output)
    if losses & Loss.SIGN_OF_ZERO:
        alike |= (expected == 0) & (output == 0)
    if losses & Loss.ODD_BITS:
        for dtype in FLOATS:  # in which its bits may have been viewed on the way
            if np.dtype(dtype).itemsize == expected.dtype.itemsize:
                alike |= ~is_ordinary(expected.view(dtype))
    return alike


def fault(known, inputs, output):
    """What is claimed of a result and does not hold in a run."""
    output = np.asarray(output)
    if known.possible is not None and _constants.has_numbers(output.dtype):
        found = {each.tobytes() for each in output.reshape(-1)}
        if not found <= known.possible:
            return f"possible values {known.possible}, found {found - known.possible}"
    forwarded = known.forwarded
    if forwarded is None or not isinstance(forwarded.source, int) or forwarded.order is None:
        return None
    source = np.asarray(inputs[forwarded.source]).astype(forwarded.aval.dtype)
    moved = source.reshape(-1)[forwarded.order]
    if moved.shape != output.shape:
        return f"{moved.shape} is forwarded, and {output.shape} comes out"
    expected = written(moved, forwarded.written, output.dtype).reshape(-1)
    if expected.dtype != output.dtype:
        return (
            f"input {forwarded.source} is {expected.dtype}{forwarded.written}, not {output.dtype}"
        )
    alike = are_alike(expected, output.reshape(-1), forwarded.losses)
    if forwarded.losses & Loss.ODD_BITS or "cast" in forwarded.written:
        alike |= ~is_ordinary(moved.reshape(-1))
    if not alike.all():
        wrong = np.flatnonzero(~alike)[:3]
        return (
            f"input {forwarded.source} {forwarded.written} is forwarded, losing "
            f"{forwarded.losses}: {expected[wrong]} became {output.reshape(-1)[wrong]}"
        )
    return None


def others(inputs, random):
    """Other hostile numbers in the place of each input."""
    return [
        hostile(np.shape(each), each.dtype, random) if isinstance(each, np.ndarray) else -each
        for each in inputs
    ]


class Case:
    """A random program on hostile numbers, traced as a proof traces it."""

    def __init__(self, seed, x64=False, mesh=None):
        self.random = np.random.default_rng([seed, 1])
        self.seed = seed
        self.given = [*random_inputs(seed, x64), 0.3]  # the last one has a weak type
        self.function = Program(seed, LENGTH, mesh)
        self.function.leave_out_what_fails(self.given)
        self.trace()

    def trace(self):
        inputs = Inputs()
        _, make = inputs.add("inputs", self.given, is_number)
        results, _, runs = trace(lambda values: (self.function(make(values)), None), inputs)
        self.results = [result for result in results if result.output is not None]
        self.claims = [result.known for result in self.results]
        self.program = runs.program
        self.is_spread = is_on_several_devices(runs.program)

    def alone(self, indices, claims):
        """Some of the results, of which something else is claimed."""
        jaxpr, consts = opened(self.program)
        info = jaxpr.debug_info._replace(result_paths=None)
        jaxpr = jaxpr.replace(outvars=[jaxpr.outvars[i] for i in indices], debug_info=info)
        case = copy.copy(self)
        case.program = jex.core.ClosedJaxpr(jaxpr.replace(eqns=needed(jaxpr)), consts)
        case.claims = [claims[i] for i in indices]
        return case

    def check(self, compiled=False):
        """Compare what is claimed with runs of the program."""
        self.check_that_it_is_what_jax_traces()
        evaluate = jex.core.jaxpr_as_fun(self.program)  # op by op
        if compiled:
            evaluate = jax.jit(evaluate)

        def run(numbers):
            avals = self.program.in_avals
            arrays = [jnp.asarray(x, aval.dtype) for x, aval in zip(numbers, avals, strict=True)]
            return list(map(np.asarray, evaluate(*arrays)))

        first, second = self.given, others(self.given, self.random)
        before = run(first)
        for numbers, outputs in ((first, before), (second, run(second))):
            for i, (known, output) in enumerate(zip(self.claims, outputs, strict=True)):
                wrong = fault(known, numbers, output)
                assert wrong is None, f"seed {self.seed}, result {i}: {wrong}"
        # What a result does not depend on may be anything.
        for known in self.random.permutation(np.array(self.claims, object))[:2]:
            read = known.dependencies.inputs
            after = run([x if read >> i & 1 else second[i] for i, x in enumerate(first)])
            for i, each in enumerate(self.claims):
                if each.dependencies.inputs & ~read == 0:
                    same = np.array_equal(raw(before[i]), raw(after[i]))
                    assert same, f"seed {self.seed}, result {i} depends on more than {read:b}"

    def check_that_it_is_what_jax_traces(self):
        expected = jax.make_jaxpr(self.function)(self.given).out_avals
        found = {(x.shape, x.dtype, x.weak_type) for x in self.program.out_avals}
        missing = found - {(x.shape, x.dtype, x.weak_type) for x in expected}
        assert not missing, f"seed {self.seed}: jax traces no {missing}"


def mesh_of(count):
    auto = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((count,), ("d",), axis_types=auto, devices=host_devices(count))
