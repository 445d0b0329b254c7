# mypy: disable-error-code="no-untyped-def"
"""Triton programs of GSO's update: one program takes one bin through measure, limit, moments, length, cap and write.

``table`` has a row of `COLUMNS` numbers a bin: tensor, bin, place among its tensor's bins, start, size, length of a
row, step from row to row. ``addresses`` (4, T) are those of weights, gradient, first moment, and second moment
(element-wise, or the tensor's float32 values a bin); ``numbers`` (T, 8) each tensor's constants of this step, see
`compiled_update.NUMBERS`; ``lines`` and ``caps`` (J, 3, T) the limits on gradient and update, from
`line_table`.

The gradient is entered into its moments twice, to measure the update and to write it: so half-precision moments are
rounded when they are stored, not before they are used, and nothing has to be kept between the two.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["BLOCK", "COLUMNS", "one_pass_bin", "one_pass_element"]

BLOCK = 1024
COLUMNS = 7


@triton.jit
def _memory(addresses, which: tl.constexpr, t, num_tensors, KIND: tl.constexpr):
    """One of the four arrays of a tensor."""
    return tl.load(addresses + which * num_tensors + t).to(tl.pointer_type(KIND))


@triton.jit
def _elements(row, lo, BLOCK: tl.constexpr):
    """Offsets of a bin's elements from ``lo`` on, in the order of its rows, and which of them exist."""
    start, size = tl.load(row + 3), tl.load(row + 4)
    length, row_step = tl.load(row + 5), tl.load(row + 6)
    i = lo + tl.arange(0, BLOCK).to(tl.int64)
    return start + (i // length) * row_step + i % length, i < size


@triton.jit
def _square(memory, row, size, BLOCK: tl.constexpr):
    """A bin's sum of squares, in float64."""
    total = tl.zeros([BLOCK], tl.float64)
    for lo in range(0, size, BLOCK):
        at, there = _elements(row, lo, BLOCK)
        x = tl.load(memory + at, mask=there, other=0.0).to(tl.float64)
        total += x * x
    return tl.sum(total, axis=0)


@triton.jit
def _factor(length, lines, t, num_tensors, weight2, size, COUNT: tl.constexpr):
    """What shortens a length to the least of ``max(slope * weight, floor + root * sqrt(numel))`` over the lines."""
    weight = tl.where(weight2 < float("inf"), tl.sqrt(weight2), 0.0)
    root_of_numel = tl.sqrt(size.to(tl.float64))
    factor = tl.full([], 1.0, tl.float64)
    for j in tl.static_range(COUNT):
        slope = tl.load(lines + (3 * j) * num_tensors + t)
        floor = tl.load(lines + (3 * j + 1) * num_tensors + t)
        root = tl.load(lines + (3 * j + 2) * num_tensors + t)
        limit = tl.maximum(slope * weight, floor + root * root_of_numel)
        factor = tl.minimum(factor, tl.where(length > limit, limit / length, 1.0))
    return factor


@triton.jit
def _mean(g, m, at, there, s, w1, WIDE: tl.constexpr):
    """The first moment with a gradient entered into it, and that gradient after its scale."""
    x = tl.load(g + at, mask=there, other=0.0).to(WIDE) * s
    m0 = tl.load(m + at, mask=there, other=0.0).to(WIDE)
    return m0 + w1 * (x - m0), x


@triton.jit
def _entered(g, m, v, at, there, s, number, WIDE: tl.constexpr):
    """Both moments with a gradient entered into them, and the update they make; 0 where there is no element."""
    m1, x = _mean(g, m, at, there, s, tl.load(number).to(WIDE), WIDE)
    v0 = tl.load(v + at, mask=there, other=0.0).to(WIDE)
    v1 = v0 * tl.load(number + 1).to(WIDE) + x * x * tl.load(number + 2).to(WIDE)
    rate, root, eps = tl.load(number + 3).to(WIDE), tl.load(number + 4).to(WIDE), tl.load(number + 5).to(WIDE)
    u = m1 * rate / (tl.sqrt(v1) * root + eps)
    return m1, v1, tl.where(there, u, 0.0)


@triton.jit
def _write(p, at, there, update, moved2, cap, number, KIND: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Take update and decay from the weights, both times the cap; neither where the update is not finite."""
    weight = tl.load(p + at, mask=there, other=0.0).to(WIDE)
    sound = tl.zeros([BLOCK], tl.float64) + moved2 < float("inf")
    shrink = (1 - cap * tl.load(number + 6)).to(WIDE)
    tl.store(p + at, (weight * shrink - update * cap.to(WIDE)).to(KIND), mask=there & sound)


@triton.jit
def one_pass_element(
    table,
    addresses,
    numbers,
    lines,
    caps,
    squares,
    weights,
    num_tensors,
    NUM_COLUMNS: tl.constexpr,
    NUM_NUMBERS: tl.constexpr,
    LINES: tl.constexpr,
    CAPS: tl.constexpr,
    KIND: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Update one bin with a second moment an element; write squares of gradient and weights as they were."""
    row = table + tl.program_id(0) * NUM_COLUMNS
    t, bin_, size = tl.load(row), tl.load(row + 1), tl.load(row + 4)
    number = numbers + t * NUM_NUMBERS
    p, g = _memory(addresses, 0, t, num_tensors, KIND), _memory(addresses, 1, t, num_tensors, KIND)
    m, v = _memory(addresses, 2, t, num_tensors, KIND), _memory(addresses, 3, t, num_tensors, KIND)
    gradient2, weight2 = _square(g, row, size, BLOCK), _square(p, row, size, BLOCK)
    tl.store(squares + bin_, gradient2)
    tl.store(weights + bin_, weight2)
    if gradient2 < float("inf"):  # nan is not
        scale = _factor(tl.sqrt(gradient2), lines, t, num_tensors, weight2, size, LINES)
        s = (scale * tl.load(number + 7)).to(WIDE)
        moved = tl.zeros([BLOCK], tl.float64)
        if CAPS > 0:
            for lo in range(0, size, BLOCK):
                at, there = _elements(row, lo, BLOCK)
                _m1, _v1, u = _entered(g, m, v, at, there, s, number, WIDE)
                moved += u.to(tl.float64) * u.to(tl.float64)
        moved2 = tl.sum(moved, axis=0)
        cap = _factor(tl.sqrt(moved2), caps, t, num_tensors, weight2, size, CAPS)
        for lo in range(0, size, BLOCK):
            at, there = _elements(row, lo, BLOCK)
            m1, v1, u = _entered(g, m, v, at, there, s, number, WIDE)
            tl.store(m + at, m1.to(KIND), mask=there)
            tl.store(v + at, v1.to(KIND), mask=there)
            _write(p, at, there, u, moved2, cap, number, KIND, WIDE, BLOCK)


@triton.jit
def one_pass_bin(
    table,
    addresses,
    numbers,
    lines,
    caps,
    squares,
    weights,
    num_tensors,
    NUM_COLUMNS: tl.constexpr,
    NUM_NUMBERS: tl.constexpr,
    LINES: tl.constexpr,
    CAPS: tl.constexpr,
    KIND: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The same with one second moment a bin: the update is the first moment times a number."""
    row = table + tl.program_id(0) * NUM_COLUMNS
    t, bin_, place, size = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 4)
    number = numbers + t * NUM_NUMBERS
    p, g = _memory(addresses, 0, t, num_tensors, KIND), _memory(addresses, 1, t, num_tensors, KIND)
    m, v = _memory(addresses, 2, t, num_tensors, KIND), _memory(addresses, 3, t, num_tensors, tl.float32)
    gradient2, weight2 = _square(g, row, size, BLOCK), _square(p, row, size, BLOCK)
    tl.store(squares + bin_, gradient2)
    tl.store(weights + bin_, weight2)
    if gradient2 < float("inf"):  # nan is not
        norm = tl.sqrt(gradient2)
        scale = _factor(norm, lines, t, num_tensors, weight2, size, LINES)
        mean = (scale * norm) * (scale * norm) / size.to(tl.float64)
        v1 = (tl.load(number + 1) * tl.load(v + place) + tl.load(number + 2) * mean).to(tl.float32)
        tl.store(v + place, v1)
        rate = tl.load(number + 3) / (tl.sqrt(v1.to(tl.float64)) * tl.load(number + 4) + tl.load(number + 5))
        s, w1 = (scale * tl.load(number + 7)).to(WIDE), tl.load(number).to(WIDE)
        moved = tl.zeros([BLOCK], tl.float64)
        if CAPS > 0:
            for lo in range(0, size, BLOCK):
                at, there = _elements(row, lo, BLOCK)
                m1, _x = _mean(g, m, at, there, s, w1, WIDE)
                moved += m1.to(tl.float64) * m1.to(tl.float64)
        moved2 = tl.sum(moved, axis=0)
        if CAPS > 0:
            moved2 = moved2 * rate * rate
        cap = _factor(tl.sqrt(moved2), caps, t, num_tensors, weight2, size, CAPS)
        for lo in range(0, size, BLOCK):
            at, there = _elements(row, lo, BLOCK)
            m1, _x = _mean(g, m, at, there, s, w1, WIDE)
            tl.store(m + at, m1.to(KIND), mask=there)
            _write(p, at, there, m1 * rate.to(WIDE), moved2, cap, number, KIND, WIDE, BLOCK)
