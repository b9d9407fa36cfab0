"""Modules of NNX that stand in many others: each is walked once, and the ways to it are named."""

import random
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import frozen_optax as fo
from frozen_optax._nnx import _graph

data = nnx.data if hasattr(nnx, "data") else lambda value: value


def one() -> Any:
    return nnx.Param(jnp.ones(()))


class Pair(nnx.Module):
    """It holds another module twice, or two."""

    def __init__(self, left: Any, right: Any) -> None:
        self.left, self.right, self.w = left, right, one()


class Ends(nnx.Module):
    def __init__(self) -> None:
        self.w = one()


def chain(depth: int) -> Any:
    node: Any = Ends()
    for _ in range(depth):
        node = Pair(node, node)
    return node


def read(variable: Any) -> float:
    return float(jax.tree.leaves(variable)[0])


def texts(found: Any) -> list[str]:
    return ["/".join(map(str, path)) for path, _ in found]


def test_a_chain_of_shared_modules_is_walked_module_by_module(monkeypatch):
    items, looked = _graph._items, []
    monkeypatch.setattr(_graph, "_items", lambda node: looked.append(node) or items(node))
    depth = 40  # 2 ** 40 paths
    assert len(list(_graph.variables_at(chain(depth)))) < depth**2
    assert len(looked) < 4 * depth**2


def test_a_step_on_such_a_chain_trains_it_and_is_proved():
    model = chain(15)
    tx = fo.with_frozen(optax.sgd(0.1), trainable="w")
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    def total(node: Any) -> Any:
        return node.w * 1 + (total(node.left) if isinstance(node, Pair) else 0)

    @fo.nnx_jit(frozen=tx)
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(total)(model))

    found = fo.assert_step_freezes(step, model, optimizer, frozen=tx)
    assert len(found) == 15
    for _ in range(2):
        step(model, optimizer)
    assert read(model.w) == pytest.approx(0.8)
    assert read(model.left.w) == 1
    trained = fo.nnx_filter(model, trainable="w")
    assert len(jax.tree.leaves(nnx.state(model, trained))) == 1


@pytest.mark.parametrize("selection", ["left/left", "right", "left/right", "right/left/w"])
def test_what_is_frozen_on_one_way_alone_is_told_with_both(selection):
    model = chain(2)
    known = {"left/left/w", "left/right/w", "right/left/w", "left/w", "right/w"}
    step = fo.nnx_jit(lambda model: None, frozen=selection)
    with pytest.raises(ValueError, match=r"one nnx\.Variable is frozen at") as raised:
        step(model)
    named = re.findall("'([^']*)'", str(raised.value))
    assert len(named) == 2
    assert set(named) <= known
    assert (named[0].startswith(selection), named[1].startswith(selection)) == (True, False)
    fo.nnx_jit(lambda model: None, frozen=["left", "right"])(model)


def test_a_module_in_each_layer_is_selected_by_each_of_its_paths():
    class Layers(nnx.Module):
        def __init__(self) -> None:
            shared = Ends()
            self.layers = data([Pair(shared, Ends()) for _ in range(4)])

    model = Layers()
    paths = texts(_graph.variables_at(model))
    assert [path for path in paths if "left" in path] == [f"layers/{i}/left/w" for i in range(4)]
    with pytest.raises(ValueError, match="frozen at 'layers/2/left/w' and not at 'layers/"):
        fo.nnx_jit(lambda model: None, frozen="layers/2")(model)
    fo.nnx_jit(lambda model: None, frozen="layers/*/left")(model)


@pytest.mark.parametrize("seed", range(20))
def test_the_first_path_of_each_variable_is_nnxs_own(seed):
    """In a graph of modules, lists and dicts, with sharing and cycles."""
    draw = random.Random(seed)
    nodes = [Pair(None, None) for _ in range(8)]
    for node in nodes:
        others = draw.sample(nodes, 4)
        node.left = data(others[0])
        node.right = data([others[1]] * draw.randrange(12))
        node.between = data({"b": others[2], "a": one()})
        node.again = data(draw.choice(nodes).w)
        node.a10, node.a9 = data(others[3]), data(None)
    found: dict[int, Any] = {}
    for path, variable in _graph.variables_at(nodes[0]):
        found.setdefault(id(variable), path)
    _, state = nnx.split(nodes[0])
    assert set(found.values()) == {path for path, _ in _graph.flat_state(state)}
