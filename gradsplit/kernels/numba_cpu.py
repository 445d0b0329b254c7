"""Bins by compiled loops over memory: one pass over the gradients, as many threads as torch uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..plan.lowering import BAND_LENGTH, Lowered, lower
from . import numba_loops as loops
from .addressable import AddressKernel, Signature, addressed, bump_versions, obstacle, only, overlap
from .addresses import KINDS
from .threads import Call, run, threads_for

__all__ = ["Tables", "addresses_of", "room_for_workers", "scale_calls", "square_calls", "NumbaKernel"]


@dataclass
class Tables:
    """The lowered plan for tensors of one signature.

    Attributes:
        signature: dtypes and strides.
        lowered: the tables of each dtype.
        eager_T: the tensors that the eager kernel serves.
    """

    signature: Signature
    lowered: list[tuple[torch.dtype, Lowered]]
    eager_T: tuple[int, ...]
    _apart_at: np.ndarray | None = None  # the addresses at which tensors were last found apart

    @cached_property
    def num_elements(self) -> int:
        """The number of elements in all tables."""
        return sum(table.num_elements for _, table in self.lowered)

    @cached_property
    def whole_bins(self) -> bool:
        """Whether every bin lies in one piece of memory that is addressed."""
        return not self.eager_T and all(table.whole_bins for _, table in self.lowered)

    def are_of(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these tables hold for other tensors too, but for those that are not addressed."""
        return all(
            entry is None or (not obstacle(tensor) and (tensor.dtype, tensor.stride()) == entry)
            for tensor, entry in zip(tensors, self.signature, strict=True)
        )

    def apart(self, tensors: Sequence[Tensor | None], bases: np.ndarray) -> bool:
        """Whether no two tensors share memory; the answer is kept for as long as the addresses are the same."""
        if self._apart_at is None or not np.array_equal(self._apart_at, bases):
            if overlap(addressed(tensors, self.signature)):
                return False
            self._apart_at = bases
        return True


def addresses_of(tensors: Sequence[Tensor | None], tables: Tables) -> np.ndarray:
    """Return where the tensors begin in memory, (T,); 0 for those that are not addressed."""
    return np.array(
        [
            0 if tensor is None or entry is None else tensor.data_ptr()
            for tensor, entry in zip(tensors, tables.signature, strict=True)
        ],
        dtype=np.int64,
    )


