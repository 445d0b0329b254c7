"""The kernel of tensors that may be sharded: one all-reduce per step makes the sums those of the whole tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels import Backend, Kernel, choose_backend
from ..plan import Plan
from .shards import is_sharded, local_of, local_plan_of, pieces_of, shard_of

__all__ = ["add_over", "adder", "check_group", "ShardedKernel", "make_kernel"]


def add_over(group: dist.ProcessGroup | None, values: Tensor) -> Tensor:
    """Add a tensor over the ranks of a group in place, by one all-reduce, and return it.

    Args:
        group: the ranks; None: all.
        values: of the same shape and dtype on every rank.

    Raises:
        RuntimeError: a rank has ended, or does not take part in time.
    """
    try:
        dist.all_reduce(values, group=group)
    except RuntimeError as error:
        raise RuntimeError(
            f"add_over(…): expected every rank to take part in a sum over {values.numel()} numbers, got {error}. A "
            "rank has probably ended: read its log, then start all ranks again from a checkpoint."
        ) from error
    return values


def adder(group: dist.ProcessGroup | None) -> Callable[[Tensor], Tensor] | None:
    """Return what adds over a group; None without one, where there is nothing to add."""
    return None if group is None else partial(add_over, group)


def check_group(group: Any, *, option: str, call: str) -> None:
    """Refuse what is no group of ranks.

    Raises:
        ValueError: neither a group nor None; names the option.
    """
    if group is not None and not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise ValueError(
            f"{call}({option}={group!r:.60}): expected a process group of torch.distributed with this rank in it, or "
            f"None, got {type(group).__name__}. Make one with new_group(…), or leave it out."
        )


class ShardedKernel(Kernel):
    """A kernel over DTensors: measured where they lie, added over the ranks once, scaled where they lie.

    For each list of tensors, a rank sends its sums of squares and the number of elements that they are over. The sums
    are divided by the number of copies that follows. This is right for replicas on any sub-mesh, for empty shards, and
    where a gradient is None on some of the ranks. Every rank receives the same bits, so every rank decides the same.

    Args:
        plan: over the global shapes.
        tensors: the parameters, one per entry of the layout.
        backend: reads and scales the local shards.
        group: the ranks that hold the tensors; None: all.

    Raises:
        ValueError: shards that do not make up a whole number of copies of a bin.
    """

    def __init__(
        self,
        plan: Plan,
        tensors: Sequence[Tensor],
        backend: Backend,
        group: dist.ProcessGroup | None,
    ) -> None:
        super().__init__(plan, tensors[0].device)
        self.group = group
        layout = plan.layout
        shards = [shard_of(*one) for one in zip(layout.names, tensors, layout.shapes, strict=True)]
        self.local_plan = local_plan_of(plan, shards)
        # Measured and scaled by pieces of bins, one per tensor; nearly always these are the bins.
        pieces, self._bin_of_piece = pieces_of(plan)
        self._local_pieces = self.local_plan if self._bin_of_piece is None else local_plan_of(pieces, shards)
        self.local = backend.make(self._local_pieces, self.device)
        self.name = f"{self.local.name}, sharded"
        self._like = self.local.squares([None] * len(tensors))
        self._numel = self._vector(pieces.numel_B)
        self._counts: dict[bytes, Tensor] = {}
        copies = self.add_(self._vector(self._local_pieces.numel_B)) / self._numel
        bad = (copies < 0.5) | ((copies - copies.round()).abs() > 1e-6)
        if bool(bad.any()):
            b = int(bad.nonzero()[0, 0])
            raise ValueError(
                f"ShardedKernel(…): expected the ranks to hold a whole number of copies, got {float(copies[b]):g} of "
                f"{pieces.bins[b].name!r}. Pass process_group= with the ranks that share these parameters."
            )
        mine, held_T, numel_T = self.local_plan.numel_B, self.local_plan.layout.numels, plan.layout.numels
        parts = [(mine > 0) & (mine < plan.numel_B), np.array(held_T) < np.array(numel_T)]
        spread = self.add_(self._vector(np.concatenate(parts))).cpu().numpy() > 0
        self.spread_B, self.is_whole_T = spread[: plan.num_bins], ~spread[plan.num_bins :]
        self.bins_are_local = not bool(self.spread_B.any())

    def squares(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """See `Kernel.squares`; one all-reduce."""
        return self.squares_many([tensors])[0]

    def squares_many(self, lists: Sequence[Sequence[Tensor | None]], *of_first: Tensor) -> list[Tensor]:
        """See `Kernel.squares_many`; one all-reduce of (2 x lists, B).

        Args:
            lists: see `Kernel.squares_many`.
            of_first: other sums over the bins of the first list on this rank, (B,) each, for bins inside one tensor.
                They are added over the ranks too, and returned after the squares.
        """
        counts = [self._held(tensors) for tensors in lists]
        total = self.add_(torch.stack([*self._sums(lists), *of_first, *counts]))
        sums, held = total[: -len(lists)], total[-len(lists) :]
        # Where a rank has no gradient the count is no multiple; a bin's length is then that of what is there.
        copies = (held / self._numel - 1e-6).ceil().clamp(min=1.0)
        return [self._of_bins(row) for row in sums / torch.cat([copies, copies[:1].expand(len(of_first), -1)])]

    def squares_here(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """See `Kernel.squares_here`."""
        return self._of_bins(self._sums([tensors])[0])

    def scale_(self, tensors: Sequence[Tensor | None], scale_B: Tensor, zero_B: Tensor) -> None:
        """See `Kernel.scale_`."""
        if self._bin_of_piece is not None:
            ids = torch.from_numpy(self._bin_of_piece).to(self.device)
            scale_B, zero_B = scale_B[ids], zero_B[ids]
        self.local.scale_([local_of(t) for t in tensors], scale_B, zero_B)

    def prepare(self, dtypes: Iterable[torch.dtype]) -> bool:
        """See `Kernel.prepare`; every rank finds out for itself."""
        self.local.by_name = self.by_name
        return self.local.prepare(dtypes)

    def add_(self, values: Tensor) -> Tensor:
        """See `Kernel.add_` and `add_over`."""
        return add_over(self.group, values)

    def _sums(self, lists: Sequence[Sequence[Tensor | None]]) -> list[Tensor]:
        """Squares of the pieces of each list's tensors that are here."""
        return self.local.squares_many([[local_of(t) for t in tensors] for tensors in lists])

    def _of_bins(self, pieces: Tensor) -> Tensor:
        if self._bin_of_piece is None:
            return pieces
        ids = torch.from_numpy(self._bin_of_piece).to(self.device)
        return pieces.new_zeros(self.plan.num_bins).index_add_(0, ids, pieces)

    def _held(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Elements of each piece in this rank's present tensors; the same few patterns come again and again."""
        present = np.array([tensor is not None for tensor in tensors], dtype=np.float64)
        key = present.tobytes()
        if key not in self._counts:
            self._counts[key] = self._vector(self._local_pieces.numel_in_B(present))
        return self._counts[key]

    def _vector(self, values: np.ndarray) -> Tensor:
        # A copy, since it is added to in place and the values are a plan's own.
        return torch.tensor(values, dtype=self._like.dtype, device=self.device)


def make_kernel(
    plan: Plan,
    tensors: Sequence[Tensor],
    backend: str = "auto",
    group: dist.ProcessGroup | None = None,
    *,
    call: str,
) -> Kernel:
    """Return the kernel that reads and scales a plan's bins: over shards if a tensor is sharded.

    Plain tensors under DDP are the same bits on every rank, so nothing is sent for them.

    Args:
        plan: the bins, over the whole shapes.
        tensors: the parameters, one per entry of the layout, all on one device.
        backend: "auto", or the name of a backend for what this process holds.
        group: the ranks that hold shards of the tensors; None: all.
        call: the caller's name, for errors.

    Raises:
        ValueError: an unknown backend, or one that cannot serve the device here; shards that do not make up a whole
            number of copies of a bin.

    >>> from gradsplit.plan import Layout, whole
    >>> kernel = make_kernel(whole(Layout.from_shapes({"w": (2, 2)})), [torch.ones(2, 2)], call="f")
    >>> kernel.squares([torch.full((2, 2), 3.0)]).tolist()
    [36.0]
    """
    device = tensors[0].device
    row = choose_backend(backend, device, call=call)
    sharded = any(is_sharded(tensor) for tensor in tensors)
    made = ShardedKernel(plan, tensors, row, group) if sharded else row.make(plan, device)
    made.by_name = backend != "auto"
    made.prepare({tensor.dtype for tensor in tensors})
    return made
