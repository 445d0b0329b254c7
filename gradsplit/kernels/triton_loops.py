# mypy: disable-error-code="no-untyped-def"
"""Triton programs over a pointer table: one launch reads or scales all tensors of one dtype.

A program takes one *piece*: up to `BLOCK` elements of one bin in the order of its rows. Pieces of a bin add into
its square; scaling looks at the bin's scale on the device, so nothing waits for it.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["BLOCK", "scale_pieces", "square_pieces"]

BLOCK = 1024


@triton.jit
def _elements(table, piece, BLOCK: tl.constexpr):
    """Offsets of a piece's elements, and which of them exist."""
    start = tl.load(table + piece * 7 + 2)
    first = tl.load(table + piece * 7 + 3)
    stop = tl.load(table + piece * 7 + 4)
    length = tl.load(table + piece * 7 + 5)
    row_step = tl.load(table + piece * 7 + 6)
    i = first + tl.arange(0, BLOCK).to(tl.int64)
    return start + (i // length) * row_step + i % length, i < stop


@triton.jit
def square_pieces(table, addresses, squares, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Add each piece's sum of squares, in float64, to its bin."""
    piece = tl.program_id(0)
    base = tl.load(addresses + tl.load(table + piece * 7)).to(tl.pointer_type(KIND))
    at, there = _elements(table, piece, BLOCK)
    x = tl.load(base + at, mask=there, other=0.0).to(tl.float64)
    tl.atomic_add(squares + tl.load(table + piece * 7 + 1), tl.sum(x * x, axis=0))


@triton.jit
def scale_pieces(table, addresses, scale, zero, KIND: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Multiply the pieces of bins with a scale below 1; write zeros where ``zero``; leave all others alone."""
    piece = tl.program_id(0)
    bin_ = tl.load(table + piece * 7 + 1)
    factor, zeroed = tl.load(scale + bin_), tl.load(zero + bin_)
    base = tl.load(addresses + tl.load(table + piece * 7)).to(tl.pointer_type(KIND))
    at, there = _elements(table, piece, BLOCK)
    if factor < 1.0 or zeroed != 0:
        x = tl.load(base + at, mask=there, other=0.0)
        y = x.to(WIDE) * factor.to(WIDE)
        # Chosen, not multiplied: 0 * inf is not 0.
        y = tl.where(tl.full([BLOCK], 1, tl.int32) * zeroed > 0, tl.zeros([BLOCK], WIDE), y)
        tl.store(base + at, y.to(KIND), mask=there)
