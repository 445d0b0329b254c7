# mypy: disable-error-code="no-untyped-def"
"""Compiled loops of GSO's update: each is a function of one chunk of the tables and one that shares out the chunks.

`one_pass` sees a bin once. While the bin's rows are in cache, it measures gradient and weights, bounds the gradient and
enters it into the moments; then it bounds the update and applies it. The others come after limits that look at several
bins: `enter_bins`, and then, where something bounds the update, `write`.

One text serves both kinds of second moment, one per element and one per bin. An argument that the other kind needs is
None, and where a test of it for None fails for certain, Numba leaves out the branch before it looks at types.

The tables are those of `gradsplit.plan.lowering`; ``bases`` and ``numbers`` are those of `compiled`; ``lines`` and
``caps`` (J, 3, T) are the limits on the gradient and on the update, see `line_table`.
"""

from __future__ import annotations

import math

import numpy as np

from ...kernels.addresses import compiled, load, narrow, pointer, store
from ...kernels.numba_loops import _limit, _square_row, share
from ...plan.lowering import BIN, COUNT, LENGTH, OFFSET, ROW_STEP, ROWS, SLOT, STEP, TENSOR
from .compiled import (
    BETA2,
    DECAY,
    EPS,
    FIRST_MOMENT,
    GRADIENT,
    ONE_MINUS_BETA1,
    ONE_MINUS_BETA2,
    RATE,
    SECOND_MOMENT,
    SIGN,
    UNBIAS,
    WEIGHT,
)

__all__ = ["enter_bins", "learn_bins", "one_pass", "write"]

BLOCK = 512
"""Squares of so many elements are added in the memory's own precision before they go into a float64 sum."""

TINY, HUGE = 1e-25, 1e37
"""A float32 sum of squares outside may have lost small terms or overflowed, and is taken again in float64."""

_reduced = compiled(fastmath={"reassoc", "contract"})
_plain = compiled()


@_reduced
def _block_square(memory, start, length):
    part = narrow(memory, 0.0)
    for j in range(length):
        x = load(memory, start + j)
        part += x * x
    return np.float64(part)


@_reduced
def _quick_square(memory, start, length):
    """The sum of squares, in blocks in the memory's own precision: half the work where no block over- or underflows."""
    total = 0.0
    for lo in range(0, length, BLOCK):
        total += _block_square(memory, start + lo, min(BLOCK, length - lo))
    return total


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
def _constants(memory, numbers, t, cap):
    """What the two formulas below need to know of tensor t, in the type in which to compute; ``cap`` times the rate."""
    return (
        narrow(memory, numbers[t, ONE_MINUS_BETA1]),
        narrow(memory, numbers[t, BETA2]),
        narrow(memory, numbers[t, ONE_MINUS_BETA2]),
        narrow(memory, numbers[t, RATE] * cap),
        narrow(memory, numbers[t, UNBIAS]),
        narrow(memory, numbers[t, EPS]),
    )


@_reduced
def _update_of(m1, v1, constants):
    """The update that an element's moments make."""
    _, _, _, rate, unbias, eps = constants
    return m1 * rate / (math.sqrt(v1) * unbias + eps)


@_reduced
def _enter(g, m, v, at, s, constants):
    """Enter an element's gradient times s into its moments; return its update, or with ``v`` None its first moment."""
    w1, b2, w2, _, _, _ = constants
    x, m0 = load(g, at) * s, load(m, at)
    m1 = m0 + w1 * (x - m0)
    if v is None:
        store(m, at, m1)
        return m1
    v1 = load(v, at) * b2 + x * x * w2
    store(m, at, m1)
    store(v, at, v1)
    return _update_of(m1, v1, constants)


@_reduced
def _enter_block(g, m, v, start, length, s, constants, kept, at):
    part = narrow(g, 0.0)
    for j in range(length):
        u = _enter(g, m, v, start + j, s, constants)
        if v is not None:
            store(kept, at + j, u)
        part += u * u
    return np.float64(part)


@_reduced
def _enter_quickly(g, m, v, start, length, s, constants, kept, at):
    """As `_enter_row`, with the sum in blocks; what `_enter` returns is kept, unless it is the first moment itself."""
    total = 0.0
    for lo in range(0, length, BLOCK):
        total += _enter_block(g, m, v, start + lo, min(BLOCK, length - lo), s, constants, kept, at + lo)
    return total


