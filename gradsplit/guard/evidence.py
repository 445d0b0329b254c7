"""What a guard says of a divergence: names, numbers, batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..checkpoint.batches import Batches
from ..record import GuardAction, StepRecord
from .nonfinite import nonfinite_names

__all__ = ["batches_since", "stop_message", "worst_of"]


def worst_of(record: StepRecord | None, model: Any, optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """Name what was hit worst: the splitter's bins with their norms, else the tensors that are not finite."""
    if record is not None:
        return tuple(f"{one.name} norm {one.norm:.3g} -> {one.norm_after:.3g}" for one in record.worst(3))
    return tuple(f"{name} not finite" for name in nonfinite_names(model, optimizer)[:3])


def batches_since(data: Sequence[Batches], places: Sequence[tuple[int, int]], skip: int) -> str:
    """Name the batches since the places of a snapshot, and ``skip`` more."""
    said = []
    for batches, (epoch, position) in zip(data, places, strict=False):
        last = batches.position - 1 + skip
        until = f"{last}" if epoch == batches.epoch else f"epoch {batches.epoch}: {last}"
        said.append(f"epoch {epoch}: {position} to {until}")
    return "; ".join(said)


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
