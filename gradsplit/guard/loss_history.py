"""LossHistory: whether a loss has left its own history, by median and median absolute deviation."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

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
        self._losses: deque[float] = deque(maxlen=length)  # lists: numpy's calls cost more than 128 numbers do
        self._summary: tuple[float, float] | None = None

    def __len__(self) -> int:
        return len(self._losses)

    def add(self, loss: float) -> None:
        """Take in a loss that is in order."""
        self._losses.append(loss)
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
            median = _median(self._losses)
            deviation = _median([abs(loss - median) for loss in self._losses])
            self._summary = (median, max(1.4826 * deviation, FLOOR * abs(median)))
        return self._summary

    def state_dict(self) -> dict[str, Any]:
        """Return the losses, oldest first, as plain data."""
        return {"losses": list(self._losses)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take losses over; the last ones, if this history is shorter."""
        self._losses = deque((float(loss) for loss in state["losses"]), maxlen=self.length)
        self._summary = None


def _median(values: Iterable[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
