"""(d) A GPT on bytes of Python's standard library: AdamW at three rates, Muon at two, GSO with nothing chosen."""

from __future__ import annotations

import functools
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import gradsplit as gs

from .setting import Setting


class Block(nn.Module):
    """A block of a GPT."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Attention and a layer of two matrices, both residual."""
        batch, context, width = x.shape
        q, k, v = self.qkv(self.ln_1(x)).view(batch, context, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(batch, context, width))
        return x + self.down(functional.gelu(self.up(self.ln_2(x))))


class Gpt(nn.Module):
    """A GPT on bytes: 29 million parameters at nine blocks of width 512."""

    def __init__(self, blocks: int, width: int, context: int) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(256, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, max(1, width // 64)) for _ in range(blocks)))
        self.ln, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of the next byte."""
        x = self.wte(ids) + self.wpe.weight[: ids.shape[1]]
        logits: Tensor = self.head(self.ln(self.blocks(x)))
        return logits


@functools.cache
def text(most: int) -> Tensor:
    """Bytes of Python's standard library, file by file in the order of their names."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    joined = b"".join(file.read_bytes() for file in files)[:most]
    return torch.frombuffer(bytearray(joined), dtype=torch.uint8)


TRAINED: dict[str, tuple[str, float]] = {
    **{f"AdamW, {lr:g}": ("adamw", lr) for lr in (3e-4, 1e-3, 3e-3)},
    **{f"Muon, {lr:g}": ("muon", lr) for lr in (0.01, 0.03)},
    "GSO": ("gso", 0.0),
}
"""Every run of (d). AdamW and Muon have a clip at 1; all have a linear decay over the seconds and a short warm-up."""


def train_job(setting: Setting, name: str) -> dict[str, Any]:
    """Train for the given seconds, or a few steps in the tiny setting; loss on held-out text by step and by second."""
    kind, lr = TRAINED[name]
    if kind == "muon" and not hasattr(torch.optim, "Muon"):
        return {"skipped": "torch has no Muon"}
    blocks, width, context, batch = (1, 32, 16, 4) if setting.tiny else (9, 512, 256, 64)
    device = setting.device
    whole = text(20_000 if setting.tiny else 8_000_000).to(device)
    held_out, train = whole[: len(whole) // 20], whole[len(whole) // 20 :]
    torch.manual_seed(0)
    model = Gpt(blocks, width, context).to(device)
    optimizers = _optimizers(kind, lr, model, setting)
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    generator = torch.Generator().manual_seed(1)
    every, most = (2, 6) if setting.tiny else (50, 1_000_000)
    curve, spent, step = [], 0.0, 0
    while True:
        if step % every == 0 or spent >= setting.seconds or step >= most:
            setting.settle()
            curve.append([step, round(spent, 3), round(_loss(model, held_out, context, setting), 5)])
            if spent >= setting.seconds or step >= most:
                break
        setting.settle()
        before = time.perf_counter()
        done = min(1.0, max(spent / setting.seconds, step / most))
        for optimizer, of in zip(optimizers, rates, strict=True):
            for group, rate in zip(optimizer.param_groups, of, strict=True):
                warm = 1.0 if kind == "gso" else min(1.0, (step + 1) / 50)
                group["lr"] = rate * warm * (1.0 - done)
        starts = torch.randint(len(train) - context - 1, (batch,), generator=generator).tolist()
        ids = torch.stack([train[s : s + context + 1] for s in starts]).long()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=setting.on_card and _has_bf16()):
            logits = model(ids[:, :-1])
        loss = functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
        model.zero_grad()
        loss.backward()
        if kind != "gso":
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        setting.settle()
        spent += time.perf_counter() - before
        step += 1
    return {"parameters": sum(p.numel() for p in model.parameters()), "curve": curve}


def _has_bf16() -> bool:
    return torch.cuda.is_bf16_supported()


def _optimizers(kind: str, lr: float, model: Gpt, setting: Setting) -> list[torch.optim.Optimizer]:
    fused = setting.on_card
    if kind == "gso":
        return [gs.GSO(model)]
    if kind == "adamw":
        return [torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.1, fused=fused)]
    hidden = [p for p in model.blocks.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if all(p is not other for other in hidden)]
    made: list[torch.optim.Optimizer] = [torch.optim.Muon(hidden, lr=lr, weight_decay=0.1)]
    return [*made, torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.99), weight_decay=0.1, fused=fused)]


@torch.no_grad()
def _loss(model: Gpt, held_out: Tensor, context: int, setting: Setting) -> float:
    """Loss on the first rows of the held-out text, the same at every look."""
    rows = min(64, len(held_out) // (context + 1))
    ids = held_out[: rows * (context + 1)].view(rows, -1).long()
    with torch.autocast(setting.device.type, dtype=torch.bfloat16, enabled=setting.on_card and _has_bf16()):
        logits = model(ids[:, :-1])
    return float(functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten()))
