# mypy: disable-error-code="no-untyped-def"
"""Bins by Triton programs over a pointer table: one launch for all tensors of a dtype, no copy to the host.

It was checked against the definition in Triton's interpreter on the CPU (TRITON_INTERPRET=1), and never on a graphics
card. So before it works in a dtype on a device for the first time, it is compared with the definition there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ..plan import Layout, Plan, xsp
from ..plan.lowering import BIN, COUNT, LENGTH, OFFSET, ROW_STEP, ROWS, STEP, TENSOR, is_addressable, lower
from .addressable import bump_versions, obstacle, remedy_of, warn_of_fallback
from .kernel import BACKENDS, Kernel
from .selfcheck import is_sound

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
"""The dtype and strides of each tensor; None: not addressed."""


class Tables(NamedTuple):
    """The plan over tensors of one signature, on the device.

    Attributes:
        signature: dtypes and strides.
        pieces: the pieces of each dtype.
        eager_T: the tensors that the eager kernel serves.
    """

    signature: Signature
    pieces: list[tuple[torch.dtype, Tensor]]
    eager_T: tuple[int, ...]


class TritonKernel(Kernel):
    """The kernel for tensors on a CUDA device, by address.

    It serves dense float32, float64, bfloat16 and float16 with contiguous rows or columns, in every dtype in which its
    programs have shown here that they compute what the definition computes, see `is_sound`. The eager kernel serves
    sparse and complex tensors, and with one `FallbackWarning` all others.

    Raises:
        SelfCheckError: the backend was asked for by name, and a program is wrong on this device.
    """

    name = "triton"

    def __init__(self, plan: Plan, device: torch.device) -> None:
        super().__init__(plan, device)
        self._known: list[Tables] = []  # most recent first
        self._sent: tuple[list[int], Tensor] | None = None
        self._warned = False

    @cached_property
    def eager(self) -> Kernel:
        """The kernel for tensors that are not addressable, and for steps that are traced."""
        return BACKENDS["eager"].make(self.plan, self.device)

    def prepare(self, dtypes: Iterable[torch.dtype]) -> bool:
        """See `Kernel.prepare`."""
        served = [self._serves(dtype) for dtype in sorted(dtypes, key=str)]
        return all(served)

    def squares(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """See `Kernel.squares`."""
        if torch.compiler.is_compiling():
            return self.eager.squares(tensors)
        tables = self._tables_of(tensors)
        squares_B = torch.zeros(self.plan.num_bins, dtype=torch.float64, device=self.device)
        if tables.pieces:
            addresses = self._addresses_of(tensors, tables)
            for dtype, table in tables.pieces:
                square_pieces[(len(table),)](table, addresses, squares_B, _KINDS[dtype][0], BLOCK)
        return squares_B + self.eager.squares(_only(tensors, tables.eager_T)) if tables.eager_T else squares_B

    def scale_(self, tensors: Sequence[Tensor | None], scale_B: Tensor, zero_B: Tensor) -> None:
        """See `Kernel.scale_`. Bins with a scale of 1 are neither read nor written."""
        if torch.compiler.is_compiling():
            return self.eager.scale_(tensors, scale_B, zero_B)
        tables = self._tables_of(tensors)
        if tables.eager_T:
            self.eager.scale_(_only(tensors, tables.eager_T), scale_B, zero_B)
        if not tables.pieces:
            return None
        addresses, zero = self._addresses_of(tensors, tables), zero_B.to(torch.int32)
        for dtype, table in tables.pieces:
            scale_pieces[(len(table),)](table, addresses, scale_B, zero, *_KINDS[dtype], BLOCK)
        return bump_versions([t for t, entry in zip(tensors, tables.signature, strict=True) if t is not None and entry])

    def _serves(self, dtype: torch.dtype) -> bool:
        """Whether the programs are right in a dtype here; they are tried once per process."""
        if dtype not in _KINDS:
            return False
        trial = partial(_trial, self.device, dtype)
        return is_sound("triton: squares and scaling", self.device, dtype, trial, by_name=self.by_name)

    def _addresses_of(self, tensors: Sequence[Tensor | None], tables: Tables) -> Tensor:
        """Where the tensors begin in memory, (T,), on the device; sent only where an address has changed."""
        pointers = [
            0 if tensor is None or entry is None else tensor.data_ptr()
            for tensor, entry in zip(tensors, tables.signature, strict=True)
        ]
        if self._sent is None or self._sent[0] != pointers:
            self._sent = pointers, torch.tensor(pointers, dtype=torch.int64).to(self.device, non_blocking=True)
        return self._sent[1]

    def _tables_of(self, tensors: Sequence[Tensor | None]) -> Tables:
        """The tables for tensors of these dtypes and strides, made anew or found among the last four."""
        signature: Signature = []
        odd = []
        for t, tensor in enumerate(tensors):
            if tensor is None or tensor.numel() == 0:
                signature.append(None)
            elif tensor.dtype in _KINDS and not obstacle(tensor, self.device.type) and self._serves(tensor.dtype):
                signature.append((tensor.dtype, tensor.stride()))
            else:
                signature.append(None)
                odd.append(t)
                self._warn(t, tensor)
        if not odd:
            for place, tables in enumerate(self._known):
                if tables.signature == signature:
                    if place:
                        self._known = [tables, *(other for other in self._known if other is not tables)]
                    return tables
        for t, entry in enumerate(signature):
            if entry is not None and not is_addressable(self.plan, t, entry[1]):
                self._warn(t, tensors[t])
                odd.append(t)
        known = list(signature)
        for t in odd:
            known[t] = None
        pieces = []
        for dtype in sorted({entry[0] for entry in known if entry is not None}, key=str):
            strides = [entry[1] if entry is not None and entry[0] == dtype else None for entry in known]
            pieces.append((dtype, torch.from_numpy(_pieces(self.plan, strides)).to(self.device)))
        made = Tables(known, pieces, tuple(odd))
        if not odd:  # what is wrong with a tensor may change from step to step
            self._known = [made, *self._known[:3]]
        return made

    def _warn(self, t: int, tensor: Tensor | None) -> None:
        if self._warned or tensor is None or tensor.is_sparse or tensor.is_complex():
            return
        reason = obstacle(tensor, self.device.type) or (
            f"its strides {tensor.stride()} have no contiguous rows that the plan could cut"
            if tensor.dtype in _KINDS and self._serves(tensor.dtype)
            else f"its dtype is {tensor.dtype}"
        )
        self._warned = True
        warn_of_fallback("The triton backend", self.plan.layout.names[t], reason, remedy_of(reason))

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_known": [], "_sent": None}


def _only(tensors: Sequence[Tensor | None], wanted: tuple[int, ...]) -> list[Tensor | None]:
    return [tensor if t in wanted else None for t, tensor in enumerate(tensors)]


class _Trusting(TritonKernel):
    """The kernel while it is tried itself."""

    def _serves(self, dtype: torch.dtype) -> bool:
        return True


def _trial(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The programs and the definition on rows, turned columns, several pieces, an overflow and a NaN."""
    layout = Layout.from_shapes({"rows": (3, 70), "turned": (3, 9), "pieces": (1, 2 * BLOCK + 5), "bad": (4, 5)})
    made = [_numbers(shape, dtype, device) for shape in layout.shapes]
    made[1] = made[1].t().contiguous().t()
    made[3][1, 2], made[3][2, 4] = float("nan"), float("inf")
    for plan in (xsp(layout), xsp(layout, axis=1, parts=2)):
        ours, truth = [t.clone() for t in made], [t.clone() for t in made]
        kernel, definition = _Trusting(plan, device), BACKENDS["reference"].make(plan, device)
        squares_B = kernel.squares(ours)
        yield "a sum of squares", squares_B, definition.squares(truth)
        b = torch.arange(plan.num_bins, dtype=torch.float64, device=device)
        zero_B = ~squares_B.isfinite()
        scale_B = torch.where(zero_B, 0.0, 1.0 / (1.0 + b % 3))
        kernel.scale_(ours, scale_B, zero_B)
        definition.scale_(truth, scale_B, zero_B)
        for name, found, wanted in zip(layout.names, ours, truth, strict=True):
            yield f"a scaled element of {name!r}", found, wanted


def _numbers(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Values of both signs and several sizes, without a generator that a run may use."""
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    return (torch.sin(i * 12.9898) * (1 + i % 7)).reshape(shape).to(device, dtype)


def _pieces(plan: Plan, strides: list[tuple[int, ...] | None]) -> np.ndarray:
    """Cut every bin into pieces of at most `BLOCK` elements, (pieces, `COLUMNS`)."""
    lowered = lower(plan, strides, bands=False, cut_bins=False)
    assert lowered is not None  # the caller has asked `is_addressable`
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
