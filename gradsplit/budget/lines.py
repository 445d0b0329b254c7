"""Budgets whose limit of a bin needs that bin alone, as a table that a kernel evaluates while the bin is in cache."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .base import Budget, Line

__all__ = ["Line", "line_table", "lines_of"]


def lines_of(budgets: Sequence[tuple[str, Budget]]) -> list[Line] | None:
    """Return one line per budget, or None where a budget looks beyond the bin.

    A budget looks beyond the bin where it bounds a node above the bins, or where its `Budget.line` is None.

    >>> from gradsplit.budget import Fixed, Relative
    >>> lines_of([("bin", Relative(0.2, eps=0.01))])
    [Line(slope=0.2, floor=0.002, root=0.0, row=0.0, bounds_update=False)]
    >>> lines_of([("root", Fixed(1.0))]) is None
    True
    """
    lines = [budget.line() if level == "bin" else None for level, budget in budgets]
    known = [line for line in lines if line is not None]
    return known if len(known) == len(lines) else None


def line_table(lines: Sequence[Line], width_T: np.ndarray, times_T: np.ndarray | None = None) -> np.ndarray:
    """Return the lines (J, 3, T) for kernels: slope, floor and root of each tensor.

    A bin of n elements in matrix rows of width w has n / w rows, so ``row sqrt(rows_b) = row / sqrt(w) sqrt(n)``: a
    kernel needs one root per tensor.

    Args:
        lines: from `lines_of`.
        width_T: (T,) elements of a matrix row of each tensor, see `Plan.width_T`.
        times_T: (T,) factors of each tensor's limits on the update; None: 1.
    """
    table = np.empty((len(lines), 3, len(width_T)))
    for j, line in enumerate(lines):
        table[j] = np.array(line[:3])[:, None]
        table[j, 2] = np.maximum(line.root, line.row / np.sqrt(width_T))
        if line.bounds_update and times_T is not None:
            with np.errstate(over="ignore"):  # a limit beyond all numbers is inf, which bounds nothing
                table[j] *= times_T
    return table
