"""One small model per kind of layer, whose only weight gradients are the layer's own, and a batch for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Recurrent(nn.Module):
    """A recurrent net that returns the sequence, or a sequence and its last state."""

    def __init__(self, layer: nn.Module, *, both: bool = False) -> None:
        super().__init__()
        self.layer, self.both = layer, both

    def forward(self, x: Tensor) -> Tensor:
        y, state = self.layer(x)
        if not self.both:
            return y
        last = state[0] if isinstance(state, tuple) else state
        return y + last[-1].unsqueeze(1)


class Attention(nn.Module):
    def __init__(self, layer: nn.Module, *, cross: bool = False) -> None:
        super().__init__()
        self.layer, self.cross = layer, cross

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x * 2, x * 2 if self.cross else x)[0] if self.cross else self.layer(x, x, x)[0]


class Deep(nn.Module):
    """Several kinds in a row, with a residual path and a position that all samples share."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(5, 6))
        self.norm = nn.LayerNorm(6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.lstm = nn.LSTM(6, 6, batch_first=True)
        self.rms = nn.RMSNorm(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x + self.position
        n = self.norm(h)
        h = h + self.attention(n, n, n, need_weights=False)[0]
        h = h + self.lstm(h)[0]
        return self.head(self.rms(h))


class Case(NamedTuple):
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]


CASES: dict[str, Case] = {
    "linear": Case(lambda: nn.Linear(4, 3), (7, 4)),
    "linear, no bias": Case(lambda: nn.Linear(4, 3, bias=False), (7, 4)),
    "linear, sequence": Case(lambda: nn.Linear(4, 3), (7, 5, 4)),
    "conv1d": Case(lambda: nn.Conv1d(2, 3, 3, padding=1), (7, 2, 6)),
    "conv2d": Case(lambda: nn.Conv2d(2, 4, 3, stride=2, groups=2), (7, 2, 6, 6)),
    "conv2d, same": Case(lambda: nn.Conv2d(2, 3, (2, 3), padding="same", dilation=2), (7, 2, 6, 6)),
    "conv2d, circular": Case(lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (7, 2, 5, 5)),
    "conv3d": Case(lambda: nn.Conv3d(1, 2, 2, bias=False), (7, 1, 3, 3, 3)),
    "layernorm": Case(lambda: nn.LayerNorm(4), (7, 5, 4)),
    "layernorm, two dimensions": Case(lambda: nn.LayerNorm((5, 4), bias=False), (7, 5, 4)),
    "rmsnorm": Case(lambda: nn.RMSNorm(4), (7, 5, 4)),
    "rmsnorm, no eps": Case(lambda: nn.RMSNorm(4, eps=0.0), (7, 4)),
    "layernorm, no eps": Case(lambda: nn.LayerNorm(4, eps=0.0), (7, 4)),
    "rmsnorm, eps": Case(lambda: nn.RMSNorm(4, eps=0.1), (7, 4)),
    "lstm": Case(lambda: Recurrent(nn.LSTM(4, 3, batch_first=True)), (7, 5, 4)),
    "lstm, deep": Case(
        lambda: Recurrent(nn.LSTM(4, 3, num_layers=2, bidirectional=False, batch_first=True), both=True), (7, 5, 4)
    ),
    "gru": Case(lambda: Recurrent(nn.GRU(4, 3, batch_first=True), both=True), (7, 5, 4)),
    "rnn, both directions": Case(lambda: Recurrent(nn.RNN(4, 3, batch_first=True, bidirectional=True)), (7, 5, 4)),
    "attention": Case(lambda: Attention(nn.MultiheadAttention(4, 2, batch_first=True)), (7, 5, 4)),
    "attention, cross": Case(lambda: Attention(nn.MultiheadAttention(4, 2, batch_first=True), cross=True), (7, 5, 4)),
    "deep": Case(Deep, (7, 5, 6)),
}


def made(name: str) -> tuple[nn.Module, Tensor]:
    """The model and its batch, in float64."""
    torch.manual_seed(3)
    case = CASES[name]
    model = case.build().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, torch.randn(case.shape, dtype=torch.float64)


def grads(model: nn.Module) -> dict[str, Tensor]:
    """The gradients, and a model without them again."""
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found
