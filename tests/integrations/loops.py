"""What a trainer must give: the hand-written loop that it stands for, on a model of 23 parameters."""

from __future__ import annotations

import torch
from torch import nn

import gradsplit as gs

HISTORY = {"plan": "xsp", "budget": gs.Percentile(0.1, eta=0.5)}
"""Rows bounded by a low quantile of their own history: a run that forgets it goes on differently."""


def model_of(seed: int = 0) -> nn.Sequential:
    """Two layers, the same for the same seed."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1, bias=False))


def rows_of(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs (count, 3) and targets (count, 1), every fifth of them ten times as large."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(count, 3, generator=generator), torch.randn(count, 1, generator=generator)
    y[::5] *= 10
    return x, y


def error(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Mean squared error."""
    return (model(x) - y).square().mean()


def train(model, optimizer, *, rows: int, batch: int, accumulate: int = 1, splitter=None, bfloat16=False) -> None:
    """One pass over the rows in order; the loss of each micro-batch is divided by their number.

    Autocast holds the forward pass alone: it keeps the weights it has cast until its context ends.
    """
    x, y = rows_of(rows)
    for count, (inputs, targets) in enumerate(zip(x.split(batch), y.split(batch), strict=True), 1):
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = error(model, inputs, targets)
        (loss / accumulate).backward()
        if count % accumulate == 0:
            if splitter is not None:
                splitter.step()
            optimizer.step()
            optimizer.zero_grad()


def assert_same_weights(a: nn.Module, b: nn.Module) -> None:
    """Bit for bit."""
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q), f"{name}: {p.detach()} and {q.detach()}"


def different_weights(a: nn.Module, b: nn.Module) -> bool:
    """Whether any weight differs."""
    return any(not torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
