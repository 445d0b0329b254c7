"""Calibration: what a few backward passes tell about the gradient before training starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .distributed import whole_of
from .kernels.gradients import gradients_of
from .plan import STRATEGIES, Plan, make_plan

if TYPE_CHECKING:
    from .splitter import GradientSplitter

__all__ = ["calibrate"]

_MEMORY = 0.9


def calibrate(splitter: GradientSplitter, closure: Callable[[], Any], steps: int) -> Plan:
    """See `GradientSplitter.calibrate`."""
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"GradientSplitter.calibrate(steps={steps!r}): expected at least one backward pass.")
    strategy = splitter._strategy
    cuts_anew = isinstance(strategy, str) and STRATEGIES[strategy].needs_energy
    mean: list[Tensor | None] = [None] * len(splitter.parameters)
    seen = [0] * len(splitter.parameters)
    squares: list[Tensor] = []
    for _ in range(steps):
        for parameter in splitter.parameters:
            parameter.grad = None
        with torch.enable_grad():
            closure()
        gradients = gradients_of(splitter.layout.names, splitter.parameters, call="GradientSplitter.calibrate(…)")
        squares.append(splitter.kernel.squares(gradients))
        if not cuts_anew:
            continue
        for t, gradient in enumerate(gradients):
            if gradient is None:
                continue
            dense = gradient.to_dense() if gradient.is_sparse else gradient
            energy = (dense.abs() if dense.is_complex() else dense).float().square()
            if bool(energy.isfinite().all()):
                before = mean[t]
                mean[t] = torch.lerp(torch.zeros_like(energy) if before is None else before, energy, 1 - _MEMORY)
                seen[t] += 1
    for parameter in splitter.parameters:
        parameter.grad = None
    if cuts_anew:
        energies = {
            name: torch.zeros(shape) if value is None else whole_of(value) / (1 - _MEMORY**count)
            for name, shape, value, count in zip(splitter.layout.names, splitter.layout.shapes, mean, seen, strict=True)
        }
        splitter._adopt(make_plan(strategy, splitter.layout, energies, call="GradientSplitter.calibrate"))
    elif not splitter._needs_rates:
        weights = splitter.kernel.squares(splitter.parameters) if splitter.ledger.reads_weights else None
        for squares_B in squares:
            splitter.ledger.decide(squares_B, weights)
    return splitter.plan
