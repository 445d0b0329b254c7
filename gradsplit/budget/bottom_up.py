"""The default rule: bound each bin, then each node from the leaves to the root, keeping the children's proportions."""

from __future__ import annotations

from ..plan import Plan
from ..xp import Array, namespace
from .node_sums import Nodes

__all__ = ["bin_scales", "bottom_up"]


def bin_scales(norm: Array, limit: Array) -> Array:
    """Return ``min(1, limit / norm)``, and 1 where the norm is 0; a limit of inf keeps."""
    xp = namespace(norm)
    over = norm > limit
    return xp.where(over, limit / xp.where(over, norm, xp.full(len(norm), 1.0, norm)), xp.full(len(norm), 1.0, norm))


def bottom_up(plan: Plan, norm_B: Array, limit_N: Array) -> Array:
    """Scale bins to their limits, then each node, leaves to root, by min(1, limit / norm of what was kept)."""
    xp, nodes = namespace(norm_B), Nodes.of(plan, norm_B)
    limits = [limit_N[lo:hi] for lo, hi in nodes.depths]
    bin_scale = bin_scales(norm_B, xp.take(limit_N, nodes.bin_nodes_B))
    kept = nodes.spread((norm_B * bin_scale) ** 2, 0.0)  # squares kept so far, depth by depth
    factors: list[Array] = []
    for depth in range(len(kept) - 1, -1, -1):
        # At a bin's node this factor is 1 up to rounding, for the bin has been scaled already.
        factor = bin_scales(xp.sqrt(kept[depth]), limits[depth])
        factors.append(factor)
        if depth:
            lo, hi = nodes.depths[depth - 1]
            sums = xp.segment_sum(kept[depth] * factor**2, nodes.parents[depth - 1], hi - lo)
            kept[depth - 1] = kept[depth - 1] + sums
    factors.reverse()
    path = [factors[0]]  # product of the factors from the root down to each node
    for depth in range(1, len(factors)):
        path.append(xp.take(path[-1], nodes.parents[depth - 1]) * factors[depth])
    return bin_scale * xp.take(xp.concatenate(path), nodes.bin_nodes_B)
