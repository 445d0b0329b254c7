"""What the adapters of the trainers share: a splitter over the tensors of one optimizer, attached to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..hooks import Handle
from ..splitter import GradientSplitter

__all__ = ["attached", "refuse_own_bound"]


def attached(
    model: nn.Module, optimizer: torch.optim.Optimizer, options: Mapping[str, Any]
) -> tuple[GradientSplitter, Handle]:
    """Return a splitter of the gradients that an optimizer uses, under the model's names, and its handle.

    Trainers clip, unscale and skip before they call ``optimizer.step``. A splitter that is attached there sees what the
    update sees, once per update, also under accumulation.

    Args:
        model: whose ``named_parameters()`` give the names.
        optimizer: as torch made it, not a trainer's wrapper.
        options: arguments of `GradientSplitter`.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    >>> splitter, handle = attached(model, torch.optim.SGD(model[1].parameters(), 0.1), {"plan": "per_tensor"})
    >>> splitter.layout.names
    ('1.weight', '1.bias')
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    splitter = GradientSplitter([(name, p) for name, p in model.named_parameters() if id(p) in held], **options)
    return splitter, splitter.attach(optimizer)


def refuse_own_bound(setting: str, value: float | None, remedy: str) -> None:
    """Refuse a trainer that clips before the splitter acts.

    Args:
        setting: the call, up to the argument's name.
        value: the clip that is set; None or 0: none.
        remedy: what to do, as a sentence without its stop.

    Raises:
        ValueError: a clip is set.

    >>> refuse_own_bound("TrainingArguments(max_grad_norm", 0.0, "Set max_grad_norm=0")
    """
    if value:
        raise ValueError(
            f"{setting}={value!r}): expected no clip of the trainer's own with GradientSplitting, because it would act "
            f"first and carry one NaN into every gradient. {remedy}; for a limit on the whole gradient as well give "
            f"budget={{'root': gradsplit.Fixed({value!r}), 'bin': …}}."
        )
