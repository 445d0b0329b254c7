"""From limits to scales: `project`, and its rules by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from ..plan import Plan
from ..xp import Array, namespace
from .sums import Nodes, sums_for

__all__ = ["bin_scales", "bottom_up", "nearest", "RULES", "project"]


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
    kept = nodes.by_depth(sums.of(norm_B * bin_scale), 0.0)  # amounts kept so far, depth by depth
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
    kept_before = _before(_sums_within(depth, kept), kept, depth.sorted_owner_B)  # a smaller m stays as it is ...
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


def _before(running: Array, own: Array, ids: Array) -> Array:
    """Return running sums without their own entry; they restart where the ids change.

    To subtract the entry again would lose small entries beside a large one.
    """
    xp = namespace(running)
    return xp.concatenate([own[:1] * 0.0, xp.where(ids[1:] == ids[:-1], running[:-1], own[1:] * 0.0)])


def _depths_of(plan: Plan, like: Array) -> list[_Depth]:
    """Return the segments of every depth, deepest first; made once per plan and device, kept while the plan lives."""
    xp = namespace(like)
    key = (xp.__name__, xp.device_key(like))
    made = _DEPTHS.setdefault(plan, {})
    if key not in made:
        made[key] = _make_depths(plan, like)
    return made[key]


_DEPTHS: WeakKeyDictionary[Plan, dict[tuple[str, str], list[_Depth]]] = WeakKeyDictionary()
"""The depths of each plan, per namespace and device."""


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


RULES: dict[str, Callable[[Plan, Array, Array], Array]] = {"bottom_up": bottom_up, "nearest": nearest}
"""The rules by name."""


def project(plan: Plan, norm_B: Array, limit_N: Array, *, rule: str = "bottom_up") -> Array:
    """Return the bins' scales in [0, 1] such that every node ends within its limit.

    ``"bottom_up"`` keeps the children's proportions after each has been bounded; in trials it trained better.
    ``"nearest"`` is the Euclidean projection. Where a parent binds, it keeps the exploding child and sacrifices the
    healthy ones: for norms 100 and 1 and limits 1 everywhere, both scales are .01. Bottom-up first bounds both to a
    norm of 1, then scales both by .707.

    Both are closed forms without iterations and idempotent. A bin whose norm is not finite gets scale 0 and counts
    nothing for its ancestors.

    Args:
        plan: B bins, N nodes.
        norm_B: (B,) L2 norms, gradient units; an array of any framework in `gradsplit.xp`.
        limit_N: (N,) largest norms, gradient units; inf = unbounded.
        rule: "bottom_up" or "nearest".

    Raises:
        ValueError: another rule, wrong shapes, a limit that is negative or NaN (names the node; not looked at inside a
            compiled graph, where there are no values yet).

    >>> import numpy as np
    >>> from gradsplit.plan import Layout, per_tensor
    >>> plan = per_tensor(Layout.from_shapes({"a": (4,), "b": (4,)}))
    >>> limit = np.where(plan.levels_N == 2, np.inf, 1.0)   # 1 at the root and at the bins
    >>> project(plan, np.array([100.0, 1.0]), limit) * [100, 1]
    array([0.70710678, 0.70710678])
    >>> project(plan, np.array([100.0, 1.0]), limit, rule="nearest")
    array([0.0099995, 0.0099995])
    """
    if not isinstance(plan, Plan):
        raise TypeError(
            f"project({type(plan).__name__}, …): expected a Plan. Make one with xsp, lbf, tree_sp, per_tensor or whole."
        )
    xp = namespace(norm_B, call="project(norm_B=…)")
    if rule not in RULES:
        raise ValueError(f"project(rule={rule!r}): expected one of {', '.join(RULES)}.")
    limit_N = xp.asarray(limit_N, norm_B)
    for name, array, num, unit in (
        ("norm_B", norm_B, plan.num_bins, "bin"),
        ("limit_N", limit_N, plan.num_nodes, "node"),
    ):
        if tuple(array.shape) != (num,):
            raise ValueError(
                f"project({name}=…): expected shape ({num},), one per {unit} of the plan, got {tuple(array.shape)}. "
                f"The plan's {unit}s are plan.{unit}s, in their order."
            )
    if xp.is_readable(limit_N) and not bool(xp.every(limit_N >= 0)):
        ones = xp.full(plan.num_nodes, 1.0, norm_B)
        at = int(xp.argsort(xp.where(limit_N >= 0, ones * 0.0, ones))[-1])
        raise ValueError(
            f"project(limit_N=…): expected limits >= 0, where inf means unbounded, got {float(limit_N[at])} at "
            f"{plan.nodes[at].name!r}. Make it 0 or more."
        )
    finite = xp.isfinite(norm_B)
    zero = xp.full(norm_B.shape[0], 0.0, norm_B)
    return xp.where(finite, RULES[rule](plan, xp.where(finite, norm_B, zero), limit_N), zero)
