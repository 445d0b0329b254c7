"""The small text model of the cost figures: 0.8 M parameters, 4 sequences of 64 characters."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

VOCABULARY, CONTEXT, WIDTH, HEADS, LAYERS, SEQUENCES = 65, 64, 128, 4, 4, 4


class LayerNorm(nn.Module):
    """Layer norm from its formula, the same numbers: nested autograd of torch's own is wrong from order 3 on."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis."""
        centred = x - x.mean(-1, keepdim=True)
        return centred * (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * self.weight + self.bias


class Block(nn.Module):
    """Causal attention, then a four times wider perceptron, both residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = LayerNorm(WIDTH), LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, time, width) to the same shape."""
        batch, time, width = x.shape
        parts = self.qkv(self.norm1(x)).view(batch, time, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, time, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Token and place embeddings, the blocks, an output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, index: Tensor) -> Tensor:
        """Map characters (batch, time) to scores (batch, time, vocabulary)."""
        x = self.tokens(index) + self.places.weight[: index.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def problem(seed: int = 0) -> tuple[Callable[[dict[str, Tensor]], Tensor], dict[str, Tensor], Tensor]:
    """Loss of the parameters, the parameters (float64), and the characters, (4, 65), of random text."""
    torch.manual_seed(seed)
    model = GPT().double()
    text = torch.randint(VOCABULARY, (SEQUENCES, CONTEXT + 1))

    def loss_of_params(params: dict[str, Tensor]) -> Tensor:
        logits = functional_call(model, params, (text[:, :-1],))
        return F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())

    return loss_of_params, {name: p.detach() for name, p in model.named_parameters()}, text
