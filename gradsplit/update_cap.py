"""UpdateCap: bound the step of any optimizer after it was made, by comparing with a copy of the weights."""

from __future__ import annotations

import torch
from torch import Tensor

from .budget import Decision
from .kernels.eager import EagerKernel
from .plan import part_of
from .split import Split

__all__ = ["STEPS", "UpdateCap"]

BLOCK = 1 << 20
"""Elements of a tensor that are compared with their copy at a time."""

STEPS = ("cap", "share")
"""What a step may be made into: at most the limit, or exactly the limit."""


class UpdateCap:
    """Draw the weights back to within the limits on the update, or out to them.

    Per bin b:

        w_b <- w_before + s_b (w_b - w_before)          "cap":   s_b = min(1, limit_b / ||w_b - w_before||)
                                                        "share": s_b = limit_b / ||w_b - w_before||

    With "share" the optimizer gives the direction alone, and every bin moves by its limit, tau of its own length. A bin
    whose gradient was zero in this step is only capped, since momentum or decay alone say nothing of a direction.

    Tensors are looked at block by block, twice: the memory is one copy of the weights and a few megabytes beside it.
    Decoupled weight decay is part of what is bounded here; `GSO` bounds the update apart from it. Where tensors are
    sharded, all are looked at together, at the price of a second copy of the shards.

    Args:
        split: whose ledger ``update`` decides.
        step: "cap" or "share".

    Raises:
        ValueError: "share" with limits above the bins.
    """

    def __init__(self, split: Split, step: str = "cap") -> None:
        if step == "share" and any(level != "bin" for level, _ in split.update_budgets):
            raise ValueError(
                f"{split.call}(step='share'): expected a bound on the step of every bin, got one at level "
                f"{next(level for level, _ in split.update_budgets if level != 'bin')!r}. Use RelativeStep() alone."
            )
        self.split, self.step = split, step
        self._before: list[Tensor] = []
        self._holds = False
        self._gradient_B: Tensor | None = None
        plan, device = split.plan, split.kernel.device
        self._shapes = EagerKernel(split.local_plan, device)
        self._parts = []
        if not split.is_sharded:
            for t in range(len(split.tensors)):
                part, bins = part_of(plan, [t])
                # Not the compiled kernel, which keeps the tensors that it has read.
                self._parts.append((EagerKernel(part, device), torch.from_numpy(bins).to(device)))

    @property
    def remembers(self) -> bool:
        """Whether there is a copy of the weights to compare with."""
        return bool(self._before)

    @torch.no_grad()
    def remember(self, *, anew: bool = False) -> None:
        """Copy the weights before the update; once per step, since a closure may have moved them before the next call.

        Args:
            anew: a step begins.
        """
        if self._holds and not anew:
            return
        weights = self.split.parameters
        if not self._before:
            self._before = [torch.empty_like(w) for w in weights]
        for copy, w in zip(self._before, weights, strict=True):
            copy.copy_(w)
        self._holds, self._gradient_B = True, None

    def note(self, squares_B: Tensor) -> None:
        """Take note of the squares of the step's gradient, (B,)."""
        if self.step == "share":
            self._gradient_B = squares_B

    @torch.no_grad()
    def apply(self) -> None:
        """Bound the update that the optimizer made since `remember`; a bin whose update is not finite is undone."""
        split = self.split
        if not self._holds or split.rates is None or split.update is None:
            return
        self._holds = False
        before_B = split.kernel.squares([*self._before])
        decision = split.update.decide(self._moved_squares(), before_B, split.pace_B())
        scale_B = self._scale_B(decision)
        touched_B = (scale_B != 1) | ~decision.finite_B
        # On the CPU looking costs nothing; elsewhere it would wait for the device.
        if touched_B.device.type == "cpu" and not bool(touched_B.any()):
            return
        for t, (w, before) in enumerate(zip(split.parameters, self._before, strict=True)):
            for rows in _blocks(w):
                now, old = (w, before) if rows is None else (w[rows], before[rows])
                at = None if rows is None else torch.arange(rows.start, rows.stop, device=w.device)
                move = now - old
                move.mul_(self._shapes.factor(t, scale_B, w.dtype, at))
                move.masked_fill_(self._shapes.factor(t, ~decision.finite_B, w.dtype, at), 0)
                old.add_(move)
                del move
                # A bin within its limit keeps the optimizer's bits.
                now.copy_(torch.where(self._shapes.factor(t, touched_B, w.dtype, at), old, now))

    def _moved_squares(self) -> Tensor:
        """Squares of the update, (B,); block by block, so that one small difference exists at a time."""
        split = self.split
        if not self._parts:
            return split.kernel.squares([w - b for w, b in zip(split.parameters, self._before, strict=True)])
        squares_B = torch.zeros_like(split.like)
        for (kernel, ids), w, before in zip(self._parts, split.parameters, self._before, strict=True):
            for rows in _blocks(w):
                if rows is None:
                    move = w - before
                else:  # a block of rows is what a sparse tensor stores
                    at = torch.arange(rows.start, rows.stop, device=w.device)
                    move = torch.sparse_coo_tensor(
                        at[None], w[rows] - before[rows], w.shape, is_coalesced=True, check_invariants=False
                    )
                squares_B.index_add_(0, ids, kernel.squares([move]))
        return squares_B

    def _scale_B(self, decision: Decision) -> Tensor:
        scale_B: Tensor = decision.scale_B
        if self.step == "cap":
            return scale_B
        norm_B = decision.norm_B
        whole_B = decision.limit_B / torch.where(norm_B > 0, norm_B, 1.0)
        moves_B = decision.finite_B & (norm_B > 0)
        if self._gradient_B is not None:
            moves_B = moves_B & self._gradient_B.isfinite() & (self._gradient_B > 0)
        return torch.where(moves_B, whole_B, scale_B)


def _blocks(tensor: Tensor) -> list[slice | None]:
    """Slices of rows of at most `BLOCK` elements, or of one row; None stands for the tensor as a whole."""
    if not tensor.numel():
        return []
    if tensor.numel() <= BLOCK or tensor.dim() == 0:
        return [None]
    size = max(1, BLOCK * len(tensor) // tensor.numel())
    return [slice(start, min(start + size, len(tensor))) for start in range(0, len(tensor), size)]
