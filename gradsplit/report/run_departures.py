"""When a norm leaves its own history: the change point that the account names, and its statistic.

For a tensor whose norm at row t is n_t, with the last 64 earlier rows as its history,

    score_t = (ln n_t - median) / max(1.4826 MAD, 0.25),    median and MAD of ln n over the history.

A norm has left its history where the score is at least 7 *and* n_t is more than 4 times the history's largest norm; a
norm that is not finite has left it by definition. Rows before the eighth, zeros and non-finite norms are no history.
On a logarithmic scale an explosion is a sum; median and median absolute deviation do not follow a few spikes; and the
second condition spares tensors whose norms are heavy-tailed by nature. How often it is right: benchmarks/account.py.

Shape suffixes: _W one entry a window of rows, _T one a tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["FACTOR", "HISTORY", "SCORE", "Scores", "scores_of"]

HISTORY = 64
LEAST = 8
SCORE = 7.0
FLOOR = 0.25
FACTOR = 4.0
_REFRESHED_EACH = 512  # rows; later the history is looked at anew every 1/2000 of the run


@dataclass(frozen=True)
class Scores:
    """What the statistic says about every tensor at every window.

    Attributes:
        score_WT: the score; inf where not finite; 0 without a history.
        usual_WT: the history's median norm; nan without a history.
        left_WT: whether the norm has left its history.
    """

    score_WT: np.ndarray
    usual_WT: np.ndarray
    left_WT: np.ndarray


def scores_of(norm_WT: np.ndarray, peak_WT: np.ndarray | None = None) -> Scores:
    """Return the statistic for norms (W, T); ``peak_WT`` is what is judged where windows hold several rows.

    >>> norms = np.ones((20, 1)); norms[15] = 50.0
    >>> np.flatnonzero(scores_of(norms).left_WT).tolist()
    [15]
    """
    judged_WT = norm_WT if peak_WT is None else peak_WT
    num_windows = len(norm_WT)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_WT = np.log(norm_WT.astype(np.float64))
        judged = np.log(judged_WT.astype(np.float64))
    valid_WT = np.isfinite(log_WT)
    middle, spread, top = (np.full(norm_WT.shape, np.nan) for _ in range(3))
    stride = max(1, num_windows // 2000)
    at = LEAST
    while at < num_windows:
        stop = min(num_windows, at + (1 if at < _REFRESHED_EACH else stride))
        middle[at:stop], spread[at:stop], top[at:stop] = _summary(log_WT[max(0, at - HISTORY) : at], valid_WT, at)
        at = stop
    finite = np.isfinite(judged_WT)
    with np.errstate(invalid="ignore"):
        score = (judged - middle) / np.maximum(spread, FLOOR)
        left = (score >= SCORE) & (judged > top + np.log(FACTOR))
    score = np.where(finite, np.nan_to_num(score, nan=0.0, neginf=0.0), np.inf)
    return Scores(score, np.exp(middle), left | ~finite)


def _summary(log_HT: np.ndarray, valid_WT: np.ndarray, at: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return median, 1.4826 times the median absolute deviation, and maximum; nan with too short a history."""
    valid_HT = valid_WT[max(0, at - HISTORY) : at]
    count_T = valid_HT.sum(axis=0)
    middle_T = _median(np.where(valid_HT, log_HT, np.inf), count_T)
    with np.errstate(invalid="ignore"):
        deviation_HT = np.where(valid_HT, np.abs(log_HT - middle_T), np.inf)
    spread_T = 1.4826 * _median(deviation_HT, count_T)
    enough_T = count_T >= LEAST
    top_T = np.where(valid_HT, log_HT, -np.inf).max(axis=0)
    return tuple(np.where(enough_T, values, np.nan) for values in (middle_T, spread_T, top_T))  # type: ignore[return-value]


def _median(values_HT: np.ndarray, count_T: np.ndarray) -> np.ndarray:
    """Return each column's (lower) median over its first ``count`` values in order."""
    ordered = np.sort(values_HT, axis=0)
    place_T = np.maximum(count_T - 1, 0) // 2
    middle: np.ndarray = ordered[place_T, np.arange(values_HT.shape[1])]
    return middle
