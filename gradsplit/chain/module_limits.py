"""Limits on the parameter gradients of each module: what the fork rule needs beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ..budget import Fixed
from ..plan import Boxes, Layout, Plan, one_device
from ..split import Split

__all__ = ["ModuleLimits", "modules_with_parameters"]


def modules_with_parameters(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Every module that owns trainable parameters itself, with these parameters; a tied one counts once.

    >>> list(modules_with_parameters(nn.Sequential(nn.Linear(2, 2), nn.Tanh())))
    ['0']
    """
    seen: set[int] = set()
    owners: dict[str, list[nn.Parameter]] = {}
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if p.requires_grad and id(p) not in seen]
        seen.update(id(p) for p in own)
        if own:
            owners[name or "(root)"] = own
    return owners


class ModuleLimits:
    """Bound the gradient of every module by its equal part of one total, in place.

        limit = total / sqrt(M);  g_m <- g_m min(1, limit / ||g_m||);  a module that is not finite is zeroed

    The squares of all modules add to at most total^2, so this bounds the whole gradient by ``total`` too. No module can
    take another's part. Sharded parameters cost one all-reduce per step.

    Args:
        owners: the parameters of each of the M modules, by its name.
        total: L2 norm, gradient units, > 0.

    >>> layer = nn.Linear(1, 1, bias=False)
    >>> layer.weight.grad = torch.full((1, 1), 5.0)
    >>> ModuleLimits({"layer": [layer.weight]}).bound_().tolist(), layer.weight.grad.item()
    ([5.0], 1.0)
    """

    def __init__(self, owners: Mapping[str, Sequence[nn.Parameter]], total: float = 1.0) -> None:
        pairs = [(f"{name}/{i}", p) for name, own in owners.items() for i, p in enumerate(own)]
        self.parameters = [p for _, p in pairs]
        layout = Layout(tuple(name for name, _ in pairs), tuple(tuple(int(n) for n in p.shape) for _, p in pairs))
        one_device(pairs, call="ChainSplitter")
        rows, cols = np.array(layout.rows), np.array(layout.cols)
        module_T = np.repeat(np.arange(len(owners)), [len(own) for own in owners.values()])
        zeros, filled = np.zeros_like(rows), rows * cols > 0
        columns = (np.arange(len(rows)), zeros, rows, zeros, cols, np.unique(module_T[filled], return_inverse=True)[1])
        boxes = Boxes.from_columns(*(column[filled] for column in columns[:5]), columns[5].reshape(-1))
        plan, tensors = Plan(layout, boxes), [torch.view_as_real(p) if p.is_complex() else p for p in self.parameters]
        limit = total / math.sqrt(max(1, plan.num_bins))
        self.split = Split(plan, tensors, Fixed(limit), call="ChainSplitter")

    @torch.no_grad()
    def bound_(self) -> Tensor:
        """Bound the gradients as they are now; return the norms before, (M,), inf where not finite; no host sync."""
        gradients = [None if p.grad is None else p.grad for p in self.parameters]
        gradients = [torch.view_as_real(g) if g is not None and g.is_complex() else g for g in gradients]
        _, decision = self.split.bound_(gradients)
        norms: Tensor = torch.where(decision.finite_B, decision.norm_B, math.inf)
        return norms
