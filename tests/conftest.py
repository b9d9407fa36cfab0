"""Eight host devices, so that sharded trees are tested everywhere, and axes of several tests."""

import jax
import pytest
import trying

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(params=[False, True], ids=["32-bit", "64-bit"])
def x64(request):
    """Whether 64-bit types are on: a test that asks for it runs both ways."""
    with trying.precision(x64=request.param):
        yield request.param


@pytest.fixture(params=["linen", "nnx"])
def flavour(request):
    """Which of Flax's two kinds of modules, in the tests that train both."""
    return request.param


def pytest_addoption(parser):
    parser.addoption(
        "--random-programs",
        type=int,
        default=0,
        help="how many more random programs the claims of the proofs are compared with",
    )
