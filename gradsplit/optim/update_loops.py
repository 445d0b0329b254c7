# mypy: disable-error-code="no-untyped-def"
"""Compiled loops of GSO's update, each a function of one chunk of the tables and one that shares out the chunks.

``bases`` (4, T) are the addresses of weights, gradient, first moment, and second moment (element-wise, or the tensor's
float32 values a bin). ``numbers`` (T, 8) are each tensor's constants of this step, see `compiled_update.NUMBERS`;
``lines`` and ``caps`` (J, 3, T) its limits on the gradient and on the update, as `bound_entries` takes them.

`one_pass` sees a bin once: its rows stay in cache while gradient and weights are measured, the gradient is bounded and
entered into the moments, the update's length is taken, bounded and applied. The others work element by element after
limits over several bins are known: `update` where nothing bounds the update, else `moments`, then `write`.
"""

from __future__ import annotations

import math

import numpy as np

from ..kernels.addresses import compiled, load, narrow, pointer, store
from ..kernels.numba_loops import _limit, _square_row
from ..kernels.sharing import share
from .update_rows import (
    HUGE,
    TINY,
    _adam_row,
    _apply_row,
    _bin_square,
    _bin_squares,
    _element_row,
    _enter_row,
    _mean_row,
    _quick_mean_row,
    _reduced,
    _step_row,
    _take_row,
)

__all__ = ["learn_bins", "moments_bin", "moments_element", "one_pass_bin", "one_pass_element", "update_bin"]
__all__ += ["update_element", "write_bin", "write_element"]

_plain = compiled()


@_reduced
def _one_pass_element(c, worker, kind, entries, chunks, bases, numbers, lines, caps, squares, weights, kept_W):
    keeping = kept_W[worker].ctypes.data
    for e in range(chunks[c], chunks[c + 1]):
        first, count, t, offset, step = entries[e, 1], entries[e, 2], entries[e, 3], entries[e, 4], entries[e, 5]
        rows, row_step, length = entries[e, 6], entries[e, 7], entries[e, 8]
        p, g = pointer(bases[0, t], kind), pointer(bases[1, t], kind)
        m, v = pointer(bases[2, t], kind), pointer(bases[3, t], kind)
        # By address, as all else: an index into an array may be negative for all that the compiler knows.
        kept = pointer(keeping, narrow(p, 0.0))
        w1, b2, w2 = narrow(p, numbers[t, 0]), narrow(p, numbers[t, 1]), narrow(p, numbers[t, 2])
        rate, root, eps = narrow(p, numbers[t, 3]), narrow(p, numbers[t, 4]), narrow(p, numbers[t, 5])
        for i in range(count):
            b, at = first + i, offset + i * step
            gradient2, weight2 = _bin_squares(g, p, at, rows, row_step, length)
            squares[b], weights[b] = gradient2, weight2
            if not math.isfinite(gradient2):
                continue
            norm, weight = math.sqrt(gradient2), math.sqrt(weight2)
            limit = _limit(lines, t, weight, rows * length)
            s = narrow(p, numbers[t, 7] * (limit / norm if norm > limit else 1.0))
            moved2 = 0.0
            for r in range(rows):
                start = at + r * row_step
                moved2 += _element_row(g, m, v, start, length, s, w1, b2, w2, rate, root, eps, kept, r * length)
            cap = 1.0
            if len(caps):
                if not TINY < moved2 < HUGE:
                    moved2 = _square_row(kept, 0, rows * length)
                moved, most = math.sqrt(moved2), _limit(caps, t, weight, rows * length)
                cap = most / moved if moved > most else 1.0
                if not math.isfinite(moved2):
                    continue
            shrink = narrow(p, 1 - cap * numbers[t, 6])
            for r in range(rows):
                _take_row(p, at + r * row_step, length, shrink, narrow(p, cap), kept, r * length)


@_plain
def one_pass_element(work, *arguments):
    """Update whole bins with a second moment an element; write squares of gradient and weights as they were."""
    share(_one_pass_element, work, arguments)


