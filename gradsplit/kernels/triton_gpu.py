# mypy: disable-error-code="no-untyped-def"
"""Bins by Triton programs over a pointer table: one launch for all tensors of a dtype, no copy to the host.

It was checked against the definition in Triton's interpreter on the CPU (TRITON_INTERPRET=1), and never on a graphics
card. So before it works in a dtype on a device for the first time, it is compared with the definition there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ..plan import Layout, Plan, xsp
from ..plan.lowering import BIN, COUNT, LENGTH, OFFSET, ROW_STEP, ROWS, STEP, TENSOR, lower
from .addressable import AddressKernel, LastFour, Signature, addressed, bump_versions, only
from .kernel import BACKENDS, Formula
from .launch import launch
from .selfcheck import is_sound
from .triton_decide import Decider

__all__ = ["BLOCK", "KINDS", "PIECE", "TritonKernel", "add_slots", "scale_pieces", "square_pieces"]

BLOCK = 1024
"""The most elements that a program takes at once."""

PIECE = 8 * BLOCK
"""The most elements of a piece; one program takes one piece, block by block."""

COLUMNS = tl.constexpr(8)
_TENSOR, _SLOT, _BIN, _START, _FIRST, _STOP, _LENGTH, _ROW_STEP = (tl.constexpr(column) for column in range(8))
"""The columns of a piece. Its elements are those from ``first`` to ``stop`` of a box. The box begins at element
``start`` of the tensor and has rows of ``length`` elements, which are ``row_step`` elements apart. The sum of squares
goes to ``slot``: to the bin itself, or to a place of its own where a bin has several pieces."""


@triton.jit
def _elements(row, lo, BLOCK: tl.constexpr):
    """Offsets of a piece's elements from ``lo`` on, in 64 bits, and which of them exist."""
    start, first, stop = tl.load(row + _START), tl.load(row + _FIRST), tl.load(row + _STOP)
    length, row_step = tl.load(row + _LENGTH), tl.load(row + _ROW_STEP)
    i = first + lo + tl.arange(0, BLOCK).to(tl.int64)
    return start + (i // length) * row_step + i % length, i < stop


@triton.jit
def square_pieces(table, addresses, others, squares, num_slots, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Write each piece's sum of squares, in float64, to its slot; along the second axis first one list, then the other.

    A piece is added up in a fixed order, so that a step has the same bits every time.
    """
    row = table + tl.program_id(0).to(tl.int64) * COLUMNS
    t = tl.load(row + _TENSOR)
    address = tl.load(addresses + t)
    if tl.program_id(1) > 0:
        address = tl.load(others + t)
    base = address.to(tl.pointer_type(KIND))
    total = tl.zeros([BLOCK], tl.float64)
    for lo in range(0, tl.load(row + _STOP) - tl.load(row + _FIRST), BLOCK):
        at, there = _elements(row, lo, BLOCK)
        x = tl.load(base + at, mask=there, other=0.0).to(tl.float64)
        total += x * x
    slot = tl.program_id(1).to(tl.int64) * num_slots + tl.load(row + _SLOT)
    tl.store(squares + slot, tl.sum(total, axis=0))


@triton.jit
def add_slots(table, squares, num_slots, BLOCK: tl.constexpr):
    """Add up the slots of each bin in several pieces, in their order."""
    row = table + tl.program_id(0).to(tl.int64) * 3
    bin_, first, count = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    squares += tl.program_id(1).to(tl.int64) * num_slots
    total = tl.zeros([BLOCK], tl.float64)
    for lo in range(0, count, BLOCK):
        i = lo + tl.arange(0, BLOCK)
        total += tl.load(squares + first + i, mask=i < count, other=0.0)
    tl.store(squares + bin_, tl.sum(total, axis=0))


@triton.jit
def scale_pieces(table, addresses, scale, zero, KIND: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Multiply the pieces of bins with a scale below 1, and write zeros where ``zero``; leave all others alone."""
    row = table + tl.program_id(0).to(tl.int64) * COLUMNS
    bin_ = tl.load(row + _BIN)
    factor, zeroed = tl.load(scale + bin_), tl.load(zero + bin_).to(tl.int32)
    base = tl.load(addresses + tl.load(row + _TENSOR)).to(tl.pointer_type(KIND))
    if factor < 1.0 or zeroed != 0:
        for lo in range(0, tl.load(row + _STOP) - tl.load(row + _FIRST), BLOCK):
            at, there = _elements(row, lo, BLOCK)
            x = tl.load(base + at, mask=there, other=0.0)
            y = x.to(WIDE) * factor.to(WIDE)
            # Chosen, not multiplied: 0 * inf is not 0.
            y = tl.where(tl.full([BLOCK], 1, tl.int32) * zeroed > 0, tl.zeros([BLOCK], WIDE), y)
            tl.store(base + at, y.to(KIND), mask=there)


KINDS: dict[torch.dtype, tuple[Any, Any]] = {
    torch.float32: (tl.float32, tl.float32),
    torch.float64: (tl.float64, tl.float64),
    torch.bfloat16: (tl.bfloat16, tl.float32),
    torch.float16: (tl.float16, tl.float32),
}
"""The type of each dtype's elements, and the type in which to compute."""


class Table(NamedTuple):
    """The pieces of one dtype, (pieces, `COLUMNS`) on the device, and the elements that a program takes at once."""

    dtype: torch.dtype
    pieces: Tensor
    block: int


class Tables(NamedTuple):
    """The plan over tensors of one signature, on the device.

    Attributes:
        signature: dtypes and strides.
        tables: the pieces of each dtype.
        several: (n, 3) the bins in several pieces: bin, first slot, number of slots.
        num_slots: slots in all, those of the bins among them.
        eager_T: the tensors that the eager kernel serves.
    """

    signature: Signature
    tables: list[Table]
    several: Tensor
    num_slots: int
    eager_T: tuple[int, ...]


class TritonKernel(AddressKernel[Tables]):
    """The kernel for tensors on a CUDA device, by address.

    It serves dense float32, float64, bfloat16 and float16 with contiguous rows or columns, in every dtype in which its
    programs have shown here that they compute what the definition computes, see `is_sound`. The eager kernel serves
    sparse and complex tensors, and with one `FallbackWarning` all others.

    Raises:
        SelfCheckError: the backend was asked for by name, and a program is wrong on this device.
    """

    name = "triton"
    decides = True

    def __init__(self, plan: Plan, device: torch.device) -> None:
        super().__init__(plan, device)
        self._sent: LastFour[tuple[Tensor, Tensor]] = LastFour()  # addresses, on the host and on the device
        self._captured: list[Any] = []  # what a CUDA graph reads again at every replay
        self._sound: set[torch.dtype] = set()

    def prepare(self, dtypes: Iterable[torch.dtype]) -> bool:
        """See `Kernel.prepare`."""
        served = [self._serves(dtype) for dtype in sorted(dtypes, key=str)]
        return all(served)

    def decider(self, formula: Formula, *, collective: bool) -> Decider:
        """See `Kernel.decider`."""
        sizes = (torch.from_numpy(np.array(x, dtype=np.float64)) for x in (self.plan.numel_B, self.plan.num_rows_B))
        numel_B, num_rows_B = (size.to(self.device) for size in sizes)
        return Decider(formula, numel_B, num_rows_B, collective=collective)

    def squares(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """See `Kernel.squares`."""
        return self.squares_many([tensors])[0]

    def squares_many(self, lists: Sequence[Sequence[Tensor | None]]) -> list[Tensor]:
        """See `Kernel.squares_many`; two lists of one signature, as gradients and weights, in the same launch."""
        if torch.compiler.is_compiling():
            return [self.eager.squares(tensors) for tensors in lists]
        tables = [self._tables_of(tensors) for tensors in lists]
        self._measured = (list(lists[0]), tables[0]) if lists else None
        if len(lists) == 2 and tables[0] is tables[1]:
            return self._squares(lists, tables[0])
        return [self._squares([tensors], of)[0] for tensors, of in zip(lists, tables, strict=True)]

    def _squares(self, lists: Sequence[Sequence[Tensor | None]], tables: Tables) -> list[Tensor]:
        """Squares of one or two lists of tensors of one signature."""
        num = len(lists)
        squares = torch.zeros((num, tables.num_slots), dtype=torch.float64, device=self.device)
        if tables.tables:
            addresses = [self._addresses_of(tensors, tables) for tensors in lists]
            for dtype, pieces, block in tables.tables:
                given = (pieces, addresses[0], addresses[-1], squares, tables.num_slots, KINDS[dtype][0], block)
                launch(self.device, square_pieces, (len(pieces), num), *given)
            several = tables.several
            launch(self.device, add_slots, (len(several), num), several, squares, tables.num_slots, BLOCK)
        made = [row[: self.plan.num_bins] for row in squares.unbind()]
        if tables.eager_T:
            made = [row + self.eager.squares(only(of, tables.eager_T)) for row, of in zip(made, lists, strict=True)]
        return made

    def scale_(self, tensors: Sequence[Tensor | None], scale_B: Tensor, zero_B: Tensor) -> None:
        """See `Kernel.scale_`. Bins with a scale of 1 are neither read nor written."""
        if torch.compiler.is_compiling():
            return self.eager.scale_(tensors, scale_B, zero_B)
        tables = self._just_measured(tensors) or self._tables_of(tensors)
        if tables.eager_T:  # first, since it needs memory, and where that has run out nothing may be half applied
            self.eager.scale_(only(tensors, tables.eager_T), scale_B, zero_B)
        if not tables.tables:
            return None
        addresses, scale, zero = self._addresses_of(tensors, tables), scale_B.contiguous(), zero_B.contiguous()
        for dtype, pieces, block in tables.tables:
            given = (pieces, addresses, scale, zero.view(torch.uint8), *KINDS[dtype], block)
            launch(self.device, scale_pieces, (len(pieces),), *given)
        return bump_versions(addressed(tensors, tables.signature))

    def _serves(self, dtype: torch.dtype) -> bool:
        """Whether the programs are right in a dtype here; they are tried once per process."""
        if dtype in self._sound:
            return True
        trial = partial(_trial, self.device, dtype)
        name = "triton: squares and scaling"
        if dtype in KINDS and is_sound(name, self.device, dtype, trial, by_name=self.by_name):
            self._sound.add(dtype)
        return dtype in self._sound

    def _addresses_of(self, tensors: Sequence[Tensor | None], tables: Tables) -> Tensor:
        """Where the tensors begin in memory, (T,), on the device; sent only where an address has changed.

        The copy starts from pinned memory and nobody waits for it. What is sent while a CUDA graph is captured is kept,
        since every replay reads it again.
        """
        pointers = [
            0 if tensor is None or entry is None else tensor.data_ptr()
            for tensor, entry in zip(tensors, tables.signature, strict=True)
        ]
        known = self._sent.find(pointers)
        if known is not None:
            return known[1]
        host = torch.tensor(pointers, dtype=torch.int64)
        on_card = self.device.type == "cuda"
        host = host.pin_memory() if on_card else host
        sent = self._sent.keep(pointers, (host, host.to(self.device, non_blocking=True)))
        if on_card and torch.cuda.is_current_stream_capturing():
            self._captured.append((sent, tables))
        return sent[1]

    def _make(self, signature: Signature, eager_T: tuple[int, ...]) -> Tables:
        """Cut the bins of addressed tensors into pieces, and give each bin in several pieces slots of its own."""
        dtypes = sorted({entry[0] for entry in signature if entry is not None}, key=str)
        pieces = [
            _pieces(self.plan, [entry[1] if entry is not None and entry[0] == dtype else None for entry in signature])
            for dtype in dtypes
        ]
        several, num_slots = _give_slots(pieces, self.plan.num_bins)
        tables = [
            Table(dtype, torch.from_numpy(table).to(self.device), _block_of(table))
            for dtype, table in zip(dtypes, pieces, strict=True)
        ]
        return Tables(signature, tables, torch.from_numpy(several).to(self.device), num_slots, eager_T)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_sent": LastFour(), "_captured": []}


class _Trusting(TritonKernel):
    """The kernel while it is tried itself."""

    def _serves(self, dtype: torch.dtype) -> bool:
        return True


def _trial(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The programs and the definition on rows, turned columns, several pieces, an overflow and a NaN."""
    layout = Layout.from_shapes({"rows": (3, 70), "turned": (3, 9), "pieces": (1, 2 * PIECE + 5), "bad": (4, 5)})
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
    """Cut every bin into pieces of at most `PIECE` elements, (pieces, `COLUMNS`)."""
    lowered = lower(plan, strides, bands=False, cut_bins=False)
    assert lowered is not None  # the caller has asked `is_addressable`
    count = lowered.entries[:, COUNT]
    entries = np.repeat(lowered.entries, count, axis=0)
    of_entry = np.arange(len(entries)) - np.repeat(np.cumsum(count) - count, count)
    size = entries[:, ROWS] * entries[:, LENGTH]
    times = -(-size // PIECE)
    box = np.repeat(np.arange(len(entries)), times)
    first = PIECE * (np.arange(len(box)) - np.repeat(np.cumsum(times) - times, times))
    pieces = np.empty((len(box), COLUMNS.value), dtype=np.int64)
    pieces[:, _TENSOR.value] = entries[box, TENSOR]
    pieces[:, _BIN.value] = (entries[:, BIN] + of_entry)[box]
    pieces[:, _START.value] = (entries[:, OFFSET] + of_entry * entries[:, STEP])[box]
    pieces[:, _FIRST.value] = first
    pieces[:, _STOP.value] = np.minimum(first + PIECE, size[box])
    pieces[:, _LENGTH.value] = entries[box, LENGTH]
    pieces[:, _ROW_STEP.value] = entries[box, ROW_STEP]
    return pieces


def _give_slots(pieces: list[np.ndarray], num_bins: int) -> tuple[np.ndarray, int]:
    """Write the slots of all pieces; return the bins in several pieces, (n, 3), and the number of slots."""
    bins = np.concatenate([np.zeros(0, dtype=np.int64), *(table[:, _BIN.value] for table in pieces)])
    count = np.bincount(bins, minlength=num_bins)
    first = num_bins + np.cumsum(np.where(count > 1, count, 0)) - np.where(count > 1, count, 0)
    order = np.argsort(bins, kind="stable")
    place = np.empty(len(bins), dtype=np.int64)
    starts = np.cumsum(count) - count
    place[order] = np.arange(len(bins)) - starts[bins[order]]  # the number of the piece within its bin
    slots = np.where(count[bins] > 1, first[bins] + place, bins)
    for table, stop in zip(pieces, np.cumsum([len(table) for table in pieces]), strict=True):
        table[:, _SLOT.value] = slots[stop - len(table) : stop]
    several = np.flatnonzero(count > 1)
    return np.stack((several, first[several], count[several]), axis=1), num_bins + int(count[several].sum())


def _block_of(pieces: np.ndarray) -> int:
    """The elements that a program takes at once: a power of two, no more than the largest piece needs."""
    longest = int((pieces[:, _STOP.value] - pieces[:, _FIRST.value]).max(initial=1))
    return min(BLOCK, max(64, 1 << (longest - 1).bit_length()))
