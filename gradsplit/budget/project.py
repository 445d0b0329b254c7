"""From limits to scales: `project`, and its rules by name."""

from __future__ import annotations

from collections.abc import Callable

from ..plan import Plan
from ..xp import Array, namespace
from .bottom_up import bottom_up
from .nearest import nearest

__all__ = ["RULES", "project"]

RULES: dict[str, Callable[[Plan, Array, Array], Array]] = {"bottom_up": bottom_up, "nearest": nearest}
"""The rules by name."""


def project(plan: Plan, norm_B: Array, limit_N: Array, *, rule: str = "bottom_up") -> Array:
    """Return the bins' scales in [0, 1] such that every node ends within its limit.

    ``"bottom_up"`` keeps the children's proportions after each has been bounded; in trials it trained better.
    ``"nearest"`` is the Euclidean projection: where a parent binds it keeps the exploding child and sacrifices the
    healthy ones (norms 100 and 1, all limits 1: scales .01 and .01; bottom-up first gives 1 and 1, then .707 each).

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
    xp = namespace(norm_B)
    if rule not in RULES:
        raise ValueError(f"project(rule={rule!r}): expected one of {', '.join(RULES)}.")
    limit_N = xp.asarray(limit_N, norm_B)
    for name, array, num, unit in (
        ("norm_B", norm_B, plan.num_bins, "bin"),
        ("limit_N", limit_N, plan.num_nodes, "node"),
    ):
        if tuple(array.shape) != (num,):
            raise ValueError(f"project({name}=…): expected shape ({num},), one a {unit}, got {tuple(array.shape)}.")
    if xp.is_readable(limit_N) and not bool(xp.every(limit_N >= 0)):
        ones = xp.full(plan.num_nodes, 1.0, norm_B)
        at = int(xp.argsort(xp.where(limit_N >= 0, ones * 0.0, ones))[-1])
        raise ValueError(
            f"project(limit_N=…): expected limits >= 0, got {float(limit_N[at])} at {plan.nodes[at].name!r}. inf "
            "means unbounded."
        )
    finite = xp.isfinite(norm_B)
    zero = xp.full(norm_B.shape[0], 0.0, norm_B)
    return xp.where(finite, RULES[rule](plan, xp.where(finite, norm_B, zero), limit_N), zero)
