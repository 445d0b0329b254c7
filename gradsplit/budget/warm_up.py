"""The first observations of a history, so that no single spike among them moves a limit.

Three observations give their median; it counts as their mean. Every later one of the warm-up enters as at most twice
the mean so far. A spike of any size then has at most the weight of one ordinary observation. From the fourth on, five
times the mean is the limit, since a spike that is let through would stay in an optimizer's memory for long.
"""

from __future__ import annotations

from types import ModuleType

from ..xp import Array

__all__ = ["BEYOND", "FIRST", "MOST", "first_ones"]

FIRST = 3
"""Observations of which the median is taken."""

MOST = 2.0
"""What a later observation of the warm-up may be, in units of the mean so far."""


BEYOND = 5.0
"""What is let through during the warm-up from the fourth observation on, in units of the mean so far."""


def first_ones(xp: ModuleType, norm: Array, low: Array, high: Array, seen: Array) -> tuple[Array, Array]:
    """Take in one of the first three observations; return the centre and the upper of the two that are kept, (n,).

    Args:
        xp: the arrays' namespace.
        norm: (n,) the observation.
        low: (n,) the smaller of those before.
        high: (n,) the larger of those before; the one itself after the first.
        seen: (n,) observations before.

    >>> import numpy as np
    >>> from gradsplit.xp import numpy_xp
    >>> low, high = np.zeros(1), np.zeros(1)
    >>> for seen, norm in enumerate((1000.0, 1.0, 2.0)):
    ...     low, high = first_ones(numpy_xp, np.array([norm]), low, high, np.array([seen]))
    >>> low
    array([2.])
    """
    second = (xp.minimum(low, norm), xp.maximum(low, norm))
    third = xp.maximum(low, xp.minimum(high, norm))
    centre = xp.where(seen < 1, norm, xp.where(seen < 2, second[0], third))
    return centre, xp.where(seen < 1, norm, xp.where(seen < 2, second[1], high))
