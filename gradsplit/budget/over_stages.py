"""Limits at the root over the stages of a pipeline: what one process knows of the root is a part of it.

Bottom-up, the root comes last: everything below is decided from a stage's own norms. What the root needs of the other
stages are sums, of squares before and after that decision, of weights and of sizes; they are added over the stages in
one message, and every stage finds the same factor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..plan import Plan
from ..xp import Array, namespace
from .base import Budget, Reading, State
from .bottom_up import bin_scales
from .decision import Decision
from .fixed import Fixed
from .ledger import Ledger

__all__ = ["StagedLedger", "make_ledger"]


def make_ledger(
    plan: Plan,
    budgets: list[tuple[str, Budget]],
    like: Array,
    *,
    rule: str = "bottom_up",
    call: str = "Ledger",
    add: Callable[[Array], Array] | None = None,
) -> Ledger | StagedLedger:
    """Return a `Ledger`, or one whose root spans all stages where ``add`` adds over them and a budget bounds the root.

    Raises:
        ValueError: the rule "nearest" over stages.
    """
    if add is None or not any(level == "root" for level, _ in budgets):
        return Ledger(plan, budgets, like, rule=rule, call=call)
    if rule != "bottom_up":
        raise ValueError(
            f"{call}(rule={rule!r}, stages=…): expected rule='bottom_up' for a limit at the root over stages, since "
            "the nearest point needs every bin of every stage. Leave rule= out, or the limit at the root."
        )
    return StagedLedger(plan, budgets, like, call=call, add=add)


class StagedLedger:
    """A ledger whose root is the sum of the stages' roots; the interface is that of `Ledger`.

        f = min(1, limit / sqrt(sum over stages of what each kept below its root^2));    scale_B <- f scale_B

    Args:
        plan, budgets, like, call: see `Ledger`.
        add: adds a vector over the stages, each counted once.
    """

    def __init__(
        self, plan: Plan, budgets: list[tuple[str, Budget]], like: Array, *, call: str, add: Callable[[Array], Array]
    ) -> None:
        below = [pair for pair in budgets if pair[0] != "root"] or [("bin", Fixed(float("inf")))]
        self.below = Ledger(plan, below, like, call=call)
        xp = namespace(like)
        zero = xp.full(1, 0.0, like)
        self._roots: list[tuple[Budget, State]] = [(b, b.init(xp, zero)) for level, b in budgets if level == "root"]
        self.plan, self.rule, self.numel_B, self._add = plan, "bottom_up", self.below.numel_B, add
        self.reads_weights = any(budget.reads_weights for _, budget in budgets)

    def decide(
        self,
        squares_B: Array,
        weight_squares_B: Array | None = None,
        pace_B: Array | None = None,
        gain_B: Array | None = None,
    ) -> Decision:
        """See `Ledger.decide`; every stage takes part, with whatever gradients it has."""
        xp = namespace(squares_B)
        made = self.below.decide(squares_B, weight_squares_B, pace_B, gain_B)
        zero, ones = xp.full(self.plan.num_bins, 0.0, squares_B), xp.full(self.plan.num_bins, 1.0, squares_B)
        weights = zero if weight_squares_B is None else xp.where(xp.isfinite(weight_squares_B), weight_squares_B, zero)
        pace, gain = (self.numel_B * (ones if rate_B is None else rate_B) for rate_B in (pace_B, gain_B))
        rows_B = xp.asarray(self.plan.num_rows_B, squares_B)
        columns = (made.norm_B**2, (made.norm_B * made.scale_B) ** 2, weights, self.numel_B, rows_B, pace, gain)
        sums = self._add(xp.concatenate([xp.cumsum(column)[-1:] for column in columns]))
        each = (sums[i : i + 1] for i in range(len(columns)))
        square, kept_square, weight_square, numel, num_rows, pace_sum, gain_sum = each
        weight_norm = None if weight_squares_B is None else xp.sqrt(weight_square)
        reading = Reading(xp.sqrt(square), weight_norm, numel, num_rows, pace_sum / numel)
        limits, kept = [], xp.sqrt(kept_square)
        for budget, state in self._roots:
            limit = budget.limits(xp, reading, state)
            limits.append(limit / (gain_sum / numel) if budget.bounds_update and gain_B is not None else limit)
        least = limits[0]
        for limit in limits[1:]:
            least = xp.minimum(least, limit)
        factor = bin_scales(kept, least)
        self._roots = [
            (budget, budget.learn(xp, reading, kept * factor, state) if state else state)
            for budget, state in self._roots
        ]
        root = xp.index(self.plan.level_nodes("root"), squares_B)
        every = (*made.limits, *(("root", root, limit) for limit in limits))
        return Decision(self.plan, made.norm_B, made.finite_B, made.scale_B * factor, every)

    def state_dict(self) -> dict[str, list[Array]]:
        """See `Ledger.state_dict`; the history of the root is the same on every stage."""
        return {**self.below.state_dict(), **{key: list(state) for key, state in self._keyed().items()}}

    def load_state_dict(self, state: Mapping[str, Any], *, call: str) -> None:
        """See `Ledger.load_state_dict`."""
        wanted = self._keyed()
        if not set(wanted) <= set(state):
            raise ValueError(
                f"{call}: expected the history of budgets {sorted(wanted)} over all stages, got {sorted(state)}. Use "
                "the budgets of the saved run, and stages= as there."
            )
        self.below.load_state_dict({key: value for key, value in state.items() if key not in wanted}, call=call)
        self._roots = [
            (budget, tuple(namespace(old).asarray(new, old) for new, old in zip(state[key], held, strict=True)))
            if held
            else (budget, held)
            for (budget, held), key in zip(self._roots, self._keys(), strict=True)
        ]

    def _keys(self) -> list[str]:
        return [f"root over stages/{budget.name}/{i}" for i, (budget, _) in enumerate(self._roots)]

    def _keyed(self) -> dict[str, State]:
        return {key: state for key, (_, state) in zip(self._keys(), self._roots, strict=True) if state}
