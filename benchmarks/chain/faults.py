"""Faults: how each is planted, and which modules may then be named as guilty."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.chain.fault_models import detect
from gradsplit.chain.joints import replace_tensors
from gradsplit.diagnose.weights import is_norm

Planted = tuple[nn.Module, Callable[[nn.Module, Any], Tensor], set[str], dict[str, Any]]


class Faulty(nn.Module):
    """A module whose first floating output passes through a faulty operation."""

    def __init__(self, inner: nn.Module, operation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.operation = inner, operation

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the inner module, then the operation."""
        done = []

        def change(place: str, tensor: Tensor) -> Tensor:
            if done or not tensor.is_floating_point():
                return tensor
            done.append(place)
            return self.operation(tensor)

        return replace_tensors(self.inner(*args, **kwargs), change)


def weighted(model: nn.Module, lookups: bool = True) -> list[str]:
    """Modules that own a weight of two dimensions or more; a tied weight under its first owner."""
    seen: set[int] = set()
    names = []
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if p.dim() >= 2 and id(p) not in seen]
        seen.update(id(p) for p in own)
        if own and name and (lookups or not isinstance(module, nn.Embedding)):
            names.append(name)
    return names


def pick(entries: list[Any], generator: torch.Generator) -> Any:
    """One entry, uniformly."""
    return entries[int(torch.randint(len(entries), (1,), generator=generator))]


def head_of(model: nn.Module) -> str:
    """The last module with weights of its own."""
    return [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))][-1]


def scale(model: nn.Module, loss_fn: Any, batch: Any, generator: torch.Generator) -> Planted:
    """All weights of one layer times 10 to 1,000."""
    name = pick(weighted(model), generator)
    factor = 10 ** (1 + 2 * float(torch.rand(1, generator=generator)))
    with torch.no_grad():
        for p in model.get_submodule(name).parameters(recurse=False):
            if p.dim() >= 2:
                p.mul_(factor)
    return model, loss_fn, {name}, {"factor": factor}


def wrong_init(model: nn.Module, loss_fn: Any, batch: Any, generator: torch.Generator) -> Planted:
    """The weights of one layer drawn from N(0, 1) or from U(0, 1), whatever its fan-in."""
    name = pick(weighted(model, lookups=False), generator)
    law = pick(["normal(0, 1)", "uniform(0, 1)"], generator)
    with torch.no_grad():
        for p in model.get_submodule(name).parameters(recurse=False):
            if p.dim() >= 2:
                p.copy_(torch.randn(p.shape, generator=generator) if "normal" in law else
                        torch.rand(p.shape, generator=generator))  # fmt: skip
    return model, loss_fn, {name}, {"law": law}


def no_norm(model: nn.Module, loss_fn: Any, batch: Any, generator: torch.Generator) -> Planted:
    """One normalisation replaced by the identity, in front of, or behind, weights as they are."""
    inner = [n for n, m in model.named_modules() if is_norm(m)]
    name = pick(inner[:-1], generator)  # the last one normalises the output: it has no siblings
    _replace(model, name, nn.Identity())
    return model, loss_fn, {name, name.rpartition(".")[0] or name}, {}


def not_a_number(model: nn.Module, loss_fn: Any, batch: Any, generator: torch.Generator) -> Planted:
    """An operation behind one module that breaks forward (log 0, 0/0) or only backward (sqrt 0)."""
    leaves = [n for n, m in model.named_modules() if n and not any(True for _ in m.children())]
    name = pick([n for n in leaves if any(True for _ in model.get_submodule(n).parameters())], generator)
    label, operation = pick(list(BREAKING.items()), generator)
    _replace(model, name, Faulty(model.get_submodule(name), operation))
    return model, loss_fn, {name}, {"operation": label}


def exploding_head(model: nn.Module, loss_fn: Any, batch: Any, generator: torch.Generator) -> Planted:
    """A detector's box loss weighted 100 to 3,000 times; elsewhere a head whose output is exponentiated."""
    size = float(torch.rand(1, generator=generator))
    if loss_fn is detect:
        weight = 10 ** (2 + 1.5 * size)
        return model, functools.partial(detect, weight=weight), {"box_tower", "box_head"}, {"weight": weight}
    name = head_of(model)

    def exponential(x: Tensor) -> Tensor:
        # as steep as takes the largest of the logits at hand to e^7 .. e^12
        return (x * ((7 + 5 * size) / x.detach().abs().max())).exp()

    _replace(model, name, Faulty(model.get_submodule(name), exponential))
    return model, loss_fn, {name}, {"power": 7 + 5 * size}


BREAKING: dict[str, Callable[[Tensor], Tensor]] = {
    "sqrt(0), backward": lambda x: x + (x - x.detach()).abs().sqrt(),
    "log(0)": lambda x: x + 0.1 * (x - x.detach()).abs().log(),
    "0/0": lambda x: x + (x - x.detach()) / (x - x.detach()),
}


@dataclass(frozen=True)
class Fault:
    """How a fault is planted, how often in each model, and the models that cannot have it."""

    plant: Callable[..., Planted]
    count: int
    without: tuple[str, ...] = field(default=())


FAULTS: dict[str, Fault] = {
    "weights x 10 to 1,000": Fault(scale, 12),
    "wrong initialisation": Fault(wrong_init, 6),
    "missing normalisation": Fault(no_norm, 8, without=("LSTM", "GRU", "detector")),
    "NaN-producing operation": Fault(not_a_number, 8),
    "exploding head": Fault(exploding_head, 4),
}


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, new)
