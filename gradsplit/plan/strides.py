"""Memory: how a tensor's matrix view lies in memory, from its shape and strides alone."""

from __future__ import annotations

import itertools
import math
from functools import lru_cache
from typing import NamedTuple

__all__ = ["Memory", "memory_of"]


class Memory(NamedTuple):
    """How a matrix view lies in memory.

    Attributes:
        turned: rows of the matrix are columns of memory, as in a transposed tensor.
        line: elements from one memory row to the next.
        mixed: columns lie in another order than the matrix view's (channels_last): only whole rows can be cut out.
    """

    turned: bool
    line: int
    mixed: bool


@lru_cache(maxsize=4096)
def memory_of(shape: tuple[int, ...], strides: tuple[int, ...]) -> Memory | None:
    """Return how a tensor's matrix view lies in memory, or None where its rows cannot be walked.

    None: elements that overlap (an expanded tensor), or neither rows nor columns that are contiguous.

    >>> memory_of((4, 3), (3, 1)), memory_of((4, 3), (1, 4))
    (Memory(turned=False, line=3, mixed=False), Memory(turned=True, line=4, mixed=False))
    >>> memory_of((4, 3), (0, 1)) is None
    True
    """
    dims = [(size, stride) for size, stride in zip(shape, strides, strict=True) if size != 1]
    reach = 0
    for size, stride in sorted(dims, key=lambda dim: (dim[1], dim[0])):
        if stride <= reach:
            return None
        reach += (size - 1) * stride
    matrix = len(shape) > 1
    inner = [(s, d) for s, d in zip(shape[1:], strides[1:], strict=True) if s != 1] if matrix else dims
    cols = math.prod(size for size, _ in inner)
    line = strides[0] if matrix and shape[0] > 1 else cols
    if all(a[1] == b[0] * b[1] for a, b in itertools.pairwise(inner)):
        col_stride = inner[-1][1] if inner else 1
        if col_stride == 1:
            return Memory(False, line, False)
        one_row = not matrix or shape[0] == 1
        return Memory(True, col_stride, False) if one_row or line == 1 else None
    rising = sorted(inner, key=lambda dim: dim[1])
    dense = rising[0][1] == 1 and all(b[1] == a[0] * a[1] for a, b in itertools.pairwise(rising))
    return Memory(False, line, True) if dense else None
