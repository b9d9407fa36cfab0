"""Ways to train a part of a model, each as its users would write it, and the limit: a step for that part alone.

Every contender takes one workload and one optimizer and gives a step, its first arguments, and how it is compiled. A
step returns the successors of its first arguments, so that it can be run again and again.
"""

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import optax
from flax import nnx

import frozen_optax as fo
from benchmarks.workloads import Tree, Workload

Optimizer = optax.GradientTransformation


@dataclasses.dataclass(frozen=True)
class Contender:
    """A step ready to be compiled: `step(*state, batch)` returns the next `state`, all but `constant` of it."""

    step: Callable[..., Any]
    state: tuple[Any, ...]
    compiler: Callable[..., Any] = jax.jit
    constant: tuple[Any, ...] = ()  # arguments between the state and the batch that stay the same
    whole: Callable[[Any], Tree] = lambda state: state[0]  # the parameters after a step, for the checks
    optimizer_state: Callable[[Any], Any] = lambda state: state[1]

    def compile_with(self, donate: bool) -> Any:
        """The step, compiled when first called."""
        return self.compiler(self.step, donate_argnums=tuple(range(len(self.state))) if donate else ())


def plain(
    workload: Workload,
    tx: Optimizer,
    apply: Callable[..., Any] = optax.apply_updates,
    gradient: Callable[..., Any] = jax.value_and_grad,
    compiler: Callable[..., Any] = jax.jit,
) -> Contender:
    """A train step over the whole tree, as in the documentation of Optax."""

    def step(params: Tree, state: Any, batch: Any) -> Any:
        _, grads = gradient(workload.loss)(params, batch)
        updates, state = tx.update(grads, state, params)
        return apply(params, updates), state

    return Contender(step, (workload.params, tx.init(workload.params)), compiler)


def limit(workload: Workload, tx: Optimizer) -> Contender:
    """Written by hand: frozen leaves are arguments that are neither differentiated nor returned."""

    def step(trainable: Tree, state: Any, frozen: Tree, batch: Any) -> Any:
        grads = jax.grad(lambda trainable: workload.loss({**frozen, **trainable}, batch))(trainable)
        updates, state = tx.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state

    frozen, trainable = workload.part(trained=False), workload.part(trained=True)
    return Contender(
        step, (trainable, tx.init(trainable)), constant=(frozen,), whole=lambda state: {**frozen, **state[0]}
    )


def _selector(workload: Workload) -> fo.Selector:
    return fo.by_mask({name: name in workload.trained for name in workload.params})


def ours(
    workload: Workload, tx: Optimizer, *, gradient: bool = True, jit: bool = True, apply: Any = fo.apply_updates
) -> Contender:
    """`with_frozen`, and what else of this library is asked for."""
    trained = _selector(workload)
    return plain(
        workload,
        fo.with_frozen(tx, trainable=trained),
        apply,
        (lambda loss: fo.value_and_grad(loss, trainable=trained)) if gradient else jax.value_and_grad,
        (lambda step, **options: fo.jit(step, trainable=trained, **options)) if jit else jax.jit,
    )


def restoring(workload: Workload, tx: Optimizer) -> Contender:
    """The frozen weights assigned back at the end of each step."""
    contender, trained = plain(workload, tx), _selector(workload)

    def step(params: Tree, state: Any, batch: Any) -> Any:
        new, state = contender.step(params, state, batch)
        return fo.restore(new, params, trainable=trained), state

    return dataclasses.replace(contender, step=step)


def equinox(workload: Workload, tx: Optimizer) -> Contender:
    """`eqx.partition` inside the step: differentiate and update the one part, combine again."""
    is_trained = jax.tree.map(lambda frozen: not frozen, workload.mask())

    def step(params: Tree, state: Any, batch: Any) -> Any:
        trainable, frozen = eqx.partition(params, is_trained)
        grads = jax.grad(lambda trainable: workload.loss(eqx.combine(trainable, frozen), batch))(trainable)
        updates, state = tx.update(grads, state, trainable)
        return eqx.combine(eqx.apply_updates(trainable, updates), frozen), state

    return Contender(step, (workload.params, tx.init(eqx.filter(workload.params, is_trained))))


class _Module(nnx.Module):
    """The parameters as a module of NNX; the model is the workload's own loss."""

    def __init__(self, params: Tree):
        self.groups = nnx.data(jax.tree.map(nnx.Param, params))


def flax_nnx(workload: Workload, tx: Optimizer) -> Contender:
    """NNX with `DiffState` and `wrt`, under `jax.jit` by `split` and `merge`, the fast way of its documentation."""
    trained = lambda path, _: any(part in workload.trained for part in path)
    is_param = nnx.All(nnx.Param, trained)
    model = _Module(workload.params)
    definition, state = nnx.split((model, nnx.Optimizer(model, tx, wrt=is_param)))

    def step(state: Any, batch: Any) -> Any:
        model, optimizer = nnx.merge(definition, state)
        loss = lambda model: workload.loss(jax.tree.map(lambda p: p[...], model.groups, is_leaf=_is_param), batch)
        grads = nnx.grad(loss, argnums=nnx.DiffState(0, is_param))(model)
        optimizer.update(model, grads)
        return (nnx.state((model, optimizer)),)

    def whole(state: Any) -> Tree:
        return jax.tree.map(lambda p: p[...], nnx.merge(definition, state[0])[0].groups, is_leaf=_is_param)

    return Contender(step, (state,), whole=whole, optimizer_state=lambda state: state[0][1])


def _is_param(node: Any) -> bool:
    return isinstance(node, nnx.Param)


def _partial_updates() -> Any:
    try:
        return importlib.import_module("kauldron.optim").partial_updates
    except ImportError:
        return None


# Each name says what wraps the optimizer `tx`, and what is not jax's and optax's own.
CONTENDERS: dict[str, Callable[[Workload, Optimizer], Contender]] = {
    "limit": limit,
    "fo.jit": ours,
    "fo.jit, optax.apply_updates": lambda w, tx: ours(w, tx, apply=optax.apply_updates),
    "fo.value_and_grad": lambda w, tx: ours(w, tx, jit=False),
    "fo.with_frozen": lambda w, tx: ours(w, tx, jit=False, gradient=False),
    "chain(tx, fo.freeze)": lambda w, tx: plain(w, optax.chain(tx, fo.freeze(w.mask())), fo.apply_updates),
    "fo.restore": restoring,
    "chain(tx, optax.freeze)": lambda w, tx: plain(w, optax.chain(tx, optax.freeze(w.mask()))),
    "chain(masked(set_to_zero), tx)": lambda w, tx: plain(
        w, optax.chain(optax.masked(optax.set_to_zero(), w.mask()), tx)
    ),
    "optax.selective_transform": lambda w, tx: plain(w, optax.selective_transform(tx, freeze_mask=w.mask())),
    "eqx.partition": equinox,
    "nnx.DiffState": flax_nnx,
    "nothing frozen": plain,
}

if (partial_updates := _partial_updates()) is not None:
    CONTENDERS["kauldron partial_updates"] = lambda w, tx: plain(
        w, partial_updates(tx, jax.tree.map(lambda frozen: not frozen, w.mask()))
    )

CONTENDERS["nothing frozen"] = CONTENDERS.pop("nothing frozen")  # the last one, whoever is installed

# What moves a frozen leaf, or may: zeroing the gradients does not stop weight decay.
MOVES = {"chain(masked(set_to_zero), tx)", "nothing frozen"}
