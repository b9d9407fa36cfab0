"""The same layers in PyTorch: frozen by `requires_grad_(False)`, the optimizer given the rest."""

import time
from collections.abc import Callable

import jax
import numpy as np
import torch

from benchmarks.workloads import Workload


def runner(workload: Workload) -> Callable[[], float]:
    """A function that runs the next step of AdamW and says how long it took."""
    as_tensor = lambda leaf: torch.from_numpy(np.array(leaf))
    params = jax.tree.map(as_tensor, workload.params)
    for name, group in params.items():
        for leaf in group.values():
            leaf.requires_grad_(name in workload.trained)
    trained = [leaf for name in workload.trained for leaf in params[name].values()]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=1e-4)
    batch = as_tensor(workload.batch)

    def run() -> float:
        start = time.perf_counter()
        x = batch
        for group in params.values():
            x = x @ group["kernel"]
            x = (
                torch.tanh(x + group["bias"]) * group["scale"] + group["shift"]
                if "bias" in group
                else torch.tanh(x)
            )
        optimizer.zero_grad()
        (x**2).mean().backward()
        optimizer.step()
        return time.perf_counter() - start

    return run
