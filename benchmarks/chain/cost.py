"""What the hooks cost: training steps of a 6-layer GPT with and without them, in turn."""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.chain.record import save
from gradsplit.chain import ChainSplitter


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2, self.heads = nn.LayerNorm(width), nn.LayerNorm(width), heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, time, width) to the same shape."""
        n, time_, width = x.shape
        q, k, v = self.qkv(self.norm_1(x)).view(n, time_, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(n, time_, width)
        x = x + self.proj(mixed)
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class GPT(nn.Module):
    """Six blocks between a table and a head."""

    def __init__(self, width: int = 128, vocabulary: int = 96) -> None:
        super().__init__()
        self.table, self.place = nn.Embedding(vocabulary, width), nn.Embedding(64, width)
        self.blocks = nn.ModuleList(Block(width, 4) for _ in range(6))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (n, time, vocabulary)."""
        x = self.table(tokens) + self.place(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="chain_tasks.py cost")
    parser.add_argument("--pairs", type=int, default=60)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = GPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    tokens = torch.randint(96, (8, 65))

    def step() -> float:
        began = time.process_time()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        return time.process_time() - began

    variants = {"layers": {"at": "layers"}, "auto": {"at": "auto"}}
    result = {}
    for name, how in variants.items():
        chain = ChainSplitter(model, **how)
        with chain:
            for _ in range(3):
                step()
        plain, hooked = [], []
        for _ in range(
            options.pairs
        ):  # in turn, so that a busy machine slows both alike; processor time, not wall time
            plain.append(step())
            with chain:
                step()  # the first step of an attachment looks for forks: measured apart below
                hooked.append(step())
        ratios = [h / p for h, p in zip(hooked, plain, strict=True)]
        result[name] = {
            "joints": len(chain.rows()),
            "plain_ms": statistics.median(plain) * 1e3,
            "hooked_ms": statistics.median(hooked) * 1e3,
            "ratio": statistics.median(hooked) / statistics.median(plain),
            "ratio_quartiles": statistics.quantiles(ratios, n=4),
        }
        print(name, result[name], flush=True)
    command = f"OMP_NUM_THREADS=1 python benchmarks/chain_tasks.py cost --pairs {options.pairs}"
    print(save("chain_cost", command, {"options": vars(options), "result": result}))
