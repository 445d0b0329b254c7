"""The account of a run: what left its history first, what that did to the others, and how the budgets were used."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...resume.actions import GuardAction
from ..record import RunFile, RunFileError, Series, Stream, Turns
from .origin import Departure, end_of, first_departure
from .rules import (
    Scores,
    Weights,
    counted,
    larger_batch,
    outgrown,
    rises_of,
    scores_of,
)
from .samples import SampleReading, readings_of, samples_at

__all__ = ["FAILURES", "fails_on", "NodeUse", "uses_of", "Account", "StreamAccount", "account_of"]


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
        turns: what GSO's steps did; empty for other optimizers.
        raised: step at which the learning rate rose far above all before it, and how far; (0, 0.0) where it did not.
        larger: step and size of a batch far larger than all before it, as a multiple; (-1, 0.0) where there was none.
        samples: what was read of the samples, in the order of steps; empty without ``--samples``.
        at_first: those readings that explain the first departure, also of other ranks.
        outgrown: step and median growth of the matrices where they outgrew their start early; (0, 0.0) where not.
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
    turns: Turns
    outgrown: tuple[int, float] = (0, 0.0)
    raised: tuple[int, float] = (0, 0.0)
    larger: tuple[int, float] = (-1, 0.0)
    samples: tuple[SampleReading, ...] = ()
    at_first: tuple[SampleReading, ...] = ()

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
        """The earliest departure of any optimizer.

        What one network was given may be what another made: at the same step, the one that made it is named.
        """
        found = [account.first for account in self.streams if account.first is not None]
        first = min(found, key=lambda departure: departure.time, default=None)
        if first is not None and first.kind == "input":
            makers = (one for one in found if one.kind == "forward" and abs(one.step - first.step) <= 1)
            return next(makers, first)
        return first

    @property
    def samples_at_first(self) -> tuple[SampleReading, ...]:
        """The samples of the step of the first departure."""
        first = self.first
        return next((one.at_first for one in self.streams if one.first is not None and one.first is first), ())

    @property
    def num_rows(self) -> int:
        """Rows over all optimizers."""
        return sum(account.series.num_rows for account in self.streams)


FAILURES = {
    "explosion": "a norm, a loss or a weight exploded, or was not finite",
    "nonfinite": "a gradient was not finite",
    "exception": "the script ended with an exception",
}
"""What ``--fail-on`` knows, and when it fails."""


def fails_on(word: str, account: Account) -> bool:
    """Whether a run shows what ``--fail-on WORD`` asks for.

    Raises:
        KeyError: another word than those of `FAILURES`.
    """
    if word == "explosion":
        return account.first is not None
    if word == "nonfinite":
        return any(not np.isfinite(stream.norm_WT).all() for stream in account.streams)
    if word == "exception":
        return "exception" in account.meta
    raise KeyError(word)


def account_of(file: RunFile) -> Account:
    """Read a run file and return its account.

    Raises:
        RunFileError: nothing recorded yet, or a broken file.
    """
    recorded = [stream for stream in file.streams if file.num_rows(stream.index)]
    with np.errstate(all="ignore"):
        streams = tuple(
            _stream_account(
                file.series(stream),
                _weights_of(file, stream),
                _remarks_of(file, stream),
                file.turns(stream),
                alone=len(recorded) == 1,
            )
            for stream in recorded
        )
    if not streams:
        raise RunFileError(f"run file {file.path}: expected at least one recorded step, got none yet.")
    streams = tuple(_with_ranks(account, file) for account in streams)
    return Account(str(file.path), file.meta, streams, tuple(file.thinnings()), tuple(file.actions()))


def _with_ranks(account: StreamAccount, file: RunFile) -> StreamAccount:
    """The account of rank 0 with what another rank knows of the same event: gradients are shared, batches are not."""
    first, rank = account.first, _whole(file.meta.get("rank"), 0)
    account = dataclasses.replace(account, samples=readings_of(_remarks_of(file, account.stream), rank))
    if first is None:
        return account
    others: list[SampleReading] = []
    if _whole(file.meta.get("world_size"), 1) >= 2 and not rank:
        account = _of_ranks(account, first, file, others)
    first, series = account.first or first, account.series
    rows = range(int(series.start_W[first.window]), end_of(series, first.window))
    return dataclasses.replace(account, at_first=samples_at(first, rows, account.samples, others))


def _whole(value: object, otherwise: int) -> int:
    """A whole number that a run file may hold, or anything else in its place."""
    return value if isinstance(value, int) else otherwise


def _of_ranks(account: StreamAccount, first: Departure, file: RunFile, others: list[SampleReading]) -> StreamAccount:
    """The account with the departure of the rank whose batch it was; the samples of all ranks are gathered."""
    for path in sorted(file.path.parent.glob(f"{file.path.stem}.rank*{file.path.suffix}"))[:_MOST_RANKS]:
        with contextlib.suppress(RunFileError, KeyError), RunFile(path) as beside:
            there = next((s for s in beside.streams if s.index == first.stream and beside.num_rows(s.index)), None)
            if there is None:
                continue
            rank = _whole(beside.meta.get("rank"), 0)
            others += readings_of(_remarks_of(beside, there), rank)
            if account.first is not first or first.kind in _OF_A_RANK:
                continue
            with np.errstate(all="ignore"):
                told = _stream_account(
                    beside.series(there),
                    _weights_of(beside, there),
                    _remarks_of(beside, there),
                    beside.turns(there),
                    alone=True,
                ).first
            if told is not None and told.kind in _OF_A_RANK and abs(told.step - first.step) <= 1:
                window = min(told.window, len(account.series.start_W) - 1)
                account = dataclasses.replace(account, first=dataclasses.replace(told, rank=rank, window=window))
    return account


_OF_A_RANK = ("input", "forward", "batch", "loss")  # what one rank sees in its own forward pass
_MOST_RANKS = 64


def _weights_of(file: RunFile, stream: Stream) -> Weights:
    """The lengths of a stream's weights, tensors in the order of its outline."""
    step_K, length_KT = file.lengths(stream)
    names = list(stream.about.get("names") or ())
    tensors = list(dict.fromkeys(stream.outline.tensors_L))
    if not len(step_K) or set(tensors) != set(names):
        return Weights(np.zeros(0, dtype=np.int64), np.zeros((0, len(tensors))), np.ones(len(tensors)))
    place = {name: t for t, name in enumerate(tensors)}
    numel_T = np.zeros(len(tensors))
    np.add.at(numel_T, [place[name] for name in stream.outline.tensors_L], stream.outline.numel_L)
    order = np.argsort(step_K, kind="stable")
    columns = [names.index(name) for name in tensors]
    return Weights(step_K[order], length_KT[order][:, columns], numel_T)


