"""RunningMedian: a limit in proportion to the running median of a node's own norms."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar

from ..xp import Array
from .base import Budget, Reading, State
from .warm_up import FIRST, first_ones

__all__ = ["RunningMedian"]


@dataclass(frozen=True)
class RunningMedian(Budget):
    """A node may exceed the running median of its own norms by ``factor``.

        limit_b = factor C_b;    C_b <- C_b exp(eta / 2) where n_b > C_b, else C_b exp(-eta / 2)
        C_b = the first norm, then the smaller of two, then the median of three

    It leaves a healthy run as it is and stops a sudden explosion. A norm counts as above or below the median and no
    more, so a spike of any size moves the limit by one small step; as one of the first two norms it counts until the
    third. The limit follows a *persistent* explosion upwards.
    `ChainSplitter` bounds the signal at ordinary joints with it; on the bins of a gradient it has not been tried.

    Args:
        factor: norm / running median that is let through, >= 1; inf measures only.
        eta: size of a step, in (0, 1].
        early: number of first observations that move the median ten times as far, but at most by exp(1/4).

    Raises:
        ValueError: a constant out of its range.

    The source is the geometric quantile tracker of Andrew et al. 2019 (arXiv 1905.03871) at one half. Deviations: the
    start, and larger first steps, since a run begins without a guess of the norm.

    >>> import numpy as np
    >>> from gradsplit.budget import limits_after
    >>> limits_after(RunningMedian(3.0), [np.array([2.0])])
    array([6.])
    """

    name: ClassVar[str] = "running_median"
    factor: float = 3.0
    eta: float = 0.05
    early: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("factor", self.factor >= 1, "a factor >= 1 over the running median, for example 3.0")
        self._check("eta", 0 < self.eta <= 1, "a step in (0, 1], for example 0.05")
        self._check("early", self.early >= 0, "a number of observations >= 0, for example 20")

    def init(self, xp: ModuleType, like: Array) -> State:  # noqa: D102
        return (like * 0.0, like * 0.0, like * 0.0)  # C, at first the larger of two observations, observations

    def restored(self, xp: ModuleType, saved: State) -> State:
        """Return a history of today; an older version kept C and the count, and C was settled after one norm."""
        if len(saved) != 2:
            return saved
        c, count = saved
        return (c, c * 0.0, xp.where(c > 0, xp.maximum(count, c * 0.0 + float(FIRST)), count))

    def limits(self, xp: ModuleType, reading: Reading, state: State) -> Array:  # noqa: D102
        median, _, _ = state
        return xp.where(median > 0, self.factor * median, xp.full(median.shape[0], float("inf"), median))

    def learn(self, xp: ModuleType, reading: Reading, kept: Array, state: State) -> State:  # noqa: D102
        median, high, count = state
        small, large = math.exp(self.eta / 2), math.exp(min(10 * self.eta, 0.5) / 2)
        num = count.shape[0]
        rate = xp.where(count < self.early, xp.full(num, large, count), xp.full(num, small, count))
        moved = xp.where(reading.norm > median, median * rate, median / rate)
        centre, upper = first_ones(xp, kept, median, high, count)
        observed = kept > 0
        return (
            xp.where(observed, xp.where(count < FIRST, centre, moved), median),
            xp.where(observed, xp.where(count < FIRST - 1, upper, high * 0.0), high),
            xp.where(observed, count + 1.0, count),
        )
