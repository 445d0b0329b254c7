"""The decision of one step as a pure function: norms and history in, limits, scales and the next history out.

Every front shares it: `Ledger` keeps the history between calls, the functional core hands it through a compiled graph.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

import numpy as np

from ..plan import Plan
from ..xp import Array, namespace
from .base import Budget, Reading, State
from .projection import RULES, bin_scales
from .sums import Nodes, sums_for

__all__ = ["Decision", "Outcome", "Term", "begin", "decide", "terms_of"]


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


@dataclass(frozen=True)
class Term:
    """One budget at one level of a plan.

    Attributes:
        level: "root", "module", "tensor" or "bin".
        budget: the rule.
        ids: its nodes; None: the bins, whose vectors need no tree.
        numel: elements of its nodes.
        num_rows: rows of matrices of its nodes.
        numel_B: elements of all bins; None: its nodes are the bins.
    """

    level: str
    budget: Budget
    ids: Array | None
    numel: Array
    num_rows: Array
    numel_B: Array | None = None


def terms_of(plan: Plan, budgets: list[tuple[str, Budget]], like: Array, *, rule: str, call: str) -> tuple[Term, ...]:
    """Return the terms of (level, budget) pairs, with index arrays beside ``like``.

    Raises:
        ValueError: a limit of the wrong shape, an unknown rule.
    """
    if rule not in RULES:
        raise ValueError(f"{call}(rule={rule!r}): expected one of {', '.join(RULES)}.")
    xp, terms = namespace(like), []
    above = any(level != "bin" for level, _ in budgets)
    numel_N, num_rows_N = (_sums_N(plan, sizes_B) if above else sizes_B for sizes_B in (plan.numel_B, plan.num_rows_B))
    for level, budget in budgets:
        ids = None if level == "bin" else plan.level_nodes(level)
        num = plan.num_bins if ids is None else len(ids)
        problem = budget.check(num)
        if problem:
            raise ValueError(f"{call}(budget={{{level!r}: {type(budget).__name__}(…)}}): expected {problem}.")
        numel = xp.asarray(plan.numel_B if ids is None else numel_N[ids], like)
        num_rows = xp.asarray(plan.num_rows_B if ids is None else num_rows_N[ids], like)
        nodes = None if ids is None else xp.index(ids, like)
        numel_B = None if ids is None else xp.asarray(plan.numel_B, like)
        terms.append(Term(level, budget, nodes, numel, num_rows, numel_B))
    return tuple(terms)


def begin(terms: tuple[Term, ...], like: Array) -> tuple[State, ...]:
    """Return the history before the first step, one entry per term."""
    xp = namespace(like)
    return tuple(term.budget.init(xp, xp.full(term.numel.shape[0], 0.0, like)) for term in terms)


def decide(
    plan: Plan,
    terms: tuple[Term, ...],
    history: tuple[State, ...],
    amount_B: Array,
    weight_amount_B: Array | None = None,
    pace_B: Array | None = None,
    reach_B: Array | None = None,
    *,
    rule: str = "bottom_up",
) -> tuple[Decision, tuple[State, ...]]:
    """Return the decision of one step, and the history that has taken it in.

    Args:
        plan: B bins.
        terms: from `terms_of`.
        history: from `begin` or from the step before.
        amount_B: (B,) amounts of the gradient, see `gradsplit.budget.sums`; not finite where an entry was not.
        weight_amount_B: (B,) amounts of the weights, if a budget reads them.
        pace_B: (B,) or 0-d, learning rate / largest so far; None: 1.
        reach_B: (B,) or 0-d, length of the update per length of gradient, for budgets that bound the update; None: 1.
        rule: "bottom_up" or "nearest".
    """
    xp, sums = namespace(amount_B), sums_for(amount_B)
    finite_B = xp.isfinite(amount_B)
    zero = xp.full(plan.num_bins, 0.0, amount_B)
    norm_B = sums.norm(xp.where(finite_B, amount_B, zero))
    if weight_amount_B is not None:  # a broken weight must not make its ancestors' limits NaN
        weight_amount_B = xp.where(xp.isfinite(weight_amount_B), weight_amount_B, zero)
    bins_only = all(term.ids is None for term in terms)
    readings = _readings(plan, terms, norm_B, weight_amount_B, pace_B, reach_B)
    limits = []
    for term, state, (reading, reach) in zip(terms, history, readings, strict=True):
        limit = term.budget.limits(xp, reading, state)
        if term.budget.bounds_update and reach is not None:
            limit = limit / reach
        limits.append((term.level, term.ids, limit))
    decision = Decision(plan, norm_B, finite_B, norm_B, tuple(limits))
    if bins_only:
        scale_B = bin_scales(norm_B, decision.limit_B)
    else:
        scale_B = RULES[rule](plan, norm_B, decision.limit_N)
    decision = Decision(plan, norm_B, finite_B, xp.where(finite_B, scale_B, zero), tuple(limits))
    kept_N, learned = None, []
    for term, state, (reading, _) in zip(terms, history, readings, strict=True):
        if state:
            kept = norm_B * decision.scale_B
            if term.ids is not None:
                kept_N = sums.norm(Nodes.of(plan, norm_B).amounts_N(sums.of(kept))) if kept_N is None else kept_N
                kept = xp.take(kept_N, term.ids)
            state = term.budget.learn(xp, reading, kept, state)
        learned.append(state)
    return decision, tuple(learned)


def _readings(
    plan: Plan,
    terms: tuple[Term, ...],
    norm_B: Array,
    weight_amount_B: Array | None,
    pace_B: Array | None,
    reach_B: Array | None,
) -> list[tuple[Reading, Array | None]]:
    """Return what each term's budget is shown, and its nodes' reach.

    Over the bins of a node, amounts and sizes add up. Pace and reach are means, weighted by the bins' sizes.
    """
    xp, sums = namespace(norm_B), sums_for(norm_B)
    norm_N = weight_norm_N = pace_N = reach_N = None
    above = [term.budget for term in terms if term.ids is not None]
    if above:  # sums over all nodes, taken once, whatever the number of terms, and only what a budget looks at
        nodes = Nodes.of(plan, norm_B)
        numel_B = next(term.numel_B for term in terms if term.numel_B is not None)
        if any(budget.reads_norms for budget in above):
            norm_N = sums.norm(nodes.amounts_N(sums.of(norm_B)))
        if weight_amount_B is not None and any(budget.reads_weights for budget in above):
            weight_norm_N = sums.norm(nodes.amounts_N(weight_amount_B))
        pace_N = nodes.sums_N(pace_B * numel_B) if _varies(pace_B) else None
        reach_N = nodes.sums_N(reach_B * numel_B) if _varies(reach_B) else None
    weight_norm_B = None if weight_amount_B is None else sums.norm(weight_amount_B)
    made = []
    for term in terms:
        ids, ones = term.ids, xp.full(term.numel.shape[0], 1.0, norm_B)
        if ids is None:
            pace = ones if pace_B is None else pace_B * ones
            made.append((Reading(norm_B, weight_norm_B, term.numel, term.num_rows, pace), reach_B))
            continue
        pace = xp.take(pace_N, ids) / term.numel if pace_N is not None else ones if pace_B is None else pace_B * ones
        reach = xp.take(reach_N, ids) / term.numel if reach_N is not None else reach_B
        weight_norm = None if weight_norm_N is None else xp.take(weight_norm_N, ids)
        norm = ones if norm_N is None else xp.take(norm_N, ids)
        made.append((Reading(norm, weight_norm, term.numel, term.num_rows, pace), reach))
    return made


def _varies(rate: Array | None) -> bool:
    """Whether a rate differs between bins, so that a node's is a mean; a single number is every node's."""
    return rate is not None and len(rate.shape) == 1


def _sums_N(plan: Plan, sizes_B: np.ndarray) -> np.ndarray:
    """Sizes of every node, the sums of its bins'."""
    sizes_N = np.zeros(plan.num_nodes)
    sizes_N[plan.bin_nodes_B] = sizes_B
    starts = plan.tree.depth_starts
    for lo, hi in zip(starts[-2:0:-1], starts[:1:-1], strict=True):
        np.add.at(sizes_N, plan.parents_N[lo:hi], sizes_N[lo:hi])
    return sizes_N
