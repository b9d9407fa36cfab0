"""Flax NNX: its steps, which change modules in place, and its filters. This is the wing's door.

NNX itself is imported by the first call: who does without it does not wait for it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast, overload

from frozen_optax._selection import frozen_selector
from frozen_optax._selectors import Selector
from frozen_optax._typing import Frozen, PyTree

if TYPE_CHECKING:
    from frozen_optax._nnx._filter import TrainedFilter
    from frozen_optax._nnx._jit import NnxStep

P = ParamSpec("P")
R = TypeVar("R")


def _wrt_of(selection: Frozen) -> Any:
    """What `nnx_filter` was told that parameters are, if the selection is one that it has made."""
    room = sys.modules.get("frozen_optax._nnx._filter")  # which has made it, if it is one
    return selection.wrt if room is not None and isinstance(selection, room.TrainedFilter) else None


def _either(frozen: Frozen, trainable: Frozen) -> Frozen:
    """The one of the two that was given."""
    return frozen if trainable is None else trainable


def _parameters(wrt: Any, selection: Frozen) -> Any:
    """The kind of Variables that are parameters: `nnx.Param`, if nothing is said."""
    from flax import nnx

    of_filter = _wrt_of(selection)
    if wrt is None:
        return nnx.Param if of_filter is None else of_filter
    if of_filter is not None and of_filter != wrt:
        raise ValueError(
            f"wrt={wrt!r} is said here, and the filter was made with wrt={of_filter!r}. Leave it "
            "out here."
        )
    return wrt


def nnx_filter(
    model: PyTree, frozen: Frozen = None, *, trainable: Frozen = None, wrt: Any = None
) -> TrainedFilter:
    """The parameters of a model that are trained, as a filter of Flax NNX.

    NNX says by filters which Variables a function is about. This one is true of the trained
    parameters of `model`, whichever of the two ways it was said: of no frozen one, and of nothing
    that is no parameter (statistics, counts of random numbers). So `nnx.Optimizer(model, tx,
    wrt=trained)`, `nnx.grad(loss, argnums=nnx.DiffState(0, trained))`, `nnx.split(model, trained,
    ...)` and `nnx.state(model, trained)` agree, and what is not selected is neither differentiated
    nor updated. It may also be given as `trainable=` wherever that is an argument.

    Under `with_frozen` an optimizer sees all parameters, and `wrt=nnx.Param` is right there.

    Args:
      model: the module. What is selected is looked up here, so a name that is not there is an error
        here.
      frozen: the parameters that are frozen: a glob on their paths (`"encoder"`, `"layers/0"`), a
        compiled regex, a `Selector`, a list of these, a predicate `(path, leaf) -> bool`, a type of
        Variables (`nnx.LoRAParam`) or another filter of NNX, or the optimizer that `with_frozen`
        returned.
      trainable: the parameters that are not, instead of `frozen`: exactly one of the two is given.
      wrt: which Variables are parameters, as a filter of NNX: `nnx.Param`, if nothing is said.

    Returns:
      The filter, a function of a path and a Variable. It is hashable, as NNX needs it.

    Raises:
      TypeError: not exactly one of `frozen` and `trainable` is given, or it is no way to select.
      ValueError: a pattern selects nothing, or everything is frozen and nobody said so; a Variable
        that stands at two paths is frozen at one of them only; `model` has no parameter. When
        used: a parameter is at a path that `model` did not have.

    Example:
      >>> import frozen_optax as fo, jax.numpy as jnp, optax
      >>> from flax import nnx
      >>> class Model(nnx.Module):
      ...     def __init__(self, rngs):
      ...         self.base = nnx.Linear(2, 3, rngs=rngs)
      ...         self.head = nnx.Linear(3, 1, rngs=rngs)
      >>> model = Model(nnx.Rngs(0))
      >>> trained = fo.nnx_filter(model, "base")
      >>> sorted(nnx.state(model, trained))
      ['head']
      >>> loss = lambda model: jnp.sum(model.head(model.base(jnp.ones(2))))
      >>> sorted(nnx.grad(loss, argnums=nnx.DiffState(0, trained))(model))
      ['head']
    """
    selector = frozen_selector(frozen, trainable)
    from frozen_optax._nnx._filter import trained_filter

    return trained_filter(model, selector, _parameters(wrt, _either(frozen, trainable)))


@overload
def nnx_jit(
    fun: Callable[P, R],
    /,
    *,
    frozen: Frozen = None,
    trainable: Frozen = None,
    wrt: Any = None,
    discard: bool = False,
    **options: Any,
) -> NnxStep[P, R]: ...


@overload
def nnx_jit(
    fun: None = None,
    /,
    *,
    frozen: Frozen = None,
    trainable: Frozen = None,
    wrt: Any = None,
    discard: bool = False,
    **options: Any,
) -> Callable[[Callable[P, R]], NnxStep[P, R]]: ...


def nnx_jit(
    fun: Callable[..., Any] | None = None,
    /,
    *,
    frozen: Frozen = None,
    trainable: Frozen = None,
    wrt: Any = None,
    discard: bool = False,
    **options: Any,
) -> Any:
    """`nnx.jit` for a train step: frozen parameters go in and never come out.

    The step is as NNX users write it, `train_step(model, optimizer, batch)`: it takes the model
    first, changes modules in place, and returns a loss, or nothing. Modules, optimizers, metrics
    and `nnx.Rngs` may be any of its arguments, or stand in them. What their Variables hold is
    updated when the step is done: trained parameters, statistics, counts of random numbers,
    moments. A frozen parameter is not touched: its Variable holds the very array that it held. It
    is neither copied, nor dispatched, nor donated.

    As under `jit`, the step has to leave the frozen parameters as they are, or to add nothing but
    zero to them, and anything else is an error. Variables that are shared stay shared.

    A call does not walk the modules, as `nnx.jit` does, while they are the same objects, put
    together in the same way; it looks whether they are. The last few models are remembered so, and
    none is kept alive; one that holds itself, as the parent of its layers, is walked at each call.

    Args:
      fun: the step; leave it out to use `nnx_jit` as a decorator.
      frozen: the parameters of the first argument that are frozen. Best is the optimizer that
        `with_frozen` returned, so that it is said once. It may also be a glob on their paths
        (`"encoder"`), a compiled regex, a `Selector`, a list of these, a predicate `(path, leaf) ->
        bool`, or a type of Variables or another filter of NNX.
      trainable: the parameters that are not, instead of `frozen`: exactly one of the two is given.
      wrt: which Variables are parameters, as a filter of NNX: `nnx.Param`, if nothing is said. All
        others (statistics, counts) are never frozen.
      discard: whether what the step makes of frozen parameters may be thrown away.
      **options: those of `jax.jit`, by its names and for the step's own arguments, shardings
        excepted. Donating the first argument (`donate_argnums=0`) donates what the Variables of all
        modules hold, but for frozen parameters.

    Returns:
      The compiled step. It has the methods `lower`, `trace` and `clear_cache` of a `jax.jit`
      function, and `assert_step_freezes` proves it.

    Raises:
      TypeError: not exactly one of `frozen` and `trainable` is given, or it is no way to select;
        shardings are given. When called: the step returns a module. And whatever `jax.jit` raises.
      ValueError: when called: the first argument holds no parameter; a pattern selects nothing;
        everything is frozen and nobody said so (`"**"`, `True`); a Variable that stands at two
        paths is frozen at one of them only; the step makes something else of a frozen parameter, or
        puts its modules together in another way. The message names the paths.

    Example:
      >>> import frozen_optax as fo, jax.numpy as jnp, optax
      >>> from flax import nnx
      >>> class Model(nnx.Module):
      ...     def __init__(self, rngs):
      ...         self.base = nnx.Linear(2, 3, rngs=rngs)
      ...         self.head = nnx.Linear(3, 1, rngs=rngs)
      >>> model, tx = Model(nnx.Rngs(0)), fo.with_frozen(optax.adamw(1e-3), "base")
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
      >>> @fo.nnx_jit(frozen=tx)
      ... def train_step(model, optimizer, x):
      ...     loss = lambda model: jnp.sum(model.head(model.base(x)))
      ...     value, grads = nnx.value_and_grad(loss)(model)
      ...     optimizer.update(model, grads)
      ...     return value
      >>> kernel = nnx.state(model)["base"]["kernel"]
      >>> _ = train_step(model, optimizer, jnp.ones(2))
      >>> nnx.state(model)["base"]["kernel"] is kernel
      True
    """
    if fun is not None and not callable(fun):
        raise TypeError(
            f"nnx_jit takes a function, found {fun!r}. What is frozen goes by name: "
            f"nnx_jit(step, frozen={fun!r})."
        )
    # A leaf that is frozen in part goes through whole, as one that trains.
    selector = frozen_selector(frozen, trainable, in_part=True)

    def compiled(fun: Callable[..., Any]) -> NnxStep[..., Any]:
        from frozen_optax._nnx._jit import NnxStep

        kind = _parameters(wrt, _either(frozen, trainable))
        return NnxStep(fun, selector, kind, discard, options)

    return compiled if fun is None else compiled(fun)


def opened(
    step: Callable[..., Any], args: Sequence[Any], frozen: Frozen, trainable: Frozen
) -> tuple[Callable[..., Any], tuple[Any, ...], Selector] | None:
    """A step of `nnx_jit` as a function of arrays, its arguments, and what is frozen of the first.

    None if it is none.
    """
    room = sys.modules.get("frozen_optax._nnx._jit")  # which has made it, if it is one
    if room is None or not isinstance(step, room.NnxStep):
        return None
    nnx_step = cast("NnxStep[..., Any]", step)
    selector = frozen_selector(frozen, trainable)
    return nnx_step.opened(args, selector, _wrt_of(_either(frozen, trainable)))
