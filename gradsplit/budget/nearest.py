"""The Euclidean projection on all nested balls at once, in closed form."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..plan import Plan
from ..xp import Array, namespace
from .bottom_up import bin_scales
from .length_sums import sums_for
from .node_sums import Nodes

__all__ = ["nearest"]


class _Depth(NamedTuple):
    """The bins below the nodes of one depth, in segments by node; only the order inside a segment varies."""

    num: int  # nodes at this depth; one more segment takes the bins that hang elsewhere
    first: int  # the depth's first node
    owner_B: Array  # (B,) segment of each bin
    sorted_owner_B: Array  # the same in ascending order
    start: Array  # (num + 1,) first place of each segment in that order
    size: Array  # (num + 1,) bins in each segment
    doublings: int  # steps of the running sum that restarts at every segment


def nearest(plan: Plan, norm_B: Array, limit_N: Array) -> Array:
    """Project on the intersection of the balls: the least change of the gradient.

    A node's critical scale t is 1 if it is within its limit, else it solves ``sum over its bins of n^2 min(t, m)^2 =
    limit^2``, where m is the scale a bin got below. A bin's scale is the least t over itself and its ancestors.
    """
    xp = namespace(norm_B)
    scale_B = bin_scales(norm_B, xp.take(limit_N, Nodes.of(plan, norm_B).bin_nodes_B))
    for depth in _depths_of(plan, norm_B):
        limit = xp.concatenate([limit_N[depth.first : depth.first + depth.num], xp.full(1, float("inf"), norm_B)])
        scale_B = xp.minimum(scale_B, xp.take(_critical_scales(depth, norm_B, scale_B, limit), depth.owner_B))
    return scale_B


def _critical_scales(depth: _Depth, norm_B: Array, scale_B: Array, limit: Array) -> Array:
    """Solve for t in every segment at once: sort by m, sums within segments, one square root."""
    xp, sums = namespace(norm_B), sums_for(norm_B)
    order = xp.argsort(scale_B)
    if depth.doublings >= 0:
        order = xp.take(order, xp.argsort(xp.take(depth.owner_B, order)))
    m, whole = xp.take(scale_B, order), sums.of(xp.take(norm_B, order))
    kept = sums.times(whole, m)
    kept_before = sums.before(_sums_within(depth, kept), kept, depth.sorted_owner_B)  # a smaller m stays as it is ...
    from_here = xp.flip(_sums_within(depth, xp.flip(whole), flipped=True))  # ... the others go to t
    limit_in_order = sums.of(xp.take(limit, depth.sorted_owner_B))
    one, zero = xp.full(m.shape[0], 1.0, m), xp.full(m.shape[0], 0.0, m)
    below = xp.where(sums.plus(kept_before, sums.times(from_here, m)) < limit_in_order, one, zero)
    # Inside a segment `below` falls from 1 to 0 once; the first 0 is where t lies.
    count = xp.segment_sum(below, depth.sorted_owner_B, depth.num + 1)
    last = xp.maximum(depth.start + depth.size - 1, depth.start * 0)
    first = xp.minimum(depth.start + xp.index(count, depth.start), last)
    ones, zeros = xp.full(depth.num + 1, 1.0, m), xp.full(depth.num + 1, 0.0, m)
    free = xp.take(from_here, first)
    binds = (count < xp.asarray(depth.size, m)) & (free > 0)
    fixed = xp.where(binds, xp.take(kept_before, first), zeros)
    t = sums.factor_to(xp.where(binds, limit, ones), fixed, xp.where(binds, free, ones))
    return xp.minimum(t, ones)


def _sums_within(depth: _Depth, amount: Array, *, flipped: bool = False) -> Array:
    """Running sums of amounts that restart at every segment, by doubling.

    One running sum minus its value at a segment's start would lose a small segment that follows a large one.
    """
    xp, sums = namespace(amount), sums_for(amount)
    ids = xp.flip(depth.sorted_owner_B) if flipped else depth.sorted_owner_B
    if depth.doublings < 0:  # a single segment
        return sums.running(amount)
    for i in range(depth.doublings):
        shift = 2**i
        added = xp.where(ids[shift:] == ids[:-shift], amount[:-shift], amount[:-shift] * 0.0)
        amount = xp.concatenate([amount[:shift], sums.plus(amount[shift:], added)])
    return amount


def _depths_of(plan: Plan, like: Array) -> list[_Depth]:
    """Return the segments of every depth, deepest first; made once a plan and device, kept with the plan."""
    xp = namespace(like)
    key = ("nearest", xp.__name__, xp.device_key(like))
    if key not in plan._prepared:
        plan._prepared[key] = list(_make_depths(plan, like))
    made: list[_Depth] = plan._prepared[key]
    return made


def _make_depths(plan: Plan, like: Array) -> list[_Depth]:
    xp, starts = namespace(like), plan.tree.depth_starts
    at, made = plan.bin_nodes_B.copy(), []
    for depth in range(len(starts) - 3, -1, -1):
        lo, hi = starts[depth], starts[depth + 1]
        at = np.where(at >= hi, plan.parents_N[at], at)
        own = np.where((at >= lo) & (at != plan.bin_nodes_B), at - lo, hi - lo)
        size = np.bincount(own, minlength=hi - lo + 1)
        longest = int(size.max())
        made.append(
            _Depth(
                hi - lo,
                lo,
                xp.index(own, like),
                xp.index(np.sort(own), like),
                xp.index(np.cumsum(size) - size, like),
                xp.index(size, like),
                -1 if longest == len(own) else int(np.ceil(np.log2(max(longest, 1)))),
            )
        )
    return made
