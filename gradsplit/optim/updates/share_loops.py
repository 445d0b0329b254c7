# mypy: disable-error-code="no-untyped-def"
"""Compiled loops of the share step on the CPU; `gradsplit.optim.share` is the definition.

`decide` goes over the bins' norms, `enter` over gradients and memories, `apply` over directions and weights. The tables
are those of `gradsplit.plan.lowering`; ``numbers`` (T, 12) holds the constants of each tensor, columns below.
"""

from __future__ import annotations

import math

import numpy as np

from ...collective import LET_THROUGH, RISES
from ...kernels.addresses import compiled, load, narrow, pointer, store
from ...kernels.numba_loops import _limit, share
from .compiled import FIRST_MOMENT, GRADIENT, SECOND_MOMENT, WEIGHT
from .numba_loops import _bin_square, _entry

__all__ = ["COLUMNS", "DIRECTION", "apply", "decide", "enter", "ratios"]

DIRECTION = 4
"""The row of ``bases`` with the addresses of the directions, behind those of `compiled`."""

COLUMNS = (
    *("share", "decay", "least", "longest", "is_adam", "sign"),
    *("w1", "beta2", "w2", "unbias1", "unbias2", "eps"),
)
"""The columns of ``numbers``: see `gradsplit.optim.share` and `gradsplit.optim.directions.adam`."""

(SHARE, DECAY, LEAST, LONGEST, IS_ADAM, SIGN, W1, BETA2, W2, UNBIAS1, UNBIAS2, EPS) = range(12)

_reduced = compiled(fastmath={"reassoc", "contract"})
_plain = compiled()


@_plain
def ratios(squares, recent, out):
    """Write ||g_b|| / s_b of every bin; nan where it says nothing."""
    for b in range(len(squares)):
        known = math.isfinite(squares[b]) and squares[b] > 0 and recent[b] > 0
        out[b] = math.sqrt(squares[b]) / recent[b] if known else np.nan


@_plain
def decide(squares, weights, fired, factor, falls, recent, most, tensors, numel, numbers, lines, out):
    """Decide on every bin, and remember its norm.

    ``out`` (5, B): norm, limit, factor on the gradient, length of the weights, and 1 where the gradient is finite.
    """
    norms, limits, scales, lengths, finite = out[0], out[1], out[2], out[3], out[4]
    for b in range(len(squares)):
        t = tensors[b]
        weight2 = weights[b] if math.isfinite(weights[b]) else 0.0
        lengths[b] = math.sqrt(weight2)
        if not math.isfinite(squares[b]):
            norms[b], limits[b], scales[b], finite[b] = 0.0, _limit(lines, t, lengths[b], numel[b]), 0.0, 0.0
            continue
        norm = math.sqrt(squares[b])
        passed, limit = norm * factor, _limit(lines, t, lengths[b], numel[b])
        norms[b], limits[b], finite[b] = norm, limit, 1.0
        scales[b] = factor * (limit / passed if passed > limit else 1.0)
        if norm == 0.0:
            continue
        if recent[b] == 0.0:
            recent[b] = passed
        elif fired:
            recent[b] *= LET_THROUGH
        else:
            recent[b] = min(max(norm, falls * recent[b]), RISES * recent[b])
        if most[b] == 0.0:
            most[b] = max(lengths[b], numbers[t, LONGEST])


@_reduced
def _enter_row(g, m, v, d, start, length, s, constants):
    w1, b2, w2, unbias1, unbias2, eps = constants
    for j in range(start, start + length):
        x, m0 = load(g, j) * s, load(m, j)
        m1 = m0 + w1 * (x - m0)
        store(m, j, m1)
        ahead = m1 + w1 * (x - m1)
        if v is not None:
            v1 = load(v, j) * b2 + x * x * w2
            store(v, j, v1)
            ahead = ahead * unbias1 / (math.sqrt(v1) * unbias2 + eps)
        store(d, j, ahead)


@_reduced
def _copy_row(m, d, start, length):
    for j in range(start, start + length):
        store(d, j, load(m, j))


@_reduced
def _enter(c, worker, kind, entries, chunks, bases, numbers, scales, finite):
    for e in range(chunks[c], chunks[c + 1]):
        first, count, t, offset, step, rows, row_step, length = _entry(entries, e)
        g, m = pointer(bases[GRADIENT, t], kind), pointer(bases[FIRST_MOMENT, t], kind)
        v, d = pointer(bases[SECOND_MOMENT, t], kind), pointer(bases[DIRECTION, t], kind)
        constants = (
            narrow(g, numbers[t, W1]),
            narrow(g, numbers[t, BETA2]),
            narrow(g, numbers[t, W2]),
            narrow(g, numbers[t, UNBIAS1]),
            narrow(g, numbers[t, UNBIAS2]),
            narrow(g, numbers[t, EPS]),
        )
        for i in range(count):
            b, at = first + i, offset + i * step
            s = narrow(g, scales[b] * numbers[t, SIGN])
            for r in range(rows):
                start = at + r * row_step
                if finite[b] == 0.0:
                    _copy_row(m, d, start, length)
                elif numbers[t, IS_ADAM] > 0.0:
                    _enter_row(g, m, v, d, start, length, s, constants)
                else:
                    _enter_row(g, m, None, d, start, length, s, constants)


@_plain
def enter(work, *arguments):
    """Enter bounded gradients into the memories; write what lies ahead of the momentum, or Adam's direction."""
    share(_enter, work, arguments)


@_reduced
def _step_row(p, d, start, length, shrink, rate):
    part = narrow(p, 0.0)
    for j in range(start, start + length):
        fresh = load(p, j) * shrink - rate * load(d, j)
        store(p, j, fresh)
        part += fresh * fresh
    return np.float64(part)


@_reduced
def _scale_row(p, start, length, factor):
    for j in range(start, start + length):
        store(p, j, load(p, j) * factor)


@_reduced
def _apply(c, worker, kind, entries, chunks, bases, numbers, lengths, finite, most, grown):
    for e in range(chunks[c], chunks[c + 1]):
        first, count, t, offset, step, rows, row_step, length = _entry(entries, e)
        p, d = pointer(bases[WEIGHT, t], kind), pointer(bases[DIRECTION, t], kind)
        root = math.sqrt(rows * length)
        shrink = narrow(p, 1.0 - numbers[t, DECAY])
        for i in range(count):
            b, at = first + i, offset + i * step
            ahead2 = _bin_square(d, at, rows, row_step, length)
            if finite[b] == 0.0 or not ahead2 > 0.0:
                continue
            floor = root if numbers[t, IS_ADAM] > 0.0 else 1e-30
            long = max(lengths[b], numbers[t, LEAST] * root)
            rate = narrow(p, numbers[t, SHARE] * long / max(math.sqrt(ahead2), floor))
            fresh2 = 0.0
            for r in range(rows):
                fresh2 += _step_row(p, d, at + r * row_step, length, shrink, rate)
            if numbers[t, LONGEST] < np.inf and fresh2 > most[b] * most[b]:
                grown[b] = 1.0
                fresh2 = _bin_square(p, at, rows, row_step, length)
                factor = narrow(p, most[b] / math.sqrt(fresh2))
                for r in range(rows):
                    _scale_row(p, at + r * row_step, length, factor)


@_plain
def apply(work, *arguments):
    """Move every bin by its share, and draw back what has grown beyond its longest length."""
    share(_apply, work, arguments)
