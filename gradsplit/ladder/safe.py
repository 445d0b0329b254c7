"""The largest step for which the series predicts no increase of the loss."""

from __future__ import annotations

import math

import numpy as np

from gradsplit.ladder.signedlog import Floats, SignedLog

TAIL = 0.01  # the part of the series that is cut off may be this large, relative to its largest term


def reach_of(order: int) -> float:
    """Fraction rho of the radius inside which the cut-off tail stays small: rho^(K+1) / (1 - rho) = TAIL.

    >>> [round(reach_of(order), 2) for order in (3, 10, 30, 99)]
    [0.29, 0.6, 0.82, 0.93]
    """
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if middle ** (order + 1) < TAIL * (1 - middle) else (low, middle)
    return low


def increase(coefficient: SignedLog, step: Floats | float) -> Floats:
    """Predicted L(t) - L(0) = sum_{k>=1} c_k t^k for one series at steps t >= 0."""
    steps = np.atleast_1d(np.asarray(step, dtype=np.float64))
    with np.errstate(divide="ignore", invalid="ignore"):
        powers = np.arange(1, len(coefficient.log))[:, None] * np.log(steps)[None, :]
        terms = SignedLog(np.broadcast_to(coefficient.sign[1:, None], powers.shape), coefficient.log[1:, None] + powers)
    terms = SignedLog(terms.sign, np.where(terms.sign == 0, -np.inf, terms.log))
    return np.where(steps == 0, 0.0, terms.sum(axis=0).to_float())


def safe_step(coefficient: SignedLog, radius: float, kink: float = math.inf) -> tuple[float, str]:
    """Largest T with L(t) <= L(0) predicted for all 0 < t <= T, and what ends it.

    The search stops at ``reach_of(order)`` of the radius, since beyond it the cut-off series says nothing, and at the
    kink, since beyond it the series follows branches that no longer hold.

    Returns:
        T in units of the step, and "increase" (the loss is predicted to come back up to where it was), "radius" or
        "kink" (that ends first) or "no descent" (the loss rises at once, T = 0). A loss that does not move:
        (inf, "radius").

    >>> safe_step(SignedLog.of(np.array([0.0, -2.0, 1.0])), math.inf)  # (1 - t)^2 - 1
    (2.0, 'increase')
    """
    step, reason = _before_kinks(coefficient, radius)
    return (float(kink), "kink") if kink < step else (step, reason)


def _before_kinks(coefficient: SignedLog, radius: float) -> tuple[float, str]:
    moving = np.flatnonzero(coefficient.sign[1:]) + 1
    if len(moving) == 0:
        return math.inf, "radius"
    if coefficient.sign[moving[0]] > 0:
        return 0.0, "no descent"
    if math.isfinite(radius):
        grid = radius * reach_of(len(coefficient.log) - 1) * np.linspace(0, 1, 513)[1:]
    else:  # a polynomial: from the step where the second term matters to where the last one alone decides
        log_scale = (coefficient.log[moving[0]] - coefficient.log[moving]) / np.maximum(moving - moving[0], 1)
        later = log_scale[1:] if len(moving) > 1 else np.zeros(1)
        grid = np.exp(np.linspace(later.min() - 5, later.max() + 5, 2049))
    rising = np.flatnonzero(increase(coefficient, grid) > 0)
    if len(rising) == 0:
        return (float(grid[-1]), "radius") if math.isfinite(radius) else (math.inf, "radius")
    high = float(grid[rising[0]])
    low = float(grid[rising[0] - 1]) if rising[0] > 0 else 0.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if increase(coefficient, middle)[0] <= 0 else (low, middle)
    return low, "increase"
