"""A framework's arrays beside a plan: which of their axes count rows, and reading and scaling bins in place.

Rows mean output units in every framework. PyTorch keeps them first, (out, in) and (out, in, height, width). JAX and
Keras keep them last, (in, out) and (height, width, in, out). Plans are made on PyTorch's order, so that one plan has
the same bins everywhere. The arrays themselves are never turned: patterns are.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..budget import LARGE, sums_for
from ..plan import Layout, Plan, pattern_of
from ..xp import Array, namespace

__all__ = ["Orientation", "Oriented", "orientation_of", "Patterns"]

Axes = tuple[int, ...]


@dataclass(frozen=True)
class Orientation:
    """Which axes count output units, for arrays of two or more dimensions.

    Attributes:
        rows: the axes of an array that no pattern names.
        named: (pattern of a dotted name, axes); the first that fits holds. Several axes count units together, in
            their order: ``(0, -1)`` for layers stacked along axis 0, ``(1, 2)`` for heads and their dimensions,
            ``(-2, -1)`` for a depthwise kernel (height, width, in, multiplier).
    """

    rows: Axes = (-1,)
    named: tuple[tuple[str, Axes], ...] = ()

    def order(self, name: str, shape: tuple[int, ...]) -> tuple[Axes, Axes]:
        """Return the axes that count rows, and all others in the order of their columns.

        An array that no pattern names and whose units are last is read as a convolution's kernel, (…, in, out): its
        columns are in PyTorch's order, (in, …). One that a pattern names keeps the order of its other axes.

        Raises:
            ValueError: an axis that the array does not have, or one named twice.
        """
        named = [axes for pattern, axes in self.named if fnmatch.fnmatchcase(name, pattern)]
        given, rank = (named or [self.rows])[0], len(shape)
        if any(not -rank <= axis < rank for axis in given) or len({axis % rank for axis in given}) < len(given):
            raise ValueError(
                f"orientation={{{name!r}: {given}}}: expected different axes of an array of shape {shape}. Count from "
                "0, or from -1 backwards."
            )
        rows = tuple(axis % rank for axis in given)
        rest = tuple(axis for axis in range(rank) if axis not in rows)
        if not named and rows == (rank - 1,):
            rest = rest[-1:] + rest[:-1]
        return rows, rest


_TOKENS_FIRST = (("embedding", (0,)), ("*.embedding", (0,)), ("embeddings", (0,)), ("*.embeddings", (0,)))


def orientation_of(value: Any, *, call: str) -> Orientation:
    """Return the orientation that a user wrote.

    ``"last"``: output units are the last axis, but rows of arrays named ``embedding`` or ``embeddings`` are tokens.
    ``"first"``: PyTorch's order, for all. A mapping from name patterns to an axis or axes goes before ``"last"``.

    Raises:
        ValueError: another word.
        TypeError: something else.

    >>> orientation_of({"*.query.kernel": (1, 2)}, call="f").order("0.query.kernel", (64, 4, 16))
    ((1, 2), (0,))
    """
    if isinstance(value, Orientation):
        return value
    if isinstance(value, Mapping):
        named = tuple((pattern, (axes,) if isinstance(axes, int) else tuple(axes)) for pattern, axes in value.items())
        return Orientation((-1,), named + _TOKENS_FIRST)
    words = {"last": Orientation((-1,), _TOKENS_FIRST), "first": Orientation((0,))}
    if isinstance(value, str) and value in words:
        return words[value]
    error = ValueError if isinstance(value, str) else TypeError
    raise error(
        f"{call}(orientation={value!r}): expected 'last' (kernels are (in, out)), 'first' (kernels are (out, in)), or "
        "a mapping such as {'*.query.kernel': (1, 2)} from names to the axes that count output units."
    )


@dataclass(frozen=True)
class Oriented:
    """Named arrays of a framework beside their layout in PyTorch's order.

    Attributes:
        layout: names and turned shapes; plans are made on it.
        shapes: the arrays' own shapes.
        orders: per array the axes that count rows, and the others in the order of their columns.

    >>> kernels = Oriented.of({"dense": (3, 8), "conv": (5, 5, 3, 16)}, Orientation())
    >>> kernels.layout.shapes
    ((8, 3), (16, 3, 5, 5))
    """

    layout: Layout
    shapes: tuple[tuple[int, ...], ...]
    orders: tuple[tuple[Axes, Axes], ...]

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]], orientation: Orientation) -> Oriented:
        """Turn named shapes; a 0-d or 1-d array is a single row in every framework."""
        orders, turned = [], {}
        for name, shape in shapes.items():
            order = orientation.order(name, shape) if len(shape) > 1 else ((), tuple(range(len(shape))))
            rows, rest = order
            sizes = tuple(shape[axis] for axis in rest)
            turned[name] = (math.prod(shape[axis] for axis in rows), *(sizes or (1,))) if rows else shape
            orders.append(order)
        return cls(Layout.from_shapes(turned), tuple(tuple(shape) for shape in shapes.values()), tuple(orders))

    @classmethod
    def plain(cls, layout: Layout) -> Oriented:
        """Arrays that are in PyTorch's order already."""
        return cls.of(dict(zip(layout.names, layout.shapes, strict=True)), Orientation((0,)))

    def own_order(self, t: int, cells: np.ndarray) -> np.ndarray:
        """Return (rows, columns) numbers of array t, or one row or column of them, in the array's own axes."""
        (rows, rest), shape = self.orders[t], self.shapes[t]
        ones = (1,) * len(shape)
        sizes = [shape[axis] for axis in rows] if cells.shape[0] > 1 else ones[: len(rows)]
        sizes = [*sizes, *([shape[axis] for axis in rest] if cells.shape[1] > 1 else ones[: len(rest)])]
        return cells.reshape(sizes).transpose(np.argsort((*rows, *rest)))

    def turned(self, t: int, array: np.ndarray) -> np.ndarray:
        """Return array t in the layout's shape, for what looks at values before the run, such as energies."""
        rows, rest = self.orders[t]
        return np.transpose(array, (*rows, *rest)).reshape(self.layout.shapes[t])


