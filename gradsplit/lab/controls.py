"""What stands between backward and the update: nothing, a global clip, or a GradientSplitter; and what it counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

import gradsplit as gs

from ..plan import STRATEGIES, Plan
from ..split import StepRecord
from .task import Task

__all__ = ["CALIBRATION_STEPS", "Control", "GlobalClip", "NoControl", "Split", "Tally", "tree_limits"]

CALIBRATION_STEPS = 8


_DEEPEST = 30.0  # powers of ten that a zeroed bin counts for


class Tally:
    """Counts over steps, kept on the gradients' device until somebody asks.

    Args:
        num_bins: B.
        name_of: bin's index -> name.
    """

    def __init__(self, num_bins: int, name_of: Callable[[int], str]) -> None:
        self.num_bins, self.name_of = num_bins, name_of
        self.steps = 0
        self.scaled_B = torch.zeros(num_bins, dtype=torch.float64)
        self.zeroed_B = torch.zeros(num_bins, dtype=torch.float64)
        self.depth_B = torch.zeros(num_bins, dtype=torch.float64)

    def add(self, scale_B: Tensor, finite_B: Tensor) -> None:
        """Count one step.

        Args:
            scale_B: (B,) factors in [0, 1].
            finite_B: (B,) whether the bin's gradient was finite.
        """
        if self.scaled_B.device != scale_B.device:
            self.scaled_B, self.zeroed_B, self.depth_B = (
                x.to(scale_B.device) for x in (self.scaled_B, self.zeroed_B, self.depth_B)
            )
        self.steps += 1
        self.scaled_B += (scale_B < 1) & finite_B
        self.zeroed_B += ~finite_B
        depth_B = -torch.log10(scale_B.double().clamp(min=10**-_DEEPEST))
        self.depth_B += torch.where(finite_B, depth_B, torch.full_like(depth_B, _DEEPEST))

    def add_record(self, record: StepRecord) -> None:
        """Count one step of a GradientSplitter; a sink."""
        self.add(record.decision.scale_B, record.decision.finite_B)

    @property
    def scaled_share(self) -> float:
        """Share of all (bin, step) pairs that were scaled."""
        return float(self.scaled_B.sum()) / max(self.steps * self.num_bins, 1)

    @property
    def zeroed_share(self) -> float:
        """Share of all (bin, step) pairs that were not finite and became zero."""
        return float(self.zeroed_B.sum()) / max(self.steps * self.num_bins, 1)

    def worst(self, k: int = 5) -> list[tuple[str, float]]:
        """The k bins with the smallest geometric mean scale, as (name, mean scale); bins never touched are left out."""
        depth, order = torch.sort(self.depth_B.cpu(), descending=True, stable=True)
        steps = max(self.steps, 1)
        return [
            (self.name_of(int(b)), float(10 ** (-d / steps)))
            for d, b in zip(depth[:k].tolist(), order[:k].tolist(), strict=True)
            if d > 0
        ]


class Control(Protocol):
    """Bounds the gradients of one step, in place.

    Attributes:
        tally: what it did, or None where it does nothing.
    """

    tally: Tally | None

    def bound(self) -> None:
        """Act on the gradients of this step."""


class NoControl:
    """Leaves the gradients alone."""

    tally: Tally | None = None

    def bound(self) -> None:
        """Do nothing."""


class GlobalClip:
    """torch's own `clip_grad_norm_` over the whole model: one bin, one limit, and NaN everywhere for one NaN."""

    def __init__(self, task: Task, limit: float) -> None:
        self.parameters = [p for p in task.model.parameters() if p.requires_grad]
        self.limit = limit
        self.tally: Tally | None = Tally(1, lambda _: "all")

    def bound(self) -> None:
        """Scale all gradients by min(1, limit / norm)."""
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.limit)
        if self.tally is not None:
            scale = (self.limit / (norm + 1e-6)).clamp(max=1.0).reshape(1)
            finite = norm.isfinite().reshape(1)
            self.tally.add(torch.where(finite, scale, torch.zeros_like(scale)), finite)


class Split:
    """A `GradientSplitter`, calibrated on batches of its own where the strategy needs energies.

    Args:
        task: whose gradients to bound.
        optimizer: its learning rate is what `RelativeStep` reads.
        strategy: a name of `gradsplit.plan.STRATEGIES`.
        budget: a budget, or for "tree_sp" a function from the plan to budgets by level.
        first_unused: the first step whose batch no training step draws.
    """

    def __init__(
        self,
        task: Task,
        optimizer: torch.optim.Optimizer,
        strategy: str,
        budget: gs.Budget | Callable[[Plan], Mapping[str, gs.Budget]],
        first_unused: int,
    ) -> None:
        plan: str | Plan = strategy
        budgets: Any = budget
        if not isinstance(budget, gs.Budget):
            plan = gs.tree_sp(gs.layout_of(task.model))
            budgets = budget(plan)
        self.splitter = gs.GradientSplitter(task.model, plan, budgets, optimizer=optimizer)
        if STRATEGIES[strategy].needs_energy:
            self.splitter.calibrate(_backward_passes(task, first_unused), CALIBRATION_STEPS)
        bins = self.splitter.plan.bins
        self.tally: Tally | None = Tally(len(bins), lambda b: bins[b].name)
        self.splitter.sinks.append(self.tally.add_record)

    def bound(self) -> None:
        """Measure, decide, apply."""
        self.splitter.step()


def _backward_passes(task: Task, first: int) -> Callable[[], None]:
    """Backward passes over batches after those of the training, so that no method sees a training batch twice."""
    at = iter(range(first, first + CALIBRATION_STEPS))

    def closure() -> None:
        task.loss(task.model, task.batch(next(at))).backward()

    return closure


def tree_limits(plan: Plan, root: float, rule: Callable[[Any], gs.Budget] = gs.Fixed) -> Mapping[str, gs.Budget]:
    """Limits that loosen on the way down: `root` at the root, twice that at the tensors, between them at the modules.

    A parent whose children may keep no more than it may never binds, so every level is looser than the one above:
    a module at depth d of D has root * 2^(d / D).

    Args:
        plan: from `tree_sp`.
        root: limit of the root, in the units of `rule`.
        rule: `Fixed`, one limit per node, or `Relative`, whose factor at the modules is root * sqrt(2).

    >>> plan = gs.tree_sp(gs.Layout.from_shapes({"a.w": (2, 3), "a.b": (2,)}))
    >>> tree_limits(plan, 1.0)["module"].limit                         # one module at half the way
    (1.4142135623730951,)
    """
    modules = plan.level_nodes("module")
    budgets: dict[str, gs.Budget] = {"root": rule(root), "tensor": rule(2 * root)}
    if not len(modules):
        return budgets
    if rule is not gs.Fixed:
        return {**budgets, "module": rule(root * 2**0.5)}
    depth_N = np.zeros(plan.num_nodes, dtype=np.int64)
    for node in range(1, plan.num_nodes):
        depth_N[node] = depth_N[plan.parents_N[node]] + 1
    deepest = depth_N[plan.level_nodes("tensor")].max()
    return {**budgets, "module": rule(tuple((root * 2.0 ** (depth_N[modules] / deepest)).tolist()))}
