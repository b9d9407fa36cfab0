"""`jax.jit`'s options, counted in the step's own signature: static arguments and shardings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import add, host_devices, make_params, same_objects
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jitting import jit


@pytest.mark.parametrize(
    "option",
    [
        {"static_argnums": 1},
        {"static_argnums": (1,)},
        {"static_argnums": -2},
        {"static_argnames": "power"},
    ],
)
@pytest.mark.parametrize("by_name", [False, True])
def test_static_arguments(option, by_name):
    def step(params, power, x):
        assert isinstance(power, int)
        return jax.tree.map(lambda leaf: (leaf + x) ** power, params)

    jitted = jit(step, frozen="encoder", **option)
    new = jitted(make_params(), x=1.0, power=2) if by_name else jitted(make_params(), 2, 1.0)
    assert new["head"]["w"][0, 0] == 4


def test_arguments_by_keyword_only_and_in_a_row():
    @jit(frozen="encoder", donate_argnames="scale", static_argnames="power")
    def step(params, *rest, scale, power=1, **more):
        return add(params, scale * power + sum(rest) + sum(more.values())), scale

    scale = jnp.array(3.0)
    assert step(make_params(), 1.0, 2.0, scale=scale, power=2, a=1.0)[0]["head"]["w"][0, 0] == 11
    assert scale.is_deleted()


SHARDINGS = {
    "one for all": lambda s: s,
    "one for each argument": lambda s: (s, s),
    "a list": lambda s: [s, s],
    "a prefix": lambda s: ({"encoder": s, "head": s}, None),
    "in full": lambda s: ({"encoder": {"b": s, "w": s}, "head": {"w": s}}, s),
    "with gaps": lambda s: ({"encoder": None, "head": s}, None),
}


@pytest.mark.parametrize("spread", SHARDINGS.values(), ids=SHARDINGS)
def test_shardings_are_of_the_trees_taken_and_returned(spread):
    mesh = Mesh(np.array(host_devices(2)), ("x",))
    sharded = NamedSharding(mesh, P("x"))
    params = jax.device_put(make_params(), sharded)
    step = jit(
        lambda params, x: (add(params), x * 2),
        frozen="encoder",
        in_shardings=spread(sharded),
        out_shardings=(lambda s: s[0] if isinstance(s, list) else s)(spread(sharded))
        if spread
        else None,
    )
    (new, x), expected = step(params, jnp.ones(2)), sharded
    assert same_objects(params["encoder"], new["encoder"])
    assert new["head"]["w"].sharding.is_equivalent_to(expected, 2)
    assert x.tolist() == [2, 2]
    assert new["head"]["w"][0, 0] == 2


def test_shardings_that_do_not_fit_are_an_error_that_says_which():
    with pytest.raises(ValueError, match=r"in_shardings\[0\] is no prefix of the first argument"):
        jit(add, frozen="encoder", in_shardings=({"encoder": None, "tail": None},))(make_params())


def test_shardings_of_two_structures():
    sharded = NamedSharding(Mesh(np.array(host_devices(2)), ("x",)), P("x"))
    step = jit(add, frozen="encoder", in_shardings=(sharded,), out_shardings=sharded)
    put = lambda params: jax.device_put(params, sharded)
    for params in (
        make_params(),
        {"encoder": jnp.ones(2), "more": jnp.ones(2), "head": jnp.ones(2)},
    ):
        params = put(params)
        for _ in range(2):
            new = step(params)
            assert same_objects(params["encoder"], new["encoder"])
            assert jax.tree.leaves(new["head"])[0].sharding.is_equivalent_to(sharded, 1)
    step.clear_cache()
    assert step(put(make_params()))["head"]["w"][0, 0] == 2
