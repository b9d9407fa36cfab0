"""What is trained of a model, as a filter of NNX: a function of a path and a Variable."""

from __future__ import annotations

import dataclasses
from typing import Any

from flax import nnx

from frozen_optax._messages import quoted
from frozen_optax._nnx._graph import Path, frozen_among, parameters_of
from frozen_optax._selectors import Selector
from frozen_optax._typing import PyTree


@dataclasses.dataclass(frozen=True, repr=False)
class TrainedFilter:
    """True of the trained parameters of a model.

    Attributes:
      trained: their paths.
      frozen: the paths of its other parameters.
      wrt: which Variables are parameters.
    """

    trained: frozenset[Path]
    frozen: frozenset[Path]
    wrt: Any

    def __call__(self, path: Path, value: PyTree) -> bool:
        is_parameter = nnx.filterlib.to_predicate(self.wrt)
        if path in self.trained:  # where it holds a Variable, of this kind
            return not isinstance(value, nnx.Variable) or is_parameter(path, value)
        if path not in self.frozen and is_parameter(path, value):
            raise ValueError(
                f"nnx_filter was made for a model without the parameter {_text(path)!r}; it had "
                f"{quoted(sorted(map(_text, self.trained | self.frozen)))}. Make one for this "
                "model, and give it the model alone: in a tuple its paths are others."
            )
        return False

    def __repr__(self) -> str:
        return f"nnx_filter(trained={quoted(sorted(map(_text, self.trained)))})"


def _text(path: Path) -> str:
    return "/".join(map(str, path))


def trained_filter(model: PyTree, selector: Selector, wrt: Any) -> TrainedFilter:
    """The filter of what a selector does not freeze among the parameters of a model."""
    parameters = parameters_of(model, wrt)
    is_frozen = frozen_among(selector, parameters)
    # One that holds nothing can be called either.
    frozen = frozenset(path for path, each in parameters.items() if is_frozen.get(id(each), True))
    return TrainedFilter(frozenset(parameters) - frozen, frozen, wrt)
