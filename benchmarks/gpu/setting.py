"""What is run, how large, on which machine; and the models and budgets that several parts share."""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import Parameter

import gradsplit as gs
from gradsplit.lab.speed.figures import Shapes


class Setting:
    """What is run, and how large.

    Args:
        device: "cuda" or "cpu".
        tiny: small enough for a test.
        seconds: of each training run in (d).
    """

    def __init__(self, device: str, *, tiny: bool, seconds: float) -> None:
        self.device, self.tiny, self.seconds = torch.device(device), tiny, seconds
        self.on_card = self.device.type == "cuda"
        self.turns = 3 if tiny else 20

    def about(self) -> dict[str, Any]:
        """The machine and the versions; results of another one are not taken over."""
        made: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version()}
        made |= {"gradsplit": gs.__version__, "device": self.device.type, "tiny": self.tiny, "seconds": self.seconds}
        if self.on_card:
            card = torch.cuda.get_device_properties(self.device)
            made |= {"card": card.name, "memory_gb": round(card.total_memory / 2**30, 1)}
            made |= {"capability": f"{card.major}.{card.minor}", "cuda": torch.version.cuda, "hip": torch.version.hip}
        try:
            import triton

            made["triton"] = triton.__version__
        except Exception as error:  # whatever a broken package raises
            made["triton"] = f"{type(error).__name__}: {error}"[:200]
        return made

    def settle(self) -> None:
        """Wait for the device."""
        if self.on_card:
            torch.cuda.synchronize()


Job = Callable[[Setting], Any]


BUDGETS: dict[str, Any] = {
    "the default": None,
    "Ema with the root": {"bin": gs.Ema(), "root": gs.Ema(2.0)},
    "rows and the root": {"bin": gs.Relative(0.2), "root": gs.Fixed(1.0)},
}
"""Budgets of the splitter; None: the default."""


def model_of(shapes: Shapes, device: torch.device, optimizer: str) -> tuple[list[tuple[str, Parameter]], Any]:
    """Parameters with gradients, and what steps after the splitter."""
    torch.manual_seed(0)
    named = []
    for name, shape in shapes.items():
        p = Parameter(torch.randn(shape, device=device) * 0.02)
        p.grad = torch.randn_like(p) * 1e-3
        named.append((name, p))
    made = [p for _, p in named]
    if optimizer == "SGD":
        return named, torch.optim.SGD(made, lr=0.1, momentum=0.9)
    return named, torch.optim.AdamW(made, lr=1e-4, fused=device.type == "cuda")
