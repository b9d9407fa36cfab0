"""An equation of a program, and what is known of its operands: what a rule is asked about."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from jax.extend.core import JaxprEqn

from frozen_optax._jaxprs import Program
from frozen_optax._proofs._constants import Possible
from frozen_optax._proofs._known import Dependencies, Known
from frozen_optax._proofs._provenance import Forwarded

Params: TypeAlias = Mapping[str, Any]
Run: TypeAlias = Callable[[Program, Sequence[Known]], list[Known]]  # of a program that is called


@dataclasses.dataclass(frozen=True)
class Equation:
    """An equation, and what is known of its operands."""

    eqn: JaxprEqn
    operands: Sequence[Known]

    @property
    def name(self) -> str:
        """That of its primitive."""
        return self.eqn.primitive.name

    @property
    def params(self) -> Params:
        """The parameters of its primitive."""
        return self.eqn.params

    @property
    def dtypes(self) -> list[Any]:
        """Those of the operands; None for what has none."""
        return [getattr(variable.aval, "dtype", None) for variable in self.eqn.invars]

    @property
    def dtype(self) -> Any:
        """That of the first result."""
        return getattr(self.eqn.outvars[0].aval, "dtype", None)

    @property
    def possible(self) -> list[Possible]:
        """The possible values of the operands."""
        return [operand.possible for operand in self.operands]

    @property
    def forwarded(self) -> list[Forwarded | None]:
        """The inputs that the operands are."""
        return [operand.forwarded for operand in self.operands]

    def depending_on_all(self, through: str) -> Dependencies:
        """What depends on all operands."""
        return Dependencies.on((operand.dependencies for operand in self.operands), through)
