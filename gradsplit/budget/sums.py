"""How the lengths of bins add up to the length of a node, in numbers that the dtype can hold.

An *amount* is what adds. In float64 it is the square of a length, since float64 holds the square of every float32. In
float32 (JAX by default, Apple's MPS) the square of 1e20 is inf already, so there an amount is the length itself, and
two of them add as a hypotenuse.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from types import ModuleType
from weakref import WeakKeyDictionary

import numpy as np

from ..plan import Plan
from ..xp import Array, namespace

__all__ = ["LARGE", "Lengths", "Squares", "Sums", "sums_for", "Nodes"]

LARGE = 2.0**80
"""A unit in which the square of the largest float32 is 8e28, so that four billion of them can be added."""


class Squares:
    """Amounts are squares: for float64."""

    @staticmethod
    def of(norm: Array) -> Array:
        """Return the amounts of lengths."""
        return norm**2

    @staticmethod
    def of_squares(squares: Array) -> Array:
        """Return the amounts of squared lengths."""
        return squares

    @staticmethod
    def norm(amount: Array) -> Array:
        """Return the lengths of amounts."""
        return namespace(amount).sqrt(amount)

    @staticmethod
    def times(amount: Array, factor: Array) -> Array:
        """Return the amounts after what they measure was multiplied by a factor."""
        return amount * factor**2

    @staticmethod
    def plus(a: Array, b: Array) -> Array:
        """Add elementwise."""
        return a + b

    @staticmethod
    def by_node(amount: Array, ids: Array, num: int) -> Array:
        """Add over equal ids; shape (num,)."""
        return namespace(amount).segment_sum(amount, ids, num)

    @staticmethod
    def running(amount: Array) -> Array:
        """Running sum of a vector."""
        return namespace(amount).cumsum(amount)

    @staticmethod
    def factor_to(limit: Array, fixed: Array, free: Array) -> Array:
        """Return t such that ``fixed`` and t times ``free`` together are as long as ``limit``; 0 if fixed is more."""
        xp = namespace(limit)
        return xp.sqrt(xp.maximum(limit**2 - fixed, limit * 0.0) / free)


class Lengths:
    """Amounts are lengths: for float32. A square that overflows is taken again in a large unit."""

    @staticmethod
    def of(norm: Array) -> Array:
        """See `Squares.of`."""
        return norm

    @staticmethod
    def of_squares(squares: Array) -> Array:
        """See `Squares.of_squares`."""
        return namespace(squares).sqrt(squares)

    @staticmethod
    def norm(amount: Array) -> Array:
        """See `Squares.norm`."""
        return amount

    @staticmethod
    def times(amount: Array, factor: Array) -> Array:
        """See `Squares.times`."""
        return amount * factor

    @staticmethod
    def plus(a: Array, b: Array) -> Array:
        """See `Squares.plus`."""
        xp = namespace(a)
        large_a, large_b = xp.in_unit(a, LARGE), xp.in_unit(b, LARGE)
        return _finite_of(xp.sqrt(a * a + b * b), xp.sqrt(large_a * large_a + large_b * large_b))

    @staticmethod
    def by_node(amount: Array, ids: Array, num: int) -> Array:
        """See `Squares.by_node`."""
        xp = namespace(amount)
        large = xp.in_unit(amount, LARGE)
        squares, large_squares = (xp.segment_sum(values * values, ids, num) for values in (amount, large))
        return _finite_of(xp.sqrt(squares), xp.sqrt(large_squares))

    @classmethod
    def running(cls, amount: Array) -> Array:
        """See `Squares.running`."""
        xp, shift = namespace(amount), 1
        while shift < amount.shape[0]:
            amount = xp.concatenate([amount[:shift], cls.plus(amount[shift:], amount[:-shift])])
            shift *= 2
        return amount

    @staticmethod
    def factor_to(limit: Array, fixed: Array, free: Array) -> Array:
        """See `Squares.factor_to`."""
        xp = namespace(limit)
        share = fixed / xp.where(limit > 0, limit, xp.zeros_like(limit) + 1.0)
        return limit * xp.sqrt(xp.maximum((1.0 - share) * (1.0 + share), limit * 0.0)) / free


def _finite_of(length: Array, in_large: Array) -> Array:
    """The length where its square was finite, else what was measured in the large unit."""
    xp = namespace(length)
    return xp.where(xp.isfinite(length), length, in_large * LARGE)


Sums = type[Squares] | type[Lengths]


def sums_for(like: Array) -> Sums:
    """Return how lengths are added in the dtype of an array.

    >>> import numpy as np
    >>> sums_for(np.zeros(1)).__name__
    'Squares'
    """
    return Squares if namespace(like).holds_squares(like) else Lengths


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
        """Return the arrays for the namespace and device of ``like``; made once, kept for as long as the plan lives."""
        xp = namespace(like)
        key = (xp.__name__, xp.device_key(like))
        made = _NODES.setdefault(plan, {})
        if key not in made:
            made[key] = cls(plan, xp, like)
        return made[key]

    def by_depth(self, values_B: Array, fill: float) -> list[Array]:
        """Return one vector per depth: the value of a bin at its node, ``fill`` at all other nodes."""
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
        depths = self.by_depth(values_B, 0.0)
        for depth in range(len(depths) - 1, 0, -1):
            lo, hi = self.depths[depth - 1]
            from_below = by_node(depths[depth], self.parents[depth - 1], hi - lo)
            depths[depth - 1] = plus(depths[depth - 1], from_below)
        return namespace(values_B).concatenate(depths)


_NODES: WeakKeyDictionary[Plan, dict[tuple[str, str], Nodes]] = WeakKeyDictionary()
"""The nodes of each plan, per namespace and device."""