@_reduced
def _one_pass_bin(c, worker, kind, entries, chunks, bases, numbers, places, lines, caps, squares, weights):
    for e in range(chunks[c], chunks[c + 1]):
        first, count, t, offset, step = entries[e, 1], entries[e, 2], entries[e, 3], entries[e, 4], entries[e, 5]
        rows, row_step, length = entries[e, 6], entries[e, 7], entries[e, 8]
        p, g, m = pointer(bases[0, t], kind), pointer(bases[1, t], kind), pointer(bases[2, t], kind)
        v = pointer(bases[3, t], np.float32(0))
        w1 = narrow(p, numbers[t, 0])
        for i in range(count):
            b, at = first + i, offset + i * step
            gradient2, weight2 = _bin_squares(g, p, at, rows, row_step, length)
            squares[b], weights[b] = gradient2, weight2
            if not math.isfinite(gradient2):
                continue
            norm, weight = math.sqrt(gradient2), math.sqrt(weight2)
            limit = _limit(lines, t, weight, rows * length)
            s = limit / norm if norm > limit else 1.0
            mean = (s * norm) * (s * norm) / (rows * length)
            v1 = np.float32(numbers[t, 1] * load(v, places[b]) + numbers[t, 2] * mean)
            store(v, places[b], v1)
            rate = numbers[t, 3] / (math.sqrt(v1) * numbers[t, 4] + numbers[t, 5])
            moment2 = 0.0
            for r in range(rows):
                moment2 += _quick_mean_row(g, m, at + r * row_step, length, narrow(p, s * numbers[t, 7]), w1)
            cap = 1.0
            if len(caps):
                if not TINY < moment2 < HUGE:
                    moment2 = _bin_square(m, at, rows, row_step, length)
                moved, most = rate * math.sqrt(moment2), _limit(caps, t, weight, rows * length)
                if not math.isfinite(moved):
                    continue
                cap = most / moved if moved > most else 1.0
            shrink = narrow(p, 1 - cap * numbers[t, 6])
            for r in range(rows):
                _step_row(p, m, at + r * row_step, length, shrink, narrow(p, rate * cap))


@_plain
def one_pass_bin(work, *arguments):
    """The same with one second moment a bin: nothing is kept, for the update is the first moment times a number."""
    share(_one_pass_bin, work, arguments)


@_reduced
def _update_element(c, worker, kind, entries, chunks, bases, numbers, scale, finite):
    c = len(chunks) - 2 - c  # backwards: the gradients that were measured last are still in cache
    for e in range(chunks[c], chunks[c + 1]):
        t, length = entries[e, 3], entries[e, 8]
        p, g = pointer(bases[0, t], kind), pointer(bases[1, t], kind)
        m, v = pointer(bases[2, t], kind), pointer(bases[3, t], kind)
        w1, b2, w2 = narrow(p, numbers[t, 0]), narrow(p, numbers[t, 1]), narrow(p, numbers[t, 2])
        rate, root, eps = narrow(p, numbers[t, 3]), narrow(p, numbers[t, 4]), narrow(p, numbers[t, 5])
        shrink = narrow(p, 1 - numbers[t, 6])
        for i in range(entries[e, 2]):
            b = entries[e, 1] + i
            if finite[b]:
                s = narrow(p, scale[b] * numbers[t, 7])
                for r in range(entries[e, 6]):
                    start = entries[e, 4] + i * entries[e, 5] + r * entries[e, 7]
                    _adam_row(p, g, m, v, start, length, s, w1, b2, w2, rate, root, eps, shrink)


@_plain
def update_element(work, *arguments):
    """Update bins whose scale is known, with a second moment an element."""
    share(_update_element, work, arguments)


@_reduced
def _moments_element(c, worker, kind, entries, chunks, bases, numbers, scale, finite, slots):
    c = len(chunks) - 2 - c  # backwards: the gradients that were measured last are still in cache
    for e in range(chunks[c], chunks[c + 1]):
        t, length = entries[e, 3], entries[e, 8]
        g, m, v = pointer(bases[1, t], kind), pointer(bases[2, t], kind), pointer(bases[3, t], kind)
        w1, b2, w2 = narrow(g, numbers[t, 0]), narrow(g, numbers[t, 1]), narrow(g, numbers[t, 2])
        rate, root, eps = narrow(g, numbers[t, 3]), narrow(g, numbers[t, 4]), narrow(g, numbers[t, 5])
        for i in range(entries[e, 2]):
            b = entries[e, 1] + i
            if finite[b]:
                s, total = narrow(g, scale[b] * numbers[t, 7]), 0.0
                for r in range(entries[e, 6]):
                    start = entries[e, 4] + i * entries[e, 5] + r * entries[e, 7]
                    total += _enter_row(g, m, v, start, length, s, w1, b2, w2, rate, root, eps)
                slots[entries[e, 0] + i] = total


@_plain
def moments_element(work, *arguments):
    """Enter bins whose scale is known into their moments; write the updates' sums of squares to the slots."""
    share(_moments_element, work, arguments)


