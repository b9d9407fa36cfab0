"""One optimizer of each kind, for tests that compile a program each; the others are exhaustive."""

from collections.abc import Collection
from typing import Any

import pytest

from benchmarks.catalogue import NAMES

KINDS = {
    "adafactor": "factored moments, of other shapes than the parameters",
    "adam": "moments",
    "adamw": "weight decay: moves what has no gradient",
    "adaptive_grad_clip": "reads norms of parameters and gradients, leaf by leaf",
    "add_noise": "moves what has no gradient, by a key in the state",
    "apply_every": "moves at some steps only",
    "apply_if_finite": "a condition on all gradients",
    "chain": "a norm over all leaves, then weight decay",
    "clip_by_global_norm": "a norm over all leaves, and nothing else",
    "conditionally_mask": "a condition on the step",
    "contrib.cocob": "keeps the parameters at the start",
    "contrib.dadapt_adamw": "a step size from sums over all leaves",
    "contrib.dowg": "a step size from distances",
    "contrib.galore": "projections of matrices",
    "contrib.mechanize": "a step size from the parameters' way",
    "contrib.momo": "reads the loss",
    "contrib.muon": "matrices and all others by two optimizers",
    "contrib.reduce_on_plateau": "a scale from the loss",
    "contrib.sam": "an optimizer within",
    "contrib.schedule_free": "two sequences of parameters",
    "contrib.sophia": "calls the loss, with a key",
    "contrib.split_real_and_imaginary": "another tree within",
    "flatten": "all leaves as one vector",
    "freeze": "a mask of its own",
    "keep_params_nonnegative": "moves by the parameters",
    "lamb": "a ratio of norms",
    "lbfgs": "a line search, which calls the loss in a loop",
    "lookahead": "two trees of parameters",
    "masked": "a mask",
    "noisy_sgd": "moves what has no gradient, by a key",
    "novograd": "a second moment per leaf",
    "partition": "labels",
    "polyak_sgd": "a step size from the loss",
    "rprop": "signs, and a step size per element",
    "scale_by_zoom_linesearch": "a line search by itself",
    "sgd": "no state",
    "signum": "signs of moments",
    "sm3": "moments per axis",
    "zero_nans": "remembers which leaves had NaN",
}

LATER = {"contrib.galore", "signum"}  # than the oldest optax that is supported

assert set(KINDS) - set(NAMES) <= LATER, sorted(set(KINDS) - set(NAMES))

# Of these, what found faults or stands for most: moments, decay, noise, norms, two trees, masks,
# matrices, the loss.
FEW = {
    "adam",
    "adamw",
    "sgd",
    "add_noise",
    "clip_by_global_norm",
    "contrib.dowg",
    "contrib.muon",
    "lookahead",
}
FEW |= {"masked", "polyak_sgd", "apply_if_finite"}


def each(always: Collection[str]) -> list[Any]:
    """All optimizers, those that are not always run behind the marker."""
    return [
        name if name in always else pytest.param(name, marks=pytest.mark.exhaustive)
        for name in NAMES
    ]


EACH_OF_FEW = each(FEW)
