"""Which of a model's weights, buffers and optimizer states are not finite any more."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["nonfinite_names"]


@torch.no_grad()
def nonfinite_names(model: Any, optimizer: torch.optim.Optimizer) -> list[str]:
    """Return the names of tensors with a value that is not finite, in one pass over memory and one wait.

    A buffer may hold inf, as attention masks do; nan is bad anywhere.

    Args:
        model: has ``named_parameters()`` and ``named_buffers()``.
        optimizer: whose states per parameter are looked at, too.

    >>> layer = torch.nn.Linear(2, 1)
    >>> _ = torch.nn.init.constant_(layer.bias, float("inf"))
    >>> nonfinite_names(layer, torch.optim.SGD(layer.parameters(), 0.1))
    ['bias']
    """
    names, sums = [], []
    for name, tensor, may_be_inf in _tensors(model, optimizer):
        tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        if not tensor.is_floating_point() or not tensor.numel() or tensor.is_sparse:
            continue
        low, high = torch.aminmax(tensor)  # both nan if any entry is
        if may_be_inf:
            low, high = low.clamp(min=-1.0, max=1.0), high.clamp(min=-1.0, max=1.0)
        names.append(name)
        sums.append(low.double().abs() + high.double().abs())
    if not names:
        return []
    device = sums[0].device
    finite = torch.isfinite(torch.stack([one.to(device) for one in sums])).tolist()
    return [name for name, ok in zip(names, finite, strict=True) if not ok]


def _tensors(model: Any, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor, bool]]:
    """Name, tensor, whether inf is no fault."""
    names = {}
    for name, parameter in model.named_parameters():
        names[id(parameter)] = name
        yield name, parameter, False
    for name, buffer in model.named_buffers():
        yield name, buffer, True
    for i, (parameter, state) in enumerate(optimizer.state.items()):
        if isinstance(state, dict):
            owner = names.get(id(parameter), f"parameter {i}")
            for key, value in state.items():
                if isinstance(value, Tensor):
                    yield f"{owner} ({key})", value, False
