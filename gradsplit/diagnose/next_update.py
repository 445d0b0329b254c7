"""The step that an optimizer would take next, had from a copy of it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class NextUpdate:
    """How the optimizer would move the parameters on one gradient, per unit of learning rate.

    Attributes:
        direction: {name: tensor}, float64; without the parameters that the optimizer does not hold or whose rate is 0.
        rate: {name: learning rate} of the same parameters: rate * direction is the step.
        source: what the direction is, in words that follow "along".
    """

    direction: dict[str, Tensor]
    rate: dict[str, float]
    source: str


def next_update(optimizer: Any, params: Mapping[str, nn.Parameter], gradient: Mapping[str, Tensor]) -> NextUpdate:
    """The optimizer's next update, (w after - w) / lr, without a trace in the optimizer or in the parameters.

    A copy of the optimizer, over copies of the parameters, takes one step; momentum, moments, weight decay and limits
    of its own are all in it. Hooks on the step (an attached splitter) belong to the original and do not run. Where no
    step can be taken so (an optimizer that wants a closure, one that updates in backward), the direction is minus the
    gradient.

    Args:
        optimizer: over the parameters, or over some of them.
        params: {name: parameter}.
        gradient: of the same names.

    >>> w = nn.Parameter(torch.tensor([3.0]))
    >>> update = next_update(torch.optim.SGD([w], lr=0.5, weight_decay=2.0), {"w": w}, {"w": torch.tensor([1.0])})
    >>> update.direction["w"], update.rate["w"], w.data  # minus (gradient + decay)
    (tensor([-7.], dtype=torch.float64), 0.5, tensor([3.]))
    """
    rate_of = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
    moving = {name: p for name, p in params.items() if rate_of.get(id(p), 0.0) > 0}
    rate = {name: rate_of[id(p)] for name, p in moving.items()}
    name = type(optimizer).__name__
    try:
        moved = _stepped(optimizer, moving, gradient)
    except Exception as error:  # whatever a foreign optimizer raises, the diagnosis goes on without its direction
        moved, why = {}, f"{name} takes no step of its own here: {type(error).__name__}"
    else:
        why = f"{name} does not move by a step of its own"
    if not any(bool(x.any()) for x in moved.values()):
        return NextUpdate({n: -gradient[n].double() for n in moving}, rate, f"minus the gradient ({why})")
    source = f"{name}'s next update"
    if getattr(optimizer, "_optimizer_step_pre_hooks", None) or getattr(optimizer, "_optimizer_step_post_hooks", None):
        source += ", without the hooks on its step"
    return NextUpdate({n: x / rate[n] for n, x in moved.items()}, rate, source)


def _stepped(optimizer: Any, params: Mapping[str, nn.Parameter], gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """How far one step of a copy moves each parameter, float64."""
    copies: dict[str, nn.Parameter] = {}
    memo: dict[int, Any] = {}
    for name, p in params.items():
        copies[name] = memo[id(p)] = nn.Parameter(p.detach().clone())
    twin = copy.deepcopy(optimizer, memo)
    for name, p in copies.items():
        p.grad = gradient[name].to(p)
    with torch.enable_grad():
        twin.step()
    return {name: copies[name].detach().double() - p.detach().double() for name, p in params.items()}
