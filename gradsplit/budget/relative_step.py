"""RelativeStep, the default: no row may move by more than a small share of its own length in one step."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar

from ..xp import Array
from .base import Budget, Line, Reading, State

__all__ = ["RelativeStep"]


@dataclass(frozen=True)
class RelativeStep(Budget):
    """One step may move a node by at most ``tau`` of its own length: nothing to tune, no history, no warm-up.

        limit_b = tau * (lr / lr_max) * max(||W_b||, length * sqrt(rows_b), floor * sqrt(n_b))     weight units

    with n_b elements in rows_b rows of a matrix (a vector has none). tau follows the schedule of the learning rate:
    lr_max is the largest rate so far.

    The usual initialisations give a row a length near one, whatever its width (He 1.41, torch's 0.58). A row that
    starts much shorter, as in a detector's heads, has to grow to about that length. So ``length=1.0``, the splitter's
    default in front of SGD, lets it take the steps of a row of length one. Under Adam-like updates, which use every
    limit up, this is harmful: there a row counts as long as it is.

    In front of SGD with momentum beta, the splitter turns the limit into one on the gradient, limit (1 - beta) / lr.
    Even if it is met at every step, the sum of the momentum stays within the limit. `GSO` caps the update itself. In
    front of another optimizer, a bound on the gradient says nothing about the step: use `GSO`, or ``cap_updates=True``.

    The rule is a one-sided LARS, and AGC with its factor tied to the learning rate. docs/results/splitter.md has what
    was measured: it is as good as the best *tuned* split on the hot residual net. On the exploding detector it reaches
    .78 of that, since 3 % per step is slow there. Under SGD with momentum the learning rate hardly matters any more. In
    trials without ``length`` it lost on a plain He-initialised stack of 36 layers (.272 against .482 for a tuned global
    clip: use ``{"root": Fixed(1.0)}`` there). A tau of .01 was slower, and .05 too loose for the hot residual net.

    Args:
        tau: largest share of its own length that a node moves by in one step, > 0.
        floor: smallest root mean square of the weights counted, > 0, so that biases that start at 0 can move.
        length: smallest length a row of a matrix counts as, weight units, >= 0; 0: none beside the floor.

    Raises:
        ValueError: tau or floor that is not > 0, a negative length.

    >>> import numpy as np
    >>> from gradsplit.budget import limits_of
    >>> limits_of(RelativeStep(0.03), norm=np.ones(2), weight_norm=np.array([2.0, 0.0]), numel=np.array([4.0, 4.0]))
    array([0.06  , 0.0006])
    >>> limits_of(RelativeStep(0.03, length=1), norm=np.ones(2), weight_norm=np.array([2, 0]), num_rows=np.ones(2))
    array([0.06, 0.03])
    """

    name: ClassVar[str] = "relative_step"
    reads_weights: ClassVar[bool] = True
    bounds_update: ClassVar[bool] = True
    tau: float = 0.03
    floor: float = 0.01
    length: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("tau", self.tau > 0, "a share > 0, for example 0.03")
        self._check("floor", self.floor > 0, "a root mean square > 0, for example 0.01")
        self._check("length", self.length >= 0, "a length >= 0, for example 1.0; 0 counts a row as long as it is")

    def least(self, xp: ModuleType, numel: Array, num_rows: Array) -> Array:
        """Return the length that nodes of these sizes count as, however short their weights are, shape (n,)."""
        return xp.maximum(self.length * xp.sqrt(num_rows), self.floor * xp.sqrt(numel))

    def limits(self, xp: ModuleType, reading: Reading, state: State) -> Array:  # noqa: D102
        least = self.least(xp, reading.numel, reading.num_rows)
        return self.tau * reading.pace * xp.maximum(reading.weight_norm, least)

    def line(self) -> Line:  # noqa: D102
        return Line(slope=self.tau, root=self.tau * self.floor, row=self.tau * self.length, bounds_update=True)
