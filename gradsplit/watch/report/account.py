"""The account of a run: what left its history first, what that did to the others, and how the budgets were used."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...resume.actions import GuardAction
from ..record import RunFile, Series, Stream

__all__ = [
    "NodeUse",
    "uses_of",
    "ALONE",
    "FACTOR",
    "HISTORY",
    "RISEN",
    "SCORE",
    "Scores",
    "scores_of",
    "Account",
    "Departure",
    "Neighbour",
    "StreamAccount",
    "account_of",
]


@dataclass(frozen=True)
class NodeUse:
    """How one node fared: norms as measured and after control, and how often it was touched."""

    node: int
    name: str
    median: float
    largest: float
    largest_step: int
    largest_after: float
    scaled: float
    zeroed: int


def uses_of(series: Series) -> tuple[NodeUse, ...]:
    """Return how every node fared, medians of the windows' first rows and extremes of all rows."""
    outline, made = series.stream.outline, []
    for node in range(outline.num_nodes):
        leaves = outline.leaves_of_N[node]
        with np.errstate(over="ignore"):
            norm_W = np.sqrt((series.norm(leaves).astype(np.float64) ** 2).sum(axis=1))
            peak_WL = series.peak(leaves).astype(np.float64)
            peak_W = np.sqrt((peak_WL**2).sum(axis=1)) if series.thinned else norm_W
        finite = np.isfinite(peak_W)
        best = int(np.argmax(np.where(finite, peak_W, -1.0)))
        kept, scaled, zeroed = series.kept(leaves), 0.0, 0
        after_W = peak_W
        if kept is not None and series.scaled_WL is not None and series.zeroed_WL is not None:
            after_W = np.sqrt(((np.where(np.isfinite(peak_WL), peak_WL, 0.0) * kept) ** 2).sum(axis=1))
            bins = max(1, int(outline.bins_L[leaves].sum()))
            scaled = float(series.scaled_WL[:, leaves].sum() / (bins * series.num_rows))
            zeroed = int(series.zeroed_WL[:, leaves].sum())
        made.append(
            NodeUse(
                node,
                outline.names_N[node],
                float(np.median(norm_W[np.isfinite(norm_W)])) if np.isfinite(norm_W).any() else float("nan"),
                float(peak_W[best]) if finite.all() else float("inf"),
                int(series.step_W[best if finite.all() else int(np.argmin(finite))]),
                float(after_W[np.isfinite(after_W)].max(initial=0.0)),
                scaled,
                zeroed,
            )
        )
    return tuple(made)


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


AFTERMATH = 10  # windows after a departure in which its neighbours are looked at
SPREAD = 0.8  # share of tensors not finite at once from which no single one can be blamed


@dataclass(frozen=True)
class Neighbour:
    """Another tensor after a departure: its largest norm over its usual one, and when it left its history."""

    tensor: str
    times: float
    left_at: int | None


@dataclass(frozen=True)
class Departure:
    """The first time a norm left its own history.

    Attributes:
        stream: the optimizer's number.
        tensor: its name; "all" where everything was lost at once.
        rows: leaves of the tensor that rose, where that is a part of it, with norm over usual norm.
        step: the optimizer's step; with ``last_step`` if the rows there had been thinned.
        window: its place in the series.
        time: seconds since the epoch.
        norm: gradient units, inf or nan where not finite.
        usual: the median of its history; nan without one.
        score: see `gradsplit.watch.report.account`; inf where not finite.
        lasting: windows among the next ten in which the tensor was still, or again, out of its history.
        neighbours: other tensors, most affected first.
        num_neighbours: how many left their history within the next ten windows.
        loss_before: median loss of the ten rows before; nan if no loss was seen.
        loss_after: largest loss of the ten rows after; inf if one was not finite.
    """

    stream: int
    tensor: str
    rows: tuple[tuple[str, float], ...]
    step: int
    last_step: int
    window: int
    time: float
    norm: float
    usual: float
    score: float
    lasting: int
    neighbours: tuple[Neighbour, ...]
    num_neighbours: int
    num_tensors: int
    loss_before: float
    loss_after: float

    @property
    def times(self) -> float:
        """Norm over usual norm."""
        return self.norm / self.usual


