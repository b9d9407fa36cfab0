"""Caches of rows that are killed, cut off, and damaged bit by bit: no wrong row, and the reason."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import caching
import numpy as np
import pytest
from caching import BLOCK_ROWS, EXAMPLES, PARAMS, batches, in_small_blocks, loss

import frozen_optax as fo
from frozen_optax._hoist import _cache_files
from frozen_optax._hoist._cache_columns import Column

HOISTED = fo.hoist(loss, "encoder")
BLOCKS = -(-EXAMPLES // BLOCK_ROWS)
FILES = {"rows_0": 24, "rows_1": 4}  # and the bytes of a row in each


@pytest.fixture(autouse=True)
def _blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    in_small_blocks(monkeypatch.setattr)


def bits(cache: Any) -> list[bytes]:
    return [array.tobytes() for array in cache[:].each]


@pytest.fixture(name="expected", scope="module")
def _expected() -> list[bytes]:
    return bits(HOISTED.cache(PARAMS, batches()))


# --- damaged


def flip(path: Path, place: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("block", range(BLOCKS))
def test_a_flipped_bit_is_told_at_the_first_read(
    file: str, block: int, tmp_path: Path, expected: list[bytes]
):
    HOISTED.cache(PARAMS, batches(), tmp_path)
    rng = random.Random(f"{file} {block}")
    first, stop = block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, EXAMPLES)
    place, bit = rng.randrange(first * FILES[file], stop * FILES[file]), rng.randrange(8)
    flip(tmp_path / file, place, bit)
    cache = HOISTED.cache(PARAMS, batches(), tmp_path)
    others = np.array([i for i in range(EXAMPLES) if not first <= i < stop])
    cache[others]
    message = rf"{file}' is damaged in block {block}, rows {first} to {stop - 1}: the checksum is"
    for row in (first, stop - 1, stop - 1 - EXAMPLES):
        with pytest.raises(ValueError, match=message):
            cache[[row]]
    flip(tmp_path / file, place, bit)
    assert bits(HOISTED.cache(PARAMS, batches(), tmp_path)) == expected


def test_a_flipped_bit_anywhere_in_the_manifest_is_told(tmp_path: Path):
    HOISTED.cache(PARAMS, batches(), tmp_path)
    path = tmp_path / "manifest.json"
    rng = random.Random(0)
    for place in range(rng.randrange(9), path.stat().st_size, 9):
        bit = rng.randrange(8)
        flip(path, place, bit)
        with pytest.raises(ValueError, match=r"cannot be read, manifest\.json is damaged: "):
            _cache_files._read_manifest(str(tmp_path))
        flip(path, place, bit)
    for size in (0, 1, path.stat().st_size // 2, path.stat().st_size - 1):
        whole = path.read_bytes()
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"manifest\.json is damaged: .*remove"):
            HOISTED.cache(PARAMS, batches(), tmp_path)
        path.write_bytes(whole)


def test_a_manifest_of_another_format_is_told(tmp_path: Path):
    HOISTED.cache(PARAMS, batches(), tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": "of a later one"}))
    with pytest.raises(ValueError, match="its format is 'of a later one', and this version"):
        HOISTED.cache(PARAMS, batches(), tmp_path)


@pytest.mark.parametrize("file", FILES)
def test_a_file_that_is_cut_off_is_told(file: str, tmp_path: Path):
    cache = HOISTED.cache(PARAMS, batches(), tmp_path)
    path, width = tmp_path / file, FILES[file]
    for rows, left in ((0, 0), (20, 1), (21, 0), (60, width - 1)):
        os.truncate(path, rows * width + left)
        message = rf"{file}' has {rows * width + left} bytes, .*block {rows // 7}, row {rows} on"
        with pytest.raises(ValueError, match=message):
            HOISTED.cache(PARAMS, batches(), tmp_path)
        with pytest.raises(ValueError, match=message):  # where it is being read, too
            cache[[0]]
        os.truncate(path, EXAMPLES * width)
    with pytest.raises(ValueError, match=f"{file}' is damaged in block 0"):
        HOISTED.cache(PARAMS, batches(), tmp_path)[[3]]
    os.truncate(path, EXAMPLES * width + 1)
    with pytest.raises(ValueError, match="something was written behind its last row, 60"):
        HOISTED.cache(PARAMS, batches(), tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=f"{file}' has 0 bytes, expected"):
        HOISTED.cache(PARAMS, batches(), tmp_path)


def test_a_partial_cache_that_is_damaged_is_told(tmp_path: Path):
    def ended() -> Iterator[Any]:
        yield from batches()[:6]
        raise KeyError("ended")

    with pytest.raises(KeyError):
        HOISTED.cache(PARAMS, ended(), tmp_path)
    flip(tmp_path / "rows_0", 5 * 24)
    with open(tmp_path / "rows_1", "ab") as file:  # of rows that the manifest does not speak of
        file.write(bytes(1000))
    cache = HOISTED.cache(PARAMS, batches(), tmp_path)
    with pytest.raises(ValueError, match="rows_0' is damaged in block 0, rows 0 to 6"):
        cache[:]
    os.truncate(tmp_path / "rows_1", 4)
    with pytest.raises(ValueError, match="rows_1' has 4 bytes"):
        HOISTED.cache(PARAMS, batches(), tmp_path)


def test_what_is_no_cache_is_left_alone(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("all of it")
    with pytest.raises(ValueError, match=r"is no cache of rows: 'thesis\.tex' in it"):
        HOISTED.cache(PARAMS, batches(), tmp_path)
    with pytest.raises(ValueError, match=r"thesis\.tex' is a file, and a cache is a directory"):
        HOISTED.cache(PARAMS, batches(), tmp_path / "thesis.tex")
    assert [each.name for each in tmp_path.iterdir()] == ["thesis.tex"]


# --- killed, at each thing that is asked of the system


class Killed(BaseException):
    """What stands for the end of the process: nothing is asked of the system after it."""


class Dying:
    """The module `os`, until the n-th call that changes a disk: that one is not done, or half.

    No disk is waited for: what was written is there for the next process anyway.
    """

    CHANGES = frozenset({"fsync", "ftruncate", "makedirs", "open", "replace", "unlink", "write"})

    def __init__(self, calls: int = 10**6):
        self.left = calls
        self.calls: list[tuple[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        return self._mortal(name) if name in self.CHANGES else getattr(os, name)

    def _mortal(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left == 0 and name == "write":
                os.write(args[0], args[1][: len(args[1]) // 2])
            if self.left <= 0:
                raise Killed
            self.calls.append((name, args[0]))
            return None if name == "fsync" else getattr(os, name)(*args, **kwargs)

        return call


COLUMNS = [Column((3,), np.dtype(np.int32), np.dtype(np.int32))] * 2
DATA = [np.arange(i, min(i + 5, 23)) for i in range(0, 23, 5)]


def rows_of(data: Any) -> list[Any]:
    return [np.stack([data, data * sign, data + 7], 1).astype(np.int32) for sign in (1, -1)]


def fill(directory: str) -> tuple[int, Any]:
    """Builds a cache of `DATA` as `Hoisted.cache` does; how many rows were there already."""
    with _cache_files.opened(directory, {"rows of": "some numbers"}, COLUMNS) as store:
        there, seen = store.rows, 0
        for data in DATA:
            store.see([data])
            seen += len(data)
            if seen > there:
                store.append([each[-min(seen - there, len(data)) :] for each in rows_of(data)])
        store.finish()
    return there, _cache_files.Files(directory, store.manifest, COLUMNS)


def test_killed_at_each_call_of_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_cache_files, "BLOCK_BYTES", 24 * 4)
    expected = [np.concatenate(each) for each in zip(*map(rows_of, DATA), strict=True)]
    counted = Dying()
    monkeypatch.setattr(_cache_files, "os", counted)
    fill(str(tmp_path / "whole"))
    calls = len(counted.calls)
    found = set[int]()
    for call in range(1, calls + 1):
        directory = str(tmp_path / str(call))
        monkeypatch.setattr(_cache_files, "os", Dying(call))
        with pytest.raises(Killed):
            fill(directory)
        monkeypatch.setattr(_cache_files, "os", Dying())
        there, files = fill(directory)
        found.add(there)
        files.require(np.arange(23))
        for array, other in zip(files.arrays, expected, strict=True):
            np.testing.assert_array_equal(array, other)
    assert calls > 60
    assert found == {0, 4, 8, 12, 20, 23}


def test_rows_are_on_the_disk_before_the_manifest_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(_cache_files, "BLOCK_BYTES", 24 * 4)
    system = Dying()
    monkeypatch.setattr(_cache_files, "os", system)
    fill(str(tmp_path / "cache"))
    unsynced = set[Any]()
    replaced = 0
    for i, (name, what) in enumerate(system.calls):
        if name == "write":
            unsynced.add(what)
        if name == "fsync":
            unsynced.discard(what)
        if name == "replace":
            replaced += 1
            assert not unsynced
            # The directory, in which it now has its name, is synced after it.
            assert system.calls[i + 1] == ("open", str(tmp_path / "cache"))
            assert system.calls[i + 2][0] == "fsync"
    assert replaced > 4


def test_killed_twice_and_by_other_hands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_cache_files, "BLOCK_BYTES", 24 * 4)
    rng, refused = random.Random(0), 0
    for number in range(30):
        directory = str(tmp_path / str(number))
        for _ in range(4):
            monkeypatch.setattr(_cache_files, "os", Dying(rng.randrange(1, 40)))
            with pytest.raises(Killed):
                fill(directory)
        monkeypatch.setattr(_cache_files, "os", Dying())
        if _cache_files._read_manifest(directory) is not None:
            refused += 1
            opening = _cache_files.opened(directory, {"rows of": "other numbers"}, COLUMNS)
            with pytest.raises(ValueError, match="  rows of: other numbers, and the cache"):
                opening.__enter__()
        _, files = fill(directory)
        files.require(np.arange(23))
        np.testing.assert_array_equal(files.arrays[1][:, 1], -np.arange(23))
    assert refused > 10


# --- killed, as a process


def killed_build(path: Path, seed: int, is_tried: bool) -> None:
    """Builds in a process of its own, which is killed at some moment."""
    rng = random.Random(seed)
    command = [sys.executable, caching.__file__, str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(rng.randrange(1, len(batches()))):
        assert process.stdout.readline()
    if is_tried:
        os.kill(process.pid, signal.SIGSTOP)  # it stands still, and holds the lock
        with pytest.raises(BlockingIOError, match="is being built"):
            HOISTED.cache(PARAMS, batches(), path)
    time.sleep(rng.uniform(0, 0.004))
    process.kill()
    process.stdout.close()
    process.wait()


@pytest.mark.parametrize("seed", range(3))
def test_a_killed_build_goes_on(seed: int, tmp_path: Path, expected: list[bytes]):
    killed_build(tmp_path, seed, is_tried=seed == 0)
    assert bits(HOISTED.cache(PARAMS, batches(), tmp_path)) == expected


@pytest.mark.exhaustive
@pytest.mark.parametrize("number", range(2))  # of which ten are fifty moments
def test_builds_killed_at_more_moments_go_on(number: int, tmp_path: Path, expected: list[bytes]):
    there: list[int] = []
    for seed in range(10 + 5 * number, 15 + 5 * number):
        killed_build(tmp_path, seed, is_tried=False)
        if (tmp_path / "manifest.json").exists():
            there.append(json.loads((tmp_path / "manifest.json").read_text())["rows"])
    assert any(there)
    assert there == sorted(there)
    assert bits(HOISTED.cache(PARAMS, batches(), tmp_path)) == expected
