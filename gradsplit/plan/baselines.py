"""The two baselines: everything in one bin, and one bin a tensor."""

from __future__ import annotations

import numpy as np

from .boxes import Boxes, sides_of
from .layout import Layout
from .plan import Plan

__all__ = ["per_tensor", "whole"]


def _one_box_each(layout: Layout) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    tensor = np.array([t for t, numel in enumerate(layout.numels) if numel], dtype=np.int64)
    rows, cols = sides_of(layout)
    return tensor, rows[tensor], cols[tensor]


def whole(layout: Layout) -> Plan:
    """Put every tensor into one bin: what a global clip controls.

    >>> whole(Layout.from_shapes({"w": (4, 3), "b": (4,)})).num_bins
    1
    """
    tensor, rows, cols = _one_box_each(layout)
    zero = np.zeros_like(tensor)
    return Plan(layout, Boxes.from_columns(tensor, zero, rows, zero, cols, zero))


def per_tensor(layout: Layout) -> Plan:
    """Make one bin a tensor; an empty tensor has none.

    >>> per_tensor(Layout.from_shapes({"w": (4, 3), "b": (4,)})).num_bins
    2
    """
    tensor, rows, cols = _one_box_each(layout)
    zero = np.zeros_like(tensor)
    return Plan(layout, Boxes.from_columns(tensor, zero, rows, zero, cols, np.arange(len(tensor))))
