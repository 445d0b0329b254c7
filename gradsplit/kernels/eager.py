"""Bins in eager torch without a loop over bins, for every device, dtype and stride.

The plan of each tensor is read once into a *pattern*: the bin of each row, of each column or of each element. Reading a
tensor is then one reduction and one scatter-add. Scaling it is one multiplication by a factor that broadcasts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..plan import Plan, pattern_of
from .kernel import Kernel, accumulate_dtype

__all__ = ["EagerKernel"]


class _Pattern:
    """The `pattern_of` one tensor on its device, and what is done with it."""

    def __init__(self, plan: Plan, t: int, device: torch.device) -> None:
        self.kind, bins = pattern_of(plan, t)
        self.shape = plan.layout.shapes[t]
        self.ids = torch.from_numpy(np.ascontiguousarray(bins.reshape(-1))).to(device)

    def sums(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """Return sums of squares, one an entry of ``ids`` (for sparse tensors: of the stored rows)."""
        dims = {"tensor": None, "rows": tuple(range(1, tensor.dim())), "cols": 0, "cells": ()}[self.kind]
        tensor = tensor.abs() if tensor.is_complex() else tensor
        if self.kind == "cells":
            return tensor.reshape(-1).to(dtype).square()
        if tensor.dim() == 0 or (self.kind == "cols" and tensor.dim() == 1):
            return tensor.to(dtype).square().reshape(-1)
        return torch.linalg.vector_norm(tensor, dim=dims, dtype=dtype).square().reshape(-1)

    def stored_ids(self, rows: Tensor) -> Tensor:
        """Return the ids that belong to the stored rows of a sparse tensor."""
        if self.kind == "rows":
            return self.ids[rows]
        if self.kind == "cols" and len(self.shape) == 1:
            return self.ids[rows]
        if self.kind == "cells":
            return self.ids.view(self.shape[0], -1)[rows].reshape(-1)
        return self.ids

    def factor(self, values_B: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return the bins' values in a shape that broadcasts over the tensor, or over its stored rows."""
        ids = self.ids if rows is None else self.stored_ids(rows)
        values = values_B.index_select(0, ids)
        if self.kind in ("tensor", "none"):
            return values.reshape(() if len(ids) else self.shape)  # an empty tensor has no bin
        if self.kind == "rows":
            return values.view(-1, *(1,) * (len(self.shape) - 1))
        shape = self.shape if rows is None else (len(rows), *self.shape[1:])
        return values.view(1, *shape[1:]) if self.kind == "cols" and len(shape) > 1 else values.view(shape)


class EagerKernel(Kernel):
    """The kernel for tensors of every kind.

    For L-BF bins it keeps one int64 per element of their tensor: use the numba backend where that is too much.
    """

    name = "eager"

    def __init__(self, plan: Plan, device: torch.device) -> None:
        super().__init__(plan, device)
        self._patterns = [_Pattern(plan, t, device) for t in range(len(plan.layout))]

    def squares(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """See `Kernel.squares`."""
        dtype = accumulate_dtype(self.device)
        ids, sums = [], []
        for tensor, pattern in zip(tensors, self._patterns, strict=True):
            if tensor is None or tensor.numel() == 0:
                continue
            if tensor.is_sparse:
                tensor = tensor.coalesce()
                if tensor._nnz():
                    ids.append(pattern.stored_ids(tensor.indices()[0]))
                    sums.append(pattern.sums(tensor.values(), dtype))
            else:
                ids.append(pattern.ids)
                sums.append(pattern.sums(tensor, dtype))
        squares_B = torch.zeros(self.plan.num_bins, dtype=dtype, device=self.device)
        return squares_B.index_add(0, torch.cat(ids), torch.cat(sums)) if ids else squares_B

    def scale_(self, tensors: Sequence[Tensor | None], scale_B: Tensor, zero_B: Tensor) -> None:
        """See `Kernel.scale_`. It multiplies unconditionally: to look first would be to wait for the device."""
        for t, tensor in enumerate(tensors):
            if tensor is None or tensor.numel() == 0:
                continue
            rows = tensor.indices()[0] if tensor.is_sparse else None
            dense = tensor.values() if tensor.is_sparse else tensor
            dense.mul_(self.factor(t, scale_B, tensor.dtype, rows))
            dense.masked_fill_(self._patterns[t].factor(zero_B, rows), 0)

    def factor(self, t: int, values_B: Tensor, dtype: torch.dtype, rows: Tensor | None = None) -> Tensor:
        """Return values of the bins in a shape that broadcasts over tensor t, or over its stored rows.

        Args:
            t: the tensor's place in the layout.
            values_B: (B,) numbers or bool.
            dtype: of the tensor; numbers come in at least float32 and else in its real dtype, which it then keeps.
            rows: the stored rows of a sparse tensor.
        """
        if dtype.is_complex:
            dtype = dtype.to_real()
        wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
        values = self._patterns[t].factor(values_B, rows)
        return values if values.dtype == torch.bool else values.to(wide)
