# mypy: disable-error-code="no-untyped-def"
"""Compiled loops of GSO's update; each takes chunks of the tables from a shared counter until none is left.

``bases`` (4, T) are the addresses of weights, gradient, first moment, and second moment (element-wise, or the tensor's
float32 values a bin). ``numbers`` (T, 8) are each tensor's constants of this step, see `NUMBERS`.

`one_pass` sees a bin once: its rows stay in cache while gradient and weights are measured, the gradient is bounded and
entered into the moments, the update's length is taken, bounded and applied. The others work element by element after
limits over several bins are known: `update` where nothing bounds the update, else `moments`, then `write`.
"""

from __future__ import annotations

import math

import numpy as np

from ..kernels.addresses import compiled, fetch_add, load, narrow, pointer, prefetch, store
from ..kernels.numba_loops import _square_row

__all__ = ["learn_bins", "moments_bin", "moments_element", "one_pass_bin", "one_pass_element", "update_bin"]
__all__ += ["update_element", "write_bin", "write_element"]

NUMBERS = (
    "1 - beta1",
    "beta2",
    "1 - beta2",
    "lr / bias1",
    "1 / sqrt(bias2)",
    "eps",
    "1 - lr decay",
    "sign of gradient",
)
"""The columns of ``numbers``."""

BLOCK = 512
"""Squares of so many elements are added in the memory's own precision before they go into a float64 sum."""

LINE = 16
"""Elements between two prefetches: one cache line of float32."""

TINY, HUGE = 1e-25, 1e37
"""A float32 sum of squares outside may have lost small terms or overflowed, and is taken again in float64."""

_reduced = compiled(fastmath={"reassoc", "contract"})


@_reduced
def _limit(rules, floors, b, weight):
    """The least of ``max(slope * weight norm, floor)`` over the rules of a bin."""
    limit = np.inf
    for j in range(len(rules)):
        limit = min(limit, max(rules[j] * weight, floors[j, b]))
    return limit


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
def _ask_for(memory, start, length):
    """Prefetch a row, a cache line of 64 bytes at a time."""
    for j in range(0, length, LINE):
        prefetch(memory, start + j)


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
def _shrink_row(p, start, length, shrink):
    for j in range(length):
        store(p, start + j, load(p, start + j) * shrink)


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


@_reduced
def one_pass_element(
    kind,
    like,
    longest,
    entries,
    chunks,
    bases,
    numbers,
    rules,
    floors,
    caps,
    cap_floors,
    pace,
    squares,
    weights,
    counter,
):
    """Update whole bins with a second moment an element; write squares of gradient and weights as they were."""
    counting = pointer(counter.ctypes.data, np.int64(0))
    updates = np.empty(longest, dtype=like.dtype)
    while True:
        c = fetch_add(counting)
        if c >= len(chunks) - 1:
            return
        for e in range(chunks[c], chunks[c + 1]):
            first, count, t, offset, step = entries[e, 1], entries[e, 2], entries[e, 3], entries[e, 4], entries[e, 5]
            rows, row_step, length = entries[e, 6], entries[e, 7], entries[e, 8]
            p, g = pointer(bases[0, t], kind), pointer(bases[1, t], kind)
            m, v = pointer(bases[2, t], kind), pointer(bases[3, t], kind)
            # By address, as all else: an index into an array may be negative for all that the compiler knows.
            kept = pointer(updates.ctypes.data, narrow(p, 0.0))
            w1, b2, w2 = narrow(p, numbers[t, 0]), narrow(p, numbers[t, 1]), narrow(p, numbers[t, 2])
            rate, root, eps = narrow(p, numbers[t, 3]), narrow(p, numbers[t, 4]), narrow(p, numbers[t, 5])
            shrink = narrow(p, numbers[t, 6])
            for i in range(count):
                b, at = first + i, offset + i * step
                if rows == 1:
                    _ask_for(m, at, length)
                    _ask_for(v, at, length)
                gradient2 = _bin_square(g, at, rows, row_step, length)
                weight2 = _bin_square(p, at, rows, row_step, length)
                squares[b], weights[b] = gradient2, weight2
                if not math.isfinite(gradient2):
                    continue
                norm, weight = math.sqrt(gradient2), math.sqrt(weight2)
                limit = _limit(rules, floors, b, weight)
                s = narrow(p, numbers[t, 7] * (limit / norm if norm > limit else 1.0))
                if rows == 1 and i + 1 < count:
                    _ask_for(g, at + step, length)
                    _ask_for(p, at + step, length)
                moved2 = 0.0
                for r in range(rows):
                    start = at + r * row_step
                    moved2 += _element_row(g, m, v, start, length, s, w1, b2, w2, rate, root, eps, kept, r * length)
                cap = 1.0
                if len(caps):
                    if not TINY < moved2 < HUGE:
                        moved2 = _square_row(kept, 0, rows * length)
                    moved, most = math.sqrt(moved2), pace[b] * _limit(caps, cap_floors, b, weight)
                    cap = most / moved if moved > most else 1.0
                    if not math.isfinite(moved2):
                        for r in range(rows):
                            _shrink_row(p, at + r * row_step, length, shrink)
                        continue
                for r in range(rows):
                    _take_row(p, at + r * row_step, length, shrink, narrow(p, cap), kept, r * length)


