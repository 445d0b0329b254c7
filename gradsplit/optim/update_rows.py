# mypy: disable-error-code="no-untyped-def"
"""Compiled steps along one row of a bin: sums of squares, moments, updates; the parts of GSO's loops."""

from __future__ import annotations

import math

import numpy as np

from ..kernels.addresses import compiled, load, narrow, store
from ..kernels.numba_loops import _square_row

__all__ = [
    "_adam_row",
    "_apply_row",
    "_bin_square",
    "_bin_squares",
    "_element_row",
    "_enter_row",
    "_mean_row",
    "_quick_mean_row",
    "_step_row",
    "_take_row",
]

BLOCK = 512
"""Squares of so many elements are added in the memory's own precision before they go into a float64 sum."""

TINY, HUGE = 1e-25, 1e37
"""A float32 sum of squares outside may have lost small terms or overflowed, and is taken again in float64."""

_reduced = compiled(fastmath={"reassoc", "contract"})


@_reduced
def _quick_square(memory, start, length):
    """The sum of squares, in blocks in the memory's own precision: half the work where no block over- or underflows."""
    total = 0.0
    for lo in range(0, length, BLOCK):
        total += _block_square(memory, start + lo, min(BLOCK, length - lo))
    return total


@_reduced
def _block_square(memory, start, length):
    part = narrow(memory, 0.0)
    for j in range(length):
        x = load(memory, start + j)
        part += x * x
    return np.float64(part)


@_reduced
def _bin_square(memory, start, rows, row_step, length):
    """The sum of squares of a bin; in float64 where the quick sum may have lost something."""
    total = 0.0
    for r in range(rows):
        total += _quick_square(memory, start + r * row_step, length)
    if TINY < total < HUGE:
        return total
    total = 0.0
    for r in range(rows):
        total += _square_row(memory, start + r * row_step, length)
    return total


@_reduced
def _block_squares(g, p, start, length):
    of_g, of_p = narrow(g, 0.0), narrow(p, 0.0)
    for j in range(length):
        x, y = load(g, start + j), load(p, start + j)
        of_g += x * x
        of_p += y * y
    return np.float64(of_g), np.float64(of_p)


@_reduced
def _bin_squares(g, p, start, rows, row_step, length):
    """The sums of squares of a bin in two tensors, read side by side: memory serves two streams faster than one."""
    total_g, total_p = 0.0, 0.0
    for r in range(rows):
        for lo in range(0, length, BLOCK):
            of_g, of_p = _block_squares(g, p, start + r * row_step + lo, min(BLOCK, length - lo))
            total_g += of_g
            total_p += of_p
    if not TINY < total_g < HUGE:
        total_g = _bin_square(g, start, rows, row_step, length)
    if not TINY < total_p < HUGE:
        total_p = _bin_square(p, start, rows, row_step, length)
    return total_g, total_p


@_reduced
def _element_block(g, m, v, start, length, s, w1, b2, w2, step, root, eps, kept, at):
    part = narrow(g, 0.0)
    for j in range(length):
        x = load(g, start + j) * s
        m0 = load(m, start + j)
        m1 = m0 + w1 * (x - m0)
        v1 = load(v, start + j) * b2 + x * x * w2
        u = m1 * step / (math.sqrt(v1) * root + eps)
        store(m, start + j, m1)
        store(v, start + j, v1)
        store(kept, at + j, u)
        part += u * u
    return np.float64(part)


@_reduced
def _element_row(g, m, v, start, length, s, w1, b2, w2, step, root, eps, kept, at):
    """Enter a row into both moments, keep its update, return the update's sum of squares."""
    total = 0.0
    for lo in range(0, length, BLOCK):
        size = min(BLOCK, length - lo)
        total += _element_block(g, m, v, start + lo, size, s, w1, b2, w2, step, root, eps, kept, at + lo)
    return total


@_reduced
def _take_row(p, start, length, shrink, cap, kept, at):
    for j in range(length):
        store(p, start + j, load(p, start + j) * shrink - cap * load(kept, at + j))


@_reduced
def _mean_block(g, m, start, length, s, w1):
    part = narrow(g, 0.0)
    for j in range(length):
        m0 = load(m, start + j)
        m1 = m0 + w1 * (load(g, start + j) * s - m0)
        store(m, start + j, m1)
        part += m1 * m1
    return np.float64(part)


@_reduced
def _quick_mean_row(g, m, start, length, s, w1):
    """As `_mean_row`, with quick sums."""
    total = 0.0
    for lo in range(0, length, BLOCK):
        total += _mean_block(g, m, start + lo, min(BLOCK, length - lo), s, w1)
    return total


@_reduced
def _mean_row(g, m, start, length, s, w1):
    """Enter a row into the first moment, return the moment's sum of squares."""
    total = 0.0
    for j in range(length):
        m0 = load(m, start + j)
        m1 = m0 + w1 * (load(g, start + j) * s - m0)
        store(m, start + j, m1)
        wide = np.float64(m1)
        total += wide * wide
    return total


@_reduced
def _step_row(p, m, start, length, shrink, rate):
    for j in range(length):
        store(p, start + j, load(p, start + j) * shrink - rate * load(m, start + j))


@_reduced
def _adam_row(p, g, m, v, start, length, s, w1, b2, w2, step, root, eps, shrink):
    for j in range(length):
        x = load(g, start + j) * s
        m0 = load(m, start + j)
        m1 = m0 + w1 * (x - m0)
        v1 = load(v, start + j) * b2 + x * x * w2
        store(m, start + j, m1)
        store(v, start + j, v1)
        store(p, start + j, load(p, start + j) * shrink - m1 * step / (math.sqrt(v1) * root + eps))


@_reduced
def _enter_row(g, m, v, start, length, s, w1, b2, w2, step, root, eps):
    """Enter a row into both moments, return its update's sum of squares."""
    total = 0.0
    for j in range(length):
        x = load(g, start + j) * s
        m0 = load(m, start + j)
        m1 = m0 + w1 * (x - m0)
        v1 = load(v, start + j) * b2 + x * x * w2
        store(m, start + j, m1)
        store(v, start + j, v1)
        wide = np.float64(m1 * step / (math.sqrt(v1) * root + eps))
        total += wide * wide
    return total


@_reduced
def _apply_row(p, m, v, start, length, step, root, eps, shrink):
    for j in range(length):
        u = load(m, start + j) * step / (math.sqrt(load(v, start + j)) * root + eps)
        store(p, start + j, load(p, start + j) * shrink - u)
