"""The fork rule: one limit for all branches of a task fork, so that no head drowns the trunk and none starves it.

Legend: `_K` one entry a branch. All functions are pure: state in, state out, tensors on the device, no host
    sync.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fork_state(num_branches: int, device: torch.device) -> Tensor:
    """The memory of a fork before its first signal: (num_branches,) zeros, where 0 means "no signal seen yet"."""
    return torch.zeros(num_branches, dtype=torch.float32, device=device)


def remember_branch(maximum: Tensor, norm: Tensor, decay: float = 0.999, growth: float = 1.05) -> Tensor:
    """Let one branch's slowly decaying maximum take in the norm of its signal.

        m <- min(max(n, decay m), growth m);  m <- n at the first signal;  unchanged where n is not finite

    The maximum decays slowly, so that a head that has finished keeps its share for about 1 / (1 - decay)
    steps; it grows slowly, so that one spike cannot raise the limit.

    Args:
        maximum: (), L2 norm, units of the signal; 0 before the first signal.
        norm: (), the L2 norm of the branch's signal now, before any bound.
        decay: factor a step by which the memory fades.
        growth: largest factor a step by which it grows.

    Returns:
        (), the new maximum.

    >>> remember_branch(torch.tensor(2.0), torch.tensor(100.0)).item() == torch.tensor(2.0 * 1.05).item()
    True

    Source: the project's trials; there is no published rule of this form.
    """
    seen = torch.minimum(torch.maximum(norm, decay * maximum), growth * maximum)
    new = torch.where(maximum > 0, seen, norm)
    return torch.where(torch.isfinite(norm), new, maximum)


def fork_limit(maximum_K: Tensor) -> Tensor:
    """The limit of every branch: the smallest of the branches' maxima.

        limit = min over branches k with m_k > 0 of m_k

    Args:
        maximum_K: (K,), L2 norms; a branch at 0 has not carried a signal yet and is left out.

    Returns:
        (), inf where no branch has a maximum.

    >>> fork_limit(torch.tensor([3.0, 0.0, 2.0])).item()
    2.0
    """
    none = torch.full_like(maximum_K, float("inf"))
    return torch.where(maximum_K > 0, maximum_K, none).amin()
