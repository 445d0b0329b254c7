"""What a step is given and leaves behind: gradients, measured squares, a decision, and the worst bins in words."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .budget import Decision, Outcome
from .hooks import users_level
from .plan import Plan
from .xp import Array

__all__ = ["BinReport", "DeferredDecision", "ShareRecord", "StepRecord", "checked_sinks", "gradients_of", "plain_of"]


class BinReport(NamedTuple):
    """One bin of a step, on the host.

    Attributes:
        name: tensor and block.
        norm: L2 norm before, gradient units; inf or nan where the gradient was not finite.
        norm_after: L2 norm after.
        limit: the bin's own limit; inf where only an ancestor is bounded.
        outcome: KEPT, SCALED or ZEROED.
    """

    name: str
    norm: float
    norm_after: float
    limit: float
    outcome: Outcome


def checked_sinks(sinks: Any, *, call: str) -> list[Callable[[Any], Any]]:
    """Return sinks as a list.

    Raises:
        ValueError: something that is no iterable of functions.
    """
    made: list[Any] = list(sinks) if isinstance(sinks, Iterable) and not callable(sinks) else [None]
    if not all(callable(sink) for sink in made):
        raise ValueError(f"{call}(sinks={sinks!r:.80}): expected functions of a record in a list. Write sinks=[print].")
    return made


def gradients_of(
    names: Sequence[str], parameters: Sequence[Tensor], *, call: str = "GradientSplitter.step()"
) -> list[Tensor | None]:
    """Return the gradients in the layout's order; sparse ones coalesced, so that every stored row is there once.

    Raises:
        ValueError: a gradient that is neither dense nor made of stored rows; names the parameter.

    Warns:
        UserWarning: no parameter has a gradient.
    """
    for name, parameter in zip(names, parameters, strict=True):
        gradient = parameter.grad
        if gradient is None or gradient.layout == torch.strided:
            continue
        if not gradient.is_sparse or gradient.sparse_dim() != 1:
            raise ValueError(
                f"{call}: expected a dense gradient or one of stored rows, got {gradient.layout} of shape "
                f"{tuple(gradient.shape)} at {name!r}. Set parameter.grad = parameter.grad.to_dense() first."
            )
        if not gradient.is_coalesced():
            parameter.grad = gradient.coalesce()
    gradients = [parameter.grad for parameter in parameters]
    # A traced step does not look: identities would have it traced anew.
    last = {} if torch.compiler.is_compiling() else {id(gradient): t for t, gradient in enumerate(gradients)}
    for t, gradient in enumerate(gradients if 0 < len(last) < len(gradients) else ()):
        if gradient is not None and last[id(gradient)] != t:  # one that two hold would be scaled twice
            parameters[t].grad = gradients[t] = gradient.clone()
    if all(gradient is None for gradient in gradients):
        warnings.warn(
            f"{call}: no parameter has a gradient. Call it after backward() and before zero_grad(). If the model was "
            "given new parameters, make a new splitter.",
            UserWarning,
            stacklevel=users_level(),
        )
    return gradients


def plain_of(values: Tensor) -> Tensor:
    """Return numbers about bins as a plain tensor, where they come in a wrapper that holds them in tensors of its own.

    What a wrapper's memory measures is wrapped too, and torch neither lists nor saves such numbers as it does others.
    The first tensor inside with the wrapper's shape and dtype stands for it.

    >>> plain_of(torch.ones(2))
    tensor([1., 1.])
    """
    if type(values) is Tensor or not hasattr(values, "__tensor_flatten__"):
        return values
    inside = (getattr(values, name) for name in values.__tensor_flatten__()[0])
    return next((one for one in inside if one.shape == values.shape and one.dtype == values.dtype), values)


@dataclass(frozen=True)
class StepRecord:
    """The record of one step. Nothing here waits for the device but `worst` and printing.

    Attributes:
        step: counted from 0.
        squares_B: (B,) sums of squares as measured.
        decision: limits, scales and outcomes.
    """

    step: int
    squares_B: Tensor
    decision: Decision

    @property
    def plan(self) -> Plan:
        """The plan whose bins these are."""
        return self.decision.plan

    @property
    def norm_B(self) -> Tensor:
        """(B,) L2 norms as measured, gradient units; not finite where an entry was not."""
        return torch.sqrt(self.squares_B)

    def norm_after_B(self) -> Tensor:
        """(B,) L2 norms after control; 0 for a zeroed bin."""
        return self.decision.norm_B * self.decision.scale_B

    def total_norm(self) -> Tensor:
        """The norm of the whole gradient as measured, 0-d: what `clip_grad_norm_` returns."""
        return torch.sqrt(self.squares_B.sum())

    def worst(self, k: int = 5) -> list[BinReport]:
        """Return the k bins that were touched hardest: zeroed ones first, then by falling scale, then by norm."""
        decision = self.decision
        norm, scale = self.norm_B.cpu(), decision.scale_B.cpu()
        after, limit, outcome = self.norm_after_B().cpu(), decision.limit_B.cpu(), decision.outcome_B.cpu()
        order = torch.argsort(norm.nan_to_num(nan=float("inf")), descending=True, stable=True)
        order = order[torch.argsort(scale[order] - (outcome[order] == Outcome.ZEROED).to(scale.dtype), stable=True)]
        return [
            BinReport(
                self.plan.bins[b].name, float(norm[b]), float(after[b]), float(limit[b]), Outcome(int(outcome[b]))
            )
            for b in map(int, order[:k])
        ]

    def __str__(self) -> str:
        """Say how many bins were touched and name the worst."""
        outcome = self.decision.outcome_B
        scaled, zeroed = int((outcome == Outcome.SCALED).sum()), int((outcome == Outcome.ZEROED).sum())
        worst = ", ".join(f"{r.name} {r.norm:.3g} -> {r.norm_after:.3g}" for r in self.worst(3))
        return f"step {self.step}: {scaled} of {self.plan.num_bins} bins scaled, {zeroed} zeroed; worst: {worst}"


@dataclass(frozen=True)
class ShareRecord(StepRecord):
    """The record of one step by shares. Nothing here waits for the device but the methods that return names.

    Attributes:
        factor: 0-d, by which the whole gradient was multiplied; below 1 where the collective rule fired.
        moved_B: (B,) bool, the rows that moved.
        at_limit_B: (B,) bool, the rows that had grown beyond their longest length and were drawn back to it.
        cosine_B: (B,) cosine of the angle between the gradient and the step against it: 1 straight down, 0 across, nan
            where there was no gradient or no step. None where nobody watched, see `GSO`.
        series: 0-d, the number of layers that stand in series of late; see `gradsplit.series`.
        balance: 0-d, the factor on the share of vectors; below 1 where they outweighed the matrices, see there.
    """

    factor: Tensor
    moved_B: Tensor
    at_limit_B: Tensor
    cosine_B: Tensor | None = None
    series: Tensor | None = None
    balance: Tensor | None = None

    def turned_B(self) -> Tensor | None:
        """Return by how many degrees the direction turned each row's step away from its gradient, (B,)."""
        return None if self.cosine_B is None else torch.rad2deg(torch.acos(self.cosine_B.clamp(-1, 1)))

    def by_tensor(self) -> Tensor:
        """Return three numbers per tensor, (3, T), over its rows.

        The mean of the degrees by which they were turned (nan: not measured), the shares at their limit and bounded.
        """
        inside = np.flatnonzero(self.plan.tensor_B >= 0)
        ids = torch.from_numpy(self.plan.tensor_B[inside]).to(self.moved_B.device)
        bins, turned_B = torch.from_numpy(inside).to(ids.device), self.turned_B()
        turned_B = torch.full_like(self.norm_B, torch.nan) if turned_B is None else turned_B
        bounded_B = self.decision.scale_B < 0.999 * self.factor
        known_B = ~turned_B.isnan()
        rows = torch.stack(
            [turned_B.nan_to_num(nan=0.0), known_B, self.at_limit_B, bounded_B, torch.ones_like(known_B)]
        )
        sums = turned_B.new_zeros(5, len(self.plan.layout)).index_add_(1, ids, rows.to(turned_B.dtype)[:, bins])
        num = sums[4].clamp(min=1)
        return torch.stack([sums[0] / sums[1], sums[2] / num, sums[3] / num])

    def at_limit(self) -> list[str]:
        """Return the names of the rows that stand at their growth limit."""
        return [self.plan.bins[b].name for b in self.at_limit_B.cpu().nonzero()[:, 0].tolist()]

    def most_turned(self, k: int = 5) -> list[tuple[str, float]]:
        """Return the k rows that were turned furthest, and by how many degrees; none where nobody watched."""
        turned_B = self.turned_B()
        if turned_B is None:
            return []
        turned, order = turned_B.cpu().nan_to_num(nan=-1.0).sort(descending=True, stable=True)
        pairs = zip(order[:k].tolist(), turned[:k].tolist(), strict=True)
        return [(self.plan.bins[b].name, angle) for b, angle in pairs if angle >= 0]

    def __str__(self) -> str:
        """Say what was bounded, what stands at its limit, and by how much steps were turned."""
        said, factor = f"{super().__str__()}; {int(self.at_limit_B.sum())} at their growth limit", float(self.factor)
        turned_B = self.turned_B()
        if turned_B is not None and not bool(turned_B.isnan().all()):
            said += f"; turned by {float(torch.nanmedian(turned_B)):.0f} degrees at the median"
        return said if factor == 1 else f"{said}; the whole gradient was divided by {1 / factor:.3g}"


class DeferredDecision(Decision):
    """A `Decision` that is computed on first use; for budgets without history, where the time does not matter.

    Args:
        plan: the plan it is for.
        make: returns the decision.
    """

    def __init__(self, plan: Plan, make: Callable[[], Decision]) -> None:
        vars(self).update(plan=plan, _make=make)

    @cached_property
    def _made(self) -> Decision:
        decision: Decision = vars(self).pop("_make")()
        return decision

    @property
    def norm_B(self) -> Array:  # noqa: D102
        return self._made.norm_B

    @property
    def finite_B(self) -> Array:  # noqa: D102
        return self._made.finite_B

    @property
    def scale_B(self) -> Array:  # noqa: D102
        return self._made.scale_B

    @property
    def limits(self) -> tuple[tuple[str, Array | None, Array], ...]:  # noqa: D102
        return self._made.limits

    def __reduce__(self) -> tuple[Any, ...]:
        return Decision, (self.plan, self.norm_B, self.finite_B, self.scale_B, self.limits)
