"""Claims on random programs hold in runs, eager and compiled, on one device and on four."""

import pytest
import trying
from claims import Case, mesh_of


def check(seed):
    """One program in four in 64 bits, one in three compiled, one in two on devices."""
    x64, compiled = seed % 4 == 3, seed % 3 == 2
    mesh = {0: mesh_of(4), 1: mesh_of(1)}.get(seed % 5)
    with trying.precision(x64=x64):
        Case(seed, x64, mesh).check(compiled)


@pytest.mark.parametrize("seed", range(12))
def test_claims_hold_of_a_random_program(seed):
    check(seed)


@pytest.mark.exhaustive
@pytest.mark.parametrize("first", range(12, 432, 10))
def test_claims_hold_of_ten_more_programs(first):
    for seed in range(first, first + 10):
        check(seed)


def test_claims_hold_of_as_many_as_are_asked_for(request):
    for seed in range(10_000, 10_000 + request.config.getoption("--random-programs")):
        check(seed)
