"""Two programs timed in turn, A B A B, so that whatever else the machine does falls on both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Pair", "in_turn"]


@dataclass(frozen=True)
class Pair:
    """Times of two programs, in seconds, in the order in which they ran.

    Attributes:
        ours, theirs: one a turn.
    """

    ours: list[float]
    theirs: list[float]

    @property
    def _ratios(self) -> list[float]:
        return [a / b for a, b in zip(self.ours, self.theirs, strict=True)]

    @property
    def ratio(self) -> float:
        """Median over the turns of ours / theirs."""
        return statistics.median(self._ratios)

    @property
    def low(self) -> float:
        """Lower quartile of the ratios."""
        return statistics.quantiles(self._ratios, n=4)[0]

    @property
    def high(self) -> float:
        """Upper quartile of the ratios."""
        return statistics.quantiles(self._ratios, n=4)[2]

    def to_dict(self) -> dict[str, Any]:
        """Times, medians, ranges and the ratio."""
        return {
            **asdict(self),
            "ours_median": statistics.median(self.ours),
            "theirs_median": statistics.median(self.theirs),
            "ours_range": [min(self.ours), max(self.ours)],
            "theirs_range": [min(self.theirs), max(self.theirs)],
            "ratio": self.ratio,
            "ratio_quartiles": [self.low, self.high],
            "turns": len(self.ours),
        }


def in_turn(
    ours: Callable[[], Any],
    theirs: Callable[[], Any],
    *,
    before: Callable[[], Any] = lambda: None,
    seconds: float = 4.0,
    turns: int = 60,
) -> Pair:
    """Time two programs in turn, after three untimed turns, for about so many seconds, at least five turns.

    Args:
        ours: one program.
        theirs: the other.
        before: runs untimed before each of them, for example to fill the gradients anew.
        seconds: time to spend.
        turns: at most so many.
    """
    times: tuple[list[float], list[float]] = ([], [])
    began = time.perf_counter()
    turn = 0
    while turn < 8 or (turn < turns + 3 and time.perf_counter() - began < seconds):
        for program, kept in zip((ours, theirs), times, strict=True):
            before()
            start = time.perf_counter()
            program()
            if turn >= 3:
                kept.append(time.perf_counter() - start)
        turn += 1
    return Pair(*times)
