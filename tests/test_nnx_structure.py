"""`nnx_jit` remembers modules between calls: whatever else they are by then has to be seen."""

import copy
import dataclasses
import gc
import threading
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import frozen_optax as fo
from frozen_optax._nnx._jit import NnxStep

data = nnx.data if hasattr(nnx, "data") else lambda value: value


def value(variable: Any) -> Any:
    return variable.get_value() if hasattr(variable, "get_value") else variable.value


def one(number: float = 1.0) -> Any:
    return nnx.Param(jnp.asarray(number))


def add_one(model: Any) -> None:
    params = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda leaf: leaf + 1, params))


class Net(nnx.Module):
    def __init__(self, number: float = 1.0) -> None:
        self.base, self.head = one(number), one(number)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Box:
    weight: Any


def test_variables_in_a_dataclass_are_frozen_and_proved() -> None:
    class Boxed(nnx.Module):
        def __init__(self) -> None:
            self.box, self.head = data(Box(one())), one()

    model = Boxed()
    step = fo.nnx_jit(add_one, trainable="head", discard=True)
    still = fo.nnx_jit(lambda model: None, trainable="head")
    assert fo.assert_step_freezes(still, model, trainable="head") == {"box/weight": "itself"}
    for _ in range(2):
        step(model)
    assert float(value(model.box.weight)) == 1
    assert float(value(model.head)) == 3
    trained = fo.nnx_filter(model, "box")
    assert [float(leaf) for leaf in jax.tree.leaves(nnx.state(model, trained))] == [3]


def test_a_dataclass_changed_in_place_is_seen() -> None:
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Config:
        rate: float

    model = Net()
    model.config = data(Config(2.0))
    step = fo.nnx_jit(lambda model: jnp.asarray(model.config.rate), frozen="base")
    assert step(model) == 2
    model.config.rate = 5.0
    assert step(model) == 5


def test_a_parameter_moved_to_the_next_list_is_frozen_there() -> None:
    class Lists(nnx.Module):
        def __init__(self) -> None:
            self.new, self.old = data([one(), one()]), data([one()])

    model = Lists()
    step = fo.nnx_jit(add_one, frozen="old", discard=True)
    step(model)
    model.old.append(model.new.pop(0))
    step(model)
    assert [float(value(each)) for each in model.old] == [1, 2]
    assert [float(value(each)) for each in model.new] == [3]


def test_names_that_change_places_are_seen() -> None:
    class Named(nnx.Module):
        def __init__(self) -> None:
            self.part = data({"scale": one(), "shift": one(10)})

    model = Named()
    step = fo.nnx_jit(add_one, frozen="part/scale", discard=True)
    step(model)
    scale, shift = model.part.pop("scale"), model.part.pop("shift")
    model.part["shift"] = scale
    model.part["scale"] = shift
    step(model)
    assert float(value(model.part["scale"])) == 11
    assert float(value(model.part["shift"])) == 2


def test_modules_at_other_places_of_the_arguments_are_others() -> None:
    def step_of(net: Any, other: Any) -> None:
        add_one(net)

    one_net, other = Net(), Net(9)
    step = fo.nnx_jit(step_of, frozen="base", discard=True)
    step(net=one_net, other=other)
    step(other, one_net)
    assert [float(value(net.base)) for net in (one_net, other)] == [1, 9]
    assert [float(value(net.head)) for net in (one_net, other)] == [2, 10]

    def step_of_all(nets: Any) -> None:
        for net in nets.values():
            add_one(net)

    step = fo.nnx_jit(step_of_all, frozen="old", discard=True)
    step({"new": one_net, "old": other})
    step({"old": one_net, "past": other})
    assert [float(value(net.base)) for net in (one_net, other)] == [2, 10]


def test_what_a_variable_says_of_itself_is_compared() -> None:
    model = Net()
    step = fo.nnx_jit(lambda model: model.head * 1, frozen="base")
    assert step(model) == 1
    hook = lambda variable, held: held * 0
    if hasattr(model.head, "get_raw_value"):
        model.head.set_metadata(on_get_value=hook)
    else:
        model.head.on_get_value = hook
    assert step(model) == nnx.jit(lambda model: model.head * 1)(model) == 0


@pytest.mark.parametrize("way", ["step", "proof"])
def test_a_filter_brings_what_it_takes_for_parameters(way: str) -> None:
    class Normed(nnx.Module):
        def __init__(self) -> None:
            self.norm = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
            self.head = nnx.Linear(2, 2, rngs=nnx.Rngs(0))

    model = Normed()
    wrt = (nnx.Param, nnx.BatchStat)
    trained = fo.nnx_filter(model, "norm", wrt=wrt)
    call = lambda model: model.norm(jnp.arange(6.0).reshape(3, 2))
    if way == "step":
        with pytest.raises(ValueError, match="norm/mean"):
            fo.nnx_jit(call, trainable=trained)(model)
        with pytest.raises(ValueError, match=r"wrt=.*Param'> is said here, and the filter"):
            fo.nnx_jit(call, trainable=trained, wrt=nnx.Param)
    else:
        with pytest.raises(ValueError, match="Say the same to both"):
            fo.assert_step_freezes(fo.nnx_jit(call, frozen="norm"), model, trainable=trained)


def test_a_variable_may_hold_another_tree() -> None:
    model = Net()
    model.extra = nnx.Variable(None)
    step = fo.nnx_jit(lambda model: None, frozen="base")
    step(model)
    if hasattr(model.extra, "set_value"):
        model.extra.set_value(jnp.ones(2))
    else:
        model.extra.value = jnp.ones(2)
    step(model)
    assert np.array_equal(value(model.extra), np.ones(2))


