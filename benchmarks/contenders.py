"""Ways to train a part of a model, as users would write them, and the limit: that part alone.

Every contender takes one workload and one optimizer and gives a training: a step, its first
arguments, and how it is compiled. A step returns the successors of its first arguments, so that it
can be run again and again.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import optax
from flax import nnx

import frozen_optax as fo
from benchmarks.workloads import NEW, Tree, Workload, in_one_table

Optimizer = optax.GradientTransformation


GREY, GREEN, ORANGE, PURPLE, BLACK = "#b0b0b0", "#1b7837", "#c2703d", "#8c6bb1", "black"


@dataclasses.dataclass(frozen=True)
class Training:
    """A step ready to be compiled: `step(*state, *constant, batch)` returns the next `state`."""

    step: Callable[..., Any]
    state: tuple[Any, ...]
    compiler: Callable[..., Any] = jax.jit
    constant: tuple[Any, ...] = ()  # arguments between the state and the batch that stay the same
    # The parameters after a step, for the checks.
    whole: Callable[[Any], Tree] = lambda state: state[0]
    optimizer_state: Callable[[Any], Any] = lambda state: state[1]

    def compile_with(self, donate: bool) -> Any:
        """The step, compiled when first called."""
        donated = tuple(range(len(self.state))) if donate else ()
        return self.compiler(self.step, donate_argnums=donated)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Legend:
    """How tables and pictures show what was measured."""

    name: str  # what wraps the optimizer `tx`, and what is not jax's and optax's own
    title: str  # as the README calls it
    colour: str = GREY
    bar: bool = True  # in the picture of costs
    line: bool = False  # in the picture of growth


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contender(Legend):
    """A way to train a part of a model: of a workload and an optimizer it makes a training."""

    prepare: Callable[[Workload, Optimizer], Training]
    moves: bool = False  # a frozen leaf moves, or may: zeroed gradients do not stop weight decay

    def __call__(self, workload: Workload, tx: Optimizer) -> Training:
        """The step of this contender, from the beginning."""
        return self.prepare(workload, tx)


def adamw() -> Optimizer:
    """The optimizer of all measurements."""
    return optax.adamw(1e-3)


def on_shapes(tx: Optimizer) -> Optimizer:
    """An optimizer whose state is shapes and no arrays, for models that fit nowhere."""
    return optax.GradientTransformation(lambda params: jax.eval_shape(tx.init, params), tx.update)


def plain(
    workload: Workload,
    tx: Optimizer,
    apply: Callable[..., Any] = optax.apply_updates,
    gradient: Callable[..., Any] = jax.value_and_grad,
    compiler: Callable[..., Any] = jax.jit,
) -> Training:
    """A train step over the whole tree, as in the documentation of Optax."""

    def step(params: Tree, state: Any, batch: Any) -> Any:
        _, grads = gradient(workload.loss)(params, batch)
        updates, state = tx.update(grads, state, params)
        return apply(params, updates), state

    return Training(step, (workload.params, tx.init(workload.params)), compiler)


def limit(workload: Workload, tx: Optimizer) -> Training:
    """Written by hand: frozen leaves are arguments that are neither differentiated nor returned."""

    def step(trainable: Tree, state: Any, frozen: Tree, batch: Any) -> Any:
        loss = lambda trainable: workload.loss({**frozen, **trainable}, batch)
        grads = jax.grad(loss)(trainable)
        updates, state = tx.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state

    frozen, trainable = workload.part(trained=False), workload.part(trained=True)
    return Training(
        step,
        (trainable, tx.init(trainable)),
        constant=(frozen,),
        whole=lambda state: {**frozen, **state[0]},
    )


def _selector(workload: Workload) -> fo.Selector:
    return fo.by_mask({name: name in workload.trained for name in workload.params})


def ours(
    workload: Workload,
    tx: Optimizer,
    *,
    gradient: bool = True,
    jit: bool = True,
    apply: Any = fo.apply_updates,
) -> Training:
    """`with_frozen`, and what else of this library is asked for."""
    wrapped = fo.with_frozen(tx, trainable=_selector(workload))
    our_gradient = lambda loss: fo.value_and_grad(loss, wrapped)
    our_jit = lambda step, **options: fo.jit(step, frozen=wrapped, **options)
    return plain(
        workload,
        wrapped,
        apply,
        gradient=our_gradient if gradient else jax.value_and_grad,
        compiler=our_jit if jit else jax.jit,
    )


def restoring(workload: Workload, tx: Optimizer) -> Training:
    """The frozen weights assigned back at the end of each step."""
    training, trained = plain(workload, tx), _selector(workload)

    def step(params: Tree, state: Any, batch: Any) -> Any:
        new, state = training.step(params, state, batch)
        return fo.restore(new, params, trainable=trained), state

    return dataclasses.replace(training, step=step)


def equinox(workload: Workload, tx: Optimizer) -> Training:
    """`eqx.partition` inside the step: differentiate and update the one part, combine again."""
    is_trained = jax.tree.map(lambda frozen: not frozen, workload.mask())

    def step(params: Tree, state: Any, batch: Any) -> Any:
        trainable, frozen = eqx.partition(params, is_trained)
        loss = lambda trainable: workload.loss(eqx.combine(trainable, frozen), batch)
        grads = jax.grad(loss)(trainable)
        updates, state = tx.update(grads, state, trainable)
        return eqx.combine(eqx.apply_updates(trainable, updates), frozen), state

    return Training(step, (workload.params, tx.init(eqx.filter(workload.params, is_trained))))


class _Module(nnx.Module):
    """The parameters as a module of NNX; the model is the workload's own loss."""

    def __init__(self, params: Tree):
        self.groups = nnx.data(jax.tree.map(nnx.Param, params))


