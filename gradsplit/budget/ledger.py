"""The ledger: a plan's budgets at all levels with their history, and the decision of one step."""

from __future__ import annotations

import enum
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..plan import Plan
from ..xp import Array, namespace
from .base import Budget, Reading, State
from .bottom_up import bin_scales
from .fixed import Fixed
from .node_sums import Nodes
from .project import RULES

__all__ = ["Decision", "Ledger", "Outcome"]


class Outcome(enum.IntEnum):
    """Why a bin has its scale."""

    KEPT = 0
    SCALED = 1
    ZEROED = 2

    @property
    def sentence(self) -> str:
        """What it means for the gradient."""
        return (
            "within its limit, left as it was, bit for bit",
            "above its own limit or an ancestor's, scaled down",
            "not finite, set to zero; history and moments left as they were",
        )[self]


@dataclass(frozen=True)
class Decision:
    """Limits, scales and outcomes of one step, on the gradients' device.

    Attributes:
        plan: the plan they are for.
        norm_B: (B,) L2 norms, 0 where not finite.
        finite_B: (B,) whether all of the bin's entries were finite.
        scale_B: (B,) factors in [0, 1].
        limits: per budget the level, its nodes' indices (None: the bins, in order) and their limits.
    """

    plan: Plan
    norm_B: Array
    finite_B: Array
    scale_B: Array
    limits: tuple[tuple[str, Array | None, Array], ...] = field(repr=False, default=())

    @property
    def outcome_B(self) -> Array:
        """(B,) 0 KEPT, 1 SCALED, 2 ZEROED: see `Outcome`."""
        xp = namespace(self.scale_B)
        return xp.index(self.scale_B < 1, self.scale_B) + xp.index(~self.finite_B, self.scale_B)

    @property
    def limit_N(self) -> Array:
        """(N,) each node's limit, the least of its budgets'; inf where none is set."""
        xp, nodes = namespace(self.scale_B), Nodes.of(self.plan, self.scale_B)
        limit_N = xp.full(nodes.num_nodes, float("inf"), self.scale_B)
        for _, ids, values in self.limits:
            ids = nodes.bin_nodes_B if ids is None else ids
            limit_N = xp.put(limit_N, ids, xp.minimum(xp.take(limit_N, ids), values))
        return limit_N

    @property
    def limit_B(self) -> Array:
        """(B,) the limits at level "bin"."""
        xp = namespace(self.scale_B)
        limit_B = xp.full(self.scale_B.shape[0], float("inf"), self.scale_B)
        for level, _, values in self.limits:
            limit_B = xp.minimum(limit_B, values) if level == "bin" else limit_B
        return limit_B


@dataclass
class _Account:
    level: str
    ids: Array | None  # None: the bins, whose vectors need no tree
    budget: Budget
    state: State
    numel: Array | None = None  # elements of its nodes, above the bins; summed when first asked for


