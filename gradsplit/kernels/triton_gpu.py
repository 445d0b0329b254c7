# mypy: disable-error-code="no-untyped-def"
"""Bins by Triton programs over a pointer table: one launch for all tensors of a dtype, no copy to the host.

It was checked against the definition in Triton's interpreter on the CPU (TRITON_INTERPRET=1), and never on a graphics
card. So ``backend="auto"`` does not choose it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ..plan import Plan
from ..plan.lowering import BIN, COUNT, LENGTH, OFFSET, ROW_STEP, ROWS, STEP, TENSOR, lower
from .addressable import bump_versions
from .kernel import Kernel

__all__ = ["BLOCK", "scale_pieces", "square_pieces", "TritonKernel"]

BLOCK = 1024
"""The most elements of a piece; one program takes one piece."""

COLUMNS = tl.constexpr(7)
_TENSOR, _BIN, _START, _FIRST, _STOP, _LENGTH, _ROW_STEP = (tl.constexpr(column) for column in range(7))
"""The columns of a piece. Its elements are those from ``first`` to ``stop`` of a box. The box begins at element
``start`` of the tensor and has rows of ``length`` elements, which are ``row_step`` elements apart."""


@triton.jit
def _elements(row, BLOCK: tl.constexpr):
    """Offsets of a piece's elements, and which of them exist."""
    start, first, stop = tl.load(row + _START), tl.load(row + _FIRST), tl.load(row + _STOP)
    length, row_step = tl.load(row + _LENGTH), tl.load(row + _ROW_STEP)
    i = first + tl.arange(0, BLOCK).to(tl.int64)
    return start + (i // length) * row_step + i % length, i < stop


@triton.jit
def square_pieces(table, addresses, squares, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Add each piece's sum of squares, in float64, to its bin."""
    row = table + tl.program_id(0) * COLUMNS
    base = tl.load(addresses + tl.load(row + _TENSOR)).to(tl.pointer_type(KIND))
    at, there = _elements(row, BLOCK)
    x = tl.load(base + at, mask=there, other=0.0).to(tl.float64)
    tl.atomic_add(squares + tl.load(row + _BIN), tl.sum(x * x, axis=0))


@triton.jit
def scale_pieces(table, addresses, scale, zero, KIND: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Multiply the pieces of bins with a scale below 1, and write zeros where ``zero``; leave all others alone."""
    row = table + tl.program_id(0) * COLUMNS
    bin_ = tl.load(row + _BIN)
    factor, zeroed = tl.load(scale + bin_), tl.load(zero + bin_)
    base = tl.load(addresses + tl.load(row + _TENSOR)).to(tl.pointer_type(KIND))
    at, there = _elements(row, BLOCK)
    if factor < 1.0 or zeroed != 0:
        x = tl.load(base + at, mask=there, other=0.0)
        y = x.to(WIDE) * factor.to(WIDE)
        # Chosen, not multiplied: 0 * inf is not 0.
        y = tl.where(tl.full([BLOCK], 1, tl.int32) * zeroed > 0, tl.zeros([BLOCK], WIDE), y)
        tl.store(base + at, y.to(KIND), mask=there)


_KINDS: dict[torch.dtype, tuple[Any, Any]] = {
    torch.float32: (tl.float32, tl.float32),
    torch.float64: (tl.float64, tl.float64),
    torch.bfloat16: (tl.bfloat16, tl.float32),
    torch.float16: (tl.float16, tl.float32),
}
"""The type of each dtype's elements, and the type in which to compute."""


Signature = list[tuple[torch.dtype, tuple[int, ...]] | None]
"""The dtype and strides of each tensor; None: nothing to read."""


class TritonKernel(Kernel):
    """The kernel for dense tensors with contiguous rows or columns on a CUDA device.

    Raises:
        ValueError: sparse or complex tensors, or strides that are not addressable; use ``backend="eager"``.
    """

    name = "triton"

    def __init__(self, plan: Plan, device: torch.device) -> None:
        super().__init__(plan, device)
        self._known: list[tuple[Signature, list[tuple[torch.dtype, Tensor]]]] = []

    def squares(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """See `Kernel.squares`."""
        squares_B = torch.zeros(self.plan.num_bins, dtype=torch.float64, device=self.device)
        tables, addresses = self._tables(tensors)
        for dtype, table in tables:
            square_pieces[(len(table),)](table, addresses, squares_B, _KINDS[dtype][0], BLOCK)
        return squares_B

    def scale_(self, tensors: Sequence[Tensor | None], scale_B: Tensor, zero_B: Tensor) -> None:
        """See `Kernel.scale_`."""
        tables, addresses = self._tables(tensors)
        zero = zero_B.to(torch.int32)
        for dtype, table in tables:
            scale_pieces[(len(table),)](table, addresses, scale_B, zero, *_KINDS[dtype], BLOCK)
        bump_versions([tensor for tensor in tensors if tensor is not None])

    def _tables(self, tensors: Sequence[Tensor | None]) -> tuple[list[tuple[torch.dtype, Tensor]], Tensor]:
        """The pieces of each dtype, made once for dtypes and strides, and the tensors' addresses now."""
        signature: Signature = []
        for name, tensor in zip(self.plan.layout.names, tensors, strict=True):
            if tensor is None or tensor.numel() == 0:
                signature.append(None)
            elif tensor.layout is not torch.strided or tensor.dtype not in _KINDS:
                raise ValueError(
                    f"TritonKernel(…): expected dense tensors of real numbers, got {tensor.dtype}, {tensor.layout} at "
                    f"{name!r}. Use backend='eager'."
                )
            else:
                signature.append((tensor.dtype, tensor.stride()))
        pointers = [
            0 if tensor is None or entry is None else tensor.data_ptr()
            for tensor, entry in zip(tensors, signature, strict=True)
        ]
        addresses = torch.tensor(pointers, dtype=torch.int64).to(self.device, non_blocking=True)
        for known, tables in self._known:
            if known == signature:
                return tables, addresses
        tables = []
        for dtype in sorted({entry[0] for entry in signature if entry is not None}, key=str):
            strides = [entry[1] if entry is not None and entry[0] == dtype else None for entry in signature]
            tables.append((dtype, torch.from_numpy(_pieces(self.plan, strides)).to(self.device)))
        self._known = [(signature, tables), *self._known[:3]]
        return tables, addresses


def _pieces(plan: Plan, strides: list[tuple[int, ...] | None]) -> np.ndarray:
    """Cut every bin into pieces of at most `BLOCK` elements, (pieces, `COLUMNS`)."""
    lowered = lower(plan, strides, bands=False, cut_bins=False)
    if lowered is None:
        raise ValueError(
            "TritonKernel(…): expected tensors with contiguous rows or columns, got one that has neither or overlaps "
            "itself. Use backend='eager'."
        )
    count = lowered.entries[:, COUNT]
    entries = np.repeat(lowered.entries, count, axis=0)
    of_entry = np.arange(len(entries)) - np.repeat(np.cumsum(count) - count, count)
    size = entries[:, ROWS] * entries[:, LENGTH]
    times = -(-size // BLOCK)
    box = np.repeat(np.arange(len(entries)), times)
    first = BLOCK * (np.arange(len(box)) - np.repeat(np.cumsum(times) - times, times))
    pieces = np.empty((len(box), COLUMNS.value), dtype=np.int64)
    pieces[:, _TENSOR.value] = entries[box, TENSOR]
    pieces[:, _BIN.value] = (entries[:, BIN] + of_entry)[box]
    pieces[:, _START.value] = (entries[:, OFFSET] + of_entry * entries[:, STEP])[box]
    pieces[:, _FIRST.value] = first
    pieces[:, _STOP.value] = size[box]
    pieces[:, _LENGTH.value] = entries[box, LENGTH]
    pieces[:, _ROW_STEP.value] = entries[box, ROW_STEP]
    return pieces
