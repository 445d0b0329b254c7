"""A budget with a line, one with a history, a strategy and a backend, as someone outside the package writes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

import gradsplit as gs
from gradsplit.budget import Budget, Line, Reading
from gradsplit.kernels import Backend, Kernel
from gradsplit.plan import Boxes, Layout, Plan, Strategy, pattern_of


@gs.budget.register
@dataclass(frozen=True)
class Rms(Budget):
    """A node keeps a root mean square of at most ``size``."""

    name: ClassVar[str] = "rms"
    reads_norms: ClassVar[bool] = False
    size: float = 0.1

    def limits(self, xp: ModuleType, reading: Reading, state: Any) -> Any:
        return self.size * xp.sqrt(reading.numel)

    def line(self) -> Line:
        return Line(root=self.size)


@gs.budget.register
@dataclass(frozen=True)
class Last(Budget):
    """A node may grow by ``ratio`` from one step to the next."""

    name: ClassVar[str] = "last"
    ratio: float = 1.5

    def init(self, xp: ModuleType, like: Any) -> Any:
        return (like * 0.0,)

    def limits(self, xp: ModuleType, reading: Reading, state: Any) -> Any:
        (last,) = state
        return xp.where(last > 0, self.ratio * last, xp.full(last.shape[0], float("inf"), last))

    def learn(self, xp: ModuleType, reading: Reading, kept: Any, state: Any) -> Any:
        (last,) = state
        return (xp.where(kept > 0, kept, last),)


def quarters(layout: Layout) -> Plan:
    """Cut every matrix in two along both axes."""
    rows = []
    for t, (height, width) in enumerate(zip(layout.rows, layout.cols, strict=True)):
        for top, bottom in ((0, height // 2), (height // 2, height)):
            for left, right in ((0, width // 2), (width // 2, width)):
                if top < bottom and left < right:
                    rows.append((t, top, bottom, left, right, len(rows)))
    return Plan(layout, Boxes.from_columns(*np.array(rows).T))


gs.plan.register(Strategy("quarters", quarters, "two by two blocks of every matrix"))


class LabelKernel(Kernel):
    """Reads and scales by the bin of every element."""

    name = "labels"

    def __init__(self, plan: Plan, device: torch.device) -> None:
        super().__init__(plan, device)
        self._labels = []
        for t, shape in enumerate(plan.layout.shapes):
            sides = plan.layout.rows[t], plan.layout.cols[t]
            bins = pattern_of(plan, t).bins
            labels = np.broadcast_to(bins, sides) if bins.size else np.zeros(sides, dtype=np.int64)
            self._labels.append(torch.from_numpy(labels.copy()).reshape(shape).to(device))

    def _values(self, t: int, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """The stored values of a tensor, and their bins."""
        if tensor.is_sparse:
            return tensor.values(), self._labels[t][tensor.indices()[0]]
        return tensor, self._labels[t]

    def squares(self, tensors: Sequence[Tensor | None]) -> Tensor:
        squares_B = torch.zeros(self.plan.num_bins, dtype=torch.float64, device=self.device)
        for t, tensor in enumerate(tensors):
            if tensor is not None:
                values, labels = self._values(t, tensor)
                values = values.abs() if values.is_complex() else values
                squares_B.index_add_(0, labels.reshape(-1), values.double().square().reshape(-1))
        return squares_B

    def scale_(self, tensors: Sequence[Tensor | None], scale_B: Tensor, zero_B: Tensor) -> None:
        for t, tensor in enumerate(tensors):
            if tensor is not None:
                values, labels = self._values(t, tensor)
                wide = torch.float64 if values.dtype in (torch.float64, torch.complex128) else torch.float32
                values.mul_(scale_B[labels].to(wide))
                values.masked_fill_(zero_B[labels], 0)


gs.kernels.register(Backend("labels", (__name__, "LabelKernel"), "the bin of every element"))
