"""The default rule: bound each bin, then each node from the leaves to the root, keeping the children's proportions."""

from __future__ import annotations

from ..plan import Plan
from ..xp import Array, namespace
from .length_sums import sums_for
from .node_sums import Nodes

__all__ = ["bin_scales", "bottom_up"]


def bin_scales(norm: Array, limit: Array) -> Array:
    """Return ``min(1, limit / norm)``, and 1 where the norm is 0; a limit of inf keeps."""
    xp = namespace(norm)
    over, ones = norm > limit, xp.full(norm.shape[0], 1.0, norm)
    return xp.where(over, limit / xp.where(over, norm, ones), ones)


def bottom_up(plan: Plan, norm_B: Array, limit_N: Array) -> Array:
    """Scale bins to their limits, then each node, leaves to root, by min(1, limit / norm of what was kept)."""
    xp, sums, nodes = namespace(norm_B), sums_for(norm_B), Nodes.of(plan, norm_B)
    limits = [limit_N[lo:hi] for lo, hi in nodes.depths]
    bin_scale = bin_scales(norm_B, xp.take(limit_N, nodes.bin_nodes_B))
    kept = nodes.spread(sums.of(norm_B * bin_scale), 0.0)  # amounts kept so far, depth by depth
    factors: list[Array] = []
    for depth in range(len(kept) - 1, -1, -1):
        if nodes.only_bins[depth]:  # these have been scaled to their limits already
            factors.append(None)
            held = kept[depth]
        else:
            # At a bin's node among others this factor is 1 up to rounding.
            factors.append(bin_scales(sums.norm(kept[depth]), limits[depth]))
            held = sums.times(kept[depth], factors[-1])
        if depth:
            lo, hi = nodes.depths[depth - 1]
            kept[depth - 1] = sums.plus(kept[depth - 1], sums.by_node(held, nodes.parents[depth - 1], hi - lo))
    factors.reverse()
    # The product of the factors from the root down to each node; the root is never a bin.
    path = [factors[0]]
    for depth in range(1, len(factors)):
        above = xp.take(path[-1], nodes.parents[depth - 1])
        path.append(above if factors[depth] is None else above * factors[depth])
    return bin_scale * xp.take(xp.concatenate(path), nodes.bin_nodes_B)
