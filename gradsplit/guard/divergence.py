"""Divergence: whether a run has diverged, from its losses, zeroed bins and, if a loss is not finite, its weights."""

from __future__ import annotations

import math
from typing import Any

import torch

from .agreement import Agreement
from .loss_history import LossHistory
from .nonfinite import nonfinite_names

__all__ = ["Divergence"]

MOST = 0.5  # share of bins ZEROED above which a step counts as bad


class Divergence:
    """Judge step after step.

    A step is bad if its loss is out of its history, or most bins were ZEROED. A run has diverged if ``patience`` steps
    in a row were bad, or at once if a loss is not finite and neither is what it came from: a single bad batch whose
    update was not made (by a splitter, by a GradScaler) leaves everything finite and does no harm.

    Args:
        model: see `nonfinite_names`.
        optimizer: likewise.
        history: of the losses.
        patience: bad steps in a row.
        agreement: over processes.

    Attributes:
        bad: bad steps in a row so far.
    """

    def __init__(
        self,
        model: Any,
        optimizer: torch.optim.Optimizer,
        history: LossHistory,
        patience: int,
        agreement: Agreement,
    ) -> None:
        self.model, self.optimizer, self.history = model, optimizer, history
        self.patience, self.agreement = patience, agreement
        self.bad = 0

    def reason(self, loss: float, zeroed: float) -> str:
        """Return why the run has diverged at this step; empty if it has not.

        Args:
            loss: the same in all processes.
            zeroed: share of bins ZEROED, likewise.
        """
        if not self.history.is_out(loss) and zeroed <= MOST:
            self.bad = 0
            self.history.add(loss)
            return ""
        self.bad += 1
        if not math.isfinite(loss):
            lost = nonfinite_names(self.model, self.optimizer)
            if self.agreement.any(bool(lost), self.optimizer):
                shown = ", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
                return f"the loss is {loss:g} and these are not finite: {shown or 'tensors of another process'}"
        if self.bad < self.patience:
            return ""
        return (
            f"{self.bad} steps in a row were bad: loss {loss:.4g}, usually {self.history.median:.4g} and at most "
            f"{self.history.score:g} x {self.history.spread:.2g} above, {zeroed:.0%} of bins ZEROED"
        )
