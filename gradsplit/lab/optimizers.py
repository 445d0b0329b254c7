"""The optimizers that comparisons train with, by name, and the schedule of their learning rate.

All Adam-like ones take the same betas and weight decay, so that a comparison compares methods and not constants.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import gradsplit as gs

from .task import MissingPackageError, reject_unknown

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "MuonWithAdamW",
    "Settings",
    "make_optimizer",
    "make_schedule",
    "rate_factor",
    "state_per_weight",
]

SCHEDULES = ("constant", "cosine", "linear")
FLOOR = 0.01  # of the learning rate, at the end of a cosine


@dataclass(frozen=True)
class Settings:
    """How a run is trained, apart from method, strength, learning rate and seed.

    Attributes:
        steps: updates.
        optimizer: a name of `OPTIMIZERS`; methods that are optimizers themselves ignore it.
        schedule: "constant", "cosine" (to 1 % of the learning rate), or "linear" (to zero).
        warmup: steps of warm-up *of the methods that warm up*; None: a tenth of `steps`. The others have none.
        beta2: memory of Adam's second moment.
        weight_decay: decoupled, of the Adam-like ones; SGD has none.
    """

    steps: int
    optimizer: str = "sgdm"
    schedule: str = "constant"
    warmup: int | None = None
    beta2: float = 0.99
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        reject_unknown("Settings", "optimizer", self.optimizer, BASE_OPTIMIZERS)
        reject_unknown("Settings", "schedule", self.schedule, SCHEDULES)
        if self.steps < 1:
            raise ValueError(f"Settings(steps={self.steps}): expected at least one step.")
        if self.warmup is not None and not 0 <= self.warmup < self.steps:
            raise ValueError(f"Settings(warmup={self.warmup}): expected 0 <= warmup < steps, here {self.steps}.")

    @property
    def warmup_steps(self) -> int:
        """Steps of warm-up of a method that warms up."""
        return self.steps // 10 if self.warmup is None else self.warmup

    @property
    def adam(self) -> dict[str, Any]:
        """What every Adam-like optimizer is given."""
        return {"betas": (0.9, self.beta2), "weight_decay": self.weight_decay}


Make = Callable[[nn.Module, float, Settings], torch.optim.Optimizer]


def _package(package: str, name: str) -> Any:
    """An optimizer class from a package that only comparisons need.

    Raises:
        MissingPackageError: the package is not installed.
    """
    try:
        module = importlib.import_module(package)
    except ImportError as error:
        pip = package.replace("_", "-")
        raise MissingPackageError(
            f"method of the package {pip}: expected it to be installed, found none. Run: pip install {pip}, "
            "or leave the method out."
        ) from error
    return getattr(module, name)


def _sgd(momentum: float) -> Make:
    return lambda model, lr, settings: torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)


def _schedulefree(model: nn.Module, lr: float, settings: Settings) -> torch.optim.Optimizer:
    # It warms up by itself, and has no other schedule: that is its promise.
    made = _package("schedulefree", "AdamWScheduleFree")
    return made(model.parameters(), lr=lr, warmup_steps=settings.warmup_steps, **settings.adam)


def _prodigy(model: nn.Module, lr: float, settings: Settings) -> torch.optim.Optimizer:
    with contextlib.redirect_stdout(io.StringIO()):  # it announces its weight decay
        return _package("prodigyopt", "Prodigy")(model.parameters(), lr=lr, **settings.adam)


def _soap(model: nn.Module, lr: float, settings: Settings) -> torch.optim.Optimizer:
    # Its own betas: the second one is also the memory of its rotation. A dimension beyond 2,048, such as a vocabulary,
    # is not rotated: its rotation would have more entries than the model.
    return _package("pytorch_optimizer", "SOAP")(
        model.parameters(), lr=lr, weight_decay=settings.weight_decay, max_precondition_dim=2048
    )


def _lion(model: nn.Module, lr: float, settings: Settings) -> torch.optim.Optimizer:
    # Its authors ask for rates that are ten times smaller and a decay that is ten times larger than AdamW's.
    decay = 10 * settings.weight_decay
    return _package("pytorch_optimizer", "Lion")(
        model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=decay, weight_decouple=True
    )


class MuonWithAdamW(torch.optim.Optimizer):
    """torch's Muon on hidden matrices, AdamW on the rest, under one learning rate.

    A convolution (out, in, …) is seen as the matrix (out, in · …), since torch's Muon takes matrices only. Embeddings,
    vectors and output layers go to AdamW; an output layer is one whose name ends with "head".

    Args:
        model: whose parameters are trained.
        lr: of the matrices.
        settings: betas and decay of AdamW, decay of Muon.
        adam: AdamW's learning rate over `lr`.
        scale: torch's `adjust_lr_fn`: "original" (Jordan et al. 2024) or "match_rms_adamw" (Liu et al. 2025).
    """

    def __init__(self, model: nn.Module, lr: float, settings: Settings, *, adam: float, scale: str) -> None:
        tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._hidden = [
            p
            for name, p in named
            if p.ndim >= 2 and id(p) not in tables and not name.rpartition(".")[0].endswith("head")
        ]
        chosen = {id(p) for p in self._hidden}
        rest = [p for _, p in named if id(p) not in chosen]
        # Views of the same memory: what Muon writes to them is what the model has.
        self._matrices = [nn.Parameter(p.data.flatten(1)) for p in self._hidden]
        self._trained = [p for _, p in named]
        self._parts: list[torch.optim.Optimizer] = []
        if self._matrices:
            self._parts.append(
                torch.optim.Muon(
                    self._matrices, lr=lr, weight_decay=settings.weight_decay, momentum=0.95, adjust_lr_fn=scale
                )
            )
        if rest:
            self._parts.append(torch.optim.AdamW(rest, lr=adam * lr, **settings.adam))
        super().__init__(self._trained, {})
        self.param_groups = [group for part in self._parts for group in part.param_groups]  # a schedule moves both

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the model's gradients."""
        for p in self._trained:
            p.grad = None

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update matrices and the rest; the lab passes no closure."""
        for p, matrix in zip(self._hidden, self._matrices, strict=True):
            matrix.grad = None if p.grad is None else p.grad.flatten(1)
        for part in self._parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """The states of both parts, one after the other."""
        return {"state": [part.state_dict()["state"] for part in self._parts], "param_groups": []}


def state_per_weight(optimizer: torch.optim.Optimizer, model: nn.Module) -> float:
    """Bytes that an optimizer keeps between two steps over the bytes of the weights that it trains.

    >>> layer = nn.Linear(8, 8, bias=False)
    >>> adam = torch.optim.AdamW(layer.parameters())
    >>> layer(torch.ones(1, 8)).sum().backward(); adam.step()
    >>> round(state_per_weight(adam, layer), 1)
    2.0
    """
    held = {key: value for key, value in optimizer.state_dict().items() if key != "param_groups"}
    weights = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return sum(_tensor_bytes(value) for value in held.values()) / max(weights, 1)


def _tensor_bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(map(_tensor_bytes, value.values()))
    return sum(map(_tensor_bytes, value)) if isinstance(value, (list, tuple)) else 0


OPTIMIZERS: dict[str, Make] = {
    "sgd": _sgd(0.0),
    "sgdm": _sgd(0.9),
    "adam": lambda model, lr, settings: torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, settings.beta2)),
    "adamw": lambda model, lr, settings: torch.optim.AdamW(model.parameters(), lr=lr, **settings.adam),
    "gso": lambda model, lr, settings: gs.GSO(model, lr, **settings.adam),
    "gso-adam": lambda model, lr, settings: gs.GSO(model, lr, **settings.adam, direction="adam"),
    "gso-bin": lambda model, lr, settings: gs.GSO(model, lr, second_moment="bin", **settings.adam, direction="adam"),
    "gso-cap": lambda model, lr, settings: gs.GSO(
        model, lr, budget=gs.RelativeStep(0.03), **settings.adam, direction="adam"
    ),
    "lamb": lambda model, lr, settings: _package("pytorch_optimizer", "Lamb")(
        model.parameters(), lr=lr, **settings.adam
    ),
    "muon": lambda model, lr, settings: MuonWithAdamW(model, lr, settings, adam=1 / 3, scale="original"),
    "muon-rms": lambda model, lr, settings: MuonWithAdamW(model, lr, settings, adam=1.0, scale="match_rms_adamw"),
    "soap": _soap,
    "lion": _lion,
    "prodigy": _prodigy,
    "schedulefree": _schedulefree,
}
"""Name -> maker from (model, learning rate, settings)."""

BASE_OPTIMIZERS = ("sgd", "sgdm", "adam", "adamw")  # what a control may stand in front of


def make_optimizer(name: str, model: nn.Module, lr: float, settings: Settings) -> torch.optim.Optimizer:
    """The optimizer of that name over a model's parameters."""
    reject_unknown("make_optimizer", "name", name, tuple(OPTIMIZERS))
    return OPTIMIZERS[name](model, lr, settings)


def rate_factor(step: int, steps: int, schedule: str, warmup: int) -> float:
    """Learning rate at `step` over the learning rate asked for: a linear rise over `warmup` steps, then the schedule.

    >>> [round(rate_factor(step, 10, "cosine", 2), 3) for step in (0, 1, 2, 6, 10)]
    [0.5, 1.0, 1.0, 0.505, 0.01]
    >>> [rate_factor(step, 10, "linear", 2) for step in (0, 2, 6, 10)]
    [0.5, 1.0, 0.5, 0.0]
    """
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    share = (step - warmup) / max(steps - warmup, 1)
    if schedule == "linear":
        return max(0.0, 1.0 - share)
    return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))


def make_schedule(optimizer: torch.optim.Optimizer, settings: Settings, *, warmup: int) -> LambdaLR:
    """torch's scheduler for `rate_factor`; call its step() after every update."""
    return LambdaLR(optimizer, lambda step: rate_factor(step, settings.steps, settings.schedule, warmup))
