"""The optimizer's rates per bin: learning rate, pace of its schedule, and how long an update a gradient makes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .plan import Plan

__all__ = ["Rates", "follows_gradient"]


def follows_gradient(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the update is lr times a momentum sum of gradients, as in SGD: bounding gradients bounds steps."""
    return all("dampening" in group and "betas" not in group for group in optimizer.param_groups)


class Rates:
    """Learning rates of a plan's bins, read from an optimizer at every step.

    Args:
        plan: bins over the parameters.
        parameters: one a layout entry.
        optimizer: whose ``param_groups`` hold them.
        call: the caller's name, for errors.

    Raises:
        ValueError: a parameter the optimizer does not hold.
    """

    def __init__(
        self, plan: Plan, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer, *, call: str
    ) -> None:
        self.optimizer = optimizer
        group_of = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
        lost = [name for name, p in zip(plan.layout.names, parameters, strict=True) if id(p) not in group_of]
        if lost:
            raise ValueError(
                f"{call}(optimizer=…): expected an optimizer of this model's parameters, got one without {lost[0]!r} "
                "and "
                f"{len(lost) - 1} more. Pass the optimizer that updates them, or split only what it updates."
            )
        group_T = np.array([group_of[id(p)] for p in parameters], dtype=np.int64)
        group_B = np.zeros(plan.num_bins, dtype=np.int64)
        group_B[plan.bin_K] = group_T[plan.tensor_K]
        device = parameters[0].device
        # One group is the usual case: a single number then serves all bins.
        self._group_B = None if (group_B == group_B[0]).all() else torch.from_numpy(group_B).to(device)
        self._only = int(group_B[0])
        self._device = device
        self.top: list[Any] = [_positive(group["lr"]) for group in optimizer.param_groups]

    def _per_bin(self, values: list[Any], num_bins: int) -> Tensor:
        numbers = [v.to(self._device, torch.float64) if isinstance(v, Tensor) else v for v in values]
        if self._group_B is None:
            one = numbers[self._only]
            return torch.as_tensor(one, dtype=torch.float64, device=self._device).reshape(1).expand(num_bins)
        if not any(isinstance(v, Tensor) for v in numbers):
            return torch.tensor(numbers, dtype=torch.float64, device=self._device).index_select(0, self._group_B)
        stacked = torch.stack(
            [torch.as_tensor(v, dtype=torch.float64, device=self._device).reshape(()) for v in numbers]
        )
        return stacked.index_select(0, self._group_B)

    def pace_B(self, num_bins: int) -> Tensor:
        """Return learning rate now / largest so far, (B,), in [0, 1]; 1 while the rate has been 0 throughout.

        A scheduler's ``initial_lr`` and ``max_lr`` count from the start, so that the pace follows a warm-up too.
        """
        paces: list[Any] = []
        groups = self.optimizer.param_groups
        self.top += [_positive(group["lr"]) for group in groups[len(self.top) :]]  # groups added since
        for i, group in enumerate(groups):
            lr = _positive(group["lr"])
            seen = [self.top[i], lr, *(_positive(group[key]) for key in ("initial_lr", "max_lr") if key in group)]
            self.top[i] = _largest(seen)
            paces.append(lr / self.top[i])
        return self._per_bin(paces, num_bins)

    def value_B(self, key: str, num_bins: int) -> Tensor:
        """Return an option of the groups for each bin, (B,), for example "lr" or "weight_decay"."""
        return self._per_bin([group[key] for group in self.optimizer.param_groups], num_bins)

    def gain_B(self, num_bins: int) -> Tensor:
        """Return the longest update per length of gradient, lr / (1 - momentum), (B,)."""
        groups = self.optimizer.param_groups
        return self._per_bin([_positive(g["lr"]) / (1.0 - g.get("momentum", 0.0)) for g in groups], num_bins)

    def state(self) -> list[float]:
        """Return the largest rate of each group so far."""
        return [float(top) for top in self.top]

    def load(self, tops: Sequence[float]) -> None:
        """Take over the largest rates of a saved run, group by group, whatever this optimizer was made with."""
        tops = tops[: len(self.optimizer.param_groups)]
        self.top[: len(tops)] = [float(top) for top in tops]


def _positive(lr: Any) -> Any:
    """A rate of 0 stands for one too small to matter, so that ratios of rates stay defined."""
    return torch.clamp(lr.detach().to(torch.float64), min=1e-30) if isinstance(lr, Tensor) else max(float(lr), 1e-30)


def _largest(rates: list[Any]) -> Any:
    """The largest of some rates; a tensor where one of them is, so that nothing waits for a device."""
    tensors = [rate for rate in rates if isinstance(rate, Tensor)]
    if not tensors:
        return max(rates)
    like = tensors[0]
    return torch.stack([torch.as_tensor(r, dtype=like.dtype, device=like.device).reshape(()) for r in rates]).amax()
