"""How these tests differ from the others: whose warnings count, and who sets the precision."""

import pytest
import trying


def pytest_configure(config):
    """Warnings are errors where they are about this library, and other people's own are not."""
    config.addinivalue_line("filterwarnings", "ignore")
    config.addinivalue_line("filterwarnings", "error:::frozen_optax")


@pytest.fixture(autouse=True)
def precision(request):
    """32 bits, or 64 in a file that says `X64 = True`: netket turns them on by being imported."""
    with trying.precision(x64=getattr(request.module, "X64", False)):
        yield
