"""Six nets in which faults are planted: small, random weights, random data; two are transformers' own architectures.

Each builder returns (model, loss_fn, batch) and is sound as it stands. transformers==5.23.0 is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradsplit.lab.workloads.detector import Detector

Built = tuple[nn.Module, Callable[[nn.Module, Any], Tensor], Any]


def plain_conv(seed: int) -> Built:
    """Twelve convolutions, each with batch normalisation and ReLU; a linear head."""
    layers: list[nn.Module] = []
    for depth in range(12):
        layers += [nn.Conv2d(16 if depth else 3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    return model, classify, (torch.randn(16, 3, 12, 12), torch.randint(10, (16,)))


def residual_conv(seed: int) -> Built:
    """transformers' ResNet (bottleneck blocks) in small."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        embedding_size=16, hidden_sizes=[32, 64, 96], depths=[2, 3, 2], layer_type="bottleneck", num_labels=10
    )
    return ResNetForImageClassification(config).train(), classify, (torch.randn(8, 3, 32, 32), torch.randint(10, (8,)))


class Characters(nn.Module):
    """Embedding, two LSTM layers, linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 32)
        self.lstm = nn.LSTM(32, 48, num_layers=2, batch_first=True)
        self.head = nn.Linear(48, 40)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (n, time, 40)."""
        return self.head(self.lstm(self.embedding(tokens))[0])


def lstm(seed: int) -> Built:
    """A character model with two fused LSTM layers."""
    tokens = torch.randint(40, (8, 25))
    return Characters(), next_token, (tokens[:, :-1], tokens[:, 1:])


class Series(nn.Module):
    """Linear encoder with a norm, GRU, two linear layers on the last state."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(6, 32)
        self.norm = nn.LayerNorm(32)
        self.gru = nn.GRU(32, 48, batch_first=True)
        self.hidden = nn.Linear(48, 32)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, 5)."""
        last = self.gru(self.norm(self.encoder(x)))[0][:, -1]
        return self.head(torch.tanh(self.hidden(last)))


def gru(seed: int) -> Built:
    """A classifier of series with a fused GRU."""
    return Series(), classify, (torch.randn(8, 30, 6), torch.randint(5, (8,)))


def gpt(seed: int) -> Built:
    """transformers' GPT-2 in small, no dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=60, n_positions=32, n_embd=48, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
    )  # fmt: skip
    tokens = torch.randint(60, (4, 25))
    return GPT2LMHeadModel(config).train(), next_token, (tokens[:, :-1], tokens[:, 1:])


def detector(seed: int) -> Built:
    """The detection workload's two-headed net, healthy box errors."""
    model = Detector("two-tower", 1, 16, 10)
    batch = (torch.rand(16, 1, 32, 32), 0.5 * torch.randn(16, 4, 4, 4), torch.randint(11, (16, 4, 4)))
    return model, detect, batch


def logits_of(output: Any) -> Tensor:
    """The tensor of a plain output, or the logits of transformers'."""
    return output if isinstance(output, Tensor) else output.logits


def classify(model: nn.Module, batch: Any) -> Tensor:
    """Mean cross-entropy of images or series."""
    return F.cross_entropy(logits_of(model(batch[0])), batch[1])


def next_token(model: nn.Module, batch: Any) -> Tensor:
    """Mean cross-entropy of the next token."""
    return F.cross_entropy(logits_of(model(batch[0])).flatten(0, 1), batch[1].flatten())


def detect(model: nn.Module, batch: Any, weight: float = 1.0) -> Tensor:
    """Class cross-entropy + smooth L1 error of raw boxes, the latter `weight` times."""
    raw, logits = model(batch[0])
    return F.cross_entropy(logits.flatten(0, 2), batch[2].flatten()) + weight * F.smooth_l1_loss(raw, batch[1])


MODELS: dict[str, Callable[[int], Built]] = {
    "plain conv": plain_conv,
    "residual conv": residual_conv,
    "LSTM": lstm,
    "GRU": gru,
    "GPT": gpt,
    "detector": detector,
}


def reinitialise(model: nn.Module, init: str, model_name: str) -> None:
    """Other sound initialisations: of all linear and convolutional layers, and of recurrent weights."""
    if init == "default":
        return
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if weight.dim() < 2 or isinstance(module, nn.Embedding):
                continue
            with torch.no_grad():
                if init == "xavier":
                    nn.init.xavier_normal_(weight)
                elif init == "orthogonal":
                    nn.init.orthogonal_(weight)
                elif not isinstance(module, (nn.RNNBase, nn.Linear)) and type(module).__name__ != "Conv1D":
                    nn.init.kaiming_normal_(weight, nonlinearity="relu")
                elif isinstance(module, nn.Linear):
                    nn.init.normal_(weight, std=1 / math.sqrt(weight.shape[1]))
                del name
