"""Quarantine: a row that would spoil a batch statistic becomes an ordinary row, and carries no loss and no signal.

row i of the activation is bad if it is not finite, or ||x_i|| > 3 running medians
x_i <- the nearest sound row before it, without its graph;   d_i <- 0 at the model's outputs and below the joint
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .layers import length, looks, row_shape, spread, wide
from .limits import RunningLimit

__all__ = ["BATCH_NORMS", "Keeper", "Quarantine"]

BATCH_NORMS = nn.modules.batchnorm._BatchNorm


class Keeper(Protocol):
    """Who keeps the rows that are in quarantine until the model's outputs are made."""

    def keep(self, name: str, ratio_S: Tensor, bad_S: Tensor) -> None:
        """Note the rows; their signal is left out."""


class Quarantine:
    """The rows of one activation in front of a statistic of the batch.

    Args:
        name: of the module, for the notes.
        keeper: who leaves the rows' signal out.
        batch_dim: the dimension of the samples.
        factor: largest ratio of a row's norm to the running median; inf: rows that are not finite alone.
    """

    def __init__(self, name: str, keeper: Keeper, batch_dim: int = 0, factor: float = 3.0) -> None:
        self.name, self.keeper, self.batch_dim = name, keeper, batch_dim
        self.rule = RunningLimit(quantile=0.5, factor=factor)
        self.scale: Tensor | None = None
        self.bad_S: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """The activation with ordinary rows in the place of bad ones."""
        self.bad_S = None
        if x.dim() < 2 or x.numel() == 0:
            return x
        rows = row_shape(x.shape, x.dim() - self.batch_dim - 1, self.batch_dim)
        norm_S = wide(length(x, rows))
        finite_S = norm_S.isfinite()
        scale = norm_S.new_zeros(()) if self.scale is None else self.scale.to(norm_S)
        self.scale, limit = self.rule.follow(scale, norm_S, finite_S & (norm_S > 0))
        bad_S = ~finite_S | (norm_S > limit)
        if looks(x) and not bool(bad_S.any()):
            return x
        self.bad_S = bad_S
        self.keeper.keep(self.name, torch.where(finite_S, norm_S / limit, math.nan), bad_S)
        return self._replaced(x, bad_S)

    def again(self, x: Tensor) -> Tensor:
        """The same rows replaced as in the call before: what a recomputation of activations needs."""
        return (
            x if self.bad_S is None or self.bad_S.numel() != x.shape[self.batch_dim] else self._replaced(x, self.bad_S)
        )

    def around_norm(self, norm: Any, forward: Any, x: Tensor) -> Any:
        """Run a batch normalisation whose running statistics stay as they are where no row is sound."""
        bad_S = self.bad_S
        if bad_S is None or norm.running_mean is None:
            return forward(x)
        before = norm.running_mean.clone(), norm.running_var.clone()
        y = forward(x)
        sound = ~bad_S.all()
        for now, old in zip((norm.running_mean, norm.running_var), before, strict=True):
            # Through .data: backward holds these tensors, does not read them, and would refuse a new version.
            now.data.copy_(torch.where(sound, now, old))
        return y

    def _replaced(self, x: Tensor, bad_S: Tensor) -> Tensor:
        rows = row_shape(x.shape, x.dim() - self.batch_dim - 1, self.batch_dim)
        place_S = torch.arange(bad_S.numel(), device=x.device)
        first = (~bad_S).to(torch.uint8).argmax()
        nearest_S = torch.where(bad_S, -1, place_S).cummax(0).values
        nearest_S = torch.where(nearest_S < 0, first, nearest_S)
        ordinary = x.detach().index_select(self.batch_dim, nearest_S)
        ordinary = torch.where(bad_S.all(), torch.zeros((), dtype=x.dtype, device=x.device), ordinary)
        return torch.where(spread(bad_S, rows), ordinary, x)
