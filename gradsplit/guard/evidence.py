"""What a guard says of a divergence: names and numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..record import GuardAction, StepRecord
from .nonfinite import nonfinite_names

__all__ = ["stop_message", "worst_of"]


def worst_of(record: StepRecord | None, model: Any, optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """Name what was hit worst: the splitter's bins with their norms, else the tensors that are not finite."""
    if record is not None:
        return tuple(f"{one.name} norm {one.norm:.3g} -> {one.norm_after:.3g}" for one in record.worst(3))
    return tuple(f"{name} not finite" for name in nonfinite_names(model, optimizer)[:3])


def stop_message(actions: Sequence[GuardAction], allowed: int) -> str:
    """Say why it stops, what was tried, and what to do; the last action is the stop."""
    *earlier, stop = actions
    tried = "".join(f" {action}" for action in earlier)
    return (
        f"Guard.step(loss={stop.loss:g}): training diverged at step {stop.step} and none of {allowed} rollbacks is "
        f"left, {stop.reason}. Worst: {', '.join(stop.worst) or 'unknown'}.{tried} The weights are those of step "
        f"{stop.to_step}. Look at the tensors and batches named here, then bound the gradient with GradientSplitter, "
        "lower the learning rate, or raise max_rollbacks."
    )
