"""Where it began: the first departure of a run, and which tensor, batch, rate or module it is laid to.

Shape suffixes: _R one entry per row, _W one per window, _T one per tensor.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..record import Series, Stream
from .rules import HISTORY, RISEN, SCORE, Scores, Seen, Weights, larger_batch, seen_in, unlike_batch

__all__ = ["Departure", "Neighbour", "end_of", "first_departure"]

AFTERMATH = 10  # windows after a departure in which its neighbours are looked at
ALIKE = 4.0  # rises within this factor of the largest are the same event


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
        loss_before: the last finite loss before; nan if no loss was seen.
        loss_after: largest loss of this row and the ten after; inf if one was not finite.
        kind: by which rule: "history", a rule without one ("norm", "loss_rose", "settled", "growth", "weights",
            "loss_lost", "rate", "batch"), or what was seen of lost values ("backward", "forward", "input", "loss",
            "crash").
        reason: what was seen, for all rules but the history.
        rate_times: learning rate here over the median of the rows before; 1 where it did not rise.
        skipped_before: steps that a gradient scaler skipped just before; the first of them is ``step``.
        rank: of the process whose batch or forward pass it was.
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
    kind: str = "history"
    reason: str = ""
    rate_times: float = 1.0
    rank: int = 0
    skipped_before: int = 0

    @property
    def times(self) -> float:
        """Norm over usual norm."""
        return self.norm / self.usual


def first_departure(
    series: Series,
    tensors: tuple[str, ...],
    leaves_T: tuple[np.ndarray, ...],
    norm_WT: np.ndarray,
    scores: Scores,
    weights: Weights,
    remarks: list[dict[str, Any]],
    *,
    alone: bool,
) -> Departure | None:
    """The earliest thing that any rule has found; what several found within two windows is one event.

    What grows slowly gives way to something sudden that happened while it grew.
    """
    seen = seen_in(series, weights, alone=alone)
    left = np.flatnonzero(scores.left_WT.any(axis=1))

    def window_of(row: int) -> int:
        return int(np.searchsorted(series.start_W, row, side="right")) - 1

    sudden = [*map(int, left[:1]), *(window_of(one.row) for one in seen if one.kind in _SUDDEN)]
    slow = [window_of(one.row) for one in seen if one.until > one.row]
    w = min([*map(int, left[:1]), *(window_of(one.row) for one in seen)], default=-1)
    crash = next((one for one in remarks if one.get("kind") == "crash"), None)
    if w < 0:
        last_lost = len(weights.step_K) and not np.isfinite(weights.length_KT[-1]).all()
        if crash is None or not (last_lost or series.num_rows == 0):
            return None
        w, seen = len(series.start_W) - 1, [Seen(series.num_rows - 1, "crash", "its weights were lost")]
    elif slow and sudden and w < min(sudden) <= max(window_of(one.until) for one in seen):
        w = min(sudden)  # a sudden event lies within the slow growth, and is taken as its cause
        seen = [one for one in seen if one.until <= one.row]
    near = {one.kind: one for one in seen if window_of(one.row) <= w + 2}
    jump, rate = near.get("weights"), near.get("rate")
    if jump is not None and len(left) and left[0] <= window_of(jump.row):
        w = max(w, int(left[0]))  # weights are read at few steps only, so the gradient tells the step
    if jump is not None and window_of(jump.since) >= w:
        jump = None  # the update of this step made the weights jump, and not the other way round
    place_T = _places(series.stream, tensors)
    bad_T = ~np.isfinite(norm_WT[w])
    kind, reason, everything = "history", "", False
    with np.errstate(divide="ignore", invalid="ignore"):
        usual_T = np.where(np.isnan(scores.usual_WT[w]), norm_WT[0], scores.usual_WT[w])
        times_T = norm_WT[w] / usual_T
    t = _origin_of_risen(times_T, scores.left_WT[w], place_T)
    larger = _larger(series, w)
    batch = larger or _unlike(series, weights, remarks, w)
    if jump is not None and jump.tensor is not None and not bad_T.all():
        t, kind, reason = jump.tensor, "weights", jump.reason
    elif bad_T.any() and not larger and not (batch and np.isfinite(series.loss_R[series.start_W[w]])):
        t, kind, reason, everything = _origin_of_lost(series, tensors, norm_WT, w, place_T, remarks)
    elif rate is not None:
        kind, reason = "rate", rate.reason
    elif batch:
        kind, reason = "batch", batch
    else:
        chosen = next(iter(near.values()), None)
        if not scores.left_WT[w].any() and chosen is not None:
            kind, reason = chosen.kind, chosen.reason
    first = _departure(series, tensors, leaves_T, norm_WT, scores, w, t, kind, reason, everything=everything)
    return _from_skipped(series, first)


def _from_skipped(series: Series, first: Departure) -> Departure:
    """A departure right after steps that a gradient scaler skipped began with the first of these."""
    row = start = int(series.start_W[first.window])
    while start > 0 and series.skipped_R[start - 1]:
        start -= 1
    if start == row or series.thinned or first.kind not in ("history", "norm", "loss_rose"):
        return first
    step = int(series.step_R[start])
    return dataclasses.replace(first, step=step, last_step=step, skipped_before=row - start)


_SUDDEN = ("rate", "weights", "loss_lost")  # the others hold a row against the start, and may come late


def _is_of(remark: dict[str, Any], series: Series, w: int) -> bool:
    """Whether a remark was made at a row of this window; older files know only its step."""
    first, end = int(series.start_W[w]), end_of(series, w)
    if "row" in remark:
        return first <= int(remark["row"]) < end
    return bool(series.step_R[first] <= int(remark.get("step", -1)) <= series.step_R[end - 1])


def _larger(series: Series, w: int) -> str:
    """Say how much larger the batch of this window was than any before it; empty where it was not."""
    row, times = larger_batch(series)
    if not int(series.start_W[w]) <= row < end_of(series, w):
        return ""
    return f"the root mean square of what the first layer was given was {times:.3g} times that of any batch before"


def _unlike(series: Series, weights: Weights, remarks: list[dict[str, Any]], w: int) -> str:
    """Say how the batch of this window was unlike those before it; empty where it was not, or nobody knows."""
    for row in range(int(series.start_W[w]), end_of(series, w)):
        seen = next((one for one in remarks if one.get("kind") == "batch" and _is_of(one, series, w)), None)
        told = unlike_batch(series, weights, row, None if seen is None else float(seen.get("times", 0.0)))
        if told:
            return told
    return ""


def _places(stream: Stream, tensors: tuple[str, ...]) -> np.ndarray:
    """(T,) the place of each tensor in the forward pass; the model's own order where that was not recorded."""
    names, order = stream.about.get("names") or [], stream.about.get("forward_order") or []
    known = {names[i]: place for place, i in enumerate(order)} if len(order) == len(names) else {}
    return np.array([known.get(name, t) for t, name in enumerate(tensors)])


