"""How long rows of a cache take, beside numpy's indexing of its file. Prints one line of JSON.

The files are in the page cache, and every block has been compared with its checksum.
"""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import frozen_optax as fo
from benchmarks.measures import Figures, spread

ROUNDS = 1000
# Features of a head alone, of 1.5 KB an example, and of a last layer, of 51 KB; how many examples.
WIDTHS = {384: 40_000, 12_800: 6_000}


def measured(width: int, examples: int, folder: Path) -> dict[int, dict[str, Figures]]:
    """Seconds of each batch size, in turn."""
    rng = np.random.default_rng(0)
    params = {"encoder": jnp.full((8, width), 0.1), "head": jnp.ones(width)}
    x = rng.standard_normal((examples, 8), np.float32)
    batches = [(x[i : i + 256],) for i in range(0, examples, 256)]

    def loss(params: Any, x: Any) -> Any:
        return jnp.mean(jnp.tanh(x @ params["encoder"]) @ params["head"])

    cache = fo.hoist(loss, "encoder").cache(params, batches, folder)
    shape = (examples, width)
    raw = np.memmap(folder / "rows_0", np.float32, "r", shape=shape)
    np.testing.assert_array_equal(cache[:].each[0], raw)  # and all blocks are read
    found: dict[int, dict[str, Figures]] = {}
    for size in (32, 256):
        times: dict[str, list[float]] = {"memmap": [], "cache": []}
        for _ in range(ROUNDS):
            for name, rows in (("memmap", raw), ("cache", cache)):
                indices = rng.integers(0, examples, size)
                start = time.perf_counter()
                rows[indices]
                times[name].append(time.perf_counter() - start)
        found[size] = {name: spread(each) for name, each in times.items()}
    return found


def main() -> None:
    """Measures rows of two widths."""
    found: dict[int, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for width, examples in WIDTHS.items():
            found[width * 4] = measured(width, examples, Path(folder, str(width)))
    print(json.dumps({"cached_rows": found}))


if __name__ == "__main__":
    main()
