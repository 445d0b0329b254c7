"""RunningMedian: the budget of an ordinary joint, 3 times a running median of the joint's own norm."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar

from ..xp import Array
from .base import Budget, Reading, State

__all__ = ["RunningMedian"]


@dataclass(frozen=True)
class RunningMedian(Budget):
    """A signal keeps a norm of at most ``factor`` times the running median of its own norms.

        limit = factor * C;        C <- C exp(eta / 2) where n > C, else C exp(-eta / 2);        C = n at first

    Meant for joints: it leaves a healthy run as it is and stops a sudden explosion. The median counts each signal as
    above or below and nothing more, so a spike of any size moves it by one small step; a *persistent* explosion it
    follows upwards.

    Args:
        factor: no unit, >= 1; inf measures only.
        eta: size of a step, in (0, 1].
        early: how many first observations move the median ten times as far (at most by exp(1/4)).

    Raises:
        ValueError: a constant out of its range.

    Deviation from the source, the geometric quantile tracker at one half of Andrew et al. 2019 (arXiv 1905.03871):
    the first steps are larger, since a run starts without a guess of the norm.

    >>> import numpy as np
    >>> from gradsplit.budget.base import limits_after
    >>> limits_after(RunningMedian(3.0), [np.array([2.0])])
    array([6.])
    """

    name: ClassVar[str] = "running_median"
    factor: float = 3.0
    eta: float = 0.05
    early: int = 20

    def __post_init__(self) -> None:
        self._check("factor", self.factor >= 1, "a factor >= 1 over the running median, for example 3.0")
        self._check("eta", 0 < self.eta <= 1, "a step in (0, 1], for example 0.05")
        self._check("early", self.early >= 0, "a number of observations >= 0")

    def init(self, xp: ModuleType, like: Array) -> State:  # noqa: D102
        return (like * 0.0, like * 0.0)  # C (0 before the first observation), number of observations

    def limits(self, xp: ModuleType, reading: Reading, state: State) -> Array:  # noqa: D102
        median, _ = state
        return xp.where(median > 0, self.factor * median, xp.full(len(median), float("inf"), median))

    def learn(self, xp: ModuleType, reading: Reading, kept: Array, state: State) -> State:  # noqa: D102
        median, count = state
        small, large = math.exp(self.eta / 2), math.exp(min(10 * self.eta, 0.5) / 2)
        rate = xp.where(count < self.early, xp.full(len(count), large, count), xp.full(len(count), small, count))
        moved = xp.where(reading.norm > median, median * rate, median / rate)
        new = xp.where(median > 0, moved, reading.norm)
        return xp.where(kept > 0, new, median), xp.where(kept > 0, count + 1.0, count)
