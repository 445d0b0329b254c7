"""The part of a plan that lies in some of its tensors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .boxes import Boxes
from .layout import Layout
from .plan import Plan

__all__ = ["part_of"]


def part_of(plan: Plan, tensors: Sequence[int]) -> tuple[Plan, np.ndarray]:
    """Return a plan of some tensors alone, and the bins it keeps, in the order of its own.

    >>> from gradsplit.plan import xsp
    >>> part, bins = part_of(xsp(Layout.from_shapes({"w": (2, 3), "b": (2,), "u": (2, 1)})), [1, 2])
    >>> [bin.name for bin in part.bins], bins.tolist()
    (['b', 'u[0:1]', 'u[1:2]'], [2, 3, 4])
    """
    boxes, layout = plan.boxes, plan.layout
    place_T = np.full(len(layout), -1, dtype=np.int64)
    place_T[list(tensors)] = np.arange(len(tensors))
    kept = place_T[boxes.tensor_K] >= 0
    columns = [column[kept] for column in vars(boxes).values()]
    bins, numbers = np.unique(columns[5], return_inverse=True)
    columns[0], columns[5] = place_T[columns[0]], numbers.reshape(-1)
    part = Layout(tuple(layout.names[t] for t in tensors), tuple(layout.shapes[t] for t in tensors))
    return Plan(part, Boxes.from_columns(*columns), modules=plan.modules), bins