@_reduced
def _enter_row(g, m, v, start, length, s, constants):
    """Enter a row into its moments; return the sum of squares of what `_enter` returns."""
    total = 0.0
    for j in range(length):
        wide = np.float64(_enter(g, m, v, start + j, s, constants))
        total += wide * wide
    return total


@_reduced
def _enter_and_step_row(p, g, m, v, start, length, s, constants, shrink):
    for j in range(length):
        u = _enter(g, m, v, start + j, s, constants)
        store(p, start + j, load(p, start + j) * shrink - u)


@_reduced
def _update_and_step_row(p, m, v, start, length, constants, shrink):
    for j in range(length):
        u = _update_of(load(m, start + j), load(v, start + j), constants)
        store(p, start + j, load(p, start + j) * shrink - u)


@_reduced
def _step_row(p, start, length, shrink, rate, u, at):
    """Take from a row what is kept of its update from ``u[at]`` on, times a rate; ``shrink`` is its decay."""
    for j in range(length):
        store(p, start + j, load(p, start + j) * shrink - rate * load(u, at + j))


@_reduced
def _entry(entries, e):
    """An entry's first bin, number of bins, tensor and offset; the steps between bins; rows, their steps and length."""
    return (
        *(entries[e, BIN], entries[e, COUNT], entries[e, TENSOR], entries[e, OFFSET], entries[e, STEP]),
        *(entries[e, ROWS], entries[e, ROW_STEP], entries[e, LENGTH]),
    )


@_reduced
def _memory(bases, t, kind):
    """Weights, gradient, first and second moments of tensor t; the last as if there were one per element."""
    p, g = pointer(bases[WEIGHT, t], kind), pointer(bases[GRADIENT, t], kind)
    return p, g, pointer(bases[FIRST_MOMENT, t], kind), pointer(bases[SECOND_MOMENT, t], kind)


@_reduced
def _rate_of(v1, numbers, t):
    """What the first moments of a bin are multiplied by, from the bin's second moment."""
    return numbers[t, RATE] / (math.sqrt(v1) * numbers[t, UNBIAS] + numbers[t, EPS])


@_reduced
def _enter_bin(v, place, norm, numel, numbers, t):
    """Enter a bin's norm after its scale into its second moment; return the bin's rate."""
    v1 = np.float32(numbers[t, BETA2] * load(v, place) + numbers[t, ONE_MINUS_BETA2] * (norm * norm / numel))
    store(v, place, v1)
    return _rate_of(v1, numbers, t)


@_reduced
def _one_pass(c, worker, kind, entries, chunks, bases, numbers, lines, caps, squares, weights, kept_W, places):
    for e in range(chunks[c], chunks[c + 1]):
        first, count, t, offset, step, rows, row_step, length = _entry(entries, e)
        p, g, m, v_elements = _memory(bases, t, kind)
        constants = _constants(p, numbers, t, 1.0)
        for i in range(count):
            b, at = first + i, offset + i * step
            gradient2, weight2 = _bin_squares(g, p, at, rows, row_step, length)
            squares[b], weights[b] = gradient2, weight2
            if not math.isfinite(gradient2):
                continue
            norm, weight = math.sqrt(gradient2), math.sqrt(weight2)
            limit = _limit(lines, t, weight, rows * length)
            scale = limit / norm if norm > limit else 1.0
            rate = 1.0
            if places is not None:
                v_bins = pointer(bases[SECOND_MOMENT, t], np.float32(0))
                rate = _enter_bin(v_bins, places[b], scale * norm, rows * length, numbers, t)
                v, u, u_start, u_step = None, m, at, row_step
            if kept_W is not None:
                # By address, as all else: an index into an array may be negative for all that the compiler knows.
                u = pointer(kept_W[worker].ctypes.data, narrow(p, 0.0))
                v, u_start, u_step = v_elements, 0, length
            s, moved2 = narrow(p, scale * numbers[t, SIGN]), 0.0
            for r in range(rows):
                start, kept = at + r * row_step, u_start + r * u_step
                moved2 += _enter_quickly(g, m, v, start, length, s, constants, u, kept)
            cap = 1.0
            if len(caps):
                if not TINY < moved2 < HUGE:
                    if places is not None:
                        moved2 = _bin_square(m, at, rows, row_step, length)
                    if kept_W is not None:
                        moved2 = _square_row(u, 0, rows * length)
                moved, most = rate * math.sqrt(moved2), _limit(caps, t, weight, rows * length)
                if not math.isfinite(moved):
                    continue
                cap = most / moved if moved > most else 1.0
            shrink = narrow(p, 1 - cap * numbers[t, DECAY])
            for r in range(rows):
                start, kept = at + r * row_step, u_start + r * u_step
                _step_row(p, start, length, shrink, narrow(p, rate * cap), u, kept)


