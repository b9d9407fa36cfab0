"""What the rest of the library calls its types.

Trees and leaves are whatever the user has, so most of these are `Any` to a type checker. They tell
the reader which of many things is meant.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

# Leaves in any nest of containers that jax knows. `None` and `optax.MaskedNode()` are nodes
# without a leaf.
PyTree: TypeAlias = Any

# What stands in a tree: an array of jax or numpy, a tracer, a `jax.ShapeDtypeStruct`, a Python
# number, and anything else that is no container.
Leaf: TypeAlias = Any

# A leaf that has a shape and a dtype.
Array: TypeAlias = Any

# The dtype of an array: numpy's, or one of jax's extended ones, which those of PRNG keys are.
DType: TypeAlias = Any

# The structure of a tree, without its leaves: a `jax.tree_util.PyTreeDef`, which type checkers know
# nothing of.
TreeDef: TypeAlias = Any

# The way from the root of a tree to a leaf, as `jax.tree_util` has it: one entry for each node.
KeyPath: TypeAlias = tuple[Any, ...]

# What the arguments `frozen` and `trainable` take: a Selector, a glob, a compiled regex, a list or
# tuple of these, a predicate `(path, leaf) -> bool`, a function of the parameters that returns a
# mask, a bool, a pytree of bools (of the parameters' structure or a prefix of it), a filter of
# `flax.nnx` or a type of its Variables, or the optimizer that `with_frozen` returned.
Frozen: TypeAlias = Any

# What the argument `where` takes: a function of a state that returns the parameters in it, or a
# tuple or list of several parts.
Where: TypeAlias = Callable[[PyTree], PyTree]
