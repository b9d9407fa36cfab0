"""optax's own tests of freezing, masking and partition, with this library in optax's place.

optax installs its tests. Each is run as it stands, but that the module under test is stood in for
by one whose functions are ours.
"""

import functools
import importlib.util
import types
import unittest
from pathlib import Path

import jax
import optax
import pytest
import trying
from optax.transforms import _combining, _freezing, _masking
from pages import table

import frozen_optax as fo


def said(mask):
    """A mask that freezes nothing is an error, which says to write False instead."""
    return mask if any(jax.tree.leaves(mask)) else False


def freeze(mask):
    return fo.freeze(said(mask))


def selective_transform(optimizer, *, freeze_mask):
    return fo.with_frozen(optimizer, said(freeze_mask))


def inside(wrapper):
    """What optax makes, inside of `with_frozen`, which freezes nothing and shall change nothing."""
    return lambda *args: fo.with_frozen(wrapper(*args), False, allow_int=True)


def masked(inner, mask):
    return optax.transforms.masked(inner, fo.by_mask(mask).mask)


# The file of the tests, the name that it has for the module under test, that module, and what
# stands in its place.
STANDING_IN = {
    "freeze": (
        "transforms/_freezing_test.py",
        "_freezing",
        _freezing,
        {"freeze": freeze, "selective_transform": selective_transform},
    ),
    "masked, inside with_frozen": (
        "transforms/_masking_test.py",
        "_masking",
        _masking,
        {"masked": inside(optax.transforms.masked)},
    ),
    "masked, by a selector": (
        "transforms/_masking_test.py",
        "_masking",
        _masking,
        {"masked": masked},
    ),
    "partition, inside with_frozen": (
        "transforms/_combining_test.py",
        "_combining",
        _combining,
        {"partition": inside(optax.transforms.partition)},
    ),
}


@functools.cache
def module_of(suite):
    """A copy of optax's file of tests, in which a name stands for our functions."""
    file, name, under_test, ours = STANDING_IN[suite]
    path = Path(optax.__file__).parent / file
    spec = importlib.util.spec_from_file_location(f"optaxs_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert getattr(module, name) is under_test
    assert ours.keys() <= vars(under_test).keys()
    setattr(module, name, types.SimpleNamespace(**{**vars(under_test), **ours}))
    return module


def cases_of(suite):
    found = unittest.defaultTestLoader.loadTestsFromModule(module_of(suite))
    return [case for group in found for case in group]


def name_of(case):
    return f"{type(case).__name__}.{case._testMethodName}"


# What a test asks that this library does otherwise: how its name begins, and the words of the error
# that it meets. `docs/promises.md` says why.
OTHERWISE = {
    "freeze": {
        # The updates have been compared by then.
        "FreezeTest.test_freeze_updates": "'EmptyState' object has no attribute 'inner_state'",
        "FreezeTest.test_bad_structure_raises": "the mask and the parameters differ in structure",
        "FreezeTest.test_partial_prefix_mask_behavior": "the frozen leaf 'b/c' is the Python float",
        "SelectiveTransformTest.test_selective_bad_structure": "the mask and the parameters differ",
    },
    "masked, by a selector": {
        "MaskedTest.test_masked_state_structure": "struct",
        "MaskedTest.test_mask_compatible_callable_pytree": "selects nothing",
    },
}


def otherwise(suite, name):
    words = (what for how, what in OTHERWISE.get(suite, {}).items() if name.startswith(how))
    return next(words, None)


CASES = [(suite, case) for suite in STANDING_IN for case in cases_of(suite)]


@pytest.mark.parametrize(("suite", "case"), CASES, ids=[f"{s}: {c.id()}" for s, c in CASES])
def test_optaxs_own_test_passes_with_ours(suite, case):
    # Their parameters are float64 on the host, which may be frozen where jax has such types.
    with trying.precision(x64=suite == "freeze"):
        words = otherwise(suite, name_of(case))
        if words is None:
            case.debug()
            return
        with pytest.raises((AssertionError, AttributeError, TypeError, ValueError), match=words):
            case.debug()


def test_the_page_lists_what_is_otherwise():
    _, rows = table("docs/promises.md", "optax's own tests")
    assert set(rows) == {how for suite in OTHERWISE.values() for how in suite}


@pytest.mark.parametrize("suite", OTHERWISE)
def test_what_is_otherwise_is_asked(suite):
    names = [name_of(case) for case in cases_of(suite)]
    for how in OTHERWISE[suite]:
        assert any(name.startswith(how) for name in names), how
