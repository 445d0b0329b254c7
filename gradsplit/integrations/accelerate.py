"""Accelerate: bounded gradients on the steps at which gradients are synchronised."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from ..splitter import GradientSplitter
from .attached import attached

__all__ = ["split_gradients"]


def split_gradients(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: AcceleratedOptimizer,
    plan: Any = "xsp",
    budget: Any = None,
    **options: Any,
) -> GradientSplitter:
    """Bound each bin of the gradient before every real step of a prepared optimizer, and return the splitter.

    Under ``accelerator.accumulate`` a real step is the last micro-step alone. ``save_state`` and ``load_state`` carry
    the splitter's state. Leave ``accelerator.clip_grad_norm_`` out: it would act first and spread one NaN to every
    gradient.

    Args:
        accelerator: the one that prepared model and optimizer.
        model: as ``prepare`` returned it.
        optimizer: as ``prepare`` returned it.
        plan: see `gradsplit.GradientSplitter`.
        budget: likewise; the default fits the optimizer.
        options: its other arguments.

    Raises:
        TypeError: an optimizer that was not prepared.

    >>> import torch
    >>> accelerator, model = Accelerator(cpu=True), nn.Linear(2, 2, bias=False)
    >>> prepared = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
    >>> split_gradients(accelerator, *prepared).plan.num_bins
    2
    """
    if not isinstance(optimizer, AcceleratedOptimizer):
        raise TypeError(
            f"split_gradients(optimizer={type(optimizer).__name__}): expected what accelerator.prepare(…) returned. "
            "Call prepare first, then split_gradients with its model and optimizer."
        )
    splitter, _ = attached(
        accelerator.unwrap_model(model), optimizer.optimizer, {"plan": plan, "budget": budget, **options}
    )
    accelerator.register_for_checkpointing(splitter)
    return splitter
