"""The share step as pure functions: the formulas of `gradsplit.GSO`, for any framework.

Per bin b (a row by default), with gradient g, weights w of n entries, tau the share of now:

    c    = median over all bins of ||g_b|| / s_b               s_b the largest norm that the bin has had of late
    g'_b = g_b / c where c > 5, then times min(1, limit_b / ||g'_b||)                      limit_b from the budget
    D    = the array's direction, from g' and its memory
    tau <- tau min(1, (14 / H)^2)          H the number of layers that stand in series of late, see `gradsplit.series`
    tau <- tau min(1, min(1, 14 / H) M / V)    of vectors, which may change the loss by no more than matrices: likewise
    w_b <- (1 - decay tau) w_b - tau max(||w_b||, least sqrt n) d_b / max(||d_b||, floor)
    w_b <- w_b min(1, max(||w_b at the start||, longest) / ||w_b||)                        rows of matrices

The directions:

    m <- m + (1 - b1) (g' - m);    a = m + (1 - b1) (g' - m)                               Nesterov momentum
    orthogonal:  D = a with all singular values drawn near 1, by five steps of Newton-Schulz; floor = 0
    adam:        v <- v + (1 - b2) (g'^2 - v);   D = a / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps); floor = sqrt n

How s_b moves is told in `gradsplit.collective`. A bin whose gradient is not finite, and one whose direction is zero,
stays as it is, and so does its memory. A bin of an orthogonal direction stays where its gradient is exactly zero, and
its memory fades; Adam's direction fades by itself.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..budget import Decision, Relative, begin, budgets_by_level, sums_for, terms_of
from ..plan import Plan
from ..series import DEEP, FADES
from ..xp import Array, namespace
from .adam import check_constants, grown, is_number
from .arrays import Oriented, Patterns
from .kinds import WRITTEN, ArrayKind, array_kinds
from .splitting import History, decide_collectively

__all__ = ["DEFAULT_OF_SHARE", "ShareRule", "ShareState", "newton_schulz", "share_rule"]

DEFAULT_OF_SHARE = Relative(0.2)
"""The budget of gradients before the memory."""

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic of Muon (Jordan et al. 2024)
_TINY = 1e-30


class ShareState(NamedTuple):
    """What the next step depends on.

    Attributes:
        steps: 0-d, steps in which some bin had a finite gradient above zero.
        ages_T: (T,) per array, steps in which it had a gradient.
        momenta: per array the mean gradient.
        squares: per array whose direction is Adam's, in order, the mean square.
        recent_B: (B,) the largest norm of late; 0 before the first.
        most_B: (B,) the longest that the bin may become; 0 before its first move.
        of_gradient: histories of the budgets.
        series: 0-d, the number of layers in series of late.
    """

    steps: Array
    ages_T: Array
    momenta: tuple[Array, ...]
    squares: tuple[Array, ...]
    recent_B: Array
    most_B: Array
    of_gradient: History
    series: Array = 0.0


class ShareRule(NamedTuple):
    """A pair of pure functions over arrays in the order of the plan's layout.

    Attributes:
        init: ``init(weights) -> state``; the values are not looked at.
        update: ``update(gradients, state, weights, tau) -> (changes, state, decision)``: what to add to the weights,
            and the decision on the gradient. A gradient may be None: the array and its memory stay. tau: 0-d.
        kinds: what each array is.
    """

    init: Callable[[Sequence[Array]], ShareState]
    update: Callable[..., tuple[list[Array], ShareState, Decision]]
    kinds: tuple[ArrayKind, ...]


def newton_schulz(matrices: Array, steps: int = 5) -> Array:
    """Return matrices (S, rows, cols) with all singular values drawn near 1; the smaller side is multiplied.

        X <- X / ||X||_F;   then ``steps`` times:   X <- a X + (b A + c A A) X,   A = X X^T

    >>> made = newton_schulz(np.diag([3.0, 0.1])[None])[0]
    >>> bool((abs(np.linalg.svd(made)[1] - 1) < 0.35).all())
    True
    """
    xp, (a, b, c) = namespace(matrices), _COEFFICIENTS
    flip = matrices.shape[1] > matrices.shape[2]
    x = xp.transpose(matrices, (0, 2, 1)) if flip else matrices
    x = x / (xp.length_over(x, (1, 2)) + _TINY)
    for _ in range(steps):
        gram = xp.matmul(x, xp.transpose(x, (0, 2, 1)))
        x = x * a + xp.matmul(gram * b + xp.matmul(gram, gram) * c, x)
    return xp.transpose(x, (0, 2, 1)) if flip else x


def share_rule(
    plan: Plan,
    budget: Any = DEFAULT_OF_SHARE,
    *,
    kinds: Sequence[ArrayKind] | None = None,
    betas: tuple[float, float] = (0.9, 0.99),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    oriented: Oriented | None = None,
    rule: str = "bottom_up",
    call: str = "share_rule",
) -> ShareRule:
    """Make the functions of the share step.

    Args:
        plan: rows or other bins, each inside one array.
        budget: of gradients, before the memory.
        kinds: what each array is, from `array_kinds`; None: by the shapes.
        betas: decay of the two memories, in [0, 1).
        eps: added to Adam's denominator, >= 0.
        weight_decay: decoupled, per step and unit of tau, >= 0.
        oriented: the arrays' own axes; None: PyTorch's.
        rule: "bottom_up" or "nearest".
        call: the caller's name, for errors.

    Raises:
        ValueError: a constant out of its range, an unknown name, bins over several arrays, a budget of updates.

    >>> from gradsplit.plan import Layout, xsp
    >>> share = share_rule(xsp(Layout.from_shapes({"w": (1, 2)})), weight_decay=0.0)
    >>> w = np.array([[3.0, 4.0]])
    >>> changes, _, _ = share.update([np.array([[1e9, 0.0]])], share.init([w]), [w], 0.1)
    >>> (w + changes[0]).round(6)                    # a tenth of the row's length, 5
    array([[2.5, 4. ]])
    """
    check_constants(betas, eps, weight_decay, "element", call)
    if (plan.tensor_B < 0).any():
        raise ValueError(
            f"{call}(plan=…): expected bins inside one array each, got {plan!r} with bins over several. Use a plan by "
            "rows or tensors, or direction='adam'."
        )
    budgets = budgets_by_level(budget, plan, call=call)
    of_update = [one for _, one in budgets if one.bounds_update]
    if of_update:
        raise ValueError(
            f"{call}(budget=…): expected budgets of gradients, got {of_update[0]!r}, which bounds the update: here "
            "every row moves by its share. Leave it out, or use direction='adam'."
        )
    terms_of(plan, budgets, plan.numel_B, rule=rule, call=call)
    oriented = Oriented.plain(plan.layout) if oriented is None else oriented
    patterns = Patterns(plan, oriented, call=call)
    made = array_kinds(oriented, call=call) if kinds is None else tuple(kinds)
    share_B, least_B, longest_B, floor_B = _per_bin(plan, made)
    fades_B = (floor_B > _TINY).astype(np.float64)
    by_adam = [t for t, kind in enumerate(made) if kind.direction == "adam"]
    is_vector_T = np.array([kind.name == "vector" for kind in made])
    limited = [math.isfinite(kind.longest) for kind in made]
    beta1, beta2 = betas
    num_arrays, num_bins = len(plan.layout), plan.num_bins

    def init(weights: Sequence[Array]) -> ShareState:
        xp = namespace(weights[0])
        like = xp.accumulator(weights)
        return ShareState(
            xp.reshape(xp.full(1, 0.0, like), ()),
            xp.full(num_arrays, 0.0, like),
            tuple(xp.zeros_like(xp.wide(weight)) for weight in weights),
            tuple(xp.zeros_like(xp.wide(weights[t])) for t in by_adam),
            xp.full(num_bins, 0.0, like),
            xp.full(num_bins, 0.0, like),
            begin(terms_of(plan, budgets, like, rule=rule, call=call), like),
            xp.reshape(xp.full(1, 0.0, like), ()),
        )

    def update(
        gradients: Sequence[Array | None], state: ShareState, weights: Sequence[Array], tau: Any
    ) -> tuple[list[Array], ShareState, Decision]:
        xp = namespace(weights[0])
        there = [t for t, gradient in enumerate(gradients) if gradient is not None]
        given = [xp.zeros_like(w) if g is None else g for g, w in zip(gradients, weights, strict=True)]
        amount_B, weight_B = patterns.amounts_B(given), patterns.amounts_B(weights, may_explode=False)
        weight_B = xp.where(xp.isfinite(weight_B), weight_B, xp.full(num_bins, 0.0, weight_B))
        length_B = sums_for(amount_B).norm(weight_B)
        terms = terms_of(plan, budgets, amount_B, rule=rule, call=call)
        recent = state.recent_B, state.steps
        decision, of_gradient, (recent_B, steps) = decide_collectively(
            plan, terms, state.of_gradient, recent, amount_B, weight_B, rule=rule
        )
        root, series = in_series(given, weights, decision, state.series)
        ages_T = state.ages_T + xp.asarray(np.isin(np.arange(num_arrays), there), length_B)
        zero_B = xp.full(num_bins, 0.0, length_B)
        bounded = patterns.scaled([xp.wide(g) for g in given], decision.scale_B, ~decision.finite_B)
        learns_B = xp.where(decision.finite_B, xp.full(num_bins, 1.0, length_B), zero_B)
        momenta, squares, directions = aimed(bounded, state, ages_T, there, learns_B)
        sums = sums_for(length_B)
        ahead_B = sums.norm(patterns.amounts_B(directions, may_explode=False))
        moves_B = decision.finite_B & (ahead_B > 0) & (xp.asarray(fades_B, length_B) + decision.norm_B > 0)
        longest = xp.maximum(length_B, xp.asarray(longest_B, length_B))
        most_B = xp.cast(state.most_B, length_B)  # a framework may keep its states in single precision
        most_B = xp.where(moves_B & ((most_B == 0) | (length_B > most_B * WRITTEN)), longest, most_B)
        length = xp.maximum(length_B, xp.asarray(least_B, length_B))
        tau_B = xp.asarray(tau, length_B) * (root * root) * xp.asarray(share_B, length_B)
        tau_B = tau_B * balanced(tau_B * decision.norm_B * length, root)
        decay_B = xp.where(moves_B, tau_B * weight_decay, zero_B)
        step_B = xp.where(moves_B, tau_B * length / xp.maximum(ahead_B, xp.asarray(floor_B, length_B)), zero_B)
        changes = []
        for t, (weight, d) in enumerate(zip(weights, directions, strict=True)):
            decay, step = (xp.cast(patterns.factor(t, values_B), d) for values_B in (decay_B, step_B))
            changes.append(-(d * step) - xp.cast(weight, d) * decay)
        if any(limited):
            changes = shortened(changes, weights, moves_B, most_B)
        changes = [xp.cast(change, weight) for change, weight in zip(changes, weights, strict=True)]
        after = ShareState(steps, ages_T, tuple(momenta), tuple(squares), recent_B, most_B, of_gradient, series)
        return changes, after, decision

    def aimed(
        bounded: list[Array], state: ShareState, ages_T: Array, there: list[int], learns_B: Array
    ) -> tuple[list[Array], list[Array], list[Array]]:
        """Take bounded gradients into the memories; return momenta, mean squares and the arrays' directions."""
        xp = namespace(learns_B)
        momenta, squares, directions = list(state.momenta), list(state.squares), list(bounded)
        for t in there:
            g, learns = bounded[t], xp.cast(patterns.factor(t, learns_B), bounded[t])
            momenta[t] = momenta[t] + learns * (1 - beta1) * (g - momenta[t])
            directions[t] = momenta[t] + learns * (1 - beta1) * (g - momenta[t])
            if made[t].direction == "adam":
                at = by_adam.index(t)
                squares[at] = squares[at] + learns * (1 - beta2) * (g * g - squares[at])
                first = xp.cast(grown(xp, beta1, ages_T[t]), g)
                root = xp.sqrt(squares[at] / xp.cast(grown(xp, beta2, ages_T[t]), g))
                directions[t] = directions[t] / first / (root + (max(eps, _TINY) if is_number(eps) else eps))
        _orthogonalise(directions, [t for t in there if made[t].direction == "orthogonal"], made, oriented)
        return momenta, squares, directions

    def in_series(
        given: list[Array], weights: Sequence[Array], decision: Decision, before: Array
    ) -> tuple[Array, Array]:
        """Return the root of the factor on the share for layers in series, 0-d, and their number of late."""
        xp, like, rests_B = namespace(decision.norm_B), decision.norm_B, ~decision.finite_B
        before = xp.cast(xp.asarray(before, like), like)
        total = largest = before * 0.0
        for t, kind in enumerate(made):
            if kind.name != "vector" and 0 not in patterns.shapes[t]:
                g = xp.wide(given[t])
                g = xp.where(patterns.factor(t, rests_B), xp.zeros_like(g), g)
                euler = xp.cast(xp.inner(g, xp.cast(weights[t], g)), like)
                euler = xp.where(xp.isfinite(euler), euler, before * 0.0)
                total, largest = total + euler, xp.maximum(largest, xp.maximum(euler, -euler))
        known = largest > 0
        here = xp.maximum(total, -total) / xp.where(known, largest, largest * 0.0 + 1.0)
        series = xp.where(known, xp.maximum(here, before * FADES), before)
        return DEEP / xp.maximum(series, series * 0.0 + DEEP), series

    def balanced(change_B: Array, root: Array) -> Array:
        """Return a factor on the share, (B,), 1 but for vectors, from what each bin's step may change the loss by."""
        xp = namespace(change_B)
        change_B = xp.where(xp.isfinite(change_B), change_B, change_B * 0.0)
        change_T = xp.segment_sum(change_B, xp.index(plan.tensor_B, change_B), num_arrays)
        side_T, none = xp.index(np.asarray(is_vector_T, dtype=np.int64), change_B), change_B * 0.0
        matrices = xp.segment_sum(change_T, side_T, 2)[0]
        vectors = xp.segment_sum(xp.minimum(change_T, change_T * 0.0 + matrices / 2), side_T, 2)[1]
        most_B, sum_B = none + matrices * root, none + vectors
        outweighed_B = (sum_B > most_B) & (xp.asarray(is_vector_T[plan.tensor_B], none) > 0)
        return xp.where(outweighed_B, most_B / xp.where(outweighed_B, sum_B, none + 1.0), none + 1.0)

    def shortened(changes: list[Array], weights: Sequence[Array], moves_B: Array, most_B: Array) -> list[Array]:
        """Draw back rows that would grow beyond their longest length."""
        xp = namespace(most_B)
        moved = [
            xp.cast(weight, change) + change if limited[t] else xp.zeros_like(change)
            for t, (weight, change) in enumerate(zip(weights, changes, strict=True))
        ]
        length_B = sums_for(most_B).norm(patterns.amounts_B(moved, may_explode=False))
        grown_B, none_B = moves_B & (length_B > most_B), xp.full(num_bins, 1.0, most_B)
        back_B = xp.where(grown_B, most_B / xp.where(grown_B, length_B, none_B) - 1.0, none_B * 0.0)
        return [
            change + w * xp.cast(patterns.factor(t, back_B), change) if limited[t] else change
            for t, (change, w) in enumerate(zip(changes, moved, strict=True))
        ]

    return ShareRule(init, update, made)


