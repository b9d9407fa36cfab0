"""Exact freezing for JAX and Optax: frozen leaves keep their bits, with any optimizer."""

from frozen_optax._apply_updates import apply_updates
from frozen_optax._assertions import assert_frozen, assert_trees_bit_identical
from frozen_optax._checkpoints import load_trained, save_trained
from frozen_optax._fingerprints import assert_fingerprint, fingerprint, watch_fingerprint
from frozen_optax._freeze import freeze, freeze_all, freeze_by_path
from frozen_optax._gradients import grad, value_and_grad, value_and_grad_from_state
from frozen_optax._hoist._hoisted import hoist
from frozen_optax._jit import jit
from frozen_optax._nnx import nnx_filter, nnx_jit
from frozen_optax._partition import combine, partition
from frozen_optax._proofs._step import assert_step_freezes
from frozen_optax._proofs._update import assert_update_freezes
from frozen_optax._restore import restore
from frozen_optax._selection import by_mask, by_path, by_predicate
from frozen_optax._selectors import Selector
from frozen_optax._stages import Stage, stages
from frozen_optax._summary import summary
from frozen_optax._transfer_state import Transfer, plan_transfer, transfer_state
from frozen_optax._with_frozen import with_frozen

__version__ = "0.1.0"

__all__ = [
    "Selector",
    "Stage",
    "Transfer",
    "apply_updates",
    "assert_fingerprint",
    "assert_frozen",
    "assert_step_freezes",
    "assert_trees_bit_identical",
    "assert_update_freezes",
    "by_mask",
    "by_path",
    "by_predicate",
    "combine",
    "fingerprint",
    "freeze",
    "freeze_all",
    "freeze_by_path",
    "grad",
    "hoist",
    "jit",
    "load_trained",
    "nnx_filter",
    "nnx_jit",
    "partition",
    "plan_transfer",
    "restore",
    "save_trained",
    "stages",
    "summary",
    "transfer_state",
    "value_and_grad",
    "value_and_grad_from_state",
    "watch_fingerprint",
    "with_frozen",
]
