"""AdamW over bins as pure functions: `gradsplit.GSO(direction="adam")`, for any framework.

Per bin b, with gradient g, weights w, scale s_b from the budgets of the gradient:

    g'  = s_b g                        m   = b1 m + (1 - b1) g'
    v   = b2 v + (1 - b2) g'^2         element-wise, or one per bin:  v_b = b2 v_b + (1 - b2) s_b^2 square_b / n_b
    u   = lr  m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)
    w   = w - c_b (u + lr decay w)     c_b from the budgets of the update

A bin whose gradient is not finite is passed over: weights, moments and history stay as they were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ..budget import DEFAULT_OF_GSO, Decision, begin, budgets_by_level, decide, terms_of
from ..plan import Plan
from ..xp import Array, namespace
from .arrays import Oriented, Patterns
from .splitting import History

__all__ = ["GsoRule", "GsoState", "check_constants", "grown", "gso_rule", "is_number"]


class GsoState(NamedTuple):
    """What GSO's next step depends on.

    Attributes:
        step: 0-d, steps made.
        first_moments: per array the mean gradient.
        second_moments: per array the mean square; for "bin" a single vector (B,) of mean squares.
        of_gradient, of_update: histories of the budgets.
    """

    step: Array
    first_moments: tuple[Array, ...]
    second_moments: tuple[Array, ...]
    of_gradient: History
    of_update: History


class GsoRule(NamedTuple):
    """A pair of pure functions over arrays in the order of the plan's layout.

    Attributes:
        init: ``init(weights) -> state``.
        update: ``update(gradients, state, weights, lr, pace=None) -> (changes, state, decision)``: what to add to the
            weights, and the decision on the gradient. lr: 0-d. pace: lr / largest so far, 0-d.
    """

    init: Callable[[Sequence[Array]], GsoState]
    update: Callable[..., tuple[list[Array], GsoState, Decision]]


def gso_rule(
    plan: Plan,
    budget: Any = DEFAULT_OF_GSO,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    second_moment: str = "element",
    oriented: Oriented | None = None,
    rule: str = "bottom_up",
    call: str = "gso_rule",
) -> GsoRule:
    """Make the functions of GSO's step; arguments as in `gradsplit.GSO`.

    Raises:
        ValueError: a constant out of its range, an unknown name, "bin" with bins over several arrays.

    >>> import numpy as np
    >>> from gradsplit.plan import Layout, xsp
    >>> gso = gso_rule(xsp(Layout.from_shapes({"w": (1, 2)})), weight_decay=0.0)
    >>> w = np.array([[3.0, 4.0]])
    >>> changes, _, _ = gso.update([np.array([[1e9, 0.0]])], gso.init([w]), [w], 1.0)
    >>> (w + changes[0]).round(6)                    # at most 3 % of the row's length, 5
    array([[2.85, 4.  ]])
    """
    check_constants(betas, eps, weight_decay, second_moment, call)
    by_bin = second_moment == "bin"
    if by_bin and (plan.tensor_B < 0).any():
        raise ValueError(
            f"{call}(second_moment='bin'): expected bins inside one tensor each, got {plan!r} with bins over several. "
            "Use a plan by rows or tensors, or second_moment='element'."
        )
    budgets = budgets_by_level(budget, plan, call=call)
    on_gradient = [pair for pair in budgets if not pair[1].bounds_update]
    on_update = [pair for pair in budgets if pair[1].bounds_update]
    reads_weights = any(one.reads_weights for _, one in budgets)
    patterns = Patterns(plan, oriented, call=call)
    for pairs in (on_gradient, on_update):
        terms_of(plan, pairs, plan.numel_B, rule=rule, call=call)
    beta1, beta2 = betas

    def init(weights: Sequence[Array]) -> GsoState:
        xp = namespace(weights[0])
        like = xp.accumulator(weights)
        zeros = tuple(xp.zeros_like(weight) for weight in weights)
        return GsoState(
            xp.reshape(xp.full(1, 0.0, like), ()),
            zeros,
            (xp.full(plan.num_bins, 0.0, like),) if by_bin else tuple(xp.zeros_like(weight) for weight in weights),
            begin(terms_of(plan, on_gradient, like, rule=rule, call=call), like),
            begin(terms_of(plan, on_update, like, rule=rule, call=call), like),
        )

    def update(
        gradients: Sequence[Array], state: GsoState, weights: Sequence[Array], lr: Any, pace: Any = None
    ) -> tuple[list[Array], GsoState, Decision]:
        amount_B = patterns.amounts_B(gradients)
        xp = namespace(amount_B)
        weight_B = patterns.amounts_B(weights, may_explode=False) if reads_weights else None
        lr, pace = xp.asarray(lr, amount_B), None if pace is None else xp.asarray(pace, amount_B)
        gradient_terms = terms_of(plan, on_gradient, amount_B, rule=rule, call=call)
        decision, of_gradient = decide(plan, gradient_terms, state.of_gradient, amount_B, weight_B, rule=rule)
        step = state.step + 1.0
        # A bin that is passed over has weight 0 in its moments, and 0 of an update: nothing is chosen entry by entry.
        live_B = xp.where(
            decision.finite_B, xp.full(plan.num_bins, 1.0, amount_B), xp.full(plan.num_bins, 0.0, amount_B)
        )
        bounded = patterns.scaled(gradients, decision.scale_B, ~decision.finite_B)
        moments, second_moments, updates = entered(bounded, decision, state, step, live_B, lr)
        of_update, shrink_B = state.of_update, live_B * (lr * weight_decay)
        if on_update:
            moved_B = patterns.amounts_B(updates, may_explode=False)
            update_terms = terms_of(plan, on_update, amount_B, rule=rule, call=call)
            cap, of_update = decide(plan, update_terms, of_update, moved_B, weight_B, pace, rule=rule)
            updates, shrink_B = patterns.scaled(updates, cap.scale_B, ~cap.finite_B), shrink_B * cap.scale_B
        decays = not is_number(weight_decay) or weight_decay
        changes = []
        for t, update in enumerate(updates):
            decay = xp.cast(weights[t], update) * patterns.factor(t, shrink_B) if decays else 0.0
            changes.append(xp.cast(-update - decay, weights[t]))
        return changes, GsoState(step, moments, second_moments, of_gradient, of_update), decision

    def entered(
        bounded: list[Array], decision: Decision, state: GsoState, step: Array, live_B: Array, lr: Array
    ) -> tuple[tuple[Array, ...], tuple[Array, ...], list[Array]]:
        """Take bounded gradients into the moments; return both moments, and the updates before any cap."""
        xp = namespace(live_B)
        first, root = grown(xp, beta1, step), 1.0 / xp.sqrt(grown(xp, beta2, step))
        enters_B, enters2_B, pull_B = live_B * (1 - beta1), live_B * (1 - beta2), live_B * (lr / first)
        stays2_B = 1.0 - enters2_B
        moments, second_moments, updates = [], [], []
        if by_bin:
            mean_B = (decision.norm_B * decision.scale_B / xp.sqrt(xp.asarray(plan.numel_B, live_B))) ** 2
            second_moments = [state.second_moments[0] * stays2_B + mean_B * enters2_B]
            pull_B = pull_B / (xp.sqrt(second_moments[0]) * root + eps)
        for t, gradient in enumerate(bounded):
            g, m = xp.cast(gradient, live_B), xp.cast(state.first_moments[t], live_B)
            m = m + patterns.factor(t, enters_B) * (g - m)
            moments.append(xp.cast(m, state.first_moments[t]))
            update = m * patterns.factor(t, pull_B)
            if not by_bin:
                v = xp.cast(state.second_moments[t], live_B)
                v = v * patterns.factor(t, stays2_B) + g * g * patterns.factor(t, enters2_B)
                second_moments.append(xp.cast(v, state.second_moments[t]))
                update = update / (xp.sqrt(v) * root + eps)
            updates.append(update)
        return tuple(moments), tuple(second_moments), updates

    return GsoRule(init, update)


def grown(xp: Any, beta: float, step: Array) -> Array:
    """1 - beta^step without cancellation."""
    if not is_number(beta):
        return -xp.expm1(step * xp.log(beta))
    return -xp.expm1(step * math.log(beta)) if beta else step * 0.0 + 1.0


def is_number(value: Any) -> bool:
    """Whether a constant is known before the run, and is not an array of a graph."""
    return isinstance(value, (int, float))


def check_constants(betas: tuple[float, float], eps: float, weight_decay: float, second_moment: str, call: str) -> None:
    """Check the constants that both rules of GSO have.

    Raises:
        ValueError: a constant out of its range.
    """
    if second_moment not in ("element", "bin"):
        raise ValueError(f"{call}(second_moment={second_moment!r}): expected 'element' or 'bin'.")
    for name, value, ok, rule in (
        ("betas", betas, all(not is_number(beta) or 0 <= beta < 1 for beta in betas), "two memories in [0, 1)"),
        ("eps", eps, not is_number(eps) or eps >= 0, "a number >= 0"),
        ("weight_decay", weight_decay, not is_number(weight_decay) or weight_decay >= 0, "a number >= 0"),
    ):
        if not ok:
            raise ValueError(f"{call}({name}={value!r}): expected {rule}.")