def _per_bin(plan: Plan, kinds: Sequence[ArrayKind]) -> tuple[np.ndarray, ...]:
    """Return share, least length, longest length and floor of the direction's length, (B,) each."""
    root_B = np.sqrt(np.asarray(plan.numel_B, dtype=np.float64))
    share_B, least_B, longest_B = (
        np.array([getattr(kind, name) for kind in kinds])[plan.tensor_B] for name in ("share", "least", "longest")
    )
    keeps_B = np.array([kind.direction == "adam" for kind in kinds])[plan.tensor_B]
    return share_B, least_B * root_B, longest_B, np.where(keeps_B, root_B, _TINY)


def _orthogonalise(directions: list[Array], which: list[int], kinds: Sequence[ArrayKind], oriented: Oriented) -> None:
    """Make some of the directions orthogonal, block by block; equal shapes are one batched product."""
    stacks: dict[Any, list[tuple[int, Array]]] = defaultdict(list)
    for t in which:
        d, (rows, rest), num = directions[t], oriented.orders[t], kinds[t].blocks
        count = math.prod(oriented.shapes[t][axis] for axis in rows)
        if not count or not math.prod(oriented.shapes[t]):
            continue
        form = (num, count // num, math.prod(oriented.shapes[t][axis] for axis in rest))
        xp = namespace(d)
        stacks[form[1:], str(d.dtype)].append((t, xp.reshape(xp.transpose(d, (*rows, *rest)), form)))
    for stack in stacks.values():
        xp = namespace(stack[0][1])
        whole = newton_schulz(xp.concatenate([blocks for _, blocks in stack]) if len(stack) > 1 else stack[0][1])
        start = 0
        for t, blocks in stack:
            order, shape = (*oriented.orders[t][0], *oriented.orders[t][1]), oriented.shapes[t]
            one = xp.reshape(whole[start : start + blocks.shape[0]], tuple(shape[axis] for axis in order))
            directions[t] = xp.transpose(one, tuple(int(axis) for axis in np.argsort(order)))
            start += blocks.shape[0]
