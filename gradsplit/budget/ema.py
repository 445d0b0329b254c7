"""Ema: a limit in proportion to the running mean of the norms that were let through."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar

from ..xp import Array
from .base import Budget, Reading, State
from .warm_up import BEYOND, FIRST, MOST, first_ones

__all__ = ["Ema"]


@dataclass(frozen=True)
class Ema(Budget):
    """A node may exceed the running mean of its own controlled norms by ``ratio``.

        limit_b = ratio * e_b                                   e_b <- beta e_b + (1 - beta) kept_b

    For the first three observations nothing is bounded. Until the ``warmup`` is over, the limit is 5 e_b, and e_b is a
    mean that a spike cannot move: it begins as the median of three, and a later observation enters as at most twice
    e_b. A warm-up of up to three observations bounds nothing, and one of up to two takes their plain mean.

    The rule comes from AdaGC (arXiv 2502.11034) and OLMo's per-parameter rule. Deviations: the warm-up takes that mean,
    not the minimum; and there is a **recovery rule**. Without it e would grow by at most (ratio - 1)(1 - beta) per
    step, so that a limit that has collapsed would take hundreds of steps to double. So once a node has been bounded
    more than ``patience`` times in a row, its e grows by the factor ``growth`` per step until the norm fits.

    In trials it helped against the *transient* spike. It learns a persistent explosion as normal (use `Relative`,
    `RelativeStep` or `Fixed`). On text with AdamW rows ended at 2.308, no control at 2.347.

    Args:
        ratio: norm / running mean that is let through, > 1.
        beta: memory of the running mean, in (0, 1).
        warmup: observations before the rule holds, >= 1.
        patience: bounded observations in a row before the limit recovers, >= 1.
        growth: factor per step of the recovery, >= 1.

    Raises:
        ValueError: a constant out of its range.

    >>> import numpy as np
    >>> from gradsplit.budget import limits_after
    >>> limits_after(Ema(1.5, warmup=1), [np.array([2.0])])
    array([3.])
    """

    name: ClassVar[str] = "ema"
    ratio: float = 1.5
    beta: float = 0.98
    warmup: int = 20
    patience: int = 20
    growth: float = 1.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("ratio", self.ratio > 1, "a ratio > 1, for example 1.5")
        self._check("beta", 0 < self.beta < 1, "a memory in (0, 1), for example 0.98")
        self._check("warmup", self.warmup >= 1, "at least one observation, for example 20")
        self._check("patience", self.patience >= 1, "at least one observation, for example 20")
        self._check("growth", self.growth >= 1, "a factor >= 1, for example 1.1")

    def init(self, xp: ModuleType, like: Array) -> State:  # noqa: D102
        # The mean, observations, and how often in a row it was bounded; at first the larger of two observations.
        return (like * 0.0, like * 0.0, like * 0.0)

    def limits(self, xp: ModuleType, reading: Reading, state: State) -> Array:  # noqa: D102
        mean, seen, _ = state
        unbounded = xp.full(mean.shape[0], float("inf"), mean)
        if self.warmup > FIRST:
            unbounded = xp.where(seen >= FIRST, max(BEYOND, self.ratio) * mean, unbounded)
        return xp.where(seen >= self.warmup, self.ratio * mean, unbounded)

    def learn(self, xp: ModuleType, reading: Reading, kept: Array, state: State) -> State:  # noqa: D102
        mean, seen, bounded = state
        observed = kept > 0
        # The mean while warming up, the exponential one afterwards: the larger of the two weights.
        settled = seen >= self.warmup
        steady = xp.full(mean.shape[0], 1 - self.beta, mean)
        weight = xp.where(settled, steady, xp.maximum(steady, 1.0 / (seen + 1.0)))
        over = settled & (reading.norm > self.ratio * mean)
        run = xp.where(over, bounded + 1.0, bounded * 0.0)
        robust = self.warmup >= FIRST
        taken = xp.where(settled, kept, xp.minimum(kept, MOST * mean)) if robust else kept
        fresh = mean + weight * (taken - mean)
        fresh = xp.where(run > self.patience, xp.maximum(fresh, self.growth * mean), fresh)
        if robust:
            centre, high = first_ones(xp, kept, mean, bounded, seen)
            fresh = xp.where(seen < FIRST, centre, fresh)
            run = xp.where(seen < FIRST - 1, high, run)
        return (
            xp.where(observed, fresh, mean),
            xp.where(observed, seen + 1.0, seen),
            xp.where(observed, run, bounded),
        )
