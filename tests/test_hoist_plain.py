"""Programs as people write them to fine-tune: `hoist` takes all that lies before the head."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hoisting import SIZE, assert_exact
from jax import lax

TOKENS, WIDTH, WORDS = 4, 4, 7
SHARD = jax.sharding.SingleDeviceSharding


def random(*shape: int, seed: int = 0) -> Any:
    return jax.random.normal(jax.random.key(seed), shape)


PARAMS = {
    "base": {
        "words": random(WORDS, WIDTH),
        "w": random(WIDTH, WIDTH, seed=1),
        "first": random(1, 1, WIDTH, seed=2),
    },
    "head": random(WIDTH, seed=3),
}
IDS = jnp.arange(SIZE * TOKENS).reshape(SIZE, TOKENS) * 5 % WORDS
LENGTHS = jnp.array([3, 4, 1, 2, 4, 3])


def embedded(base: Any, ids: Any) -> Any:
    return jnp.tanh(base["words"][ids] @ base["w"])


def shifted(base: Any, ids: Any, lengths: Any) -> Any:
    ids = jnp.zeros_like(ids).at[:, 1:].set(ids[:, :-1]).at[:, 0].set(2)
    return embedded(base, ids).mean(1)


def changed_in_place(base: Any, ids: Any, lengths: Any) -> Any:
    x = embedded(base, ids)
    x = x.at[:, 0].multiply(0.5).at[:, -1].add(base["w"][0]).at[..., 1].set(0.0)
    x = x.at[:, 1:3, 2].min(0.1).at[:, jnp.array([0, 2])].max(-0.5).at[:, 1].subtract(0.3)
    return x.mean(1)


def bag_of_words(base: Any, ids: Any, lengths: Any) -> Any:
    counts = jax.vmap(lambda ids: jnp.zeros(WORDS).at[ids].add(1.0))(ids)
    return jnp.tanh(counts @ base["words"])


def sums_of_segments(base: Any, ids: Any, lengths: Any) -> Any:
    of = lambda x, ids: jax.ops.segment_sum(x, ids % 3, 3)
    return jax.vmap(of)(embedded(base, ids), ids).max(1)


def written_where_each_says(base: Any, ids: Any, lengths: Any) -> Any:
    of = lambda x, length: x.at[length - 1].set(base["w"][0])
    return jax.vmap(of)(embedded(base, ids), lengths).mean(1)


def last_tokens(base: Any, ids: Any, lengths: Any) -> Any:
    x = embedded(base, ids)
    return x[jnp.arange(len(ids)), lengths - 1] + x[jnp.arange(len(ids)), -1]


def last_two_tokens(base: Any, ids: Any, lengths: Any) -> Any:
    places = jnp.stack([lengths - 1, lengths - 2], 1)
    x = embedded(base, ids)
    each = jnp.arange(len(ids))[:, None]
    return x[each, places].sum(1) + x[each, :, places].mean((1, 2))[:, None]


def scores_of_tokens(base: Any, ids: Any, lengths: Any) -> Any:
    scores = jax.nn.log_softmax(embedded(base, ids) @ base["words"].T)
    each, token = jnp.arange(len(ids))[:, None], jnp.arange(TOKENS)[None]
    return scores[each, token, ids]


def tiled(base: Any, ids: Any, lengths: Any) -> Any:
    x = embedded(base, ids)
    return (jnp.concatenate([jnp.tile(base["first"], (len(x), 1, 1)), x], 1) @ base["w"]).max(1)


def slopes(base: Any, ids: Any, lengths: Any) -> Any:
    energy = lambda x: jnp.sum(jnp.tanh(x @ base["w"]))
    return jax.vmap(jax.grad(energy))(embedded(base, ids).mean(1))


def placed(base: Any, ids: Any, lengths: Any) -> Any:
    device = SHARD(jax.devices()[0])
    return lax.with_sharding_constraint(embedded(base, ids), device).mean(1)


def in_frames(base: Any, ids: Any, lengths: Any) -> Any:
    x = embedded(base, ids)
    frame = lambda start: lax.dynamic_slice(x, (0, start, 0), (len(x), 2, WIDTH))
    return jax.vmap(frame)(jnp.arange(3)).max((0, 2))


FEATURES: list[Callable[..., Any]] = [
    *[shifted, changed_in_place, bag_of_words, sums_of_segments, written_where_each_says],
    *[last_tokens, last_two_tokens, scores_of_tokens, tiled, slopes, placed, in_frames],
]
OFTEN = {shifted, last_two_tokens, tiled}


@pytest.mark.parametrize(
    "features",
    [pytest.param(f, marks=[] if f in OFTEN else [pytest.mark.exhaustive]) for f in FEATURES],
)
def test_all_before_the_head_is_hoisted(features: Callable[..., Any]) -> None:
    def loss(params: Any, ids: Any, lengths: Any) -> Any:
        return jnp.sum(jnp.tanh(features(params["base"], ids, lengths) @ params["head"]))

    report = assert_exact(loss, "base", PARAMS, (IDS, LENGTHS), tolerance=1e-4)
    assert report.stops == ("dot_general [6]: head",), str(report)
    assert report.bytes_per_example == WIDTH * 4


ELSEWHERE: dict[str, Callable[[Any], Any]] = {
    "the next one": lambda each: each ^ 1,
    "from the end": lambda each: each[::-1],
    "the one before": lambda each: each - 1,
    "turned": lambda each: jnp.where(each < 2, each, each[::-1]),
    "few": lambda each: each // 2,
    "as bytes": lambda each: (each + 255).astype(jnp.uint8).astype(jnp.int32),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name == "the next one" else [pytest.mark.exhaustive])
        for name in ELSEWHERE
    ],
)
def test_who_looks_into_another_example_stays_in_the_step(name: str) -> None:
    def loss(params: Any, ids: Any, lengths: Any) -> Any:
        x = embedded(params["base"], ids)
        found = x[ELSEWHERE[name](jnp.arange(len(x))), lengths - 1]
        return jnp.sum(jnp.tanh(found @ params["head"]))

    report = assert_exact(loss, "base", PARAMS, (IDS, LENGTHS), tolerance=1e-4)
    assert any(stop.startswith("gather") for stop in report.stops), str(report)
