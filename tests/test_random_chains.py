"""Random chains of optimizers: what is proved of them holds in runs on hostile gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import host_bits
from hostile import hostile
from proving import verdict

import frozen_optax as fo
from frozen_optax._proofs import _traced_update, _update

MASK = {"base": True, "count": True, "head": False}


def make_params():
    # The count is the first integer that float32 does not hold.
    return {
        "base": jnp.array([1.5, -2.0, 0.25]),
        "count": jnp.array([2**24 + 1, 3], jnp.int32),
        "head": jnp.array([0.5, -1.0]),
    }


def make_gradients(seed):
    """Hostile ones, or ordinary ones, in which a steering is not lost among NaNs."""
    random = np.random.default_rng(seed)

    def some(*shape):
        if seed % 2:
            return jnp.asarray(hostile(shape, "float32", random))
        return jnp.asarray(random.normal(size=shape).astype("float32"))

    return {"base": some(3), "count": jnp.zeros(2, jnp.int32), "head": some(2)}


def norm_of(gradients):
    return jnp.sqrt(sum(jnp.sum(gradients[name] ** 2) for name in ("base", "head")))


def by_the_norm_of_aux():
    """A link that reads gradients within an extra argument."""

    def update(updates, state, params=None, *, aux, **_):
        norm = norm_of(aux["all"][0])
        return jax.tree.map(lambda u: u * norm.astype(u.dtype), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def by_the_last_norm():
    """A link that scales by what an earlier step has left in its state."""

    def update(updates, state, params=None):
        scaled = jax.tree.map(lambda u: u * state.astype(u.dtype), updates)
        return scaled, norm_of(updates)

    return optax.GradientTransformation(lambda params: jnp.ones(()), update)


LINKS = {
    "fo.freeze": lambda: fo.freeze(["base", "count"]),
    "optax.freeze": lambda: optax.freeze(MASK),
    "set_to_zero": lambda: optax.masked(optax.set_to_zero(), MASK),
    "sgd": lambda: optax.sgd(0.1),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "adam": lambda: optax.scale_by_adam(),
    "decay": lambda: optax.add_decayed_weights(0.1),
    "clip": lambda: optax.clip(0.5),
    "clip by norm": lambda: optax.clip_by_global_norm(0.5),
    "zero nans": lambda: optax.zero_nans(),
    "sign": lambda: optax.scale_by_sign(),
    "negative": lambda: optax.scale(-1.0),
    "schedule": lambda: optax.scale_by_schedule(lambda count: 0.1 / (count + 1)),
    "ema": lambda: optax.ema(0.9),
    "nonnegative": lambda: optax.keep_params_nonnegative(),
    "aux": by_the_norm_of_aux,
    "last norm": by_the_last_norm,
    "with_frozen": lambda: fo.with_frozen(optax.adamw(0.1), ["base", "count"]),
    "apply if finite": lambda: optax.apply_if_finite(optax.sgd(0.1), 2),
}


def make_chain(seed):
    random = np.random.default_rng(seed)
    names = [str(name) for name in random.choice(list(LINKS), int(random.integers(1, 5)))]
    if random.random() < 0.6:  # at the end, where it counts
        names.append(str(random.choice(["fo.freeze", "optax.freeze", "set_to_zero"])))
    return names, optax.chain(*[LINKS[name]() for name in names])


def rollout(tx, params, seeds, change=lambda gradients: gradients):
    """The parameters and the updates of trained leaves, step by step."""
    state = tx.init(params)
    for seed in seeds:
        gradients = change(make_gradients(seed))
        aux = {"all": [gradients]}
        updates, state = tx.update(gradients, state, params, aux=aux)
        params = optax.apply_updates(params, updates)
        yield params, updates["head"]


def with_other_frozen_gradients(gradients):
    return gradients | {"base": gradients["base"][::-1] * 3 + 1}


def is_proved(tx, params, **kwargs):
    try:
        message = verdict(
            fo.assert_update_freezes,
            tx,
            params,
            ["base", "count"],
            aux={"all": [make_gradients(0)]},
            **kwargs,
        )
    except TypeError:  # a link that the parameters do not fit
        return False
    return not message


def check(seed):
    """One chain; whether its frozen leaves are proved to stay, and the others not to be steered."""
    names, tx = make_chain(seed)
    tx = optax.with_extra_args_support(tx)
    params, seeds = make_params(), range(100 * seed, 100 * seed + 3)
    stays = is_proved(tx, params, non_interference=False)
    is_apart = stays and is_proved(tx, params)
    if stays:
        for after, _ in rollout(tx, params, seeds):
            for leaf in ("base", "count"):
                same = np.array_equal(np.asarray(after[leaf]), np.asarray(params[leaf]))
                assert same, f"seed {seed}, {names}: {leaf} became {after[leaf]}"
    if is_apart:
        one = rollout(tx, params, seeds)
        other = rollout(tx, params, seeds, with_other_frozen_gradients)
        for (_, left), (_, right) in zip(one, other, strict=True):
            same = np.array_equal(host_bits(left), host_bits(right))
            assert same, f"seed {seed}, {names}: {left} became {right}"
    return stays, is_apart


def test_what_is_proved_of_random_chains_holds():
    answers = [check(seed) for seed in range(16)]
    assert any(stays for stays, _ in answers)
    assert not all(stays for stays, _ in answers)
    assert any(is_apart for _, is_apart in answers)
    assert any(stays and not is_apart for stays, is_apart in answers)


@pytest.mark.exhaustive
@pytest.mark.parametrize("first", range(16, 166, 30))
def test_what_is_proved_of_more_random_chains_holds(first):
    for seed in range(first, first + 30):
        check(seed)


def only_at_the_top(extra, extra_args, resolution):
    """As it was once: gradients within an argument were no gradients."""
    selected = []
    for value in extra_args.values():
        is_like = jax.tree.structure(value) == resolution.treedef
        leaves = len(jax.tree.leaves(value))
        selected += resolution.selected if is_like else [False] * leaves
    return extra.inputs_where(selected)


FAULTS = {
    "a float zero rounds no integer": (_update, "_rounds", lambda own, dtype, weak: False),
    "gradients within an argument are none": (
        _traced_update,
        "_frozen_gradients_in",
        only_at_the_top,
    ),
    "what the state carries is not followed": (
        _update,
        "_reached_by_frozen_gradients",
        lambda update, updates: update.frozen_gradients,
    ),
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("fault", FAULTS)
def test_chains_show_a_fault_that_is_put_back(fault, monkeypatch):
    monkeypatch.setattr(*FAULTS[fault])
    with pytest.raises(AssertionError, match="became"):
        check_all(range(150))


def check_all(seeds):
    for seed in seeds:
        check(seed)