def room_for_workers(longest: int, dtype: npt.DTypeLike = np.float64) -> np.ndarray:
    """Return uninitialised rows of numbers, one per thread, (threads, at least ``longest``).

    Each row begins at a multiple of 64 bytes: stores of whole vectors that cross cache lines take twice the time.

    Args:
        longest: how many numbers a row must hold.
        dtype: of the numbers.
    """
    size, workers = -(-longest * np.dtype(dtype).itemsize // 64) * 64, torch.get_num_threads()
    memory = np.empty(workers * size + 64, dtype=np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + workers * size].view(dtype).reshape(workers, -1)


def _columns(table: Lowered) -> np.ndarray:
    return room_for_workers(int(table.bands[:, BAND_LENGTH].max()))


def square_calls(kind: np.generic, table: Lowered, bases: np.ndarray, slots: np.ndarray) -> list[Call]:
    """Return the calls that write a table's sums of squares to its slots.

    Args:
        kind: of the tensors' dtype, see `KINDS`.
        table: the lowered plan.
        bases: the addresses of the tensors, (T,).
        slots: zeros, (table.num_slots,), to be folded into bins afterwards.
    """
    calls: list[Call] = []
    if len(table.entries):
        calls.append((loops.square_entries, (kind, table.entries, table.chunks, bases, slots)))
    if len(table.bands):
        bands = (table.bands, table.band_chunks, table.cut_stops)
        calls.append((loops.square_bands, (kind, *bands, bases, slots, _columns(table))))
    return calls


def scale_calls(
    dtype: torch.dtype, table: Lowered, bases: np.ndarray, scale: np.ndarray, zero: np.ndarray
) -> list[Call]:
    """Return the calls that scale a table's bins.

    Args:
        dtype: of the tensors.
        table: the lowered plan.
        bases: the addresses of the tensors, (T,).
        scale: factors, (B,).
        zero: whether a bin becomes zero, (B,).
    """
    kind = KINDS[dtype]
    calls: list[Call] = []
    if len(table.entries):
        calls.append((loops.scale_entries, (kind, table.entries, table.chunks, bases, scale, zero)))
    if len(table.bands):
        bands = (table.bands, table.band_chunks, table.cut_stops, table.cut_bins)
        calls.append((loops.scale_bands, (kind, *bands, bases, scale, zero, _columns(table))))
    return calls


class NumbaKernel(AddressKernel[Tables]):
    """The kernel for dense tensors on the CPU, by address.

    It serves float32, float64, bfloat16 and float16 of any strides with contiguous rows or columns. The eager kernel
    serves sparse and complex tensors, for which it is made. It also serves all other tensors that are not addressable,
    with one `FallbackWarning`.
    """

    name = "numba"
    bounds_while_reading = True

    def squares(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """See `Kernel.squares`."""
        return self.squares_many([tensors])[0]

    def squares_many(self, lists: Sequence[Sequence[Tensor | None]]) -> list[Tensor]:
        """See `Kernel.squares_many`; one pass of the threads over all lists."""
        if torch.compiler.is_compiling():
            return [self.eager.squares(tensors) for tensors in lists]
        calls: list[Call] = []
        results: list[tuple[list[np.ndarray], list[Lowered], Tensor | None]] = []
        num_elements = 0
        self._measured = None
        for tensors in lists:
            tables = self._tables_of(tensors)
            self._measured = self._measured or (list(tensors), tables)
            bases = addresses_of(tensors, tables)
            slots = [np.zeros(table.num_slots) for _, table in tables.lowered]
            for (dtype, table), out in zip(tables.lowered, slots, strict=True):
                calls += square_calls(KINDS[dtype], table, bases, out)
            rest = self.eager.squares(only(tensors, tables.eager_T)) if tables.eager_T else None
            if rest is not None and type(rest) is not Tensor:  # sums of wrappers that stay wrapped
                return [self.eager.squares(tensors) for tensors in lists]
            results.append((slots, [table for _, table in tables.lowered], rest))
            num_elements += tables.num_elements
        run(calls, threads_for(num_elements))
        return [self._folded(*result) for result in results]

    def _folded(self, slots: list[np.ndarray], tables: list[Lowered], rest: Tensor | None) -> Tensor:
        total: np.ndarray | None = None
        for out, table in zip(slots, tables, strict=True):
            if len(table.fold_bins):
                loops.fold(out, self.plan.num_bins, table.fold_bins)
            own = out[: self.plan.num_bins]
            total = own if total is None else total + own
        squares_B = torch.from_numpy(np.zeros(self.plan.num_bins) if total is None else total)
        return squares_B if rest is None else squares_B + rest

    def scale_(self, tensors: Sequence[Tensor | None], scale_B: Tensor, zero_B: Tensor) -> None:
        """See `Kernel.scale_`. Bins with a scale of 1 are neither read nor written."""
        if torch.compiler.is_compiling() or type(scale_B) is not Tensor:
            return self.eager.scale_(tensors, scale_B, zero_B)
        tables = self._just_measured(tensors) or self._tables_of(tensors)
        if tables.eager_T:
            self.eager.scale_(only(tensors, tables.eager_T), scale_B, zero_B)
        scale = np.ascontiguousarray(scale_B.detach().to(torch.float64).numpy())
        zero = np.ascontiguousarray(zero_B.detach().numpy())
        if not tables.lowered or not loops.touched(scale, zero):
            return None
        bases = addresses_of(tensors, tables)
        calls: list[Call] = []
        for dtype, table in tables.lowered:
            calls += scale_calls(dtype, table, bases, scale, zero)
        written = addressed(tensors, tables.signature)
        run(calls, 1 if overlap(written) else threads_for(tables.num_elements))
        return bump_versions(written)

    def bound_(
        self, gradients: Sequence[Tensor | None], weights: Sequence[Tensor] | None, lines: np.ndarray
    ) -> tuple[Tensor, Tensor | None] | None:
        """See `Kernel.bound_`. Where bins lie in several pieces of memory, one pass measures and another one scales."""
        if torch.compiler.is_compiling() or self._tensor_B is None:
            return None
        tables = self._tables_of(gradients)
        bases = addresses_of(gradients, tables)
        alike = weights is None or tables.are_of(weights)
        if not (tables.whole_bins and alike and tables.apart(gradients, bases)):
            return self._bound_apart(gradients, weights, lines)
        weight_bases = bases if weights is None else addresses_of(weights, tables)
        if not tables.apart(gradients, bases):
            return None
        squares, touched = np.zeros(self.plan.num_bins), np.zeros(1, dtype=np.int64)
        of_weights = np.zeros(self.plan.num_bins if weights is not None else 0)
        calls: list[Call] = []
        for dtype, table in tables.lowered:
            rows, out = (table.entries, table.chunks, bases, weight_bases, lines), (squares, of_weights, touched)
            calls.append((loops.bound_entries, (KINDS[dtype], *rows, *out)))
        run(calls, threads_for(tables.num_elements))
        if touched[0]:
            bump_versions(addressed(gradients, tables.signature))
        if weights is None:
            return torch.from_numpy(squares), None
        alone = [None if entry else weight for weight, entry in zip(weights, tables.signature, strict=True)]
        rest = self.squares(alone) if any(weight is not None for weight in alone) else 0.0
        return torch.from_numpy(squares), torch.from_numpy(of_weights) + rest

    def _bound_apart(
        self, gradients: Sequence[Tensor | None], weights: Sequence[Tensor] | None, lines: np.ndarray
    ) -> tuple[Tensor, Tensor | None] | None:
        """Do the same in two passes: the first one measures all bins, the second one scales."""
        squares_B, *weights_B = self.squares_many([gradients] if weights is None else [gradients, weights])
        if any(type(sums) is not Tensor for sums in (squares_B, *weights_B)):
            return None
        scale, zero = np.empty(self.plan.num_bins), np.empty(self.plan.num_bins, dtype=np.bool_)
        of_weights = weights_B[0].numpy() if weights_B else np.zeros(0)
        table = (lines, self._tensor_B, self.plan.numel_B)
        if loops.scales_alone(squares_B.numpy(), of_weights, *table, scale, zero):
            self.scale_(gradients, torch.from_numpy(scale), torch.from_numpy(zero))
        return squares_B, weights_B[0] if weights_B else None

    @cached_property
    def _tensor_B(self) -> np.ndarray | None:
        """The tensor that each bin lies in; None where a bin lies in several."""
        tensor_B = self.plan.tensor_B
        return None if (tensor_B < 0).any() else tensor_B

    def _serves(self, dtype: torch.dtype) -> bool:
        return dtype in KINDS

    def _make(self, signature: Signature, eager_T: tuple[int, ...]) -> Tables:
        lowered = []
        for dtype in sorted({entry[0] for entry in signature if entry is not None}, key=str):
            table = lower(self.plan, [e[1] if e is not None and e[0] == dtype else None for e in signature])
            assert table is not None  # every entry is addressable
            lowered.append((dtype, table))
        return Tables(signature, lowered, eager_T)
