"""One fault, planted into a script by hooks on one of its modules; without a fault nothing is touched.

A script makes one `Planted`, tells it its models, its optimizers and the beginning of every optimizer step, and passes
each batch through `batch`. It prints its losses and what was planted as one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from typing import Any

import torch
from torch import Tensor, nn

KINDS = ("forward", "backward", "factor", "weights", "rate", "batch", "pixel")


class _Louder(torch.autograd.Function):
    """The identity whose gradient is multiplied."""

    @staticmethod
    def forward(context: Any, x: Tensor, times: float) -> Tensor:
        context.times = times
        return x.clone()

    @staticmethod
    def backward(context: Any, signal: Tensor) -> tuple[Tensor, None]:
        return signal * context.times, None


def _lost_forward(x: Tensor, variant: int) -> Tensor:
    if variant == 0:
        return x + torch.log(-x.abs() - 1)
    if variant == 1:
        return x / (x - x)
    return torch.cat([x[:1] * torch.sqrt(-1 - x[:1].square()), x[1:]])


def _lost_backward(x: Tensor, variant: int) -> Tensor:
    if variant == 0:
        return x + torch.sqrt((x * 0).abs())
    if variant == 1:
        return x + (x * 0).abs().pow(0.5)
    return torch.cat([x[:1] + torch.sqrt((x[:1] * 0).abs()), x[1:]])


class Planted:
    """What the command line asks for.

    Attributes:
        seed: of the whole script.
        steps: optimizer steps to make.
    """

    def __init__(self, steps: int) -> None:
        parser = argparse.ArgumentParser()
        parser.add_argument("--seed", type=int, default=0)
        parser.add_argument("--steps", type=int, default=steps)
        parser.add_argument("--rate", type=float, default=1.0, help="times the script's own learning rate")
        parser.add_argument("--width", type=float, default=1.0, help="times the script's own width")
        parser.add_argument("--fault", choices=KINDS)
        parser.add_argument("--at", type=int, default=-1, help="optimizer step")
        parser.add_argument("--lasting", action="store_true")
        parser.add_argument("--where", type=float, default=0.5, help="in [0, 1): a place among the modules")
        parser.add_argument("--size", type=float, default=1e3)
        parser.add_argument("--variant", type=int, default=0)
        parser.add_argument("--rank", type=int, default=0, help="of the process in which the fault is planted")
        self.asked, _ = parser.parse_known_args()
        self.seed, self.steps = self.asked.seed, self.asked.steps
        self.now, self.module, self.first_module = -1, "", ""
        self._losses: list[float] = []
        self._models: dict[str, nn.Module] = {}
        self._optimizers: tuple[torch.optim.Optimizer, ...] = ()
        torch.manual_seed(self.seed)
        torch.set_num_threads(1)

    def rate(self, usual: float) -> float:
        """The learning rate of this run."""
        return usual * self.asked.rate

    def width(self, usual: int) -> int:
        """The width of this run, a multiple of 8."""
        return max(8, round(usual * self.asked.width / 8) * 8)

    def into(self, optimizers: Any, **models: nn.Module) -> None:
        """Plant the fault into one module that owns parameters; the empty name is that of the only model."""
        self._models = models
        self._optimizers = tuple(optimizers) if isinstance(optimizers, (list, tuple)) else (optimizers,)
        found: dict[str, nn.Module] = {}
        for owner, model in models.items():
            for name, module in model.named_modules():
                if any(p.requires_grad for p in module.parameters(recurse=False)):
                    found[".".join(filter(None, (owner if len(models) > 1 else "", name)))] = module
        names = list(found)
        self.module, self.first_module = names[int(self.asked.where * len(names))], names[0]
        self._target = found[self.module]
        self._print(module=self.module, first_module=self.first_module)  # now: a script may crash later
        if self.asked.fault in ("forward", "backward", "factor"):
            self._target.register_forward_hook(torch.compiler.disable(self._spoilt))

    def _active(self) -> bool:
        asked = self.asked
        here = int(os.environ.get("RANK", "0") or 0) == asked.rank or asked.fault in ("weights", "rate")
        return here and asked.fault is not None and (self.now == asked.at or (asked.lasting and self.now > asked.at))

    def begin(self) -> None:
        """Begin the next optimizer step, before its forward pass."""
        self.now += 1
        if self.now != self.asked.at:
            return
        if self.asked.fault == "weights":
            with torch.no_grad():
                next(p for p in self._target.parameters(recurse=False) if p.requires_grad).mul_(self.asked.size)
        if self.asked.fault == "rate":
            self.raise_rates()

    def raise_rates(self) -> None:
        """Raise every rate thirtyfold, for good."""
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] *= 30.0

    def batch(self, x: Tensor) -> Tensor:
        """The batch as it is, or spoilt."""
        if not self._active() or not x.is_floating_point():
            return x
        if self.asked.fault == "batch":
            return x * self.asked.size
        if self.asked.fault == "pixel":
            x = x.clone()
            x.view(-1)[int(self.asked.where * x.numel())] = math.nan
        return x

    def _spoilt(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not self._active() or not torch.is_grad_enabled():
            return None
        value = output[0] if isinstance(output, tuple) else output
        if self.asked.fault == "forward":
            value = _lost_forward(value, self.asked.variant)
        elif self.asked.fault == "backward":
            value = _lost_backward(value, self.asked.variant)
        else:
            value = _Louder.apply(value, self.asked.size)
        return (value, *output[1:]) if isinstance(output, tuple) else value

    def note(self, loss: Any) -> None:
        """Keep a loss for the line at the end."""
        self._losses.append(float(loss.detach() if isinstance(loss, Tensor) else loss))

    def tell(self) -> None:
        """Print what was planted and how the losses went."""
        finite = [loss for loss in self._losses if math.isfinite(loss)]
        tenth = max(1, len(self._losses) // 10)
        first, last = self._losses[:tenth], self._losses[-tenth:]
        before = [loss for loss in self._losses[: max(0, self.asked.at)] if math.isfinite(loss)]
        self._print(
            start=self._losses[0],
            before=max(before, default=0.0),
            first=sum(first) / tenth,
            last=sum(last) / tenth,
            largest=max(finite, default=math.nan),
            finite=len(finite) == len(self._losses),
        )

    def _print(self, **line: Any) -> None:
        if int(os.environ.get("RANK", "0") or 0) == 0:
            print("PLANTED " + json.dumps(line), flush=True)
