"""Budgets whose limit of a bin needs that bin alone, as lines that a kernel evaluates while the bin is in cache.

limit_b = max(slope * ||w_b||, floor + root * sqrt(n_b), row * sqrt(rows_b))       times the tensor's rates for a bound
on the update; rows_b is n_b over the width of the tensor's rows, so that a kernel needs one root a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .base import Budget
from .fixed import Fixed
from .relative import Relative
from .relative_step import RelativeStep

__all__ = ["Line", "line_table", "lines_of"]


class Line(NamedTuple):
    """A limit as a function of the length of the bin's weights, its number of elements and its rows of a matrix."""

    slope: float
    floor: float
    root: float
    row: float
    bounds_update: bool


def lines_of(budgets: Sequence[tuple[str, Budget]]) -> list[Line] | None:
    """Return one line a budget, or None where a budget looks beyond the bin: at a node above, at the past, at a list.

    >>> lines_of([("bin", Relative(0.2, eps=0.01))])
    [Line(slope=0.2, floor=0.002, root=0.0, row=0.0, bounds_update=False)]
    >>> lines_of([("root", Fixed(1.0))]) is None
    True
    """
    lines = [_line_of(budget) if level == "bin" else None for level, budget in budgets]
    known = [line for line in lines if line is not None]
    return known if len(known) == len(lines) else None


def _line_of(budget: Budget) -> Line | None:
    # A subclass may have changed its rule, so the exact type counts.
    made: Any = budget
    if type(budget) is Fixed and isinstance(made.limit, float):
        return Line(0.0, made.limit, 0.0, 0.0, False)
    if type(budget) is Relative:
        return Line(made.factor, made.factor * made.eps, 0.0, 0.0, False)
    if type(budget) is RelativeStep:
        return Line(made.tau, 0.0, made.tau * made.floor, made.tau * made.length, True)
    return None


def line_table(lines: Sequence[Line], width_T: np.ndarray, times_T: np.ndarray | None = None) -> np.ndarray:
    """Return the lines (J, 3, T) for kernels: slope, floor and root for each tensor.

    A line's ``row`` enters the root, for no budget has both it and a floor.

    Args:
        lines: from `lines_of`.
        width_T: (T,) elements of a row of each tensor, see `Plan.width_T`.
        times_T: (T,) by which a tensor's bounds on the update are multiplied; None: 1.
    """
    table = np.empty((len(lines), 3, len(width_T)))
    for j, line in enumerate(lines):
        table[j] = np.array(line[:3])[:, None]
        table[j, 2] = np.maximum(line.root, line.row / np.sqrt(width_T))
        if line.bounds_update and times_T is not None:
            with np.errstate(over="ignore"):  # a bound beyond all numbers is inf: none
                table[j] *= times_T
    return table
