"""How what was trained is kept on disk: one directory a save, by Orbax, with a manifest.

On disk each save is a directory `trained_leaves_<number>` in the one that the user names, written
by a `CheckpointManager` of Orbax: it appears at once when it is complete, and the one before it
goes after that. So there is always the old or the new one, and what a killed save has left is told
by its name. In it Orbax keeps the trained leaves as a flat dictionary, and beside them a manifest:
their digests, and those of the frozen leaves.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import urllib.parse
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from frozen_optax import _bits
from frozen_optax._digests import digests
from frozen_optax._manifests import sealed, unsealed
from frozen_optax._messages import quoted
from frozen_optax._typing import Array, DType, Leaf

_FORMAT = "frozen_optax: trained leaves, 1"
_PREFIX = "trained_leaves"
_OURS = re.compile(rf"{_PREFIX}_\d+(\.orbax-checkpoint-tmp.*)?|\..*")  # or hidden, as .DS_Store is

# What Orbax keeps to the bit, from the oldest version that is supported to the newest. All else is
# handed to it as unsigned integers: it refuses uint4 and float8_e4m3 and has int4 and float8_e5m2,
# which the next version may see another way, and it turns numbers of another byte order around.
_INTEGERS = {f"{sign}int{width}" for sign in ("", "u") for width in (8, 16, 32, 64)}
_FLOATS = {"float16", "bfloat16", "float32", "float64", "complex64", "complex128"}
_AS_IT_IS = frozenset(_INTEGERS | _FLOATS | {"bool"})

_bits_on_device = jax.jit(_bits.bits)
_of_bits_on_device = jax.jit(_bits.of_bits, static_argnums=1)


# --- what is kept, and what is said of it


@dataclasses.dataclass(frozen=True)
class Place:
    """A leaf that has a value, and where it stands among all leaves of the tree."""

    index: int
    path: str
    leaf: Leaf


def _dtype(leaf: Leaf) -> DType:
    return leaf.dtype if _bits.is_array(leaf) else np.asarray(leaf).dtype


def _is_spread(leaf: Leaf) -> bool:
    """Whether a leaf lies on several devices, and is not to be gathered on the host.

    With several processes, an array that one of them has for itself is no part of a larger one.
    Each has its own, and the first of them writes it.
    """
    sharding = getattr(leaf, "sharding", None)  # a struct may have none
    if sharding is None or _bits.is_key(leaf):
        return False
    if _bits.width(leaf.dtype) == 6:  # whose bits no compiled function can read
        return False
    if not sharding.is_fully_addressable:
        return True
    return len(sharding.device_set) > 1 and jax.process_count() == 1


@dataclasses.dataclass(frozen=True)
class Entry:
    """What the manifest says of a trained leaf.

    Attributes:
      path: its path; several leaves may share one.
      digest: of its bits, as in a fingerprint.
      name: under which Orbax has it; none if it has no elements, which Orbax refuses.
      as_bits: whether it is there as unsigned integers.
      is_weak: whether it was weakly typed, as `jnp.array(1.0)` is.
    """

    path: str
    digest: str
    name: str | None
    as_bits: bool
    is_weak: bool = False

    @property
    def kind(self) -> str:
        """Its dtype and shape."""
        return self.digest.rpartition(" ")[0]


def digests_of(places: Sequence[Place]) -> list[str]:
    """The digest of each leaf, as in a fingerprint."""
    return digests([(place.path, place.leaf) for place in places])


def entries_of(places: Sequence[Place]) -> list[Entry]:
    """What the manifest says of each trained leaf."""
    found: list[Entry] = []
    taken: set[str] = set()
    for place, digest in zip(places, digests_of(places), strict=True):
        # Orbax makes directories of slashes, and mixes up `a` and `a/0`; "%" stands for the root.
        quoted_path = urllib.parse.quote(place.path, safe="") or "%"
        numbered = (f"{quoted_path}#{number}" for number in itertools.count(2))
        names = itertools.chain([quoted_path], numbered)
        name = next(name for name in names if name not in taken) if np.size(place.leaf) else None
        taken.add(name or "")
        as_bits = str(_dtype(place.leaf)) not in _AS_IT_IS
        is_weak = bool(getattr(place.leaf, "weak_type", False))
        found.append(Entry(place.path, digest, name, as_bits, is_weak))
    return found


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself: the trained leaves, and of each frozen path the digests."""

    trained: list[Entry]
    frozen: dict[str, list[str]]

    def to_json(self) -> dict[str, Any]:
        """The manifest as it is written, with its own digest."""
        body: dict[str, Any] = {
            "format": _FORMAT,
            "trained": [dataclasses.asdict(entry) for entry in self.trained],
            "frozen": self.frozen,
        }
        return sealed(body)

    @classmethod
    def of_json(cls, body: dict[str, Any]) -> Manifest:
        """Raises anything at all where it is none."""
        body = unsealed(body, _FORMAT)
        return cls([Entry(**entry) for entry in body["trained"]], body["frozen"])


