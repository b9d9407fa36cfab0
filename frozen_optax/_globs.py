"""Globs over paths, read segment by segment, and what one that matches nothing may have meant."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Sequence
from glob import escape

_MAX_CANDIDATES = 5_000  # paths looked through for "did you mean"


def _reads_as_numbers(body: str) -> bool:
    """Whether a class was meant as a range of numbers of several digits, as in `[0-11]`, which is 0, 1 and 1."""
    parts = re.findall(r".-.|.", body, re.DOTALL)
    digits = [re.fullmatch(r"\d-\d|\d", part) is not None for part in parts]
    pairs = zip(parts, parts[1:], digits, digits[1:], strict=False)
    return any(here and there and len(part) != len(after) for part, after, here, there in pairs)


def _segment_regex(segment: str, glob: str) -> str:
    """One segment of a glob as a regex that stays within a segment of the path.

    What stands before a later `*` is matched as early as it can be and never again (an atomic group): many stars cost
    no more than one.
    """
    out, i = [], 0
    last = -1  # where the last star is in `out`
    while i < len(segment):
        char = segment[i]
        i += 1
        if char == "*":
            if last >= 0:
                out[last:] = ["(?>[^/]*?" + "".join(out[last + 1 :]) + ")"]
            last = len(out)
            out.append("[^/]*")
        elif char == "?":
            out.append("[^/]")
        elif char != "[":
            out.append(re.escape(char))
        else:
            start = i + segment.startswith("!", i)
            end = segment.find("]", start + 1)  # a `]` that comes first is one of the class
            if end < 0:
                raise ValueError(f"glob {glob!r}: the class opened by '[' is not closed. To match '[' write '[[]'.")
            if _reads_as_numbers(segment[start:end]):
                raise ValueError(
                    f"glob {glob!r}: a class matches one character, so [{segment[i:end]}] is no range of numbers. For "
                    "layers 0 to 11 write two globs, 'layer_[0-9]' and 'layer_1[01]'."
                )
            body = re.sub(r"([^-\w\s]|(?<=.-)-)", r"\\\1", segment[start:end])
            out.append(f"(?!/)[{'^' if start > i else ''}{body}]")  # a range may span '/', which no segment holds
            i = end + 1
    return "".join(out)


@dataclasses.dataclass(frozen=True)
class Glob:
    """A glob, read segment by segment. It selects the leaves it matches and those below what it matches."""

    glob: str

    @functools.cached_property
    def segments(self) -> list[str]:
        """The segments as regexes, `**` standing for itself."""
        glob = self.glob
        clean = re.sub("/+", "/", glob).strip("/")
        stars = "/".join(s if s == "**" else re.sub(r"\*+", "*", s) for s in clean.split("/"))
        if not clean:
            raise ValueError(f"glob {glob!r} is empty. For every leaf write '**'.")
        if clean != glob:
            raise ValueError(f"glob {glob!r} has an empty segment: a path has none. Write {stars!r}.")
        segments: list[str] = []
        for segment in glob.split("/"):
            if segment != "**":
                if "**" in segment:
                    raise ValueError(
                        f"glob {glob!r}: '**' stands for whole segments only. Write {stars!r} to match within a "
                        "segment, 'a/**/b' to match at any depth."
                    )
                segments.append(_segment_regex(segment, glob))
            elif segments[-1:] != ["**"]:
                segments.append(segment)
        return segments

    @functools.cached_property
    def regex(self) -> re.Pattern[str]:
        """The glob on whole paths, what lies below a match included."""
        segments = self.segments
        if segments == ["**"]:
            return re.compile(".*", re.DOTALL)
        if segments[-1] == "**":  # `a/**` is `a`: naming a module names all below it
            segments = segments[:-1]
        runs = [""]  # what stands between two `**`
        for segment in segments:
            if segment == "**":
                runs.append("")
            else:
                runs[-1] += segment + "/"
        # Each run is matched as early as it can be and never again (an atomic group): many `**` cost as much as one.
        first, *middle = runs[:-1] or [""]
        regex = first + "".join(f"(?>(?:[^/]*/)*?{run})" for run in middle)
        regex += ("(?:[^/]*/)*?" if len(runs) > 1 else "") + runs[-1]
        try:
            return re.compile(regex[:-1] + "(?:/.*)?", re.DOTALL)
        except re.error as error:
            raise ValueError(f"glob {self.glob!r} has a character class that cannot be read: {error}.") from error

    def may_match_below(self, hole: str) -> bool:
        """Whether some path at or below `hole` could match."""
        segments = self.segments

        def closed(positions: set[int]) -> set[int]:  # a `**` may also span nothing
            for i in sorted(positions):
                while i < len(segments) and segments[i] == "**":
                    i += 1
                    positions.add(i)
            return positions

        at = closed({0})
        for key in hole.split("/") if hole else ():
            if len(segments) in at:
                return True
            stay = {i for i in at if segments[i] == "**"}
            at = closed(stay | {i + 1 for i in at - stay if re.fullmatch(segments[i], key, re.DOTALL)})
        return bool(at)


def nearest_paths(pattern: str, paths: Sequence[str], regex: re.Pattern[str] | None) -> str:
    """Paths of leaves and modules that look like `pattern`, as the end of an error message."""
    split = [path.split("/") for path in paths]
    known: dict[str, None] = {}
    for depth in range(1, max(map(len, split), default=0) + 1):  # what stands near the top comes first
        known.update(dict.fromkeys("/".join(keys[:depth]) for keys in split if len(keys) >= depth))
        if len(known) > _MAX_CANDIDATES:
            break
    below = [path for path in known if path.endswith("/" + pattern)]
    close = difflib.get_close_matches(pattern, known, n=3, cutoff=0.4) or list(paths[:3])
    hints = []
    if regex is not None and any(map(regex.search, paths)):
        hints.append("A regex has to match the whole path: begin or end it with '.*'.")
    if regex is None and (".*" in pattern or any(char in pattern for char in "{},|")):
        hints.append("A glob knows *, ?, [...] and **: give several patterns as a list, a regex as re.compile(...).")
    if any(path.lower() == pattern.lower() for path in known):
        hints.append("Upper and lower case differ.")
    if pattern in known and escape(pattern) != pattern:
        hints.append(f"To match the characters '*', '?' and '[' of a path write {escape(pattern)!r}.")
    if below:
        hints.append(f"A glob begins at the top: {pattern!r} stands at {below[0]!r}, write {'**/' + pattern!r}.")
    if close:
        hints.append("The nearest paths are " + ", ".join(map(repr, close)) + ".")
    return " ".join(hints)
