"""What a proof could not show, in words: three verdicts, and what the reader needs to see why."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Generator, Mapping, Sequence

from frozen_optax._messages import Fault, listed
from frozen_optax._proofs._counterexamples import Runs
from frozen_optax._proofs._trace import Result


@dataclasses.dataclass
class Finding:
    """A leaf of which something is not proved, and why not."""

    path: str
    result: Result
    reasons: list[str]
    shown: str | None = None  # the contrary, by a run
    verdict: str = "unknown"


@contextlib.contextmanager
def running(findings: Sequence[Finding]) -> Generator[None]:
    """A run that fails says nothing of what was found, and must not stand in its way."""
    try:
        yield
    except Exception as error:  # whatever a user's callback, or the device, has raised
        last = [type(error).__name__, *str(error).strip().splitlines()][-1]
        reason = f"unknown (a run on numbers failed: {last})"
        for finding in findings:
            finding.verdict = reason if finding.verdict == "unknown" else finding.verdict


def section(findings: Sequence[Finding], count: int, claim: str, runs: Runs) -> list[str]:
    """Lines of a message about some of `count` leaves."""
    if not findings:
        return []
    faults = [Fault(each.path, _verdict(each, runs), each.reasons) for each in findings]
    return listed(f"{len(findings)} of {count} {claim}:", faults)


def _verdict(finding: Finding, runs: Runs) -> str:
    if finding.shown:
        return f"refuted: {finding.shown}"
    if finding.verdict == "unknown" and runs.reason_against:
        return f"unknown ({runs.reason_against})"
    return finding.verdict


def in_words(proved: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """What is proved of each path; several leaves may share one."""
    return {path: ", ".join(dict.fromkeys(words)) for path, words in proved.items()}


def require_proved(*sections: list[str]) -> None:
    """Raise what was found, if anything was."""
    if lines := list(itertools.chain(*sections)):
        raise AssertionError("\n".join(lines))
