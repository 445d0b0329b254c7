"""Norms of every node of the module tree over a run, before and after control: what the heat maps show."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import gradsplit as gs
from gradsplit.budget import Nodes
from gradsplit.kernels import make_kernel
from gradsplit.plan import named_trainable

__all__ = ["NormHistory", "NormWatch"]

COLUMNS = 120  # steps kept of a run, evenly spread: more than a heat map has pixels for is waste


@dataclass
class NormHistory:
    """L2 norms of nodes, (steps kept, N), gradient units.

    Attributes:
        names: (N,) names of the nodes, root first.
        levels: (N,) "root", "module" or "tensor".
        steps: the steps kept.
        before: a row of N norms for every step kept, as measured; not finite where an entry was not.
        after: the same after control; equal to `before` where nothing acts on gradients.
    """

    names: list[str]
    levels: list[str]
    steps: list[int] = field(default_factory=list)
    before: list[list[float]] = field(default_factory=list)
    after: list[list[float]] = field(default_factory=list)


class NormWatch:
    """Measures the module tree's nodes on every `total / COLUMNS`-th step.

    Args:
        model: whose gradients to measure.
        total: steps of the run.
    """

    def __init__(self, model: nn.Module, total: int) -> None:
        pairs = named_trainable(model)
        self.parameters: list[Tensor] = [parameter for _, parameter in pairs]
        plan = gs.tree_sp(gs.layout_of(model))
        self.kernel = make_kernel("auto", plan, self.parameters[0].device, call="NormWatch")
        nodes = plan.nodes
        self.kept_N = [node.index for node in nodes if node.level != "bin"]
        self.history = NormHistory([nodes[i].name for i in self.kept_N], [nodes[i].level for i in self.kept_N])
        self.plan = plan
        self.every = max(1, total // COLUMNS)

    def wants(self, step: int) -> bool:
        """Whether this step is kept."""
        return step % self.every == 0

    def before(self, step: int) -> None:
        """Measure what backward left."""
        self.history.steps.append(step)
        self.history.before.append(self._norms())

    def after(self) -> None:
        """Measure what control left."""
        self.history.after.append(self._norms())

    @torch.no_grad()
    def _norms(self) -> list[float]:
        gradients: list[Any] = [parameter.grad for parameter in self.parameters]
        squares_B = self.kernel.squares(gradients)
        squares_N = Nodes.of(self.plan, squares_B).sums_N(squares_B)
        return squares_N.sqrt()[self.kept_N].cpu().tolist()
