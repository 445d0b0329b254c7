"""The methods under fault: each bounds the gradients of a step its own way, then lets the optimizer update.

Nothing is tuned here: a global clip at 1, as users copy it from one another, and the methods' own defaults.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

import gradsplit as gs
from gradsplit.budget import DEFAULT_OF_GSO, DEFAULT_OF_SPLITTER
from gradsplit.budget.base import Budget
from gradsplit.lab.task import Task

__all__ = ["METHODS", "WITH_HISTORY", "Method", "ZClip"]


class Method(Protocol):
    """Between backward and the next step.

    Attributes:
        rolls_back: whether a run with broken weights may recover.
        stopped: whether the method has ended the run by itself.
        zeroed_share: share of all (bin, step) pairs that were zeroed, nan where nothing is split.
    """

    rolls_back: bool
    stopped: bool
    zeroed_share: float

    def update(self, loss: Tensor) -> int:
        """Update the model; returns how many steps this cost: 1 for a skipped step, more for a rollback."""


class Alone:
    """The optimizer, and nothing before it."""

    rolls_back = stopped = False
    zeroed_share = math.nan

    def __init__(self, task: Task, optimizer: Optimizer) -> None:
        self.parameters = [p for p in task.model.parameters() if p.requires_grad]
        self.optimizer = optimizer

    def bound(self) -> bool:
        """Bound the gradients; whether the step goes on."""
        return True

    def update(self, loss: Tensor) -> int:
        """Bound, update; a gradient of which nothing is left is a lost step."""
        if not self.bound():
            return 1
        lost = not any(bool(p.grad.any()) for p in self.parameters if p.grad is not None)
        self.optimizer.step()
        return int(lost)


class Clip(Alone):
    """`torch.nn.utils.clip_grad_norm_` at 1."""

    def bound(self) -> bool:
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        return True


class SkipNotFinite(Alone):
    """The whole step is left out if any gradient is not finite, however often: as `optax.apply_if_finite`."""

    def bound(self) -> bool:
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        pieces = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
        finite = torch.stack([piece.isfinite().all() for piece in pieces]).all().float()
        if any(isinstance(g, DTensor) for g in gradients):  # one rank sees what the others must know
            dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        return bool(finite)


class ZClip(Alone):
    """ZClip with its defaults (arXiv 2504.02507 and its authors' code): z-scores of the global norm, then a limit of 1.

    Steps 1 to 25 collect norms n; then mu and var are their mean and variance, and with sigma = sqrt(var)

        z = (n - mu) / (sigma + 1e-6);   z > 2.5:  limit = mu + 2.5^2 / z sigma      else n
        mu <- .97 mu + .03 limit;        var <- .97 var + .03 (limit - mu)^2

    and the gradient is scaled to min(limit, 1). As there, nothing looks for values that are not finite.
    """

    beta, z, warmup, max_norm = 0.97, 2.5, 25, 1.0

    def __init__(self, task: Task, optimizer: Optimizer) -> None:
        super().__init__(task, optimizer)
        self.norms: list[float] = []
        self.mean = self.variance = 0.0

    def bound(self) -> bool:
        """Scale all gradients by one factor."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        limit = min(self._limit(norm), self.max_norm)
        if norm > limit:
            for p in self.parameters:
                if p.grad is not None:
                    p.grad.mul_(limit / (norm + 1e-6))
        return True

    def _limit(self, norm: float) -> float:
        """The norm that is let through, before `max_norm`; enters it into the statistics."""
        if len(self.norms) < self.warmup:
            self.norms.append(norm)
            self.mean = math.fsum(self.norms) / len(self.norms) if math.isfinite(norm) else norm
            self.variance = sum((n - self.mean) ** 2 for n in self.norms) / len(self.norms)
            return norm
        sigma = self.variance**0.5
        score = (norm - self.mean) / (sigma + 1e-6)
        let = self.mean + self.z**2 / score * sigma if score > self.z else norm
        self.mean = self.beta * self.mean + (1 - self.beta) * let
        self.variance = self.beta * self.variance + (1 - self.beta) * (let - self.mean) ** 2
        return let


class Split(Alone):
    """GradientSplitter over rows: the default in front of SGD; in front of Adam the two bounds of GSO's default.

    Attributes:
        history: budgets beside these.
    """

    history: tuple[Budget, ...] = ()

    def __init__(self, task: Task, optimizer: Optimizer) -> None:
        super().__init__(task, optimizer)
        sgd = isinstance(optimizer, torch.optim.SGD)
        usual = (DEFAULT_OF_SPLITTER,) if sgd else DEFAULT_OF_GSO
        self.splitter = gs.GradientSplitter(task.model, budget=(*self.history, *usual), cap_updates=not sgd)
        self.splitter.attach(optimizer)
        self.splitter.sinks.append(self._count)
        self._zeroed, self._pairs, self._all_zero = 0, 0, False

    @property
    def zeroed_share(self) -> float:  # type: ignore[override]
        """Share of all (bin, step) pairs that were not finite and became zero."""
        return self._zeroed / max(self._pairs, 1)

    def _count(self, record: gs.record.StepRecord) -> None:  # type: ignore[name-defined]
        finite_B = record.decision.finite_B
        self._zeroed += int((~finite_B).sum())
        self._pairs += len(finite_B)
        self._all_zero = not bool(record.decision.scale_B.any())

    def update(self, loss: Tensor) -> int:
        """The splitter runs within the optimizer's step."""
        self.optimizer.step()
        return int(self._all_zero)


class Guarded(Split):
    """The same splitter with a `Guard` behind it, whose snapshots are 20 steps apart; all else is its default."""

    rolls_back = True

    def __init__(self, task: Task, optimizer: Optimizer) -> None:
        super().__init__(task, optimizer)
        self.guard = gs.Guard(task.model, optimizer, self.splitter, every=20)

    def update(self, loss: Tensor) -> int:
        """The guard judges every step; one without a rollback left ends the run where the last snapshot was."""
        lost = super().update(loss)
        try:
            action = self.guard.step(loss)
        except gs.DivergenceError:
            self.stopped = True
            return lost
        return lost if action is None else action.num_undone


class SplitByMean(Split):
    """The same splitter; besides, no row may exceed half as much again as the running mean of its own norms."""

    history = (gs.Ema(1.5),)


class SplitByQuantile(Split):
    """The same splitter; besides, no row may exceed the upper tenth of its own norms."""

    history = (gs.Percentile(0.9),)


METHODS: dict[str, Callable[[Task, Optimizer], Method]] = {
    "none": Alone,
    "clip 1": Clip,
    "skip": SkipNotFinite,
    "ZClip": ZClip,
    "splitter": Split,
    "Guard": Guarded,
}

WITH_HISTORY: dict[str, Callable[[Task, Optimizer], Method]] = {
    "splitter + Ema": SplitByMean,
    "splitter + Percentile": SplitByQuantile,
}
"""Against large finite values; run for these faults only."""
