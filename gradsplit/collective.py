"""The collective rule: a batch that is scaled as a whole is told from single rows by the median over rows.

    c  = median over all bins of ||g_b|| / s_b                       s_b the largest norm that the bin has had of late
    g' = g / c where c > 5

s_b begins as the bin's first norm. Where c > 5 it becomes 1.05 s_b, so that a jump that stays is let through within a
hundred steps. Else it becomes min(max(||g_b||, f s_b), 2 s_b) with f = min(0.98, t / (t + 2)) at step t, so that a
spike in the first steps is soon forgotten. A bin whose gradient is zero or not finite keeps its s_b.

Where fewer than 16 bins have a gradient and a recent norm, the rule is silent. With one or two bins the median is a
single row. With 16, nine must jump at once: if each did so by itself in one step of twenty, that would happen once in
sixty million steps. Every bin is bounded by its own budget all the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["COLLECTIVE", "ENOUGH", "FALLS", "LET_THROUGH", "RISES", "Collective", "Recent"]

COLLECTIVE = 5.0
"""The median ratio of norms to recent norms beyond which the batch counts as scaled as a whole."""

LET_THROUGH, FALLS, RISES = 1.05, 0.98, 2.0

ENOUGH = 16
"""The number of bins with a gradient and a recent norm from which a median says anything of the whole batch."""


class Collective:
    """Tells a batch that is scaled as a whole from single rows, by the median over rows; parts of a model share one.

    Args:
        one_by_one: tensors come one after the other, during the backward pass. The median is then over those that have
            come so far in this pass: over their own medians, each counted as often as it has rows.

    >>> collective, recent_B, ones_B = Collective(), torch.zeros(16), torch.ones(16)
    >>> for step, size in enumerate((1.0, 1.0, 1000.0)):
    ...     factor, recent_B = collective.look(size * ones_B, ones_B > 0, recent_B, torch.tensor(float(step)))
    >>> factor
    tensor(0.0010)
    """

    def __init__(self, *, one_by_one: bool = False) -> None:
        self.one_by_one = one_by_one
        self._medians: list[Tensor] = []
        self._counts: list[Tensor] = []

    def look(self, norm_B: Tensor, seen_B: Tensor, recent_B: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factor for the whole gradient, 0-d, and the recent norms after this step, (B,).

        Args:
            norm_B: (B,) norms of the gradient, gradient units.
            seen_B: (B,) where these are finite and above zero.
            recent_B: (B,) the recent norms; 0 before the first.
            steps: 0-d, steps so far.
        """
        known_B = seen_B & (recent_B > 0)
        median = self.median(torch.where(known_B, norm_B / recent_B, torch.nan))
        fired = median > COLLECTIVE  # nan, where nothing is known yet, is not above
        factor = torch.where(fired, 1 / median, 1.0)
        falls = (steps / (steps + 2)).clamp(max=FALLS)
        follows_B = torch.minimum(torch.maximum(norm_B, falls * recent_B), RISES * recent_B)
        moved_B = torch.where(fired, LET_THROUGH * recent_B, follows_B)
        return factor, torch.where(seen_B, torch.where(recent_B > 0, moved_B, norm_B * factor), recent_B)

    def median(self, ratio_B: Tensor) -> Tensor:
        """Return the median of ratios, 0-d; nan where too few are known. Ratios (B,) that say nothing are nan."""
        if not self.one_by_one:
            return torch.where((~ratio_B.isnan()).sum() >= ENOUGH, torch.nanmedian(ratio_B), torch.nan)
        self._medians.append(torch.nanmedian(ratio_B))
        self._counts.append((~ratio_B.isnan()).sum())
        medians, order = torch.stack(self._medians).sort()  # nan come last, with a count of zero
        counts = torch.stack(self._counts)[order].cumsum(0)
        middle = medians[torch.searchsorted(counts * 2, counts[-1]).clamp(max=len(medians) - 1)]
        return torch.where(counts[-1] >= ENOUGH, middle, torch.nan)

    def settle(self) -> None:
        """End a step in which the tensors came one by one."""
        self._medians, self._counts = [], []


class Recent:
    """The recent norms of a plan's bins, and the factor of the collective rule; nothing here waits for the device.

    Args:
        like: (B,) a vector of the dtype and on the device in which norms are measured.
    """

    def __init__(self, like: Tensor) -> None:
        self.recent_B, self.steps = torch.zeros_like(like), like.new_zeros(())
        self._collective = Collective()

    def factor(self, squares_B: Tensor) -> Tensor:
        """Return the factor for the whole gradient, 0-d, 1 in a usual step; take the norms in.

        Args:
            squares_B: (B,) sums of squares, gradient units squared; not finite where an entry was not.
        """
        factor, self.recent_B, self.steps = self.after(squares_B, self.recent_B, self.steps)
        return factor

    def after(self, squares_B: Tensor, recent_B: Tensor, steps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the factor, and recent norms and number of steps after a step from the given ones; nothing is kept."""
        norm_B = squares_B.sqrt()
        seen_B = squares_B.isfinite() & (norm_B > 0)
        factor, moved_B = self._collective.look(norm_B, seen_B, recent_B, steps)
        return factor, moved_B, steps + seen_B.any()

    def state(self) -> dict[str, Tensor]:
        """Return the recent norms (B,) and the number of steps."""
        return {"recent": self.recent_B, "steps": self.steps}

    def read(self, state: Mapping[str, Any], *, call: str) -> tuple[Tensor, Tensor]:
        """Return recent norms and steps from what `state` returned; nothing is taken over yet.

        Raises:
            ValueError: vectors of another number of bins, or values that no run leaves.
        """
        made = []
        for key, old in self.state().items():
            value = torch.as_tensor(state.get(key, ())) if isinstance(state, Mapping) else torch.empty(0)
            if value.shape != old.shape or bool((~value.isfinite() | (value < 0)).any()):
                raise ValueError(
                    f"{call}: expected {old.numel()} numbers >= 0 at {key!r} of the collective rule, got shape "
                    f"{tuple(value.shape)}. The state is damaged, or of another plan: load another."
                )
            made.append(value.to(old.device, old.dtype, copy=True))
        return made[0], made[1]
