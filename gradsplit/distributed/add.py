"""The one collective of this package: adding a vector over ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor

__all__ = ["add_over", "adder"]


def add_over(group: Any | None, values: Tensor) -> Tensor:
    """Add a tensor over the ranks of a group in place, by one all-reduce, and return it.

    Raises:
        RuntimeError: a rank has ended, or does not take part in time.
    """
    try:
        dist.all_reduce(values, group=group)
    except RuntimeError as error:
        raise RuntimeError(
            f"add_over(…): expected every rank to take part in a sum over {values.numel()} numbers, got {error}. A "
            "rank has probably ended: read its log; then start all ranks again from a checkpoint."
        ) from error
    return values


def adder(group: Any | None) -> Callable[[Tensor], Tensor] | None:
    """Return what adds over a group; None without one, where there is nothing to add."""
    return None if group is None else partial(add_over, group)
