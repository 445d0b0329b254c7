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

from ...kernels.addresses import compiled, load, narrow, pointer, store
from ...kernels.numba_loops import _limit, _square_row, share

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
    "learn_bins",
    "moments_bin",
    "moments_element",
    "one_pass_bin",
    "one_pass_element",
    "update_bin",
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
