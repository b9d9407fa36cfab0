"""Checkpoints of what was trained, to be joined with the backbone that it was trained on.

On disk each save is a directory `trained_leaves_<number>` in the one that the user names, written
by a `CheckpointManager` of Orbax: it appears at once when it is complete, and the one before it
goes after that. So there is always the old or the new one, and what a killed save has left is told
by its name. In it Orbax keeps the trained leaves as a flat dictionary, and beside them a manifest:
their digests, and those of the frozen leaves.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import itertools
import json
import os
import re
import urllib.parse
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from frozen_optax import _bits
from frozen_optax._fingerprints import digests, kind
from frozen_optax._messages import Fault, listed, quoted
from frozen_optax._selection import resolve_frozen
from frozen_optax._trees import is_number, is_traced
from frozen_optax._typing import Array, DType, Frozen, Leaf, PyTree, Where
from frozen_optax._variables import refuse_tied
from frozen_optax._where import named_leaves

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


@dataclasses.dataclass(frozen=True)
class _Place:
    """A leaf that has a value, and where it stands among all leaves of the tree."""

    index: int
    path: str
    leaf: Leaf


def _places(where: Where | None, tree: PyTree) -> list[_Place]:
    """The leaves that `where` names, without what has no bits to keep, such as functions."""
    refuse_tied(tree)
    leaves = jax.tree.leaves(tree)
    places = [_Place(index, path, leaves[index]) for index, path in named_leaves(where, tree)]
    for place in places:
        if is_traced(place.leaf):
            raise TypeError(
                f"the values of {place.path!r} are not known while tracing. Save and load outside "
                "of the compiled function."
            )
    return [place for place in places if is_number(place.leaf)]


def _refuse_structs(places: Sequence[_Place], what_to_do: str) -> None:
    for place in places:
        if isinstance(place.leaf, jax.ShapeDtypeStruct):
            raise TypeError(f"{place.path!r} has no values, it is {place.leaf}. {what_to_do}")


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
class _Entry:
    """What the manifest says of a trained leaf.

    Attributes:
      path: its path; several leaves may share one.
      digest: of its bits, as in a fingerprint.
      name: under which Orbax has it; none if it has no elements, which Orbax refuses.
      as_bits: whether it is there as unsigned integers.
    """

    path: str
    digest: str
    name: str | None
    as_bits: bool

    @property
    def kind(self) -> str:
        """Its dtype and shape."""
        return self.digest.rpartition(" ")[0]


def _digests(places: Sequence[_Place]) -> list[str]:
    return digests([(place.path, place.leaf) for place in places])


def _entries(places: Sequence[_Place]) -> list[_Entry]:
    found: list[_Entry] = []
    taken: set[str] = set()
    for place, digest in zip(places, _digests(places), strict=True):
        # Orbax makes directories of slashes, and mixes up `a` and `a/0`; "%" stands for the root.
        quoted_path = urllib.parse.quote(place.path, safe="") or "%"
        numbered = (f"{quoted_path}#{number}" for number in itertools.count(2))
        names = itertools.chain([quoted_path], numbered)
        name = next(name for name in names if name not in taken) if np.size(place.leaf) else None
        taken.add(name or "")
        found.append(_Entry(place.path, digest, name, str(_dtype(place.leaf)) not in _AS_IT_IS))
    return found


def _grouped(pairs: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path, digest in pairs:
        found.setdefault(path, []).append(digest)
    return found


@dataclasses.dataclass(frozen=True)
class _Manifest:
    """What a checkpoint says of itself: the trained leaves, and of each frozen path the digests."""

    trained: list[_Entry]
    frozen: dict[str, list[str]]

    def to_json(self) -> dict[str, Any]:
        body: dict[str, Any] = {
            "format": _FORMAT,
            "trained": [dataclasses.asdict(entry) for entry in self.trained],
            "frozen": self.frozen,
        }
        return body | {"sha256": _sha256(body)}

    @classmethod
    def of_json(cls, body: dict[str, Any]) -> _Manifest:
        """Raises anything at all where it is none."""
        if body["format"] != _FORMAT:
            raise ValueError(
                f"its format is {body['format']!r}, and this version of frozen_optax reads "
                f"{_FORMAT!r}"
            )
        if body.pop("sha256") != _sha256(body):
            raise ValueError("its manifest is not the one that was written")
        return cls([_Entry(**entry) for entry in body["trained"]], body["frozen"])


def _sha256(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _directory(path: str | os.PathLike[str]) -> str:
    """An absolute path, which Orbax asks for; one with a scheme is."""
    text = os.fspath(path)
    return text if "://" in text else os.path.abspath(text)


def _manager(directory: str, *, to_save: bool = False) -> Any:
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


def _saves(manager: Any) -> list[int]:
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


def save_trained(
    path: str | os.PathLike[str],
    params: PyTree,
    frozen: Frozen = None,
    *,
    trainable: Frozen = None,
    where: Where | None = None,
    overwrite: bool = False,
) -> None:
    """Writes the trained leaves, and a fingerprint of the frozen ones they were trained with.

    That is as large as what was trained, kilobytes beside a backbone of gigabytes. `load_trained`
    joins it with the backbone again, and tells if it is another one.

    A save is complete or not there: killed at any moment it leaves what was at `path` before, and
    the next save clears away its remains. Orbax writes it, each process its own part of an array
    that lies on several; all of them have to call it. It returns when all is written.

    Args:
      path: of a directory, which is made. One with a scheme (`gs://...`) is Orbax's to understand.
      params: a pytree of arrays. What is no array and no number (a function in an Equinox module)
        is not saved. Of a whole state, optimizer and all, what is not frozen is saved in one go.
      frozen: the leaves that were frozen: a glob on their paths (`"encoder"`), a compiled regex, a
        `Selector`, a list of these, a predicate `(path, leaf) -> bool`, a bool, a pytree of bools,
        or the optimizer that `with_frozen` returned.
      trainable: the leaves that were trained, instead of `frozen`: exactly one of the two is given.
      where: a function that returns the parameters in a larger state (`lambda state:
        state.params`), where `params` is one. Paths are relative to what it returns, and the rest
        of the state is not saved.
      overwrite: whether a checkpoint that is at `path` may be replaced. It is there until the new
        one is complete.

    Raises:
      FileExistsError: there is a checkpoint at `path`, and `overwrite` is not set.
      TypeError: a leaf is traced, or a `jax.ShapeDtypeStruct`; not exactly one of `frozen` and
        `trainable` is given, or it is no way to select leaves.
      ValueError: there is something else at `path`; no leaf that was trained is an array or a
        number; a leaf was donated; a trained and a frozen leaf share a path; one `nnx.Variable`
        stands at two places; a pattern selects nothing, or a mask does not fit. Nothing is written
        then.

    Example:
      >>> import frozen_optax as fo, jax.numpy as jnp, tempfile
      >>> path = tempfile.mkdtemp() + "/head"
      >>> fo.save_trained(path, {"encoder": jnp.ones(2), "head": jnp.array([1.0, -0.0])}, "encoder")
      >>> fo.load_trained(path, {"encoder": jnp.ones(2), "head": jnp.zeros(2)})
      {'encoder': Array([1., 1.], dtype=float32), 'head': Array([ 1., -0.], dtype=float32)}
    """
    resolution = resolve_frozen(frozen, trainable, params, where=where, to_train=True)
    places = _places(where, params)
    _refuse_structs(places, "Save the parameters themselves.")
    trained = [place for place in places if not resolution.selected[place.index]]
    kept = [place for place in places if resolution.selected[place.index]]
    both = sorted({place.path for place in trained} & {place.path for place in kept})
    if both:
        raise ValueError(
            f"a trained and a frozen leaf share the path {both[0]!r}, and leaves are loaded by "
            "path. Give one of them another name."
        )
    directory = _directory(path)
    with _manager(directory) as manager:
        saves = _saves(manager)
    if saves and not overwrite:
        raise FileExistsError(
            f"there is a checkpoint at {directory!r}. Write overwrite=True to replace it, or give "
            "another path."
        )
    frozen_digests = zip((place.path for place in kept), _digests(kept), strict=True)
    manifest = _Manifest(_entries(trained), _grouped(list(frozen_digests)))
    stored = {
        entry.name: _to_store(place.leaf, entry.as_bits)
        for place, entry in zip(trained, manifest.trained, strict=True)
        if entry.name
    }
    _write(directory, max(saves, default=-1) + 1, manifest, stored)


def _to_store(leaf: Leaf, as_bits: bool) -> Array:
    """A leaf as Orbax keeps it."""
    if _is_spread(leaf):
        return _bits_on_device(leaf) if as_bits else leaf
    host = leaf if _bits.is_key(leaf) else np.asarray(leaf)
    return _bits.bits(host) if as_bits else host


def _write(directory: str, number: int, manifest: _Manifest, stored: dict[str, Array]) -> None:
    import orbax.checkpoint as ocp

    items: dict[str, Any] = {"manifest": ocp.args.JsonSave(manifest.to_json())}
    if stored:  # Orbax refuses an empty tree
        items["leaves"] = ocp.args.PyTreeSave(stored)
    with _manager(directory, to_save=True) as manager:
        manager.save(number, args=ocp.args.Composite(**items), force=True)


def load_trained(
    path: str | os.PathLike[str], params: PyTree, *, where: Where | None = None
) -> PyTree:
    """Joins what `save_trained` has written with the backbone that it was trained on.

    Which leaves were trained is known from the checkpoint, so a run that freezes others loads it
    as well. Nothing is changed in place, and where it raises, nothing is changed at all.

    Args:
      path: what was given to `save_trained`.
      params: a tree with the leaves that were saved, and the backbone in it. What stands in the
        place of a trained leaf says where that is to lie, and nothing else: an array of its shape
        and dtype, donated or not, or a `jax.ShapeDtypeStruct`, with a sharding or without.
      where: a function that returns the parameters in a larger state (`lambda state:
        state.params`), where `params` is one. Paths are relative to what it returns.

    Returns:
      A tree in the structure of `params`. The leaves that were frozen are those of `params`, the
      very same objects, and so is all that `where` does not name, and what is no array and no
      number. The trained ones hold the bits that were saved, each with the sharding, or as the
      array of numpy or the Python number, that it has in `params`. None is weakly typed.

    Raises:
      FileNotFoundError: there is nothing at `path`.
      ValueError: what is at `path` is damaged, unfinished, or no checkpoint of `save_trained`; the
        backbone has other bits than the one that was trained on; or the tree lacks a leaf, has one
        more, or one of another shape or dtype. The message names `path`, and the leaves with what
        was found and expected.
      TypeError: a leaf is traced, or one that was frozen has no values.

    Example:
      >>> import frozen_optax as fo, jax.numpy as jnp, tempfile
      >>> path = tempfile.mkdtemp() + "/head"
      >>> fo.save_trained(path, {"encoder": jnp.ones(2), "head": jnp.ones(2)}, trainable="head")
      >>> fo.load_trained(path, {"encoder": jnp.zeros(2), "head": jnp.zeros(2)})
      Traceback (most recent call last):
        ...
      ValueError: the backbone is not the one that the checkpoint at '...' was trained on. 1 of ...
        encoder: float32[2] ... here, float32[2] ... there
      Load the backbone first ...
    """
    directory = _directory(path)
    places = _places(where, params)
    with _manager(directory) as manager:
        number = _last_save(manager)
        manifest = _read_manifest(manager, number)
        _require_fit(directory, manifest, places)
        _require_backbone(directory, manifest, [p for p in places if p.path in manifest.frozen])
        by_path: dict[str, list[_Place]] = {}
        for place in places:
            by_path.setdefault(place.path, []).append(place)
        trained = [by_path[entry.path].pop(0) for entry in manifest.trained]
        _require_precision(directory, trained)
        found = _read(manager, number, manifest, trained)
    leaves = jax.tree.leaves(params)
    for place, leaf in zip(trained, found, strict=True):
        leaves[place.index] = leaf
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def _last_save(manager: Any) -> int:
    saves = _saves(manager)
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


def _read_manifest(manager: Any, number: int) -> _Manifest:
    import orbax.checkpoint as ocp

    args = ocp.args.Composite(manifest=ocp.args.JsonRestore())
    try:
        return _Manifest.of_json(manager.restore(number, args=args)["manifest"])
    except Exception as error:  # of Orbax, of what it is built on, or of what is read
        raise _unreadable(manager, error) from error


def _require_fit(directory: str, manifest: _Manifest, places: Sequence[_Place]) -> None:
    """Raise where `params` has other paths, shapes or dtypes than the checkpoint."""
    there = _grouped([(entry.path, entry.kind) for entry in manifest.trained])
    state = dict.fromkeys(there, "trained") | dict.fromkeys(manifest.frozen, "frozen")
    for path, entry in manifest.frozen.items():
        there[path] = [digest.rpartition(" ")[0] for digest in entry]
    here = _grouped([(place.path, kind(place.leaf)) for place in places])
    faults: list[Fault] = []
    for path, kinds in there.items():
        expected = f"{', '.join(kinds)} ({state[path]})"
        if path not in here:
            close = difflib.get_close_matches(path, here.keys() - there.keys(), n=2, cutoff=0)
            nearest = f"; the nearest that it has are {quoted(close)}" if close else ""
            faults.append(Fault(path, f"{expected} in the checkpoint, not in params{nearest}"))
        elif here[path] != kinds:
            found = ", ".join(here[path])
            faults.append(Fault(path, f"{expected} in the checkpoint, {found} in params"))
    faults += [
        Fault(path, f"{', '.join(kinds)} in params, not in the checkpoint")
        for path, kinds in here.items()
        if path not in there
    ]
    if faults:
        heading = f"the checkpoint at {directory!r} is of another tree than params:"
        lines = listed(heading, sorted(faults, key=lambda fault: fault.path))
        lines.append(
            "Make params as they were made for the run that saved. In a larger state, where= "
            "names them; it may also leave out what has been added since."
        )
        raise ValueError("\n".join(lines))


def _require_backbone(directory: str, manifest: _Manifest, kept: Sequence[_Place]) -> None:
    _refuse_structs(kept, "It was frozen, so the checkpoint has none: load the backbone first.")
    expected = {path: iter(entry) for path, entry in manifest.frozen.items()}
    faults: list[Fault] = []
    for place, here in zip(kept, _digests(kept), strict=True):
        there = next(expected[place.path])
        if here != there:
            faults.append(Fault(place.path, f"{here} here, {there} there"))
    if faults:
        heading = (
            f"the backbone is not the one that the checkpoint at {directory!r} was trained on. "
            f"{len(faults)} of {len(kept)} frozen leaves have other bits:"
        )
        lines = listed(heading, faults)
        lines.append(
            "Load the backbone first that it was trained on, to the bit: in the same dtype, from "
            "the same file, and with what was trained before and frozen then."
        )
        raise ValueError("\n".join(lines))


def _require_precision(directory: str, places: Sequence[_Place]) -> None:
    for place in places:
        on_device = isinstance(place.leaf, (jax.Array, jax.ShapeDtypeStruct))
        if not on_device or _bits.is_key(place.leaf):
            continue
        dtype = place.leaf.dtype
        if jax.dtypes.canonicalize_dtype(dtype) != dtype:
            raise ValueError(
                f"the leaf {place.path!r} of the checkpoint at {directory!r} is {dtype}, and "
                "64-bit types are not enabled. Set jax_enable_x64, or pass an array of numpy in "
                "its place."
            )


def _read(manager: Any, number: int, manifest: _Manifest, places: Sequence[_Place]) -> list[Leaf]:
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
        read = digests([(place.path, leaf) for place, leaf in zip(places, found, strict=True)])
    except Exception as error:
        raise _unreadable(manager, error) from error
    for entry, digest in zip(manifest.trained, read, strict=True):
        if digest != entry.digest:
            reason = f"{entry.path!r} was saved as {entry.digest} and reads as {digest}."
            raise _unreadable(manager, reason)
    return found


def _restore_args(asked: Leaf, entry: _Entry) -> Any:
    import orbax.checkpoint as ocp

    if not _is_spread(asked):
        return ocp.RestoreArgs(restore_type=np.ndarray)
    dtype = _bits.bits(np.zeros(1, asked.dtype)).dtype if entry.as_bits else asked.dtype
    return ocp.ArrayRestoreArgs(sharding=asked.sharding, dtype=dtype, global_shape=asked.shape)


def _as_asked(asked: Leaf, stored: Array | None, entry: _Entry) -> Leaf:
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
