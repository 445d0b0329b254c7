"""What a control did over a whole run: how often each bin was scaled or zeroed, and which was bounded hardest."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gradsplit.record import StepRecord

__all__ = ["Tally"]

_DEEPEST = 30.0  # powers of ten that a zeroed bin counts for


class Tally:
    """Counts over steps, kept on the gradients' device until somebody asks.

    Args:
        num_bins: B.
        name_of: bin's index -> name.
    """

    def __init__(self, num_bins: int, name_of: Callable[[int], str]) -> None:
        self.num_bins, self.name_of = num_bins, name_of
        self.steps = 0
        self.scaled_B = torch.zeros(num_bins, dtype=torch.float64)
        self.zeroed_B = torch.zeros(num_bins, dtype=torch.float64)
        self.depth_B = torch.zeros(num_bins, dtype=torch.float64)

    def add(self, scale_B: Tensor, finite_B: Tensor) -> None:
        """Count one step.

        Args:
            scale_B: (B,) factors in [0, 1].
            finite_B: (B,) whether the bin's gradient was finite.
        """
        if self.scaled_B.device != scale_B.device:
            self.scaled_B, self.zeroed_B, self.depth_B = (
                x.to(scale_B.device) for x in (self.scaled_B, self.zeroed_B, self.depth_B)
            )
        self.steps += 1
        self.scaled_B += (scale_B < 1) & finite_B
        self.zeroed_B += ~finite_B
        depth_B = -torch.log10(scale_B.double().clamp(min=10**-_DEEPEST))
        self.depth_B += torch.where(finite_B, depth_B, torch.full_like(depth_B, _DEEPEST))

    def add_record(self, record: StepRecord) -> None:
        """Count one step of a GradientSplitter; a sink."""
        self.add(record.decision.scale_B, record.decision.finite_B)

    @property
    def scaled_share(self) -> float:
        """Share of all (bin, step) pairs that were scaled."""
        return float(self.scaled_B.sum()) / max(self.steps * self.num_bins, 1)

    @property
    def zeroed_share(self) -> float:
        """Share of all (bin, step) pairs that were not finite and became zero."""
        return float(self.zeroed_B.sum()) / max(self.steps * self.num_bins, 1)

    def worst(self, k: int = 5) -> list[tuple[str, float]]:
        """The k bins with the smallest geometric mean scale, as (name, mean scale); bins never touched are left out."""
        depth, order = torch.sort(self.depth_B.cpu(), descending=True, stable=True)
        steps = max(self.steps, 1)
        return [
            (self.name_of(int(b)), float(10 ** (-d / steps)))
            for d, b in zip(depth[:k].tolist(), order[:k].tolist(), strict=True)
            if d > 0
        ]
