"""A state over the trainable part, as it is stored between steps and as the optimizer made it.

The optimizer sees a hole for each frozen leaf, so its state has one wherever it copies the
parameters' structure. What is stored has one for each wholly frozen subtree: the leaves are the
same, and nodes cost time at every call of a compiled function. Which structure a stored state had
is found out again from the optimizer itself, so a state may come from anywhere: from a checkpoint,
from another process, or from a transformation that was made anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeAlias

import jax

from frozen_optax._resolution import Resolution
from frozen_optax._trees import Memory, is_hole, require_same_structure
from frozen_optax._typing import Leaf, PyTree, TreeDef

_MAX_FORMS = 256  # that a state may take

# Gives the shapes of a state, step by step, if they are needed: to find them out is to trace.
Forms: TypeAlias = Callable[[], Iterator[PyTree]]


def forms(init: Callable[[], PyTree], update: Callable[[PyTree], PyTree]) -> Iterator[PyTree]:
    """The shapes of a state, step by step, until they have been there before.

    Most states have one form. Some optimizers make a part of theirs when they first see a gradient,
    or gather the last few.
    """
    form = jax.eval_shape(init)
    known: set[TreeDef] = set()
    while jax.tree.structure(form) not in known and len(known) < _MAX_FORMS:
        yield form
        known.add(jax.tree.structure(form))
        form = jax.eval_shape(update, form)


def _layouts(resolution: Resolution, forms: Iterable[PyTree]) -> Iterator[tuple[TreeDef, TreeDef]]:
    """Form by form, the structure that is stored and the one that was made.

    Two forms are never stored in the same way: a later one, of which that would be so, is stored as
    it is.
    """
    taken: dict[TreeDef, TreeDef] = {}
    for form in forms:
        made = jax.tree.structure(form)
        stored = resolution.prune(made)
        if taken.setdefault(stored, made) != made:
            stored = made
            taken[stored] = made
        yield stored, made


class StateLayout:
    """How the states of one optimizer are stored, whatever is frozen.

    It holds no state. What it remembers makes it faster, and nothing else.
    """

    def __init__(self) -> None:
        self._made: Memory[TreeDef] = Memory()

    def store_first(self, resolution: Resolution, state: PyTree) -> PyTree:
        """What `init` has made, as it is kept."""
        if resolution.is_whole:
            return state
        leaves, made = jax.tree.flatten(state)
        return self._keep(resolution, resolution.prune(made), made, leaves)

    def load(self, resolution: Resolution, state: PyTree, forms: Forms) -> PyTree:
        """A stored state as the optimizer made it.

        Args:
          resolution: which parameters are frozen.
          state: a state as it was kept.
          forms: are asked where a state in this structure was not seen before.

        Raises:
          ValueError: it is no state of this optimizer for these leaves; the message names the path.
        """
        # A state with a hole where nothing is frozen belongs to another choice, and is looked at.
        if resolution.is_whole and not any(map(is_hole, jax.tree.leaves(state, is_leaf=is_hole))):
            return state
        leaves, stored = jax.tree.flatten(state)
        made = self._made.get((resolution, stored))
        if made is None:
            found = _find(resolution, state, stored, forms)
            made = self._made.keep((resolution, stored), found)
        return jax.tree.unflatten(made, leaves)

    def store(
        self,
        resolution: Resolution,
        state: PyTree,
        before: tuple[PyTree, PyTree],
        forms: Forms,
    ) -> PyTree:
        """What an update has made, as it is kept.

        Args:
          resolution: which parameters are frozen.
          state: as the optimizer made it.
          before: the state that the update began with, as it was kept and as `load` gave it.
          forms: are asked where the form has changed, as the new one must not be stored as another
            is.
        """
        if resolution.is_whole:
            return state
        leaves, made = jax.tree.flatten(state)
        was_stored, was_made = map(jax.tree.structure, before)
        if made == was_made:
            return self._keep(resolution, was_stored, made, leaves)
        taken = {was_stored}
        for stored, form in _layouts(resolution, forms()):
            if form == made:
                return self._keep(resolution, stored, made, leaves)
            taken.add(stored)
        pruned = resolution.prune(made)
        return self._keep(resolution, made if pruned in taken else pruned, made, leaves)

    def _keep(
        self, resolution: Resolution, stored: TreeDef, made: TreeDef, leaves: Sequence[Leaf]
    ) -> PyTree:
        self._made.keep((resolution, stored), made)
        return jax.tree.unflatten(stored, leaves)


def _find(resolution: Resolution, state: PyTree, stored: TreeDef, forms: Forms) -> TreeDef:
    """The structure in which the optimizer made a state that is stored in this one."""
    try:
        for known, made in _layouts(resolution, forms()):
            if known == stored:
                return made
    except Exception:  # whatever the optimizer raises for a state that is not its own
        pass
    first = next(forms())
    pruned = resolution.prune(jax.tree.structure(first))
    fresh = jax.tree.unflatten(pruned, jax.tree.leaves(first))
    try:
        require_same_structure(
            state, fresh, "the optimizer state", "a fresh one for these parameters"
        )
    except ValueError as error:
        raise ValueError(
            f"{error} Was it made for another choice of frozen leaves, or for another tree? Make a "
            "new one: tx.init(params). It begins with fresh moments and counts, and what the old "
            "one had gathered is lost, also for leaves that are trained before and after."
        ) from None
    # require_same_structure tells all there is.
    raise AssertionError("the structures differ, and no path shows it")


def tells(resolution: Resolution, state: PyTree, fresh: PyTree) -> bool:
    """Whether a stored state tells that it was made for these frozen leaves.

    It does if it has the structure of a fresh one, and one that hangs on what is frozen.

    Args:
      resolution: which parameters are frozen.
      state: as it was kept.
      fresh: one for these frozen leaves, as the optimizer made it.
    """
    if resolution.prune(jax.tree.structure(fresh)) != jax.tree.structure(state):
        return False
    is_over_trainable = lambda node: jax.tree.structure(node) == resolution.holed
    nodes = jax.tree.leaves(fresh, is_leaf=is_over_trainable)
    return any(map(is_over_trainable, nodes))