def flax_nnx(workload: Workload, tx: Optimizer) -> Training:
    """NNX with `DiffState` and `wrt`, under `jax.jit` by `split` and `merge`, its fast way."""
    trained = lambda path, _: any(part in workload.trained for part in path)
    is_param = nnx.All(nnx.Param, trained)
    model = _Module(workload.params)
    definition, state = nnx.split((model, nnx.Optimizer(model, tx, wrt=is_param)))

    def step(state: Any, batch: Any) -> Any:
        model, optimizer = nnx.merge(definition, state)
        loss = lambda model: workload.loss(_values(model), batch)
        grads = nnx.grad(loss, argnums=nnx.DiffState(0, is_param))(model)
        optimizer.update(model, grads)
        return (nnx.state((model, optimizer)),)

    def whole(state: Any) -> Tree:
        model, _ = nnx.merge(definition, state[0])
        return _values(model)

    return Training(step, (state,), whole=whole, optimizer_state=lambda state: state[0][1])


@jax.tree_util.register_pytree_with_keys_class
class _InPlace:
    """Modules that a step changes in place, as the state of a training: a tree of what they hold.

    An item is what one of their Variables holds.
    """

    def __init__(self, *modules: nnx.Module):
        self.modules = modules
        held = nnx.state(modules)  # the very Variables
        self.variables = jax.tree.leaves(held, is_leaf=lambda node: isinstance(node, nnx.Variable))

    def __getitem__(self, index: int) -> jax.Array:
        return self.variables[index][...]

    def tree_flatten_with_keys(self) -> tuple[Any, Any]:
        definition, state = nnx.split(self.modules)
        leaves, structure = jax.tree.flatten(state)
        keys = map(jax.tree_util.SequenceKey, range(len(leaves)))
        return list(zip(keys, leaves, strict=True)), (definition, structure)

    @classmethod
    def tree_unflatten(cls, static: Any, leaves: Any) -> "_InPlace":
        definition, structure = static
        return cls(*nnx.merge(definition, jax.tree.unflatten(structure, leaves)))


class _StepInPlace:
    """A step of NNX under `fo.nnx_jit`, which returns the modules that it has changed."""

    def __init__(self, step: Any):
        self._step = step

    def __call__(self, state: _InPlace, batch: Any) -> tuple[_InPlace]:
        self._step(*state.modules, batch)
        return (state,)

    def trace(self, state: _InPlace, batch: Any) -> Any:
        return self._step.trace(*state.modules, batch)

    def lower(self, state: _InPlace, batch: Any) -> Any:
        return self._step.lower(*state.modules, batch)


