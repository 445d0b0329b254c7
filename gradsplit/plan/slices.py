"""XSP, x-axis splitting: slices along one axis of the matrix view. Simple; the other axis is not controlled."""

from __future__ import annotations

import numpy as np

from .boxes import Boxes, sides_of
from .layout import Layout, check_layout
from .plan import Plan

__all__ = ["per_tensor", "whole", "xsp"]


def _one_box_each(layout: Layout) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    tensor = np.array([t for t, numel in enumerate(layout.numels) if numel], dtype=np.int64)
    rows, cols = sides_of(layout)
    return tensor, rows[tensor], cols[tensor]


def whole(layout: Layout) -> Plan:
    """Put every tensor into one bin: what a global clip controls.

    >>> whole(Layout.from_shapes({"w": (4, 3), "b": (4,)})).num_bins
    1
    """
    check_layout(layout, call="whole")
    tensor, rows, cols = _one_box_each(layout)
    zero = np.zeros_like(tensor)
    return Plan(layout, Boxes.from_columns(tensor, zero, rows, zero, cols, zero))


def per_tensor(layout: Layout) -> Plan:
    """Make one bin per tensor; an empty tensor has no bin.

    >>> per_tensor(Layout.from_shapes({"w": (4, 3), "b": (4,)})).num_bins
    2
    """
    check_layout(layout, call="per_tensor")
    tensor, rows, cols = _one_box_each(layout)
    zero = np.zeros_like(tensor)
    return Plan(layout, Boxes.from_columns(tensor, zero, rows, zero, cols, np.arange(len(tensor))))


_MAX_BINS = 2**27  # 134 million bins: six int64 columns are 6 GB, more than a plan can be worth


def xsp(layout: Layout, *, parts: int | None = None, axis: int = 0) -> Plan:
    """Cut every tensor along one axis of its matrix view into contiguous slices, one bin per slice.

    Slice k of n rows in p parts is ``[k n // p, (k + 1) n // p)``: sizes differ by at most one. A tensor with fewer
    rows than parts gets one bin per row. A 0-d or 1-d tensor is a single row, so rows leave it whole and columns cut
    it.

    Args:
        layout: names and shapes.
        parts: slices per tensor; None: one per row (one per output unit in PyTorch), or one per column.
        axis: 0 cuts rows, 1 cuts columns.

    Raises:
        TypeError: no layout, for example a model.
        ValueError: parts < 1, another axis, or more bins than a plan can hold.

    >>> plan = xsp(Layout.from_shapes({"w": (5, 2), "b": (5,)}), parts=2)
    >>> [bin.name for bin in plan.bins]
    ['w[0:2]', 'w[2:5]', 'b']
    """
    check_layout(layout, call="xsp")
    if parts is not None and (not isinstance(parts, int) or isinstance(parts, bool) or parts < 1):
        raise ValueError(
            f"xsp(parts={parts!r}): expected parts >= 1 or None. Use whole() or per_tensor() for fewer bins."
        )
    if axis not in (0, 1):
        raise ValueError(
            f"xsp(axis={axis!r}): expected 0 (rows) or 1 (columns). Use axis=0 for one bin per output unit."
        )
    sizes = layout.rows if axis == 0 else layout.cols
    counts = [min(size, parts or size) if numel else 0 for size, numel in zip(sizes, layout.numels, strict=True)]
    if sum(counts) > _MAX_BINS:
        raise ValueError(
            f"xsp(parts={parts}): expected at most {_MAX_BINS:,} bins, got {sum(counts):,}, for which a plan alone "
            f"would take {48 * sum(counts):,} bytes. Pass parts=, for example xsp(layout, parts=64)."
        )
    across_T = sides_of(layout)[1 - axis]
    tensor = np.repeat(np.arange(len(layout), dtype=np.int64), counts)
    starts, stops = np.empty(len(tensor), dtype=np.int64), np.empty(len(tensor), dtype=np.int64)
    at = 0
    for size, count in zip(sizes, counts, strict=True):
        if count == size:
            cuts = np.arange(size + 1, dtype=np.int64)
        else:
            cuts = np.array([k * size // count for k in range(count + 1)] if count else [0], dtype=np.int64)
        starts[at : at + count], stops[at : at + count] = cuts[:-1], cuts[1:]
        at += count
    other_start, other_stop = np.zeros(len(tensor), dtype=np.int64), across_T[tensor]
    bins = np.arange(len(tensor), dtype=np.int64)
    if axis == 0:
        return Plan(layout, Boxes(tensor, starts, stops, other_start, other_stop, bins))
    return Plan(layout, Boxes(tensor, other_start, other_stop, starts, stops, bins))
