"""UpdateCap: bound the step of any optimizer after it was made, by comparing with a copy of the weights."""

from __future__ import annotations

import torch
from torch import Tensor

from .split import Split

__all__ = ["UpdateCap"]


class UpdateCap:
    """Draw the weights back to within the limits on the update: ``w <- w_before + s_b (w - w_before)``.

    Decoupled weight decay is part of what is bounded here; `GSO` bounds the update apart from it.

    Args:
        split: whose ledger ``update`` decides.
    """

    def __init__(self, split: Split) -> None:
        self.split = split
        self._before: list[Tensor] = []

    @property
    def remembers(self) -> bool:
        """Whether there is a copy of the weights to compare with."""
        return bool(self._before)

    @torch.no_grad()
    def remember(self) -> None:
        """Copy the weights before the update."""
        weights = self.split.tensors
        if not self._before:
            self._before = [torch.empty_like(w) for w in weights]
        for copy, w in zip(self._before, weights, strict=True):
            copy.copy_(w)

    @torch.no_grad()
    def apply(self) -> None:
        """Bound the update that the optimizer made since `remember`; a bin whose update is not finite is undone."""
        split = self.split
        if not self._before or split.rates is None or split.update is None:
            return
        moved: list[Tensor | None] = [w - b for w, b in zip(split.tensors, self._before, strict=True)]
        decision = split.update.decide(split.kernel.squares(moved), split.kernel.squares(self._before), split.pace_B())
        split.kernel.scale_(moved, decision.scale_B, ~decision.finite_B)
        for w, before, step in zip(split.tensors, self._before, moved, strict=True):
            assert step is not None
            kept = step == w - before  # a bin within its limit keeps the optimizer's bits
            w.copy_(torch.where(kept, w, before + step))
