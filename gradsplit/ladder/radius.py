"""How far a power series reaches, as its coefficients show.

The radius of convergence R of sum c_k t^k is the distance to the nearest singularity of the loss in the complex plane
of steps. Near it c_k behaves like R^-k k^a, with an oscillation if the singularity is a complex pair. There are two
readings:

* **root**: log|c_k| = b - k log R + a log k, fitted to the upper half of the window, since an oscillation only lowers;
* **ratio**: 1/R^2 -> (c_{k+1} c_{k-1} - c_k^2) / (c_k c_{k-2} - c_{k-1}^2), extrapolated to 1/k -> 0. It is exact for a
  complex pair, and for a real singularity it becomes the square of the plain ratio.

If they differ, the nearest singularity does not yet dominate at the computed orders; the spread says by how much.

Sources: Domb and Sykes 1957 (extrapolation in 1/k); Mercer and Roberts 1990 (complex pairs). Deviations: medians and a
trimmed fit in place of plain least squares, and the reading of the two together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .signedlog import Floats, SignedLog


@dataclass(frozen=True)
class Radius:
    """Radius of convergence of one series, in units of the step.

    Args:
        value: the smaller of the two estimates if they agree within a factor of two, otherwise the root's.
        root: estimate from roots of coefficients.
        ratio: estimate from ratios of coefficients; nan if there are too few.
        spread: relative difference of the readings, which are root, ratio, and the root over each half of the window.
    """

    value: float
    root: float
    ratio: float
    spread: float


ROUNDING = 13 * math.log(10)

ENTIRE = Radius(math.inf, math.inf, math.inf, 0.0)


def radius_of(coefficient: SignedLog) -> Radius:
    """Radius of convergence from the coefficients c_0 … c_K of one series.

    A polynomial whose degree is below half the order has radius inf. The radius of an entire function, such as exp, is
    infinite too, but finitely many coefficients cannot show that. The value then is a lower bound that grows with the
    order.

    >>> coefficients = SignedLog.of(1 / 0.5 ** np.arange(31.0))  # 1 / (1 - 2 t)
    >>> round(radius_of(coefficients).value, 6)
    0.5
    """
    log, order = _without_rounding(coefficient.log), len(coefficient.log) - 1
    first = max(1, order // 2)
    k = np.arange(first, order + 1)
    k = k[np.isfinite(log[k])]
    if len(k) == 0 or (order >= 8 and len(k) < 3 and not _has_gaps(log)):
        return ENTIRE
    if len(k) < 4:
        return _from_few(log, order)
    root, power = _root(k, log[k])
    halves = [_root(part, log[part], power)[0] for part in np.array_split(k, 2) if len(part) >= 4]
    ratio = _ratio(SignedLog(coefficient.sign, log), root, first)
    readings = [value for value in (root, ratio, *halves) if math.isfinite(value) and value > 0]
    spread = max(readings) / min(readings) - 1 if readings else math.inf
    agree = math.isfinite(ratio) and 0.5 < ratio / root < 2
    return Radius(min(root, ratio) if agree else root, root, ratio, spread)


def _without_rounding(log: Floats) -> Floats:
    """Return the logarithms with -inf for orders that are mere rounding, as the odd ones of log(1 + e^t) + t / 2.

    Such an order lies 13 decades below the line through its neighbours; the last one, through the two orders before it.
    """
    expected = np.full(len(log), -np.inf)
    with np.errstate(invalid="ignore"):
        expected[1:-1] = (log[:-2] + log[2:]) / 2
        if len(log) > 4 and np.isfinite(log[-4]):
            expected[-1] = log[-2] + (log[-2] - log[-4]) / 2
        return np.where(log < expected - ROUNDING, -np.inf, log)


def _has_gaps(log: Floats) -> bool:
    """Whether the zeros behind the last order are no more than those between two orders, as in 1 / (1 - t^4)."""
    held = np.flatnonzero(np.isfinite(log))
    return len(held) > 2 and len(log) - held[-1] <= int(np.diff(held).max())


def crude_log_radius(coefficient: SignedLog) -> Floats:
    """Return, per bin, log of the step at which the largest later term reaches the first: a scale, not an estimate.

    Args:
        coefficient: (K + 1, B).
    """
    k = np.arange(2, coefficient.log.shape[0], dtype=np.float64)[:, None]
    if len(k) == 0:
        return np.zeros(coefficient.log.shape[1])
    with np.errstate(invalid="ignore"):
        reach = (coefficient.log[1] - coefficient.log[2:]) / (k - 1)
    reach = np.where(np.isfinite(reach), reach, np.inf)
    reach_B: Floats = reach[len(k) // 2 :].min(axis=0)
    reach_B = np.where(np.isfinite(reach_B), reach_B, reach.min(axis=0))  # the tail is zero, or too small for float64
    return np.where(np.isfinite(reach_B), reach_B, 0.0)


def _from_few(log: Floats, order: int) -> Radius:
    """Return the radius from a few coefficients: the smallest root relative to the first order that does not vanish."""
    held = np.flatnonzero(np.isfinite(log[1:])) + 1
    if len(held) < 2:
        return ENTIRE
    first, k = held[0], held[1:]
    value = float(np.exp(((log[first] - log[k]) / (k - first)).min()))
    return Radius(value, value, math.nan, math.inf)


def _root(k: np.ndarray, log: Floats, power: float | None = None) -> tuple[float, float]:
    """Return R and a from log|c_k| = b - k log R + a log k; a is fitted from 24 orders on, and is -1 below.

    A branch point or a pole has a between -2 and 0, so a is kept in that range. Outside it a fit takes the growth of an
    essential singularity (an erf of a pole) for a power, and doubles the radius.
    """
    if power is None and not (k[-1] >= 24 and len(k) >= 8):
        power = -1.0
    columns = [np.ones(len(k)), -k.astype(np.float64)] + ([np.log(k)] if power is None else [])
    target = log if power is None else log - power * np.log(k)
    design = np.stack(columns, axis=1)
    kept = np.ones(len(k), dtype=bool)
    for _ in range(3):
        solution = np.linalg.lstsq(design[kept], target[kept], rcond=None)[0]
        residual = target - design @ solution
        upper = residual >= np.median(residual)
        if upper.sum() <= design.shape[1]:
            break
        kept = upper
    if power is None and not -2 <= solution[2] <= 0:
        return _root(k, log, power=float(np.clip(solution[2], -2, 0)))
    return float(np.exp(np.clip(solution[1], -700, 700))), float(solution[2]) if power is None else power


def _ratio(coefficient: SignedLog, root: float, first: int) -> float:
    """Return R from the Mercer-Roberts ratio, extrapolated to infinite order; nan where it has no meaning."""
    order = len(coefficient.log) - 1
    k = np.arange(order + 1)
    log = coefficient.log + k * math.log(root)  # balanced, so that the products neither overflow nor underflow
    c = SignedLog(coefficient.sign, log - log[first:][np.isfinite(log[first:])].max()).to_float()
    at = np.arange(max(3, first), order)
    if len(at) < 3:
        return math.nan
    above, below = c[at + 1] * c[at - 1] - c[at] ** 2, c[at] * c[at - 2] - c[at - 1] ** 2
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = np.sqrt(np.abs(above / below))
        plain = np.abs(c[at] / c[at - 1])
    # A single real pole makes both differences vanish; there the plain ratio is exact.
    lonely = np.abs(below) < 1e-6 * c[at - 1] ** 2
    inverse = np.where(lonely, plain, inverse)
    good = np.isfinite(inverse) & (inverse > 0)
    if good.sum() < 3:
        return math.nan
    middle = np.median(inverse[good])
    deviation = np.median(np.abs(inverse[good] - middle))
    good &= np.abs(inverse - middle) <= 3 * deviation + 1e-12 * middle
    slope_and_limit = np.polyfit(1 / at[good], inverse[good], 1) if good.sum() >= 4 else np.array([0.0, middle])
    limit = float(slope_and_limit[1])
    return root / limit if limit > 0 else math.nan


TAIL = 0.01  # the tail that is cut off may be this large, relative to the largest term of the series


def reach_of(order: int) -> float:
    """Return the fraction rho of the radius in which the tail stays small: rho^(K+1) / (1 - rho) = TAIL.

    >>> [round(reach_of(order), 2) for order in (3, 10, 30, 99)]
    [0.29, 0.6, 0.82, 0.93]
    """
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if middle ** (order + 1) < TAIL * (1 - middle) else (low, middle)
    return low


def increase(coefficient: SignedLog, step: Floats | float) -> Floats:
    """Return the predicted L(t) - L(0) = sum_{k>=1} c_k t^k for one series at steps t >= 0."""
    steps = np.atleast_1d(np.asarray(step, dtype=np.float64))
    with np.errstate(divide="ignore", invalid="ignore"):
        powers = np.arange(1, len(coefficient.log))[:, None] * np.log(steps)[None, :]
        terms = SignedLog(np.broadcast_to(coefficient.sign[1:, None], powers.shape), coefficient.log[1:, None] + powers)
    terms = SignedLog(terms.sign, np.where(terms.sign == 0, -np.inf, terms.log))
    return np.where(steps == 0, 0.0, terms.sum(axis=0).to_float())


def safe_step(coefficient: SignedLog, radius: float, kink: float = math.inf) -> tuple[float, str]:
    """Return the largest T with L(t) <= L(0) predicted for all 0 < t <= T, and what ends it.

    The search stops at ``reach_of(order)`` of the radius, since beyond it the truncated series says nothing. It stops
    at the kink too, since beyond it the series follows branches that no longer hold.

    Returns:
        T in units of the step, and what ends it. With "increase" the loss is predicted to return to its start; "radius"
        or "kink" ends first; with "no descent" the loss rises at once, and T = 0. A loss that does not move has
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
    else:  # for a polynomial: from the step where the second term matters to the step where the last one decides
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
