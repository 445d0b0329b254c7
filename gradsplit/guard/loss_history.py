"""LossHistory: whether a loss has left its own history, by median and median absolute deviation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["LossHistory"]

LEAST = 16  # losses before which nothing is judged
FLOOR = 0.05  # of the median: a loss that hardly varies is not out for a few per cent


class LossHistory:
    """The last losses that were in order, and how far a new one is above them.

        score = (loss - median) / max(1.4826 MAD, 0.05 |median|)

    A loss is *out* if it is not finite, or its score is above ``score``. Neither median nor median absolute deviation
    follows a few spikes; losses that are out are not to be taken in.

    Args:
        length: losses kept.
        score: no unit.

    >>> history = LossHistory(128, 10.0)
    >>> for k in range(20):
    ...     history.add(1.0 + 0.01 * (k % 3))
    >>> history.median, history.is_out(1.4), history.is_out(2.0), history.is_out(math.nan)
    (1.01, False, True, True)
    """

    def __init__(self, length: int, score: float) -> None:
        self.length, self.score = length, score
        self._losses = np.empty(length)
        self._num = 0
        self._summary: tuple[float, float] | None = None

    def __len__(self) -> int:
        return min(self._num, self.length)

    def add(self, loss: float) -> None:
        """Take in a loss that is in order."""
        self._losses[self._num % self.length] = loss
        self._num += 1
        self._summary = None

    def is_out(self, loss: float) -> bool:
        """Whether a loss is out; never, before there are 16 to judge by, if it is finite."""
        if not math.isfinite(loss):
            return True
        if len(self) < LEAST:
            return False
        median, spread = self._numbers()
        return loss - median > self.score * spread

    @property
    def median(self) -> float:
        """The usual loss; nan without a history."""
        return self._numbers()[0] if len(self) else math.nan

    @property
    def spread(self) -> float:
        """What a score of 1 is, in units of the loss; nan without a history."""
        return self._numbers()[1] if len(self) else math.nan

    def _numbers(self) -> tuple[float, float]:
        if self._summary is None:
            kept = self._losses[: len(self)]
            median = float(np.median(kept))
            deviation = float(np.median(np.abs(kept - median)))
            self._summary = (median, max(1.4826 * deviation, FLOOR * abs(median)))
        return self._summary

    def state_dict(self) -> dict[str, Any]:
        """Return the losses, oldest first, as plain data."""
        start = self._num % self.length if self._num > self.length else 0
        return {"losses": np.roll(self._losses[: len(self)], -start).tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take losses over; the last ones, if this history is shorter."""
        self._num, self._summary = 0, None
        for loss in state["losses"][-self.length :]:
            self.add(float(loss))
