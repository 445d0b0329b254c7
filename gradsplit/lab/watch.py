"""Norms of every node of the module tree over a run, before and after control: what the heat maps show."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import gradsplit as gs

from ..budget import Nodes
from ..distributed import make_kernel
from ..plan import named_trainable

__all__ = ["NormHistory", "NormWatch"]

COLUMNS = 120  # steps kept of a run, evenly spread: more than a heat map has pixels for is waste


@dataclass
class NormHistory:
    """L2 norms of nodes, (steps kept, N), gradient units.

    Attributes:
        names: (N,) names of the nodes, root first, each module before what is in it.
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
        self.kernel = make_kernel(plan, self.parameters, call="NormWatch")
        self.plan, nodes = plan, plan.nodes
        self.kept = _worth_showing(plan)
        self.history = NormHistory([nodes[i].name for i in self.kept], [nodes[i].level for i in self.kept])
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
        return squares_N.sqrt()[self.kept].cpu().tolist()


def _worth_showing(plan: gs.Plan) -> list[int]:
    """The tree's nodes down to the tensors, depth first; a module with one child is left out: it says the same."""
    children: dict[int, list[int]] = {}
    for node, parent in enumerate(plan.parents_N.tolist()):
        children.setdefault(parent, []).append(node)
    # As the layout has them: the tree numbers nodes level by level.
    place = {name: at for at, name in enumerate(plan.layout.names)}
    nodes, order, waiting = plan.nodes, [], [0]

    def first_tensor(node: int) -> int:
        while nodes[node].level != "tensor":
            node = children[node][0]
        return place[nodes[node].name]

    while waiting:
        node = waiting.pop()
        level = nodes[node].level
        below = [] if level == "tensor" else sorted(children[node], key=first_tensor, reverse=True)
        if level in ("root", "tensor") or len(below) > 1:
            order.append(node)
        waiting += below
    return order
