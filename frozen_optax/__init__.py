"""Exact freezing for JAX and Optax: frozen leaves keep their bits, with any optimizer."""

from frozen_optax._assertions import assert_frozen, assert_trees_bit_identical
from frozen_optax._fingerprints import assert_fingerprint, fingerprint, watch_fingerprint
from frozen_optax._jit import jit
from frozen_optax._optimizer import with_frozen
from frozen_optax._partition import combine, partition
from frozen_optax._report import summary
from frozen_optax._restoring import restore
from frozen_optax._selection import Selector, by_mask, by_path, by_predicate
from frozen_optax._step import apply_updates, grad, value_and_grad, value_and_grad_from_state
from frozen_optax._step_proofs import assert_step_freezes
from frozen_optax._transforms import freeze, freeze_all, freeze_by_path
from frozen_optax._update_proofs import assert_update_freezes

__all__ = [
    "Selector",
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
    "jit",
    "partition",
    "restore",
    "summary",
    "value_and_grad",
    "value_and_grad_from_state",
    "watch_fingerprint",
    "with_frozen",
]
