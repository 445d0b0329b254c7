"""Reading the squares of row blocks from gradients that are left exactly as they are, in one pass over memory.

Rows are read in the gradient's own precision and added up in float64, which on a CPU is six times faster than the
kernels' float64 throughout. A float32 square overflows above 1.8e19: such a tensor, rare as it is, is read again in
float64. Shape suffixes: _L one entry a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..plan import Plan

__all__ = ["BlockReader"]


class BlockReader:
    """Squares of the bins of a plan whose bins are whole rows, such as `recording_plan` makes.

    Sharded gradients (DTensor): each rank reads the rows it holds, and one all-reduce for each mesh dimension that
    shards anything adds them up, so that every rank has the same numbers. Plain gradients need no communication.
    """

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self.num_blocks, self.device = plan.num_bins, device
        bounds = plan.boxes.slices_T(len(plan.layout))
        self._rows_T: list[Tensor | int] = []
        for t, rows in enumerate(plan.layout.rows):
            part = slice(bounds[t], bounds[t + 1])
            blocks = plan.bin_K[part]
            if len(blocks) == 0:
                self._rows_T.append(-1)
            elif len(blocks) == 1:
                self._rows_T.append(int(blocks[0]))
            else:
                sizes = plan.row_stop_K[part] - plan.row_start_K[part]
                assert sizes.sum() == rows, "blocks must be whole rows"
                self._rows_T.append(torch.from_numpy(np.repeat(blocks, sizes)).to(device))
        self._dtype = torch.float32 if device.type == "mps" else torch.float64

    @torch.no_grad()
    def squares(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """Return (L,) sums of squares, float64; not finite where an entry was not. Changes nothing."""
        ids: list[Tensor] = []
        sums: list[Tensor] = []
        single: list[int] = []
        single_sums: list[Tensor] = []
        sharded: dict[tuple[Any, int], list[int]] = {}
        for t, gradient in enumerate(gradients):
            rows = self._rows_T[t]
            if gradient is None or (isinstance(rows, int) and rows < 0):
                continue
            first_row = 0
            if hasattr(gradient, "placements"):
                for dim in _sharding_dims(gradient):
                    sharded.setdefault((gradient.device_mesh, dim), []).append(t)  # type: ignore[attr-defined]
                gradient, first_row = _local_part(gradient)
            if gradient.is_sparse:
                gradient = gradient.coalesce()
                if isinstance(rows, Tensor):
                    rows = rows[gradient.indices()[0].to(rows.device)]
                gradient = gradient.values()
            if gradient.numel() == 0:
                continue
            if isinstance(rows, int):
                single.append(rows)
                single_sums.append(self._one(gradient))
            else:
                ids.append(rows[first_row : first_row + gradient.shape[0]])
                sums.append(self._each_row(gradient))
        squares_L = torch.zeros(self.num_blocks, dtype=self._dtype, device=self.device)
        if ids:
            squares_L.index_add_(0, torch.cat(ids), torch.cat(sums))
        if single:
            squares_L.index_add_(0, torch.tensor(single, device=self.device), torch.stack(single_sums))
        return self._shared(squares_L, sharded) if sharded else squares_L

    def _one(self, gradient: Tensor) -> Tensor:
        value = self._norm(gradient, None)
        if gradient.device.type == "cpu" and not torch.isfinite(value) and value.dtype != self._dtype:
            value = torch.linalg.vector_norm(gradient, dtype=_wide(gradient, self._dtype))
        return value.to(self.device, self._dtype).square()

    def _each_row(self, gradient: Tensor) -> Tensor:
        dims = tuple(range(1, gradient.dim()))
        value = self._norm(gradient, dims)
        if gradient.device.type == "cpu" and value.dtype != self._dtype and not bool(torch.isfinite(value).all()):
            value = torch.linalg.vector_norm(gradient, dim=dims, dtype=_wide(gradient, self._dtype))
        return value.to(self.device, self._dtype).square()

    def _norm(self, gradient: Tensor, dims: tuple[int, ...] | None) -> Tensor:
        """On a CPU as fast as memory, for the second look above; elsewhere in float64 at once, never looked at."""
        if gradient.device.type != "cpu":
            return torch.linalg.vector_norm(gradient, dim=dims, dtype=_wide(gradient, self._dtype))
        half = gradient.dtype in (torch.float16, torch.bfloat16)
        return torch.linalg.vector_norm(gradient, dim=dims, dtype=torch.float32 if half else None)

    def _shared(self, squares_L: Tensor, sharded: dict[tuple[Any, int], list[int]]) -> Tensor:
        """Add up over ranks what is sharded, leaving what every rank holds whole."""
        for (mesh, dim), tensors in sharded.items():
            here = torch.zeros(self.num_blocks, dtype=torch.bool, device=self.device)
            for t in tensors:
                rows = self._rows_T[t]
                here[rows] = True
            part = torch.where(here, squares_L, torch.zeros_like(squares_L))
            torch.distributed.all_reduce(part, group=mesh.get_group(dim))
            squares_L = torch.where(here, part, squares_L)
        return squares_L


def _wide(gradient: Tensor, dtype: torch.dtype) -> torch.dtype:
    return dtype.to_complex() if gradient.is_complex() else dtype


def _sharding_dims(gradient: Any) -> list[int]:
    return [dim for dim, placement in enumerate(gradient.placements) if not placement.is_replicate()]


def _local_part(gradient: Any) -> tuple[Tensor, int]:
    """Return what this rank holds, and the global row at which it begins."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    local = gradient._local_tensor
    _, offset = compute_local_shape_and_global_offset(gradient.shape, gradient.device_mesh, gradient.placements)
    return local, int(offset[0]) if len(offset) > 1 else 0
