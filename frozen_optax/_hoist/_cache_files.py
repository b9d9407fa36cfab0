"""How a cache lies on disk: a directory with a file of raw rows for each array, and a manifest.

Rows are appended in their order. Now and then what was written is synced, and after that a new
manifest takes the place of the old one, at once: it says what the cache belongs to, how many rows
are complete, and of each block of rows a checksum a file. So whatever a killed build leaves behind
the rows that the manifest speaks of is written over. A complete cache is not written to again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import mmap
import os
import re
import time
import zlib
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import numpy as np

from frozen_optax._hoist._belongs import Contents, pieces, require_same
from frozen_optax._hoist._cache_columns import Column, Error
from frozen_optax._manifests import sealed, unsealed
from frozen_optax._messages import quoted

_FORMAT = "frozen_optax: rows of a data set, 1"
_MANIFEST, _NEW_MANIFEST, _LOCK = "manifest.json", "manifest.json.new", "lock"
_OURS = re.compile(rf"{_MANIFEST}(\.new)?|{_LOCK}|rows_\d+|\..*")  # or hidden, as .DS_Store is

# A block is what a flipped bit costs to find when a first row of it is read: with all files a
# megabyte, a quarter of a millisecond.
BLOCK_BYTES = 2**20
# What a killed build loses at most, and a block: as many bytes, or what so many seconds computed.
SYNC_BYTES = 2**26
SYNC_SECONDS = 10.0


@dataclasses.dataclass
class Manifest:
    """What a cache on disk says of itself.

    Attributes:
      belongs: what it belongs to, in words.
      block_rows: the rows of a block; the last one may have fewer.
      rows: those that are complete, from the first on.
      is_finished: whether they are all.
      contents: a digest of the data of each block.
      checksums: of each file, a number a block.
      errors: of each file, what keeping it narrower has changed.
    """

    belongs: Mapping[str, str]
    block_rows: int
    rows: int
    is_finished: bool
    contents: list[str]
    checksums: list[list[int]]
    errors: list[Error]

    def to_json(self) -> dict[str, Any]:
        """As it is written, with its own digest."""
        return sealed({"format": _FORMAT, **dataclasses.asdict(self)})

    @classmethod
    def of_json(cls, read: dict[str, Any]) -> Manifest:
        """Raises anything at all where it is none."""
        body = unsealed(read, _FORMAT)
        body["errors"] = [Error(**each) for each in body["errors"]]
        return cls(**{name: value for name, value in body.items() if name != "format"})


def _file_of(directory: str, number: int) -> str:
    return os.path.join(directory, f"rows_{number}")


def _read_manifest(directory: str) -> Manifest | None:
    """What a directory says of itself; None if it says nothing."""
    if os.path.exists(directory) and not os.path.isdir(directory):
        raise ValueError(f"{directory!r} is a file, and a cache is a directory. Give another path.")
    names = os.listdir(directory) if os.path.exists(directory) else []
    foreign = sorted(name for name in names if not _OURS.fullmatch(name))
    if foreign:
        raise ValueError(
            f"{directory!r} is no cache of rows: {quoted(foreign)} in it is none of its own. Give "
            "another path, of a directory that does not exist or is empty."
        )
    if _MANIFEST not in names:
        return None
    try:
        with open(os.path.join(directory, _MANIFEST), "rb") as file:
            return Manifest.of_json(json.load(file))
    except Exception as error:  # whatever a damaged one raises
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"the cache at {directory!r} cannot be read, {_MANIFEST} is damaged: {reason}. "
            + _to_do(directory)
        ) from error


def _to_do(directory: str) -> str:
    return f"Take another copy of it, or remove {directory!r} to build the cache anew."


# --- while it is built, and its data are compared


@contextlib.contextmanager
def opened(
    directory: str, belongs: Mapping[str, str], columns: Sequence[Column]
) -> Generator[Directory]:
    """A cache that is there, or one that is begun, for the data to be gone through.

    Raises:
      ValueError: it belongs to something else, or is damaged, or something else is there.
      BlockingIOError: it is being built.
    """
    manifest = _read_manifest(directory)
    if manifest is not None and manifest.is_finished:
        require_same(directory, manifest.belongs, belongs)
        yield Directory(directory, manifest, None)
        return
    os.makedirs(directory, exist_ok=True)
    with _locked(directory):
        manifest = _read_manifest(directory)  # it may have been finished meanwhile
        if manifest is not None:
            require_same(directory, manifest.belongs, belongs)
            require_sizes(directory, manifest, columns)
        if manifest is not None and manifest.is_finished:
            yield Directory(directory, manifest, None)
            return
        if manifest is None:
            row_bytes = sum(column.row_bytes for column in columns)
            block_rows = max(1, BLOCK_BYTES // max(1, row_bytes))
            errors = [Error() for _ in columns]
            manifest = Manifest(belongs, block_rows, 0, False, [], [[] for _ in columns], errors)
        with contextlib.ExitStack() as stack:
            files = [
                stack.enter_context(_begun(_file_of(directory, i), manifest.rows * each.row_bytes))
                for i, each in enumerate(columns)
            ]
            writer = _Writer(directory, manifest, files)
            writer.sync()
            try:
                yield Directory(directory, manifest, writer)
            except BaseException:  # so that what is complete is not computed again
                with contextlib.suppress(OSError):
                    writer.sync()
                raise


@contextlib.contextmanager
def _locked(directory: str) -> Generator[None]:
    """Holds the lock of a directory, which the system takes back when the process ends."""
    try:
        import fcntl
    except ImportError:
        raise NotImplementedError(
            "a cache on disk is built under a lock of fcntl, which this system does not have. "
            "Build it in memory, path=None, or on another system: a complete one is read anywhere."
        ) from None
    with open(os.path.join(directory, _LOCK), "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(
                f"the cache at {directory!r} is being built, in another process or in this one. "
                "Wait until it is complete, or give another path."
            ) from None
        yield


@contextlib.contextmanager
def _begun(path: str, size: int) -> Generator[int]:
    """A file to append to, of which as much is kept as is complete."""
    if size == 0 and os.path.exists(path):
        os.unlink(path)  # who still reads another cache in it goes on
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        os.ftruncate(file, size)
        os.lseek(file, size, os.SEEK_SET)
        yield file
    finally:
        os.close(file)


class Directory:
    """A cache on disk while its data are gone through.

    Rows that are there are not written again; their data are compared.
    """

    def __init__(self, path: str, manifest: Manifest, writer: _Writer | None):
        self._path, self.manifest, self._writer = path, manifest, writer
        self._contents = Contents(manifest.block_rows)

    @property
    def rows(self) -> int:
        """How many rows are complete, from the first on."""
        return self.manifest.rows

    @property
    def errors(self) -> list[Error]:
        """What keeping rows narrower has changed so far."""
        return self.manifest.errors

    def see(self, arrays: Sequence[Any]) -> None:
        """Takes note of the data of a batch.

        Raises:
          ValueError: rows that are there were computed of others.
        """
        stop = self._contents.rows + len(arrays[0])
        if self._writer is None and stop > self.rows:
            self._other_data(f"there are {stop} examples or more, and it has {self.rows} rows")
        for block, digest in self._contents.add(arrays):
            self._compare(block, digest)

    def append(self, arrays: Sequence[np.ndarray]) -> None:
        """Writes rows behind those that are there."""
        assert self._writer is not None
        self._writer.append(arrays)

    def finish(self) -> None:
        """Ends the cache where the data have ended."""
        if self._contents.rows < self.rows:
            self._other_data(
                f"there are {self._contents.rows} examples, and it has {self.rows} rows"
            )
        for block, digest in self._contents.last():
            self._compare(block, digest)
        if self._writer is not None:
            self._writer.sync(is_finished=True)

    def _compare(self, block: int, digest: str) -> None:
        contents = self.manifest.contents
        if block >= len(contents):
            contents.append(digest)
        elif contents[block] != digest:
            first = block * self.manifest.block_rows
            last = min(first + self.manifest.block_rows, self.rows) - 1
            self._other_data(
                f"block {block}, examples {first} to {last}, has the digest {digest}, expected "
                f"{contents[block]}"
            )

    def _other_data(self, what: str) -> None:
        raise ValueError(
            f"the cache at {self._path!r} is of other data, or of the same in another order: "
            f"{what}. Give the data that it was built of, another path, or remove the directory to "
            "build it anew."
        )


class _Writer:
    """Appends rows to files, and says in the manifest what is complete."""

    def __init__(self, directory: str, manifest: Manifest, files: Sequence[int]):
        self._directory, self._manifest, self._files = directory, manifest, files
        self._rows = manifest.rows
        self._open_checksums = [0 for _ in files]  # of the block that is not full
        self._unsynced, self._synced_at = 0, time.monotonic()

    def append(self, arrays: Sequence[np.ndarray]) -> None:
        first, stop = self._rows, self._rows + len(arrays[0])
        for i, array in enumerate(arrays):
            data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
            _write(self._files[i], data)
            self._unsynced += len(data)
            width = len(data) // len(array)
            for start, end in pieces(first, stop, self._manifest.block_rows):
                part = data[(start - first) * width : (end - first) * width]
                self._open_checksums[i] = zlib.crc32(part, self._open_checksums[i])
                if end % self._manifest.block_rows == 0:
                    self._end_block(i)
        self._rows = stop
        if self._unsynced >= SYNC_BYTES or time.monotonic() - self._synced_at >= SYNC_SECONDS:
            self.sync()

    def _end_block(self, file: int) -> None:
        self._manifest.checksums[file].append(self._open_checksums[file])
        self._open_checksums[file] = 0

    def sync(self, is_finished: bool = False) -> None:
        """Makes what is written lasting, and then says so."""
        manifest = self._manifest
        if is_finished and self._rows % manifest.block_rows:
            for i in range(len(self._files)):
                self._end_block(i)
        # An append that failed has left blocks in some of the files alone.
        blocks = min(self._rows // manifest.block_rows, *map(len, manifest.checksums))
        manifest.rows = self._rows if is_finished else blocks * manifest.block_rows
        manifest.is_finished = is_finished
        said = manifest
        if not is_finished:
            checksums = [each[:blocks] for each in manifest.checksums]
            contents = manifest.contents[:blocks]
            said = dataclasses.replace(manifest, contents=contents, checksums=checksums)
        for file in self._files:
            os.fsync(file)
        _replace_manifest(self._directory, json.dumps(said.to_json()).encode())
        self._unsynced, self._synced_at = 0, time.monotonic()


def _write(file: int, data: memoryview) -> None:
    while len(data):
        data = data[os.write(file, data) :]


def _replace_manifest(directory: str, text: bytes) -> None:
    """Puts a manifest in the place of the one before it: one of them is there at any time."""
    path = os.path.join(directory, _NEW_MANIFEST)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        _write(file, memoryview(text))
        os.fsync(file)
    finally:
        os.close(file)
    os.replace(path, os.path.join(directory, _MANIFEST))
    file = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


# --- when it is read


def require_sizes(directory: str, manifest: Manifest, columns: Sequence[Column]) -> None:
    """Raise where files do not hold the rows that the manifest speaks of."""
    for i, column in enumerate(columns):
        path = _file_of(directory, i)
        size = os.path.getsize(path) if os.path.exists(path) else 0
        _require_size(directory, manifest, column, path, size)


def _require_size(directory: str, manifest: Manifest, column: Column, path: str, size: int) -> None:
    expected = manifest.rows * column.row_bytes
    if size < expected:
        row = size // column.row_bytes
        raise ValueError(
            f"{path!r} has {size} bytes, expected {expected}: from block "
            f"{row // manifest.block_rows}, row {row} on it is cut off. " + _to_do(directory)
        )
    if size > expected and manifest.is_finished:
        raise ValueError(
            f"{path!r} has {size} bytes, expected {expected}: something was written behind its "
            f"last row, {manifest.rows - 1}. " + _to_do(directory)
        )


class Files:
    """The rows of a complete cache on disk. Each block is compared with its checksums once."""

    def __init__(self, directory: str, manifest: Manifest, columns: Sequence[Column]):
        self._directory, self._manifest, self._columns = directory, manifest, columns
        require_sizes(directory, manifest, columns)
        self._paths = [_file_of(directory, i) for i in range(len(columns))]
        self._maps = [
            _mapped(path, manifest.rows * column.row_bytes)
            for path, column in zip(self._paths, columns, strict=True)
        ]
        self.arrays = [
            np.frombuffer(data, np.uint8).view(column.stored).reshape(manifest.rows, *column.shape)
            for data, column in zip(self._maps, columns, strict=True)
        ]
        blocks = -(-manifest.rows // manifest.block_rows)
        self._is_unread = np.ones(blocks, bool)
        self._unread = blocks

    def require(self, indices: np.ndarray) -> None:
        """Raise where rows are not as they were written.

        A file that was cut off meanwhile would end the process that reads behind its end.
        """
        for i, data in enumerate(self._maps):
            size = data.size() if isinstance(data, mmap.mmap) else 0
            _require_size(self._directory, self._manifest, self._columns[i], self._paths[i], size)
        if self._unread:
            rows = indices % self._manifest.rows  # those from the end are negative
            blocks = rows // self._manifest.block_rows
            for block in np.unique(blocks[self._is_unread[blocks]]).tolist():
                self._require_block(block)

    def _require_block(self, block: int) -> None:
        first = block * self._manifest.block_rows
        stop = min(first + self._manifest.block_rows, self._manifest.rows)
        for i, array in enumerate(self.arrays):
            found = zlib.crc32(array[first:stop].reshape(-1).view(np.uint8).data)
            expected = self._manifest.checksums[i][block]
            if found != expected:
                raise ValueError(
                    f"{self._paths[i]!r} is damaged in block {block}, rows {first} to "
                    f"{stop - 1}: the checksum is {found:08x}, expected {expected:08x}. "
                    + _to_do(self._directory)
                )
        self._is_unread[block] = False
        self._unread -= 1


def _mapped(path: str, size: int) -> mmap.mmap | bytes:
    """The bytes of a file, read from the disk when they are looked at."""
    if size == 0:  # which cannot be mapped
        return b""
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
