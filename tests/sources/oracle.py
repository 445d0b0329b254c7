"""The rule written from its formula, in float64 and with loops: limits from norms, and bounded sums over samples."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def limits(batches: Sequence[Sequence[float]], quantile: float, factor: float, up: float, down: float, growth: float):
    """The limit after every batch of norms."""
    scale, found = 0.0, []
    for norms in batches:
        used = sorted(n for n in norms if math.isfinite(n) and n > 0)
        if used:
            now = used[max(1, math.ceil(quantile * len(used))) - 1]
            if scale == 0:
                scale = now
            elif now > scale:
                scale *= min((now / scale) ** up, growth)
            else:
                scale *= (now / scale) ** down
        found.append(factor * scale if scale else math.inf)
    return found


def alone(model: nn.Module, x: Tensor, signal: Tensor) -> list[dict[str, Tensor]]:
    """The gradients of each sample alone, from the signal at the model's output."""
    found = []
    for i in range(len(x)):
        model.zero_grad()
        (model(x[i : i + 1]) * signal[i : i + 1]).sum().backward()
        found.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    model.zero_grad()
    return found


def bounded_sum(parts: list[dict[str, Tensor]], norms: Sequence[float], limit: float) -> dict[str, Tensor]:
    """The sum over samples, each times min(1, limit / n)."""
    scales = [min(1.0, limit / n) if n > 0 else 1.0 for n in norms]
    return {
        name: torch.stack([c * part[name] for c, part in zip(scales, parts, strict=True)]).sum(0) for name in parts[0]
    }
