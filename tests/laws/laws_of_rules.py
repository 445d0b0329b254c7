"""What every rule from limits to scales must do. A rule is a function (plan, norm_B, limit_N) -> scale_B."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from gradsplit.plan import Plan
from tests.laws.oracles import node_norms

Rule = Callable[[Plan, np.ndarray, np.ndarray], np.ndarray]

ROUNDING = 1e-12


def check_scales_in_unit_interval(rule: Rule, plan: Plan, norm_B: np.ndarray, limit_N: np.ndarray) -> None:
    """Scales lie in [0, 1]; a bin that is not finite gets 0."""
    scale_B = rule(plan, norm_B, limit_N)
    assert scale_B.shape == (plan.num_bins,), "not one scale a bin"
    assert ((scale_B >= 0) & (scale_B <= 1)).all(), f"scales outside [0, 1]: {scale_B}"
    assert (scale_B[~np.isfinite(norm_B)] == 0).all(), "a bin that is not finite was kept"


def check_limits_hold(rule: Rule, plan: Plan, norm_B: np.ndarray, limit_N: np.ndarray) -> None:
    """Every node ends within its limit."""
    finite_B = np.where(np.isfinite(norm_B), norm_B, 0.0)
    kept_N = node_norms(plan, finite_B * rule(plan, norm_B, limit_N))
    over = kept_N > limit_N * (1 + ROUNDING) + np.finfo(float).tiny
    assert not over.any(), f"nodes {np.flatnonzero(over)} keep {kept_N[over]} above {limit_N[over]}"


def check_idempotent(rule: Rule, plan: Plan, norm_B: np.ndarray, limit_N: np.ndarray) -> None:
    """Projecting what was projected changes nothing."""
    once_B = np.where(np.isfinite(norm_B), norm_B, 0.0) * rule(plan, norm_B, limit_N)
    again_B = rule(plan, once_B, limit_N)
    np.testing.assert_allclose(again_B * once_B, once_B, rtol=1e-9, atol=1e-12 * once_B.max(initial=0.0))


def check_homogeneous(rule: Rule, plan: Plan, norm_B: np.ndarray, limit_N: np.ndarray) -> None:
    """Gradients and limits in other units give the same scales; powers of two give them bit for bit."""
    scale_B = rule(plan, norm_B, limit_N)
    np.testing.assert_array_equal(rule(plan, norm_B * 2.0**20, limit_N * 2.0**20), scale_B)
    np.testing.assert_allclose(rule(plan, norm_B * 3.7, limit_N * 3.7), scale_B, rtol=1e-9, atol=1e-15)


def check_keeps_what_is_within(rule: Rule, plan: Plan, norm_B: np.ndarray, limit_N: np.ndarray) -> None:
    """If every node is within its limit, every scale is exactly 1."""
    finite_B = np.where(np.isfinite(norm_B), norm_B, 0.0)
    room_N = np.maximum(limit_N, node_norms(plan, finite_B) * (1 + 1e-9))
    assert (rule(plan, finite_B, room_N) == 1).all(), "a node within its limit was scaled"


def check_touches_only_below_a_bound_node(rule: Rule, plan: Plan, norm_B: np.ndarray, limit_N: np.ndarray) -> None:
    """A bin without an ancestor that is over its limit keeps a scale of exactly 1."""
    finite_B = np.where(np.isfinite(norm_B), norm_B, 0.0)
    over_N = node_norms(plan, finite_B) > limit_N
    scale_B = rule(plan, norm_B, limit_N)
    for b in np.flatnonzero(np.isfinite(norm_B)):
        node, bound = int(plan.bin_nodes_B[b]), False
        while node >= 0:
            bound |= bool(over_N[node])
            node = int(plan.parents_N[node])
        assert bound or scale_B[b] == 1, f"bin {b} was scaled by {scale_B[b]} with no limit above it exceeded"


ALL = (
    check_scales_in_unit_interval,
    check_limits_hold,
    check_idempotent,
    check_homogeneous,
    check_keeps_what_is_within,
    check_touches_only_below_a_bound_node,
)
