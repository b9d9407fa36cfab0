"""What `jit` refuses, and what it says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import add, make_params
from jax import export
from jax.experimental import serialize_executable
from jitting import Trainer, jit, make_state
from trying import mutable_array

import frozen_optax as fo


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda params: params["head"], "differ in structure at 'the root'.*found a dict of 1"),
        (
            lambda params: ({"encoder": params["encoder"]}, 1),
            "differ in structure at 'the root'.*found a dict of 1",
        ),
        (lambda params: {**params, "encoder": {"w": 1}}, "differ in structure at 'encoder'"),
        (lambda params: {**params, "head": {"w": [1, 2]}}, "differ in structure at 'head/w'"),
        (lambda params: (1.0, params), "differ in structure"),
        (lambda params: None, "differ in structure"),
        (lambda params: (), "differ in structure"),
    ],
)
def test_another_structure_is_an_error_that_says_so(result, message):
    with pytest.raises(
        ValueError, match=f"(?s)returns the successor of its first argument.*{message}"
    ):
        jit(result, frozen="encoder")(make_params())


def test_a_state_in_which_where_finds_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"returns the successor.*differ in structure"):
        jit(lambda state: state.params, frozen="encoder", where=lambda state: state.params)(
            make_state()
        )


def test_a_pattern_that_selects_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"by_path\('encodr'\) selects nothing.*encoder"):
        jit(add, frozen="encodr")(make_params())


def test_what_is_frozen_has_to_be_said():
    with pytest.raises(TypeError, match="exactly one of the two: neither"):
        jit(add)
    with pytest.raises(TypeError, match="exactly one of the two: both"):
        jit(add, frozen="a", trainable="b")


def test_an_unknown_option_or_missing_argument_is_a_type_error():
    with pytest.raises(TypeError, match="donut"):
        jit(add, frozen="encoder", donut=0)
    with pytest.raises(TypeError, match="add takes the parameters as its first argument"):
        jit(add, frozen="encoder")()


def test_a_step_needs_an_argument_by_position():
    with pytest.raises(TypeError, match="takes no argument by position"):
        jit(lambda *, params: params, frozen="encoder")
    with pytest.raises(
        TypeError, match=r"jit takes a function, found 'encoder'.*jit\(step, frozen='encoder'\)"
    ):
        jit("encoder")
    with pytest.raises(TypeError, match="where= is a function, found 'params'"):
        jit(add, frozen="encoder", where="params")


@pytest.mark.parametrize("option", ["donate_argnums", "static_argnums"])
@pytest.mark.parametrize("number", [-3, 2])
def test_a_number_that_no_argument_has_is_an_error(option, number):
    with pytest.raises(
        ValueError, match=f"{option} names the argument {number}, and the step takes 2 by position"
    ):
        jit(lambda params, x: params, frozen="encoder", **{option: number})


@pytest.mark.parametrize(
    "option", [{"static_argnums": 0}, {"static_argnums": -2}, {"static_argnames": ("params",)}]
)
def test_the_first_argument_cannot_be_static(option):
    with pytest.raises(
        ValueError, match="the first argument holds the parameters, so it cannot be static"
    ):
        jit(lambda params, x: params, frozen="encoder", **option)


def test_a_leaf_that_cannot_be_static_is_named():
    params = {"encoder": {"f": np.array(["a"]), "w": jnp.ones(2)}, "head": 1.0}
    with pytest.raises(TypeError, match=r"'encoder/f' is a leaf <U1\[1\], .* cannot be hashed"):
        jit(lambda params: params, frozen="encoder")(params)


def test_what_the_step_raises_comes_through():
    def step(params):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        jit(step, frozen="encoder")(make_params())


def test_a_step_decorated_as_a_method_is_told_how_to_be_one():
    with pytest.raises(
        TypeError, match=r"found a leaf of type Trainer\. If that is the self.*self\.step = "
    ):
        Trainer().step(make_params())


def test_a_mutable_array_is_refused_by_path():
    params = {"base": mutable_array(jnp.ones(2)), "head": jnp.ones(2)}
    message = r"'base' is a mutable array \(jax\.Ref\).*ref\[\.\.\.\]"
    with pytest.raises(TypeError, match=message):
        jit(lambda params: params, frozen="base")(params)
    with pytest.raises(TypeError, match=message):
        fo.assert_step_freezes(lambda params: params, params, frozen="base")


def test_tied_variables_of_nnx_are_refused_with_both_paths():
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Linear(2, 2, rngs=rngs)
            self.head = self.embed

    model = Tied(nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"stands at two places, 'embed/bias' and 'head/bias'"):
        jit(lambda model: model, frozen="embed")(model)
    state = nnx.state(model)
    assert (
        jit(lambda state: state, frozen="**/bias")(state)["embed"]["bias"][...]
        is state["embed"]["bias"][...]
    )


def test_what_opens_a_step_is_told_to_take_it_under_jax_jit():
    step = jit(lambda params: {**params, "head": add(params["head"])}, frozen="encoder")
    params = make_params()
    with pytest.raises(AttributeError, match=r"takes the step under jax\.jit: jax\.jit\(step\)"):
        export.export(step)(params)
    with pytest.raises(AttributeError, match=r"takes the step under jax\.jit: jax\.jit\(step\)"):
        serialize_executable.serialize(step.lower(params).compile())
    exported = export.export(jax.jit(step))(params)
    fo.assert_frozen(params, exported.call(params), "encoder")
    assert len(serialize_executable.serialize(jax.jit(step).lower(params).compile())) == 3
