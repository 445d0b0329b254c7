"""Setting guarded objects back to a snapshot, and leaving alone what is not to go back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..checkpoint.checkpoint import load_tree

__all__ = ["restore"]


def restore(tree: Mapping[str, Any], states: Mapping[str, Any]) -> None:
    """Set model, optimizer, splitter, scheduler and others back, and the gradients to 0.

    The splitter's steps are counted on, since they name rows of a recording. Without a scheduler among them the
    learning rates stay as they are, since whoever sets them is not known here and goes on.

    Args:
        tree: of a snapshot.
        states: the objects by name.
    """
    optimizer, splitter = states["optimizer"], states.get("splitter")
    count = getattr(splitter, "step_count", None)
    rates = [entry.get("lr") for entry in optimizer.param_groups]
    rates = [rate.clone() if isinstance(rate, Tensor) else rate for rate in rates]
    load_tree(tree, states, call="Guard", generators=False, undo=False)
    if splitter is not None and count is not None:
        splitter.step_count = count
    if "scheduler" not in states:
        for entry, rate in zip(optimizer.param_groups, rates, strict=True):
            if rate is not None:
                entry["lr"] = rate
    optimizer.zero_grad(set_to_none=False)  # whoever looks at gradients after a step still finds them
