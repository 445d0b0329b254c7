"""The pattern of a tensor: which bin each of its rows, columns or cells is in, whatever the framework.

Kernels that have no loop over bins start from the pattern. They add squares over the axes along which the bin does not
change, and multiply by a factor that broadcasts along these axes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .plan import Plan

__all__ = ["Pattern", "pattern_of"]


class Pattern(NamedTuple):
    """The bins of one tensor, in the axes of its matrix view of rows x cols.

    Attributes:
        kind: "tensor", "rows", "cols" or "cells": what has one bin each; "none": an empty tensor, which has no bin.
        bins: int64 numbers of bins, of a shape that broadcasts over the matrix view: (1, 1), (rows, 1), (1, cols),
            (rows, cols), or (0, 0).
    """

    kind: str
    bins: np.ndarray


def pattern_of(plan: Plan, t: int) -> Pattern:
    """Return the pattern of tensor ``t``: the smallest shape that tells its boxes apart.

    >>> from gradsplit.plan import Layout, xsp
    >>> plan = xsp(Layout.from_shapes({"w": (4, 3), "b": (4,)}), parts=2)
    >>> pattern = pattern_of(plan, 0)
    >>> pattern.kind, pattern.bins.tolist()
    ('rows', [[0], [0], [1], [1]])
    >>> pattern_of(plan, 1).bins.tolist()
    [[2]]
    """
    part, boxes = plan.boxes_of(t), plan.boxes
    rows, cols = plan.layout.rows[t], plan.layout.cols[t]
    bins, r0, r1 = boxes.bin_K[part], boxes.row_start_K[part], boxes.row_stop_K[part]
    c0, c1 = boxes.col_start_K[part], boxes.col_stop_K[part]
    if not len(bins):
        return Pattern("none", np.empty((0, 0), dtype=np.int64))
    if len(bins) == 1:
        return Pattern("tensor", bins.reshape(1, 1))
    if (c1 - c0 == cols).all():
        return Pattern("rows", np.repeat(bins, r1 - r0).reshape(rows, 1))
    if (r1 - r0 == rows).all():
        return Pattern("cols", np.repeat(bins, c1 - c0).reshape(1, cols))
    cells = np.empty((rows, cols), dtype=np.int64)
    for k in range(len(bins)):
        cells[r0[k] : r1[k], c0[k] : c1[k]] = bins[k]
    return Pattern("cells", cells)
