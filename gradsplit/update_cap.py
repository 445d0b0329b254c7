"""UpdateCap: bound the step of any optimizer after it was made, by comparing with a copy of the weights."""

from __future__ import annotations

import torch
from torch import Tensor

from .budget import Budget, Ledger
from .kernels import Kernel
from .plan import Plan
from .rates import Rates

__all__ = ["UpdateCap"]


class UpdateCap:
    """Draw the weights back to within the limits on the update: ``w <- w_before + s_b (w - w_before)``.

    Decoupled weight decay is part of what is bounded here; `GSO` bounds the update apart from it.
    """

    def __init__(
        self,
        plan: Plan,
        budgets: list[tuple[str, Budget]],
        kernel: Kernel,
        parameters: list[Tensor],
        like: Tensor,
    ) -> None:
        self.plan, self.kernel, self.parameters = plan, kernel, parameters
        self.ledger = Ledger(plan, budgets, like, call="GradientSplitter")
        self._before: list[Tensor] = []

    @property
    def remembers(self) -> bool:
        """Whether there is a copy of the weights to compare with."""
        return bool(self._before)

    @torch.no_grad()
    def remember(self) -> None:
        """Copy the weights before the update."""
        if not self._before:
            self._before = [torch.empty_like(p) for p in self.parameters]
        for copy, parameter in zip(self._before, self.parameters, strict=True):
            copy.copy_(parameter)

    @torch.no_grad()
    def apply(self, rates: Rates) -> None:
        """Bound the update that the optimizer made since `remember`; a bin whose update is not finite is undone."""
        if not self._before:
            return
        moved: list[Tensor | None] = [p - b for p, b in zip(self.parameters, self._before, strict=True)]
        decision = self.ledger.decide(
            self.kernel.squares(moved), self.kernel.squares(self._before), rates.pace_B(self.plan.num_bins)
        )
        self.kernel.scale_(moved, decision.scale_B, ~decision.finite_B)
        for parameter, before, step in zip(self.parameters, self._before, moved, strict=True):
            assert step is not None
            kept = step == parameter - before  # a bin within its limit keeps the optimizer's bits
            parameter.copy_(torch.where(kept, parameter, before + step))
