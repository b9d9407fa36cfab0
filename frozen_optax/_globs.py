"""Globs over paths, read segment by segment, and what one that matches nothing may have meant."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import functools
import re
from collections.abc import Sequence
from glob import escape

_MAX_CANDIDATES = 5_000  # paths looked through for "did you mean"
_MAX_NEAREST = 3  # paths named


def _reads_as_numbers(body: str) -> bool:
    """Whether a class was meant as a range of numbers of several digits.

    So was `[0-11]`, which is 0, 1 and 1.
    """
    parts = re.findall(r".-.|.", body, re.DOTALL)
    digits = [re.fullmatch(r"\d-\d|\d", part) is not None for part in parts]
    pairs = zip(parts, parts[1:], digits, digits[1:], strict=False)
    return any(here and there and len(part) != len(after) for part, after, here, there in pairs)


def _segment_regex(segment: str, glob: str) -> str:
    """One segment of a glob as a regex that stays within a segment of the path.

    What stands before a later `*` is matched as early as it can be and never again (an atomic
    group): many stars cost no more than one.
    """
    out: list[str] = []
    i = 0
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
                raise ValueError(
                    f"glob {glob!r}: the class opened by '[' is not closed. To match '[' write "
                    "'[[]'."
                )
            if _reads_as_numbers(segment[start:end]):
                raise ValueError(
                    f"glob {glob!r}: a class matches one character, so [{segment[i:end]}] is no "
                    "range of numbers. For layers 0 to 11 write two globs, 'layer_[0-9]' and "
                    "'layer_1[01]'."
                )
            body = re.sub(r"([^-\w\s]|(?<=.-)-)", r"\\\1", segment[start:end])
            negation = "^" if start > i else ""
            out.append(f"(?!/)[{negation}{body}]")  # a range may span '/', which no segment holds
            i = end + 1
    return "".join(out)


@dataclasses.dataclass(frozen=True)
class Glob:
    """A glob, read segment by segment.

    It selects the leaves that it matches, and those below what it matches.
    """

    glob: str

    @functools.cached_property
    def segments(self) -> list[str]:
        """The segments as regexes, `**` standing for itself."""
        glob = self.glob
        clean = re.sub("/+", "/", glob).strip("/")
        one_star = lambda segment: segment if segment == "**" else re.sub(r"\*+", "*", segment)
        stars = "/".join(map(one_star, clean.split("/")))
        if not clean:
            raise ValueError(f"glob {glob!r} is empty. For every leaf write '**'.")
        if clean != glob:
            raise ValueError(
                f"glob {glob!r} has an empty segment: a path has none. Write {stars!r}."
            )
        segments: list[str] = []
        for segment in glob.split("/"):
            if segment != "**":
                if "**" in segment:
                    raise ValueError(
                        f"glob {glob!r}: '**' stands for whole segments only. Write {stars!r} to "
                        "match within a segment, 'a/**/b' to match at any depth."
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
        # Each run is matched as early as it can be and never again (an atomic group): many `**`
        # cost as much as one.
        first, *middle = runs[:-1] or [""]
        regex = first + "".join(f"(?>(?:[^/]*/)*?{run})" for run in middle)
        regex += ("(?:[^/]*/)*?" if len(runs) > 1 else "") + runs[-1]
        try:
            return re.compile(regex[:-1] + "(?:/.*)?", re.DOTALL)
        except re.error as error:
            raise ValueError(
                f"glob {self.glob!r} has a character class that cannot be read: {error}."
            ) from error

    def may_match_below(self, hole: str) -> bool:
        """Whether some path at or below `hole` could match."""
        segments = self.segments

        def closed(positions: set[int]) -> set[int]:
            """With the positions behind a `**`, which may also span nothing."""
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
            go_on = {i + 1 for i in at - stay if re.fullmatch(segments[i], key, re.DOTALL)}
            at = closed(stay | go_on)
        return bool(at)


@functools.lru_cache(maxsize=4096)
def _likeness(wanted: str, key: str) -> float:
    """How much a segment of a glob is like a key of a path, from 0 to 1."""
    if wanted == key:
        return 1.0
    if fnmatch.fnmatchcase(key, wanted):
        return 0.25 if wanted == "*" else 0.9  # a star is like everything
    ratio = difflib.SequenceMatcher(None, wanted.lower(), key.lower()).ratio()
    return 0.8 * ratio if ratio >= 0.6 else 0.0


def _shared(wanted: Sequence[str], keys: Sequence[str]) -> float:
    """What a glob and a path share, segment by segment and in order.

    The first segments count a little more.
    """
    best = [0.0] * (len(keys) + 1)
    for i, segment in enumerate(wanted):
        before, best = best, [0.0]
        for j, key in enumerate(keys):
            together = before[j] + _likeness(segment, key) * (1 + 0.01 * (len(wanted) - i))
            best.append(max(together, best[j], before[j + 1]))
    return best[-1]


def _closest(pattern: str, is_glob: bool, known: Sequence[str]) -> list[str]:
    """The paths most like a pattern.

    They share the most segments with a glob, or read most like a regex.
    """
    if not is_glob:
        return difflib.get_close_matches(pattern, known, n=_MAX_NEAREST, cutoff=0.4)
    wanted = [segment for segment in pattern.split("/") if segment != "**"]
    shared = {path: _shared(wanted, path.split("/")) for path in known}
    most = max(shared.values(), default=0.0)
    if not most:
        return []
    # Of those that share as much, the shorter ones: what stands below what is meant shares it, too.
    likely = [path for path in known if shared[path] > 0.9 * most]
    likely.sort(key=lambda path: (-shared[path], path.count("/")))
    return likely[:_MAX_NEAREST]


def nearest_paths(
    pattern: str, paths: Sequence[str], regex: re.Pattern[str] | None, search: bool = False
) -> str:
    """Paths of leaves and modules that look like `pattern`, as the end of an error message.

    Args:
      pattern: a glob, or the text of a regex.
      paths: of the leaves.
      regex: the pattern, if it is one.
      search: whether it is one that need not match a whole path.
    """
    split = [path.split("/") for path in paths]
    known: dict[str, None] = {}
    deepest = max(map(len, split), default=0)
    for depth in range(1, deepest + 1):  # what stands near the top comes first
        known.update(dict.fromkeys("/".join(keys[:depth]) for keys in split if len(keys) >= depth))
        if len(known) > _MAX_CANDIDATES:
            break
    below = [path for path in known if path.endswith("/" + pattern)]
    close = _closest(pattern, regex is None, list(known)) or list(paths[:_MAX_NEAREST])
    hints: list[str] = []
    if search:
        if pattern.startswith("^") or pattern.endswith("$"):
            hints.append("'^' and '$' are the ends of a leaf's whole path.")
    elif regex is not None and any(map(regex.fullmatch, known)):
        hints.append(
            "A regex has to match the whole path of a leaf: for all below a module write "
            f"{pattern + '/.*'!r}."
        )
    elif regex is not None and any(map(regex.search, paths)):
        hints.append("A regex has to match the whole path: begin or end it with '.*'.")
    if regex is None and (".*" in pattern or any(char in pattern for char in "{},|")):
        hints.append(
            "A glob knows *, ?, [...] and **: give several patterns as a list, a regex as "
            "re.compile(...)."
        )
    if pattern not in known and any(path.lower() == pattern.lower() for path in known):
        hints.append("Upper and lower case differ.")
    if regex is None and pattern in known and escape(pattern) != pattern:
        hints.append(
            f"To match the characters '*', '?' and '[' of a path write {escape(pattern)!r}."
        )
    if below:
        hints.append(
            f"A glob begins at the top: {pattern!r} stands at {below[0]!r}, write "
            f"{'**/' + pattern!r}."
        )
    if close:
        hints.append("The nearest paths are " + ", ".join(map(repr, close)) + ".")
    return " ".join(hints)
