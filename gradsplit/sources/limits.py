"""How large one sample may be beside the others: a running scale of the samples' norms, kept on their device."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

__all__ = ["RULES", "Rule", "RunningLimit", "rule_of"]


class Rule(Protocol):
    """What gives a layer its limit; the scale is 0 before the first batch."""

    def follow(self, scale: Tensor, norm_S: Tensor, counts_S: Tensor) -> tuple[Tensor, Tensor]:
        """The new scale and the limit, both without dimensions, from the norms of the samples that count."""


@dataclass(frozen=True)
class RunningLimit:
    """A multiple of a running quantile of the samples' norms.

        q_t = the quantile of the batch;   m_1 = q_1
        m_t = m_{t-1} exp(min(up log(q_t / m_{t-1}), log growth))   if q_t > m_{t-1},   up -> down otherwise
        limit = factor m_t

    Samples whose norm is zero or not finite do not count. A batch without any that counts leaves the scale as it is.

    Args:
        quantile: in (0, 1]; 0.5 is the lower median.
        factor: limit / scale, above 0.
        up: share of the logarithmic distance by which the scale rises per batch, in (0, 1].
        down: the same share where it falls, in [0, 1].
        growth: largest ratio by which the scale rises per batch, above 1.

    Raises:
        ValueError: a constant outside its range.

    >>> import torch
    >>> norms = torch.tensor([1.0, 2.0, 3.0, 1e9])
    >>> scale, limit = RunningLimit(quantile=0.5, factor=3.0).follow(torch.zeros(()), norms, norms > 0)
    >>> scale.item(), limit.item()
    (2.0, 6.0)

    Source: the project's trials.
    """

    quantile: float = 0.5
    factor: float = 3.0
    up: float = 0.1
    down: float = 0.1
    growth: float = 1.25

    def __post_init__(self) -> None:
        rules = {
            "quantile": (0 < self.quantile <= 1, "in (0, 1]"),
            "factor": (self.factor > 0, "above 0"),
            "up": (0 < self.up <= 1, "in (0, 1]"),
            "down": (0 <= self.down <= 1, "in [0, 1]"),
            "growth": (self.growth > 1, "above 1"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise ValueError(f"RunningLimit({name}={getattr(self, name)!r}): expected a number {rule}.")

    def follow(self, scale: Tensor, norm_S: Tensor, counts_S: Tensor) -> tuple[Tensor, Tensor]:
        """The new scale and the limit; nothing waits for the device."""
        ordered_S = torch.where(counts_S, norm_S, math.inf).sort().values
        count = counts_S.sum()
        index = ((count * self.quantile).ceil().long() - 1).clamp(min=0)
        now = ordered_S.gather(0, index.view(1)).view(())
        distance = (now / scale).log()
        move = torch.where(distance > 0, (self.up * distance).clamp(max=math.log(self.growth)), self.down * distance)
        scale = torch.where(count > 0, torch.where(scale > 0, scale * move.exp(), now), scale)
        return scale, torch.where(scale > 0, self.factor * scale, math.inf)

    def follow_numbers(self, scale: float, norms: np.ndarray) -> tuple[float, float]:
        """The same for numbers, of which all count: on the CPU a call of numpy costs a third of one of torch."""
        if norms.size:
            place = max(math.ceil(norms.size * self.quantile) - 1, 0)
            now = float(np.partition(norms, place)[place])
            if scale > 0:
                distance = math.log(now / scale)
                up = min(self.up * distance, math.log(self.growth))
                scale *= math.exp(up if distance > 0 else self.down * distance)
            else:
                scale = now
        return scale, self.factor * scale if scale > 0 else math.inf


# The norms of classified samples are heavy-tailed, since a fitted sample has almost none: the upper quantile is the
# scale, and falls slowly. Those of regression are not, and there a wide limit lets the outliers through.
RULES: dict[str, Rule] = {
    "classification": RunningLimit(quantile=0.9, factor=2.0, up=0.1, down=0.002),
    "regression": RunningLimit(quantile=0.5, factor=3.0, up=0.1, down=0.1),
}


def rule_of(kind: str | Rule, call: str) -> Rule:
    """The rule that a name stands for, or the rule itself.

    Raises:
        ValueError: neither a name of the table nor an object with ``follow``.
    """
    if isinstance(kind, str) and kind in RULES:
        return RULES[kind]
    if isinstance(kind, str) or not callable(getattr(kind, "follow", None)):
        names = " or ".join(map(repr, RULES))
        raise ValueError(f"{call}(kind={kind!r}): expected {names}, or a rule as RunningLimit(quantile=0.5).")
    return kind
