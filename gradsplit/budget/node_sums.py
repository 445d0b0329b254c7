"""Sums over the plan's tree: amounts (squares, see length_sums) add over a node's children, norms do not.

`Nodes` holds the tree's index arrays on one device, made once a plan and device.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from ..plan import Plan
from ..xp import Array, namespace
from .length_sums import sums_for

__all__ = ["Nodes"]


class Nodes:
    """A plan's tree as arrays of one namespace and device.

    Nodes are numbered breadth first, so a depth is one slice and its sums over children are one segment sum.
    """

    def __init__(self, plan: Plan, xp: ModuleType, like: Array) -> None:
        starts = plan.tree.depth_starts
        self.num_bins, self.num_nodes = plan.num_bins, plan.num_nodes
        self.depths = list(itertools.pairwise(starts))
        self.bin_nodes_B = xp.index(plan.bin_nodes_B, like)
        bins_at = np.bincount(np.searchsorted(starts, plan.bin_nodes_B, side="right") - 1, minlength=len(self.depths))
        self.only_bins = [int(n) == hi - lo for n, (lo, hi) in zip(bins_at, self.depths, strict=True)]
        self.parents = [  # per depth below the root: each node's parent, counted within the depth above
            xp.index(plan.parents_N[lo:hi] - self.depths[d][0], like) for d, (lo, hi) in enumerate(self.depths[1:])
        ]

    @classmethod
    def of(cls, plan: Plan, like: Array) -> Nodes:
        """Return the arrays for the namespace and device of ``like``; made on the first call, kept with the plan."""
        xp = namespace(like)
        key = (xp.__name__, xp.device_key(like))
        if key not in plan._prepared:
            plan._prepared[key] = cls(plan, xp, like)
        made: Any = plan._prepared[key]
        return made

    def spread(self, values_B: Array, fill: float) -> list[Array]:
        """Return one vector a depth: a bin's value at its node, ``fill`` at all others."""
        xp = namespace(values_B)
        values_N = xp.put(xp.full(self.num_nodes, fill, values_B), self.bin_nodes_B, values_B)
        return [values_N[lo:hi] for lo, hi in self.depths]

    def sums_N(self, values_B: Array) -> Array:
        """Return each node's sum of plain values, shape (N,)."""
        return self._up(values_B, namespace(values_B).segment_sum, operator.add)

    def amounts_N(self, amount_B: Array) -> Array:
        """Return each node's amount, shape (N,)."""
        sums = sums_for(amount_B)
        return self._up(amount_B, sums.by_node, sums.plus)

    def _up(self, values_B: Array, by_node: Callable[..., Array], plus: Callable[[Array, Array], Array]) -> Array:
        by_depth = self.spread(values_B, 0.0)
        for depth in range(len(by_depth) - 1, 0, -1):
            lo, hi = self.depths[depth - 1]
            from_below = by_node(by_depth[depth], self.parents[depth - 1], hi - lo)
            by_depth[depth - 1] = plus(by_depth[depth - 1], from_below)
        return namespace(values_B).concatenate(by_depth)
