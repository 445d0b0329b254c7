"""How far the branches hold: the step at which units begin to change sides.

A power series follows one side of every kink (``rules/branches.py``, ``rules/extremes.py``), and its coefficients do
not show where another side begins. The gap shows it: a comparison a > b decides by the sign of gap(t) = a(t) - b(t). To
first order that sign changes at t = -gap_0 / gap_1. The *kink* of a bin is the step at which ``SHARE`` of all decisions
of the network would have changed. A single decision matters little, since a ReLU is continuous where it bends.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np
import torch
from torch import Tensor

from .signedlog import Floats

SHARE = 0.005  # of all decisions; at 0.01, six of a hundred predictions at half the kink are wrong by over 1 %

_noted: ContextVar[list[Tensor] | None] = ContextVar("noted_crossings", default=None)


@contextmanager
def noting_crossings() -> Iterator[list[Tensor]]:
    """Collect the crossing steps of every decision inside the context, each (B, decisions)."""
    crossings: list[Tensor] = []
    token = _noted.set(crossings)
    try:
        yield crossings
    finally:
        _noted.reset(token)


def note_gap(gap: Tensor, slope_B: Tensor) -> None:
    """Note where the sign of gap + t slope changes, for t > 0.

    Args:
        gap: its value at t = 0, broadcastable to the slope; where it is not finite, as in a mask, nothing is decided.
        slope_B: first-order coefficient, (B, *shape).
    """
    crossings = _noted.get()
    if crossings is not None:
        step = -gap / slope_B
        step = torch.where((step > 0) & torch.isfinite(step), step, torch.inf)
        decided = torch.isfinite(gap).expand_as(step)
        crossings.append(torch.where(decided, step, torch.nan).reshape(step.shape[0], -1))


def kink_of(crossings: list[Tensor], num_bins: int, share: float = SHARE) -> Floats:
    """Return, per bin, the step at which this share of all decisions has changed; inf without decisions.

    >>> kink_of([torch.tensor([[1.0, 2.0, 3.0, torch.inf, torch.nan]])], 1, share=0.5)
    array([2.])
    """
    if not crossings:
        return np.full(num_bins, np.inf)
    steps = np.concatenate([c.expand(num_bins, -1).cpu().numpy() for c in crossings], axis=1)
    kinks = np.full(num_bins, np.inf)
    for b in range(num_bins):
        decided = steps[b][~np.isnan(steps[b])]
        if decided.size:
            place = max(0, int(np.ceil(share * decided.size)) - 1)
            kinks[b] = np.partition(decided, place)[place]
    return kinks
