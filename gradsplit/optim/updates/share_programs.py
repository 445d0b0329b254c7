# mypy: disable-error-code="no-untyped-def"
"""The Triton programs of the share step: `measure`, `decide`, `enter`, `commit`, in this order.

Each takes one bin, or `BLOCK` bins. `commit` alone writes memories and weights; all others write vectors over all bins,
or what lies ahead of the momentum.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...collective import COLLECTIVE, FALLS, LET_THROUGH, RISES
from ...functional.kinds import WRITTEN
from .compiled import FIRST_MOMENT, GRADIENT, SECOND_MOMENT, WEIGHT

__all__ = [
    "AHEAD",
    "BLOCK",
    "COLUMNS",
    "TENSOR",
    "BIN",
    "START",
    "SIZE",
    "COLS",
    "ROW_STEP",
    "ROWS",
    "SQUARE",
    "WEIGHT2",
    "RATIO",
    "EULER",
    "NORM",
    "LIMIT",
    "SCALE",
    "LENGTH",
    "FINITE",
    "RECENT",
    "commit",
    "decide",
    "enter",
    "measure",
]

BLOCK = 1024
"""Elements of a bin, or bins, that a program takes at once."""

AHEAD = 4
"""The row of addresses of what lies ahead of the momentum, behind those of `compiled`."""

COLUMNS = tl.constexpr(9)
TENSOR, BIN, START, SIZE, COLS, ROW_STEP, _INNER, _FAST, _SLOW = (tl.constexpr(column) for column in range(9))
"""The columns of a bin. Its ``size`` elements are those from number ``start`` on of the tensor's matrix, row by row.
There memories lie without gaps. Element (r, j) of weights and gradient lies at ``r row_step + (j % inner) fast +
(j // inner) slow``; in a plain table it lies where that of the memories does."""

_CONSTANTS = tl.constexpr(10)
_SHARE, _DECAY, _LEAST, _MOST, _KEEPS, _SIGN, _W1, _BETA2, _W2, _EPS = (tl.constexpr(column) for column in range(10))
"""A tensor's constants: times the share, decay per share, the least root mean square, the longest length; 1 where the
direction's own length counts; -1 where the optimizer ascends; 1 - beta1, beta2, 1 - beta2, eps."""

ROWS = 10
SQUARE, WEIGHT2, RATIO, EULER, NORM, LIMIT, SCALE, LENGTH, FINITE, RECENT = (tl.constexpr(r) for r in range(ROWS))
"""The vectors over all bins: squares of gradient and weights, norm over recent norm, gradient times weights; what
`decide` makes of them."""

_OF_WEIGHT, _OF_GRADIENT = tl.constexpr(WEIGHT), tl.constexpr(GRADIENT)
_OF_FIRST, _OF_SECOND, _OF_AHEAD = tl.constexpr(FIRST_MOMENT), tl.constexpr(SECOND_MOMENT), tl.constexpr(AHEAD)
_COLLECTIVE, _LET_THROUGH = tl.constexpr(COLLECTIVE), tl.constexpr(LET_THROUGH)
_FALLS, _RISES, _WRITTEN = tl.constexpr(FALLS), tl.constexpr(RISES), tl.constexpr(WRITTEN)


@triton.jit
def _array(addresses, which: tl.constexpr, t, num_tensors, KIND: tl.constexpr):
    return tl.load(addresses + which * num_tensors + t).to(tl.pointer_type(KIND))


@triton.jit
def _places(row, lo, PLAIN: tl.constexpr, BLOCK: tl.constexpr):
    """A bin's elements from ``lo`` on: where they lie in the memories, where in the weights, and which exist."""
    i = lo + tl.arange(0, BLOCK).to(tl.int64)
    there = i < tl.load(row + SIZE)
    at = tl.load(row + START) + i
    of_weight = at
    if not PLAIN:
        cols, inner = tl.load(row + COLS), tl.load(row + _INNER)
        j = at % cols
        of_weight = (at // cols) * tl.load(row + ROW_STEP)
        of_weight += (j % inner) * tl.load(row + _FAST) + (j // inner) * tl.load(row + _SLOW)
    return at, of_weight, there


@triton.jit
def _square(memory, row, size, PLAIN: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float64)
    for lo in range(0, size, BLOCK):
        _at, of_weight, there = _places(row, lo, PLAIN, BLOCK)
        x = tl.load(memory + of_weight, mask=there, other=0.0).to(tl.float64)
        total += x * x
    return tl.sum(total, axis=0)


@triton.jit
def _product(one, other, row, size, PLAIN: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float64)
    for lo in range(0, size, BLOCK):
        _at, of_weight, there = _places(row, lo, PLAIN, BLOCK)
        x = tl.load(one + of_weight, mask=there, other=0.0).to(tl.float64)
        total += x * tl.load(other + of_weight, mask=there, other=0.0).to(tl.float64)
    return tl.sum(total, axis=0)


@triton.jit
def measure(
    table,
    addresses,
    recent,
    unscale,
    vectors,
    num_tensors,
    num_bins,
    KIND: tl.constexpr,
    PLAIN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the squares of a bin's gradient and weights, their product, and ||g_b|| / s_b; nan where that says nothing.

    ``unscale`` holds what a gradient is multiplied by, and a number above 0 on an overflow.
    """
    row = table + tl.program_id(0).to(tl.int64) * COLUMNS
    t, b, size = tl.load(row + TENSOR), tl.load(row + BIN), tl.load(row + SIZE)
    square, euler = tl.full([], 0.0, tl.float64), tl.full([], 0.0, tl.float64)
    if tl.load(addresses + _OF_GRADIENT * num_tensors + t) != 0:
        g, p = (
            _array(addresses, _OF_GRADIENT, t, num_tensors, KIND),
            _array(addresses, _OF_WEIGHT, t, num_tensors, KIND),
        )
        square = _square(g, row, size, PLAIN, BLOCK)
        euler = _product(g, p, row, size, PLAIN, BLOCK)
    inverse = tl.load(unscale)
    square = tl.where(tl.load(unscale + 1) > 0, float("inf"), square * inverse * inverse)
    weight2 = tl.full([], 0.0, tl.float64)
    if tl.load(addresses + _OF_WEIGHT * num_tensors + t) != 0:
        weight2 = _square(_array(addresses, _OF_WEIGHT, t, num_tensors, KIND), row, size, PLAIN, BLOCK)
    known = tl.load(recent + b)
    says = (square > 0) & (square < float("inf")) & (known > 0)
    ratio = tl.sqrt(square) / tl.where(known > 0, known, 1.0)
    tl.store(vectors + SQUARE * num_bins + b, square)
    tl.store(vectors + WEIGHT2 * num_bins + b, weight2)
    tl.store(vectors + EULER * num_bins + b, tl.where(square < float("inf"), euler, 0.0))
    tl.store(vectors + RATIO * num_bins + b, tl.where(says, ratio, float("nan")))


@triton.jit
def decide(
    vectors,
    median,
    steps,
    recent,
    tensors,
    numel,
    lines,
    num_tensors,
    num_bins,
    LINES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Decide on every bin; see `gradsplit.collective` and `gradsplit.optim.share`."""
    b = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = b < num_bins
    square = tl.load(vectors + SQUARE * num_bins + b, mask=there, other=0.0)
    weight2 = tl.load(vectors + WEIGHT2 * num_bins + b, mask=there, other=0.0)
    t, n = tl.load(tensors + b, mask=there, other=0), tl.load(numel + b, mask=there, other=1.0)
    before = tl.load(recent + b, mask=there, other=0.0)
    middle = tl.load(median)
    fired = middle > _COLLECTIVE  # nan, where nothing is known yet, is not above
    factor = tl.where(fired, 1.0 / tl.where(fired, middle, 1.0), 1.0)
    is_finite = square < float("inf")  # nan is not
    norm = tl.sqrt(tl.where(is_finite, square, 0.0))
    length = tl.sqrt(tl.where(weight2 < float("inf"), weight2, 0.0))
    limit = tl.zeros([BLOCK], tl.float64) + float("inf")
    for j in tl.static_range(LINES):
        line = lines + 3 * j * num_tensors + t
        slope = tl.load(line, mask=there, other=0.0)
        floor = tl.load(line + num_tensors, mask=there, other=0.0)
        root = tl.load(line + 2 * num_tensors, mask=there, other=0.0)
        limit = tl.minimum(limit, tl.maximum(slope * length, floor + root * tl.sqrt(n)))
    passed = norm * factor
    scale = factor * tl.where(passed > limit, limit / tl.where(passed > limit, passed, 1.0), 1.0)
    count = tl.load(steps)
    falls = tl.minimum(count / (count + 2.0), _FALLS)
    follows = tl.minimum(tl.maximum(norm, falls * before), _RISES * before)
    moved = tl.where(before > 0, tl.where(fired, _LET_THROUGH * before, follows), passed)
    tl.store(vectors + NORM * num_bins + b, norm, mask=there)
    tl.store(vectors + LIMIT * num_bins + b, limit, mask=there)
    tl.store(vectors + SCALE * num_bins + b, tl.where(is_finite, scale, 0.0), mask=there)
    tl.store(vectors + LENGTH * num_bins + b, length, mask=there)
    tl.store(vectors + FINITE * num_bins + b, tl.where(is_finite, 1.0, 0.0).to(tl.float64), mask=there)
    tl.store(vectors + RECENT * num_bins + b, tl.where(is_finite & (norm > 0), moved, before), mask=there)


@triton.jit
def _momentum(g, m, at, of_weight, there, s, number, WIDE: tl.constexpr):
    """The gradient times s, the momentum that has taken it in, and what lies ahead of that."""
    w1 = tl.load(number + _W1).to(WIDE)
    x = tl.load(g + of_weight, mask=there, other=0.0).to(WIDE) * s
    m0 = tl.load(m + at, mask=there, other=0.0)
    m1 = m0 + w1 * (x - m0)
    return x, m0, m1, m1 + w1 * (x - m1)


@triton.jit
def enter(
    table,
    addresses,
    constants,
    unscale,
    vectors,
    num_tensors,
    num_bins,
    KIND: tl.constexpr,
    WIDE: tl.constexpr,
    NARROW: tl.constexpr,
    PLAIN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write what lies ahead of a bin's momentum; the momentum itself where the gradient is not finite."""
    row = table + tl.program_id(0).to(tl.int64) * COLUMNS
    t, b, size = tl.load(row + TENSOR), tl.load(row + BIN), tl.load(row + SIZE)
    if tl.load(addresses + _OF_GRADIENT * num_tensors + t) != 0:
        number = constants + t * _CONSTANTS
        g, m = _array(addresses, _OF_GRADIENT, t, num_tensors, KIND), _array(addresses, _OF_FIRST, t, num_tensors, WIDE)
        d = _array(addresses, _OF_AHEAD, t, num_tensors, NARROW)
        learns = tl.load(vectors + FINITE * num_bins + b) > 0
        s = tl.load(vectors + SCALE * num_bins + b) * tl.load(number + _SIGN) * tl.load(unscale)
        for lo in range(0, size, BLOCK):
            at, of_weight, there = _places(row, lo, PLAIN, BLOCK)
            _x, m0, _m1, ahead = _momentum(g, m, at, of_weight, there, s.to(WIDE), number, WIDE)
            tl.store(d + at, tl.where(learns, ahead, m0).to(NARROW), mask=there)


@triton.jit
def _turned(
    g,
    m,
    v,
    d,
    at,
    of_weight,
    there,
    s,
    number,
    unbias1,
    unbias2,
    ADAM: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Both memories after the step, and the direction; 0 where there is no element."""
    x, _m0, m1, ahead = _momentum(g, m, at, of_weight, there, s, number, WIDE)
    v1 = m1
    if ADAM:
        v0 = tl.load(v + at, mask=there, other=0.0)
        v1 = v0 + tl.load(number + _W2).to(WIDE) * (x * x - v0)
        ahead = ahead / unbias1.to(WIDE) / (tl.sqrt(v1 / unbias2.to(WIDE)) + tl.load(number + _EPS).to(WIDE))
        ahead = tl.where(there, ahead, 0.0)
    else:
        ahead = tl.load(d + at, mask=there, other=0.0).to(WIDE)
    return m1, v1, ahead


@triton.jit
def commit(
    table,
    addresses,
    constants,
    unscale,
    vectors,
    rates,
    pace,
    unbias,
    most,
    moved,
    cosines,
    num_tensors,
    num_bins,
    ADAM: tl.constexpr,
    MEASURES: tl.constexpr,
    KIND: tl.constexpr,
    WIDE: tl.constexpr,
    NARROW: tl.constexpr,
    PLAIN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write memories and weights of a bin: its step, and the way back where it has grown beyond its longest length.

    ``moved`` becomes 1 where the bin has moved, 2 where it was drawn back. What MEASURES is the cosine of the angle
    between gradient and direction; it stays as it is where one of them is zero.
    """
    row = table + tl.program_id(0).to(tl.int64) * COLUMNS
    t, b, size = tl.load(row + TENSOR), tl.load(row + BIN), tl.load(row + SIZE)
    here = tl.load(addresses + _OF_GRADIENT * num_tensors + t) != 0
    if here & (tl.load(vectors + FINITE * num_bins + b) > 0):
        number = constants + t * _CONSTANTS
        p, g = (
            _array(addresses, _OF_WEIGHT, t, num_tensors, KIND),
            _array(addresses, _OF_GRADIENT, t, num_tensors, KIND),
        )
        m, v = (
            _array(addresses, _OF_FIRST, t, num_tensors, WIDE),
            _array(addresses, _OF_SECOND, t, num_tensors, WIDE),
        )
        d = _array(addresses, _OF_AHEAD, t, num_tensors, NARROW)
        s = (tl.load(vectors + SCALE * num_bins + b) * tl.load(number + _SIGN) * tl.load(unscale)).to(WIDE)
        unbias1, unbias2 = tl.load(unbias + t), tl.load(unbias + num_tensors + t)
        total, dot = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
        for lo in range(0, size, BLOCK):
            at, of_weight, there = _places(row, lo, PLAIN, BLOCK)
            _m, _v, ahead = _turned(g, m, v, d, at, of_weight, there, s, number, unbias1, unbias2, ADAM, WIDE)
            total += ahead.to(tl.float64) * ahead.to(tl.float64)
            if MEASURES:
                dot += tl.load(g + of_weight, mask=there, other=0.0).to(tl.float64) * ahead.to(tl.float64)
        ahead2 = tl.sum(total, axis=0)
        moves = ahead2 > 0
        if not ADAM:  # Adam's direction fades by itself
            moves = moves & (tl.load(vectors + NORM * num_bins + b) > 0)
        if MEASURES:
            both = tl.load(vectors + NORM * num_bins + b) * tl.sqrt(ahead2)
            towards = tl.sum(dot, axis=0) * tl.load(number + _SIGN) * tl.load(unscale)
            if both > 0:
                tl.store(cosines + b, towards / both)
        if moves:
            tl.store(moved + b, tl.full([], 1, tl.int8))
        root, length = tl.sqrt(size.to(tl.float64)), tl.load(vectors + LENGTH * num_bins + b)
        tau = tl.load(rates + t) * tl.load(number + _SHARE) * tl.load(pace)
        floor = tl.where(tl.load(number + _KEEPS) > 0, root, 1e-30)
        step = tau * tl.maximum(length, tl.load(number + _LEAST) * root) / tl.maximum(tl.sqrt(ahead2), floor)
        step, keep = step.to(WIDE), (1.0 - tl.load(number + _DECAY) * tau).to(WIDE)
        longest, held = tl.load(number + _MOST), tl.load(most + b)
        held = tl.where(moves & ((held == 0) | (length > _WRITTEN * held)), tl.maximum(length, longest), held)
        shrink = tl.full([], 1.0, tl.float64)
        if longest < float("inf"):
            total = tl.zeros([BLOCK], tl.float64)
            for lo in range(0, size, BLOCK):
                at, of_weight, there = _places(row, lo, PLAIN, BLOCK)
                _m, _v, ahead = _turned(g, m, v, d, at, of_weight, there, s, number, unbias1, unbias2, ADAM, WIDE)
                fresh = tl.load(p + of_weight, mask=there, other=0.0).to(WIDE) * keep - ahead * step
                total += fresh.to(tl.float64) * fresh.to(tl.float64)
            reached = tl.sqrt(tl.sum(total, axis=0))
            beyond = moves & (reached > held)
            shrink = tl.where(beyond, held / tl.where(beyond, reached, 1.0), 1.0)
            if beyond:
                tl.store(moved + b, tl.full([], 2, tl.int8))
        for lo in range(0, size, BLOCK):
            at, of_weight, there = _places(row, lo, PLAIN, BLOCK)
            m1, v1, ahead = _turned(g, m, v, d, at, of_weight, there, s, number, unbias1, unbias2, ADAM, WIDE)
            weight = tl.load(p + of_weight, mask=there, other=0.0)
            fresh = ((weight.to(WIDE) * keep - ahead * step) * shrink.to(WIDE)).to(KIND)
            tl.store(p + of_weight, tl.where(moves, fresh, weight), mask=there)
            tl.store(m + at, m1, mask=there)
            if ADAM:
                tl.store(v + at, v1, mask=there)
        tl.store(most + b, held)
