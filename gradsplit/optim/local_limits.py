"""Budgets whose limit of a bin needs that bin alone, as lines that a kernel evaluates while the bin is in cache.

limit_b = max(slope * ||w_b||, floor_b)            times the pace of the learning rate for a bound on the update
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..budget import Budget, Fixed, Relative, RelativeStep

__all__ = ["Line", "lines_of"]

Line = tuple[float, np.ndarray]
"""A slope, and one floor a bin."""


def lines_of(budgets: Sequence[tuple[str, Budget]], numel_B: np.ndarray) -> list[Line] | None:
    """Return one line a budget, or None where a budget looks beyond the bin: at a node above, or at the past.

    Args:
        budgets: (level, budget) pairs.
        numel_B: (B,) elements of each bin.
    """
    lines: list[Line] = []
    for level, budget in budgets:
        if level != "bin":
            return None
        line = _line_of(budget, numel_B)
        if line is None:
            return None
        lines.append(line)
    return lines


def _line_of(budget: Budget, numel_B: np.ndarray) -> Line | None:
    # A subclass may have changed its rule, so the exact type counts.
    made: Any = type(budget)
    if made is Fixed:
        assert isinstance(budget, Fixed)
        return 0.0, np.broadcast_to(np.asarray(budget.limit, dtype=np.float64), numel_B.shape)
    if made is Relative:
        assert isinstance(budget, Relative)
        return budget.factor, np.full(len(numel_B), budget.factor * budget.eps)
    if made is RelativeStep:
        assert isinstance(budget, RelativeStep)
        return budget.tau, budget.tau * budget.floor * np.sqrt(numel_B)
    return None
