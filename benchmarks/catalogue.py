"""Every optimizer of optax and optax.contrib, by introspection, and what each needs for a step.

An optimizer is whatever a public function of `optax`, `optax.contrib` or `optax.transforms` returns
that is a `GradientTransformation`. Arguments without a default are filled in by name from
`ARGUMENTS`, so a new optimizer joins by itself. One that cannot be built that way fails
`test_every_optimizer_is_in_the_catalogue` until it stands in `ARGUMENTS` or, with its reason, in
`LEFT_OUT`.
"""

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

LEFT_OUT = {
    "contrib.scale_by_muon": "raises on a tree with a bias (optax 0.2.6 to 0.2.8), unlike muon",
    "measure_with_ema": "a part of optax.monitor: what it returns is a measurement and no update",
    "contrib.differentially_private_aggregate": "needs per-example gradients, an axis more",
    "contrib.dpsgd": "is built on differentially_private_aggregate",
}


def _norm(updates: Any, **_: Any) -> Any:
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(updates)))


ARGUMENTS: dict[str, Any] = {
    "adv_optimizer": lambda: optax.sgd(0.05),
    "base_optimizer": lambda: optax.sgd(0.05),
    "clipping": lambda: 0.1,
    "decay": lambda: 0.9,
    "eta": lambda: 0.1,
    "f": lambda: lambda updates, params: jax.tree.map(lambda u: -0.1 * u, updates),
    "fast_optimizer": lambda: optax.sgd(0.05),
    "freeze_mask": lambda: False,
    "gamma": lambda: 0.5,
    "inner": lambda: optax.adam(0.05),
    "learning_rate": lambda: 0.05,
    "mask": lambda: True,
    "max_backtracking_steps": lambda: 5,
    "max_consecutive_errors": lambda: 2,
    "max_delta": lambda: 0.05,
    "max_linesearch_steps": lambda: 5,
    "max_norm": lambda: 0.1,
    "measure": lambda: _norm,
    "measure_name": lambda: "norm",
    "measures": lambda: {"norm": _norm},
    "optimizer": lambda: optax.adam(0.05),
    "param_labels": lambda: "all",
    "should_transform_fn": lambda: lambda step, **_: step % 2 == 0,
    "slow_step_size": lambda: 0.5,
    "step_size": lambda: -0.1,
    "step_size_fn": lambda: lambda count: -0.1 / (1 + count),
    "sync_period": lambda: 2,
    "threshold": lambda: 0.05,
    "transforms": lambda: {"all": optax.adam(0.05)},
    "tx": lambda: optax.adam(0.05),
}

# Where the defaults do not make an optimizer, or one that does nothing in three steps.
SPECIAL: dict[str, Callable[..., optax.GradientTransformation]] = {
    "add_decayed_weights": lambda build: optax.chain(build(weight_decay=0.1), optax.scale(-0.1)),
    "add_noise": lambda build: build(eta=0.1, gamma=0.5, key=jax.random.key(0)),
    "chain": lambda build: build(
        optax.clip_by_global_norm(0.1), optax.adamw(0.05, weight_decay=0.1)
    ),
    "named_chain": lambda build: build(
        ("clip", optax.clip_by_global_norm(0.1)), ("adamw", optax.adamw(0.05))
    ),
    "noisy_sgd": lambda build: build(0.05, key=jax.random.key(0)),
    "keep_params_nonnegative": lambda build: optax.chain(optax.sgd(0.5), build()),
    "stateless_with_tree_map": lambda build: build(lambda u, p: -0.1 * u),
}

EXTRA_ARGS = {
    "lbfgs": ("value", "grad", "value_fn"),
    "scale_by_backtracking_linesearch": ("value", "grad", "value_fn"),
    "scale_by_zoom_linesearch": ("value", "grad", "value_fn"),
    "polyak_sgd": ("value",),
    "scale_by_polyak": ("value",),
    "contrib.momo": ("value",),
    "contrib.momo_adam": ("value",),
    "contrib.reduce_on_plateau": ("value",),
    "contrib.sophia": ("obj_fn",),
    "contrib.hutchinson_estimator_diag_hessian": ("obj_fn",),
}


def _public_functions() -> Iterator[tuple[str, Callable[..., Any]]]:
    for module, prefix in (
        (optax, ""),
        (optax.contrib, "contrib."),
        (optax.transforms, "transforms."),
    ):
        for name in sorted(vars(module)):
            value = getattr(module, name)
            if name.startswith("_") or not callable(value) or inspect.isclass(value):
                continue
            if prefix == "transforms." and hasattr(optax, name):
                continue
            if getattr(value, "__module__", "") == "typing":
                continue
            yield prefix + name, value


def _returns_transformation(function: Callable[..., Any]) -> bool:
    try:
        annotation = inspect.signature(function).return_annotation
    except (TypeError, ValueError):
        return False
    return inspect.isclass(annotation) and issubclass(annotation, optax.GradientTransformation)


def _build(name: str, function: Callable[..., Any]) -> optax.GradientTransformation:
    short = name.rsplit(".", 1)[-1]
    if short in SPECIAL:
        return SPECIAL[short](function)
    kinds = inspect.Parameter
    needed = [
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if parameter.default is kinds.empty
        and parameter.kind not in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)
    ]
    if short == "scale_by_learning_rate":
        needed = ["learning_rate"]
    if short == "lookahead":
        needed = ["fast_optimizer", "sync_period", "slow_step_size"]
    with warnings.catch_warnings():  # a deprecated optimizer is one all the same
        warnings.simplefilter("ignore", DeprecationWarning)
        return function(**{argument: ARGUMENTS[argument]() for argument in needed})


@functools.cache
def catalogue() -> tuple[dict[str, Callable[[], optax.GradientTransformation]], dict[str, str]]:
    """The optimizers, by name, and what could not be built, with the error."""
    optimizers, failed = {}, {}
    for name, function in _public_functions():
        if name in LEFT_OUT:
            continue
        try:
            if not isinstance(_build(name, function), optax.GradientTransformation):
                continue
        except Exception as error:
            if _returns_transformation(function):
                failed[name] = repr(error)
            continue
        optimizers[name] = functools.partial(_build, name, function)
    return optimizers, failed


NAMES = sorted(catalogue()[0])


def make(name: str) -> optax.GradientTransformationExtraArgs:
    """A fresh optimizer."""
    return optax.with_extra_args_support(catalogue()[0][name]())


def extra_args(name: str, loss: Callable[[Any], Any], params: Any, gradient: Any) -> dict[str, Any]:
    """The extra arguments that optimizer `name` needs, for the loss at `params`."""
    available = {"grad": gradient, "value_fn": loss, "obj_fn": loss}
    return {
        each: loss(params) if each == "value" else available[each]
        for each in EXTRA_ARGS.get(name, ())
    }
