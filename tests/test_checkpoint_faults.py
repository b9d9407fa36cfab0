"""`save_trained` and `load_trained` where a file, a tree or a backbone is not what it should be."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trying
from flax import nnx
from helpers import host_bits, same_objects

import frozen_optax as fo

ROOT = Path(__file__).parents[1]
PARAMS = {
    "encoder": {"w": jnp.arange(6.0).reshape(2, 3), "n": jnp.arange(3)},
    "head": {"w": jnp.arange(3.0), "q": jnp.arange(4, dtype="int4"), "k": jax.random.key(5)},
}
FRESH = PARAMS | {
    "head": {"w": jnp.ones(3), "q": jnp.ones(4, "int4"), "k": jax.random.key(0)},
}


def head_is(loaded: Any, expected: Any = PARAMS) -> bool:
    pairs = zip(*(jax.tree.leaves(tree["head"]) for tree in (loaded, expected)), strict=True)
    return all((host_bits(left) == host_bits(right)).all() for left, right in pairs)


def attempted(path: Path, params: Any) -> tuple[Any, str]:
    """What is loaded, or what is said instead; which names the path."""
    try:
        return fo.load_trained(path, params), ""
    except (ValueError, FileNotFoundError) as caught:
        error = str(caught)
    assert str(path) in error
    return None, error


def refused(path: Any, params: Any = FRESH, error: Any = ValueError, **more: Any) -> str:
    """What loading raises; it names the path, and the tree is as it was."""
    before = jax.tree.leaves(params)
    with pytest.raises(error) as caught:
        fo.load_trained(path, params, **more)
    assert str(path) in str(caught.value)
    assert all(x is y for x, y in zip(before, jax.tree.leaves(params), strict=True))
    return str(caught.value)


@pytest.fixture
def saved(tmp_path: Any) -> Path:
    fo.save_trained(tmp_path / "saved", PARAMS, "encoder")
    return tmp_path / "saved"


def files(path: Path) -> list[Path]:
    return sorted(each for each in path.rglob("*") if each.is_file())


def damages(content: bytes, rng: Any, flips: int) -> Any:
    yield b""
    yield content[: len(content) // 2]
    yield content[:-1]
    yield content + b"\0"
    yield bytes(len(content))
    for _ in range(flips):
        at, bit = rng.integers(0, max(len(content), 1)), rng.integers(0, 8)
        flipped = bytearray(content)
        if flipped:
            flipped[at] ^= 1 << bit
        yield bytes(flipped)


def load_damaged(saved: Path, flips: int) -> tuple[int, int]:
    """How often loading was refused, and how often what was damaged was not needed."""
    rng, told, unharmed = np.random.default_rng(0), 0, 0
    for each in files(saved):
        content = each.read_bytes()
        for damaged in (None, *damages(content, rng, flips)):
            if damaged is None:
                each.unlink()
            else:
                each.write_bytes(damaged)
            loaded, error = attempted(saved, FRESH)
            if error:
                assert "damaged" in error or "no complete checkpoint" in error
                told += 1
            else:
                assert head_is(loaded), (each, damaged)
                unharmed += 1
        each.write_bytes(content)
    assert head_is(fo.load_trained(saved, FRESH))
    return told, unharmed


# What Orbax still reads when another part has failed prints that nobody waits for it any more.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_file_is_told_or_does_no_harm(saved: Path) -> None:
    told, _ = load_damaged(saved, flips=2)
    assert told > 20


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_thousands_of_damages_are_told_or_do_no_harm(saved: Path) -> None:
    told, _ = load_damaged(saved, flips=400)
    assert told > 400


def test_a_manifest_that_was_edited_is_told(saved: Path) -> None:
    (manifest,) = saved.glob("*/manifest/metadata")
    text = manifest.read_text()
    manifest.write_text(text.replace("head/w", "head/v"))
    assert "its manifest is not the one that was written" in refused(saved)
    manifest.write_text(text.replace("leaves, 1", "leaves, 9"))
    assert "its format is 'frozen_optax: trained leaves, 9', and this version" in refused(saved)
    manifest.write_text("[]")
    assert "damaged" in refused(saved)


def test_leaves_of_another_checkpoint_are_told(saved: Path, tmp_path: Any) -> None:
    fo.save_trained(tmp_path / "other", FRESH, "encoder")
    for mine, others in zip(saved.glob("*"), (tmp_path / "other").glob("*"), strict=True):
        shutil.rmtree(mine / "leaves")
        shutil.copytree(others / "leaves", mine / "leaves")
    assert re.search(r"'head/\w' was saved as \S+ \w+ and reads as \S+ \w+\.", refused(saved))


def test_a_copy_that_broke_off_is_told(saved: Path, tmp_path: Any) -> None:
    shutil.copytree(saved, tmp_path / "copy")
    assert head_is(fo.load_trained(tmp_path / "copy", FRESH))
    for part in ("leaves", "manifest"):
        (removed,) = (tmp_path / "copy").glob(f"*/{part}")
        shutil.rmtree(removed)
        assert "damaged" in refused(tmp_path / "copy")


def test_what_is_no_checkpoint_is_neither_loaded_nor_replaced(tmp_path: Any) -> None:
    assert "Give the path that was given" in refused(tmp_path / "none", error=FileNotFoundError)
    assert not (tmp_path / "none").exists()
    (tmp_path / "empty").mkdir()
    assert "no complete checkpoint" in refused(tmp_path / "empty")
    (tmp_path / "file").write_text("weights")
    (tmp_path / "steps" / "100").mkdir(parents=True)
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax", {"head": jnp.ones(2)})
    for name, found in {"file": "is a file", "steps": "'100' in it", "orbax": "_METADATA"}.items():
        assert found in refused(tmp_path / name)
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(ValueError, match="Give another path"):
            fo.save_trained(tmp_path / name, PARAMS, "encoder", overwrite=True)
        assert sorted(tmp_path.rglob("*")) == before


def test_a_save_that_was_not_finished_is_passed_over(saved: Path, tmp_path: Any) -> None:
    (done,) = saved.iterdir()
    unfinished = "trained_leaves_1.orbax-checkpoint-tmp"
    shutil.copytree(done, saved / unfinished)
    shutil.rmtree(saved / unfinished / "leaves")
    assert head_is(fo.load_trained(saved, FRESH))
    shutil.move(done, tmp_path / "away")
    assert "killed before its end. Save again." in refused(saved)
    fo.save_trained(saved, FRESH, "encoder")  # nothing is there to overwrite
    assert [each.name for each in saved.iterdir()] == ["trained_leaves_0"]
    assert head_is(fo.load_trained(saved, PARAMS), FRESH)


def test_a_save_that_fails_leaves_the_one_before(saved: Path, monkeypatch: Any) -> None:
    def fail(*_: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", fail)
        with pytest.raises(OSError, match="no space left"):
            fo.save_trained(saved, FRESH, "encoder", overwrite=True)
    assert head_is(fo.load_trained(saved, FRESH))
    fo.save_trained(saved, FRESH, "encoder", overwrite=True)
    assert head_is(fo.load_trained(saved, PARAMS), FRESH)


def test_another_backbone_is_told_leaf_by_leaf(saved: Path) -> None:
    signed = PARAMS["encoder"]["w"].at[0, 0].set(-0.0)
    found = refused(saved, FRESH | {"encoder": PARAMS["encoder"] | {"w": signed}})
    assert "1 of 2 frozen leaves have other bits:\n  encoder/w: float32[2,3] " in found
    assert re.search(r"float32\[2,3\] (\w+) here, float32\[2,3\] (?!\1)\w+ there\n", found)
    assert "Load the backbone first" in found


def test_another_tree_is_told_leaf_by_leaf(saved: Path) -> None:
    without = FRESH | {"head": {"weight": jnp.ones(3), **FRESH["head"]}}
    del without["head"]["w"]
    found = refused(saved, without)
    assert "head/w: float32[3] (trained) in the checkpoint, not in params" in found
    assert "the nearest that it has are 'head/weight'" in found
    assert "head/weight: float32[3] in params, not in the checkpoint" in found
    assert "where= names them" in found
    shape = refused(saved, FRESH | {"head": FRESH["head"] | {"w": jnp.ones((3, 1))}})
    assert "head/w: float32[3] (trained) in the checkpoint, float32[3,1] in params" in shape
    dtype = refused(saved, FRESH | {"encoder": PARAMS["encoder"] | {"n": jnp.arange(3.0)}})
    assert "encoder/n: int32[3] (frozen) in the checkpoint, float32[3] in params" in dtype
    keys = FRESH | {"head": FRESH["head"] | {"k": jax.random.key(0, impl="rbg")}}
    assert "head/k: key<fry>[] (trained) in the checkpoint, key<rbg>[]" in refused(saved, keys)
    refused(saved, {"encoder": PARAMS["encoder"]})
    refused(saved, {})


def test_where_leaves_out_what_has_been_added(saved: Path) -> None:
    grown = FRESH | {"adapter": jnp.ones(2)}
    assert "adapter: float32[2] in params, not in the checkpoint" in refused(saved, grown)
    where = lambda params: {name: params[name] for name in PARAMS}
    loaded = fo.load_trained(saved, grown, where=where)
    assert head_is(loaded)
    assert same_objects(
        (grown["encoder"], grown["adapter"]), (loaded["encoder"], loaded["adapter"])
    )


def test_a_backbone_without_values_is_told(saved: Path) -> None:
    structs = jax.eval_shape(lambda: PARAMS["encoder"])
    with pytest.raises(TypeError, match=r"'encoder/n' has no values.*load the backbone first"):
        fo.load_trained(saved, FRESH | {"encoder": structs})
    gone = jnp.arange(3)
    gone.delete()
    with pytest.raises(ValueError, match="'encoder/n' was donated"):
        fo.load_trained(saved, FRESH | {"encoder": PARAMS["encoder"] | {"n": gone}})


def test_64_bits_without_x64_are_told(tmp_path: Any) -> None:
    with trying.precision(x64=True):
        params = {"encoder": jnp.ones(2, "float32"), "head": jnp.arange(2.0)}
        fo.save_trained(tmp_path / "saved", params, "encoder")
    found = refused(tmp_path / "saved", params)
    assert "'head'" in found
    assert "Set jax_enable_x64, or pass an array of numpy" in found
    loaded = fo.load_trained(tmp_path / "saved", params | {"head": np.zeros(2)})
    assert loaded["head"].tolist() == [0.0, 1.0]


def test_what_cannot_be_saved_is_told_and_nothing_written(tmp_path: Any) -> None:
    path = tmp_path / "saved"
    save = lambda params, *args, **more: fo.save_trained(path, params, *args, **more)
    with pytest.raises(TypeError, match="say what is frozen, or trainable="):
        save(PARAMS)
    with pytest.raises(ValueError, match=r"by_path\('encodr'\) selects nothing"):
        save(PARAMS, "encodr")
    with pytest.raises(ValueError, match="freezes all 1 leaves"):
        save({"encoder": jnp.ones(1), "head": jnp.sum}, "encoder")
    with pytest.raises(TypeError, match="'encoder/n' are not known while tracing"):
        jax.jit(lambda params: save(params, "encoder"))(PARAMS)
    with pytest.raises(TypeError, match="'encoder/n' has no values"):
        save(jax.eval_shape(lambda: PARAMS), "encoder")
    with pytest.raises(ValueError, match="freezes all 1 leaves"):
        save({"encoder": jnp.ones(1), "head": np.array([None])}, "encoder")
    shared = {"a": {"b": jnp.ones(1)}, "a/b": jnp.zeros(1)}
    with pytest.raises(ValueError, match="share the path 'a/b'"):
        save(shared, {"a": True, "a/b": False})
    tied = nnx.Param(jnp.ones(1))
    with pytest.raises(ValueError, match=r"stands at two places, 'a' and 'b'"):
        save({"a": tied, "b": tied, "c": jnp.ones(1)}, "c")
    gone = jnp.ones(1)
    gone.delete()
    with pytest.raises(ValueError, match="'head' was donated"):
        save({"encoder": jnp.ones(1), "head": gone}, "encoder")
    assert not path.exists()


# What a killed process does: it replaces one checkpoint again and again and writes another anew,
# and says before each turn which it is. With a number it kills itself, in the third turn, as it is
# about to do that which has this number among all that it does to directories.
KILLED = """
import itertools, sys
import jax, jax.numpy as jnp, frozen_optax as fo
from benchmarks.killed import die_at
root, moment = sys.argv[1], int(sys.argv[2])
for turn in itertools.count():
    params = {"encoder": jnp.arange(3.0), "head": {str(i): jnp.full(99, turn) for i in range(5)}}
    print(turn, flush=True)
    if turn == 2 and moment:
        die_at(moment)
    fo.save_trained(f"{root}/replaced", params, "encoder", overwrite=True)
    fo.save_trained(f"{root}/new{turn}", params, "encoder")
