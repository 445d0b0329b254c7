"""What a step leaves behind: norms before and after, and the decision, as tensors on the gradients' device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..budget import Decision, Outcome
from ..plan import Plan

__all__ = ["BinReport", "StepRecord"]


class BinReport(NamedTuple):
    """One bin of a step, on the host.

    Attributes:
        name: tensor and block.
        norm: L2 norm before, gradient units; inf or nan where the gradient was not finite.
        norm_after: L2 norm after.
        limit: the bin's own limit; inf where only an ancestor is bounded.
        outcome: KEPT, SCALED or ZEROED.
    """

    name: str
    norm: float
    norm_after: float
    limit: float
    outcome: Outcome


@dataclass(frozen=True)
class StepRecord:
    """The record of one step. Nothing here waits for the device but `worst` and printing.

    Attributes:
        step: counted from 0.
        squares_B: (B,) sums of squares as measured.
        decision: limits, scales and outcomes.
    """

    step: int
    squares_B: Tensor
    decision: Decision

    @property
    def plan(self) -> Plan:
        """The plan whose bins these are."""
        return self.decision.plan

    @property
    def norm_B(self) -> Tensor:
        """(B,) L2 norms as measured, gradient units; not finite where an entry was not."""
        return torch.sqrt(self.squares_B)

    def norm_after_B(self) -> Tensor:
        """(B,) L2 norms after control; 0 for a zeroed bin."""
        return self.decision.norm_B * self.decision.scale_B

    def total_norm(self) -> Tensor:
        """The norm of the whole gradient as measured, 0-d: what `clip_grad_norm_` returns."""
        return torch.sqrt(self.squares_B.sum())

    def worst(self, k: int = 5) -> list[BinReport]:
        """Return the k bins that were touched hardest: zeroed ones first, then by falling scale, then by norm."""
        decision = self.decision
        norm, scale = self.norm_B.cpu(), decision.scale_B.cpu()
        after, limit, outcome = self.norm_after_B().cpu(), decision.limit_B.cpu(), decision.outcome_B.cpu()
        order = torch.argsort(norm.nan_to_num(nan=float("inf")), descending=True, stable=True)
        order = order[torch.argsort(scale[order] - (outcome[order] == Outcome.ZEROED).to(scale.dtype), stable=True)]
        return [
            BinReport(
                self.plan.bins[b].name,
                float(norm[b]),
                float(after[b]),
                float(limit[b]),
                Outcome(int(outcome[b])),
            )
            for b in order[:k].tolist()
        ]

    def __str__(self) -> str:
        """Say how many bins were touched and name the worst."""
        outcome = self.decision.outcome_B
        scaled, zeroed = int((outcome == Outcome.SCALED).sum()), int((outcome == Outcome.ZEROED).sum())
        worst = ", ".join(f"{r.name} {r.norm:.3g} -> {r.norm_after:.3g}" for r in self.worst(3))
        return f"step {self.step}: {scaled} of {self.plan.num_bins} bins scaled, {zeroed} zeroed; worst: {worst}"
