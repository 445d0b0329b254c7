"""LoweredRate: every learning rate of an optimizer times a factor, only while it steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["LoweredRate"]


class LoweredRate:
    """Multiply the learning rates when a step begins and set them back when it ends.

    So the factor acts whoever sets the rates, a scheduler or the script itself, and neither meets it.

    Args:
        optimizer: whose rates.
        before_step: called before every step.

    Deviation: an optimizer that updates inside ``backward()`` does so outside of its step, at its full rate.

    >>> w = torch.nn.Parameter(torch.zeros(1))
    >>> sgd = torch.optim.SGD([w], lr=1.0)
    >>> lowered = LoweredRate(sgd)
    >>> lowered.factor, w.grad = 0.5, torch.ones(1)
    >>> sgd.step()
    >>> w.item(), sgd.param_groups[0]["lr"]
    (-0.5, 1.0)
    """

    def __init__(self, optimizer: torch.optim.Optimizer, before_step: Callable[[], Any] | None = None) -> None:
        self.factor = 1.0
        self._before_step = before_step
        self._own: list[tuple[dict[str, Any], Any, Any]] = []  # entry of param_groups, its rate, the lowered one
        self._handles: list[Any] = [
            optimizer.register_step_pre_hook(self._lower),
            optimizer.register_step_post_hook(self._set_back),
        ]

    def remove(self) -> None:
        """Let the optimizer alone."""
        while self._handles:
            self._handles.pop().remove()

    def _lower(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._set_back()  # a step that raised has not come to its end
        if self._before_step is not None:
            self._before_step()
        if self.factor == 1.0:
            return
        for entry in optimizer.param_groups:
            own = entry.get("lr", 0.0)
            if isinstance(own, Tensor):  # compiled and captured steps hold on to this very tensor
                saved = own.clone()
                own.mul_(self.factor)
                self._own.append((entry, saved, own))
            else:
                entry["lr"] = own * self.factor
                self._own.append((entry, own, entry["lr"]))

    def _set_back(self, *_: Any) -> None:
        for entry, own, lowered in self._own:
            if isinstance(own, Tensor):
                lowered.copy_(own)
            elif entry["lr"] == lowered:  # else somebody has set it since
                entry["lr"] = own
        self._own = []
