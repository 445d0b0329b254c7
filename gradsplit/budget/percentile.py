"""Percentile: a limit that tracks a quantile of the norm's history in one number per node."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar

from ..xp import Array
from .base import Budget, Reading, State
from .warm_up import FIRST, first_ones

__all__ = ["Percentile"]


@dataclass(frozen=True)
class Percentile(Budget):
    """The limit is the ``q`` quantile of the node's own norms, tracked by small multiplicative steps.

        limit_b = C_b;        C_b <- C_b exp(-eta (1[n_b <= C_b] - q))        C_b = the median of three observations

    It has the aim of AutoClip (arXiv 2007.14469) with O(1) state, by the geometric tracker of Andrew et al. 2019 (arXiv
    1905.03871). A spike counts once, whatever its size, so what was not let through has no weight. The rule is free of
    scale, and C wavers by about eta. Nothing is bounded during the first three observations; since C begins as their
    median, a spike among them does not matter.

    It is for transient spikes: in trials it followed a *persistent* explosion upwards, as the other adaptive budgets
    do.

    Args:
        q: quantile in (0, 1); AutoClip recommends 0.1.
        eta: size of a step, > 0, at most 1.

    Raises:
        ValueError: a constant out of its range.

    >>> import numpy as np
    >>> from gradsplit.budget import limits_after
    >>> limits_after(Percentile(0.5, eta=0.02), [np.array([2.0]), np.array([900.0]), np.array([1.0])])
    array([2.])
    """

    name: ClassVar[str] = "percentile"
    q: float = 0.9
    eta: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("q", 0 < self.q < 1, "a quantile in (0, 1), for example 0.9")
        self._check("eta", 0 < self.eta <= 1, "a step in (0, 1], for example 0.02")

    def init(self, xp: ModuleType, like: Array) -> State:  # noqa: D102
        return (like * 0.0, like * 0.0, like * 0.0)  # C, at first the larger of two observations, observations

    def restored(self, xp: ModuleType, saved: State) -> State:
        """Return a history of today; an older version kept C alone, from the first observation."""
        if len(saved) != 1:
            return saved
        (c,) = saved
        return (c, c * 0.0, xp.where(c > 0, c * 0.0 + float(FIRST), c * 0.0))

    def limits(self, xp: ModuleType, reading: Reading, state: State) -> Array:  # noqa: D102
        c, _, seen = state
        return xp.where(seen >= FIRST, c, xp.full(c.shape[0], float("inf"), c))

    def learn(self, xp: ModuleType, reading: Reading, kept: Array, state: State) -> State:  # noqa: D102
        c, high, seen = state
        # A norm that was let through unchanged lay below the limit; one that was cut lay above it.
        down, up = math.exp(-self.eta * (1 - self.q)), math.exp(self.eta * self.q)
        step = xp.where(reading.norm <= c, c * down, c * up)
        centre, upper = first_ones(xp, kept, c, high, seen)
        observed, starts = kept > 0, seen < FIRST
        return (
            xp.where(observed, xp.where(starts, centre, step), c),
            xp.where(observed, xp.where(seen < FIRST - 1, upper, high * 0.0), high),
            xp.where(observed & starts, seen + 1.0, seen),
        )