@dataclass(frozen=True)
class StreamAccount:
    """One optimizer's part of the account.

    Attributes:
        series: what was read.
        tensors: (T,) names.
        leaves_T: leaves of each tensor.
        norm_WT: (W, T) largest norms of the tensors per window.
        scores: the statistic.
        first: the first departure; None if there was none.
        left_steps: steps at which at least one tensor was out of its history.
        uses: one per node of the outline.
        own_scaled: share of rows in which the script itself scaled all gradients.
        own_median: the median of these factors.
        scaled: share of (bin, row) pairs that were scaled.
        kept: median share of the whole gradient's norm that was kept.
    """

    series: Series
    tensors: tuple[str, ...]
    leaves_T: tuple[np.ndarray, ...]
    norm_WT: np.ndarray
    scores: Scores
    first: Departure | None
    left_steps: tuple[int, ...]
    uses: tuple[NodeUse, ...]
    own_scaled: float
    own_median: float
    scaled: float
    kept: float

    @property
    def stream(self) -> Stream:
        """What it is about."""
        return self.series.stream


@dataclass(frozen=True)
class Account:
    """What a run file says.

    Attributes:
        path: the file.
        meta: about the run.
        streams: one an optimizer.
        thinnings: what was thinned.
        actions: what a guard did.
    """

    path: str
    meta: dict[str, Any]
    streams: tuple[StreamAccount, ...]
    thinnings: tuple[dict[str, Any], ...] = field(default=())
    actions: tuple[GuardAction, ...] = field(default=())

    @property
    def first(self) -> Departure | None:
        """The earliest departure of any optimizer."""
        found = [account.first for account in self.streams if account.first is not None]
        return min(found, key=lambda departure: departure.time, default=None)

    @property
    def num_rows(self) -> int:
        """Rows over all optimizers."""
        return sum(account.series.num_rows for account in self.streams)


def account_of(file: RunFile) -> Account:
    """Read a run file and return its account.

    Raises:
        RunFileError: nothing recorded yet, or a broken file.
    """
    streams = tuple(_stream_account(file.series(stream)) for stream in file.streams)
    return Account(str(file.path), file.meta, streams, tuple(file.thinnings()), tuple(file.actions()))


def _stream_account(series: Series) -> StreamAccount:
    outline = series.stream.outline
    tensors = tuple(dict.fromkeys(outline.tensors_L))
    place = {tensor: t for t, tensor in enumerate(tensors)}
    of_leaf = np.array([place[tensor] for tensor in outline.tensors_L])
    leaves_T = tuple(np.flatnonzero(of_leaf == t) for t in range(len(tensors)))
    norm_WT = _tensor_norms(series.norm, leaves_T)
    peak_WT = _tensor_norms(series.peak, leaves_T) if series.thinned else norm_WT
    scores = scores_of(norm_WT, peak_WT if series.thinned else None)
    own = series.own_scale_R
    acted = ~(own >= 1 - 1e-6)
    finite_own = own[acted & np.isfinite(own)]
    scaled, kept = 0.0, 1.0
    if series.scaled_WL is not None:
        scaled = float(series.scaled_WL.sum() / max(1, series.num_rows * int(outline.bins_L.sum())))
        after = np.sqrt(((_zero_bad(series.norm()) * _zero_bad(series.kept())) ** 2).sum(axis=1))
        before = np.sqrt((_zero_bad(series.norm()) ** 2).sum(axis=1))
        kept = float(np.median(after[before > 0] / before[before > 0])) if (before > 0).any() else 1.0
    return StreamAccount(
        series,
        tensors,
        leaves_T,
        peak_WT,
        scores,
        _first(series, tensors, leaves_T, peak_WT, scores),
        tuple(series.step_W[scores.left_WT.any(axis=1)].tolist()),
        uses_of(series),
        float(acted.mean()),
        float(np.median(finite_own)) if len(finite_own) else 1.0,
        scaled,
        kept,
    )


def _zero_bad(values: np.ndarray | None) -> np.ndarray:
    assert values is not None
    return np.where(np.isfinite(values), values, 0.0).astype(np.float64)


