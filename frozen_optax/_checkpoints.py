"""Checkpoints of what was trained, to be joined with the backbone that it was trained on."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence

import jax

from frozen_optax import _bits
from frozen_optax._checkpoint_files import (
    Manifest,
    Place,
    digests_of,
    directory_of,
    entries_of,
    last_save,
    manager_of,
    read,
    read_manifest,
    saves_in,
    to_store,
    write,
)
from frozen_optax._digests import kind
from frozen_optax._messages import Fault, listed, quoted
from frozen_optax._selection import frozen_selector
from frozen_optax._selectors import resolve
from frozen_optax._trees import is_traced, objects_in
from frozen_optax._typing import Frozen, PyTree, Where
from frozen_optax._variables import refuse_tied
from frozen_optax._where import named_leaves


def _places(where: Where | None, tree: PyTree) -> list[Place]:
    """The leaves that `where` names, without what has no bits to keep, such as functions."""
    refuse_tied(tree)
    leaves = jax.tree.leaves(tree)
    places = [Place(index, path, leaves[index]) for index, path in named_leaves(where, tree)]
    for place in places:
        if is_traced(place.leaf):
            raise TypeError(
                f"the values of {place.path!r} are not known while tracing. Save and load outside "
                "of the compiled function."
            )
    objects = objects_in(tree)
    return [place for place in places if place.index not in objects]


def _refuse_structs(places: Sequence[Place], what_to_do: str) -> None:
    for place in places:
        if isinstance(place.leaf, jax.ShapeDtypeStruct):
            raise TypeError(f"{place.path!r} has no values, it is {place.leaf}. {what_to_do}")


def _grouped(pairs: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path, digest in pairs:
        found.setdefault(path, []).append(digest)
    return found


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
    joins it with the backbone again, and tells if it is another one. A leaf of which a part was
    trained, as by `with_frozen(..., elements=...)`, is saved whole.

    A save is complete or not there: killed at any moment it leaves what was at `path` before, and
    the next save clears away its remains. Orbax writes it, each process its own part of an array
    that lies on several; all of them have to call it. It returns when all is written.

    Args:
      path: of a directory, which is made. One with a scheme (`gs://...`) is Orbax's to understand.
      params: a pytree of arrays. What is no array and no number (a function) is not saved, and in
        an Equinox module no number of Python's either. Of a whole state, optimizer and all, what is
        not frozen is saved in one go.
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
    # A leaf that is frozen in part is saved whole.
    selector = frozen_selector(frozen, trainable, where, in_part=True)
    resolution = resolve(selector, params, to_train=True)
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
    directory = directory_of(path)
    with manager_of(directory) as manager:
        saves = saves_in(manager)
    if saves and not overwrite:
        raise FileExistsError(
            f"there is a checkpoint at {directory!r}. Write overwrite=True to replace it, or give "
            "another path."
        )
    frozen_digests = zip((place.path for place in kept), digests_of(kept), strict=True)
    manifest = Manifest(entries_of(trained), _grouped(list(frozen_digests)))
    stored = {
        entry.name: to_store(place.leaf, entry.as_bits)
        for place, entry in zip(trained, manifest.trained, strict=True)
        if entry.name
    }
    write(directory, max(saves, default=-1) + 1, manifest, stored)


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
      array of numpy or the Python number, that it has in `params`. One that was weakly typed is so
      again, but for arrays that lie on several processes.

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
    directory = directory_of(path)
    places = _places(where, params)
    with manager_of(directory) as manager:
        number = last_save(manager)
        manifest = read_manifest(manager, number)
        _require_fit(directory, manifest, places)
        _require_backbone(directory, manifest, [p for p in places if p.path in manifest.frozen])
        by_path: dict[str, list[Place]] = {}
        for place in places:
            by_path.setdefault(place.path, []).append(place)
        trained = [by_path[entry.path].pop(0) for entry in manifest.trained]
        _require_precision(directory, trained)
        found = read(manager, number, manifest, trained)
    leaves = jax.tree.leaves(params)
    for place, leaf in zip(trained, found, strict=True):
        leaves[place.index] = leaf
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def _require_fit(directory: str, manifest: Manifest, places: Sequence[Place]) -> None:
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


def _require_backbone(directory: str, manifest: Manifest, kept: Sequence[Place]) -> None:
    _refuse_structs(kept, "It was frozen, so the checkpoint has none: load the backbone first.")
    expected = {path: iter(entry) for path, entry in manifest.frozen.items()}
    faults: list[Fault] = []
    for place, here in zip(kept, digests_of(kept), strict=True):
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


def _require_precision(directory: str, places: Sequence[Place]) -> None:
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
