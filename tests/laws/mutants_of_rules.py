"""Broken rules from limits to scales. Each is named for the law that must catch it."""

from __future__ import annotations

import numpy as np

import gradsplit as gs
from gradsplit.plan import Plan
from tests.laws import laws_of_rules as laws
from tests.laws.oracles import bins_below, node_norms

Array = np.ndarray


def _finite(norm_B: Array) -> Array:
    return np.where(np.isfinite(norm_B), norm_B, 0.0)


def scales_bins_only(plan: Plan, norm_B: Array, limit_N: Array) -> Array:
    limits = np.full(plan.num_nodes, np.inf)
    limits[plan.bin_nodes_B] = limit_N[plan.bin_nodes_B]
    return gs.project(plan, norm_B, limits)


def forgets_the_root(plan: Plan, norm_B: Array, limit_N: Array) -> Array:
    limits = limit_N.copy()
    limits[0] = np.inf
    return gs.project(plan, norm_B, limits)


def keeps_bad_bins(plan: Plan, norm_B: Array, limit_N: Array) -> Array:
    return np.where(np.isfinite(norm_B), gs.project(plan, norm_B, limit_N), 1.0)


def raises_small_gradients(plan: Plan, norm_B: Array, limit_N: Array) -> Array:
    """Every bin is brought to its limit, from below too."""
    limit = limit_N[plan.bin_nodes_B]
    return np.where(np.isfinite(norm_B) & (norm_B > 0) & np.isfinite(limit), limit / np.maximum(norm_B, 1e-300), 0.0)


def everything_to_the_worst(plan: Plan, norm_B: Array, limit_N: Array) -> Array:
    """One factor for all: what a global clip does to healthy bins."""
    return np.where(np.isfinite(norm_B), gs.project(plan, norm_B, limit_N).min(initial=1.0), 0.0)


def adds_a_constant_to_the_norm(plan: Plan, norm_B: Array, limit_N: Array) -> Array:
    """The 1e-6 in the denominator of other libraries: a gradient at its limit is scaled again and again."""
    limit, norm = limit_N[plan.bin_nodes_B], _finite(norm_B)
    return np.where(np.isfinite(norm_B), np.minimum(1.0, limit / (norm + 1e-6)), 0.0)


def adds_norms_instead_of_squares(plan: Plan, norm_B: Array, limit_N: Array) -> Array:
    """A node's norm as the sum of its bins': every node ends within its limit, but others are scaled for nothing."""
    norm, scale = _finite(norm_B), np.ones(plan.num_bins)
    for node, below in enumerate(bins_below(plan)):
        total = norm[below].sum()
        if total > limit_N[node]:
            scale[below] = np.minimum(scale[below], limit_N[node] / total)
    return np.where(np.isfinite(norm_B), scale, 0.0)


def halves_whatever_binds(plan: Plan, norm_B: Array, limit_N: Array) -> Array:
    """Within all limits, yet projecting again would not leave it alone: half of what is needed, where over 1."""
    scale = gs.project(plan, norm_B, limit_N)
    return np.where(_finite(norm_B) * scale > 1e-3, scale * 0.5, scale)


def limits_in_absolute_units(plan: Plan, norm_B: Array, limit_N: Array) -> Array:
    return gs.project(plan, norm_B, np.minimum(limit_N, 10.0))


def ends_above_its_limit(plan: Plan, norm_B: Array, limit_N: Array) -> Array:
    norm_N, scale = node_norms(plan, _finite(norm_B)), gs.project(plan, norm_B, limit_N)
    return np.minimum(1.0, scale * 1.001) if (norm_N > limit_N).any() else scale


MUTANTS = {
    scales_bins_only: laws.check_limits_hold,
    forgets_the_root: laws.check_limits_hold,
    ends_above_its_limit: laws.check_limits_hold,
    keeps_bad_bins: laws.check_scales_in_unit_interval,
    raises_small_gradients: laws.check_scales_in_unit_interval,
    everything_to_the_worst: laws.check_touches_only_below_a_bound_node,
    adds_norms_instead_of_squares: laws.check_touches_only_below_a_bound_node,
    adds_a_constant_to_the_norm: laws.check_homogeneous,
    limits_in_absolute_units: laws.check_homogeneous,
    halves_whatever_binds: laws.check_idempotent,
}
