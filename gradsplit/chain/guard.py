"""The guard of an ordinary joint: 3 times a running median of the joint's own norm.

Pure functions of 0-d tensors on the device; no host sync. The running median is the geometric quantile
tracker of Andrew et al. 2019 (arXiv 1905.03871) at quantile one half: each signal counts as "above" or
"below" and nothing more, so a spike of any size moves the median by one small step.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def follow_median(median: Tensor, norm: Tensor, step: int) -> Tensor:
    """Move a running median towards the norm by a fixed factor.

        C <- C exp(-eta (b - 1/2)),  b = share of norms at or below C,  eta = max(0.05, 1 / (1 + step))

    Args:
        median: (), L2 norm, units of the signal; 0 before the first signal.
        norm: () or (samples,), the norms of this step, before any bound; entries that are not finite, or
            zero, do not count.
        step: how many signals the joint has seen; the first ones move the median further.

    Returns:
        (), the new median; the median of the first step's norms at the first step.

    Deviations from the source: eta falls from 1 to 0.05, since a training run starts without a guess of the
        norm.

    >>> follow_median(torch.tensor(2.0), torch.tensor(1e9), 1000).item() == torch.tensor(2.0 *
    math.exp(0.025)).item() True
    """
    counts = torch.isfinite(norm) & (norm > 0)
    number = counts.sum()
    below = ((norm <= median) & counts).sum() / number.clamp(min=1)
    eta = max(0.05, 1.0 / (1 + step))
    moved = median * torch.exp(-eta * (below - 0.5))
    first = torch.where(counts, norm, torch.full_like(norm, math.nan)).nanmedian()
    new = torch.where(median > 0, moved, first)
    return torch.where(number > 0, new, median)


def guard_limit(median: Tensor, factor: float = 3.0) -> Tensor:
    """The limit of an ordinary joint: `factor` times the running median, inf before the first signal.

    >>> guard_limit(torch.tensor(2.0)).item()
    6.0
    """
    return torch.where(median > 0, factor * median, torch.full_like(median, math.inf))
