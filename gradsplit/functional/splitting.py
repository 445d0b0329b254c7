"""Bounding gradients as two pure functions: the history before the first step, and one step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ..budget import Decision, State, Term, begin, budgets_by_level, decide, sums_for, terms_of, warn_of_idle_limits
from ..collective import COLLECTIVE, ENOUGH, FALLS, LET_THROUGH, RISES
from ..plan import Plan
from ..xp import Array, namespace
from .arrays import Oriented, Patterns

__all__ = ["History", "Splitting", "collective_factor", "decide_collectively", "splitting"]

History = tuple[State, ...]
"""Per budget its arrays, in the order of the budgets; then those of the collective rule, if it stands beside them."""


class Splitting(NamedTuple):
    """A pair of pure functions over arrays in the order of the plan's layout.

    Attributes:
        init: ``init(arrays) -> history`` from arrays of the gradients' dtypes; their values are not looked at.
        update: ``update(gradients, history, weights=None, pace=None, reach=None) -> (gradients, history, decision)``.
            weights: the arrays that the gradients are of, if ``reads_weights``. pace: learning rate / largest so far.
            reach: length of the update per length of gradient, lr / (1 - momentum) for SGD. Both 0-d or (B,).
        reads_weights: whether limits depend on the weights.
        bounds_update: whether a limit is a length of the update, so that ``reach`` is needed unless updates are given.
    """

    init: Callable[[Sequence[Array]], History]
    update: Callable[..., tuple[list[Array], History, Decision]]
    reads_weights: bool
    bounds_update: bool


def collective_factor(norm_B: Array, seen_B: Array, recent_B: Array, steps: Array) -> tuple[Array, Array]:
    """Return the factor of the collective rule for the whole gradient, 0-d, and the recent norms after this step, (B,).

    Args:
        norm_B: (B,) norms of the gradient, gradient units, 0 where not finite.
        seen_B: (B,) where they are finite and above zero.
        recent_B: (B,) the recent norms; 0 before the first.
        steps: steps so far, 0-d or (1,).

    The rule is told in `gradsplit.collective`.
    """
    xp = namespace(norm_B)
    recent_B = xp.cast(recent_B, norm_B)
    known_B = recent_B > 0
    ratio_B = norm_B / xp.where(known_B, recent_B, recent_B * 0.0 + 1.0)
    median = xp.median(xp.where(seen_B & known_B, ratio_B, float("nan")), fewest=ENOUGH)
    fired = median > COLLECTIVE  # nan, where too little is known, is not above
    factor = xp.where(fired, 1.0 / median, 1.0)
    steps = xp.cast(steps, norm_B)
    falls = xp.minimum(steps / (steps + 2.0), xp.asarray(FALLS, steps))
    follows_B = xp.minimum(xp.maximum(norm_B, falls * recent_B), RISES * recent_B)
    moved_B = xp.where(fired, LET_THROUGH * recent_B, follows_B)
    return factor, xp.where(seen_B, xp.where(known_B, moved_B, norm_B * factor), recent_B)


def decide_collectively(
    plan: Plan,
    terms: tuple[Term, ...],
    history: History,
    recent: tuple[Array, Array],
    amount_B: Array,
    weight_B: Array | None = None,
    pace: Array | None = None,
    reach: Array | None = None,
    *,
    rule: str,
) -> tuple[Decision, History, tuple[Array, Array]]:
    """Return the budgets' decision, on the gradient after a jump of the whole batch was undone, and what is remembered.

    The arguments are those of `gradsplit.budget.decide`, with the recent norms (B,) and the number of steps between
    them, see `collective_factor`.
    """
    xp, sums = namespace(amount_B), sums_for(amount_B)
    recent_B, steps = recent
    finite_B = xp.isfinite(amount_B)
    norm_B = sums.norm(xp.where(finite_B, amount_B, xp.full(plan.num_bins, 0.0, amount_B)))
    seen_B = finite_B & (norm_B > 0)
    factor, recent_B = collective_factor(norm_B, seen_B, recent_B, steps)
    steps = steps + xp.cast(~xp.every(~seen_B), steps)
    made, learned = decide(plan, terms, history, sums.times(amount_B, factor), weight_B, pace, reach, rule=rule)
    whole = Decision(plan, norm_B, made.finite_B, made.scale_B * factor, made.limits)
    return whole, learned, (recent_B, steps)


def splitting(
    plan: Plan,
    budget: Any,
    *,
    oriented: Oriented | None = None,
    rule: str = "bottom_up",
    collective: bool = False,
    call: str = "splitting",
) -> Splitting:
    """Make the functions that bound each bin of a gradient by a budget of its own.

    Args:
        plan: the bins.
        budget: see `gradsplit.GradientSplitter`.
        oriented: the arrays' own axes; None: PyTorch's.
        rule: "bottom_up" or "nearest".
        collective: divide the whole gradient where all bins are scaled together, see `gradsplit.collective`.
        call: the caller's name, for errors.

    Raises:
        ValueError: an unknown budget, level or rule; the plan of other arrays; from ``update``, a budget that reads
            weights without any.

    >>> import numpy as np
    >>> from gradsplit.plan import Layout, xsp
    >>> rows = splitting(xsp(Layout.from_shapes({"w": (2, 2)})), "fixed")        # each row at most 1 long
    >>> gradient = np.array([[30.0, 40.0], [0.3, 0.4]])
    >>> rows.update([gradient], rows.init([gradient]))[0]
    [array([[0.6, 0.8],
           [0.3, 0.4]])]
    """
    budgets = budgets_by_level(budget, plan, call=call)
    patterns = Patterns(plan, oriented, call=call)
    reads_weights = any(one.reads_weights for _, one in budgets)
    warn_of_idle_limits(plan, budgets, call)

    def init(arrays: Sequence[Array]) -> History:
        xp = namespace(arrays[0])
        like = xp.accumulator(arrays)
        beside = ((xp.full(plan.num_bins, 0.0, like), xp.full(1, 0.0, like)),) if collective else ()
        return (*begin(terms_of(plan, budgets, like, rule=rule, call=call), like), *beside)

    def update(
        gradients: Sequence[Array],
        history: History,
        weights: Sequence[Array] | None = None,
        pace: Array | None = None,
        reach: Array | None = None,
    ) -> tuple[list[Array], History, Decision]:
        if reads_weights and weights is None:
            names = ", ".join(sorted({one.name for _, one in budgets if one.reads_weights}))
            raise ValueError(f"{call}(budget=…): expected the weights, since limits of {names} depend on them.")
        amount_B = patterns.amounts_B(gradients)
        weight_B = patterns.amounts_B(weights, may_explode=False) if reads_weights and weights is not None else None
        terms = terms_of(plan, budgets, amount_B, rule=rule, call=call)
        if pace is not None:
            pace = namespace(amount_B).asarray(pace, amount_B)
        if reach is not None:
            reach = namespace(amount_B).asarray(reach, amount_B)
        given = amount_B, weight_B, pace, reach
        if collective:
            *of_budgets, recent = history
            decision, learned, recent = decide_collectively(plan, terms, tuple(of_budgets), recent, *given, rule=rule)
            history = (*learned, recent)
        else:
            decision, history = decide(plan, terms, history, *given, rule=rule)
        return patterns.scaled(gradients, decision.scale_B, ~decision.finite_B), history, decision

    bounds_update = any(one.bounds_update for _, one in budgets)
    # A rule or a vector of limits that does not fit is refused now, not at the first step.
    terms_of(plan, budgets, plan.numel_B, rule=rule, call=call)
    return Splitting(init, update, reads_weights, bounds_update)
