"""Bands: narrow bins read together, memory row by memory row, and added up by columns.

Between two neighbouring row cuts of a tensor the same bins lie beside each other, so a band is a rectangle of whole
memory rows with a list of cuts: where each of its bins stops. The work inside a row is then as wide as the tensor,
however narrow its bins are.
"""

from __future__ import annotations

import numpy as np

from .plan import Plan
from .strides import Memory

__all__ = ["bands_of", "cut_bands"]

BAND_TENSOR, BAND_OFFSET, BAND_ROWS, BAND_ROW_STEP, BAND_LENGTH, BAND_CUT, BAND_NUM_CUTS, BAND_SLOT = range(8)
"""The columns of a band. Its i-th cut stops at column ``cut_stops[cut + i]``; its bin is ``cut_bins[cut + i]``."""


def bands_of(
    plan: Plan, part: slice, memory: Memory, t: int, num_cuts: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a tensor's bands (D, 8), the stops of their cuts and the cuts' bins.

    Args:
        plan: the bins.
        part: the tensor's boxes.
        memory: how the tensor lies in memory.
        t: its index.
        num_cuts: cuts of the tensors before it.
    """
    boxes = plan.boxes
    r0, r1 = boxes.row_start_K[part], boxes.row_stop_K[part]
    c0, c1 = boxes.col_start_K[part], boxes.col_stop_K[part]
    if memory.turned:
        r0, r1, c0, c1 = c0, c1, r0, r1
    edges = np.unique(np.concatenate((r0, r1)))
    top, bottom = np.searchsorted(edges, r0), np.searchsorted(edges, r1)
    # Every box once a band that it crosses; then, band by band, from left to right.
    times = bottom - top
    box = np.repeat(np.arange(len(r0)), times)
    band = np.arange(len(box)) - np.repeat(np.cumsum(times) - times, times) + top[box]
    order = np.lexsort((c0[box], band))
    box, band = box[order], band[order]
    num_bands = len(edges) - 1
    per_band = np.bincount(band, minlength=num_bands)
    table = np.zeros((num_bands, 8), dtype=np.int64)
    table[:, BAND_TENSOR] = t
    table[:, BAND_OFFSET] = edges[:-1] * memory.line
    table[:, BAND_ROWS] = np.diff(edges)
    table[:, BAND_ROW_STEP] = memory.line
    table[:, BAND_LENGTH] = c1.max()
    table[:, BAND_CUT] = num_cuts + np.cumsum(per_band) - per_band
    table[:, BAND_NUM_CUTS] = per_band
    return table, c1[box], boxes.bin_K[part][box]


def cut_bands(bands: np.ndarray, target: int) -> np.ndarray:
    """Cut bands above the target's number of elements between rows; each piece has all cuts of its band."""
    pieces = [np.zeros((0, 8), dtype=np.int64)]
    for row in bands:
        most = max(1, target // int(row[BAND_LENGTH]), 4 * int(row[BAND_NUM_CUTS]) // int(row[BAND_LENGTH]))
        starts = np.arange(0, int(row[BAND_ROWS]), most)
        out = np.repeat(row[None], len(starts), axis=0)
        out[:, BAND_ROWS] = np.minimum(most, row[BAND_ROWS] - starts)
        out[:, BAND_OFFSET] += starts * row[BAND_ROW_STEP]
        pieces.append(out)
    return np.concatenate(pieces)