def _remarks_of(file: RunFile, stream: Stream) -> list[dict[str, Any]]:
    """What was seen beside the rows of this stream; a crash belongs to the first."""
    return [one for one in file.meta.get("remarks", []) if int(one.get("stream", 0)) == stream.index]


def _stream_account(
    series: Series, weights: Weights, remarks: list[dict[str, Any]], turns: Turns, *, alone: bool
) -> StreamAccount:
    outline = series.stream.outline
    tensors = tuple(dict.fromkeys(outline.tensors_L))
    place = {tensor: t for t, tensor in enumerate(tensors)}
    of_leaf = np.array([place[tensor] for tensor in outline.tensors_L])
    leaves_T = tuple(np.flatnonzero(of_leaf == t) for t in range(len(tensors)))
    norm_WT = _tensor_norms(series.norm, leaves_T)
    peak_WT = _tensor_norms(series.peak, leaves_T) if series.thinned else norm_WT
    scores = scores_of(norm_WT, peak_WT if series.thinned else None)
    ordinary_W = ~np.logical_or.reduceat(counted(series), series.start_W)
    scores.left_WT[ordinary_W] = False  # skipped by a gradient scaler, as such scalers do
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
        first_departure(series, tensors, leaves_T, peak_WT, scores, weights, remarks, alone=alone),
        tuple(series.step_W[scores.left_WT.any(axis=1)].tolist()),
        uses_of(series),
        float(acted.mean()),
        float(np.median(finite_own)) if len(finite_own) else 1.0,
        scaled,
        kept,
        turns,
        outgrown(weights, _matrices(series.stream, tensors)),
        _raised(series),
        _larger(series),
    )


def _larger(series: Series) -> tuple[int, float]:
    row, times = larger_batch(series)
    return (-1, 0.0) if row < 0 else (int(series.step_R[row]), times)


def _raised(series: Series) -> tuple[int, float]:
    rate = series.lr_R.astype(np.float64)
    row = next(iter(rises_of(rate)), None)
    return (0, 0.0) if row is None else (int(series.step_R[row]), float(rate[row] / np.nanmax(rate[:row])))


def _matrices(stream: Stream, tensors: tuple[str, ...]) -> np.ndarray:
    """(T,) whether a tensor has two dimensions or more of more than one element."""
    names, shapes = stream.about.get("names") or [], stream.about.get("shapes") or []
    wide = {name for name, shape in zip(names, shapes, strict=False) if sum(int(k) > 1 for k in shape) > 1}
    return np.array([tensor in wide for tensor in tensors])


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
