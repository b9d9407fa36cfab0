"""A data set whose rows are cached, for tests of caches, and a process of its own that builds one.

`python tests/caching.py PATH` builds the cache of `batches()` and prints a line a batch.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import frozen_optax as fo
from frozen_optax._hoist import _cache_files

SIZE, EXAMPLES = 8, 61  # the last batch has five
ROW_BYTES = 4 * 6 + 4
BLOCK_ROWS = 7  # of which no batch is a multiple
_RNG = np.random.default_rng(0)


def _quarters(*shape: int) -> Any:
    """Numbers of which sums of products are exact: a row is the same in any batch, bit for bit."""
    return (_RNG.integers(-8, 9, shape) / 4).astype(np.float32)


PARAMS = {
    "encoder": {"w": jnp.asarray(_quarters(4, 6) / 4)},
    "head": jnp.ones(6),
}
X = _quarters(EXAMPLES, 4)
Y = _RNG.standard_normal(EXAMPLES).astype(np.float32)


def loss(params: Any, x: Any, y: Any) -> Any:
    features = jnp.tanh(x @ params["encoder"]["w"])
    return jnp.mean((features @ params["head"] - y) ** 2)


def batches(x: Any = X, y: Any = Y, size: int = SIZE) -> list[tuple[Any, Any]]:
    return [(x[i : i + size], y[i : i + size]) for i in range(0, len(x), size)]


def in_small_blocks(setattr: Any = setattr) -> None:
    """A block has few rows, and is on disk as soon as it is full."""
    setattr(_cache_files, "BLOCK_BYTES", ROW_BYTES * BLOCK_ROWS)
    setattr(_cache_files, "SYNC_BYTES", 1)


def told() -> Iterator[Any]:
    for number, batch in enumerate(batches()):
        print(number, flush=True)
        yield batch


if __name__ == "__main__":
    in_small_blocks()
    fo.hoist(loss, "encoder").cache(PARAMS, told(), Path(sys.argv[1]))
