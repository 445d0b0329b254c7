"""Lowering: a plan over tensors of given strides becomes tables of strided rows for kernels, without a framework.

An *entry* is a run of neighbouring bins of one tensor and one shape. It has ``count`` bins; the i-th begins at element
``offset + i * step`` and has ``rows`` rows of ``length`` contiguous elements, ``row_step`` elements apart. A tensor
that is cut by rows is one entry, however many rows it has. Where bins are so narrow that their rows would be a few
elements long, a *band* reads whole memory rows instead and adds up columns: see `bands_of`.

Offsets count elements from a tensor's first one, so the tables hold for every tensor of the same strides; addresses
come in only when a kernel runs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from .plan import Plan

__all__ = ["Memory", "memory_of", "bands_of", "cut_bands", "Lowered", "lower", "is_addressable"]


class Memory(NamedTuple):
    """How a matrix view lies in memory.

    Attributes:
        turned: rows of the matrix are columns of memory, as in a transposed tensor.
        line: elements from one memory row to the next.
        mixed: columns lie in another order than the matrix view's (channels_last): only whole rows can be cut out.
    """

    turned: bool
    line: int
    mixed: bool


@lru_cache(maxsize=4096)
def memory_of(shape: tuple[int, ...], strides: tuple[int, ...]) -> Memory | None:
    """Return how a tensor's matrix view lies in memory, or None where it is not addressable.

    None: elements that overlap (an expanded tensor), or neither rows nor columns that are contiguous.

    >>> memory_of((4, 3), (3, 1)), memory_of((4, 3), (1, 4))
    (Memory(turned=False, line=3, mixed=False), Memory(turned=True, line=4, mixed=False))
    >>> memory_of((4, 3), (0, 1)) is None
    True
    """
    dims = [(size, stride) for size, stride in zip(shape, strides, strict=True) if size != 1]
    reach = 0
    for size, stride in sorted(dims, key=lambda dim: (dim[1], dim[0])):
        if stride <= reach:
            return None
        reach += (size - 1) * stride
    matrix = len(shape) > 1
    inner = [(s, d) for s, d in zip(shape[1:], strides[1:], strict=True) if s != 1] if matrix else dims
    cols = math.prod(size for size, _ in inner)
    line = strides[0] if matrix and shape[0] > 1 else cols
    if all(a[1] == b[0] * b[1] for a, b in itertools.pairwise(inner)):
        col_stride = inner[-1][1] if inner else 1
        if col_stride == 1:
            return Memory(False, line, False)
        one_row = not matrix or shape[0] == 1
        return Memory(True, col_stride, False) if one_row or line == 1 else None
    rising = sorted(inner, key=lambda dim: dim[1])
    dense = rising[0][1] == 1 and all(b[1] == a[0] * a[1] for a, b in itertools.pairwise(rising))
    return Memory(False, line, True) if dense else None


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
    # Each box once per band that it crosses; then, band by band, from left to right.
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


SLOT, BIN, COUNT, TENSOR, OFFSET, STEP, ROWS, ROW_STEP, LENGTH = range(9)
"""The columns of an entry."""

NARROW = 320
"""Bins beside each other with shorter rows are read in bands, since a short row costs mostly the start of its loop."""


@dataclass(frozen=True)
class Lowered:
    """The tables of a plan over tensors of given strides.

    Attributes:
        entries: (E, 9) int64, in the order of the tensors.
        chunks: (C + 1,) bounds of the chunks in ``entries``; each chunk is about the same work.
        bands: (D, 8) int64, see `bands`.
        band_chunks: (F + 1,) bounds of the chunks in ``bands``.
        cut_stops, cut_bins: per cut of the bands the column where it stops, and its bin.
        num_slots: where partial results go: slot b < B is bin b, each further one is added to its bin.
        fold_bins: (num_slots - B,) the bins of the further slots.
        num_elements: in all entries and bands.
        longest: elements of the largest stretch of a bin that is in one entry.
        whole_bins: no bin is in two entries or bands.
    """

    entries: np.ndarray
    chunks: np.ndarray
    bands: np.ndarray
    band_chunks: np.ndarray
    cut_stops: np.ndarray
    cut_bins: np.ndarray
    num_slots: int
    fold_bins: np.ndarray
    num_elements: int
    longest: int
    whole_bins: bool


def lower(
    plan: Plan, strides_T: Sequence[tuple[int, ...] | None], *, bands: bool = True, cut_bins: bool = True
) -> Lowered | None:
    """Return the tables for tensors of these strides; None in place of strides leaves a tensor out.

    The tables depend on the plan and the strides alone, never on the number of threads; so sums do not either.

    Args:
        plan: the bins.
        strides_T: element strides, one tuple per entry of the layout.
        bands: read narrow bins in bands; else everything as entries.
        cut_bins: large bins may be cut between chunks; False for kernels that must see a bin as a whole.

    Returns:
        None where a tensor is not addressable: it overlaps itself, or neither rows nor columns are contiguous.
    """
    tables, band_tables = [np.zeros((0, 9), dtype=np.int64)], [np.zeros((0, 8), dtype=np.int64)]
    stops, bins = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    num_cuts = 0
    for t, strides in enumerate(strides_T):
        part = plan.boxes_of(t)
        if strides is None or part.start == part.stop:
            continue
        memory = memory_of(plan.layout.shapes[t], tuple(strides))
        table = None if memory is None else _entries_of(plan, t, part, memory)
        if memory is None or table is None:
            return None
        runs = int((table[:, COUNT] * table[:, ROWS]).sum())
        across = plan.layout.rows[t] if memory.turned else plan.layout.cols[t]
        mean_length = plan.layout.numels[t] / max(runs, 1)
        if bands and not memory.mixed and mean_length < NARROW and 2 * mean_length <= across:
            rows, cut_stop, cut_bin = bands_of(plan, part, memory, t, num_cuts)
            band_tables.append(rows)
            stops.append(cut_stop)
            bins.append(cut_bin)
            num_cuts += len(cut_stop)
        else:
            tables.append(table)
    entries, band_rows, cut_bin = np.concatenate(tables), np.concatenate(band_tables), np.concatenate(bins)
    work, band_work = _work(entries), band_rows[:, BAND_ROWS] * band_rows[:, BAND_LENGTH]
    num_elements = int(work.sum() + band_work.sum())
    # Enough chunks that a slow core holds nobody up, large enough to be worth fetching.
    target = min(max(num_elements // 64, 8_192), 262_144)
    entries = _cut_entries(entries, target, cut_bins=cut_bins)
    band_rows = cut_bands(band_rows, target)
    whole = _give_slots(entries, band_rows, cut_bin, plan.num_bins)
    further = _further_bins(entries, band_rows, cut_bin, plan.num_bins)
    band_work = band_rows[:, BAND_ROWS] * band_rows[:, BAND_LENGTH] + 4 * band_rows[:, BAND_NUM_CUTS]
    return Lowered(
        entries=entries,
        chunks=_chunk_bounds(_work(entries) + 8 * entries[:, COUNT] * entries[:, ROWS], target),
        bands=band_rows,
        band_chunks=_chunk_bounds(band_work, target),
        cut_stops=np.concatenate(stops),
        cut_bins=cut_bin,
        num_slots=plan.num_bins + len(further),
        fold_bins=further,
        num_elements=num_elements,
        longest=int((entries[:, ROWS] * entries[:, LENGTH]).max(initial=0)),
        whole_bins=whole and not len(band_rows),
    )


def is_addressable(plan: Plan, t: int, strides: tuple[int, ...]) -> bool:
    """Whether tensor t with these strides is rows of contiguous elements that the plan cuts."""
    memory = memory_of(plan.layout.shapes[t], tuple(strides))
    if memory is None or not memory.mixed:
        return memory is not None
    part = plan.boxes_of(t)
    return bool((plan.boxes.col_stop_K[part] - plan.boxes.col_start_K[part] == plan.layout.cols[t]).all())


def _work(entries: np.ndarray) -> np.ndarray:
    return entries[:, COUNT] * entries[:, ROWS] * entries[:, LENGTH]


def _entries_of(plan: Plan, t: int, part: slice, memory: Memory) -> np.ndarray | None:
    """One tensor's boxes in memory, neighbours of one shape joined; None where a box cuts mixed columns."""
    boxes = plan.boxes
    r0, r1 = boxes.row_start_K[part], boxes.row_stop_K[part]
    c0, c1 = boxes.col_start_K[part], boxes.col_stop_K[part]
    if memory.mixed and not ((c0 == 0).all() and (c1 == plan.layout.cols[t]).all()):
        return None
    if memory.turned:
        r0, r1, c0, c1 = c0, c1, r0, r1
    offset, rows, length = r0 * memory.line + c0, r1 - r0, c1 - c0
    joined = (length == memory.line) | (rows == 1)  # rows that follow each other without a gap are one row
    length, rows = np.where(joined, rows * length, length), np.where(joined, 1, rows)
    row_step = np.where(joined, 0, memory.line)
    bins = boxes.bin_K[part]
    step = np.diff(offset)
    alike = (np.diff(bins) == 1) & (np.diff(rows) == 0) & (np.diff(length) == 0) & (step >= 0)
    goes_on = alike.copy()
    goes_on[1:] &= ~alike[:-1] | (step[1:] == step[:-1])
    first = np.flatnonzero(np.concatenate(([True], ~goes_on)))
    count = np.diff(np.append(first, len(bins)))
    steps = np.append(step, 0)[first] * (count > 1)
    tensor = np.full(len(first), t, dtype=np.int64)
    of_box = [column[first] for column in (bins, offset, rows, row_step, length)]
    at_bin, offset, rows, row_step, length = of_box
    return np.stack((at_bin, at_bin, count, tensor, offset, steps, rows, row_step, length), axis=1).astype(np.int64)


