"""A small training that a fault can be planted in, and what it should have been without the guard."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_leaves_with_path


def tensors_of(**parts: Any) -> dict[str, Tensor]:
    """Copies of all tensors in the states of some objects, by the places where they stand."""
    states = {name: part.state_dict() for name, part in parts.items()}
    leaves = tree_leaves_with_path(states)
    return {keystr(path): leaf.clone() for path, leaf in leaves if isinstance(leaf, Tensor)}


def net() -> nn.Module:
    """With a buffer that a bad batch poisons, and with dropout."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 1))


def data(num: int = 200, *, bad: tuple[int, ...] = (), scale: float = float("nan")) -> list[tuple[Tensor, Tensor]]:
    """Batches (16, 4) and (16, 1); those in ``bad`` are multiplied by ``scale``."""
    draw = torch.Generator().manual_seed(5)
    made = []
    for i in range(num):
        x = torch.randn(16, 4, generator=draw)
        y = x[:, :1] * 0.5 + 0.1 * torch.randn(16, 1, generator=draw)
        made.append((x, y * scale if i in bad else y))
    return made


def sgd(model: nn.Module, lr: float = 0.05) -> torch.optim.Optimizer:
    """With momentum, so that there is a state."""
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def train(guard, batches, model, optimizer, *, schedule=None, splitter=None, before_step=None) -> list[float]:
    """The loop of the README, once over the batches; the losses."""
    losses = []
    for x, y in guard.batches(batches):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        if splitter is not None:
            splitter.step()
        if before_step is not None:
            before_step(len(losses))
        optimizer.step()
        if schedule is not None:
            schedule.step()
        guard.step(loss)
        losses.append(loss.item())
    return losses


def weights(model: nn.Module) -> list[Tensor]:
    """Copies of parameters and buffers."""
    return [tensor.clone() for tensor in model.state_dict().values()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    """Bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
