"""The script's own ``clip_grad_norm_``: gradients are read before it, and what it did to them is recorded."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad

__all__ = ["watch_own_bound"]

Before = Callable[[list[Tensor]], None]
After = Callable[[list[Tensor], Tensor], None]


def watch_own_bound(before: Before, after: After) -> None:
    """Call ``before(parameters)``, the script's function, then ``after(parameters, factor)``.

    The factor is ``min(1, max_norm / (norm + 1e-6))`` from the norm that the function returned, a tensor; nan where
    that norm was not finite, for the function then spreads nan to every gradient. The script gets what it would get.
    """
    original = clip_grad.clip_grad_norm_

    @functools.wraps(original)
    def watched(parameters: Any, max_norm: float, norm_type: float = 2.0, *args: Any, **kwargs: Any) -> Tensor:
        if torch.compiler.is_compiling():
            return original(parameters, max_norm, norm_type, *args, **kwargs)
        tensors = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        before(tensors)
        norm = original(tensors, max_norm, norm_type, *args, **kwargs)
        factor = (float(max_norm) / (norm.detach() + 1e-6)).clamp(max=1.0)
        after(tensors, torch.where(torch.isfinite(norm), factor, torch.full_like(factor, float("nan"))))
        return norm

    clip_grad.clip_grad_norm_ = watched
    torch.nn.utils.clip_grad_norm_ = watched