def _cut_entries(entries: np.ndarray, target: int, *, cut_bins: bool) -> np.ndarray:
    """Cut entries above the target: between bins, or inside bins that are larger themselves."""
    large = _work(entries) > target
    if not large.any():
        return entries
    pieces = [entries[~large]]
    for row in entries[large]:
        each = int(row[ROWS] * row[LENGTH])
        if each <= target or not cut_bins:
            pieces.append(_cut(row, COUNT, (BIN, OFFSET), (1, row[STEP]), max(1, target // each)))
            continue
        for i in range(int(row[COUNT])):
            one = row.copy()
            one[BIN] += i
            one[OFFSET] += i * row[STEP]
            one[COUNT], one[STEP] = 1, 0
            if one[ROWS] > 1:
                pieces.append(_cut(one, ROWS, (OFFSET,), (row[ROW_STEP],), max(1, target // int(row[LENGTH]))))
            else:
                pieces.append(_cut(one, LENGTH, (OFFSET,), (1,), target))
    out = np.concatenate(pieces)
    return out[np.lexsort((out[:, OFFSET], out[:, TENSOR]))]


def _cut(row: np.ndarray, along: int, moved: tuple[int, ...], by: tuple[int, ...], most: int) -> np.ndarray:
    """One entry in pieces of at most ``most`` along a column; the columns ``moved`` advance with it."""
    starts = np.arange(0, int(row[along]), most)
    out = np.repeat(row[None], len(starts), axis=0)
    out[:, along] = np.minimum(most, row[along] - starts)
    for column, step in zip(moved, by, strict=True):
        out[:, column] += starts * step
    return out


def _give_slots(entries: np.ndarray, bands: np.ndarray, cut_bins: np.ndarray, num_bins: int) -> bool:
    """Give each entry its bins' own slots, or further ones where a bin is met twice; return whether none is."""
    met = np.zeros(num_bins + 1, dtype=np.int64)
    np.add.at(met, entries[:, BIN], 1)
    np.add.at(met, entries[:, BIN] + entries[:, COUNT], -1)
    shared = np.cumsum(met[:-1]) > 1
    np.logical_or.at(shared, cut_bins, True)
    before = np.concatenate(([0], np.cumsum(shared)))
    again = before[entries[:, BIN] + entries[:, COUNT]] > before[entries[:, BIN]]
    sizes = entries[:, COUNT] * again
    entries[:, SLOT] = np.where(again, num_bins + np.cumsum(sizes) - sizes, entries[:, BIN])
    cuts = bands[:, BAND_NUM_CUTS]
    bands[:, BAND_SLOT] = num_bins + int(sizes.sum()) + np.cumsum(cuts) - cuts
    return not bool(again.any())


def _further_bins(entries: np.ndarray, bands: np.ndarray, cut_bins: np.ndarray, num_bins: int) -> np.ndarray:
    """The bins of the slots beyond the bins' own, in the order of these slots."""
    parts = [np.arange(row[BIN], row[BIN] + row[COUNT]) for row in entries[entries[:, SLOT] >= num_bins]]
    parts += [cut_bins[row[BAND_CUT] : row[BAND_CUT] + row[BAND_NUM_CUTS]] for row in bands]
    return np.concatenate([np.zeros(0, dtype=np.int64), *parts]).astype(np.int64)


def _chunk_bounds(work: np.ndarray, target: int) -> np.ndarray:
    """Bounds of runs of entries of about the target's work each."""
    if not len(work):
        return np.zeros(1, dtype=np.int64)
    chunk = (np.cumsum(work + 32) - 1) // (target + 32)
    starts = np.flatnonzero(np.concatenate(([True], np.diff(chunk) > 0)))
    return np.append(starts, len(work)).astype(np.int64)
