"""Caches of rows: what comes back, what goes on where it stopped, and what a cache belongs to."""

import os
import platform
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from caching import EXAMPLES, PARAMS, SIZE, X, Y, batches, in_small_blocks, loss
from helpers import host_bits

import frozen_optax as fo
from frozen_optax._hoist import _preparation

HOISTED = fo.hoist(loss, "encoder")


@pytest.fixture(autouse=True)
def _blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    in_small_blocks(monkeypatch.setattr)


def same(one: Any, other: Any) -> bool:
    pairs = zip((*one.each, *one.shared), (*other.each, *other.shared), strict=True)
    return all(x.dtype == y.dtype and np.array_equal(host_bits(x), host_bits(y)) for x, y in pairs)


def computed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The batches that rows are computed of from now on."""
    found: list[Any] = []
    rows = _preparation.Preparation.rows

    def spied(self: Any, batch: Any) -> Any:
        found.append(batch)
        return rows(self, batch)

    monkeypatch.setattr(_preparation.Preparation, "rows", spied)
    return found


# --- what comes back


def test_rows_are_those_of_prepare_in_memory_and_on_disk(tmp_path: Path):
    expected = jax.device_get(jax.jit(HOISTED.prepare)(PARAMS, X, Y))
    for path in (None, tmp_path / "cache"):
        cache = HOISTED.cache(PARAMS, batches(), path)
        assert len(cache) == EXAMPLES
        for indices in (slice(None), slice(3, 20, 5), [60, 0, 0, 31], np.array([-1, -61]), []):
            wanted = expected[np.array(indices, int) if isinstance(indices, list) else indices]
            found = cache[indices]
            assert found.kept == expected.kept
            for one, other in zip(found.each, wanted.each, strict=True):
                assert one.dtype == other.dtype
                np.testing.assert_allclose(one, other, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn", "int4", "bool", "int16"])
def test_every_dtype_comes_back_to_the_bit(dtype: str, tmp_path: Path):
    def function(params: Any, x: Any) -> Any:
        features = (4 * jnp.sin(x @ params["encoder"]["w"])).astype(dtype)
        return jnp.mean(features.astype(jnp.float32) @ params["head"])

    hoisted = fo.hoist(function, "encoder")
    cache = hoisted.cache(PARAMS, [(x,) for x, _ in batches()], tmp_path)
    rows = hoisted.cache(PARAMS, [(x,) for x, _ in batches()])[:]
    assert str(rows.each[0].dtype) == dtype
    assert same(cache[:], rows)
    assert np.count_nonzero(host_bits(rows.each[0]))


def test_a_complete_cache_is_found_and_not_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    built = HOISTED.cache(PARAMS, batches(), tmp_path)[:]
    done = computed(monkeypatch)
    found = HOISTED.cache(PARAMS, iter(batches()), tmp_path)
    other_sizes = HOISTED.cache(PARAMS, batches(size=13), tmp_path)
    assert not done
    assert same(found[:], built)
    assert same(other_sizes[:], built)


def test_a_ragged_batch_needs_no_program_of_its_own():
    traced: list[Any] = []

    def counted(*args: Any) -> Any:
        traced.append(args[1].shape)
        return loss(*args)

    for count in (SIZE * 2, SIZE * 2 + 1):
        cache = fo.hoist(counted, "encoder").cache(PARAMS, batches(X[:count], Y[:count]))
        assert len(cache) == count
    half = len(traced) // 2
    assert traced[:half] == traced[half:]


def test_a_loader_may_use_one_array_for_all_batches():
    width = 2000  # so that a batch is being computed with while the next one is drawn
    wide = np.tile(X, (1, width // 4))

    def wide_loss(params: Any, x: Any) -> Any:
        features = x
        for _ in range(20):
            features = jnp.tanh(features @ params["encoder"])
        return jnp.mean(features @ params["head"])

    params = {"encoder": jnp.eye(width) / 2, "head": jnp.ones(width)}

    def reused() -> Iterator[Any]:
        room = np.empty(SIZE * width * 4 + 64, np.uint8)
        start = -room.ctypes.data % 64  # an array that begins so jax does not copy
        array = room[start : start + SIZE * width * 4].view(np.float32).reshape(SIZE, width)
        for i in range(0, 56, SIZE):
            array[:] = wide[i : i + SIZE]
            yield (array,)
            array[:] = -1

    hoisted = fo.hoist(wide_loss, "encoder")
    expected = hoisted.cache(params, [(wide[i : i + SIZE],) for i in range(0, 56, SIZE)])
    assert same(hoisted.cache(params, reused())[:], expected[:])


def test_of_an_unknown_number_of_batches(tmp_path: Path):
    rows = HOISTED.cache(PARAMS, batches())[:]
    assert same(HOISTED.cache(PARAMS, iter(batches()))[:], rows)
    assert same(HOISTED.cache(PARAMS, (b for b in batches()), tmp_path)[:], rows)


def test_what_all_examples_share_is_there(tmp_path: Path):
    def function(params: Any, x: Any, scale: Any) -> Any:
        table = jnp.exp(params["encoder"]["w"].T @ params["encoder"]["w"])
        return jnp.mean((x @ params["encoder"]["w"] @ table) @ (params["head"] * scale))

    hoisted = fo.hoist(function, "encoder")
    numbered = [(x, 0.5) for x, _ in batches()]
    for cache in (hoisted.cache(PARAMS, numbered), hoisted.cache(PARAMS, numbered, tmp_path)):
        value = hoisted(PARAMS, cache[[3, 1]])
        np.testing.assert_allclose(value, function(PARAMS, X[[3, 1]], 0.5), rtol=1e-5)
    message = r"  argument '1' of a batch: float32\[\] 0\.25, \w+, and the .* float32\[\] 0\.5, "
    with pytest.raises(ValueError, match=message):
        hoisted.cache(PARAMS, [(x, 0.25) for x, _ in batches()], tmp_path)
    numbered[2] = (X[:8], 0.25)
    with pytest.raises(ValueError, match=r"'1' of batch 2 is 0\.25, and that of the first.* 0\.5"):
        hoisted.cache(PARAMS, numbered)


def test_live_arguments_are_left_out(tmp_path: Path):
    def function(params: Any, x: Any, key: Any, y: Any) -> Any:
        kept = jax.random.bernoulli(key, 0.5, (len(x), 6))
        features = jnp.where(kept, jnp.tanh(x @ params["encoder"]["w"]), 0)
        return jnp.mean((features @ params["head"] - y) ** 2)

    hoisted = fo.hoist(function, "encoder", live_argnums=2)
    cache = hoisted.cache(PARAMS, batches(), tmp_path)
    for seed in range(2):
        key = jax.random.key(seed)
        value = hoisted(PARAMS, cache[10:18], key)
        np.testing.assert_allclose(value, function(PARAMS, X[10:18], key, Y[10:18]), rtol=1e-6)


def test_modules_and_abstract_trained_leaves(tmp_path: Path):
    keys = jax.random.split(jax.random.key(0))
    mlp, head = eqx.nn.MLP(4, 8, 8, 1, key=keys[0]), eqx.nn.Linear(8, 1, key=keys[1])
    model = {"encoder": mlp, "head": head}  # leaves that are functions among the frozen ones

    def function(model: Any, x: Any) -> Any:
        return jnp.mean(jax.vmap(lambda each: model["head"](model["encoder"](each)))(x) ** 2)

    hoisted = fo.hoist(function, "encoder")
    abstract = {**model, "head": jax.eval_shape(lambda: head)}
    data = [(x,) for x, _ in batches()]
    built = hoisted.cache(abstract, data, tmp_path)
    assert same(hoisted.cache(model, data, tmp_path)[:], built[:])
    value = hoisted(model, built[[3, 1]])
    np.testing.assert_allclose(value, function(model, X[[3, 1]]), rtol=1e-5)


# --- training


def losses(step: Callable[[Any, Any], Any], order: Iterator[Any]) -> list[Any]:
    tx = optax.adam(1e-2)
    head, state, found = PARAMS["head"], tx.init(PARAMS["head"]), []
    for indices in order:
        value, grads = step({**PARAMS, "head": head}, indices)
        updates, state = tx.update(grads["head"], state)
        head = optax.apply_updates(head, updates)
        found.append(np.asarray(value))
    return found


def shuffled(seed: int) -> Iterator[Any]:
    rng = np.random.default_rng(seed)
    for _ in range(2):
        yield from np.split(rng.permutation(EXAMPLES)[:32], 4)


def test_shuffled_epochs_equal_the_live_run_op_by_op(tmp_path: Path):
    with jax.disable_jit():
        cache = HOISTED.cache(PARAMS, batches(), tmp_path)
        live = fo.value_and_grad(loss, "encoder")
        hoisted = fo.value_and_grad(HOISTED, "encoder")
        expected = losses(lambda params, i: live(params, X[i], Y[i]), shuffled(0))
        found = losses(lambda params, i: hoisted(params, cache[i]), shuffled(0))
        other = losses(lambda params, i: hoisted(params, cache[i]), shuffled(1))
    assert [each.tobytes() for each in found] == [each.tobytes() for each in expected]
    assert [each.tobytes() for each in other] != [each.tobytes() for each in expected]


def test_shuffled_epochs_equal_the_live_run_compiled(tmp_path: Path):
    cache = HOISTED.cache(PARAMS, batches(), tmp_path)
    live = jax.jit(fo.value_and_grad(loss, "encoder"))
    hoisted = jax.jit(fo.value_and_grad(HOISTED, "encoder"))
    expected = losses(lambda params, i: live(params, X[i], Y[i]), shuffled(0))
    found = losses(lambda params, i: hoisted(params, cache[i]), shuffled(0))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


# --- going on


def until(batch: int, error: type[BaseException] = OSError) -> Iterator[Any]:
    yield from batches()[:batch]
    raise error("the data ended")


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_interrupted_build_goes_on(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(error, match="the data ended"):
        HOISTED.cache(PARAMS, until(4, error), tmp_path)
    done = computed(monkeypatch)
    cache = HOISTED.cache(PARAMS, batches(), tmp_path)
    # Of 4 batches the rows of the last one were not fetched yet: 24, which is 3 blocks of 7.
    assert len(done) == len(batches()) - 2
    assert same(cache[:], HOISTED.cache(PARAMS, batches())[:])


def test_an_interrupted_build_refuses_other_data(tmp_path: Path):
    with pytest.raises(OSError, match="the data ended"):
        HOISTED.cache(PARAMS, until(4), tmp_path)
    changed = X.copy()
    changed[9, 1] += 1e-6
    with pytest.raises(ValueError, match=r"other data.* block 1, examples 7 to 13, has the digest"):
        HOISTED.cache(PARAMS, batches(changed), tmp_path)
    with pytest.raises(ValueError, match=r"other data.* there are 16 examples, and it has 21 rows"):
        HOISTED.cache(PARAMS, batches()[:2], tmp_path)
    assert len(HOISTED.cache(PARAMS, batches(), tmp_path)) == EXAMPLES


def test_one_writer_at_a_time(tmp_path: Path):
    tried: list[str] = []

    def trying() -> Iterator[Any]:
        first, *others = batches()
        yield first  # drawn to see what it is of, before the directory is locked
        for batch in others:
            with pytest.raises(BlockingIOError, match="is being built") as raised:
                HOISTED.cache(PARAMS, batches(), tmp_path)
            tried.append(str(raised.value))
            yield batch

    cache = HOISTED.cache(PARAMS, trying(), tmp_path)
    assert len(tried) == len(batches()) - 1
    assert same(HOISTED.cache(PARAMS, batches(), tmp_path)[:], cache[:])


def test_without_locks_a_complete_cache_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = HOISTED.cache(PARAMS, batches(), tmp_path / "complete")[:]
    monkeypatch.setitem(sys.modules, "fcntl", None)
    assert same(HOISTED.cache(PARAMS, batches(), tmp_path / "complete")[:], rows)
    with pytest.raises(NotImplementedError, match="under a lock of fcntl"):
        HOISTED.cache(PARAMS, batches(), tmp_path / "new")


# --- what it belongs to


def changed_loss(params: Any, x: Any, y: Any) -> Any:
    features = jnp.sin(x @ params["encoder"]["w"])
    return jnp.mean((features @ params["head"] - y) ** 2)


def loss_with(constant: Any) -> Callable[..., Any]:
    return lambda params, x, y: loss(params, x + constant, y)


CONSTANT = np.arange(4, dtype=np.float32)
WEIGHT = PARAMS["encoder"]["w"]
LAST_BIT = np.asarray(WEIGHT).view(np.uint32) ^ (np.arange(24).reshape(4, 6) == 23)
CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "a weight by its last bit": (
        {"params": {**PARAMS, "encoder": {"w": jnp.asarray(LAST_BIT.view(np.float32))}}},
        r"1 of \d+ things differ:\n  the frozen leaf 'encoder/w': float32\[4,6\] \w+, and",
    ),
    "the dtype of a weight": (
        {"params": {**PARAMS, "encoder": {"w": WEIGHT.astype(jnp.bfloat16)}}},
        r"the frozen leaf 'encoder/w': bfloat16\[4,6\] \w+, and the cache was built with float32",
    ),
    "the code": ({"function": changed_loss}, r"1 of \d+ things differ:\n  the program: "),
    "a constant": (
        {"function": loss_with(CONSTANT)},
        r"  the program: .*\n    the function, a con",
    ),
    "what is frozen": (
        {"frozen": "**"},
        r"the frozen leaf 'head': .* the cache was built with none",
    ),
    "the dtype of the data": (
        {"x": X.astype(np.float16)},
        r"argument '0' of a batch: float16\[4\] an example, and the cache was .* float32\[4\]",
    ),
    "the dtype of the rows": ({"dtype": "bfloat16"}, r"array 0 .* float32\[6\] as bfloat16, and"),
    "one number of the data": (
        {"x": np.where(np.arange(EXAMPLES * 4).reshape(-1, 4) == 83, np.float32(0), X)},
        "of other data, or of the same in another order: block 2, examples 14 to 20, has the",
    ),
    "one label": (
        {"y": np.where(np.arange(EXAMPLES) == EXAMPLES - 1, np.float32(0), Y)},
        "of other data, .* block 8, examples 56 to 60, has the digest",
    ),
    "the order": ({"x": X[::-1], "y": Y[::-1]}, "in another order: block 0, examples 0 to 6"),
    "fewer examples": ({"x": X[:60], "y": Y[:60]}, "there are 60 examples, and it has 61 rows"),
    "more examples": (
        {"x": np.tile(X, (2, 1)), "y": np.tile(Y, 2)},
        "there are 64 examples or more, and it has 61 rows",
    ),
}


def recached(path: Path, changes: dict[str, Any]) -> Any:
    given = {"function": loss, "frozen": "encoder", "params": PARAMS, "x": X, "y": Y, **changes}
    hoisted = fo.hoist(given["function"], given["frozen"])
    data = batches(given["x"], given["y"])
    return hoisted.cache(given["params"], data, path, dtype=given.get("dtype"))


@pytest.mark.parametrize("name", CHANGES)
def test_a_cache_serves_nothing_else(name: str, tmp_path: Path):
    rows = recached(tmp_path, {})[:]
    changes, message = CHANGES[name]
    with pytest.raises(ValueError, match=message) as raised:
        recached(tmp_path, changes)
    assert "remove the directory to build" in str(raised.value)
    assert same(recached(tmp_path, {})[:], rows)  # nothing was written


def test_a_constant_changed_in_place_is_seen(tmp_path: Path):
    constant = CONSTANT.copy()
    hoisted = fo.hoist(loss_with(constant), "encoder")
    hoisted.cache(PARAMS, batches(), tmp_path)
    constant[2] += 1
    with pytest.raises(ValueError, match="the program"):
        hoisted.cache(PARAMS, batches(), tmp_path)


def test_code_that_the_rows_do_not_need_may_change(tmp_path: Path):
    rows = HOISTED.cache(PARAMS, batches(), tmp_path)[:]

    def other_end(params: Any, x: Any, y: Any) -> Any:
        features = jnp.tanh(x @ params["encoder"]["w"])
        return jnp.mean(jnp.abs(features @ params["head"] - y))

    cache = fo.hoist(other_end, "encoder").cache(PARAMS, batches(), tmp_path)
    assert same(cache[:], rows)


SETTINGS = {
    "jax_default_matmul_precision": "highest",
    "jax_enable_x64": True,
    "jax_threefry_partitionable": False,
    "jax_disable_jit": True,
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_change_numbers_are_told(name: str, tmp_path: Path):
    HOISTED.cache(PARAMS, batches(), tmp_path)
    before = getattr(jax.config, name)
    try:
        jax.config.update(name, SETTINGS[name])
        with pytest.raises(ValueError, match=f"  {name}: {SETTINGS[name]}, and .* with {before}"):
            HOISTED.cache(PARAMS, batches(), tmp_path)
    finally:
        jax.config.update(name, before)


def test_versions_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    HOISTED.cache(PARAMS, batches(), tmp_path)
    monkeypatch.setattr(jax, "__version__", "0.0.1")
    with pytest.raises(ValueError, match=r"1 of \d+ things differ:\n  jax: 0\.0\.1, and the cache"):
        HOISTED.cache(PARAMS, batches(), tmp_path)
    monkeypatch.setattr(metadata, "version", {"jaxlib": "0.0.2"}.__getitem__)
    with pytest.raises(
        ValueError, match=r"2 of \d+ things differ:\n  jax: .*\n  jaxlib: 0\.0\.2, "
    ):
        HOISTED.cache(PARAMS, batches(), tmp_path)


def test_the_machine_and_flags_of_xla_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    HOISTED.cache(PARAMS, batches(), tmp_path)
    flags = os.environ.get("XLA_FLAGS", "")
    monkeypatch.setenv("XLA_FLAGS", f"{flags} --xla_dump_to=here")
    HOISTED.cache(PARAMS, batches(), tmp_path)
    monkeypatch.setenv("XLA_FLAGS", f"{flags} --xla_cpu_enable_fast_math=true")
    monkeypatch.setattr(platform, "machine", lambda: "pdp11")
    with pytest.raises(ValueError, match=r"things differ") as raised:
        HOISTED.cache(PARAMS, batches(), tmp_path)
    # Another device says itself what it is.
    assert jax.default_backend() != "cpu" or "the device: cpu, pdp11, and the" in str(raised.value)
    assert "XLA_FLAGS: --xla_cpu_enable_fast_math=true, and" in str(raised.value)


def test_a_live_check_of_the_parameters():
    cache = HOISTED.cache(PARAMS, batches())
    cache.check({**PARAMS, "head": jnp.zeros(6)})
    with pytest.raises(ValueError, match=r"1 of 1 frozen leaves .*\n  encoder/w: float32\[4,6\] "):
        cache.check({**PARAMS, "encoder": {"w": WEIGHT + 1}})


def test_rows_of_another_function_are_refused_by_the_step():
    cache = HOISTED.cache(PARAMS, batches())
    with pytest.raises(ValueError, match="the rows do not hold what this function needs"):
        fo.hoist(changed_loss, "encoder")(PARAMS, cache[:8])


# --- narrower rows


@pytest.mark.parametrize("on_disk", [False, True])
def test_narrower_rows_say_what_they_lose(on_disk: bool, tmp_path: Path):
    path = tmp_path if on_disk else None
    exact = HOISTED.cache(PARAMS, batches())[:].each[0]
    cache = HOISTED.cache(PARAMS, batches(), path, dtype=jnp.bfloat16)
    rows = cache[:]
    assert rows.each[0].dtype == np.float32
    np.testing.assert_array_equal(rows.each[0], exact.astype(jnp.bfloat16).astype(np.float32))
    # A single number an example, a label, is kept as it is.
    np.testing.assert_array_equal(rows.each[1], Y)
    ((name, (absolute, relative)),) = cache.errors.items()
    assert name == "array 0, float32[6] as bfloat16"
    assert absolute == np.max(np.abs(rows.each[0] - exact)) > 0
    some = exact != 0
    assert relative == np.max(np.abs(rows.each[0] - exact)[some] / np.abs(exact)[some]) <= 2**-8
    assert f"off by at most {absolute:.3g}, {relative:.3g} of the number" in repr(cache)
    assert cache.bytes_per_example == 6 * 2 + 4
    if on_disk:  # and it says so when it is found
        assert HOISTED.cache(PARAMS, batches(), path, dtype=jnp.bfloat16).errors == cache.errors


def test_numbers_without_a_place_are_refused():
    def large(params: Any, x: Any, y: Any) -> Any:
        features = 1e5 * jnp.exp(x @ params["encoder"]["w"])
        return jnp.mean((features @ params["head"] - y) ** 2)

    hoisted = fo.hoist(large, "encoder")
    with pytest.raises(ValueError, match=r"row \d+ of float32\[6\] as float16 holds .* is inf as"):
        hoisted.cache(PARAMS, batches(), dtype=jnp.float16)
    with pytest.raises(TypeError, match=r"dtype is that of float rows.*Found 'int8'"):
        hoisted.cache(PARAMS, batches(), dtype="int8")


# --- what is given


def test_batches_are_alike_and_not_none():
    wrong: list[tuple[Any, type[Exception], str]] = [
        ([], ValueError, "there are no batches"),
        (
            [X],
            TypeError,
            r"found a leaf float32\[61, 4\] as batch 0\. Of a single argument, \(x,\)",
        ),
        ([batches()[0], [X[:8], Y[:8]]], TypeError, "as batch 1"),
        ([batches()[0], (X[:8],)], ValueError, "batch 1 has another structure than the first"),
        (
            [batches()[0], (X[:8, :3], Y[:8])],
            ValueError,
            r"argument '0' of batch 1 .*\[8, 3\], and",
        ),
        ([batches()[0], (X[:8], Y[:7])], ValueError, "of batch 1 have 7 and 8 examples"),
        ([batches()[0], (X[:0], Y[:0])], ValueError, "of batch 1 have 0 examples"),
        ([batches()[0], (X[:9], Y[:9])], ValueError, "of batch 1 have 9 examples, expected 1 to 8"),
    ]
    for given, error, message in wrong:
        with pytest.raises(error, match=message):
            HOISTED.cache(PARAMS, given)


def test_indices_are_integers_of_rows_that_exist(tmp_path: Path):
    for path in (None, tmp_path):
        cache = HOISTED.cache(PARAMS, batches(), path)
        for indices in ([EXAMPLES], [-EXAMPLES - 1]):
            with pytest.raises(IndexError):
                cache[indices]
        for wrong in (3, [0.5], [[1]], np.ones(EXAMPLES, bool)):
            with pytest.raises(TypeError, match="an array of integers or a slice"):
                cache[wrong]


def test_a_bar_is_shown_on_request(capfd: pytest.CaptureFixture[str]):
    HOISTED.cache(PARAMS, batches())
    assert capfd.readouterr() == ("", "")
    HOISTED.cache(PARAMS, batches(), progress=True)
    assert "8/8" in capfd.readouterr().err
