"""Manifests: JSON that carries its own digest: it is read as it was written, or not at all."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def sealed(body: dict[str, Any]) -> dict[str, Any]:
    """What is written: a body, which names its format, with its digest."""
    return body | {"sha256": _sha256(body)}


def unsealed(read: dict[str, Any], written_as: str) -> dict[str, Any]:
    """The body of what was read.

    Raises ValueError where it is of another format or not what was written; anything at all where
    it is no manifest.
    """
    if read["format"] != written_as:
        raise ValueError(
            f"its format is {read['format']!r}, and this version of frozen_optax reads "
            f"{written_as!r}"
        )
    body = {name: value for name, value in read.items() if name != "sha256"}
    if read["sha256"] != _sha256(body):
        raise ValueError("its manifest is not the one that was written")
    return body


def _sha256(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
