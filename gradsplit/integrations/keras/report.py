"""What the last step did, left in variables on the device, and read by whoever wants to know."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from keras import ops

from ...budget import Decision
from ...plan import Plan
from ...record import StepRecord
from .state import Kept

__all__ = ["Report"]


class Report:
    """The last decision of an optimizer, and counts of outcomes since it was built.

    Args:
        optimizer: owns the variables.
        plan: B bins.
    """

    def __init__(self, optimizer: Any, plan: Plan) -> None:
        self.plan = plan
        last = np.repeat(np.array([[0.0], [1.0], [np.inf]], dtype=np.float32), plan.num_bins, axis=1)
        self._kept = Kept(optimizer, "report", (last, np.zeros((2, plan.num_bins), dtype=np.float32)))

    def write(self, decision: Decision) -> None:
        """Leave a decision behind; nothing waits for the device."""
        _, counts = self._kept.read()
        scaled = ops.logical_and(decision.finite_B, decision.scale_B < 1)
        norm_B = ops.where(decision.finite_B, decision.norm_B, float("inf"))
        rows = [ops.cast(row, "float32") for row in (norm_B, decision.scale_B, decision.limit_B)]
        outcomes = [ops.cast(row, "float32") for row in (scaled, ops.logical_not(decision.finite_B))]
        self._kept.write((ops.stack(rows), counts + ops.stack(outcomes)))

    def counts(self) -> np.ndarray:
        """Copy to the host (2, B): how often each bin was scaled, and how often it was zeroed, since the beginning."""
        return np.array(ops.convert_to_numpy(self._kept.variables[1]))

    def record(self, step: int) -> StepRecord:
        """Copy the last decision to the host."""
        last = torch.from_numpy(np.array(ops.convert_to_numpy(self._kept.variables[0]), dtype=np.float64))
        norm, scale_B, limit_B = last
        finite_B = norm.isfinite()
        decision = Decision(
            self.plan, norm.where(finite_B, torch.zeros_like(norm)), finite_B, scale_B, (("bin", None, limit_B),)
        )
        return StepRecord(step, norm.square(), decision)
