"""`nnx_jit`: steps of NNX that change their modules in place, with nothing frozen copied."""

import functools
import gc
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax_runs import OPTIMIZERS, NnxNet, X, listed, loss
from helpers import assert_same_bits

import frozen_optax as fo

is_variable = lambda node: isinstance(node, nnx.Variable)


class Model(nnx.Module):
    """What NNX holds beside parameters: statistics, a key and a count; a list of modules."""

    def __init__(self, seed: int = 0) -> None:
        rngs = nnx.Rngs(seed)
        self.base = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.layers = listed([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        x = self.drop(self.norm(self.base(x)))
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return self.head(x)


FROZEN = ["base", "layers/0"]


def make(frozen: Any = FROZEN, seed: int = 0) -> tuple[Model, nnx.Optimizer, Any]:
    model = Model(seed)
    tx = fo.with_frozen(OPTIMIZERS["adamw"], frozen)
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param), tx


def train_step(model: Any, optimizer: Any, x: Any) -> Any:
    value, grads = nnx.value_and_grad(lambda model: loss(model(x)))(model)
    optimizer.update(model, grads)
    return value


def held(module: Any) -> dict[str, Any]:
    """What the Variables of a module hold: the very arrays, by path."""
    flat = jax.tree_util.tree_leaves_with_path(nnx.state(module))
    name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return {name(path).removesuffix("/value"): leaf for path, leaf in flat}


def assert_all_close(ours: Any, theirs: Any) -> None:
    ours, theirs = held(ours), held(theirs)
    assert set(ours) == set(theirs)
    for path, leaf in ours.items():
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            assert np.allclose(leaf, theirs[path], atol=1e-5), path


def the_same(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    """The paths of the arrays that are the very objects that they were."""
    return {path for path in before if after[path] is before[path]}


BASE = {f"{module}/{name}" for module in FROZEN for name in ("bias", "kernel")}


@pytest.mark.parametrize("donate", [None, 0])
def test_frozen_variables_hold_the_very_arrays(donate: Any) -> None:
    model, optimizer, tx = make()
    before = held(model)
    fo.nnx_jit(train_step, frozen=tx, donate_argnums=donate)(model, optimizer, X)
    after = held(model)
    assert the_same(before, after) - {"drop/rngs/key"} == BASE
    deleted = {path for path, leaf in before.items() if leaf.is_deleted()}
    assert not deleted & BASE
    assert bool(deleted) == (donate is not None)


def test_all_else_goes_on_as_under_nnx_jit() -> None:
    ours, optimizer, tx = make()
    step = fo.nnx_jit(train_step, frozen=tx)
    theirs, other, _ = make()
    for _ in range(3):
        value = step(ours, optimizer, X)
        expected = nnx.jit(train_step)(theirs, other, X)
        assert np.allclose(value, expected)
    assert_all_close(ours, theirs)
    assert_all_close(optimizer, other)
    assert int(held(ours)["drop/rngs/count"]) == 3
    assert int(held(optimizer)["step"]) == 3


@pytest.mark.parametrize("name", ["sgd", "clipped adam"])
def test_frozen_bits_are_kept_and_the_head_moves(name: str) -> None:
    model = NnxNet(nnx.Rngs(0))
    tx = fo.with_frozen(OPTIMIZERS[name], "encoder")
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    before = jax.tree.map(jnp.copy, held(model))
    fo.nnx_jit(train_step, frozen=tx)(model, optimizer, X)
    after = held(model)
    for path, leaf in before.items():
        if path.startswith("encoder"):
            assert_same_bits({path: leaf}, {path: after[path]})
        else:
            assert not np.array_equal(leaf, after[path])


def test_a_step_is_traced_once() -> None:
    traces = []

    def counted(*arguments: Any) -> Any:
        traces.append(1)
        return train_step(*arguments)

    model, optimizer, tx = make()
    step = fo.nnx_jit(counted, frozen=tx)
    step(model, optimizer, X)
    first = len(traces)  # two, as optax adds a zero and it is looked at
    for _ in range(3):
        step(model, optimizer, X)
    other = Model(1)  # put together alike
    step(other, nnx.Optimizer(other, tx, wrt=nnx.Param), X)
    assert len(traces) == first


# --- what is frozen


def test_counts_and_statistics_are_never_frozen() -> None:
    model, _optimizer, _ = make("**")
    before = held(model)

    @fo.nnx_jit(frozen="**")
    def step(model: Any, x: Any) -> Any:
        return model(x)

    step(model, X)
    after = held(model)
    moved = set(before) - the_same(before, after)
    assert {"norm/mean", "norm/var", "drop/rngs/count"} <= moved
    assert not moved & {"base/kernel", "head/kernel", "norm/scale"}


def test_lora_by_the_type_of_its_variables() -> None:
    class Adapted(nnx.Module):
        def __init__(self) -> None:
            rngs = nnx.Rngs(0)
            self.drop = nnx.Dropout(0.5, rngs=rngs)
            self.layer = nnx.LoRALinear(3, 2, lora_rank=2, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.layer(self.drop(x))

    model = Adapted()
    trained = fo.nnx_filter(model, trainable=nnx.LoRAParam)
    optimizer = nnx.Optimizer(model, optax.adamw(0.1), wrt=trained)

    @fo.nnx_jit(trainable=trained)
    def step(model: Any, optimizer: Any, x: Any) -> None:
        of_trained = nnx.DiffState(0, trained)
        grads = nnx.grad(lambda model: loss(model(x)), argnums=of_trained)(model)
        optimizer.update(model, grads)

    found = fo.assert_step_freezes(step, model, optimizer, X, trainable=trained)
    assert found == {"layer/bias": "itself", "layer/kernel": "itself"}
    before = held(model)
    for _ in range(2):  # the first leaves lora_a as it is: lora_b is zero
        step(model, optimizer, X)
    kept = the_same(before, held(model))
    assert kept - {"drop/rngs/key"} == {"layer/bias", "layer/kernel"}


def tie(model: Any) -> Any:
    model.again = model.base
    return model


def test_shared_variables_are_frozen_and_stay_tied() -> None:
    model = tie(Model())
    tx = fo.with_frozen(optax.adamw(0.1), "again")  # where nnx.Optimizer sees it
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    before = held(model)
    step = fo.nnx_jit(train_step, frozen=["again", "base"])
    step(model, optimizer, X)
    assert model.again is model.base
    assert the_same(before, held(model)) >= {"again/bias", "again/kernel"}


def test_frozen_at_one_of_two_paths_is_an_error() -> None:
    model, optimizer, _ = make()
    tie(model)
    with pytest.raises(ValueError, match="frozen at 'base/bias' and not at 'again/bias'"):
        fo.nnx_jit(train_step, frozen="base")(model, optimizer, X)
    with pytest.raises(ValueError, match="frozen at 'again/bias' and not at 'base/bias'"):
        fo.nnx_jit(train_step, trainable="base")(model, optimizer, X)


def test_modules_that_share_go_on_sharing() -> None:
    model, optimizer, tx = make()
    teacher = Model(1)
    teacher.base = model.base

    def step(model: Any, optimizer: Any, teacher: Any, x: Any) -> Any:
        teacher(x)
        return train_step(model, optimizer, x)

    before = held(teacher)
    fo.nnx_jit(step, frozen=tx)(model, optimizer, teacher, X)
    assert teacher.base is model.base
    assert int(held(teacher)["drop/rngs/count"]) == 1
    assert {"base/bias", "base/kernel"} <= the_same(before, held(teacher))


def test_a_predicate_is_asked_again_of_other_shapes() -> None:
    model = Model()
    is_large = fo.by_predicate(lambda path, leaf: leaf.size > 6)

    @fo.nnx_jit(frozen=is_large, discard=True)
    def step(model: Any) -> None:
        state = nnx.state(model, nnx.Param)
        nnx.update(model, jax.tree.map(lambda leaf: leaf + 1, state))

    step(model)
    before = held(model)
    nnx.update(model, {"head": {"bias": jnp.zeros(7)}})
    step(model)
    after = held(model)
    assert "head/kernel" in the_same(before, after)
    assert np.array_equal(after["head/bias"], np.zeros(7))


# --- what is refused


def test_what_would_be_discarded_is_an_error() -> None:
    def decay(model: Any) -> None:
        state = nnx.state(model, nnx.Param)
        nnx.update(model, jax.tree.map(lambda leaf: leaf * 0.9, state))

    model = Model()
    with pytest.raises(ValueError, match="base/kernel"):
        fo.nnx_jit(decay, frozen=FROZEN)(model)
    step = fo.nnx_jit(decay, frozen=FROZEN, discard=True)
    with pytest.raises(AssertionError, match=r"base/kernel: refuted"):
        fo.assert_step_freezes(step, model, frozen=FROZEN)
    before = held(model)
    step(model)
    kept = the_same(before, held(model))
    assert kept >= BASE
    assert not kept & {"head/kernel", "norm/scale"}


@pytest.mark.parametrize(
    ("frozen", "message"),
    [
        ("bases", r"'bases'\) selects nothing"),
        (fo.by_path("b*", "d*", "h*", "l*", "n*"), r"selects nothing: .*'d\*'|'d\*'\) selects"),
        (fo.by_path("b*", "h*", "l*", "n*"), "freezes all"),
    ],
)
def test_what_selects_nothing_or_all_is_an_error(frozen: Any, message: str) -> None:
    model, optimizer, _ = make()
    with pytest.raises(ValueError, match=message):
        fo.nnx_jit(train_step, frozen=frozen)(model, optimizer, X)


def test_a_step_may_not_put_modules_together_anew() -> None:
    model, optimizer, tx = make()

    def evaluates(model: Any, optimizer: Any, x: Any) -> None:
        model.eval()

    def grows(model: Any, optimizer: Any, x: Any) -> None:
        model.more = nnx.Param(jnp.ones(2))

    for step, told in ((evaluates, "an attribute is set"), (grows, "come or go: 'more'")):
        message = f"puts its modules together in another way: .*{told}"
        with pytest.raises(ValueError, match=message):
            fo.nnx_jit(step, frozen=tx)(model, optimizer, X)


def test_a_step_may_not_return_a_module() -> None:
    model, optimizer, tx = make()
    with pytest.raises(TypeError, match="returns Model, a module or a part of one, at '0'"):
        fo.nnx_jit(lambda model, optimizer, x: (model, x), frozen=tx)(model, optimizer, X)


def test_the_first_argument_holds_the_model() -> None:
    model, optimizer, tx = make()
    step = fo.nnx_jit(lambda x, model: None, frozen=tx)
    with pytest.raises(ValueError, match="no parameter in a leaf float32"):
        step(X, model)
    with pytest.raises(ValueError, match="no parameter in a"):
        fo.nnx_jit(train_step, frozen=tx)(optimizer, model, X)
    with pytest.raises(TypeError, match="takes no argument by position"):
        fo.nnx_jit(lambda *, model: None, frozen=tx)
    with pytest.raises(TypeError, match="the first argument of a step, and found none"):
        fo.nnx_jit(lambda *modules: None, frozen=tx)()


def test_shardings_are_refused() -> None:
    with pytest.raises(TypeError, match="no out_shardings"):
        fo.nnx_jit(train_step, frozen="base", out_shardings=jax.devices()[0])


# --- the modules may change between steps


def test_modes_are_seen() -> None:
    model, optimizer, tx = make()
    step = fo.nnx_jit(train_step, frozen=tx)
    step(model, optimizer, X)
    model.eval()
    before = held(model)
    step(model, optimizer, X)
    after = held(model)
    assert {"norm/mean", "drop/rngs/count"} <= the_same(before, after) | {
        path for path in before if np.array_equal(before[path], after[path])
    }  # fmt: skip
    model.train()
    step(model, optimizer, X)
    assert int(held(model)["drop/rngs/count"]) == 2


def replaced(model: Model) -> None:
    model.head.kernel = nnx.Param(jnp.zeros((4, 2)))


def longer(model: Model) -> None:
    model.layers.append(nnx.Linear(4, 4, rngs=nnx.Rngs(3)))


def swapped(model: Model) -> None:
    model.layers[0], model.layers[1] = model.layers[1], model.layers[0]


def another(model: Model) -> None:
    model.drop = nnx.Dropout(0.0, rngs=nnx.Rngs(3))


@pytest.mark.parametrize(
    "change",
    [
        longer,
        *(pytest.param(f, marks=pytest.mark.exhaustive) for f in (replaced, swapped, another)),
    ],
)
def test_a_model_changed_between_steps_is_seen(change: Any) -> None:
    trained = ["head", "norm"]
    tx = fo.with_frozen(optax.sgd(0.1), trainable=trained)
    ours, theirs = Model(), Model()
    step = fo.nnx_jit(train_step, frozen=tx)
    step(ours, nnx.Optimizer(ours, tx, wrt=nnx.Param), X)
    nnx.jit(train_step)(theirs, nnx.Optimizer(theirs, tx, wrt=nnx.Param), X)
    for model in ours, theirs:
        change(model)
    for _ in range(2):
        step(ours, nnx.Optimizer(ours, tx, wrt=nnx.Param), X)
        nnx.jit(train_step)(theirs, nnx.Optimizer(theirs, tx, wrt=nnx.Param), X)
    assert_all_close(ours, theirs)


def test_a_value_put_into_a_variable_is_seen() -> None:
    model, _optimizer, _tx = make()
    step = fo.nnx_jit(lambda model, x: model.base(x), frozen="base")
    step(model, X)
    nnx.update(model, {"base": {"kernel": jnp.zeros((3, 4))}})
    assert not np.any(step(model, X))


def test_the_step_does_not_keep_a_model_alive() -> None:
    model, optimizer, tx = make()
    step = fo.nnx_jit(train_step, frozen=tx)
    step(model, optimizer, X)
    base = weakref.ref(model.base)
    del model, optimizer
    gc.collect()
    assert base() is None
    model, optimizer, _ = make()
    step(model, optimizer, X)


def test_an_array_that_is_an_attribute_goes_on() -> None:
    class Counting(nnx.Module):
        def __init__(self) -> None:
            self.base = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
            self.seen = nnx.data(jnp.zeros(())) if hasattr(nnx, "data") else jnp.zeros(())

    @fo.nnx_jit(frozen="**")
    def step(model: Any, x: Any) -> Any:
        model.seen = model.seen + 1
        return model.base(x)

    model = Counting()
    before = held(model)
    for _ in range(3):
        step(model, X)
    assert float(model.seen) == 3
    assert {"base/bias", "base/kernel"} <= the_same(before, held(model))


# --- arguments


def test_modules_inside_of_arguments_and_by_name() -> None:
    model, optimizer, _tx = make()
    metric = nnx.metrics.Average("loss")

    @fo.nnx_jit(frozen=["0/base", "0/layers/0"], static_argnames="twice")
    def step(modules: Any, x: Any, *, twice: bool, metrics: Any) -> None:
        for _ in range(1 + twice):
            metrics["loss"].update(loss=train_step(*modules, x))

    before = held(model)
    step((model, optimizer), jnp.array(X), twice=True, metrics={"loss": metric})
    assert int(held(optimizer)["step"]) == 2
    assert float(metric.compute()) > 0
    assert the_same(before, held(model)) >= BASE
    step(x=jnp.array(X), modules=(model, optimizer), twice=False, metrics={"loss": metric})
    assert int(held(optimizer)["step"]) == 3


def test_the_same_module_twice_is_one() -> None:
    model, optimizer, tx = make()

    def step(model: Any, again: Any, optimizer: Any, x: Any) -> Any:
        assert again is model
        return train_step(model, optimizer, x)

    fo.nnx_jit(step, frozen=tx)(model, model, optimizer, X)
    assert int(held(model)["drop/rngs/count"]) == 1


def test_a_method_can_be_compiled() -> None:
    class Trainer:
        def __init__(self) -> None:
            self.model, self.optimizer, self.tx = make()
            self.step = fo.nnx_jit(self._step, frozen=self.tx)

        def _step(self, model: Any, optimizer: Any, x: Any) -> Any:
            return train_step(model, optimizer, x)

    trainer = Trainer()
    trainer.step(trainer.model, trainer.optimizer, X)
    assert int(held(trainer.optimizer)["step"]) == 1


def test_compiled_ahead_of_time() -> None:
    model, optimizer, tx = make()
    step = fo.nnx_jit(train_step, frozen=tx)
    compiled = step.lower(model, optimizer, X).compile()
    assert "fusion" in compiled.as_text() or "HloModule" in compiled.as_text()
    before = held(model)
    compiled(model, optimizer, X)
    assert the_same(before, held(model)) >= BASE
    assert int(held(optimizer)["step"]) == 1


# --- proofs


def test_a_step_in_place_is_proved() -> None:
    model, optimizer, tx = make()
    step = fo.nnx_jit(train_step, frozen=tx)
    before = held(model)
    found = fo.assert_step_freezes(step, model, optimizer, X, frozen=tx)
    assert set(found) == BASE
    assert all(words.startswith("itself but for odd bits") for words in found.values())
    assert the_same(before, held(model)) == set(before)  # a proof trains nothing


def test_a_proof_of_more_than_is_frozen_fails() -> None:
    model, optimizer, tx = make()
    step = fo.nnx_jit(train_step, frozen=tx)
    with pytest.raises(AssertionError, match=r"head/kernel: (refuted|unknown)"):
        fo.assert_step_freezes(step, model, optimizer, X, frozen="head")
    with pytest.raises(ValueError, match="selects nothing"):
        fo.assert_step_freezes(step, model, optimizer, X, frozen="heads")
