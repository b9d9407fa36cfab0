"""A run that thaws in stages, killed by SIGKILL and resumed from Orbax, ends with the same bits."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks import killed


@pytest.fixture(scope="module")
def expected(tmp_path_factory: Any) -> str:
    """The weights of a run that nobody killed."""
    return killed.written(killed.worker(tmp_path_factory.mktemp("whole"), lambda *_: None))


# Each is killed at these moments, in this order: a step, or an operation in the save after it.
MOMENTS = {
    "at a boundary": [("step", 4)],
    "in a save at a boundary": [("save", 4)],
    "at each boundary": [("step", 4), ("step", 8)],
    "in saves beside a boundary": [("save", 3), ("save", 4), ("save", 5)],
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=[] if name == "in a save at a boundary" else [pytest.mark.exhaustive]
        )
        for name in MOMENTS
    ],
)
def test_a_run_that_is_killed_ends_the_same(name: str, expected: str, tmp_path: Path) -> None:
    for kind, step in MOMENTS[name]:
        last, weights = killed.attempt(tmp_path, (kind, step, 3, 0.0))
        assert (last, weights) == (step, "")
    last, weights = killed.attempt(tmp_path, None)
    assert last == killed.STEPS - 1
    assert weights == expected


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(3))
def test_a_run_killed_anywhere_ends_the_same(seed: int, expected: str) -> None:
    found, weights = killed.run(seed, 4)
    assert found.total() >= 1
    assert weights == expected


def test_the_moments_are_near_boundaries_and_elsewhere() -> None:
    rng = killed.np.random.default_rng(0)
    drawn = [killed.draw(rng, begun) for begun in range(-1, killed.STEPS) for _ in range(50)]
    assert {kind for kind, *_ in drawn} == {"step", "save", "time"}
    assert {killed.place(step) for _, step, *_ in drawn} == {
        "before a boundary",
        "at a boundary",
        "after a boundary",
        "elsewhere",
    }


def test_a_worker_that_fails_is_told(tmp_path: Any) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(RuntimeError, match="the worker ended with 1"):
        killed.attempt(tmp_path / "file", None)
