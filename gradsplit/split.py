"""One step over the gradients of a plan: measure, decide, scale; in one go where each bin can be decided alone.

Where no budget looks above the bins or at the past, a bin's scale is known as soon as the bin has been read, so it is
scaled while it is in cache; the decision as a whole is worked out only if somebody looks at it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .amp import Scaling
from .budget import Budget, Decision, Ledger, StagedLedger
from .budget.lines import line_table, lines_of
from .kernels import Kernel, squares_of
from .plan import Plan
from .rates import Rates
from .xp import Array

__all__ = ["check_state", "DeferredDecision", "Bounding"]


def check_state(state: Any, keys: Iterable[str], *, call: str) -> list[float]:
    """Refuse a mapping without the keys, counts that are none and learning rates that are none.

    Args:
        state: what should have come from ``state_dict()``.
        keys: that must be in it; "step_count" and "top_lr" are looked at.
        call: the caller's name, for errors.

    Returns:
        The largest learning rates.

    Raises:
        ValueError: something else.

    >>> check_state({"step_count": 3, "top_lr": [0.1]}, ["step_count", "top_lr"], call="f")
    [0.1]
    """
    missing = sorted(set(keys) - set(state)) if isinstance(state, Mapping) else list(keys)
    if missing:
        what = "a mapping" if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(f"{call}: expected what state_dict() returned, got {what} without {missing}.")
    count = state.get("step_count", 0)
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise ValueError(f"{call}: expected a count of steps, got step_count={count!r}. The state is damaged.")
    tops = state["top_lr"]
    if not isinstance(tops, (list, tuple)) or not all(isinstance(top, float) and 0 < top < math.inf for top in tops):
        raise ValueError(f"{call}: expected learning rates > 0, got top_lr={tops!r:.80}. The state is damaged.")
    return list(tops)


class DeferredDecision(Decision):
    """A `Decision` made on first use; for budgets without history, so that it does not matter when.

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


class Bounding:
    """How the gradients of one plan are bounded.

    Args:
        plan: the bins.
        kernel: reads and scales them.
        ledger: decides.
        budgets: the ledger's (level, budget) pairs.
    """

    def __init__(
        self, plan: Plan, kernel: Kernel, ledger: Ledger | StagedLedger, budgets: Sequence[tuple[str, Budget]]
    ) -> None:
        self.plan, self.kernel, self.ledger = plan, kernel, ledger
        self._lines = lines_of(budgets)
        self._bound = getattr(kernel, "bound_", None)
        bounds = plan.boxes.slices_T(len(plan.layout))[:-1]
        self._bin_of_tensor = plan.bin_K[np.minimum(bounds, len(plan.bin_K) - 1)]

    def apply(
        self,
        gradients: list[Tensor | None],
        parameters: list[Tensor],
        rates: Rates | None,
        check: Callable[[Tensor], None] | None = None,
        scaling: Scaling | None = None,
    ) -> tuple[Tensor, Decision]:
        """Bound the gradients in place; return squares as measured and the decision.

        Args:
            gradients: one a tensor of the plan.
            parameters: their weights.
            rates: of the optimizer, for budgets that bound the update.
            check: called with all squares before the first bin is scaled.
            scaling: what a GradScaler says of the gradients: limits hold in unscaled units, and on an overflow, which
                is the scaler's to see and to answer, gradients and history are left as they are.
        """
        num_bins = self.plan.num_bins
        pace_B = None if rates is None else rates.pace_B(num_bins)
        gain_B = None if rates is None else rates.gain_B(num_bins)
        plain = check is None and scaling is None and not torch.compiler.is_compiling()
        if plain and self._lines is not None and self._bound is not None:
            done = self._bin_by_bin(gradients, parameters, pace_B, gain_B)
            if done is not None:
                return done
        reads = [gradients, parameters] if self.ledger.reads_weights else [gradients]
        squares_B, *weights_B = squares_of(self.kernel, *reads)
        weight_squares_B = weights_B[0] if weights_B else None
        if scaling is not None:
            squares_B = scaling.unscaled_squares(squares_B)
            overflow = scaling.overflow(squares_B)
            # A bin that is not finite teaches nothing, so on an overflow all are shown to the ledger as such.
            shown_B = torch.where(overflow, torch.inf, squares_B)
            decision = _spared(self.ledger.decide(shown_B, weight_squares_B, pace_B, gain_B), squares_B, overflow)
            self.kernel.scale_(gradients, decision.scale_B, ~decision.finite_B & ~overflow)
            return squares_B, decision
        if check is not None:
            check(squares_B)
        decision = self.ledger.decide(squares_B, weight_squares_B, pace_B, gain_B)
        self.kernel.scale_(gradients, decision.scale_B, ~decision.finite_B)
        return squares_B, decision

    def _bin_by_bin(
        self, gradients: list[Tensor | None], parameters: list[Tensor], pace_B: Tensor | None, gain_B: Tensor | None
    ) -> tuple[Tensor, Decision] | None:
        """The same in one go, or None where the kernel cannot, with nothing done."""
        assert self._lines is not None and self._bound is not None
        times_T = None
        if pace_B is not None and gain_B is not None:
            times_T = pace_B.numpy()[self._bin_of_tensor] / gain_B.numpy()[self._bin_of_tensor]
        table = line_table(self._lines, self.plan.width_T, times_T)
        measured = self._bound(gradients, parameters if self.ledger.reads_weights else None, table)
        if measured is None:
            return None
        squares_B, weight_squares_B = measured

        def decide() -> Decision:
            with torch.no_grad():
                return self.ledger.decide(squares_B, weight_squares_B, pace_B, gain_B)

        return squares_B, DeferredDecision(self.plan, decide)


def _spared(decision: Decision, squares_B: Tensor, overflow: Tensor) -> Decision:
    """The decision as it is; on an overflow one that names the bins that overflowed and scales none."""
    finite_B = squares_B.isfinite()
    norm_B = torch.where(finite_B, squares_B, 0.0).sqrt()
    return Decision(decision.plan, norm_B, finite_B, torch.where(overflow, 1.0, decision.scale_B), decision.limits)
