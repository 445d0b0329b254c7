"""Which samples of a batch stood out: against the rest of the batch, and against the batches before it.

    r_i = n_i / upper quarter of the batch's n;   x_i = min(r_i / its usual largest r, n_i / its usual largest n) > 4

Where nobody does, the input of the first layer is looked at: a_i a hundred times the upper quarter of its batch, and
ten times what is usual. In front of BatchNorm such a sample spoils the statistic, and no gradient shows it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

__all__ = ["FAR", "RECENT", "Reading", "Seen", "Standing", "standing_out", "upper"]

BEYOND = 4.0  # of what is usual for the largest sample of a batch
FIRST = 20.0  # of the batch's upper quarter, where there is no batch before
FAR, FARTHER = 100.0, 10.0  # of an input: of the batch's upper quarter, and of what is usual
ENOUGH, RECENT = 4, 32  # passes before that are a measure, and the most that are
COLLECTIVE = 5.0  # of the median sample's input over that of the batches before: the batch is unlike as a whole


class Standing(NamedTuple):
    """A sample that stood out.

    Attributes:
        pass_: which backward pass of the step, from 0; with accumulation the micro-batch.
        sample: position in the batch of that pass.
        layer: where most.
        ratio: n over the upper quarter of its batch; nan: not finite.
        num_layers: in how many layers.
    """

    pass_: int
    sample: int
    layer: str
    ratio: float
    num_layers: int


@dataclass(frozen=True)
class Reading:
    """What the samples of one step were.

    Attributes:
        rows: those that stood out, most first.
        num_passes: backward passes of the step.
        batch: samples of its largest pass; 0 where none was seen.
        why: "" where samples stood out; else "none" (all alike), "whole" (the batch was unlike as a whole), "all"
            (every sample was not finite), "one" (a batch of one), "unseen" (no layer with a rule ran), "gone" (not
            kept).
        times: for "whole", the median sample's input over that of the batches before.
        unruled: parameters of layers that have no rule, or did not run.
        by: what the samples stood out by: "gradient", or "input" where the gradient of nobody did.
    """

    rows: tuple[Standing, ...]
    num_passes: int = 0
    batch: int = 0
    why: str = ""
    times: float = 1.0
    unruled: tuple[str, ...] = ()
    by: str = "gradient"


class Seen(NamedTuple):
    """One call of a layer in one pass, on the host."""

    layer: str
    place: int
    activation_S: np.ndarray | None
    signal_S: np.ndarray

    @property
    def norm_S(self) -> np.ndarray:
        """How much each sample adds, at most."""
        with np.errstate(over="ignore", invalid="ignore"):
            return self.signal_S if self.activation_S is None else self.signal_S * self.activation_S


def standing_out(
    before: Sequence[Sequence[Seen]],
    now: Sequence[Sequence[Seen]],
    unruled: tuple[str, ...],
    *,
    inputs_first: bool = False,
) -> Reading:
    """Which samples of the passes of one step stood out, against their batches and the passes before.

    With ``inputs_first`` the input counts before the gradient: where nothing departed, it is why the step is read.
    """
    before = [_of_batch(one) for one in before]
    rows: list[Standing] = []
    inputs: list[Standing] = []
    why, times, batch = "unseen", 1.0, 0
    for number, one in enumerate(now):
        seen = _of_batch(one)
        size = len(seen[0].signal_S) if seen else 0
        batch = max(batch, size)
        if not seen:
            continue
        found, reason, scaled = _lost(seen)
        if reason == "none":
            found, reason, scaled = _larger(seen, before)
        if size == 1 and reason in ("", "none", "all"):
            found, reason = [], "one"
        if reason == "none" or (inputs_first and not any(math.isnan(ratio) for _, _, ratio, _ in found)):
            inputs += [Standing(number, *each) for each in _far(seen, before)]
        rows += [Standing(number, *each) for each in found]
        if _RANK.index(reason) < _RANK.index(why):
            why, times = reason, scaled
    lost = any(math.isnan(row.ratio) for row in rows)
    rows = sorted((row for row in rows if math.isnan(row.ratio) == lost), key=lambda row: -row.ratio)
    by = "gradient"
    if inputs and (inputs_first or not rows):
        rows, by = sorted(inputs, key=lambda row: -row.ratio), "input"
    return Reading(tuple(rows), len(now), batch, "" if rows else why, times, unruled, by)


_RANK = ("", "all", "whole", "none", "one", "unseen")
_Found = tuple[list[tuple[int, str, float, int]], str, float]


def _of_batch(seen: Sequence[Seen]) -> list[Seen]:
    """The calls whose number of samples is that of the batch: most of them have it."""
    counts = Counter(len(one.signal_S) for one in seen)
    if not counts:
        return []
    most = max(counts.values())
    size = min(size for size, count in counts.items() if count == most)
    fit = [one for one in seen if len(one.signal_S) == size]
    return [
        one._replace(activation_S=None) if one.activation_S is not None and len(one.activation_S) != size else one
        for one in fit
    ]


def _lost(seen: Sequence[Seen]) -> _Found:
    """Samples that were not finite: where some first were in the forward pass, else in the backward pass."""
    for one in seen:
        bad = np.zeros(0, dtype=bool) if one.activation_S is None else ~np.isfinite(one.activation_S)
        if bad.any():
            if bad.all() and len(bad) > 1:
                return [], "all", 1.0
            return _of_lost(one, bad), "", 1.0
    for one in reversed(seen):
        bad = ~np.isfinite(one.signal_S)
        if bad.any():
            if bad.all() and len(bad) > 1:
                return [], "all", 1.0
            return _of_lost(one, bad), "", 1.0
    return [], "none", 1.0


def _of_lost(one: Seen, bad: np.ndarray) -> list[tuple[int, str, float, int]]:
    return [(int(i), one.layer, math.nan, 1) for i in np.flatnonzero(bad)]


def _larger(seen: Sequence[Seen], before: Sequence[Sequence[Seen]]) -> _Found:
    """Samples that are finite and larger than the rest of their batch, and than what is usual."""
    size = len(seen[0].signal_S)
    if size == 1:
        return [], "one", 1.0
    times = _collective(seen, before)
    if times > COLLECTIVE:
        return [], "whole", times
    best: dict[int, tuple[float, str, float]] = {}
    num_layers: Counter[int] = Counter()
    for one in seen:
        norm_S = one.norm_S
        ratio_S = _against_batch(norm_S)
        earlier = [past.norm_S for each in before for past in each if past.layer == one.layer and len(past.norm_S) > 1]
        earlier = [past for past in earlier if np.isfinite(past).all()][-RECENT:]
        if len(earlier) < ENOUGH:
            excess_S = ratio_S / (FIRST / BEYOND)
        else:
            usual = max(1.0, float(np.quantile([_against_batch(past).max() for past in earlier], 0.8)))
            largest = float(np.median([past.max() for past in earlier]))
            excess_S = ratio_S / usual
            if largest > 0:
                excess_S = np.minimum(excess_S, norm_S / largest)
        for i in np.flatnonzero(excess_S > BEYOND).tolist():
            num_layers[i] += 1
            if i not in best or excess_S[i] > best[i][0]:
                best[i] = (float(excess_S[i]), one.layer, float(ratio_S[i]))
    top = max((excess for excess, _, _ in best.values()), default=0.0)
    # Half of the largest excess, on the scale on which an excess is a sum: what it drew along is not named.
    named = [(i, layer, ratio, num_layers[i]) for i, (excess, layer, ratio) in best.items() if excess >= math.sqrt(top)]
    return (named, "", 1.0) if named else ([], "none", 1.0)


def _far(seen: Sequence[Seen], before: Sequence[Sequence[Seen]]) -> list[tuple[int, str, float, int]]:
    """Samples whose input to the first layer is far beyond the rest of their batch, and beyond what is usual."""
    first = next((one for one in seen if one.activation_S is not None), None)
    if first is None or first.activation_S is None:
        return []
    level = float(np.sort(first.activation_S)[upper(len(first.activation_S))])
    if not 0 < level < math.inf:
        return []
    bar = FAR * level
    earlier = [
        past.activation_S
        for each in before
        for past in each
        if past.layer == first.layer and past.activation_S is not None and len(past.activation_S) > 1
    ]
    earlier = [past for past in earlier if np.isfinite(past).all()][-RECENT:]
    if len(earlier) >= ENOUGH:
        usual = float(np.quantile([_against_batch(past).max() for past in earlier], 0.8))
        bar = max(bar, FARTHER * usual * level, FARTHER * float(np.median([past.max() for past in earlier])))
    found = np.flatnonzero(first.activation_S > bar)
    return [(int(i), first.layer, float(first.activation_S[i] / level), 1) for i in found]


def _collective(seen: Sequence[Seen], before: Sequence[Sequence[Seen]]) -> float:
    """The median sample's input of the first layer that has one, over that of the passes before."""
    first = next((one for one in seen if one.activation_S is not None), None)
    if first is None or first.activation_S is None:
        return 1.0
    usual = [
        float(np.median(past.activation_S))
        for each in before
        for past in each
        if past.layer == first.layer and past.activation_S is not None
    ]
    usual = [value for value in usual if 0 < value < math.inf][-RECENT:]
    return float(np.median(first.activation_S) / np.median(usual)) if usual else 1.0


def _against_batch(norm_S: np.ndarray) -> np.ndarray:
    """Each over the upper quarter of its batch (small ones: the lower median), or over the mean of the others."""
    place = upper(len(norm_S))
    level = float(np.partition(norm_S, place)[place])
    if level > 0:
        return norm_S / level
    others = (norm_S.sum() - norm_S) / max(len(norm_S) - 1, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(norm_S > 0, norm_S / others, 0.0)


def upper(size: int) -> int:
    """Where the upper quarter of so many numbers in order begins; of a few the lower median."""
    return math.ceil((0.75 if size >= 8 else 0.5) * size) - 1
