"""The account of a run: what left its history first, what that did to the others, and how the budgets were used."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..record import GuardAction, RunFile, Series, Stream
from .node_use import NodeUse, uses_of
from .run_departures import HISTORY, RISEN, SCORE, Scores, scores_of

__all__ = ["Account", "Departure", "Neighbour", "StreamAccount", "account_of"]

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
        score: see `gradsplit.report.run_departures`; inf where not finite.
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
        norm_WT: (W, T) largest norms of the tensors a window.
        scores: the statistic.
        first: the first departure; None if there was none.
        left_steps: steps at which at least one tensor was out of its history.
        uses: one a node of the outline.
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
