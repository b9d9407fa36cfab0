"""The arguments of a step, and which of them an option of `jax.jit` speaks of."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

_BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def as_list(one_or_more: Any) -> list[Any]:
    """What an option says in a list, where it may also say one thing: an integer, or a name."""
    if isinstance(one_or_more, str):
        return [one_or_more]
    try:
        return [operator.index(one_or_more)]  # anything that counts as an integer
    except TypeError:
        return list(one_or_more)


class Arguments(NamedTuple):
    """Some arguments of a step: those at these positions, and those given by these names."""

    argnums: set[int]
    argnames: set[str]


class Signature:
    """The parameters of a step.

    Attributes:
      parameters: all of them, none where they cannot be told.
      positional: the names of those that may be given by position.
      argnums: the positions of those that may be given either way, by their names.
      is_open: whether more may be given by position than are named.
    """

    def __init__(self, step: Callable[..., Any]):
        try:
            self.parameters = list(inspect.signature(step).parameters.values())
        except (TypeError, ValueError):  # a builtin
            self.parameters = []
        self.positional = [p.name for p in self.parameters if p.kind in _BY_POSITION]
        self.argnums = {
            p.name: argnum
            for argnum, p in enumerate(self.parameters)
            if p.kind is p.POSITIONAL_OR_KEYWORD
        }
        takes_more = any(p.kind is p.VAR_POSITIONAL for p in self.parameters)
        self.is_open = takes_more or not self.parameters
        if not self.positional and not self.is_open:
            raise TypeError(
                "the step takes no argument by position, and the parameters are its first."
            )

    def name(self, argnum: int) -> str:
        """What to call an argument."""
        known = argnum < len(self.positional)
        return self.positional[argnum] if known else f"argument {argnum}"

    def from_the_first(self, option: str, argnums: Iterable[int]) -> list[int]:
        """Positions, counted from the first argument where an option counts from the last."""
        if self.is_open:  # there is no last
            return list(argnums)
        counted: list[int] = []
        count = len(self.positional)
        for argnum in argnums:
            if not -count <= argnum < count:
                raise ValueError(
                    f"{option} names the argument {argnum}, and the step takes {count} by position."
                )
            counted.append(argnum % count)
        return counted

    def complete(self, argnums: Iterable[int] | None, argnames: Iterable[str] | None) -> Arguments:
        """The arguments that an option speaks of.

        As in jax, an option that gives positions alone means the same arguments when they are given
        by name, and the other way round. One that gives both means just these.
        """
        at, called = set(argnums or ()), set(argnames or ())
        if argnames is None:
            called = {name for name, argnum in self.argnums.items() if argnum in at}
        elif argnums is None:
            at = {argnum for name, argnum in self.argnums.items() if name in called}
        return Arguments(at, called)
