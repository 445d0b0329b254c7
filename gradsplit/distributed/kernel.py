"""One all-reduce a step: a kernel over local shards whose sums are those of the whole tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..plan import Plan
from .add import add_over
from .local_plan import LocalPlan
from .shards import is_sharded, local_of, shard_of

__all__ = ["ShardedKernel", "kernel_for"]


class ShardedKernel:
    """The kernel contract over DTensors: measured where they lie, added over the ranks once, scaled where they lie.

    A rank sends, for each list of tensors, its sums of squares and how many elements they are over. Dividing by the
    copies thus counted is right for replicas on any sub-mesh, for empty shards, and where a gradient is None on some of
    the ranks. Every rank receives the same bits, so every rank decides the same.

    Args:
        plan: over the global shapes.
        tensors: the parameters, one a layout entry.
        make: plan -> kernel, for the local shards.
        group: the ranks that hold the tensors; None: all.

    Raises:
        ValueError: shards that do not make up a whole number of copies of a bin.
    """

    def __init__(self, plan: Plan, tensors: Sequence[Any], make: Callable[[Plan], Any], group: Any | None) -> None:
        self.plan, self.group = plan, group
        names = plan.layout.names
        self.local_plan = LocalPlan(plan, [shard_of(name, t) for name, t in zip(names, tensors, strict=True)])
        self.local = make(self.local_plan)
        self.name = f"{self.local.name}, sharded"
        self.device: torch.device = self.local.device
        like = self.local.squares([None] * len(tensors))
        self._numel_B = torch.as_tensor(plan.numel_B, dtype=like.dtype, device=like.device)
        self._counts: dict[bytes, Tensor] = {}
        copies_B = (
            self.add_(torch.as_tensor(self.local_plan.held_B(), dtype=like.dtype, device=like.device)) / self._numel_B
        )
        bad = (copies_B < 0.5) | ((copies_B - copies_B.round()).abs() > 1e-6)
        if bool(bad.any()):
            b = int(bad.nonzero()[0, 0])
            raise ValueError(
                f"ShardedKernel(…): expected the ranks to hold a whole number of copies, got {float(copies_B[b]):g} of "
                f"{plan.bins[b].name!r}. Pass process_group= with the ranks that share these parameters."
            )
        mine = self.local_plan.held_B()
        parts_B = torch.as_tensor((mine > 0) & (mine < plan.numel_B), dtype=like.dtype, device=like.device)
        self.spread_B: np.ndarray = self.add_(parts_B).cpu().numpy() > 0
        """(B,) whether some rank holds a part of a bin and not all of it, as of a bias under FSDP."""
        self.bins_are_local = not bool(self.spread_B.any())

    def squares(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """See `ReferenceKernel.squares`; one all-reduce."""
        return self.squares_many([tensors])[0]

    def squares_many(self, lists: Sequence[Sequence[Tensor | None]]) -> list[Tensor]:
        """Return the squares of several lists of tensors, by one all-reduce of (2 x lists, B)."""
        locals_ = [[local_of(t) for t in tensors] for tensors in lists]
        many = getattr(self.local, "squares_many", None)
        sums = [self.local.squares(tensors) for tensors in locals_] if many is None else many(locals_)
        counts = [self._held(tensors) for tensors in lists]
        total = self.add_(torch.stack([*sums, *counts]))
        squares, held = total[: len(lists)], total[len(lists) :]
        share = self._numel_B / held.clamp(min=1.0)
        return list(torch.where(held > 0, squares * share, torch.zeros_like(squares)))

    def scale_(self, tensors: Sequence[Tensor | None], scale_B: Tensor, zero_B: Tensor) -> None:
        """See `ReferenceKernel.scale_`; no communication."""
        self.local.scale_([local_of(t) for t in tensors], scale_B, zero_B)

    def _held(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Elements of each bin that this rank's present tensors hold; the same few patterns come again and again."""
        present = np.array([tensor is not None for tensor in tensors], dtype=np.float64)
        key = present.tobytes()
        if key not in self._counts:
            held = torch.as_tensor(self.local_plan.held_B(present), dtype=self._numel_B.dtype)
            self._counts[key] = held.to(self.device)
        return self._counts[key]

    def add_(self, values: Tensor) -> Tensor:
        """Add a tensor over the ranks in place, see `add_over`."""
        return add_over(self.group, values)


def kernel_for(plan: Plan, tensors: Sequence[Any], make: Callable[[Plan], Any], *, group: Any | None = None) -> Any:
    """Return ``make(plan)``, or a `ShardedKernel` around it where a tensor is sharded.

    Plain tensors under DDP are the same bits on every rank: nothing is sent for them.
    """
    if any(is_sharded(tensor) for tensor in tensors):
        return ShardedKernel(plan, tensors, make, group)
    return make(plan)
