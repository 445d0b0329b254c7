"""One step of one part: its first moments made, its gradients gathered, its steps counted, its update run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..amp import Scaling
from .moments import advance, local_gradient, local_moments, new_moments
from .registry import Update, refusal_of_fused

__all__ = ["make_moments", "step_part"]


def make_moments(optimizer: torch.optim.Optimizer, part: Update, waiting: Sequence[bool], second_moment: str) -> None:
    """Make the moments of every parameter that has its first gradient and is not waiting.

    Raises:
        RuntimeError: a sparse gradient; nothing has been made then.
    """
    planned = part.planned
    new = [
        t
        for t, owner in enumerate(planned.owners)
        if owner.grad is not None and not waiting[t] and not optimizer.state.get(owner)
    ]
    for t in new:
        local_gradient(planned.owners[t])
    for t in new:
        num_bins = len(planned.bins_of_tensor[t]) if second_moment == "bin" else None
        capturable = optimizer.param_groups[planned.groups[t]]["capturable"]
        optimizer.state[planned.owners[t]].update(new_moments(planned.owners[t], num_bins, capturable=capturable))


def step_part(
    optimizer: torch.optim.Optimizer, part: Update, waiting: Sequence[bool], scaling: Scaling | None, *, alone: bool
) -> None:
    """Update one part, all but its waiting tensors.

    Args:
        optimizer: whose states and groups these are.
        part: what is updated.
        waiting: one a tensor.
        scaling: what a GradScaler says of the gradients.
        alone: no other rank takes part in this step.

    Raises:
        RuntimeError: a sparse gradient, or ``fused=True`` without memory to walk.
    """
    planned = part.planned
    gradients = [None if waiting[t] else local_gradient(owner) for t, owner in enumerate(planned.owners)]
    # Where ranks hold shards, one without gradients takes part all the same, or the others would wait for it.
    if alone and all(gradient is None for gradient in gradients):
        return
    groups = [optimizer.param_groups[i] for i in planned.groups]
    if planned.kernel.device.type == "meta" and any(group["fused"] for group in groups):
        raise RuntimeError(refusal_of_fused(planned))
    own = [
        {} if gradient is None else optimizer.state[owner]
        for owner, gradient in zip(planned.owners, gradients, strict=True)
    ]
    advance([state for state in own if state], None if scaling is None else scaling.found_inf)
    states: list[dict[str, Any]] = [local_moments(state) if state else state for state in own]
    part.step(gradients, states, groups, scaling)
