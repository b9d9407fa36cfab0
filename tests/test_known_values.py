"""What is known of values: constants that look like nothing, dtypes that round, zeros or not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import host_devices
from proving import (
    FLOATS,
    HEAD,
    ODD,
    SIGN,
    arguments,
    kernel_to,
    known,
    of_base,
    transformation,
    verdict,
)
from trying import mutable_array

import frozen_optax as fo
from frozen_optax._proofs import _constants, _interpreter, _known


def if_any_bit_of_integers(p, h):
    either = jax.lax.reduce_or(known(1, 2, 1)(h).astype(int), (0,))
    return jax.lax.cond(either == 3, lambda: p + 1, lambda: p)


def a_complex_product(p, h):
    conjugate = known(0.6 - 0.8j, dtype="complex64")(h)[0]
    return p + 1e20 * jnp.imag((0.6 + 0.8j) * conjugate)


def the_maximum_of_nothing(p, h):
    maximum = jax.lax.reduce_max(jnp.zeros((0,)), (0,))
    return p + jnp.broadcast_to(maximum, p.shape)


def a_constant_cast(p, h):
    return p + known(0.5)(h).astype(int).astype(p.dtype) + known(1.5)(h).astype(int)


def a_part_carried(p, h):
    last, _ = jax.lax.scan(lambda c, x: (x, None), p[:1], p[:, None])
    return last + jnp.zeros(3)


def one_of_two_selected(params):
    return params | {"base": jnp.where(params["head"] > 0, params["twin"], params["base"])}


def another_of_two_selected(params):
    selected = jnp.where(params["head"] > 0, params["base"], params["twin"])
    return {"base": selected, "head": params["head"], "twin": params["base"]}


HOSTILE_TO_BASE = {
    "reset to a closed-over array": (FLOATS, lambda p, h: FLOATS),
    "int8 through float8": (
        jnp.array([17, 2, 3], jnp.int8),
        lambda p, h: p.astype("float8_e4m3fn").astype("int8"),
    ),
    "int32 through float32": (
        jnp.array([2**24 + 1, 2, 3]),
        lambda p, h: p.astype("float32").astype("int32"),
    ),
    "int8 through uint8": (
        jnp.array([-1, 2, 3], jnp.int8),
        lambda p, h: p.astype("uint8").astype("float16").astype("int8"),
    ),
    "one float8 through another": (
        jnp.array([32.0, 1, 2], jnp.float8_e4m3fn),
        lambda p, h: p.astype("float8_e4m3b11fnuz").astype(p.dtype),
    ),
    "float16 through bfloat16": (
        jnp.array([1.001, 1, 2], jnp.float16),
        lambda p, h: p.astype("bfloat16").astype(p.dtype),
    ),
    "bfloat16 through float16": (
        jnp.array([1e30, 1, 2], jnp.bfloat16),
        lambda p, h: p.astype("float16").astype(p.dtype),
    ),
    "complex through its real part": (jnp.array([1j, 1, 2]), lambda p, h: p.real.astype(p.dtype)),
    "an `or` of integers": (FLOATS, if_any_bit_of_integers),
    "a function scattered": (
        FLOATS,
        lambda p, h: p + jnp.zeros_like(p).at[0].apply(lambda x: x + 1),
    ),
    "a product of complex numbers of length one": (FLOATS * 0, a_complex_product),
    "a select beyond its cases": (
        FLOATS,
        lambda p, h: jax.lax.select_n(known(0, 5, 0)(h).astype(int), p, p + 1, p + 2),
    ),
    "a cond beyond its branches": (
        FLOATS,
        lambda p, h: jax.lax.switch(known(7)(h).astype(int)[0], [lambda: p, lambda: -p]),
    ),
    "a constant minus the leaf": (FLOATS, lambda p, h: jnp.zeros_like(p) - p),
    "one over the leaf": (FLOATS + 1, lambda p, h: jnp.ones_like(p) / p),
    "times one and zero": (
        jnp.array([jnp.inf, 1, 2], jnp.complex64),
        lambda p, h: p * jnp.ones_like(p),
    ),
    "plus infinity": (FLOATS, lambda p, h: p + 0.0 * known(np.inf)(h)[0]),
    "times a product of constants": (
        FLOATS,
        lambda p, h: p * (known(1e-30)(h)[0] * np.float32(1e30) * np.float32(2)),
    ),
    "the maximum of nothing": (FLOATS, the_maximum_of_nothing),
    "plus a constant cast to an integer": (FLOATS, a_constant_cast),
    "reshaped in another order": (
        jnp.arange(4.0).reshape(2, 2),
        lambda p, h: jax.lax.reshape(p, (2, 2), dimensions=(1, 0)),
    ),
    "the last part of a scan": (FLOATS, lambda p, h: jax.lax.scan(lambda c, x: (x, c), p[0], p)[1]),
    "a scan over moved parts": (
        jnp.arange(6.0).reshape(2, 3),
        lambda p, h: jax.lax.scan(lambda c, x: (c, x[::-1]), 0, p)[1],
    ),
    "a scan that carries a part": (FLOATS, a_part_carried),
}
HOSTILE = {name: (base, of_base(change)) for name, (base, change) in HOSTILE_TO_BASE.items()}
HOSTILE["one of two in a select"] = (FLOATS, one_of_two_selected)
HOSTILE["another of two in a select"] = (FLOATS, another_of_two_selected)


@pytest.mark.parametrize("name", HOSTILE)
def test_what_looks_like_nothing_and_moves_a_leaf_is_not_proved(name):
    base, step = HOSTILE[name]
    params = {"base": base, "head": HEAD, "twin": base + base.dtype.type(1)}
    # A GPU rounds some of these otherwise, to what they look like.
    host = host_devices(1)[0]
    on_host = jax.device_put(params, host)
    with jax.default_device(host):
        compiled = jax.jit(lambda params: step(params)["base"])(on_host)
        moved = [
            after
            for after in (step(on_host)["base"], compiled)
            if verdict(fo.assert_trees_bit_identical, after, on_host["base"])
        ]
    assert moved or name == "reset to a closed-over array"
    assert "not proved to stay" in verdict(fo.assert_step_freezes, step, params, frozen="base")


def test_weak_types_stay_as_they_are():
    params = {"base": jnp.ones(2, jnp.bfloat16), "head": jnp.ones(2, jnp.bfloat16)}
    step = lambda p, rate: {"base": jnp.where(True, p["base"], rate), "head": p["head"] * rate}
    found = fo.assert_step_freezes(step, params, 0.1, frozen="base")
    assert found["base"].startswith(ODD)
    assert "became a leaf float32" in verdict(
        fo.assert_step_freezes, step, params, jnp.float32(0.1), frozen="base"
    )

    def update(gradients, state, params=None):
        assert state.weak_type
        new = jax.tree.map(lambda g: g * state, gradients)
        assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(new))
        return new, state * 0.5

    tx = fo.with_frozen(transformation(update, 1.0), "base")
    assert fo.assert_update_freezes(tx, params, "base") == {"base": "a constant -0.0"}


def test_an_update_of_another_shape_is_none_at_all():
    tx = transformation(lambda g, s, p=None: ({"base": jnp.zeros((2, 3)), "head": g["head"]}, s))
    message = verdict(fo.assert_update_freezes, tx, {"base": jnp.ones(3), "head": HEAD}, "base")
    assert "is a leaf float32[2, 3], and the parameter a leaf float32[3]" in message


def test_a_key_as_an_update_is_no_zero():
    tx = transformation(lambda g, s, p=None: (p, s))
    assert "key: unknown" in verdict(fo.assert_update_freezes, tx, {"key": jax.random.key(0)}, "**")


def test_what_is_closed_over_may_be_anything():
    params, x = arguments()
    reference = mutable_array(jnp.zeros(3))
    gone = jnp.ones(3)

    def step(params, x):
        reference[...] = reference[...] + x
        return params | {"head": jax.tree.map(lambda p: p + jnp.sum(gone), params["head"])}

    assert fo.assert_step_freezes(step, params, x, frozen="encoder")

    @jax.jit
    def inside(y):
        proved = fo.assert_step_freezes(
            lambda p, x: p | {"head": jax.tree.map(lambda h: h * y, p["head"])},
            params,
            x,
            frozen="encoder",
        )
        assert set(proved.values()) == {"itself"}
        refuted = verdict(
            fo.assert_step_freezes, kernel_to(lambda k, x: k + y), params, x, frozen="encoder"
        )
        assert "encoder/kernel: unknown" in refuted
        return y

    inside(1.0)


def test_narrow_constants_that_do_not_know_each_other():
    def adds_ones(p, h):
        return p + jnp.ones(3, "int4").astype("uint4").astype("int4").astype(p.dtype)

    def adds_sorted_zeros(p, h):
        zeros, _ = jax.lax.sort((known(0.0, 0.0, 0.0)(h), jnp.zeros(3, "int8")), num_keys=1)
        return p + zeros

    params = {"base": FLOATS, "head": HEAD}
    assert "refuted" in verdict(fo.assert_step_freezes, of_base(adds_ones), params, frozen="base")
    found = fo.assert_step_freezes(of_base(adds_sorted_zeros), params, frozen="base")
    assert found["base"].startswith(SIGN)


@pytest.mark.parametrize(
    "own", ["bool", "int8", "uint8", "int4", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]
)
def test_a_dtype_that_holds_another_gives_back_every_number(own):
    """All patterns of narrow types, there and back with numpy; subnormals and NaNs aside."""
    own = jnp.dtype(own)
    size = 2 ** (8 * own.itemsize)
    if own == np.bool_ or own == jnp.int4:
        every = np.arange(-8, 8).astype(own)
    else:
        every = np.arange(size).astype(f"uint{8 * own.itemsize}").view(own)
    wide = [
        *[
            "bool",
            "int8",
            "uint8",
            "int16",
            "uint16",
            "int32",
            "uint32",
            "int64",
            "float16",
            "bfloat16",
            "float32",
            "float64",
            "complex64",
        ],
        own,
    ]
    narrow = [
        "float8_e4m3fn",
        "float8_e5m2",
        "float8_e4m3b11fnuz",
        "float8_e8m0fnu",
        "int4",
        "uint4",
    ]
    held = set()
    for name in (*wide, *narrow):
        new = jnp.dtype(name)
        with np.errstate(all="ignore"):
            numbers = every.astype(np.float64)
            back = numbers.astype(new).astype(np.complex128).real.astype(own).astype(np.float64)
        is_float = own != np.bool_ and jnp.issubdtype(own, jnp.floating)
        normal = np.abs(numbers) >= float(jnp.finfo(own).tiny) if is_float else slice(None)
        same = np.array_equal(back[normal], numbers[normal])
        assert same or not _constants.holds(new, own), (own, new)
        held |= {new.name} if _constants.holds(new, own) else set()
    assert {own.name, "float32", "float64", "complex64"} <= held


def test_constants_on_which_platforms_disagree_are_not_known():
    of = lambda *numbers, dtype=np.float32: _constants.of_array(
        np.array(numbers, dtype), np.dtype(dtype)
    )
    assert of(0.0, -0.0) == _constants.zeros(np.dtype("float32"))
    assert of(1e-45) is of(np.nan) is of(np.inf) is of(1, 2, 3, 4, 5) is None
    assert of(dtype=np.float32) == frozenset()
    assert len(of(*[0.0, 1.0] * 1000)) == 2
    assert of(*[0.0] * 100, 1, 2, 3, 4, 5) is None
    assert possible_after(jax.lax.mul, of(3.0), of(0.1)) is None
    assert possible_after(jax.lax.mul, of(0.0), of(0.1)) == of(0.0)
    assert possible_after(jax.lax.mul, of(0.0), None) is None
    assert possible_after(jax.lax.add, of(0.1), of(-0.1)) is None
    assert possible_after(jax.lax.sub, of(0.0), of(0.0)) == of(0.0)
    assert possible_after(jax.lax.div, of(0.0), of(0.0)) is None
    assert possible_after(jax.lax.max, of(0.0), of(-0.0)) == _constants.zeros(np.dtype("float32"))
    assert possible_after(jax.lax.max, of(0.0), of(1.0)) == of(1.0)
    assert possible_after(lambda x: jax.lax.convert_element_type(x, "int32"), of(0.5)) is None


def possible_after(function, *operands):
    program = jax.make_jaxpr(function)(*[jnp.zeros((), "float32")] * len(operands))
    (known,) = _interpreter.run(program, [_known.Known(operand) for operand in operands])
    return known.possible


@pytest.mark.parametrize("kind", [jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.float8_e4m3fnuz])
@pytest.mark.parametrize("own", ["uint8", "int8", "float8_e4m3b11fnuz"])
def test_what_is_moved_as_other_narrow_floats_is_not_proved(kind, own):
    def there_and_back(k):
        viewed = jax.lax.bitcast_convert_type(k, kind)
        return jax.lax.bitcast_convert_type(jnp.roll(jnp.roll(viewed, 1), -1), own)

    # A NaN of the view, which may be lost, is an ordinary number of the leaf.
    params = {"base": jnp.arange(-8, 8).astype(own), "head": HEAD}
    step = lambda p: {"base": there_and_back(p["base"]), "head": p["head"]}
    assert "not proved" in verdict(fo.assert_step_freezes, step, params, frozen="base")


@pytest.mark.parametrize("chosen", [0, 1])
def test_zeros_of_which_compilers_leave_one_out_have_any_sign(chosen):
    zero, negative = jnp.zeros(2), jnp.full(2, -0.0)
    function, program = [
        (lambda x: x[0] + x[1], (negative, zero)),
        (lambda x: x[0] - x[1], (negative, negative)),
    ][chosen]
    held = jax.lax.optimization_barrier
    (known,) = _interpreter.interpret(jax.make_jaxpr(lambda: function(held(program)))())
    assert known.possible == _constants.zeros(np.dtype("float32"))


@pytest.mark.parametrize(
    ("own", "update", "rounds"),
    [
        ("int32", "float32", True),
        ("int16", "float32", False),
        ("int8", "float16", False),
        ("float32", "bfloat16", False),
        ("bfloat16", "float16", False),
        ("float16", "bfloat16", False),
        ("float8_e4m3fn", "float8_e5m2", True),
        ("uint32", "int32", True),
    ],
)
def test_a_zero_where_the_sum_rounds_is_not_proved_to_be_none(own, update, rounds):
    params = {"base": jnp.ones(3, own), "head": HEAD}
    zero = lambda gradients, state, params=None: (gradients | {"base": jnp.zeros(3, update)}, state)
    tx = transformation(zero, optax.EmptyState())
    if rounds:
        assert f"is a leaf {update}[3], and the parameter a leaf {own}[3]" in verdict(
            fo.assert_update_freezes, tx, params, "base"
        )
    else:
        assert fo.assert_update_freezes(tx, params, "base") == {"base": "a constant 0.0"}
