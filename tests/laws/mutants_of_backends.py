"""Broken backends. Each is named for the law that must catch it."""

from __future__ import annotations

import torch

from gradsplit.kernels.eager import EagerKernel
from tests.laws import laws_of_backends as laws


class AddsInTheGradientsDtype(EagerKernel):
    """Squares in float32: 1.9e19 overflows."""

    def squares(self, tensors):
        wide = torch.zeros(self.plan.num_bins, dtype=torch.float64)
        for t, (tensor, pattern) in enumerate(zip(tensors, self._patterns, strict=True)):
            if tensor is not None and tensor.numel():
                sums = (tensor * tensor).double()
                factor = pattern.ids if pattern.kind == "cells" else None
                ids = factor if factor is not None else self._ids_of(t, tensor)
                wide.index_add_(0, ids.reshape(-1), sums.reshape(-1))
        return wide

    def _ids_of(self, t, tensor):
        numbers = torch.arange(self.plan.num_bins, dtype=torch.float64)
        return self._patterns[t].factor(numbers).expand(tensor.shape).reshape(-1).long()


class LosesTheLastBin(EagerKernel):
    def squares(self, tensors):
        squares_B = super().squares(tensors)
        squares_B[-1] = 0
        return squares_B


class ScalesWhatItReads(EagerKernel):
    def squares(self, tensors):
        squares_B = super().squares(tensors)
        for tensor in tensors:
            if tensor is not None and not tensor.is_sparse:
                tensor.mul_(0.5)
        return squares_B


class ShiftsByOne(EagerKernel):
    """Each bin gets its neighbour's scale."""

    def scale_(self, tensors, scale_B, zero_B):
        super().scale_(tensors, scale_B.roll(1), zero_B)


class MultipliesByZero(EagerKernel):
    """0 * inf is not 0."""

    def scale_(self, tensors, scale_B, zero_B):
        super().scale_(tensors, torch.where(zero_B, 0.0, scale_B), torch.zeros_like(zero_B))


class RoundsWhatItKeeps(EagerKernel):
    """Divides and multiplies by the norm on the way, so that a kept bin loses its last bits."""

    def scale_(self, tensors, scale_B, zero_B):
        super().scale_(tensors, scale_B / 3.0, zero_B)
        super().scale_(tensors, torch.full_like(scale_B, 3.0), torch.zeros_like(zero_B))


class ScalesACopy(EagerKernel):
    """`reshape` copies where strides forbid a view, and the write is lost."""

    def scale_(self, tensors, scale_B, zero_B):
        flat = [
            t if t is None or t.is_sparse else t.reshape(-1).view(self.plan.layout.shapes[i])
            for i, t in enumerate(tensors)
        ]
        super().scale_(flat, scale_B, zero_B)


class ScalesHalfPrecisionInItsOwnDtype(EagerKernel):
    """The scale is rounded to bfloat16 before it multiplies."""

    def scale_(self, tensors, scale_B, zero_B):
        super().scale_(tensors, scale_B.to(torch.bfloat16).double(), zero_B)


class WritesBehindAutogradsBack(EagerKernel):
    def scale_(self, tensors, scale_B, zero_B):
        super().scale_([None if t is None else t.data for t in tensors], scale_B, zero_B)


MUTANTS = {
    AddsInTheGradientsDtype: laws.check_squares,
    LosesTheLastBin: laws.check_squares,
    ScalesWhatItReads: laws.check_squares,
    ShiftsByOne: laws.check_scaling,
    MultipliesByZero: laws.check_scaling,
    RoundsWhatItKeeps: laws.check_scaling,
    ScalesHalfPrecisionInItsOwnDtype: laws.check_equals_reference,
    ScalesACopy: laws.check_writes_reach_the_tensor,
    WritesBehindAutogradsBack: laws.check_writes_reach_the_tensor,
}
