"""How many operations a step dispatches: what a step costs on a device whose launches take longer than its work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels import launches as launches_of_a_splitter

VIEWS = {name.lstrip("_") for name in launches_of_a_splitter.VIEWS} | {"view_as_complex"}
"""Operations that move no data: they launch nothing."""


class Block(nn.Module):
    """The twelve tensors of one block of GPT-2."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)


class GPT(nn.Module):
    """145 tensors: 12 blocks in the layout of GPT-2, and words; it computes nothing."""

    def __init__(self, width: int = 8, blocks: int = 12) -> None:
        super().__init__()
        self.words = nn.Embedding(20, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))


def gpt(**sizes: int) -> GPT:
    torch.manual_seed(0)
    return GPT(**sizes)


def give(model: nn.Module, seed: int) -> None:
    """Give every parameter a gradient."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)


class Launches(TorchDispatchMode):
    """Counts what is dispatched, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").split(".")[0].lstrip("_")
        if name not in VIEWS and not func.name().startswith("profiler::"):
            self.seen[func.name()] += 1
        return func(*args, **(kwargs or {}))


def launches(model: nn.Module, step: Callable[[], Any], warm: int = 2) -> Counter[str]:
    """What one step dispatches after some that were not counted."""
    for seed in range(warm):
        give(model, seed)
        step()
    give(model, warm)
    with Launches() as mode:
        step()
    return mode.seen
