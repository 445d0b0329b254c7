"""Taking the optimizer's next step with a part of the parameters alone, and finding the rows that bear it badly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..chain.joints import LossFn
from ..ladder.directions import single
from ..ladder.ladder import Ladder, ladder_along
from ..ladder.model import loss_of_model
from ..ladder.trace import Params, TracedLoss, trace_loss
from .next_update import NextUpdate, next_update

KEPT = 0.2
"""A step that brings less than this share of what the gradient promises, as does half of it, is too long."""
PROMISE = 0.01
"""... if the promise is this share of the loss at least; less is not worth a word."""
RADIAL = 1e-3
"""Rows with less of their gradient along themselves stand before a normalisation: their length does not matter.

Measured: below 1e-4 for convolutions before batch normalisation, above 1e-2 for all else.
"""
MAX_SPLITS = 32


@dataclass(frozen=True)
class Part:
    """Some rows of one tensor's matrix view; a tensor of one dimension is a single row.

    Attributes:
        tensor: its name.
        ranges: (start, stop) of the rows, stop excluded, in order.
        num_rows: of the tensor.
    """

    tensor: str
    ranges: tuple[tuple[int, int], ...]
    num_rows: int

    @property
    def size(self) -> int:
        """How many rows."""
        return sum(stop - start for start, stop in self.ranges)

    def __str__(self) -> str:
        if self.size == self.num_rows:
            return self.tensor
        listed = [f"{start} to {stop - 1}" if stop - start > 1 else f"{start}" for start, stop in self.ranges]
        shown = ", ".join(listed[:4]) + (f" and {len(listed) - 4} ranges more" if len(listed) > 4 else "")
        return f"row{'s' * (self.size > 1)} {shown} of {self.tensor}"


class StepTrial:
    """What the loss does when one part alone takes the optimizer's next step.

    The gradient promises a fall of rate * |slope|; ``kept`` is the share of it that the loss delivers.

    Args:
        traced: the loss.
        point: the parameters, float64.
        gradient: of the loss there.
        update: the step.
    """

    def __init__(self, traced: TracedLoss, point: Params, gradient: Params, update: NextUpdate) -> None:
        self.traced, self.point, self.gradient, self.update = traced, point, gradient, update
        self.before = traced.loss(point)

    @classmethod
    def of(cls, model: nn.Module, loss_fn: LossFn, batch: Any, optimizer: Any) -> StepTrial:
        """Trace the loss of a model and take the next step of its optimizer, leaving both as they are."""
        loss_of_params, params = loss_of_model(model, loss_fn, batch)
        traced = trace_loss(loss_of_params, params)
        point = {name: x.double() for name, x in params.items()}
        gradient = traced.gradient(point)
        own = {name: p for name, p in model.named_parameters() if name in point}
        return cls(traced, point, gradient, next_update(optimizer, own, gradient))

    def whole(self, tensor: str) -> Part:
        """All rows of a tensor."""
        shape = self.point[tensor].shape
        rows = int(shape[0]) if len(shape) > 1 else 1
        return Part(tensor, ((0, rows),), rows)

    def direction(self, part: Part) -> Tensor:
        """The update per unit of learning rate, zero outside the part."""
        moves = self.update.direction[part.tensor]
        if part.size == part.num_rows:
            return moves
        kept = torch.zeros_like(moves)
        for start, stop in part.ranges:
            kept[start:stop] = moves[start:stop]
        return kept

    def heals(self, part: Part) -> bool:
        """Whether a normalisation divides the rows' length out, so that a long step shortens the ones to come.

        Such a loss does not change with the length w of a row, so w . gradient = 0; a step across makes the row longer
        and turns it less the next time (Arora, Li and Lyu 2018, arXiv 1812.03981): too long a step is no lasting harm.
        """
        rows, gradient = (x[part.tensor].reshape(part.num_rows, -1) for x in (self.point, self.gradient))
        length = rows.norm(dim=1)
        if not bool((length > 0).all()):
            return False
        along = (rows * gradient).sum(1) / length
        return bool(along.norm() < RADIAL * gradient.norm())

    def promise(self, part: Part) -> float:
        """By how much the loss falls after the step to first order; negative where it rises."""
        rate = self.update.rate[part.tensor]
        return -rate * float((self.gradient[part.tensor] * self.direction(part)).sum())

    def after(self, part: Part, share: float = 1.0) -> float:
        """The loss after this share of the step."""
        step = share * self.update.rate[part.tensor] * self.direction(part)
        return self.traced.loss({**self.point, part.tensor: self.point[part.tensor] + step})

    def kept(self, part: Part, share: float = 1.0) -> float:
        """Share of the promise that the loss keeps after this share of the step; -inf where it is not finite.

        1 for a linear loss, 1/2 at the lowest point of a parabola, below 0 beyond the safe step.
        """
        after = self.after(part, share)
        return (self.before - after) / (share * self.promise(part)) if math.isfinite(after) else -math.inf

    def guilty(self, part: Part) -> bool:
        """Whether the step is too long for this part: a promise that counts, hardly kept by the step and by half of it.

        Half of it, since training settles where a step reaches about as far as the loss falls ("edge of stability",
        Cohen et al. 2021, arXiv 2103.00065), and there the whole step keeps nothing.
        """
        if not self.promise(part) > PROMISE * abs(self.before):
            return False
        return self.kept(part) < KEPT and self.kept(part, 0.5) < KEPT

    def good_share(self, part: Part) -> float:
        """Largest share 2^-k >= 2^-24 of the step that keeps at least half of its promise; 0 if none does."""
        return next((2.0**-k for k in range(1, 25) if self.kept(part, 2.0**-k) >= 0.5), 0.0)

    def ladder(self, parts: Sequence[Part], order: int) -> Ladder:
        """The ladder along the update of each part alone; its steps are learning rates."""
        batches = [single({part.tensor: self.direction(part)}, self.point) for part in parts]
        return ladder_along(self.traced, self.point, batches, order)

    def narrowed(self, part: Part) -> Part:
        """The guilty rows of a guilty tensor, by halving, if the step suits all others; else the tensor as it is.

        Where neither half of some rows is guilty alone they are so together, and stay together.
        """
        found: list[tuple[int, int]] = []
        waiting, splits = list(part.ranges), 0
        while waiting:
            start, stop = waiting.pop(0)
            middle = (start + stop) // 2
            halves = [(start, middle), (middle, stop)] if start < middle and splits < MAX_SPLITS else []
            splits += bool(halves)
            guilty = [half for half in halves if self.guilty(replace(part, ranges=(half,)))]
            waiting += guilty
            if not guilty:
                found.append((start, stop))
        rows = _joined(found)
        others = _between(rows, part.num_rows)
        return part if others and self.guilty(replace(part, ranges=others)) else replace(part, ranges=rows)


def _joined(ranges: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return tuple(joined)


def _between(ranges: Sequence[tuple[int, int]], num_rows: int) -> tuple[tuple[int, int], ...]:
    edges = [0, *(edge for pair in ranges for edge in pair), num_rows]
    gaps = zip(edges[::2], edges[1::2], strict=True)
    return tuple((start, stop) for start, stop in gaps if start < stop)