@_plain
def one_pass(work, *arguments):
    """Update whole bins; write the squares of gradient and weights as they were.

    The last two arguments are room for the updates of a bin per thread, and None; or, with one second moment per bin,
    None and (B,) where each bin's stands among its tensor's. The update is then the first moment times a number.
    """
    share(_one_pass, work, arguments)


@_reduced
def _enter_bins(c, worker, kind, entries, chunks, bases, numbers, scale, finite, rate, slots):
    c = len(chunks) - 2 - c  # backwards: the gradients that were measured last are still in cache
    for e in range(chunks[c], chunks[c + 1]):
        first, count, t, offset, step, rows, row_step, length = _entry(entries, e)
        p, g, m, v = _memory(bases, t, kind)
        constants, shrink = _constants(p, numbers, t, 1.0), narrow(p, 1 - numbers[t, DECAY])
        for i in range(count):
            b = first + i
            if not finite[b]:
                continue
            s, total = narrow(p, scale[b] * numbers[t, SIGN]), 0.0
            for r in range(rows):
                start = offset + i * step + r * row_step
                if rate is not None:
                    total += _enter_row(g, m, None, start, length, s, constants)
                    if slots is None:
                        _step_row(p, start, length, shrink, narrow(p, rate[b]), m, start)
                elif slots is None:
                    _enter_and_step_row(p, g, m, v, start, length, s, constants, shrink)
                else:
                    total += _enter_row(g, m, v, start, length, s, constants)
            if slots is not None:
                slots[entries[e, SLOT] + i] = total


@_plain
def enter_bins(work, *arguments):
    """Enter bins whose scale is known into their moments.

    The last two arguments are the rates of `learn_bins` (B,), or None with one second moment per element; and slots, to
    which the sums of squares of the updates before their rates are written, or None: then the updates are applied.
    """
    share(_enter_bins, work, arguments)


@_reduced
def _write(c, worker, kind, entries, chunks, bases, numbers, cap, is_safe, finite, rate):
    for e in range(chunks[c], chunks[c + 1]):
        first, count, t, offset, step, rows, row_step, length = _entry(entries, e)
        p, _, m, v = _memory(bases, t, kind)
        for i in range(count):
            b = first + i
            if finite[b] and is_safe[b]:
                constants, shrink = _constants(p, numbers, t, cap[b]), narrow(p, 1 - cap[b] * numbers[t, DECAY])
                for r in range(rows):
                    start = offset + i * step + r * row_step
                    if rate is None:
                        _update_and_step_row(p, m, v, start, length, constants, shrink)
                    else:
                        _step_row(p, start, length, shrink, narrow(p, rate[b] * cap[b]), m, start)


@_plain
def write(work, *arguments):
    """Apply the updates of `enter_bins`, each times its cap; none where the update is not finite.

    The last argument is the rates, as in `enter_bins`.
    """
    share(_write, work, arguments)


@_reduced
def learn_bins(tensor_of_bin, places, bases, numbers, norm, scale, finite, numel, rate):
    """Enter bins into their second moments; write each bin's rate, its update per first moment."""
    for b in range(len(norm)):
        t = tensor_of_bin[b]
        if bases[SECOND_MOMENT, t] != 0:
            v = pointer(bases[SECOND_MOMENT, t], np.float32(0))
            if finite[b]:
                rate[b] = _enter_bin(v, places[b], norm[b] * scale[b], numel[b], numbers, t)
            else:
                rate[b] = _rate_of(load(v, places[b]), numbers, t)
