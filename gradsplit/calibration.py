"""Calibration: what a few backward passes tell about the gradient before training starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .distributed import local_of, whole_of
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
    whole_means = [torch.zeros_like(p.detach(), dtype=torch.float32) for p in splitter.parameters] if cuts_anew else []
    mean: list[Any] = [local_of(value) for value in whole_means]
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
        energy_T = [None if gradient is None else _energy(gradient) for gradient in gradients]
        for t, sound in enumerate(_sound_everywhere(splitter.kernel, energy_T)):
            if sound:
                mean[t].lerp_(energy_T[t], 1 - _MEMORY)
                seen[t] += 1
    for parameter in splitter.parameters:
        parameter.grad = None
    if cuts_anew:
        energies = {
            name: whole_of(value) / (1 - _MEMORY**count) if count else torch.zeros(value.shape)
            for name, value, count in zip(splitter.layout.names, whole_means, seen, strict=True)
        }
        splitter._adopt(make_plan(strategy, splitter.layout, energies, call="GradientSplitter.calibrate"))
    elif not splitter._needs_rates:
        weights = splitter.kernel.squares(splitter.parameters) if splitter.ledger.reads_weights else None
        for squares_B in squares:
            splitter.ledger.decide(squares_B, weights)
    return splitter.plan


def _energy(gradient: Tensor) -> Tensor:
    """Squares of what this rank holds of a gradient."""
    local: Tensor = local_of(gradient.to_dense() if gradient.is_sparse else gradient)
    return (local.abs() if local.is_complex() else local).float().square()


def _sound_everywhere(kernel: Any, energy_T: list[Tensor | None]) -> list[bool]:
    """Whether every rank has a finite gradient of a tensor; one answer for all ranks, or they would cut differently."""
    bad = [energy is None or not bool(energy.isfinite().all()) for energy in energy_T]
    bad_T = getattr(kernel, "add_", lambda values: values)(torch.tensor(bad, dtype=torch.float32, device=kernel.device))
    return [not count for count in bad_T.tolist()]
