"""What PyTorch's own fronts make of the cases: the numbers that every other framework must agree with."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import nn

import gradsplit as gs
from tests.functional.cases import CASES, LAYOUT, LR, MOMENTUM, NUM_STEPS, gradients, pace_at, weights

GSO_STEPS = 100
GSO_LR = 0.01


def parameters() -> list[tuple[str, nn.Parameter]]:
    return [(name, nn.Parameter(torch.from_numpy(w.copy()))) for name, w in zip(LAYOUT.names, weights(), strict=True)]


@cache
def scales(name: str, num_steps: int = NUM_STEPS) -> np.ndarray:
    """The scales of GradientSplitter in front of SGD with momentum, (steps, B); the weights stay as they are."""
    case, pairs = CASES[name], parameters()
    optimizer = torch.optim.SGD([p for _, p in pairs], lr=LR, momentum=MOMENTUM)
    splitter = gs.GradientSplitter(
        pairs,
        case.plan(),
        case.budget,
        optimizer=optimizer,
        rule=case.rule,
        backend="reference",
        collective=case.collective,
    )
    made = []
    for step in range(num_steps):
        optimizer.param_groups[0]["lr"] = LR * pace_at(step)
        for (_, parameter), gradient in zip(pairs, case.gradients(step), strict=True):
            parameter.grad = torch.from_numpy(np.asarray(gradient))
        made.append(splitter.step().decision.scale_B.numpy())
    return np.stack(made)


def gso_gradients(step: int, now: list[np.ndarray]) -> list[np.ndarray]:
    """The gradient of 1/2 ||w - target||^2 with noise that differs from row to row, at the weights of now."""
    noise = gradients(step, seed=7)
    return [np.asarray(w - t + 0.3 * n, dtype=np.float32) for w, t, n in zip(now, weights(5), noise, strict=True)]


@cache
def after_gso(second_moment: str, num_steps: int = GSO_STEPS) -> list[np.ndarray]:
    """The weights after GSO with its default bounds and a learning rate that falls, by the reference update."""
    pairs = parameters()
    optimizer = gs.GSO(pairs, lr=GSO_LR, second_moment=second_moment, backend="reference", direction="adam")
    for step in range(num_steps):
        optimizer.param_groups[0]["lr"] = GSO_LR * pace_at(step)
        now = [p.detach().numpy() for _, p in pairs]
        for (_, parameter), gradient in zip(pairs, gso_gradients(step, now), strict=True):
            parameter.grad = torch.from_numpy(gradient)
        optimizer.step()
    return [p.detach().numpy() for _, p in pairs]