def in_place(workload: Workload, tx: Optimizer) -> Training:
    """A step as NNX users write it, and what is trained said by `fo.nnx_filter`."""
    model = _Module(workload.params)
    trained = fo.nnx_filter(model, trainable=[f"groups/{name}" for name in workload.trained])
    optimizer = nnx.Optimizer(model, tx, wrt=trained)

    def step(model: Any, optimizer: Any, batch: Any) -> None:
        loss = lambda model: workload.loss(_values(model), batch)
        grads = nnx.grad(loss, argnums=nnx.DiffState(0, trained))(model)
        optimizer.update(model, grads)

    def compiler(step: Any, donate_argnums: Any) -> Any:
        return _StepInPlace(fo.nnx_jit(step, trainable=trained, donate_argnums=donate_argnums))

    return Training(
        step,
        (_InPlace(model, optimizer),),
        compiler,
        whole=lambda state: _values(state[0].modules[0]),
        optimizer_state=lambda state: nnx.state(state[0].modules[1]),
    )


def _values(model: _Module) -> Tree:
    is_param = lambda node: isinstance(node, nnx.Param)
    return jax.tree.map(lambda param: param[...], model.groups, is_leaf=is_param)


def frozen_gradients_zeroed(workload: Workload, tx: Optimizer) -> Training:
    """Zeros before the optimizer, as is often written; what the optimizer adds by itself stays."""
    zeroed = optax.masked(optax.set_to_zero(), workload.mask())
    return plain(workload, optax.chain(zeroed, tx))


def frozen_updates_zeroed(
    freeze: Callable[[Tree], Optimizer], apply: Callable[..., Any]
) -> Callable[[Workload, Optimizer], Training]:
    """Zeros after the optimizer, by one library's transform or the other's."""
    return lambda workload, tx: plain(workload, optax.chain(tx, freeze(workload.mask())), apply)


def selective(workload: Workload, tx: Optimizer) -> Training:
    """The wrapper of optax around the optimizer."""
    return plain(workload, optax.selective_transform(tx, freeze_mask=workload.mask()))


def selective_clipped_outside(workload: Workload, _: Optimizer) -> Training:
    """The same with clipping around it, where optax's wrapper lets it stand."""
    wrapped = optax.selective_transform(adamw(), freeze_mask=workload.mask())
    return plain(workload, optax.chain(optax.clip_by_global_norm(1.0), wrapped))


def _apart(workload: Workload, training: Training) -> Training:
    """The same training, its parameters with the new rows of the table apart, for the checks."""

    def whole(state: Any) -> Tree:
        table, new = state[0]["table"], len(workload.params[NEW])
        return {**state[0], "table": table[:-new], NEW: table[-new:]}

    return dataclasses.replace(training, whole=whole)


def rows(workload: Workload, tx: Optimizer, *, in_place: bool = True) -> Training:
    """The new rows of one table train, and the others are frozen within it."""
    whole = in_one_table(workload)
    old = {"table": slice(0, -len(workload.params[NEW]))}
    wrapped = fo.with_frozen(tx, elements=old)
    training = plain(
        whole,
        wrapped,
        functools.partial(fo.apply_updates, frozen=wrapped) if in_place else optax.apply_updates,
        gradient=lambda loss: fo.value_and_grad(loss, wrapped),
        compiler=lambda step, **options: fo.jit(step, frozen=wrapped, **options),
    )
    return _apart(workload, training)


def rows_written_back(workload: Workload, tx: Optimizer) -> Training:
    """The whole table is trained, and after each step the old rows are written back."""
    training, new = plain(in_one_table(workload), tx), len(workload.params[NEW])

    def step(params: Tree, state: Any, batch: Any) -> Any:
        after, state = training.step(params, state, batch)
        table = params["table"].at[-new:].set(after["table"][-new:])
        return {**after, "table": table}, state

    return _apart(workload, dataclasses.replace(training, step=step))


def whole_table(workload: Workload, tx: Optimizer) -> Training:
    """All rows of the table are trained."""
    return _apart(workload, plain(in_one_table(workload), tx))


def kauldron(workload: Workload, tx: Optimizer) -> Training:
    """The wrapper of kauldron, where it is installed."""
    trained = jax.tree.map(lambda frozen: not frozen, workload.mask())
    partial_updates = importlib.import_module("kauldron.optim").partial_updates
    return plain(workload, partial_updates(tx, trained))