@_reduced
def _write_element(c, worker, kind, entries, chunks, bases, numbers, cap, sound, finite):
    for e in range(chunks[c], chunks[c + 1]):
        t, length = entries[e, 3], entries[e, 8]
        p, m, v = pointer(bases[0, t], kind), pointer(bases[2, t], kind), pointer(bases[3, t], kind)
        root, eps = narrow(p, numbers[t, 4]), narrow(p, numbers[t, 5])
        for i in range(entries[e, 2]):
            b = entries[e, 1] + i
            if finite[b] and sound[b]:
                rate, shrink = narrow(p, numbers[t, 3] * cap[b]), narrow(p, 1 - cap[b] * numbers[t, 6])
                for r in range(entries[e, 6]):
                    start = entries[e, 4] + i * entries[e, 5] + r * entries[e, 7]
                    _apply_row(p, m, v, start, length, rate, root, eps, shrink)


@_plain
def write_element(work, *arguments):
    """Apply the updates of `moments_element`, each times its cap; none where it is not sound."""
    share(_write_element, work, arguments)


@_reduced
def learn_bins(tensor_of_bin, places, bases, numbers, norm, scale, finite, numel, rate):
    """Enter bins into their second moments; write each bin's rate, update per first moment."""
    for b in range(len(norm)):
        t = tensor_of_bin[b]
        if bases[3, t] != 0:
            v = pointer(bases[3, t], np.float32(0))
            if finite[b]:
                kept = norm[b] * scale[b]
                store(
                    v,
                    places[b],
                    np.float32(numbers[t, 1] * load(v, places[b]) + numbers[t, 2] * kept * kept / numel[b]),
                )
            rate[b] = numbers[t, 3] / (math.sqrt(load(v, places[b])) * numbers[t, 4] + numbers[t, 5])


@_reduced
def _moments_bin(c, worker, kind, entries, chunks, bases, numbers, scale, finite, slots):
    c = len(chunks) - 2 - c  # backwards: the gradients that were measured last are still in cache
    for e in range(chunks[c], chunks[c + 1]):
        t, length = entries[e, 3], entries[e, 8]
        g, m = pointer(bases[1, t], kind), pointer(bases[2, t], kind)
        w1 = narrow(g, numbers[t, 0])
        for i in range(entries[e, 2]):
            b = entries[e, 1] + i
            if finite[b]:
                s, total = narrow(g, scale[b] * numbers[t, 7]), 0.0
                for r in range(entries[e, 6]):
                    start = entries[e, 4] + i * entries[e, 5] + r * entries[e, 7]
                    total += _mean_row(g, m, start, length, s, w1)
                slots[entries[e, 0] + i] = total


@_plain
def moments_bin(work, *arguments):
    """Enter bins whose scale is known into their first moment; write the moments' sums of squares to the slots."""
    share(_moments_bin, work, arguments)


@_reduced
def _write_bin(c, worker, kind, entries, chunks, bases, numbers, rate, cap, sound, finite):
    for e in range(chunks[c], chunks[c + 1]):
        t, length = entries[e, 3], entries[e, 8]
        p, m = pointer(bases[0, t], kind), pointer(bases[2, t], kind)
        for i in range(entries[e, 2]):
            b = entries[e, 1] + i
            if finite[b] and sound[b]:
                step, shrink = narrow(p, rate[b] * cap[b]), narrow(p, 1 - cap[b] * numbers[t, 6])
                for r in range(entries[e, 6]):
                    start = entries[e, 4] + i * entries[e, 5] + r * entries[e, 7]
                    _step_row(p, m, start, length, shrink, step)


@_plain
def write_bin(work, *arguments):
    """Apply the updates of `moments_bin` at each bin's rate times its cap; none where it is not sound."""
    share(_write_bin, work, arguments)


@_reduced
def _update_bin(c, worker, kind, entries, chunks, bases, numbers, scale, finite, rate):
    c = len(chunks) - 2 - c  # backwards: the gradients that were measured last are still in cache
    for e in range(chunks[c], chunks[c + 1]):
        t, length = entries[e, 3], entries[e, 8]
        p, g, m = pointer(bases[0, t], kind), pointer(bases[1, t], kind), pointer(bases[2, t], kind)
        w1, shrink = narrow(p, numbers[t, 0]), narrow(p, 1 - numbers[t, 6])
        for i in range(entries[e, 2]):
            b = entries[e, 1] + i
            if finite[b]:
                s = narrow(p, scale[b] * numbers[t, 7])
                for r in range(entries[e, 6]):
                    start = entries[e, 4] + i * entries[e, 5] + r * entries[e, 7]
                    _mean_row(g, m, start, length, s, w1)
                    _step_row(p, m, start, length, shrink, narrow(p, rate[b]))


@_plain
def update_bin(work, *arguments):
    """Update bins whose scale and rate are known, with one second moment a bin."""
    share(_update_bin, work, arguments)