def test_a_parameter_that_holds_nothing_is_no_obstacle() -> None:
    model = Net()
    model.bias = nnx.Param(None)
    trained = fo.nnx_filter(model, "base")
    assert len(jax.tree.leaves(nnx.state(model, trained))) == 1
    fo.nnx_jit(add_one, frozen="base", discard=True)(model)
    assert float(value(model.head)) == 2


def test_gradients_may_be_returned_and_parameters_not() -> None:
    model = Net()
    loss = lambda model: value(model.base) * value(model.head) ** 2
    step = fo.nnx_jit(lambda model: nnx.grad(loss)(model), frozen="base")
    assert float(jax.tree.leaves(step(model))[1]) == 2
    with pytest.raises(TypeError, match="returns Param, a module or a part of one"):
        fo.nnx_jit(lambda model: model.head, frozen="base")(model)


def test_host_arrays_that_a_trace_sees_otherwise_are_told() -> None:
    model = Net()
    model.head = nnx.Param(np.ones((2, 2)))
    is_wide = lambda path, leaf: leaf.dtype == np.float64
    with pytest.raises(ValueError, match=r"32 bits where 64 are not enabled|selects nothing"):
        fo.nnx_jit(add_one, trainable=is_wide, discard=True)(model)


def test_a_copy_of_a_step_is_a_step() -> None:
    model = Net()
    step = fo.nnx_jit(add_one, frozen="base", discard=True)
    step(model)
    copy.deepcopy(step)(model)
    assert float(value(model.head)) == 3
    assert float(value(model.base)) == 1


def test_many_models_are_compiled_once_each() -> None:
    traces = []

    def step_of(model: Any) -> None:
        traces.append(1)

    step = fo.nnx_jit(step_of, frozen="base")
    models = []
    for tag in range(20):
        models.append(Net())
        models[-1].tag = tag
    for _ in range(2):
        for model in models:
            step(model)
    assert len(traces) == 20


def test_threads_with_a_model_each_do_not_mix_them() -> None:
    def add(model: Any, number: Any) -> None:
        model.head[...] = model.head[...] + number

    step = fo.nnx_jit(add, frozen="base")
    models, numbers = [Net(0.0), Net(0.0)], (1.0, 1000.0)

    def work(model: Any, number: float) -> None:
        for _ in range(50):
            step(model, number)

    threads = [
        threading.Thread(target=work, args=pair) for pair in zip(models, numbers, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [float(value(model.head)) for model in models] == [50, 50_000]


def test_a_variable_of_another_kind_is_not_trained() -> None:
    model = Net()
    trained = fo.nnx_filter(model, "base")
    model.head = nnx.BatchStat(jnp.ones(()))
    assert not jax.tree.leaves(nnx.state(model, trained))


# --- what is remembered, and for how long


class Layers(nnx.Module):
    def __init__(self) -> None:
        self.layers = data([Net() for _ in range(3)])
        self.head = one()


def test_a_step_that_goes_around_models_walks_each_once(monkeypatch: Any) -> None:
    walked: list[Any] = []
    row = NnxStep._row
    monkeypatch.setattr(NnxStep, "_row", lambda *args: walked.append(1) or row(*args))
    step = fo.nnx_jit(add_one, frozen="**/base", discard=True)
    models = [Net(), Layers(), Net(), Layers()]
    models[2].tag = "another layout"
    for _ in range(3):
        for model in models:
            step(model)
    assert len(walked) == len(models)
    assert [float(value(model.head)) for model in models] == [4] * 4
    assert {float(value(layer.base)) for layer in models[3].layers} == {1}
    crowd = [Net() for _ in range(20)]
    for model in crowd * 2:
        step(model)
    assert len(walked) == len(models) + 2 * len(crowd)
    assert len(step._known) == 8


def alive_after(make: Any) -> list[bool]:
    """Which of the modules that `make` returns are there when a step alone knows of them."""
    step = fo.nnx_jit(lambda *modules: None, frozen="**/base")
    modules = make()
    refs = [weakref.ref(module) for module in modules]
    refs += [weakref.ref(node) for module in modules for node in below(module)]
    for _ in range(2):
        step(*modules)
    del modules
    gc.collect()
    assert not step._known
    return [ref() is not None for ref in refs]


def below(module: Any) -> list[Any]:
    return [each for each in vars(module).values() if isinstance(each, nnx.Module)]


def parented() -> list[Any]:
    model = Net()
    model.child = Net()
    model.child.parent = data(model)
    return [model]


def holding_one_another() -> list[Any]:
    one_net, other = Net(), Net()
    one_net.other = data({"in": [other]})
    other.other = data(one_net)
    return [one_net, other]


def holding_the_next() -> list[Any]:
    model, outer = Net(), Net()
    outer.inner = model
    return [model, outer]


@pytest.mark.parametrize("make", [parented, holding_one_another, holding_the_next])
def test_no_step_keeps_modules_alive(make: Any) -> None:
    assert not any(alive_after(make))


def test_a_model_is_let_go_while_another_argument_lives_on() -> None:
    step = fo.nnx_jit(lambda *modules: None, frozen="**/base")
    metric = nnx.metrics.Average("loss")
    for make in (parented, lambda: [Net()]):
        (model,) = make()
        step(model, metric)
        ref = weakref.ref(model)
        del model
        gc.collect()
        assert ref() is None


def test_a_step_is_remembered_by_the_place_of_modules_that_are_there() -> None:
    """A new model may lie in memory where one lay that is gone."""
    step = fo.nnx_jit(add_one, frozen="base", discard=True)
    for number in range(50):
        model = Net(float(number))
        step(model)
        assert float(value(model.head)) == number + 1
    assert len(step._known) == 1
