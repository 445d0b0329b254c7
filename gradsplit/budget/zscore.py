"""ZScore: a limit from the running mean and variance of the norms that were let through (ZClip)."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar

from ..xp import Array
from .base import Budget, Reading, State
from .warm_up import BEYOND, FIRST, MOST, first_ones

__all__ = ["ZScore"]


@dataclass(frozen=True)
class ZScore(Budget):
    """A norm further than ``z`` standard deviations above its running mean is drawn back, the more the further it is.

        s = (n - mu) / sigma;     s > z:  limit_b = mu + z^2 / s * sigma         else inf
        mu <- beta mu + (1 - beta) kept;    var <- beta var + (1 - beta) (kept - mu)^2      (the new mu)

    This is ZClip (arXiv 2504.02507, option "adaptive_scaling", without its fixed limit). Deviations: one statistic per
    node, not one for the model; a non-finite norm never enters; sigma is at least 1e-6 of the mean. In ZClip spikes of
    the warm-up enter as they are. Here mu begins as the median of three, with the variance 2/3 (mu - lowest)^2. A
    later observation of the warm-up enters as at most 2 mu, and is let through up to 5 mu. A warm-up of two
    observations takes them as they are.

    It is for the *transient* spike (temporal order, 50 steps: 10 of 12 solved, 6 without it). It learns a persistent
    explosion as normal.

    Args:
        z: standard deviations let through, > 0.
        beta: memory of mean and variance, in (0, 1).
        warmup: observations before the rule holds, >= 2.

    Raises:
        ValueError: a constant out of its range.

    >>> import numpy as np
    >>> from gradsplit.budget import limits_after
    >>> history = [np.array([1.0]), np.array([3.0])]                        # mu 2, sigma 1
    >>> limits_after(ZScore(2.0, warmup=2), history, norm=np.array([6.0]))  # s 4
    array([3.])
    """

    name: ClassVar[str] = "zscore"
    z: float = 2.5
    beta: float = 0.97
    warmup: int = 25

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("z", self.z > 0, "standard deviations > 0, for example 2.5")
        self._check("beta", 0 < self.beta < 1, "a memory in (0, 1), for example 0.97")
        self._check("warmup", self.warmup >= 2, "at least two observations, which a variance needs, for example 25")

    def init(self, xp: ModuleType, like: Array) -> State:  # noqa: D102
        # The mean, the variance (at first the larger of two observations), and observations.
        return (like * 0.0, like * 0.0, like * 0.0)

    def limits(self, xp: ModuleType, reading: Reading, state: State) -> Array:  # noqa: D102
        mean, variance, seen = state
        sigma = xp.maximum(xp.sqrt(variance), 1e-6 * mean)
        score = (reading.norm - mean) / xp.where(sigma > 0, sigma, xp.full(mean.shape[0], 1.0, mean))
        over = (seen >= self.warmup) & (score > self.z)
        drawn = mean + self.z**2 / xp.where(over, score, xp.full(mean.shape[0], 1.0, mean)) * sigma
        unbounded = xp.full(mean.shape[0], float("inf"), mean)
        if self.warmup > FIRST:
            unbounded = xp.where((seen >= FIRST) & (seen < self.warmup), BEYOND * mean, unbounded)
        return xp.where(over, drawn, unbounded)

    def learn(self, xp: ModuleType, reading: Reading, kept: Array, state: State) -> State:  # noqa: D102
        mean, variance, seen = state
        observed = kept > 0
        warming = seen < self.warmup
        weight = xp.where(warming, 1.0 / (seen + 1.0), xp.full(mean.shape[0], 1 - self.beta, mean))
        robust = self.warmup >= FIRST
        taken = xp.where(warming, xp.minimum(kept, MOST * mean), kept) if robust else kept
        fresh = mean + weight * (taken - mean)
        # Welford's product while warming up gives the population variance; afterwards the new mean, as in ZClip.
        square = xp.where(warming, (taken - mean) * (taken - fresh), (taken - fresh) ** 2)
        spread = variance + weight * (square - variance)
        if robust:
            centre, high = first_ones(xp, kept, mean, variance, seen)
            below = (centre - xp.minimum(mean, kept)) ** 2 * (2.0 / 3.0)
            fresh = xp.where(seen < FIRST, centre, fresh)
            spread = xp.where(seen < FIRST - 1, high, xp.where(seen < FIRST, below, spread))
        return (
            xp.where(observed, fresh, mean),
            xp.where(observed, spread, variance),
            xp.where(observed, seen + 1.0, seen),
        )