"""


def turn_of(path: Path) -> int | str:
    """Which turn has saved a checkpoint, all of it, or what is said instead."""
    head = {str(i): np.zeros(99, np.int32) for i in range(5)}
    loaded, error = attempted(path, {"encoder": jnp.arange(3.0), "head": head})
    if error:
        return error
    (turn,) = {value for leaf in loaded["head"].values() for value in leaf.tolist()}
    return turn


def kill_a_save(root: Path, *, after: float = 0.0, moment: int = 0) -> None:
    command = [sys.executable, "-c", KILLED, str(root), str(moment)]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout
        first = process.stdout.readline()
        if not moment:
            time.sleep(after)
            process.kill()
        last = int(([first, *process.stdout])[-1])
    assert process.returncode == -9
    begun = ("there is no complete checkpoint", "there is no checkpoint")  # and not finished
    found = turn_of(root / "replaced")
    assert found in (last, last - 1) or (not last and str(found).startswith(begun)), found
    found = turn_of(root / f"new{last}")
    assert found == last or str(found).startswith(begun), found
    for turn in range(last):
        assert turn_of(root / f"new{turn}") == turn
    # And what was left is no hindrance.
    params = {"encoder": jnp.arange(3.0), "head": {str(i): jnp.full(99, -1) for i in range(5)}}
    fo.save_trained(root / "replaced", params, "encoder", overwrite=True)
    assert turn_of(root / "replaced") == -1
    assert len(list((root / "replaced").iterdir())) == 1


@pytest.mark.parametrize("seed", range(2))
def test_a_killed_save_leaves_the_old_or_the_new(seed: int, tmp_path: Any) -> None:
    kill_a_save(tmp_path, after=np.random.default_rng(seed).uniform(0, 0.6))


def test_a_save_killed_at_its_end_leaves_the_new(tmp_path: Any) -> None:
    kill_a_save(tmp_path, moment=17)


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(50))
def test_fifty_killed_saves_leave_the_old_or_the_new(seed: int, tmp_path: Any) -> None:
    kill_a_save(tmp_path, after=np.random.default_rng(seed).uniform(0, 1.0))


@pytest.mark.exhaustive
@pytest.mark.parametrize("moment", range(1, 41))
def test_a_save_may_be_killed_at_each_moment(moment: int, tmp_path: Any) -> None:
    kill_a_save(tmp_path, moment=moment)
