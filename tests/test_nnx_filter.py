"""`nnx_filter`: what is trained of a model, wherever NNX takes a filter."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from flax_runs import X, listed, loss

import frozen_optax as fo


class Model(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.layers = listed([nnx.Linear(3, 3, rngs=rngs) for _ in range(2)])
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        for layer in self.layers:
            x = layer(x)
        return self.head(self.drop(x))


def paths(state: Any) -> set[str]:
    found = jax.tree_util.tree_leaves_with_path(state)
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    return {name(path).removesuffix("/value") for path, _ in found}


HEAD = {"head/bias", "head/kernel"}
LAST = {"layers/1/bias", "layers/1/kernel"}
WAYS = {
    "glob": lambda model: fo.nnx_filter(model, ["layers/0", "head"]),
    "trainable": lambda model: fo.nnx_filter(model, trainable="layers/1"),
    "optimizer": lambda model: fo.nnx_filter(
        model, fo.with_frozen(optax.sgd(0.1), trainable="layers/1")
    ),
    "filter of NNX": lambda model: fo.nnx_filter(
        model, trainable=nnx.All(nnx.PathContains("layers"), nnx.PathContains(1))
    ),
    "predicate": lambda model: fo.nnx_filter(
        model, trainable=lambda path, leaf: path.startswith("layers/1")
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_it_is_true_of_what_is_trained(way: str) -> None:
    model = Model()
    trained = WAYS[way](model)
    assert paths(nnx.state(model, trained)) == LAST
    _, selected, rest = nnx.split(model, trained, ...)
    assert paths(selected) == LAST
    assert paths(rest) >= {"drop/rngs/count", "head/bias", "layers/0/kernel"}
    of_trained = nnx.DiffState(0, trained)
    grads = nnx.grad(lambda model: loss(model(X)), argnums=of_trained)(model)
    assert paths(grads) == LAST


def test_an_optimizer_with_it_trains_just_that() -> None:
    model = Model()
    trained = fo.nnx_filter(model, "layers")
    optimizer = nnx.Optimizer(model, optax.adamw(0.1), wrt=trained)
    before = nnx.to_pure_dict(nnx.state(model, nnx.Param))

    @nnx.jit
    def step(model: Any, optimizer: Any) -> None:
        of_trained = nnx.DiffState(0, trained)
        optimizer.update(model, nnx.grad(lambda model: loss(model(X)), argnums=of_trained)(model))

    step(model, optimizer)
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    fo.assert_frozen(before, after, "layers")
    with pytest.raises(AssertionError):
        fo.assert_frozen(before, after, "head")


def test_it_is_a_selection_like_any_other() -> None:
    model = Model()
    trained = fo.nnx_filter(model, "layers")
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert set(fo.by_path("**").paths(params)) == HEAD | LAST | {"layers/0/bias", "layers/0/kernel"}
    _, held = fo.partition(params, trainable=trained)
    assert paths(held) == paths(params) - HEAD
    tx = fo.with_frozen(optax.adamw(0.1), trainable=trained)
    assert paths(tx.init(params)[0].mu) == HEAD
    same = fo.nnx_filter(model, trainable=trained)
    assert same == trained
    assert hash(same) == hash(trained)


def test_a_name_that_is_not_there_is_an_error_at_once() -> None:
    model = Model()
    with pytest.raises(ValueError, match=r"'heads'\) selects nothing.*'head'"):
        fo.nnx_filter(model, trainable="heads")
    with pytest.raises(ValueError, match=r"LoRAParam'?> selects nothing"):
        fo.nnx_filter(model, trainable=nnx.LoRAParam)
    with pytest.raises(ValueError, match="freezes all 6 leaves"):
        fo.nnx_filter(model, ["layers", "head"])
    with pytest.raises(TypeError, match="exactly one of the two"):
        fo.nnx_filter(model)
    with pytest.raises(ValueError, match="no parameter in a dict"):
        fo.nnx_filter({"head": jnp.ones(2)}, "head")


def test_frozen_at_one_of_two_paths_is_an_error() -> None:
    model = Model()
    model.again = model.head
    with pytest.raises(ValueError, match="frozen at 'head/bias' and not at 'again/bias'"):
        fo.nnx_filter(model, "head")
    tied = fo.nnx_filter(model, ["head", "again"])
    assert paths(nnx.state(model, tied)) == LAST | {"layers/0/bias", "layers/0/kernel"}


def test_another_model_is_an_error() -> None:
    model = Model()
    trained = fo.nnx_filter(model, "layers")
    other = Model()
    other.more = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="without the parameter 'more/"):
        nnx.state(other, trained)
    with pytest.raises(ValueError, match=r"without the parameter '0/head/bias'.*the model alone"):
        nnx.state((model, 1), trained)


def test_statistics_can_be_said_to_be_parameters() -> None:
    class Normed(nnx.Module):
        def __init__(self) -> None:
            self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
            self.head = nnx.Linear(3, 2, rngs=nnx.Rngs(0))

        def __call__(self, x: Any) -> Any:
            return self.head(self.norm(x))

    model = Normed()
    wrt = (nnx.Param, nnx.BatchStat)
    assert "norm/mean" in paths(nnx.state(model, fo.nnx_filter(model, "head", wrt=wrt)))
    before = nnx.state(model)["norm"]["mean"]

    @fo.nnx_jit(frozen="norm", wrt=wrt, discard=True)
    def step(model: Any, x: Any) -> Any:
        return model(x)

    step(model, X)
    assert nnx.state(model)["norm"]["mean"] is before
