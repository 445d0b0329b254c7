"""Reading and scaling bins through the array namespace: a reduction and a gather a tensor, no loop over bins.

Per tensor the plan is read once into a pattern, the bin of each part in the tensor's own axes: one part (the whole
tensor), one a row, one a column, or one an entry. Reading reduces over the axes that the pattern leaves out; scaling
multiplies by a factor that broadcasts over them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..budget import LARGE, sums_for
from ..plan import Plan, pattern_of
from ..xp import Array, namespace
from .oriented import Oriented

__all__ = ["Patterns"]


class Patterns:
    """A plan's bins in the axes of a framework's arrays.

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
        parts = [ids.reshape(-1) for ids in self._ids if ids is not None]
        self._bin_P = np.concatenate(parts)
        # One part a bin, in order, is the usual case (rows): then nothing has to be gathered or scattered.
        self._in_order = np.array_equal(self._bin_P, np.arange(plan.num_bins))
        self._starts = np.cumsum([0] + [0 if ids is None else ids.size for ids in self._ids])

    def amounts_B(self, arrays: Sequence[Array], *, may_explode: bool = True) -> Array:
        """Return each bin's amount (its square, or where these overflow its length), shape (B,); see length_sums.

        Not finite where an entry is not, or where a length exceeds the dtype. Squares are added in float64 where the
        framework has it at hand, else in float32: then squares that overflow (from 1.8e19 on) are taken once more in
        units of 2^80, and entries below 1e-19 count as 0.

        Args:
            arrays: one a layout entry.
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
        """Lengths of the parts of all arrays, one after the other; squares are taken in a unit of length."""
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
