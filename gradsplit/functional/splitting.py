"""Bounding gradients as two pure functions: the history before the first step, and one step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ..budget import Decision, State, begin, budgets_by_level, decide, terms_of, warn_of_idle_limits
from ..plan import Plan
from ..xp import Array, namespace
from .arrays import Oriented, Patterns

__all__ = ["History", "Splitting", "splitting"]

History = tuple[State, ...]
"""Per budget its arrays, in the order of the budgets."""


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


def splitting(
    plan: Plan,
    budget: Any,
    *,
    oriented: Oriented | None = None,
    rule: str = "bottom_up",
    call: str = "splitting",
) -> Splitting:
    """Make the functions that bound each bin of a gradient by a budget of its own.

    Args:
        plan: the bins.
        budget: see `gradsplit.GradientSplitter`.
        oriented: the arrays' own axes; None: PyTorch's.
        rule: "bottom_up" or "nearest".
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
        like = namespace(arrays[0]).accumulator(arrays)
        return begin(terms_of(plan, budgets, like, rule=rule, call=call), like)

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
        decision, history = decide(plan, terms, history, amount_B, weight_B, pace, reach, rule=rule)
        return patterns.scaled(gradients, decision.scale_B, ~decision.finite_B), history, decision

    bounds_update = any(one.bounds_update for _, one in budgets)
    # A rule or a vector of limits that does not fit is refused now, not at the first step.
    _check(plan, budgets, rule, call)
    return Splitting(init, update, reads_weights, bounds_update)


def _check(plan: Plan, budgets: list[Any], rule: str, call: str) -> None:
    terms_of(plan, budgets, plan.numel_B, rule=rule, call=call)
