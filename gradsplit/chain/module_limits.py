"""Per-module limits on parameter gradients: what the fork rule needs beside it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..distributed import is_sharded, kernel_for
from ..kernels import make_kernel
from ..plan import Boxes, Layout, Plan
from .signal_limits import signal_norm


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


def kernel_over_ranks(owners: Iterable[list[nn.Parameter]]) -> Any | None:
    """Return what adds the squares of each module over the ranks that hold its shards; None if nothing is sharded."""
    lists = list(owners)
    parameters = [p for own in lists for p in own]
    if not any(is_sharded(p) for p in parameters):
        return None
    layout = Layout.from_shapes({str(i): tuple(p.shape) for i, p in enumerate(parameters)})
    rows, cols = np.array(layout.rows), np.array(layout.cols)
    module_T = np.repeat(np.arange(len(lists)), [len(own) for own in lists])
    zeros, filled = np.zeros_like(rows), rows * cols > 0
    columns = (np.arange(len(rows)), zeros, rows, zeros, cols, np.unique(module_T[filled], return_inverse=True)[1])
    boxes = Boxes.from_columns(*(column[filled] for column in columns[:5]), columns[5].reshape(-1))
    device = parameters[0].device
    return kernel_for(
        Plan(layout, boxes), parameters, lambda local: make_kernel("auto", local, device, call="ChainSplitter")
    )


def bound_modules(owners: Iterable[list[nn.Parameter]], total: float = 1.0, kernel: Any | None = None) -> Tensor:
    """Bound the gradient of every module by its equal part of one total, in place.

        limit = total / sqrt(M);  g_m <- g_m min(1, limit / ||g_m||);  a module that is not finite is zeroed

    Squares of all modules add to at most total^2, so this bounds the whole gradient by `total` too, but no
    module can take another's part.

    Args:
        owners: the parameters of each module.
        total: L2 norm, gradient units.
        kernel: from `kernel_over_ranks`; one all-reduce then makes the norms those of the whole modules.

    Returns:
        norm_M (M,): the norms before, on the gradients' device; no host sync.

    >>> layer = nn.Linear(1, 1, bias=False); layer.weight.grad = torch.full((1, 1), 5.0)
    >>> bound_modules([[layer.weight]]).tolist(), layer.weight.grad.item()
    ([5.0], 1.0)
    """
    if kernel is not None:
        return _bound_over_ranks([p.grad for own in owners for p in own], total, kernel)
    lists = [[p.grad for p in own if p.grad is not None] for own in owners]
    limit = total / math.sqrt(max(1, len(lists)))
    norms = []
    for grads in lists:
        if not grads:
            norms.append(torch.zeros(()))
            continue
        norm = torch.linalg.vector_norm(torch.stack([signal_norm(grad).to(grads[0].device) for grad in grads]))
        norms.append(norm)
        finite = torch.isfinite(norm)
        scale = torch.where(finite, (limit / norm.clamp(min=1e-38)).clamp(max=1.0), torch.zeros_like(norm))
        if norm.device.type == "cpu" and float(scale) == 1.0:
            continue
        torch._foreach_mul_(grads, scale)
        for grad in grads:
            # multiplying by zero leaves a NaN where it was: zeros are written
            grad.masked_fill_(~finite, 0.0)
    return torch.stack([n.to(norms[0].device) for n in norms]) if norms else torch.zeros(0)


def _bound_over_ranks(gradients: list[Tensor | None], total: float, kernel: Any) -> Tensor:
    squares = kernel.squares(gradients)
    finite, limit = torch.isfinite(squares), total / math.sqrt(len(squares))
    norms = torch.where(finite, squares, 0.0).sqrt()
    kernel.scale_(gradients, (limit / norms.clamp(min=1e-38)).clamp(max=1.0), ~finite)
    return torch.where(finite, norms, float("inf"))
