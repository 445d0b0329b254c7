"""The definition of reading and scaling bins: box by box, in eager torch; every backend must equal it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .kernel import Kernel, accumulate_dtype

__all__ = ["ReferenceKernel"]


class ReferenceKernel(Kernel):
    """Squares and scaling of a plan's bins, one box after the other, for tensors of every kind."""

    name = "reference"

    def squares(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """See `Kernel.squares`."""
        dtype = accumulate_dtype(self.device)
        squares_B = torch.zeros(self.plan.num_bins, dtype=dtype, device=self.device)
        for k in range(len(self.plan.boxes)):
            tensor = tensors[self.plan.tensor_K[k]]
            if tensor is not None:
                block = self._matrix(tensor, k)[self._box(tensor, k)]
                wide = block.abs().to(dtype) if block.is_complex() else block.to(dtype)
                squares_B[self.plan.bin_K[k]] += (wide * wide).sum()
        return squares_B

    def scale_(self, tensors: Sequence[Tensor | None], scale_B: Tensor, zero_B: Tensor) -> None:
        """See `Kernel.scale_`."""
        for k in range(len(self.plan.boxes)):
            tensor = tensors[self.plan.tensor_K[k]]
            if tensor is None:
                continue
            matrix, box, b = self._matrix(tensor, k).clone(), self._box(tensor, k), self.plan.bin_K[k]
            if zero_B[b]:
                matrix[box] = 0
            elif scale_B[b] < 1:
                wide = torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype
                wide = wide.to_real() if wide.is_complex else wide
                matrix[box] = (matrix[box] * scale_B[b].to(wide)).to(tensor.dtype)
            dense = tensor.values() if tensor.is_sparse else tensor
            dense.copy_(matrix.reshape(dense.shape))

    def _matrix(self, tensor: Tensor, k: int) -> Tensor:
        """The matrix view, copied where strides forbid a view; of a sparse tensor only its stored rows."""
        if tensor.is_sparse:
            values = tensor.coalesce().values()
            return values.reshape(1, -1) if tensor.dim() == 1 else values.reshape(values.shape[0], -1)
        t = int(self.plan.tensor_K[k])
        return tensor.reshape(self.plan.layout.rows[t], self.plan.layout.cols[t])

    def _box(self, tensor: Tensor, k: int) -> tuple[slice | Tensor, slice | Tensor]:
        plan = self.plan
        rows = slice(int(plan.row_start_K[k]), int(plan.row_stop_K[k]))
        cols = slice(int(plan.col_start_K[k]), int(plan.col_stop_K[k]))
        if not tensor.is_sparse:
            return rows, cols
        stored = tensor.coalesce().indices()[0]
        cut = cols if tensor.dim() == 1 else rows  # a vector is a single row, so its stored entries are columns
        held = ((stored >= cut.start) & (stored < cut.stop)).nonzero().flatten()
        return (rows, held) if tensor.dim() == 1 else (held, cols)
