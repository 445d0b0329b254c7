"""RelativeStep, the default: no row may move by more than a small share of its own length in one step."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar

from ..xp import Array
from .base import Budget, Reading, State

__all__ = ["RelativeStep"]


@dataclass(frozen=True)
class RelativeStep(Budget):
    """One step may move a node by at most ``tau`` of its own length: nothing to tune, no history, no warm-up.

        limit_b = tau * (lr / lr_max) * max(||W_b||, floor * sqrt(n_b))          length of the update, weight units

    tau follows the learning rate's schedule; lr_max is the largest rate so far. In front of SGD with momentum beta the
    splitter turns it into a limit on the gradient, limit (1 - beta) / lr, so that even a limit met at every step
    keeps the momentum's sum within it. `GSO` caps the update itself. In front of another optimizer a bound on the
    gradient says
    nothing about the step: use `GSO`, or ``cap_updates=True``.

    A one-sided LARS; AGC with its factor tied to the learning rate. Trials (docs/trials are the project's own): at
    least the best *tuned* split on both detectors and the hot residual net, and the learning rate nearly stops
    mattering under SGD with momentum. It loses on a plain He-initialised stack of 36 layers (.272 against .482 for a
    tuned global clip: use ``{"root": Fixed(1.0)}`` there). .01 is flatter and slower, .1 is too loose for a detector.

    Args:
        tau: share of the node's length a step may move it, > 0.
        floor: smallest root mean square of the weights counted, > 0, so that weights that start at 0 can move.

    Raises:
        ValueError: tau or floor that is not > 0.

    >>> import numpy as np
    >>> from gradsplit.budget import limits_of
    >>> limits_of(RelativeStep(0.03), norm=np.ones(2), weight_norm=np.array([2.0, 0.0]), numel=np.array([4.0, 4.0]))
    array([0.06  , 0.0006])
    """

    name: ClassVar[str] = "relative_step"
    reads_weights: ClassVar[bool] = True
    bounds_update: ClassVar[bool] = True
    tau: float = 0.03
    floor: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("tau", self.tau > 0, "a share > 0, for example 0.03")
        self._check("floor", self.floor > 0, "a root mean square > 0, for example 0.01")

    def limits(self, xp: ModuleType, reading: Reading, state: State) -> Array:  # noqa: D102
        return self.tau * reading.pace * xp.maximum(reading.weight_norm, self.floor * xp.sqrt(reading.numel))
