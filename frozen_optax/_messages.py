"""What users are told: faults listed in an error, each at its path, and warnings."""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections.abc import Sequence

_MAX_FAULTS = 10  # described in one message
_MAX_PATHS = 3  # named in one sentence


@dataclasses.dataclass(frozen=True)
class Fault:
    """What is wrong with a leaf, in words, and the reasons for it, if there are any."""

    path: str
    what: str
    reasons: Sequence[str] = ()


def listed(heading: str, faults: Sequence[Fault]) -> list[str]:
    """The lines of a message: a heading, and below it the faults, each with its reasons."""
    lines = [heading]
    for fault in faults[:_MAX_FAULTS]:
        lines.append(f"  {fault.path or 'the root'}: {fault.what}")
        lines += [f"    {reason}" for reason in fault.reasons]
    if len(faults) > _MAX_FAULTS:
        lines.append(f"  ... and {len(faults) - _MAX_FAULTS} more")
    return lines


def quoted(paths: Sequence[str]) -> str:
    """The first few of some paths, within a sentence."""
    shown = ", ".join(map(repr, paths[:_MAX_PATHS]))
    return shown + ", ..." if len(paths) > _MAX_PATHS else shown


def warn(message: str) -> None:
    """Warns of the line that has called into this library, however many calls ago."""
    package, frame, level = __name__.partition(".")[0], inspect.currentframe(), 1
    while frame and str(frame.f_globals.get("__name__")).partition(".")[0] == package:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
