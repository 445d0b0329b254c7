"""A tiny model with every kind of tensor, its batches, gradients that explode and break, and the loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from same_numbers.sheet import Notes

STEPS = 6


class Stem(nn.Module):
    """Embedding and convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.conv = nn.Conv2d(1, 3, 3, padding=1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Channels over tokens and width."""
        return torch.tanh(self.conv(self.embed(tokens).transpose(1, 2).unsqueeze(1)))


class Net(nn.Module):
    """Embedding, convolution, norm, two linear layers and a scalar; modules two deep and one numbered list."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Stem()
        self.norm = nn.LayerNorm(12)
        self.body = nn.Sequential(nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 5))
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores of five classes."""
        return self.body(self.norm(self.stem(tokens).mean(-1).flatten(1))) * self.scale


def make_net(dtype: torch.dtype = torch.float32, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().to(dtype)


def batch(step: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(100 + step)
    return torch.randint(7, (8, 6), generator=draw), torch.randint(5, (8,), generator=draw)


def loss_of(model: nn.Module, step: int) -> Tensor:
    tokens, classes = batch(step)
    return nn.functional.cross_entropy(model(tokens), classes)


def broken(name: str, gradient: Tensor, step: int) -> Tensor:
    """A gradient with the faults of the step: one NaN, one 3e30, a tensor of four orders too much, an inf."""
    gradient = gradient.clone()
    if step == 1 and name.endswith("conv.weight"):
        gradient[1, 0, 1, 2] = math.nan
    if step == 2 and name.endswith("body.0.weight"):
        gradient *= 1e4
    if step == 3 and name.endswith("body.2.weight"):
        gradient[2, 1] = 3e30
    if step == 4 and name.endswith("norm.bias"):
        gradient[3] = math.inf
    return gradient


class Faults:
    """Breaks gradients inside backward, so that whatever hooks come after it meet them broken."""

    def __init__(self, model: nn.Module) -> None:
        self.step = 0
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.register_hook(lambda gradient, name=name: broken(name, gradient, self.step))


def train(
    notes: Notes,
    model: nn.Module,
    optimizer: Any,
    *,
    steps: int = STEPS,
    first: int = 0,
    faults: Faults | None = None,
    before_step: Callable[[int], Any] | None = None,
    after_step: Callable[[Tensor], Any] | None = None,
    loss: Callable[[nn.Module, int], Tensor] = loss_of,
) -> None:
    """Train for some steps; note losses and at the end parameters and buffers."""
    faults = faults or Faults(model)
    for step in range(first, first + steps):
        faults.step = step
        optimizer.zero_grad()
        value = loss(model, step)
        notes.note("losses", value)
        value.backward()
        if step == 5 and hasattr(model, "scale"):
            model.scale.grad = None
        if before_step is not None:
            before_step(step)
        optimizer.step()
        if after_step is not None:
            after_step(value)
    notes.note("parameters", dict(model.named_parameters()), dict(model.named_buffers()))


def drawn(parameters: list[Tensor], step: int) -> list[Tensor]:
    """Gradients that depend on nothing but the step, in the parameters' dtypes; row sizes differ widely."""
    draw = torch.Generator().manual_seed(200 + step)
    made = []
    for parameter in parameters:
        real = torch.randn(*parameter.shape, 2, generator=draw, dtype=torch.float64)
        rows = torch.randn(len(parameter) if parameter.ndim else 1, generator=draw, dtype=torch.float64).exp()
        real = real * rows.reshape(-1, *[1] * parameter.ndim) if parameter.ndim else real
        made.append((torch.view_as_complex(real) if parameter.is_complex() else real[..., 0]).to(parameter.dtype))
    wide = [gradient for gradient in made if gradient.ndim > 1]
    if step == 1:
        wide[0].view(-1)[1] = math.nan
    if step == 3:
        wide[-1].view(-1)[0] = 3e30 if made[0].dtype != torch.float16 else 6e4
    return made
