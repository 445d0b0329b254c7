"""The ledger: a plan's budgets at all levels with their history, and the decision of one step."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..plan import Plan
from ..xp import Array, namespace
from .base import Budget, State
from .deciding import begin, decide, terms_of
from .decision import Decision
from .fixed import Fixed
from .length_sums import sums_for
from .node_sums import Nodes

__all__ = ["Ledger", "warn_of_idle_limits"]


class Ledger:
    """Budgets over a plan, with history; one decision a step.

    Args:
        plan: what is bounded.
        budgets: (level, budget) pairs, from `budgets_by_level`.
        like: an array of the namespace, dtype and device in which to compute.
        rule: "bottom_up" or "nearest".
        call: the caller's name, for errors.

    Raises:
        ValueError: a limit of the wrong shape, an unknown rule.

    Warns:
        UserWarning: a node whose constant limit can never bind.
    """

    def __init__(
        self,
        plan: Plan,
        budgets: list[tuple[str, Budget]],
        like: Array,
        *,
        rule: str = "bottom_up",
        call: str = "Ledger",
    ) -> None:
        self.plan, self.rule = plan, rule
        self.terms = terms_of(plan, budgets, like, rule=rule, call=call)
        self.history = begin(self.terms, like)
        self.numel_B = namespace(like).asarray(plan.numel_B, like)
        self.reads_weights = any(budget.reads_weights for _, budget in budgets)
        self._keys = [f"{term.level}/{term.budget.name}/{i}" for i, term in enumerate(self.terms)]
        if any(term.ids is not None for term in self.terms):
            # A decision on nothing, which changes nothing, makes the tables that are kept with the plan: outside of
            # any graph that a step may be traced into.
            nothing = namespace(like).full(plan.num_bins, 0.0, like)
            decide(plan, self.terms, self.history, nothing, nothing, rule=rule)
        warn_of_idle_limits(plan, budgets, call)

    def decide(
        self,
        squares_B: Array,
        weight_squares_B: Array | None = None,
        pace_B: Array | None = None,
        gain_B: Array | None = None,
    ) -> Decision:
        """Return the decision for one step and enter it into the history.

        Args:
            squares_B: (B,) sums of squares; not finite where an entry was not.
            weight_squares_B: (B,) sums of squares of the weights, if a budget reads them.
            pace_B: (B,) learning rate / largest so far; None: 1.
            gain_B: (B,) length of the update per length of gradient, for budgets that bound the update; None: 1.
        """
        amounts = sums_for(squares_B).of_squares
        weights = None if weight_squares_B is None else amounts(weight_squares_B)
        decision, self.history = decide(
            self.plan, self.terms, self.history, amounts(squares_B), weights, pace_B, gain_B, rule=self.rule
        )
        return decision

    def state_dict(self) -> dict[str, list[Array]]:
        """Return the history: ``{"level/budget/position": arrays}``."""
        return {key: list(self.history[i]) for i, key in enumerate(self._keys) if self.history[i]}

    def load_state_dict(self, state: Mapping[str, Any], *, call: str) -> None:
        """Take a history over; nothing is taken unless all of it fits.

        Raises:
            ValueError: other budgets, a vector of another length, or one with a value that no history has.
        """
        wanted = {key: self.history[i] for i, key in enumerate(self._keys) if self.history[i]}
        if not isinstance(state, Mapping) or set(wanted) != set(state):
            got = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(
                f"{call}: expected the history of budgets {sorted(wanted)}, got {got}. Use the budgets of "
                "the saved run, "
                "or start their history anew by leaving the state out."
            )
        fresh: dict[str, State] = {}
        for key, old in wanted.items():
            xp = namespace(old[0])
            try:
                new = tuple(xp.asarray(array, old[0]) for array in state[key])
            except (TypeError, ValueError, RuntimeError, OverflowError) as error:
                raise ValueError(
                    f"{call}: expected {len(old)} vectors of numbers at {key!r}, got {type(state[key]).__name__} "
                    f"({error}). Load what state_dict() returned."
                ) from None
            if [tuple(a.shape) for a in new] != [tuple(a.shape) for a in old]:
                shapes = [tuple(a.shape) for a in new]
                raise ValueError(f"{call}: expected vectors of shape {tuple(old[0].shape)} at {key!r}, got {shapes}.")
            if not all(_is_history(array) for array in new):
                raise ValueError(
                    f"{call}: expected a history of finite numbers >= 0 at {key!r}, got others. The state is damaged: "
                    "load another, or start the history anew."
                )
            fresh[key] = tuple(array + like * 0.0 for array, like in zip(new, old, strict=True))
        self.history = tuple(fresh.get(key, ()) for key in self._keys)


def _is_history(array: Array) -> bool:
    """Whether all entries are finite and >= 0, as every budget's history is."""
    xp, num = namespace(array), array.shape[0]
    wrong = xp.where(xp.isfinite(array) & (array >= 0), xp.full(num, 0.0, array), xp.full(num, 1.0, array))
    return float(xp.cumsum(wrong)[-1]) == 0.0


def warn_of_idle_limits(plan: Plan, budgets: list[tuple[str, Budget]], call: str) -> None:
    """Warn of the first node whose squared limit is at least the sum of its children's squared limits."""
    if all(level == "bin" for level, _ in budgets) or not all(isinstance(budget, Fixed) for _, budget in budgets):
        return
    limit_N = np.full(plan.num_nodes, np.inf)
    for level, budget in budgets:
        if isinstance(budget, Fixed):
            ids = plan.level_nodes(level)
            limit_N[ids] = np.minimum(limit_N[ids], np.asarray(budget.limit, dtype=np.float64))
    reach2_N = limit_N**2  # the largest squared norm that can arrive at a node from below
    for lo, hi in reversed(Nodes.of(plan, limit_N).depths[1:]):
        parents = plan.parents_N[lo:hi]
        sums = np.bincount(parents, weights=reach2_N[lo:hi], minlength=plan.num_nodes)
        for node in np.unique(parents):
            if np.isfinite(limit_N[node]) and limit_N[node] ** 2 >= sums[node] * (1 - 1e-12):
                warnings.warn(
                    f"{call}(budget=…): the limit {limit_N[node]:g} of {plan.nodes[int(node)].name!r} can never "
                    "bind, since its "
                    f"children keep at most {np.sqrt(sums[node]):g} together. Lower it, or leave it out.",
                    UserWarning,
                    stacklevel=4,
                )
                return
            reach2_N[node] = min(reach2_N[node], sums[node])
