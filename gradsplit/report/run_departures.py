"""When a norm leaves its own history: the change point that the account names, and its statistic.

For a tensor whose norm at row t is n_t, with the last 64 earlier rows as its history,

    excess_t = ln n_t - median,    spread_t = max(1.4826 MAD, 0.25),    median and MAD of ln n over the history,
    alone_t  = excess_t - max(0, the largest excess of its four neighbours in the model at row t).

A tensor has left its history where it rose *alone*, alone_t > ln 12 and alone_t >= 3 spread_t (7 if it is the only
tensor), or where it rose with *everything*: the norm of the whole gradient has a score excess / spread of 7 or more and
is above 10 times the largest in its own history, and the tensor's excess is above ln 4. A norm that is not finite has
left it by definition. Rows before the eighth, zeros and non-finite norms are no history.

On a logarithmic scale an explosion is a sum; median and median absolute deviation do not follow a few spikes. Why the
neighbours: in healthy training a layer's tensors rise and fall together, in a small GPT a hundredfold from one step to
the next, while the whole gradient hardly moves; a tensor that jumps and leaves those beside it behind was never seen
there. How often it is right: benchmarks/account.py.

Shape suffixes: _W one entry a window of rows, _T one a tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["ALONE", "FACTOR", "HISTORY", "RISEN", "SCORE", "Scores", "scores_of"]

HISTORY = 64
LEAST = 8
FLOOR = 0.25
ALONE = 12.0
ALONE_SPREADS = 3.0
NEIGHBOURS = 2  # on either side
SCORE = 7.0
FACTOR = 10.0
RISEN = 4.0
_REFRESHED_EACH = 512  # rows; later the history is looked at anew every 1/2000 of the run


@dataclass(frozen=True)
class Scores:
    """What the statistic says about every tensor at every window.

    Attributes:
        score_WT: excess over spread; inf where not finite; 0 without a history.
        usual_WT: the history's median norm; nan without a history.
        left_WT: whether the norm has left its history.
    """

    score_WT: np.ndarray
    usual_WT: np.ndarray
    left_WT: np.ndarray


def scores_of(norm_WT: np.ndarray, peak_WT: np.ndarray | None = None) -> Scores:
    """Return the statistic for norms (W, T), tensors in the model's order.

    Args:
        norm_WT: norms of the windows' first rows: the history.
        peak_WT: what is judged where windows hold several rows; None: the norms themselves.

    >>> norms = np.ones((20, 3)); norms[15, 1] = 50.0
    >>> np.argwhere(scores_of(norms).left_WT).tolist()
    [[15, 1]]
    """
    judged_WT = norm_WT if peak_WT is None else peak_WT
    excess_WT, spread_WT, usual_WT, _ = _against_history(norm_WT, judged_WT)
    with np.errstate(invalid="ignore"):
        alone_WT = excess_WT - np.maximum(0.0, _largest_beside(excess_WT))
        needed = ALONE_SPREADS if norm_WT.shape[1] > 1 else SCORE  # a tensor without neighbours is always alone
        left = (alone_WT > np.log(ALONE)) & (alone_WT >= needed * spread_WT)
        left |= _with_everything(norm_WT, judged_WT)[:, None] & (excess_WT > np.log(RISEN))
        score = excess_WT / spread_WT
    finite = np.isfinite(judged_WT)
    score = np.where(finite, np.nan_to_num(score, nan=0.0, neginf=0.0), np.inf)
    return Scores(score, usual_WT, left | ~finite)


def _with_everything(norm_WT: np.ndarray, judged_WT: np.ndarray) -> np.ndarray:
    """(W,) whether the norm of the whole gradient has left its own history."""
    with np.errstate(over="ignore", invalid="ignore"):
        total_W1 = np.sqrt((norm_WT.astype(np.float64) ** 2).sum(axis=1, keepdims=True))
        judged_W1 = np.sqrt((judged_WT.astype(np.float64) ** 2).sum(axis=1, keepdims=True))
        excess, spread, _, above_top = _against_history(total_W1, judged_W1)
        left: np.ndarray = ((excess >= SCORE * spread) & (above_top > np.log(FACTOR)))[:, 0]
    return left


def _largest_beside(excess_WT: np.ndarray) -> np.ndarray:
    """(W, T) the largest excess among a tensor's neighbours; nan and -inf are none."""
    clean = np.where(np.isfinite(excess_WT), excess_WT, -np.inf)
    beside = np.full_like(clean, -np.inf)
    for shift in range(1, NEIGHBOURS + 1):
        beside[:, shift:] = np.maximum(beside[:, shift:], clean[:, :-shift])
        beside[:, :-shift] = np.maximum(beside[:, :-shift], clean[:, shift:])
    return beside


def _against_history(
    norm_WT: np.ndarray, judged_WT: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return excess, spread, the history's median norm, and ln of what is judged over the history's largest."""
    num_windows = len(norm_WT)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_WT, judged = np.log(norm_WT.astype(np.float64)), np.log(judged_WT.astype(np.float64))
    valid_WT = np.isfinite(log_WT)
    middle, spread, top = (np.full(norm_WT.shape, np.nan) for _ in range(3))
    stride, at = max(1, num_windows // 2000), LEAST
    while at < num_windows:
        stop = min(num_windows, at + (1 if at < _REFRESHED_EACH else stride))
        middle[at:stop], spread[at:stop], top[at:stop] = _summary(log_WT[max(0, at - HISTORY) : at], valid_WT, at)
        at = stop
    with np.errstate(invalid="ignore"):
        return judged - middle, np.maximum(spread, FLOOR), np.exp(middle), judged - top


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
    nan_T = np.full(count_T.shape, np.nan)
    return (
        np.where(enough_T, middle_T, nan_T),
        np.where(enough_T, spread_T, nan_T),
        np.where(enough_T, top_T, nan_T),
    )


def _median(values_HT: np.ndarray, count_T: np.ndarray) -> np.ndarray:
    """Return each column's (lower) median over its first ``count`` values in order."""
    ordered = np.sort(values_HT, axis=0)
    place_T = np.maximum(count_T - 1, 0) // 2
    middle: np.ndarray = ordered[place_T, np.arange(values_HT.shape[1])]
    return middle
