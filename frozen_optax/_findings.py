"""What a proof could not show, in words: three verdicts, and what the reader needs to see why."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from frozen_optax._programs import Result
from frozen_optax._witnesses import Runs

_MAX_SHOWN = 10  # leaves described in one message


@dataclasses.dataclass
class Finding:
    """A leaf of which something is not proved, and why not; `shown` by a run, if one has shown the contrary."""

    path: str
    result: Result
    reasons: list[str]
    shown: str | None = None
    verdict: str = "unknown"


def section(findings: Sequence[Finding], count: int, claim: str, runs: Runs) -> list[str]:
    """Lines of a message about some of `count` leaves."""
    if not findings:
        return []
    lines = [f"{len(findings)} of {count} {claim}:"]
    for finding in findings[:_MAX_SHOWN]:
        verdict = f"refuted: {finding.shown}" if finding.shown else finding.verdict
        not_run = f" ({runs.reason_against})" if verdict == "unknown" and runs.reason_against else ""
        lines.append(f"  {finding.path or 'the root'}: {verdict}{not_run}")
        lines += [f"    {reason}" for reason in finding.reasons]
    return lines + ([f"  ... and {len(findings) - _MAX_SHOWN} more"] if len(findings) > _MAX_SHOWN else [])


def require_proved(*sections: list[str]) -> None:
    """Raise what was found, if anything was."""
    if lines := list(itertools.chain(*sections)):
        raise AssertionError("\n".join(lines))
