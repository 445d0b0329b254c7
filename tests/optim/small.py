"""A net of two layers, its batches, and a few steps of it."""

from __future__ import annotations

import torch
from torch import nn


def model_of(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def backward(model, step):
    """The loss of the step's batch, after its backward pass."""
    p = next(model.parameters())
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step)).to(p.dtype)
    loss = (model(x) - 3).square().mean()
    loss.backward()
    return loss


def train(model, optimizer, steps, scheduler=None):
    """The weights after some steps."""
    for step in steps:
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return [p.detach().clone() for p in model.parameters()]
