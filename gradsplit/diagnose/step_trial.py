"""A trial of the optimizer's next step, with one part of the parameters alone: which rows is it too long for?"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..chain.joints import LossFn
from ..ladder.directions import single
from ..ladder.ladder import Ladder, ladder_along
from ..ladder.model import loss_of_model
from ..ladder.trace import Params, TracedLoss, trace_loss

KEPT = 0.2
"""A step is too long if it, and half of it too, brings less than this share of what the gradient promises."""
PROMISE = 0.01
"""The promise must be at least this share of the loss; a smaller one is ignored."""
RADIAL = 1e-3
"""Rows stand before a normalisation if less than this share of their gradient lies along themselves.

Measured: below 1e-4 for convolutions before batch normalisation, above 1e-2 for all else.
"""
MAX_SPLITS = 32


@dataclass(frozen=True)
class NextUpdate:
    """How the optimizer would move the parameters on one gradient, per unit of learning rate.

    Attributes:
        direction: {name: tensor}, float64, of the parameters that the optimizer holds and whose rate is above 0.
        rate: {name: learning rate} of the same parameters: rate * direction is the step.
        source: what the direction is, in words that follow "along".
    """

    direction: dict[str, Tensor]
    rate: dict[str, float]
    source: str


def next_update(optimizer: Any, params: Mapping[str, nn.Parameter], gradient: Mapping[str, Tensor]) -> NextUpdate:
    """The optimizer's next update, (w after - w) / lr; the optimizer and the parameters stay as they are.

    A copy of the optimizer, over copies of the parameters, takes one step. Momentum, moments, weight decay and the
    optimizer's own limits are all in it. Hooks on the step (an attached splitter) belong to the original and do not
    run. Some optimizers cannot step in this way: they want a closure, or they update in the backward pass. For them
    the direction is minus the gradient.

    Args:
        optimizer: over the parameters, or over some of them.
        params: {name: parameter}.
        gradient: of the same names.

    >>> w = nn.Parameter(torch.tensor([3.0]))
    >>> update = next_update(torch.optim.SGD([w], lr=0.5, weight_decay=2.0), {"w": w}, {"w": torch.tensor([1.0])})
    >>> update.direction["w"], update.rate["w"], w.data  # minus (gradient + decay)
    (tensor([-7.], dtype=torch.float64), 0.5, tensor([3.]))
    """
    rate_of = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
    moving = {name: p for name, p in params.items() if rate_of.get(id(p), 0.0) > 0}
    rate = {name: rate_of[id(p)] for name, p in moving.items()}
    name = type(optimizer).__name__
    try:
        moved = _stepped(optimizer, moving, gradient)
    except Exception as error:  # a foreign optimizer may raise anything; the diagnosis goes on
        moved, why = {}, f"{name} takes no step of its own here: {type(error).__name__}"
    else:
        why = f"{name} does not move by a step of its own"
    if not any(bool(x.any()) for x in moved.values()):
        return NextUpdate({n: -gradient[n].double() for n in moving}, rate, f"minus the gradient ({why})")
    source = f"{name}'s next update"
    if getattr(optimizer, "_optimizer_step_pre_hooks", None) or getattr(optimizer, "_optimizer_step_post_hooks", None):
        source += ", without the hooks on its step"
    return NextUpdate({n: x / rate[n] for n, x in moved.items()}, rate, source)


def _stepped(optimizer: Any, params: Mapping[str, nn.Parameter], gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """How far one step of a copy moves each parameter, float64."""
    copies: dict[str, nn.Parameter] = {}
    memo: dict[int, Any] = {}
    for name, p in params.items():
        copies[name] = memo[id(p)] = nn.Parameter(p.detach().clone())
    twin = copy.deepcopy(optimizer, memo)
    for name, p in copies.items():
        p.grad = gradient[name].to(p)
    with torch.enable_grad():
        twin.step()
    return {name: copies[name].detach().double() - p.detach().double() for name, p in params.items()}


@dataclass(frozen=True)
class Part:
    """Some rows of one tensor's matrix view; a tensor of one dimension is a single row.

    Attributes:
        tensor: its name.
        ranges: (start, stop) of the rows, stop excluded, in order.
        num_rows: number of rows of the tensor.
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
        gradient: the gradient of the loss at that point.
        update: the optimizer's next step.
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

        Such a loss does not change with the length of a row w, so w . gradient = 0. A step then makes the row longer,
        and the next step turns it less (Arora, Li and Lyu 2018, arXiv 1812.03981). A step that is too long does no
        lasting harm there.
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
        """Whether the step is too long for this part: neither the step nor half of it keeps a promise that counts.

        Training settles where a step reaches about as far as the loss falls ("edge of stability", Cohen et al. 2021,
        arXiv 2103.00065). There the whole step keeps nothing, so half of it is tried too.
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
        """The guilty rows of a guilty tensor, found by halving; the whole tensor if the other rows are guilty too.

        If some rows are guilty together and neither half of them is guilty alone, they stay together.
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
