"""Relative: a limit in proportion to the weights (AGC)."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar

from ..xp import Array
from .base import Budget, Line, Reading, State

__all__ = ["Relative"]


@dataclass(frozen=True)
class Relative(Budget):
    """A node's gradient may be at most ``factor`` times as long as its weights.

        limit_b = factor * max(||W_b||, eps)

    On row bins this is adaptive gradient clipping (Brock et al. 2021, arXiv 2102.06171; 0.01 and 1e-3 there).
    Deviations: the gradient's norm has no floor of 1e-6; a bias is one bin, as in timm and optax; nothing is excluded
    by name. In trials only this rule and `Fixed` held *persistent* explosions: on the residual net without
    normalisation it reached .92, where every global clip stayed at chance. Its factor must be tuned together with the
    learning rate; `RelativeStep` needs no such tuning.

    Args:
        factor: gradient norm / weight norm, > 0.
        eps: smallest weight norm counted, > 0, so that weights that start at 0 can move.

    Raises:
        ValueError: a factor or eps that is not > 0.

    >>> import numpy as np
    >>> from gradsplit.budget import limits_of
    >>> limits_of(Relative(0.01), norm=np.ones(2), weight_norm=np.array([5.0, 0.0]))
    array([5.e-02, 1.e-05])
    """

    name: ClassVar[str] = "relative"
    reads_weights: ClassVar[bool] = True
    factor: float = 0.01
    eps: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("factor", self.factor > 0, "a factor > 0, for example 0.01")
        self._check("eps", self.eps > 0, "eps > 0, for example 1e-3")

    def limits(self, xp: ModuleType, reading: Reading, state: State) -> Array:  # noqa: D102
        floor = xp.full(reading.norm.shape[0], self.eps, reading.norm)
        return self.factor * xp.maximum(reading.weight_norm, floor)

    def line(self) -> Line:  # noqa: D102
        return Line(slope=self.factor, floor=self.factor * self.eps)
