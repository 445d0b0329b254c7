# mypy: disable-error-code="no-untyped-def"
"""Bins by Triton programs over a pointer table: one launch for all tensors of a dtype, no copy to the host.

Checked against the definition in Triton's interpreter on the CPU (TRITON_INTERPRET=1) and on no graphics card: so
``backend="auto"`` does not choose it.
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
from ..plan.lowering import lower
from .addressable import bump_versions
from .kernel import Kernel

__all__ = ["BLOCK", "scale_pieces", "square_pieces", "TritonKernel"]

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


_KINDS: dict[torch.dtype, tuple[Any, Any]] = {
    torch.float32: (tl.float32, tl.float32),
    torch.float64: (tl.float64, tl.float64),
    torch.bfloat16: (tl.bfloat16, tl.float32),
    torch.float16: (tl.float16, tl.float32),
}
"""Each dtype's element type, and the one to compute in."""


class TritonKernel(Kernel):
    """The same contract as `ReferenceKernel`, for dense tensors whose rows or columns are contiguous.

    Raises:
        ValueError: sparse or complex tensors, or strides that cannot be walked; take ``backend="eager"``.
    """

    name = "triton"

    def __init__(self, plan: Plan, device: torch.device) -> None:
        super().__init__(plan, device)
        self._known: list[tuple[Any, list[tuple[torch.dtype, Tensor]]]] = []

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
        signature: list[Any] = []
        for name, tensor in zip(self.plan.layout.names, tensors, strict=True):
            if tensor is None or tensor.numel() == 0:
                signature.append(None)
            elif tensor.layout is not torch.strided or tensor.dtype not in _KINDS:
                raise ValueError(
                    f"TritonKernel(…): expected a dense real tensor, got {tensor.dtype}, {tensor.layout} at {name!r}. "
                    "Use backend='eager'."
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


def _pieces(plan: Plan, strides: list[Any]) -> np.ndarray:
    """Cut every bin into pieces of at most `BLOCK` elements: tensor, bin, start, first, stop, length, row step."""
    lowered = lower(plan, strides, bands=False, cut_bins=False)
    if lowered is None:
        raise ValueError(
            "TritonKernel(…): expected tensors whose rows or columns are contiguous, got one that overlaps or has "
            "neither. Use backend='eager'."
        )
    entries = np.repeat(lowered.entries, lowered.entries[:, 2], axis=0)
    count = lowered.entries[:, 2]
    of_entry = np.arange(len(entries)) - np.repeat(np.cumsum(count) - count, count)
    size = entries[:, 6] * entries[:, 8]
    times = -(-size // BLOCK)
    box = np.repeat(np.arange(len(entries)), times)
    first = BLOCK * (np.arange(len(box)) - np.repeat(np.cumsum(times) - times, times))
    start = entries[:, 4] + of_entry * entries[:, 5]
    columns = (
        entries[box, 3],
        (entries[:, 1] + of_entry)[box],
        start[box],
        first,
        size[box],
        entries[box, 8],
        entries[box, 7],
    )
    return np.ascontiguousarray(np.stack(columns, axis=1))