_Columns = tuple[Array, "Array | None", "Array | None", "Array | None"]
"""(B,) or (N,) norms or squares of the gradient, squares of the weights, pace and gain."""


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
        if rule not in RULES:
            raise ValueError(f"{call}(rule={rule!r}): expected one of {', '.join(RULES)}.")
        xp = namespace(like)
        self.plan, self.rule = plan, rule
        self.numel_B = xp.asarray(plan.numel_B, like)
        self.reads_weights = any(budget.reads_weights for _, budget in budgets)
        self._accounts: list[_Account] = []
        for level, budget in budgets:
            ids = None if level == "bin" else plan.level_nodes(level)
            num = plan.num_bins if ids is None else len(ids)
            if isinstance(budget, Fixed) and isinstance(budget.limit, tuple) and len(budget.limit) != num:
                raise ValueError(
                    f"{call}(budget={{{level!r}: Fixed(…)}}): expected one limit, or one a node of that level, shape "
                    f"({num},), "
                    f"got shape ({len(budget.limit)},)."
                )
            state = budget.init(xp, xp.full(num, 0.0, like))
            self._accounts.append(_Account(level, None if ids is None else xp.index(ids, like), budget, state))
        self._bins_only = all(account.ids is None for account in self._accounts)
        _warn_of_idle_limits(plan, budgets, call)

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
        xp = namespace(squares_B)
        finite_B = xp.isfinite(squares_B)
        zero, ones = xp.full(self.plan.num_bins, 0.0, squares_B), xp.full(self.plan.num_bins, 1.0, squares_B)
        norm_B = xp.sqrt(xp.where(finite_B, squares_B, zero))
        if weight_squares_B is not None:  # a broken weight must not make its ancestors' limits NaN
            weight_squares_B = xp.where(xp.isfinite(weight_squares_B), weight_squares_B, zero)
        columns = (norm_B, weight_squares_B, pace_B, gain_B)
        pace = ones if pace_B is None else pace_B
        weight_norm_B = None if weight_squares_B is None else xp.sqrt(weight_squares_B)
        at_bins = Reading(norm_B, weight_norm_B, self.numel_B, pace), gain_B
        above = None if self._bins_only else self._sums(columns)
        readings = [at_bins if above is None or a.ids is None else self._reading(a, *above) for a in self._accounts]
        limits = []
        for account, (reading, gain) in zip(self._accounts, readings, strict=True):
            limit = account.budget.limits(xp, reading, account.state)
            if account.budget.bounds_update and gain is not None:
                limit = limit / gain
            limits.append((account.level, account.ids, limit))
        decision = Decision(self.plan, norm_B, finite_B, norm_B, tuple(limits))
        if self._bins_only:
            scale_B = bin_scales(norm_B, decision.limit_B)
        else:
            scale_B = RULES[self.rule](self.plan, norm_B, decision.limit_N)
        decision = Decision(self.plan, norm_B, finite_B, xp.where(finite_B, scale_B, zero), tuple(limits))
        kept_N = None
        for account, (reading, _) in zip(self._accounts, readings, strict=True):
            if not account.state:
                continue
            kept = norm_B * decision.scale_B
            if account.ids is not None:
                kept_N = xp.sqrt(Nodes.of(self.plan, norm_B).sums_N(kept**2)) if kept_N is None else kept_N
                kept = xp.take(kept_N, account.ids)
            account.state = account.budget.learn(xp, reading, kept, account.state)
        return decision

    def _sums(self, columns: _Columns) -> _Columns:
        """Sums over each node, of what accounts above the bins show: taken once, whatever their number."""
        norm_B, weight_squares_B, pace_B, gain_B = columns
        nodes = Nodes.of(self.plan, norm_B)

        def of(values_B: Array | None) -> Array | None:
            return None if values_B is None else nodes.sums_N(values_B)

        pace = None if pace_B is None else pace_B * self.numel_B
        gain = None if gain_B is None else gain_B * self.numel_B
        return of(norm_B**2), of(weight_squares_B), of(pace), of(gain)

    def _reading(
        self, account: _Account, squares_N: Array, weight_squares_N: Array | None, pace_N: Any, gain_N: Any
    ) -> tuple[Reading, Array | None]:
        """Return what the account's nodes show; squares and sizes add, pace and gain are means by size."""
        xp = namespace(squares_N)
        if account.numel is None:
            account.numel = xp.take(Nodes.of(self.plan, squares_N).sums_N(self.numel_B), account.ids)
        numel = account.numel
        weight_norm = None if weight_squares_N is None else xp.sqrt(xp.take(weight_squares_N, account.ids))
        gain = None if gain_N is None else xp.take(gain_N, account.ids) / numel
        ones = xp.full(numel.shape[0], 1.0, squares_N)
        pace = ones if pace_N is None else xp.take(pace_N, account.ids) / numel
        return Reading(xp.sqrt(xp.take(squares_N, account.ids)), weight_norm, numel, pace), gain

    def state_dict(self) -> dict[str, list[Array]]:
        """Return the history: ``{"level/budget/position": arrays}``."""
        return {key: list(account.state) for key, account in self._keyed() if account.state}

    def load_state_dict(self, state: Mapping[str, Any], *, call: str) -> None:
        """Take a history over; nothing is taken unless all of it fits.

        Raises:
            ValueError: other budgets, or a vector of another length.
        """
        wanted = {key: account for key, account in self._keyed() if account.state}
        if set(wanted) != set(state):
            raise ValueError(
                f"{call}: expected the history of budgets {sorted(wanted)}, got {sorted(state)}. Use the budgets of "
                "the saved run, "
                "or start their history anew by leaving the state out."
            )
        fresh: dict[str, State] = {}
        for key, account in wanted.items():
            xp, old = namespace(account.state[0]), account.state
            new = tuple(xp.asarray(array, like) for array, like in zip(state[key], old, strict=False))
            if [tuple(a.shape) for a in new] != [tuple(a.shape) for a in old]:
                shapes = [tuple(a.shape) for a in new]
                raise ValueError(f"{call}: expected vectors of shape {tuple(old[0].shape)} at {key!r}, got {shapes}.")
            fresh[key] = tuple(array + like * 0.0 for array, like in zip(new, old, strict=True))
        for key, account in wanted.items():
            account.state = fresh[key]

    def _keyed(self) -> list[tuple[str, _Account]]:
        return [(f"{a.level}/{a.budget.name}/{i}", a) for i, a in enumerate(self._accounts)]


def _warn_of_idle_limits(plan: Plan, budgets: list[tuple[str, Budget]], call: str) -> None:
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
