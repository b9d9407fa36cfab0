"""Rules: one for each primitive of jax, each parameter read, and of all others nothing claimed."""

import gc
import weakref

import jax
import jax.extend as jex
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import host_bits, host_devices
from jax.interpreters import mlir
from programs import NAMES, impostor

import frozen_optax as fo
from frozen_optax._jaxprs import opened
from frozen_optax._proofs import _interpreter, _primitives, _rules
from frozen_optax._proofs._known import of_input

P = jax.sharding.PartitionSpec
EXPLICIT = jax.sharding.AxisType.Explicit


def params():
    return {"base": jnp.arange(6.0).reshape(2, 3), "head": jnp.ones(2)}


def step_that(changes):
    return lambda p: p | {"base": changes(p["base"])}


def proved(changes, base=None, **kwargs):
    """What is proved of a leaf that a step changes like that."""
    given = params() if base is None else params() | {"base": base}
    return fo.assert_step_freezes(step_that(changes), given, frozen="base", **kwargs)["base"]


def refuted(changes, base=None):
    with pytest.raises(AssertionError, match="not proved") as error:
        proved(changes, base)
    return str(error.value)


# --- each parameter is read


def test_a_reshape_that_transposes_is_seen():
    transposes = lambda p: p.ravel(order="F").reshape(p.shape)
    assert "refuted" in refuted(transposes)
    dimensions = lambda p: jax.lax.reshape(p, (6,), (1, 0)).reshape(p.shape)
    assert "refuted" in refuted(dimensions)


def test_a_reshape_in_fortran_order_there_and_back_is_the_leaf():
    assert proved(lambda p: jnp.reshape(p, p.shape, order="F"), exact=True) == "itself"
    back = lambda p: p.ravel(order="F").reshape(p.shape, order="F")
    assert proved(back, exact=True) == "itself"


def test_loops_in_loops_are_run_once_for_what_is_known():
    def nested(p, depth):
        if depth == 0:
            return p[::-1][::-1]
        return jax.lax.fori_loop(0, 2, lambda i, q: nested(q, depth - 1), p)

    assert proved(lambda p: nested(p, 8), exact=True) == "itself"


def test_what_is_remembered_of_a_program_keeps_what_it_goes_by():
    program = jax.make_jaxpr(lambda x: x + 1)(jnp.ones(2))
    rev = jax.make_jaxpr(lambda x: jax.lax.rev(x, (0,)))(jnp.ones(2))
    (moved,) = _interpreter.interpret(rev)
    moves = weakref.ref(moved.forwarded.moves)
    before = {}
    _interpreter.run(program, [moved], before)
    del moved
    gc.collect()
    assert moves() is not None  # else another one could be taken for it, at the same address


def test_bfloat16_that_is_moved_loses_bits():
    rolled = lambda p: jnp.roll(jnp.roll(p, 1), -1)
    assert "odd bits" in proved(rolled, jnp.ones(4, jnp.bfloat16))
    assert proved(rolled, jnp.ones(4, jnp.float32), exact=True) == "itself"


def test_a_parameter_that_no_rule_names_claims_nothing(monkeypatch):
    program = jax.make_jaxpr(lambda x: jax.lax.rev(x, (0,)))(jnp.ones(2))
    (eqn,) = opened(program)[0].eqns
    operand = of_input(0, program.in_avals[0])
    (known,) = _rules.apply(eqn, [operand], _interpreter.run)
    assert known.forwarded is not None
    newer = eqn.replace(params={**eqn.params, "how": "otherwise"})
    (known,) = _rules.apply(newer, [operand], _interpreter.run)
    assert known.forwarded is None
    assert known.possible is None
    assert known.dependencies.inputs == 1


def test_a_product_of_another_dtype_is_not_the_operand():
    rule = _rules.RULES["mul"]
    program = jax.make_jaxpr(lambda x: x * jnp.ones(2))(jnp.ones(2))
    eqn = opened(program)[0].eqns[-1]
    assert eqn.primitive.name == "mul"
    assert rule.holds_for(eqn)
    assert not rule.holds_for(eqn.replace(params={"out_dtype": np.dtype("float32")}))


# --- of jax's own primitives


def test_every_rule_is_of_a_primitive_that_some_version_of_jax_has():
    older_or_newer = {"mesh_cast", "stack", "tile", "unstack"}
    listed = {primitive.name for primitive in _primitives._listed()}
    traced = {primitive.name for primitive in _primitives._found_by_tracing()}
    here = {"layout_constraint"}  # in programs that place by layout
    assert set(_rules.RULES) <= listed | traced | older_or_newer | here


def test_primitives_are_found_within_a_trace_as_well():
    _primitives._found_by_tracing.cache_clear()
    found = []
    jax.jit(lambda x: found.append(_primitives._found_by_tracing()) or x)(1.0)
    _primitives._found_by_tracing.cache_clear()
    assert found[0] == _primitives._found_by_tracing()


@pytest.mark.parametrize("name", NAMES)
def test_a_users_primitive_of_a_trusted_name_is_not_trusted(name):
    adds = impostor(name, "adds")
    assert "refuted" in refuted(lambda p: adds.bind(p))


def test_a_users_primitive_that_does_nothing_is_unknown():
    primitive = jex.core.Primitive("copy")
    primitive.def_impl(lambda x: x)
    primitive.def_abstract_eval(lambda aval: aval)
    mlir.register_lowering(primitive, lambda context, x: [x])
    message = refuted(lambda p: primitive.bind(p))
    assert "unknown" in message
    assert "depends on base through copy" in message


# --- operands that are not alike