class Patterns:
    """A plan's bins in the axes of a framework's arrays: a reduction and a gather per array, no loop over bins.

    Each array has the pattern of its tensor (see `pattern_of`), turned to the array's own axes. Reading reduces over
    the axes along which the bin does not change; scaling multiplies by a factor that broadcasts along them.

    Args:
        plan: the bins.
        oriented: the arrays; None: in PyTorch's order.
        call: the caller's name, for errors.

    Raises:
        ValueError: the plan of other arrays.
    """

    def __init__(self, plan: Plan, oriented: Oriented | None = None, *, call: str = "Patterns") -> None:
        oriented = Oriented.plain(plan.layout) if oriented is None else oriented
        if oriented.layout.fingerprint != plan.layout.fingerprint:
            raise ValueError(
                f"{call}(plan=…): expected a plan of these arrays (layout {oriented.layout.fingerprint}), got one of "
                f"layout {plan.layout.fingerprint}. Make it from the layout of the same arrays and orientation."
            )
        self.plan, self.shapes = plan, oriented.shapes
        self._ids: list[np.ndarray | None] = []
        self._reduced: list[tuple[int, ...]] = []
        for t, shape in enumerate(self.shapes):
            pattern = pattern_of(plan, t)
            ids = None if pattern.kind == "none" else oriented.own_order(t, pattern.bins)
            self._ids.append(ids)
            self._reduced.append(() if ids is None else tuple(a for a in range(len(shape)) if ids.shape[a] == 1))
        self._bin_P = np.concatenate([ids.reshape(-1) for ids in self._ids if ids is not None])
        # A pattern with one entry per bin, in order, is the usual case (rows): nothing is gathered or scattered then.
        self._in_order = np.array_equal(self._bin_P, np.arange(plan.num_bins))
        self._starts = np.cumsum([0] + [0 if ids is None else ids.size for ids in self._ids])

    def amounts_B(self, arrays: Sequence[Array], *, may_explode: bool = True) -> Array:
        """Return each bin's amount (its square, or where these overflow its length), shape (B,); see length_sums.

        Not finite where an entry is not, or where a length exceeds the dtype. Squares are added in float64 where the
        framework has it at hand, else in float32: then squares that overflow (from 1.8e19 on) are taken once more in
        units of 2^80, and entries below 1e-19 count as 0.

        Args:
            arrays: one per entry of the layout.
            may_explode: False: what overflows counts as not finite, which saves the graph a branch. For weights and
                updates, which are broken long before.
        """
        xp = namespace(arrays[0])
        like = xp.accumulator(arrays)
        sums, length_P = sums_for(like), self._lengths_P(arrays, like)
        if may_explode and not xp.holds_squares(like):
            plain_P = length_P
            length_P = xp.when(
                xp.every(xp.isfinite(plain_P)),
                lambda: plain_P,
                lambda: xp.where(xp.isfinite(plain_P), plain_P, self._lengths_P(arrays, like, unit=LARGE)),
            )
        amount_P = sums.of(length_P)
        if self._in_order:
            return amount_P
        return sums.by_node(amount_P, xp.index(self._bin_P, amount_P), self.plan.num_bins)

    def _lengths_P(self, arrays: Sequence[Array], like: Array, *, unit: float = 1.0) -> Array:
        """The length at every entry of all patterns, in a row; squares are taken in a unit of length."""
        xp, lengths = namespace(like), []
        for array, ids, axes in zip(arrays, self._ids, self._reduced, strict=True):
            if ids is not None:
                wide = xp.cast(xp.modulus(array), like)
                wide = wide if unit == 1.0 else xp.in_unit(wide, unit)
                lengths.append(xp.reshape(xp.length_over(wide, axes), (ids.size,)))
        length_P = xp.concatenate(lengths) if len(lengths) > 1 else lengths[0]
        return length_P if unit == 1.0 else length_P * unit

    def factor(self, t: int, values_B: Array) -> Array:
        """Return the bins' values in a shape that broadcasts over array t."""
        xp, ids = namespace(values_B), self._ids[t]
        if ids is None:
            return xp.reshape(values_B[:0], self.shapes[t])
        if self._in_order:
            values = values_B[int(self._starts[t]) : int(self._starts[t + 1])]
        else:
            values = xp.take(values_B, xp.index(ids.reshape(-1), values_B))
        return xp.reshape(values, ids.shape)

    def scaled(self, arrays: Sequence[Array], scale_B: Array, zero_B: Array) -> list[Array]:
        """Return the arrays times their bins' scales, zeros where ``zero_B``, since 0 * inf is not 0.

        A bin of scale 1 keeps its bits; halves are multiplied in float32.
        """
        xp, made = namespace(scale_B), []
        for t, array in enumerate(arrays):
            product = xp.times(array, self.factor(t, scale_B))
            made.append(xp.where(self.factor(t, zero_B), xp.zeros_like(array), product))
        return made
