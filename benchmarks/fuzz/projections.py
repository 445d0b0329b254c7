"""`project` on random trees, norms and limits: scales in [0, 1], and every node within its limit."""

from __future__ import annotations

import random

import numpy as np

import gradsplit as gs
from benchmarks.fuzz.layouts import sound_layout
from benchmarks.fuzz.verdict import outcome

__all__ = ["projections"]


_EDGES = (0.0, -0.0, -1.0, float("inf"), float("-inf"), float("nan"), 1e-45, 3e38, 1.0)


def projections(rng: random.Random) -> str:
    """Norms and limits of any size, now and then of a wrong shape or sign."""
    layout = sound_layout(rng)
    plan = rng.choice((gs.tree_sp, gs.xsp, gs.per_tensor, lambda of: gs.tree_sp(of, inner=gs.xsp)))(layout)
    draw = np.random.default_rng(rng.randrange(2**32))
    # Lengths of float32 gradients of any size, and limits of the same range: their squares are float64 numbers.
    norm_B = 10.0 ** draw.uniform(-45, 45, plan.num_bins)
    limit_N = 10.0 ** draw.uniform(-45, 45, plan.num_nodes)
    limit_N[draw.random(plan.num_nodes) < 0.3] = np.inf
    for vector in (norm_B, limit_N):
        if rng.random() < 0.3:
            vector[rng.randrange(len(vector))] = rng.choice(_EDGES)
    if rng.random() < 0.1:
        norm_B = norm_B[:-1]
    rule = rng.choice(("bottom_up", "nearest", "bottom_up", "nearest", "other"))
    kind, scale_B = outcome(lambda: gs.project(plan, norm_B, limit_N, rule=rule), what=repr((norm_B, limit_N, rule)))
    if kind == "ok":
        assert scale_B.shape == norm_B.shape and ((scale_B >= 0) & (scale_B <= 1)).all()
        kept_B = np.where(np.isfinite(norm_B) & (norm_B > 0), scale_B * np.abs(np.nan_to_num(norm_B)), 0.0)
        _check_limits(plan, kept_B, limit_N)
    return kind


def _check_limits(plan: gs.Plan, kept_B: np.ndarray, limit_N: np.ndarray) -> None:
    """Lengths are compared in units of the largest below the node, so that no square overflows here."""
    kept_N: list[list[float]] = [[] for _ in range(plan.num_nodes)]
    for kept, node in zip(kept_B.tolist(), plan.bin_nodes_B.tolist(), strict=True):
        at = node
        while at >= 0:
            kept_N[at].append(kept)
            at = int(plan.parents_N[at])
    for node, parts in enumerate(kept_N):
        largest = max(parts, default=0.0)
        length = largest * float(np.sqrt(sum((part / largest) ** 2 for part in parts))) if largest > 0 else 0.0
        assert length <= limit_N[node] * (1 + 1e-6) + 1e-300, (node, length, limit_N[node])