@_reduced
def one_pass_bin(
    kind, entries, chunks, bases, numbers, places, rules, floors, caps, cap_floors, pace, squares, weights, counter
):
    """The same with one second moment a bin: nothing is kept, for the update is the first moment times a number."""
    counting = pointer(counter.ctypes.data, np.int64(0))
    while True:
        c = fetch_add(counting)
        if c >= len(chunks) - 1:
            return
        for e in range(chunks[c], chunks[c + 1]):
            first, count, t, offset, step = entries[e, 1], entries[e, 2], entries[e, 3], entries[e, 4], entries[e, 5]
            rows, row_step, length = entries[e, 6], entries[e, 7], entries[e, 8]
            p, g, m = pointer(bases[0, t], kind), pointer(bases[1, t], kind), pointer(bases[2, t], kind)
            v = pointer(bases[3, t], np.float32(0))
            w1, shrink = narrow(p, numbers[t, 0]), narrow(p, numbers[t, 6])
            for i in range(count):
                b, at = first + i, offset + i * step
                if rows == 1:
                    _ask_for(m, at, length)
                gradient2 = _bin_square(g, at, rows, row_step, length)
                weight2 = _bin_square(p, at, rows, row_step, length)
                squares[b], weights[b] = gradient2, weight2
                if not math.isfinite(gradient2):
                    continue
                norm, weight = math.sqrt(gradient2), math.sqrt(weight2)
                limit = _limit(rules, floors, b, weight)
                s = limit / norm if norm > limit else 1.0
                mean = (s * norm) * (s * norm) / (rows * length)
                v1 = np.float32(numbers[t, 1] * load(v, places[b]) + numbers[t, 2] * mean)
                store(v, places[b], v1)
                rate = numbers[t, 3] / (math.sqrt(v1) * numbers[t, 4] + numbers[t, 5])
                if rows == 1 and i + 1 < count:
                    _ask_for(g, at + step, length)
                    _ask_for(p, at + step, length)
                moment2 = 0.0
                for r in range(rows):
                    moment2 += _quick_mean_row(g, m, at + r * row_step, length, narrow(p, s * numbers[t, 7]), w1)
                if len(caps):
                    if not TINY < moment2 < HUGE:
                        moment2 = _bin_square(m, at, rows, row_step, length)
                    moved, most = rate * math.sqrt(moment2), pace[b] * _limit(caps, cap_floors, b, weight)
                    if not math.isfinite(moved):
                        for r in range(rows):
                            _shrink_row(p, at + r * row_step, length, shrink)
                        continue
                    rate *= most / moved if moved > most else 1.0
                for r in range(rows):
                    _step_row(p, m, at + r * row_step, length, shrink, narrow(p, rate))


@_reduced
def update_element(kind, entries, chunks, bases, numbers, scale, finite, counter):
    """Update bins whose scale is known, with a second moment an element."""
    counting = pointer(counter.ctypes.data, np.int64(0))
    while True:
        c = fetch_add(counting)
        if c >= len(chunks) - 1:
            return
        for e in range(chunks[c], chunks[c + 1]):
            t, length = entries[e, 3], entries[e, 8]
            p, g = pointer(bases[0, t], kind), pointer(bases[1, t], kind)
            m, v = pointer(bases[2, t], kind), pointer(bases[3, t], kind)
            w1, b2, w2 = narrow(p, numbers[t, 0]), narrow(p, numbers[t, 1]), narrow(p, numbers[t, 2])
            rate, root, eps = narrow(p, numbers[t, 3]), narrow(p, numbers[t, 4]), narrow(p, numbers[t, 5])
            shrink = narrow(p, numbers[t, 6])
            for i in range(entries[e, 2]):
                b = entries[e, 1] + i
                if finite[b]:
                    s = narrow(p, scale[b] * numbers[t, 7])
                    for r in range(entries[e, 6]):
                        start = entries[e, 4] + i * entries[e, 5] + r * entries[e, 7]
                        _adam_row(p, g, m, v, start, length, s, w1, b2, w2, rate, root, eps, shrink)


