"""What a cache belongs to, in words, and the contents of its data: what it has to be compared by.

Each word is of one thing: a version, a frozen leaf, an argument. The data themselves are compared
block by block, as they are read.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from frozen_optax import _bits
from frozen_optax._hoist._cache_columns import Column
from frozen_optax._hoist._rows import ArrayOf, Kept
from frozen_optax._hoist._sizes import digest
from frozen_optax._messages import Fault, listed
from frozen_optax._trees import paths_of

_PROGRAM = "the program"
# What it is that may be another, where the name of a word does not say it.
_REASONS = {
    _PROGRAM: "the function, a constant in it, what is frozen, or what is kept of the arguments",
}
# Of jax, that change numbers.
_SETTINGS = (
    "jax_default_matmul_precision",
    "jax_enable_x64",
    "jax_threefry_partitionable",
    "jax_disable_jit",
)
# Of those flags of XLA that change no numbers.
_HARMLESS = re.compile(r"--xla_(dump|force_host_platform_device_count)\S*")


def belongings(
    frozen: Mapping[str, str],
    leaves: Sequence[Any],
    kept: Kept,
    columns: Sequence[Column],
    batch: Any,
) -> dict[str, str]:
    """All that determines the rows of a data set, but for the data.

    Args:
      frozen: the fingerprint of the frozen leaves.
      leaves: these leaves, which lie on a device.
      kept: what the rows hold.
      columns: how it is kept.
      batch: the arguments of a batch.
    """
    words = _environment(leaves)
    words[_PROGRAM] = digest(*kept.each, "shared", *kept.shared)
    words |= {f"array {i} of the rows": str(column) for i, column in enumerate(columns)}
    for path, leaf, what in zip(paths_of(batch), jax.tree.leaves(batch), kept.leaves, strict=True):
        name, word = f"argument {path!r} of a batch", _argument(leaf, what)
        # Two of one path, {"a/b": ..., "a": {"b": ...}}, are told together.
        words[name] = f"{words[name]}; {word}" if name in words else word
    return words | {f"the frozen leaf {path!r}": each for path, each in frozen.items()}


def _environment(leaves: Sequence[Any]) -> dict[str, str]:
    """What else changes numbers."""
    placed = [leaf for leaf in leaves if isinstance(leaf, jax.Array)] or [jnp.zeros(())]
    device = min(placed[0].devices(), key=lambda each: each.id)
    machine = f", {platform.machine()}" if device.platform == "cpu" else ""
    flags = sorted(_HARMLESS.sub("", os.environ.get("XLA_FLAGS", "")).split())
    return {
        "jax": jax.__version__,
        "jaxlib": metadata.version("jaxlib"),
        "the backend": device.platform,
        "the device": f"{device.device_kind}{machine}",
        **{name: str(getattr(jax.config, name)) for name in _SETTINGS},
        "XLA_FLAGS": " ".join(flags),
    }


def _argument(leaf: Any, what: Any) -> str:
    if not isinstance(what, ArrayOf):
        return re.sub(r" at 0x[0-9a-f]+", "", f"{type(leaf).__name__} {leaf!r}")
    name = f"{what.dtype}[{','.join(map(str, what.shape))}]"
    return f"{name} an example" if what.has_batch else f"{name} {leaf}, {_hex(leaf)}"


def _hex(number: Any) -> str:
    return np.ascontiguousarray(_bits.bits(np.asarray(number))).tobytes().hex()


def require_same(directory: str, was: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Raise where a cache does not belong to what it is asked for, by the names of what differs."""
    names = list(dict.fromkeys([*now, *was]))
    faults = [
        Fault(
            name,
            f"{now.get(name, 'none')}, and the cache was built with {was.get(name, 'none')}",
            [_REASONS[name]] if name in _REASONS else (),
        )
        for name in names
        if was.get(name) != now.get(name)
    ]
    if faults:
        lines = listed(
            f"the cache at {directory!r} belongs to something else, {len(faults)} of {len(names)} "
            "things differ:",
            faults,
        )
        lines.append("Give another path, or remove the directory to build the cache anew.")
        raise ValueError("\n".join(lines))


# --- the data


def pieces(start: int, stop: int, block_rows: int) -> Iterator[tuple[int, int]]:
    """A range of rows, cut where blocks end."""
    while start < stop:
        end = min(stop, (start // block_rows + 1) * block_rows)
        yield start, end
        start = end


class Contents:
    """Digests of a data set, a block of examples each, whatever batches it comes in."""

    def __init__(self, block_rows: int):
        self._block_rows = block_rows
        self.rows = 0
        self._hashes: list[Any] = []

    def add(self, arrays: Sequence[Any]) -> Iterator[tuple[int, str]]:
        """The blocks that end within a batch, with their digests."""
        patterns = [np.ascontiguousarray(_bits.bits(array)) for array in arrays]
        first = self.rows
        for start, stop in pieces(first, first + len(patterns[0]), self._block_rows):
            self._hashes = self._hashes or [hashlib.blake2b(digest_size=16) for _ in patterns]
            for each, pattern in zip(self._hashes, patterns, strict=True):
                each.update(pattern[start - first : stop - first].reshape(-1).view(np.uint8).data)
            self.rows = stop
            if stop % self._block_rows == 0:
                yield self._end(stop)

    def last(self) -> Iterator[tuple[int, str]]:
        """The block that the data end in, if they do not end with one."""
        if self._hashes:
            yield self._end(self.rows)

    def _end(self, stop: int) -> tuple[int, str]:
        words = [each.hexdigest() for each in self._hashes]
        self._hashes = []
        return (stop - 1) // self._block_rows, digest(*words)
