"""The decision of one step: limits, scales, and why each bin has its scale."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from ..plan import Plan
from ..xp import Array, namespace
from .node_sums import Nodes

__all__ = ["Decision", "Outcome"]


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
