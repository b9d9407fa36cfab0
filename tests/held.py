"""What is asked of other people's loops, told with the library and once more without it."""

import jax
import numpy as np
from helpers import host_bits

import frozen_optax as fo


def leaves_of(tree):
    """The leaves by their paths as jax spells them, not by the library."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def assert_held(before, after, tx, *, frozen):
    """The leaves at these paths keep every bit, and all others that hold something have moved."""
    fo.assert_frozen(before, after, tx)
    before, after = leaves_of(before), leaves_of(after)
    assert before.keys() == after.keys()
    assert set(frozen) < before.keys()
    same = {path for path in before if (host_bits(before[path]) == host_bits(after[path])).all()}
    nothing_to_move = {path for path in before if before[path].size == 0}
    assert same - nothing_to_move == set(frozen)


def assert_same_training(one, other, rtol=1e-5):
    """Two trainings have ended at the same place, to rounding."""
    one, other = leaves_of(one), leaves_of(other)
    assert one.keys() == other.keys()
    for path in one:
        assert one[path].dtype == other[path].dtype, path
        np.testing.assert_allclose(one[path], other[path], rtol=rtol, atol=rtol, err_msg=path)
