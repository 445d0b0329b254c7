"""What counts as an explosion: against a tensor's own history, and without any, from the first step on.

Without a history the start of the run and the weights are what norms and losses are held against.
Shape suffixes: _R one entry per row, _W one per window, _K one per reading of the weights, _T one per tensor.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from ..record import Series

__all__ = [
    "ALONE",
    "BLOCK",
    "FACTOR",
    "GROWN",
    "HISTORY",
    "LOSS_TIMES",
    "NORM_ALONE",
    "NORM_TIMES",
    "RATE_TIMES",
    "RISEN",
    "SCORE",
    "Scores",
    "Seen",
    "WEIGHT_TIMES",
    "Weights",
    "counted",
    "larger_batch",
    "outgrown",
    "rises_of",
    "scores_of",
    "seen_in",
    "unlike_batch",
]

NORM_TIMES = 30.0  # over the norm of the first step, where the loss is above three times its start
NORM_ALONE = 100.0  # where the loss says less: a generator's loss rises while its critic learns
LOSS_TIMES = 10.0  # over the loss of the first step
SHARE = 1.0  # of the weights' length: a gradient below it is small, however much it has grown
BLOCK = 10  # rows whose median is one point of a course
GROWN = 1.03  # per row, over five blocks
WEIGHT_TIMES = 30.0  # between two readings, for a tensor that grows alone
RATE_TIMES = 5.0  # over the largest rate before: more than any warm-up or restart raises it in one step
RATE_ROWS = 20  # after a rise of the rate, and before it, whose losses and norms are compared
RATE_LOSS, RATE_NORM = 2.0, 5.0  # by which the largest of them rise where the rate is to blame
BATCH_LOSS, BATCH_NORM = 10.0, 3.0  # over the five steps before, where one batch is unlike them
GIVEN_TIMES, GIVEN_ROWS = 10.0, 3  # over the largest of at least three batches: more than those of one data set differ
STILL = 1.1  # growth of a tensor up to which the weights count as unchanged
SMALL = 0.25  # root mean square of a tensor below which its growth is that of something that starts at 0
OUTGROWN = 4.0  # median growth of matrices by the first reading after step 8: a learning rate that is large for them
SOON = 40  # the last step at which that reading counts
STUCK = 20  # steps that a gradient scaler skips one after the other without an end


@dataclass(frozen=True)
class Weights:
    """Lengths of all tensors, read thinly, before the update of a step.

    Attributes:
        step_K: steps.
        length_KT: L2 lengths.
        numel_T: elements.
    """

    step_K: np.ndarray
    length_KT: np.ndarray
    numel_T: np.ndarray

    @property
    def start(self) -> float:
        """Length of all weights at the first reading; nan without one."""
        return float(np.sqrt((self.length_KT[0].astype(np.float64) ** 2).sum())) if len(self.step_K) else float("nan")


@dataclass(frozen=True)
class Seen:
    """Something that a rule without a history has found.

    Attributes:
        row: at which row.
        kind: by which rule.
        reason: what was seen.
        tensor: in which tensor; None: any.
        until: the last row of what grows slowly; something sudden up to there is what began it.
        since: the last row at which it was not there yet.
    """

    row: int
    kind: str
    reason: str
    tensor: int | None = None
    until: int = -1
    since: int = -1


def outgrown(weights: Weights, matrix_T: np.ndarray) -> tuple[int, float]:
    """Return the step and the median growth of the matrices, where they outgrew their start early; (0, 0.0) where not.

    A tensor that started near 0 is left out. This accuses nobody: the loss may fall all the same, and a smaller rate
    may do better.

    Args:
        weights: of one optimizer.
        matrix_T: whether a tensor has two dimensions or more.
    """
    soon = np.flatnonzero((weights.step_K >= LEAST) & (weights.step_K <= SOON))
    if not len(soon) or weights.step_K[0] > 0:
        return 0, 0.0
    start_T, now_T = weights.length_KT[0].astype(np.float64), weights.length_KT[soon[0]].astype(np.float64)
    judged_T = matrix_T & (start_T > 0.01 * np.sqrt(weights.numel_T))
    if not judged_T.any():
        return 0, 0.0
    times = float(np.median(now_T[judged_T] / start_T[judged_T]))
    return (int(weights.step_K[soon[0]]), times) if OUTGROWN < times < np.inf else (0, 0.0)


def counted(series: Series) -> np.ndarray:
    """(R,) rows that are judged: all but the steps that a gradient scaler skipped for its own scale.

    Such a step is ordinary. It is judged where its loss is not finite or ten times the largest of the five rows
    before, or where the scaler skips to the end.
    """
    skipped = series.skipped_R != 0
    made = np.flatnonzero(~skipped)
    last = int(made[-1]) if len(made) else -1
    stuck = np.arange(len(skipped)) > last if len(skipped) - last > STUCK else np.zeros(len(skipped), dtype=bool)
    seen = np.isfinite(series.loss_R).any()
    loss = series.loss_R.astype(np.float64)
    with np.errstate(invalid="ignore"):
        for r in np.flatnonzero(skipped & np.isfinite(loss)).tolist():
            stuck[r] |= r > 0 and 0 < LOSS_TIMES * _largest(loss[max(0, r - 5) : r]) < loss[r]
    judged: np.ndarray = ~skipped | stuck | (seen & ~np.isfinite(loss))
    return judged


def seen_in(series: Series, weights: Weights, *, alone: bool = True) -> list[Seen]:
    """Return what the rules find, in the order of rows; empty for a healthy run.

    Args:
        series: of one optimizer.
        weights: their lengths.
        alone: whether the run has no other optimizer; the loss of one of several networks may rise for good.
    """
    rows = np.flatnonzero(counted(series))
    total, loss = series.total_R[rows].astype(np.float64), series.loss_R[rows].astype(np.float64)
    if not len(rows):
        return []
    with np.errstate(all="ignore"):
        found = [
            *_lost_loss(loss),
            *_norm(total, loss, weights.start),
            *_loss(total, loss, weights.start),
            *(_settled(total, loss) if alone else ()),
            *_growth(total, loss, weights.start),
            *_rate(total, loss, series.lr_R[rows].astype(np.float64)),
        ]
        last = len(rows) - 1
        found = [
            dataclasses.replace(one, row=int(rows[one.row]), until=int(rows[min(max(one.row, one.until), last)]))
            for one in found
        ]
        found += _weights(series, weights)
    return sorted(found, key=lambda one: one.row)


def _number(value: float) -> str:
    return f"{value:.3g}"


def _start(values: np.ndarray) -> float:
    """The first finite value that is not 0; nan where there is none."""
    there = values[np.isfinite(values) & (values != 0)]
    return float(there[0]) if len(there) else float("nan")


def _lost_loss(loss: np.ndarray) -> list[Seen]:
    finite = np.isfinite(loss)
    if not finite.any() and not np.isinf(loss).any():
        return []  # nan in every row: no loss was seen
    bad = np.flatnonzero(~finite & (np.isinf(loss) | (np.cumsum(finite) > 0)))
    return [Seen(int(bad[0]), "loss_lost", "the loss was not finite")] if len(bad) else []


def _norm(total: np.ndarray, loss: np.ndarray, weights: float) -> list[Seen]:
    """The norm far beyond that of the first step and large beside the weights, and the loss no better."""
    start, first_loss = _start(total), _start(loss)
    weights_or_none = weights if np.isfinite(weights) else 0.0
    no_better = ~(loss < first_loss) if np.isfinite(first_loss) else np.ones(len(loss), dtype=bool)
    worse = (loss > 3 * first_loss) if first_loss > 0 else np.zeros(len(loss), dtype=bool)
    with_loss = worse & (total > NORM_TIMES * start) & (total > SHARE * weights_or_none)
    alone = no_better & (total > NORM_ALONE * start) & (total > weights_or_none)
    # From one row to the next: the loss shows it only later.
    at_once = np.zeros(len(total), dtype=bool)
    at_once[2:] = (total[2:] > NORM_ALONE * np.maximum.accumulate(total)[1:-1]) & (total[2:] > SHARE * weights)
    hit = np.flatnonzero(with_loss | alone | at_once)
    if not len(hit):
        return []
    r = int(hit[0])
    beside = f" and {_number(total[r] / weights)} times the length of the weights" if np.isfinite(weights) else ""
    reason = f"the norm of the whole gradient was {_number(total[r] / start)} times that of the first step{beside}"
    return [Seen(r, "norm", reason)]


def _loss(total: np.ndarray, loss: np.ndarray, weights: float) -> list[Seen]:
    """The loss beyond 10 times its start with the norm beyond 10 times its own, or settled far above start and best."""
    start, first = _start(total), _start(loss)
    if not first > 0:
        return []
    least = SHARE * weights if np.isfinite(weights) else NORM_TIMES * start
    hit = np.flatnonzero((loss > LOSS_TIMES * first) & (total > LOSS_TIMES * start) & (total > least))
    if len(hit):
        r = int(hit[0])
        return [Seen(r, "loss_rose", f"the loss was {_number(loss[r] / first)} times that of the first step")]
    return []


def _settled(total: np.ndarray, loss: np.ndarray) -> list[Seen]:
    """The loss ended far above its start and its best, after the norm had risen."""
    start, first = _start(total), _start(loss)
    if not first > 0:
        return []
    risen = (total > LOSS_TIMES * start) & (loss > first)
    course = _blocks(loss)
    if len(course) > 1 and risen.any() and course[-1] > 2 * first and course[-1] > 2 * _least(course):
        r = int(np.flatnonzero(risen)[0])
        times = f"{_number(course[-1] / first)} times its start and {_number(course[-1] / _least(course))} times"
        return [Seen(r, "settled", f"the loss ended at {times} its best, after the norm had risen tenfold")]
    return []


def _growth(total: np.ndarray, loss: np.ndarray, weights: float) -> list[Seen]:
    """Five blocks in a row, each well above the one before, while the loss does not fall."""
    course, losses = np.log(_blocks(total)), _blocks(loss)
    if len(course) < 6:
        return []
    least = np.log(SHARE * weights) if np.isfinite(weights) else course[0] + np.log(NORM_TIMES)
    for b in range(5, len(course)):
        rises = np.diff(course[b - 5 : b + 1])
        rise = course[b] - course[b - 5]
        better = losses[b] < losses[b - 5] and rise < np.log(100.0)
        steady = (rises > 0.5 * BLOCK * np.log(GROWN)).all() and rise >= 5 * BLOCK * np.log(GROWN)
        # What grows from nothing, as behind a zero-initialised layer, is small beside the weights.
        large = course[b] > max(least, -_least(-course[: b - 4])) and course[b] > course[0] + np.log(NORM_TIMES) / 2
        if steady and large and not better:
            per_step = np.exp(rise / (5 * BLOCK)) - 1
            reason = (
                f"the norm of the whole gradient grew by {per_step:.1%} per step for fifty steps, to "
                f"{_number(float(np.exp(rise)))} times what it was"
            )
            return [Seen((b - 5) * BLOCK, "growth", reason, until=(b + 1) * BLOCK - 1)]
    return []


def rises_of(rate: np.ndarray) -> list[int]:
    """Return the rows at which a learning rate is far above all before it.

    >>> rises_of(np.array([0.0, 0.1, 0.2, 0.2, 6.0, 6.0, 0.1, 6.0]))
    [4]
    """
    rate = np.where(np.isfinite(rate), rate, 0.0)
    top = np.maximum.accumulate(rate)[:-1]
    rows: list[int] = (np.flatnonzero((rate[1:] >= RATE_TIMES * top) & (top > 0)) + 1).tolist()
    return rows


def _rate(total: np.ndarray, loss: np.ndarray, rate: np.ndarray) -> list[Seen]:
    """A learning rate far above all before it, and losses or norms that rise within twenty rows."""
    for r in rises_of(rate):
        before, behind = slice(max(0, r - RATE_ROWS), r + 1), slice(r + 1, r + 1 + RATE_ROWS)
        said = []
        for name, values, bar in (("loss", loss, RATE_LOSS), ("norm", total, RATE_NORM)):
            was, now = _largest(values[before]), _largest(values[behind])
            lost = len(values[behind]) > 0 and np.isfinite(was) and not np.isfinite(now)
            if lost or (was > 0 and now > bar * was):
                said.append(
                    f"the {name} {'was lost' if lost else f'rose to {_number(now / was)} times its largest before'}"
                )
        if said:
            times = _number(rate[r] / float(np.nanmax(rate[:r])))
            reason = f"the learning rate rose to {times} times its largest before, and within "
            return [Seen(r, "rate", f"{reason}{RATE_ROWS} steps {' and '.join(said)}")]
    return []


def _largest(values: np.ndarray) -> float:
    """The largest value; nan where any is not finite, or there is none."""
    return float(values.max()) if len(values) and np.isfinite(values).all() else float("nan")


def larger_batch(series: Series) -> tuple[int, float]:
    """Return the first row whose batch was far larger than all before it, and how far; (-1, 0.0) where none was.

    The size is the root mean square of what the first layers were given. It needs three rows before it in which it was
    seen.
    """
    given = series.given_R.astype(np.float64)
    rows = np.flatnonzero(np.isfinite(given))
    if len(rows) <= GIVEN_ROWS:
        return -1, 0.0
    top = np.maximum.accumulate(given[rows])[GIVEN_ROWS - 1 : -1]
    odd = np.flatnonzero((given[rows][GIVEN_ROWS:] > GIVEN_TIMES * top) & (top > 0))
    if not len(odd):
        return -1, 0.0
    at = int(odd[0])
    return int(rows[GIVEN_ROWS + at]), float(given[rows][GIVEN_ROWS + at] / top[at])


def unlike_batch(series: Series, weights: Weights, row: int, times: float | None) -> str:
    """Say how a step's batch was unlike those before, where neither weights nor rate had changed; else nothing.

    Args:
        series: of one optimizer.
        weights: their lengths; without a reading at this step nothing is known.
        row: of the step.
        times: its largest value over that of the batches before, where that was seen.
    """
    step, loss, total = series.step_R, series.loss_R.astype(np.float64), series.total_R.astype(np.float64)
    k = int(np.searchsorted(weights.step_K, step[row]))
    if row < 1 or step[row] == step[row - 1] or k == 0 or k >= len(weights.step_K) or weights.step_K[k] != step[row]:
        return ""
    before = slice(max(0, row - 5), row)
    rates = series.lr_R[before]
    floor_T = SMALL * np.sqrt(weights.numel_T)
    grown_T = weights.length_KT[k] / np.maximum(weights.length_KT[k - 1], floor_T)
    if (grown_T > STILL).any() or (rates > 2 * np.median(rates)).any():
        return ""
    if times is not None:
        return f"its largest value was {_number(times)} times that of the batches before"
    usual, norm = _largest(loss[before]), _largest(total[before])
    if row >= 3 and usual > 0 and loss[row] >= BATCH_LOSS * usual and total[row] >= BATCH_NORM * norm:
        return f"its loss was {_number(loss[row] / usual)} times that of the five steps before"
    return ""


def _least(values: np.ndarray) -> float:
    """The least value that is a number; inf where there is none."""
    return float(np.where(np.isnan(values), np.inf, values).min(initial=np.inf))


def _blocks(values: np.ndarray) -> np.ndarray:
    """Medians of blocks of rows; nan where a block has a value that is not finite."""
    whole = values[: len(values) // BLOCK * BLOCK].reshape(-1, BLOCK)
    middle: np.ndarray = np.where(np.isfinite(whole).all(axis=1), np.sort(whole, axis=1)[:, BLOCK // 2], np.nan)
    return middle


def _weights(series: Series, weights: Weights) -> list[Seen]:
    """A tensor that grew alone between two readings, or was not finite; the row is that of the later reading."""
    if not len(weights.step_K):
        return []
    found: list[Seen] = []
    floor_T = SMALL * np.sqrt(weights.numel_T)
    before_KT = np.maximum(weights.length_KT[:-1].astype(np.float64), floor_T)
    times_KT = weights.length_KT[1:].astype(np.float64) / before_KT
    for k in range(len(times_KT)):
        if not np.isfinite(weights.length_KT[k]).all():
            break
        t = int(np.argmax(np.where(np.isfinite(times_KT[k]), times_KT[k], np.inf)))
        times, others = times_KT[k, t], np.delete(times_KT[k], t)
        if times > WEIGHT_TIMES and (not len(others) or times > 10 * max(1.0, float(np.median(others)))):
            first, last = int(weights.step_K[k]), int(weights.step_K[k + 1])
            row = min(int(np.searchsorted(series.step_R, last)), series.num_rows - 1)
            reason = (
                f"its weights jumped: their length was {_number(weights.length_KT[k, t])} before step {first} and "
                f"{_number(weights.length_KT[k + 1, t])} before step {last}"
            )
            since = min(int(np.searchsorted(series.step_R, first)), series.num_rows - 1)
            found.append(Seen(row, "weights", reason, t, since=since))
            break
    return found


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
