"""An example is run in a folder of its own, and leaves no module and no flag behind."""

import sys

import matplotlib
import pytest
from absl import flags


def pytest_configure(config):
    """Warnings are errors where they are about this library, and other people's own are not."""
    config.addinivalue_line("filterwarnings", "ignore")
    config.addinivalue_line("filterwarnings", "error:::frozen_optax")


@pytest.fixture
def room(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    modules, defined = set(sys.modules), set(flags.FLAGS)
    yield tmp_path
    for name in set(sys.modules) - modules:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
    for name in set(flags.FLAGS) - defined:
        delattr(flags.FLAGS, name)