@_reduced
def moments_element(kind, entries, chunks, bases, numbers, scale, finite, slots, counter):
    """Enter bins whose scale is known into their moments; write the updates' sums of squares to the slots."""
    counting = pointer(counter.ctypes.data, np.int64(0))
    while True:
        c = fetch_add(counting)
        if c >= len(chunks) - 1:
            return
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


@_reduced
def write_element(kind, entries, chunks, bases, numbers, cap, sound, finite, counter):
    """Apply the updates of `moments_element`, each times its cap; none where it is not sound."""
    counting = pointer(counter.ctypes.data, np.int64(0))
    while True:
        c = fetch_add(counting)
        if c >= len(chunks) - 1:
            return
        for e in range(chunks[c], chunks[c + 1]):
            t, length = entries[e, 3], entries[e, 8]
            p, m, v = pointer(bases[0, t], kind), pointer(bases[2, t], kind), pointer(bases[3, t], kind)
            root, eps, shrink = narrow(p, numbers[t, 4]), narrow(p, numbers[t, 5]), narrow(p, numbers[t, 6])
            for i in range(entries[e, 2]):
                b = entries[e, 1] + i
                if finite[b]:
                    for r in range(entries[e, 6]):
                        start = entries[e, 4] + i * entries[e, 5] + r * entries[e, 7]
                        if sound[b]:
                            rate = narrow(p, numbers[t, 3] * cap[b])
                            _apply_row(p, m, v, start, length, rate, root, eps, shrink)
                        else:
                            _shrink_row(p, start, length, shrink)


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
def moments_bin(kind, entries, chunks, bases, numbers, scale, finite, slots, counter):
    """Enter bins whose scale is known into their first moment; write the moments' sums of squares to the slots."""
    counting = pointer(counter.ctypes.data, np.int64(0))
    while True:
        c = fetch_add(counting)
        if c >= len(chunks) - 1:
            return
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


@_reduced
def write_bin(kind, entries, chunks, bases, numbers, rate, sound, finite, counter):
    """Apply the updates of `moments_bin` at each bin's rate, its cap included; none where it is not sound."""
    counting = pointer(counter.ctypes.data, np.int64(0))
    while True:
        c = fetch_add(counting)
        if c >= len(chunks) - 1:
            return
        for e in range(chunks[c], chunks[c + 1]):
            t, length = entries[e, 3], entries[e, 8]
            p, m = pointer(bases[0, t], kind), pointer(bases[2, t], kind)
            shrink = narrow(p, numbers[t, 6])
            for i in range(entries[e, 2]):
                b = entries[e, 1] + i
                if finite[b]:
                    for r in range(entries[e, 6]):
                        start = entries[e, 4] + i * entries[e, 5] + r * entries[e, 7]
                        if sound[b]:
                            _step_row(p, m, start, length, shrink, narrow(p, rate[b]))
                        else:
                            _shrink_row(p, start, length, shrink)


@_reduced
def update_bin(kind, entries, chunks, bases, numbers, scale, finite, rate, counter):
    """Update bins whose scale and rate are known, with one second moment a bin."""
    counting = pointer(counter.ctypes.data, np.int64(0))
    while True:
        c = fetch_add(counting)
        if c >= len(chunks) - 1:
            return
        for e in range(chunks[c], chunks[c + 1]):
            t, length = entries[e, 3], entries[e, 8]
            p, g, m = pointer(bases[0, t], kind), pointer(bases[1, t], kind), pointer(bases[2, t], kind)
            w1, shrink = narrow(p, numbers[t, 0]), narrow(p, numbers[t, 6])
            for i in range(entries[e, 2]):
                b = entries[e, 1] + i
                if finite[b]:
                    s = narrow(p, scale[b] * numbers[t, 7])
                    for r in range(entries[e, 6]):
                        start = entries[e, 4] + i * entries[e, 5] + r * entries[e, 7]
                        _mean_row(g, m, start, length, s, w1)
                        _step_row(p, m, start, length, shrink, narrow(p, rate[b]))
