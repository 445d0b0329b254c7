"""The ladder: derivatives of the loss along a direction, of order 99 and beyond, and what they foretell."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..plan import Plan
from .directions import Batch, checked, per_bin, single
from .kinks import kink_of
from .radius import Radius, crude_log_radius, increase, radius_of, safe_step
from .recipe import Climb, RecipeStep, climb
from .signedlog import Floats, SignedLog, factorial_log
from .trace import LossOfParams, Params, TracedLoss, trace_loss

PILOT_ORDER = 24  # a short pass at this order finds the scale of the step before a long one
FACTOR_OFF = 3.0  # a long pass is repeated if its scale was wrong by more than this
SMALL_ENOUGH = 300.0  # a short pass is repeated if its highest term is off by e^300: float64 ends at e^-708 and e^709


@dataclass(frozen=True)
class Ladder:
    """Derivatives of t -> L(theta + t d) at 0, one column per direction (bin).

    The step t is in units of the direction. With d = minus the gradient, t is the learning rate of plain gradient
    descent. The product t * length is a distance in parameter space.

    Args:
        names: names of the bins, or ("direction",).
        loss: L(theta).
        coefficient: Taylor coefficients c_k, (order + 1, B).
        length_B: ‖d‖.
        radii: radius of convergence of each series.
        safe_step_B: largest step without a predicted increase of the loss.
        kink_B: step at which the first branches (ReLU, max) have changed sides, inf if there are none; see ``kinks``.
        limited_by: what ends the safe step: "increase", "radius", "kink" or "no descent".
        climb: the recipe, if one was asked for.
    """

    names: tuple[str, ...]
    loss: float
    coefficient: SignedLog
    length_B: Floats
    radii: tuple[Radius, ...]
    kink_B: Floats
    safe_step_B: Floats
    limited_by: tuple[str, ...]
    climb: Climb | None = None

    @property
    def order(self) -> int:
        """Highest order."""
        return self.coefficient.log.shape[0] - 1

    @cached_property
    def derivative(self) -> SignedLog:
        """d^k L / dt^k at 0 = k! c_k, (order + 1, B)."""
        return self.coefficient.times_exp(factorial_log(self.order)[:, None])

    @cached_property
    def radius_B(self) -> Floats:
        """Radius of convergence, in units of the step."""
        return np.array([radius.value for radius in self.radii])

    @cached_property
    def reach_B(self) -> Floats:
        """How far the series can describe the loss: the smaller of radius and kink."""
        return np.minimum(self.radius_B, self.kink_B)

    def predict(self, step: float | Floats, order: int | None = None) -> Floats:
        """Return the loss that the series, cut after ``order``, predicts after a step of each bin alone, (B,).

        Args:
            step: t >= 0, one for all bins or one per bin. A series describes the side of each kink to which t > 0 goes.
            order: highest order that is used, 0 or more; by default all orders.

        Raises:
            ValueError: a step below 0, or an order that the ladder does not have.
        """
        last = self.order if order is None else order
        step_B = np.broadcast_to(np.asarray(step, dtype=np.float64), (len(self.names),))
        if not (step_B >= 0).all():
            raise ValueError(
                f"Ladder.predict(step={step!r:.80}): expected steps >= 0, since a series holds on the side to which "
                "the direction goes. For the other side, make a ladder along minus the direction."
            )
        if not 0 <= last <= self.order:
            raise ValueError(
                f"Ladder.predict(order={order!r}): expected an order from 0 to the ladder's {self.order}. Make the "
                f"ladder with taylor_ladder(…, order={order!r}) for a higher one."
            )
        if last == 0:
            return np.full(len(self.names), self.loss)
        rises = [increase(self.coefficient[: last + 1, b], step_B[b])[0] for b in range(len(self.names))]
        return self.loss + np.array(rises)

    def findings(self, step: float, count: int = 5) -> list[str]:
        """Bins for which ``step`` is beyond the safe step or the radius, worst first, in words."""
        with np.errstate(divide="ignore"):
            excess_B = step / np.minimum(self.reach_B, self.safe_step_B)
        worst = [b for b in np.argsort(-excess_B, kind="stable")[:count] if excess_B[b] > 1]
        return [
            f"{self.names[b]}: radius {self.reach_B[b]:.3g}, safe step {self.safe_step_B[b]:.3g}, "
            f"your step is {step:.3g}"
            for b in worst
        ]


def taylor_ladder(
    loss_of_params: LossOfParams,
    params: Params,
    direction: Mapping[str, Tensor] | None = None,
    *,
    order: int = 99,
    bins: Plan | None = None,
    recipe: str | Sequence[str | RecipeStep] | None = None,
    memory: int = 2 * 2**30,
) -> Ladder:
    """How far a step may go before the Taylor series of the loss breaks, for a direction or for each bin alone.

    The function computes c_k in L(theta + t d) = sum_k c_k t^k for k = 0 … order. It propagates truncated power series
    through the traced loss (Taylor mode). The cost grows as order^2 at most, where nested automatic differentiation
    costs 2^order.

    Args:
        loss_of_params: maps {name: tensor} to a scalar. Everything that it closes over is constant. It is evaluated in
            float64. The ladder describes its values, so `detach()` and `torch.no_grad()` change nothing.
        params: the point theta, {name: tensor}.
        direction: d, {name: tensor}; a tensor that is left out does not move. The default is minus the gradient.
        order: highest order, >= 1.
        bins: a plan, for one ladder per bin along the direction restricted to that bin.
        recipe: a preset's name ("ladder-292") or a list of operators; it is run on every ladder.
        memory: bytes that the bins that are followed together may take, roughly.

    Returns:
        The ladder; lengths and steps are in the units given there.

    Raises:
        ValueError: an order below 1, or names or shapes that do not fit.
        TypeError: parameters that are no mapping of real floating tensors.
        UnsupportedOperation: the loss uses an operation without a rule for power series.
        FloatingPointError: the loss or its series is not finite at any scale of the step.

    >>> import torch
    >>> x = {"x": torch.tensor(0.5, dtype=torch.float64)}
    >>> ladder = taylor_ladder(lambda p: 1 / (1 - p["x"]), x, {"x": torch.tensor(1.0)}, order=40)
    >>> [round(v, 6) for v in ladder.coefficient.to_float()[:4, 0].tolist()]  # 2 / (1 - 2 t)
    [2.0, 4.0, 8.0, 16.0]
    >>> round(ladder.radius_B.item(), 6)
    0.5

    Source: Griewank and Walther, Evaluating Derivatives, chapter 13. Deviation: the step is rescaled to the radius.
    """
    if not isinstance(order, int) or isinstance(order, bool) or order < 1:
        raise ValueError(
            f"taylor_ladder(order={order!r}): expected a whole number >= 1. Pass the highest derivative that you want, "
            "such as 10."
        )
    given: Any = params
    if not isinstance(given, Mapping):
        raise TypeError(
            f"taylor_ladder(params={type(given).__name__}): expected a mapping from names to tensors. Write "
            "dict(model.named_parameters())."
        )
    for name, x in params.items():
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(
                f"taylor_ladder(params): expected real floating tensors, got {got} at {name!r}. Close over what does "
                "not move, and pass a complex tensor as torch.view_as_real of it."
            )
    traced = trace_loss(loss_of_params, params)
    point = {name: x.detach().double() for name, x in params.items()}
    if direction is None:
        moves = {name: -g for name, g in traced.gradient(point).items()}
    else:
        moves = checked(direction, point)
    if bins is None:
        return ladder_along(traced, point, [single(moves, point)], order, recipe)
    still = {name: torch.zeros_like(x) for name, x in point.items()}
    return ladder_along(traced, point, per_bin(bins, point, still | moves, traced, order, memory), order, recipe)


def ladder_along(
    traced: TracedLoss,
    point: Params,
    batches: Iterable[Batch],
    order: int,
    recipe: str | Sequence[str | RecipeStep] | None = None,
) -> Ladder:
    """Return the ladder of a traced loss, with one column for each direction of the batches.

    Args:
        traced: the loss.
        point: the parameters, float64.
        batches: directions that are followed together.
        order: highest order, >= 1.
        recipe: see `taylor_ladder`.

    Raises:
        UnsupportedOperation: the loss uses an operation without a rule for power series.
        FloatingPointError: the loss or its series is not finite at any scale of the step.
    """
    names: list[str] = []
    parts, lengths, kinks = [], [], []
    for batch in batches:
        kinks.append(kink_of(traced.crossings(point, batch.tensors), len(batch.names)))
        names += batch.names
        lengths.append(batch.length_B)
        parts.append(_coefficients(traced, point, batch, order))
    coefficient = SignedLog(*(np.concatenate([getattr(p, field) for p in parts], axis=1) for field in ("sign", "log")))
    length_B = np.concatenate(lengths)
    kink_B = np.concatenate(kinks)
    radii = tuple(radius_of(coefficient[:, b]) for b in range(len(names)))
    safe = [safe_step(coefficient[:, b], radius.value, kink_B[b]) for b, radius in enumerate(radii)]
    return Ladder(
        names=tuple(names),
        loss=float(coefficient[0, 0].to_float()),
        coefficient=coefficient,
        length_B=length_B,
        radii=radii,
        kink_B=kink_B,
        safe_step_B=np.array([step for step, _ in safe]),
        limited_by=tuple(reason for _, reason in safe),
        climb=None if recipe is None else climb(recipe, coefficient, length_B),
    )


def _coefficients(traced: TracedLoss, point: Params, batch: Batch, order: int) -> SignedLog:
    """Return the Taylor coefficients of a batch of directions, computed at steps that are rescaled to their radius.

    The recurrences commute with scaling. So the scale only matters for overflow, and for the rounding of products at
    roots of unity. It starts at the length of the weights and is then corrected by a short pass.
    """
    log_scale_B = used_B = np.log(batch.weight_B) - np.log(np.where(batch.length_B > 0, batch.length_B, batch.weight_B))
    for pass_order in [PILOT_ORDER, order] if order > PILOT_ORDER else [order]:
        for _ in range(24):
            used_B = log_scale_B
            coef = traced.series(point, batch.scaled(used_B), pass_order).numpy()
            if not np.isfinite(coef[0]).all():
                raise FloatingPointError(
                    f"taylor_ladder: expected a finite loss at the parameters, got {coef[0, 0]}. "
                    "Find the first bad value with gs.diagnose."
                )
            finite_B = np.isfinite(coef).all(axis=0)
            scaled = SignedLog.of(coef)
            correction_B = np.where(finite_B, crude_log_radius(scaled), -math.log(1e3))
            enough = SMALL_ENOUGH / order if order <= PILOT_ORDER else math.log(FACTOR_OFF)
            good_B = finite_B & (np.abs(correction_B) < enough)
            if good_B.all():
                break
            log_scale_B = log_scale_B + np.where(good_B, 0.0, correction_B)
        if not finite_B.all():
            name = batch.names[int(np.flatnonzero(~finite_B)[0])]
            raise FloatingPointError(
                f"taylor_ladder: expected finite Taylor coefficients, got inf or nan along {name}. Look in the loss "
                "for a singularity at the parameters themselves, such as a square root or logarithm of zero."
            )
    k = np.arange(order + 1)[:, None]
    return scaled.times_exp(-k * used_B[None, :])