# --- on disk


def directory_of(path: str | os.PathLike[str]) -> str:
    """An absolute path, which Orbax asks for; one with a scheme is."""
    text = os.fspath(path)
    return text if "://" in text else os.path.abspath(text)


def manager_of(directory: str, *, to_save: bool = False) -> Any:
    """Orbax's keeper of a directory of saves; it makes and removes nothing unless it is to save."""
    import orbax.checkpoint as ocp

    options = ocp.CheckpointManagerOptions(
        step_prefix=_PREFIX,
        max_to_keep=1,
        create=to_save,
        cleanup_tmp_directories=to_save,
        enable_async_checkpointing=False,
    )
    return ocp.CheckpointManager(directory, options=options, item_names=("manifest", "leaves"))


def saves_in(manager: Any) -> list[int]:
    """The numbers of the complete saves in a directory, which has nothing else in it."""
    root = manager.directory  # of etils, which knows buckets, too
    if root.exists() and not root.is_dir():
        raise ValueError(
            f"{str(root)!r} is a file, and a checkpoint of save_trained is a directory. Give "
            "another path."
        )
    names = [each.name for each in root.iterdir()] if root.exists() else []
    foreign = sorted(name for name in names if not _OURS.fullmatch(name))
    if foreign:
        raise ValueError(
            f"{str(root)!r} is no checkpoint of save_trained: {quoted(foreign)} in it is none of "
            "its own. Give another path, one of a directory that save_trained has made or is to "
            "make."
        )
    return list(manager.all_steps())


def to_store(leaf: Leaf, as_bits: bool) -> Array:
    """A leaf as Orbax keeps it."""
    if _is_spread(leaf):
        return _bits_on_device(leaf) if as_bits else leaf
    host = leaf if _bits.is_key(leaf) else np.asarray(leaf)
    return _bits.bits(host) if as_bits else host


def write(directory: str, number: int, manifest: Manifest, stored: dict[str, Array]) -> None:
    """Writes a save, which is there at once when all of it is."""
    import orbax.checkpoint as ocp

    items: dict[str, Any] = {"manifest": ocp.args.JsonSave(manifest.to_json())}
    if stored:  # Orbax refuses an empty tree
        items["leaves"] = ocp.args.PyTreeSave(stored)
    with manager_of(directory, to_save=True) as manager:
        manager.save(number, args=ocp.args.Composite(**items), force=True)


def last_save(manager: Any) -> int:
    """The number of the newest complete save; an error if there is none."""
    saves = saves_in(manager)
    if saves:
        return max(saves)
    directory = str(manager.directory)
    if manager.directory.exists():
        raise ValueError(
            f"there is no complete checkpoint at {directory!r}: it is empty, or the save was "
            "killed before its end. Save again."
        )
    raise FileNotFoundError(
        f"there is no checkpoint at {directory!r}. Give the path that was given to save_trained."
    )


def _unreadable(manager: Any, reason: object) -> ValueError:
    first_line = (str(reason) or type(reason).__name__).splitlines()[0]
    return ValueError(
        f"the checkpoint at {str(manager.directory)!r} cannot be read, it is damaged or was "
        f"removed meanwhile: {first_line}\n"
        "Take another copy of it, or save again with overwrite=True."
    )


def read_manifest(manager: Any, number: int) -> Manifest:
    """The manifest of a save; an error that says so if it is damaged."""
    import orbax.checkpoint as ocp

    args = ocp.args.Composite(manifest=ocp.args.JsonRestore())
    try:
        return Manifest.of_json(manager.restore(number, args=args)["manifest"])
    except Exception as error:  # of Orbax, of what it is built on, or of what is read
        raise _unreadable(manager, error) from error


