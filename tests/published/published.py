"""Files that others have published: fetched from a package index, changed by a diff, imported.

A source distribution is pinned by version and by hash, and so is every file in it. pip downloads
it, and asks its build backend for what it declares; nothing of it is installed.
"""

import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DIFFS = ROOT / "examples/diffs"

_spec = importlib.util.spec_from_file_location("wheels", ROOT / "examples/wheels.py")
wheels = importlib.util.module_from_spec(_spec)
sys.modules.setdefault("wheels", wheels)  # where its dataclass looks
_spec.loader.exec_module(wheels)


@dataclass(frozen=True)
class Release:
    """A source distribution, pinned."""

    name: str
    version: str
    sha256: str

    @property
    def stem(self):
        return f"{self.name.replace('-', '_')}-{self.version}"


def _sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _download(release, room):
    """Into `room`, by pip, which looks at the hash before anything else."""
    wanted = room / "requirement.txt"
    wanted.write_text(f"{release.name}=={release.version} --hash=sha256:{release.sha256}\n")
    options = ["--no-deps", "--no-binary=:all:", "--no-cache-dir", "--quiet", f"--dest={room}"]
    # What is read need not be what is installed, which a constraint may say.
    env = {name: value for name, value in os.environ.items() if name != "PIP_CONSTRAINT"}
    pip = [sys.executable, "-m", "pip", "download", "--require-hashes", f"--requirement={wanted}"]
    subprocess.run([*pip, *options], check=True, env=env)
    (downloaded,) = room.glob("*.tar.gz")
    return downloaded


def fetch(release):
    """The path of the archive, kept where the example keeps its wheels."""
    kept = wheels.default_cache_dir() / f"{release.stem}.tar.gz"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as room:
            _download(release, Path(room)).replace(kept)
    assert _sha256(kept) == release.sha256, f"{kept} is not what is pinned: delete it"
    return kept


def unpack(release, path, folder):
    """A file of the release, in `folder` with all that stands in the same folder of its root."""
    with tarfile.open(fetch(release)) as archive:
        (stem,) = {name.partition("/")[0] for name in archive.getnames()}
        beside = f"{stem}/{path.partition('/')[0]}"
        below = lambda name: name == beside or name.startswith(f"{beside}/")
        members = (member for member in archive.getmembers() if below(member.name))
        archive.extractall(folder, members, filter="data")
    return folder / stem / path


# --- diffs


@dataclass(frozen=True)
class Hunk:
    line: int  # of the old file, from 1
    old: str
    new: str


def read_diff(name):
    """The file that a diff in `examples/diffs` changes, and its hunks."""
    text = (DIFFS / name).read_text()
    path, target = re.search(r"^--- a/(.*)\n\+\+\+ b/(.*)\n", text, re.M).groups()
    assert path == target
    hunks = []
    for line, body in re.findall(r"^@@ -(\d+)(?:,\d+)? .*@@\n((?:[ +-].*\n|\n)+)", text, re.M):
        lines = [each or " " for each in body.splitlines()]
        old, new = ("".join(x[1:] + "\n" for x in lines if x[0] in at) for at in (" -", " +"))
        hunks.append(Hunk(int(line), old, new))
    return path, hunks


def apply(hunks, text, *, at_their_lines):
    """The text with its hunks changed: each is found once, or else nothing is done.

    A diff is made of one release, and says at which lines; in another one its lines may stand
    elsewhere.
    """
    for hunk in hunks:
        assert text.count(hunk.old) == 1, f"{text.count(hunk.old)} times in the file:\n{hunk.old}"
        if at_their_lines:
            assert text[: text.index(hunk.old)].count("\n") + 1 == hunk.line
    for hunk in hunks:
        text = text.replace(hunk.old, hunk.new)
    return text


# --- code


def run_as(name, path):
    """The module that a file is, under a name of its own: several are called `train`."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(text, language):
    """The code of a page: all blocks in a language, without what Jupytext says of a cell."""
    found = re.findall(rf"^```{re.escape(language)}\n(.*?)^```$", text, re.M | re.S)
    return [re.sub(r"\A(:.*\n)+", "", block) for block in found]
