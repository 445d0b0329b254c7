"""The tables that compiled loops read: the lowered plan of each dtype, and where the tensors are now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..plan.lowering import Lowered
from . import numba_loops as loops
from .addresses import KINDS
from .threads import Call
from .walkable import obstacle, overlap

__all__ = ["Signature", "Tables", "addresses_of", "room_for_workers", "scale_calls", "square_calls"]

Signature = list[tuple[torch.dtype, tuple[int, ...]] | None]
"""Per tensor its dtype and strides; None: not walked."""


@dataclass
class Tables:
    """The lowered plan for tensors of one signature.

    Attributes:
        signature: dtypes and strides.
        lowered: the tables of each dtype.
        eager_T: tensors that the eager kernel serves.
    """

    signature: Signature
    lowered: list[tuple[torch.dtype, Lowered]]
    eager_T: tuple[int, ...]
    _apart_at: np.ndarray | None = None  # the addresses at which tensors were last found apart

    @cached_property
    def num_elements(self) -> int:
        """Elements in all tables."""
        return sum(table.num_elements for _, table in self.lowered)

    @cached_property
    def whole_bins(self) -> bool:
        """Whether every bin lies in one piece."""
        return not self.eager_T and all(table.whole_bins for _, table in self.lowered)

    def are_of(self, tensors: Sequence[Tensor]) -> bool:
        """Whether they are the tables of these tensors too, but for those that were left out."""
        return all(
            entry is None or (not obstacle(tensor) and (tensor.dtype, tensor.stride()) == entry)
            for tensor, entry in zip(tensors, self.signature, strict=True)
        )

    def apart(self, tensors: Sequence[Tensor | None], bases: np.ndarray) -> bool:
        """Whether no two tensors share memory; looked at once for the same addresses."""
        if self._apart_at is None or not np.array_equal(self._apart_at, bases):
            if overlap([t for t, entry in zip(tensors, self.signature, strict=True) if t is not None and entry]):
                return False
            self._apart_at = bases
        return True


def addresses_of(tensors: Sequence[Tensor | None], tables: Tables) -> np.ndarray:
    """Return where the tensors begin in memory, 0 for those that are not walked."""
    return np.array(
        [
            0 if tensor is None or entry is None else tensor.data_ptr()
            for tensor, entry in zip(tensors, tables.signature, strict=True)
        ],
        dtype=np.int64,
    )


def room_for_workers(longest: int, dtype: Any = np.float64) -> np.ndarray:
    """Return a row of numbers for each thread, at multiples of 64 bytes.

    Stores of whole vectors that cross cache lines take twice the time.
    """
    size, workers = -(-longest * np.dtype(dtype).itemsize // 64) * 64, torch.get_num_threads()
    memory = np.empty(workers * size + 64, dtype=np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + workers * size].view(dtype).reshape(workers, -1)


def _columns(table: Lowered) -> np.ndarray:
    return room_for_workers(int(table.bands[:, 4].max()))


def square_calls(kind: Any, table: Lowered, bases: np.ndarray, slots: np.ndarray) -> list[Call]:
    """Return the calls that write a table's sums of squares to its slots."""
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
    """Return the calls that scale a table's bins."""
    kind = KINDS[dtype]
    calls: list[Call] = []
    if len(table.entries):
        calls.append((loops.scale_entries, (kind, table.entries, table.chunks, bases, scale, zero)))
    if len(table.bands):
        bands = (table.bands, table.band_chunks, table.cut_stops, table.cut_bins)
        calls.append((loops.scale_bands, (kind, *bands, bases, scale, zero, _columns(table))))
    return calls