@pytest.mark.parametrize(
    "move",
    [
        lambda x: jnp.stack([x, x])[0],
        lambda x: jnp.concatenate([x, x])[: x.shape[0]],
        lambda x: jnp.tile(x, (2, 1))[: x.shape[0]],
        lambda x: jnp.flip(x, 0),
        lambda x: jnp.transpose(x),
        lambda x: x.reshape(-1),
    ],
)
def test_a_scalar_that_is_broadcast_and_moved_is_no_crash(move):
    summed = lambda p: move(p + jnp.zeros((2, 3))).sum()
    assert "not proved" in refuted(summed, jnp.asarray(0.5))
    picked = lambda p: move(jnp.broadcast_to(p, (2, 3))).ravel()[0]
    assert proved(picked, jnp.asarray(0.5), exact=True) == "itself"


# --- traced as jax traces


def test_a_weak_type_decides_the_dtype_as_under_jit():
    narrow = {"base": jnp.ones(2, jnp.bfloat16), "head": jnp.ones(2)}

    def step(p, rate):
        is_narrow = (p["base"] * rate).dtype == jnp.bfloat16
        return p | {"base": p["base"] if is_narrow else -p["base"]}

    assert fo.assert_step_freezes(step, narrow, 0.1, frozen="base") == {"base": "itself"}
    with pytest.raises(AssertionError, match="refuted"):
        fo.assert_step_freezes(step, narrow, jnp.float32(0.1), frozen="base")


def test_explicit_sharding_is_traced_as_jax_traces_it():
    mesh = jax.make_mesh((2,), ("d",), axis_types=(EXPLICIT,), devices=host_devices(2))
    split = jax.sharding.NamedSharding(mesh, P("d"))
    given = {"base": jax.device_put(jnp.arange(4.0), split), "head": jnp.ones(2)}

    def step(p):
        is_split = jax.typeof(p["base"]).sharding.spec == P("d")
        return p | {"base": -p["base"] if is_split else p["base"]}

    assert not np.array_equal(host_bits(jax.jit(step)(given)["base"]), host_bits(given["base"]))
    with pytest.raises(AssertionError, match="refuted"):
        fo.assert_step_freezes(step, given, frozen="base")
    moved = step_that(lambda p: jax.sharding.reshard(p, jax.sharding.NamedSharding(mesh, P())))
    assert fo.assert_step_freezes(moved, given, frozen="base", exact=True) == {"base": "itself"}


def test_a_python_float_that_a_compiled_step_rounds_is_not_proved():
    given = {"base": 0.1, "head": jnp.ones(2)}
    step = lambda p: p | {"head": p["head"] * 2}
    with pytest.raises(AssertionError, match=r"Python number 0\.1.*rounds to float32"):
        fo.assert_step_freezes(step, given, frozen="base")
    with pytest.raises(AssertionError, match="rounds to complex64"):
        fo.assert_step_freezes(step, given | {"base": 0.1j}, frozen="base")
    kept = fo.jit(step, frozen="base")
    assert fo.assert_step_freezes(kept, given, frozen="base") == {"base": "itself"}
    assert kept(given)["base"] is given["base"]
    assert fo.assert_step_freezes(step, given | {"base": 0.5}, frozen="base") == {"base": "itself"}


# --- on several devices


def spread(dtype):
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((4,), ("d",), axis_types=auto, devices=host_devices(4))
    return jax.device_put(jnp.ones((8, 8), dtype), jax.sharding.NamedSharding(mesh, P("d")))


def cut_and_joined(p):
    return jnp.stack([p[i] for i in range(8)])


def test_what_is_cut_and_joined_over_devices_may_be_summed():
    assert proved(cut_and_joined, jnp.ones((8, 8)), exact=True) == "itself"
    assert "sign of zero" in proved(cut_and_joined, spread("float32"))
    assert proved(cut_and_joined, spread("int32"), exact=True) == "itself"
    assert proved(lambda p: p.T.T, spread("float32"), exact=True) == "itself"


def test_integers_cut_and_joined_as_floats_over_devices_are_not_proved():
    def viewed(p):
        there = jax.lax.bitcast_convert_type(p, "float32")
        return jax.lax.bitcast_convert_type(cut_and_joined(there), "int32")

    assert proved(viewed, jnp.ones((8, 8), jnp.int32), exact=True) == "itself"
    assert "not proved" in refuted(viewed, spread("int32"))


def test_narrow_floats_placed_on_other_devices_lose_bits():
    leaf = spread("bfloat16")
    everywhere = jax.sharding.NamedSharding(leaf.sharding.mesh, P())
    for place in (jax.lax.with_sharding_constraint, jax.device_put):
        placed = lambda p, place=place: place(p, everywhere)
        assert "odd bits" in proved(placed, leaf)
        assert proved(placed, spread("float32"), exact=True) == "itself"


def test_narrow_floats_put_onto_several_devices_lose_bits():
    """On a CPU NaNs of float8_e5m2 are other NaNs where `jax.device_put` cuts such an array up."""
    split = jax.sharding.NamedSharding(spread("float32").sharding.mesh, P("d"))
    leaf, alone = jnp.ones(8, "float8_e5m2"), host_devices()[1]
    assert "odd bits" in proved(lambda p: jax.device_put(p, split), leaf)
    assert proved(lambda p: jax.device_put(p, split), jnp.ones(8), exact=True) == "itself"
    assert proved(lambda p: jax.device_put(p, alone), leaf, exact=True) == "itself"


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_narrow_floats_lose_bits_in_a_scan(dtype):
    scanned = lambda p: jax.lax.map(jax.lax.optimization_barrier, p)
    assert "odd bits" in proved(scanned, jnp.ones((2, 3), dtype))
    assert proved(scanned, jnp.ones((2, 3)), exact=True) == "itself"