LIMIT = Contender(
    name="limit",
    title="the limit, by hand",
    prepare=limit,
    colour=BLACK,
    bar=False,
    line=True,
)
OURS = [
    Contender(
        name="fo.jit",
        title="**this library**, as in the first example",
        prepare=ours,
        colour=GREEN,
        line=True,
    ),
    Contender(
        name="fo.jit, optax.apply_updates",
        title="with `optax.apply_updates`",
        prepare=functools.partial(ours, apply=optax.apply_updates),
        colour=GREEN,
        bar=False,
    ),
    Contender(
        name="fo.nnx_jit",
        title="`fo.nnx_jit`, modules changed in place",
        prepare=in_place,
        colour=GREEN,
    ),
    Contender(
        name="fo.value_and_grad",
        title="with `jax.jit`",
        prepare=functools.partial(ours, jit=False),
        colour=GREEN,
    ),
    Contender(
        name="fo.with_frozen",
        title="with `jax.jit` and `jax.grad`",
        prepare=functools.partial(ours, jit=False, gradient=False),
        colour=GREEN,
    ),
    Contender(
        name="chain(tx, fo.freeze)",
        title="`optax.chain(tx, fo.freeze(...))`",
        prepare=frozen_updates_zeroed(fo.freeze, fo.apply_updates),
        colour=GREEN,
        bar=False,
    ),
    Contender(
        name="fo.restore",
        title="`fo.restore` after the step",
        prepare=restoring,
        colour=GREEN,
    ),
]
PEERS = [
    Contender(
        name="chain(tx, optax.freeze)",
        title="`optax.chain(tx, optax.freeze(...))`",
        prepare=frozen_updates_zeroed(optax.freeze, optax.apply_updates),
        colour=PURPLE,
        line=True,
    ),
    Contender(
        name="chain(masked(set_to_zero), tx)",
        title="`optax.chain(optax.masked(set_to_zero(), ...), tx)`",
        prepare=frozen_gradients_zeroed,
        bar=False,
        moves=True,
    ),
    Contender(
        name="optax.selective_transform",
        title="`optax.selective_transform`",
        prepare=selective,
        colour=ORANGE,
        line=True,
    ),
    Contender(
        name="eqx.partition",
        title="Equinox, `eqx.partition`",
        prepare=equinox,
    ),
    Contender(
        name="nnx.DiffState",
        title="Flax NNX, `DiffState` and `wrt`",
        prepare=flax_nnx,
    ),
]
KAULDRON = Contender(
    name="kauldron partial_updates",
    title="kauldron, `partial_updates`",
    prepare=kauldron,
)
NOTHING_FROZEN = Contender(
    name="nothing frozen",
    title="nothing frozen",
    prepare=plain,
    moves=True,
)
CLIPPED_OUTSIDE = Contender(
    name="chain(clip, optax.selective_transform)",
    title="`optax.selective_transform`, clipping outside of it",
    prepare=selective_clipped_outside,
)
OF_ROWS = (
    Contender(
        name="elements, in place",
        title="`elements=`, `fo.apply_updates(params, updates, tx)`",
        prepare=rows,
        colour=GREEN,
    ),
    Contender(
        name="elements",
        title="`elements=`, `optax.apply_updates(params, updates)`",
        prepare=functools.partial(rows, in_place=False),
        colour=GREEN,
    ),
    Contender(
        name="rows written back",
        title="everything updated, old rows written back",
        prepare=rows_written_back,
    ),
    Contender(
        name="whole table",
        title="everything trained",
        prepare=whole_table,
        moves=True,
    ),
)
TORCH = Legend(
    name="torch requires_grad_",
    title="PyTorch, `requires_grad_(False)`",
)

_INSTALLED = [KAULDRON] if importlib.util.find_spec("kauldron") else []
CONTENDERS = {each.name: each for each in [LIMIT, *OURS, *PEERS, *_INSTALLED, NOTHING_FROZEN]}

# Whatever results may hold, whoever is installed here.
_ELSEWHERE = [KAULDRON, CLIPPED_OUTSIDE, *OF_ROWS, TORCH]
LEGENDS: dict[str, Legend] = {**CONTENDERS, **{each.name: each for each in _ELSEWHERE}}