def _origin_of_risen(times_T: np.ndarray, left_T: np.ndarray, place_T: np.ndarray) -> int:
    """Of the tensors that rose about as much as the one that rose most, the last of the forward pass.

    A gradient that grows on its way down is large in everything below the place where it grew.
    """
    among = left_T if left_T.any() else np.ones(len(times_T), dtype=bool)
    rise = np.where(among & np.isfinite(times_T), times_T, -np.inf)
    if not np.isfinite(rise).any():
        return int(np.flatnonzero(among)[0])
    most = float(rise.max())
    alike = np.flatnonzero(rise >= max(most / ALIKE, min(most, RISEN)))
    return int(alike[np.argmax(place_T[alike])])


def _origin_of_lost(
    series: Series,
    tensors: tuple[str, ...],
    norm_WT: np.ndarray,
    w: int,
    place_T: np.ndarray,
    remarks: list[dict[str, Any]],
) -> tuple[int, str, str, bool]:
    """Tensor, kind, reason, and whether no tensor can be named, of values that are not finite.

    A value that is lost in backward flows from the loss down: the last tensor that lost it, in the order of the forward
    pass, is nearest its birth. Where the loss itself was lost, the graph of the loss was looked at then.
    """
    bad_T = ~np.isfinite(norm_WT[w])
    here = [one for one in remarks if _is_of(one, series, w)]
    remark = next((one for one in here if one.get("kind") in _LOST_WORDS), None)
    given = series.given_R[: int(series.start_W[w]) + 1]
    if remark is None and np.isinf(given[-1]) and np.isfinite(given[:-1]).any():
        remark = {"kind": "input"}  # not on a CPU, where the graph of the loss says it
    if remark is not None:
        where = str(remark.get("where", ""))
        t = tensors.index(where) if where in tensors else int(np.flatnonzero(bad_T)[0])
        kind = str(remark["kind"])
        operation = f" (in {remark['operation']})" if remark.get("operation") else ""
        return t, kind, _LOST_WORDS[kind] + operation, where not in tensors
    bad = np.flatnonzero(bad_T)
    last = int(bad[np.argmax(place_T[bad])])
    module = tensors[last].rpartition(".")[0]
    of_module = [t for t in bad.tolist() if tensors[t].rpartition(".")[0] == module]
    loss = series.loss_R[series.start_W[w]]
    whole = bool((bad_T | (norm_WT[w] == 0)).all() and len(tensors) > 1)
    if whole and np.isfinite(loss):
        above = "the loss was finite, so that the backward pass lost it in this module, the last one, or above it"
        return of_module[0], "backward", above, False
    if whole:
        return of_module[0], "loss", "", True
    if len(bad) == 1:
        return last, "backward", "", False
    return of_module[0], "backward", "the tensors after it in the forward pass stayed finite", False


_LOST_WORDS = {
    "forward": "the forward pass made the first value that was not finite here, or right behind it",
    "input": "the batch itself had values that were not finite",
    "weights": "its weights were not finite already",
    "loss": "the values below the loss were finite: the loss itself made the first that was not",
}


def end_of(series: Series, w: int) -> int:
    """The row after the last one of a window."""
    return int(series.start_W[w + 1]) if w + 1 < len(series.start_W) else series.num_rows


def _departure(
    series: Series,
    tensors: tuple[str, ...],
    leaves_T: tuple[np.ndarray, ...],
    norm_WT: np.ndarray,
    scores: Scores,
    w: int,
    t: int,
    kind: str,
    reason: str,
    *,
    everything: bool,
) -> Departure:
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
    row, end = int(series.start_W[w]), end_of(series, w)
    before, behind = series.loss_R[:row], series.loss_R[row : end + 10]
    before = before[np.isfinite(before)]
    seen = behind[~np.isnan(behind)] if len(before) or np.isfinite(behind).any() else behind[:0]
    rates = series.lr_R[max(0, row - HISTORY) : max(0, row - AFTERMATH)]
    rates = rates[np.isfinite(rates) & (rates > 0)]
    newest = series.lr_R[max(0, row - AFTERMATH) : row + 1]
    rate_times = (
        float(newest[np.isfinite(newest)].max() / np.median(rates)) if len(rates) and np.isfinite(newest).any() else 1.0
    )
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
        loss_before=float(before[-1]) if len(before) else float("nan"),
        loss_after=float("inf") if np.isnan(behind).any() and len(seen) else float(seen.max(initial=-np.inf)),
        kind=kind,
        reason=reason,
        rate_times=max(1.0, rate_times),
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
