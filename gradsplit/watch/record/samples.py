"""Which samples stood out at a departure: rows on the host say when, the samples' norms are read for those steps alone.

A step is read if a norm or the loss is not finite, a part is 12 times its median of the last 64 rows, or the whole
gradient or the loss is 5 times its own. That is wider than what the report calls a departure. So is a step in which the
input of one sample is far beyond those of its batch: in front of BatchNorm no norm shows it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ...sources.observe import SampleWatch
from ...sources.standing import Reading
from .rows import Rows

__all__ = ["SampleReader"]

PART, WHOLE = 12.0, 5.0
HISTORY = 64  # rows
IN_A_ROW = 3  # departures one after the other that are read
MOST_READINGS = 100  # of a run
MOST_INPUTS = 20  # of them for an input alone
MOST_ROWS = 20  # samples named per reading
MOST_NAMES = 20  # parameters without a rule that are named


class SampleReader:
    """Reads the samples of those steps whose rows leave what is usual.

    Args:
        watch: what keeps the norms of the samples.
    """

    def __init__(self, watch: SampleWatch) -> None:
        self.watch = watch.open()
        self.num_readings = self.num_inputs = 0
        self._history: dict[int, np.ndarray] = {}
        self._num_rows: dict[int, int] = {}
        self._in_a_row: dict[int, int] = {}

    def look(self, rows: Rows) -> list[dict[str, Any]]:
        """Return a remark for every row that leaves what is usual."""
        index, first = rows.stream.index, self._num_rows.get(rows.stream.index, 0)
        self._num_rows[index] = first + len(rows)
        with np.errstate(all="ignore"):
            values = np.concatenate(
                [rows.norm_SL, rows.total_S[:, None], np.abs(rows.loss_S)[:, None]], axis=1, dtype=np.float64
            )
            out, new = self._out(index, values)
        far = self.watch.far(index, range(first, first + len(rows))) if self.num_inputs < MOST_INPUTS else set()
        made = []
        for k, left in enumerate(out.tolist()):
            streak = self._in_a_row[index] = self._in_a_row.get(index, 0) + 1 if left else 0
            if left and (streak <= IN_A_ROW or new[k]) and self.num_readings < MOST_READINGS:
                self.num_readings += 1
                reading = self.watch.read(index, first + k)
                about = {"kind": "samples", "stream": index, "step": int(rows.step_S[k]), "row": first + k}
                made.append({**about, **_plain(reading, self.watch.failed)})
            told = bool(made) and made[-1]["row"] == first + k and made[-1].get("by") == "input"
            if first + k in far and not told and self.num_inputs < MOST_INPUTS:
                reading = self.watch.read(index, first + k, inputs_first=True)
                if reading.rows and reading.by == "input":
                    self.num_inputs += 1
                    about = {"kind": "samples", "stream": index, "step": int(rows.step_S[k]), "row": first + k}
                    made.append({**about, **_plain(reading, "")})
        return made

    def _out(self, index: int, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(S,) whether a row leaves what is usual, and whether the row before it was nothing like it."""
        bar = np.full(values.shape[1], PART)
        bar[-2:] = WHOLE
        before = self._history.get(index, np.zeros((0, values.shape[1])))
        table = np.concatenate([before, values])
        start, out = len(before), np.zeros(len(values), dtype=bool)
        at = 0
        while at < len(values):  # the first rows have few before them: their measure is taken anew as these double
            place = start + at
            stop = len(values) if place >= HISTORY else min(len(values), at + max(1, place))
            usual = np.full(values.shape[1], math.inf)
            if place:
                usual = _median(table[max(0, place - HISTORY) : place])
            out[at:stop] = (values[at:stop] > bar * np.where(usual > 0, usual, math.inf)).any(axis=1)
            at = stop
        seen = np.isfinite(table[:, -1])
        lost = ~np.isfinite(values[:, :-1]).all(axis=1) | (~np.isfinite(values[:, -1]) & (np.cumsum(seen)[start:] > 0))
        self._history[index] = table[-HISTORY:]
        last = table[max(0, start - 1) : -1] if start else np.concatenate([values[:1], values[:-1]])
        new = ((values > bar * last) | (~np.isfinite(values) & np.isfinite(last))).any(axis=1)
        return out | lost | np.isinf(values[:, -1]), new


def _median(values: np.ndarray) -> np.ndarray:
    """The lower median of each column's finite values; inf without any."""
    finite = np.isfinite(values)
    ordered = np.sort(np.where(finite, values, math.inf), axis=0)
    middle: np.ndarray = ordered[np.maximum(finite.sum(axis=0) - 1, 0) // 2, np.arange(values.shape[1])]
    return middle


def _plain(reading: Reading, failed: str) -> dict[str, Any]:
    rows = [
        [row.pass_, row.sample, row.layer, None if math.isnan(row.ratio) else min(row.ratio, 1e300), row.num_layers]
        for row in reading.rows[:MOST_ROWS]
    ]
    return {
        "rows": rows,
        "num": len(reading.rows),
        "num_passes": reading.num_passes,
        "batch": reading.batch,
        "why": "failed" if failed and not rows else reading.why,
        "times": reading.times if math.isfinite(reading.times) else 1.0,
        "unruled": list(reading.unruled[:MOST_NAMES]),
        "num_unruled": len(reading.unruled),
        **({} if reading.by == "gradient" else {"by": reading.by}),
    }