def read(manager: Any, number: int, manifest: Manifest, places: Sequence[Place]) -> list[Leaf]:
    """The trained leaves, each as the leaf at its place asks for."""
    import orbax.checkpoint as ocp

    pairs = list(zip(places, manifest.trained, strict=True))
    how = {entry.name: _restore_args(place.leaf, entry) for place, entry in pairs if entry.name}
    try:
        stored: dict[str | None, Array] = {}
        if how:
            leaves = ocp.args.PyTreeRestore(item=dict.fromkeys(how, 0), restore_args=how)
            stored = manager.restore(number, args=ocp.args.Composite(leaves=leaves))["leaves"]
        found = [_as_asked(place.leaf, stored.get(entry.name), entry) for place, entry in pairs]
        found = [
            _as_weak(leaf) if entry.is_weak and isinstance(leaf, jax.Array) else leaf
            for leaf, entry in zip(found, manifest.trained, strict=True)
        ]
        read = digests([(place.path, leaf) for place, leaf in zip(places, found, strict=True)])
    except Exception as error:
        raise _unreadable(manager, error) from error
    for entry, digest in zip(manifest.trained, read, strict=True):
        if digest != entry.digest:
            reason = f"{entry.path!r} was saved as {entry.digest} and reads as {digest}."
            raise _unreadable(manager, reason)
    return found


def _restore_args(asked: Leaf, entry: Entry) -> Any:
    import orbax.checkpoint as ocp

    if not _is_spread(asked):
        return ocp.RestoreArgs(restore_type=np.ndarray)
    dtype = _bits.bits(np.zeros(1, asked.dtype)).dtype if entry.as_bits else asked.dtype
    return ocp.ArrayRestoreArgs(sharding=asked.sharding, dtype=dtype, global_shape=asked.shape)


def _as_asked(asked: Leaf, stored: Array | None, entry: Entry) -> Leaf:
    """What was stored, as an array of the kind and on the devices of the leaf that is asked for."""
    if _bits.is_key(asked):
        return _put(_keys(asked, stored), asked)
    dtype = _dtype(asked)
    if isinstance(stored, jax.Array):
        if not entry.as_bits:
            return stored
        return jax.device_put(_of_bits_on_device(stored, dtype), asked.sharding)
    if stored is None:
        value = np.zeros(np.shape(asked), dtype)
    else:
        value = _bits.of_bits(stored, dtype) if entry.as_bits else stored
    if isinstance(asked, (jax.Array, jax.ShapeDtypeStruct)):
        return _put(value, asked)
    if isinstance(asked, np.ndarray):
        return value
    return value[()] if isinstance(asked, np.generic) else value.item()


def _put(value: Array, asked: Leaf) -> jax.Array:
    """An array where the one that is asked for lies; anywhere if that may lie anywhere."""
    is_put = asked.committed if isinstance(asked, jax.Array) else asked.sharding is not None
    return jax.device_put(value, asked.sharding) if is_put else jnp.asarray(value)


@jax.jit
def _weakly_typed(value: Array) -> jax.Array:
    for zero in map(jnp.asarray, (0, 0.0, 0j)):
        if zero.dtype == value.dtype:
            return jnp.broadcast_to(zero, value.shape).at[...].set(value)
    return value  # 64-bit types are enabled now, and were not when it was saved


def _as_weak(leaf: jax.Array) -> jax.Array:
    """An array as one that is weakly typed, of the same bits at the same place.

    One of which other processes hold a part stays as it is.
    """
    if not leaf.is_fully_addressable:
        return leaf
    made = _weakly_typed(np.asarray(leaf))
    return jax.device_put(made, leaf.sharding) if leaf.committed else made


def _keys(asked: Leaf, stored: Array | None) -> jax.Array:
    if isinstance(asked, jax.Array):
        impl = jax.random.key_impl(asked)
    else:
        known = ("threefry2x32", "rbg", "unsafe_rbg")
        impl = next(name for name in known if jax.random.key(0, impl=name).dtype == asked.dtype)
    if stored is None:
        data = jax.random.key_data(jax.random.key(0, impl=impl))
        stored = np.zeros((*asked.shape, *data.shape), data.dtype)
    return jax.random.wrap_key_data(jnp.asarray(stored), impl=impl)
