"""A GPT whose perceptrons are mixtures of experts, each character sent to one of them (Fedus, Zoph and Shazeer 2022).

Batch and metric: as in `text`. The weights of all experts of a layer are one tensor (experts, out, in). With `hot`
the first expert of each layer begins with weights that many times too large, so that its gradients explode and those
of the others do not.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..task import MEASURED_2026_11_29, Workload, measured, seeded
from .text import DATA_NOTE, TEXT_OPTIONS, Block, CharGPT, TextTask, load_corpus

BALANCE = 0.01  # weight of the loss that keeps the experts equally busy


class Experts(nn.Module):
    """A router and a perceptron per expert; each place takes its likeliest expert, weighted by that probability."""

    def __init__(self, width: int, experts: int, hot: float) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts, bias=False)
        self.up = nn.Parameter(0.02 * torch.randn(experts, 2 * width, width))
        self.down = nn.Parameter(0.02 * torch.randn(experts, width, 2 * width))
        nn.init.normal_(self.router.weight, std=0.02)
        with torch.no_grad():
            self.up[0] *= hot
            self.down[0] *= hot
        self.imbalance = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, time, width) to the same shape; `imbalance` is 1 where all experts are equally busy."""
        flat = x.flatten(0, 1)
        probability = self.router(flat).softmax(-1)
        share, choice = probability.max(-1)
        busy = F.one_hot(choice, probability.shape[1]).to(x.dtype).mean(0)
        self.imbalance = len(busy) * (busy * probability.mean(0)).sum()
        made = torch.zeros_like(flat)
        for expert in range(len(self.up)):
            places = (choice == expert).nonzero()[:, 0]
            inner = F.gelu(flat[places] @ self.up[expert].T) @ self.down[expert].T
            made = made.index_add(0, places, inner * share[places, None])
        return made.view_as(x)


class ExpertBlock(Block):
    """`text.Block` with experts in the place of its perceptron."""

    def __init__(self, width: int, heads: int, experts: int, hot: float) -> None:
        super().__init__(width, heads)
        del self.up, self.down
        self.experts = Experts(width, experts, hot)

    def perceptron(self, x: Tensor) -> Tensor:
        """Map (batch, time, width) to the same shape."""
        return self.experts(x)


class ExpertTask(TextTask):
    """Next-character prediction, with a loss that keeps the experts equally busy."""

    def loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        """Mean cross-entropy in nats per character; in training also a hundredth of the mean imbalance."""
        loss = super().loss(model, batch)
        if not model.training:
            return loss
        held = [module.imbalance for module in model.modules() if isinstance(module, Experts)]
        return loss + BALANCE * (torch.stack(held).mean() - 1.0)


def build_experts(
    seed: int = 0,
    *,
    text_file: str | Path | None = None,
    layers: int = 2,
    width: int = 64,
    heads: int = 4,
    experts: int = 4,
    hot: float = 1.0,
    context: int = 64,
    batch: int = 16,
) -> ExpertTask:
    """The experts' task; see `EXPERTS.options`."""
    corpus = load_corpus(text_file, context)
    with seeded(seed):
        model = CharGPT(len(corpus.vocabulary), layers=layers, width=width, heads=heads, context=context)
        model.blocks = nn.ModuleList(ExpertBlock(width, heads, experts, hot) for _ in range(layers))
    return ExpertTask(model, corpus, seed, batch=batch, context=context)


EXPERTS = Workload(
    name="experts",
    title="small GPT with a mixture of experts",
    metric="val_loss",
    higher_is_better=False,
    steps=200,
    optimizer="adamw",
    lr=3e-3,
    expected=measured(
        1.923, 7, "gradsplit compare experts --methods gso --lr usual --schedule linear --seeds 1", MEASURED_2026_11_29
    ),
    data_note=DATA_NOTE,
    build=build_experts,
    options=TEXT_OPTIONS
    | {
        "heads": "attention heads a block",
        "experts": "experts a layer",
        "hot": "factor of the first expert's weights at the start",
    },
)