def _tensor_norms(read: Any, leaves_T: tuple[np.ndarray, ...]) -> np.ndarray:
    """(W, T) norms of tensors from those of their leaves, a tensor at a time to spare memory."""
    columns = []
    for leaves in leaves_T:
        with np.errstate(over="ignore"):
            columns.append(np.sqrt((read(leaves).astype(np.float64) ** 2).sum(axis=1)))
    return np.stack(columns, axis=1)


def _first(
    series: Series, tensors: tuple[str, ...], leaves_T: tuple[np.ndarray, ...], norm_WT: np.ndarray, scores: Scores
) -> Departure | None:
    rows = np.flatnonzero(scores.left_WT.any(axis=1))
    if not len(rows):
        return None
    w = int(rows[0])
    bad_T = ~np.isfinite(norm_WT[w])
    everything = bool(len(tensors) > 1 and bad_T.mean() >= SPREAD)
    ranked = np.where(scores.left_WT[w], scores.score_WT[w], -np.inf)
    t = int(np.argmax(np.where(bad_T, np.inf, ranked)))
    with np.errstate(divide="ignore", invalid="ignore"):
        times_WT = norm_WT[w : w + 1 + AFTERMATH] / scores.usual_WT[w]
    times_T = np.where(np.isfinite(times_WT).all(axis=0), times_WT.max(axis=0), np.inf)
    # Once something has left its history its neighbours no longer need to rise alone.
    left_WT = (scores.score_WT[w : w + 1 + AFTERMATH] >= SCORE) & ~(times_WT <= RISEN)
    others = [u for u in range(len(tensors)) if u != t and left_WT[:, u].any()]
    others.sort(key=lambda u: (int(np.argmax(left_WT[:, u])), -times_T[u]))
    neighbours = tuple(
        Neighbour(tensors[u], float(times_T[u]), int(series.step_W[w + int(np.argmax(left_WT[:, u]))])) for u in others
    )
    row = int(series.start_W[w])
    end = int(series.start_W[w + 1]) if w + 1 < len(series.start_W) else series.num_rows
    before, behind = series.loss_R[max(0, row - 10) : row], series.loss_R[row : end + 10]
    seen = behind[~np.isnan(behind)] if np.isfinite(before).any() else behind[:0]
    return Departure(
        stream=series.stream.index,
        tensor="all" if everything else tensors[t],
        rows=() if everything else _rows(series, leaves_T[t], w),
        step=int(series.step_R[row]),
        last_step=int(series.step_R[end - 1]),
        window=w,
        time=float(series.time_R[row]),
        norm=float(norm_WT[w, t]),
        usual=float(scores.usual_WT[w, t]),
        score=float(scores.score_WT[w, t]),
        lasting=int(left_WT[1:, t].sum()),
        neighbours=neighbours,
        num_neighbours=len(others),
        num_tensors=len(tensors),
        loss_before=float(np.nanmedian(before)) if np.isfinite(before).any() else float("nan"),
        loss_after=float("inf") if np.isnan(behind).any() and len(seen) else float(seen.max(initial=-np.inf)),
    )


def _rows(series: Series, leaves: np.ndarray, w: int) -> tuple[tuple[str, float], ...]:
    """Return the leaves that rose, most first, where they are at most half of the tensor's."""
    names = series.stream.outline.leaf_names
    if len(leaves) < 2:
        return ()
    history = series.norm(leaves)[max(0, w - HISTORY) : w]
    usual = np.median(np.where(np.isfinite(history), history, 0.0), axis=0) if len(history) else np.zeros(len(leaves))
    now = series.peak(leaves)[w].astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        times = np.where(np.isfinite(now), np.where(usual > 0, now / usual, 1.0), np.inf)
    # Half of the largest rise, on the scale on which a rise is a sum.
    left = np.flatnonzero(times > max(RISEN, float(np.sqrt(min(times.max(), 1e300)))))
    if not len(left) or len(left) > len(leaves) / 2:
        return ()
    order = left[np.argsort(-times[left], kind="stable")]
    return tuple((names[leaves[i]], float(times[i])) for i in order)
