"""Two programs timed in turn, A B A B, so that other work on the machine falls on both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Pair", "in_turn"]


@dataclass(frozen=True)
class Pair:
    """Times of two programs, in seconds, in the order in which they ran.

    Attributes:
        ours, theirs: one per turn.
        memory: in the same turns, what moving our side's bytes would take if only memory set the pace; or nothing.
    """

    ours: list[float]
    theirs: list[float]
    memory: list[float] = field(default_factory=list)

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

    @property
    def times_the_memory(self) -> float:
        """Median over the turns of ours / memory."""
        return statistics.median(a / b for a, b in zip(self.ours, self.memory, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """Times, medians, ranges and the ratio; with the memory's times also the floor, memory / theirs."""
        floor = statistics.median(a / b for a, b in zip(self.memory, self.theirs, strict=True)) if self.memory else None
        known = {} if floor is None else {"limit_seconds": statistics.median(self.memory), "floor": floor}
        return {
            **asdict(self),
            **known,
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
    memory: Sequence[tuple[Callable[[], Any], float]] = (),
    seconds: float = 4.0,
    turns: int = 60,
) -> Pair:
    """Time two programs in turn, after three untimed turns, for about so many seconds, at least five turns.

    The bandwidth of a virtual machine may change twofold within minutes, so what memory allows is measured in every
    turn as well.

    Args:
        ours: one program.
        theirs: the other.
        before: runs untimed before each of them, for example to fill the gradients anew.
        memory: programs that move bytes and do little else, each with how many times its bytes our side moves.
        seconds: time to spend.
        turns: at most so many.
    """
    times: tuple[list[float], list[float]] = ([], [])
    limits: list[float] = []
    began = time.perf_counter()
    turn = 0
    while turn < 8 or (turn < turns + 3 and time.perf_counter() - began < seconds):
        for program, kept in zip((ours, theirs), times, strict=True):
            before()
            start = time.perf_counter()
            program()
            if turn >= 3:
                kept.append(time.perf_counter() - start)
        limit = 0.0
        for program, share in memory:
            start = time.perf_counter()
            program()
            limit += share * (time.perf_counter() - start)
        if memory and turn >= 3:
            limits.append(limit)
        turn += 1
    return Pair(*times, limits)
