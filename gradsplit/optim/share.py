"""The share step: every row moves by a share of its own length along its direction. The definition, in eager torch.

Per bin b (a row by default), with gradient g, weights w of n entries, tau the share of now:

    c    = median over all bins of ||g_b|| / s_b               s_b the largest norm that the bin has had of late
    g'_b = g_b / c where c > 5, then times min(1, limit_b / ||g'_b||)                      limit_b from the budget
    D    = the tensor's direction, from g' and its memory
    w_b <- (1 - decay tau) w_b - tau max(||w_b||, least sqrt n) d_b / max(||d_b||, floor)
    w_b <- w_b min(1, max(||w_b at the start||, longest) / ||w_b||)                        rows of matrices

s_b begins as the bin's first norm. Where c > 5 it becomes 1.05 s_b, so that a jump that stays is let through within a
hundred steps. Else it becomes min(max(||g_b||, f s_b), 2 s_b) with f = min(0.98, t / (t + 2)) at step t, so that a
spike in the first steps is soon forgotten. A bin whose gradient is not finite, and one whose direction is zero, stays
as it is, and so does its memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..amp import Scaling
from ..budget import Decision
from ..collective import Collective
from ..distributed import is_sharded, shard_of
from ..kernels.eager import EagerKernel
from ..split import Split
from .directions import DIRECTIONS, Turn
from .kinds import Kind

__all__ = ["ShareUpdate"]


class ShareUpdate:
    """One step of a `Split`'s tensors by shares.

    Args:
        split: rows or other bins, each inside one tensor.
        kinds: what each tensor is.
        names: of the tensors, for errors.
        collective: shared by all parts of the optimizer.
    """

    def __init__(self, split: Split, kinds: list[Kind], collective: Collective) -> None:
        self.split, self.kinds, self.collective = split, kinds, collective
        self.run_length: int | None = None  # of the built-in schedule, in steps
        self.decision: Decision | None = None
        self.grown_B: Tensor | None = None
        self.collected: Tensor | None = None
        kernel, plan = split.kernel, split.plan
        self.shapes = kernel if isinstance(kernel, EagerKernel) else EagerKernel(split.local_plan, kernel.device)
        like = split.like
        numel_B = torch.as_tensor(plan.numel_B, dtype=like.dtype, device=like.device)
        share_B, least_B, longest_B, keeps_B = (torch.empty_like(like) for _ in range(4))
        for t, kind in enumerate(kinds):
            ids = torch.from_numpy(split.bins_of_tensor[t]).to(like.device)
            share_B[ids], least_B[ids], longest_B[ids] = kind.share, kind.least, kind.longest
            keeps_B[ids] = float(DIRECTIONS[kind.direction].keeps_length)
        root_B = numel_B.sqrt()
        self._share_B, self._least_B, self._longest_B = share_B, least_B * root_B, longest_B
        self._floor_B = torch.where(keeps_B > 0, root_B, 1e-30)
        self.recent_B, self.most_B = torch.zeros_like(like), torch.zeros_like(like)
        # A tensor, since a traced step knows a number only as it was when it was traced.
        self.seen_steps, self.taken = like.new_zeros(()), like.new_zeros(())
        self._has_limits = any(math.isfinite(kind.longest) for kind in kinds)
        self._directions: dict[str, list[int]] = {}
        for t, kind in enumerate(kinds):
            self._directions.setdefault(kind.direction, []).append(t)

    @property
    def pace(self) -> float | Tensor:
        """The share of this step as a fraction of what ``lr`` says."""
        return 1.0 if self.run_length is None else (1 - self.taken / self.run_length).clamp(min=0)

    def state(self) -> dict[str, Tensor]:
        """Return the recent norms and the longest lengths, (B,) each, and the number of steps."""
        return {"recent": self.recent_B, "most": self.most_B, "steps": self.seen_steps}

    def load(self, state: Mapping[str, Any], *, call: str) -> None:
        """Take over what `state` returned.

        Raises:
            ValueError: vectors of another number of bins, or values that no run leaves; nothing is taken over then.
        """
        for key, old in self.state().items():
            value = torch.as_tensor(state.get(key, ()))
            if value.shape != old.shape or bool((value.isnan() | (value < 0)).any()):
                raise ValueError(
                    f"{call}: expected {old.numel()} numbers >= 0 at {key!r}, got shape {tuple(value.shape)}. "
                    "The state is damaged, or of another plan: load another."
                )
        self.recent_B, self.most_B, self.seen_steps = (
            torch.as_tensor(state[key]).to(old.device, old.dtype, copy=True) for key, old in self.state().items()
        )

    def step(
        self,
        gradients: list[Tensor | None],
        states: list[dict[str, Any]],
        groups: list[dict[str, Any]],
        scaling: Scaling | None = None,
    ) -> None:
        """Update the tensors in place.

        Args:
            gradients: one per tensor, as this rank holds them; None: the tensor stays.
            states: the directions' memories, and ``step``.
            groups: the optimizer's group of each tensor.
            scaling: what a GradScaler says of the gradients; on an overflow everything stays.
        """
        weights, split = self.split.parameters, self.split
        gradients = [
            None if g is None else (-g if group["maximize"] else g).reshape(w.shape)
            for g, group, w in zip(gradients, groups, weights, strict=True)
        ]
        decision, length_B = self._bound(gradients, scaling)
        moves_B = decision.finite_B
        directions = self._directions_of(gradients, states, groups, decision.scale_B, moves_B, scaling)
        ahead_B = self._squares(directions).sqrt()
        moves_B = moves_B & (ahead_B > 0)
        first_B = moves_B & (self.most_B == 0)
        self.most_B = torch.where(first_B, torch.maximum(length_B, self._longest_B), self.most_B)
        rates, num_bins = split.rates, split.plan.num_bins
        assert rates is not None
        tau_B = rates.value_B("lr", num_bins) * self._share_B * self.pace
        decay_B = torch.where(moves_B, rates.value_B("weight_decay", num_bins) * tau_B, 0.0)
        length = torch.maximum(length_B, self._least_B)
        step_B = torch.where(moves_B, tau_B * length / torch.maximum(ahead_B, self._floor_B), 0.0)
        for t, (w, d) in enumerate(zip(weights, directions, strict=True)):
            if d is not None:
                w.mul_(self._factor(t, 1 - decay_B, w)).sub_(d * self._factor(t, step_B, w))
        self._shorten([None if d is None else w for w, d in zip(weights, directions, strict=True)], moves_B)

    def _bound(self, gradients: list[Tensor | None], scaling: Scaling | None) -> tuple[Decision, Tensor]:
        """Decide on the gradients; return the decision and the lengths of the weights (B,)."""
        split = self.split
        squares_B, weight_squares_B = split.kernel.squares_many([gradients, [*split.parameters]])
        if scaling is not None:
            squares_B = scaling.unscaled_squares(squares_B)
            squares_B = torch.where(scaling.overflow(squares_B), torch.inf, squares_B)
        norm_B, finite_B = squares_B.sqrt(), squares_B.isfinite()
        seen_B = finite_B & (norm_B > 0)
        factor, self.recent_B = self.collective.look(norm_B, seen_B, self.recent_B, self.seen_steps)
        self.seen_steps = self.seen_steps + seen_B.any()  # an overflow, and gradients of zeros, teach nothing
        self.collected = factor
        decision = split.gradient.decide((norm_B * factor).square(), weight_squares_B)
        length_B = torch.where(weight_squares_B.isfinite(), weight_squares_B, 0.0).sqrt()
        norm_B, scale_B = torch.where(finite_B, norm_B, 0.0), decision.scale_B * factor
        self.decision = Decision(split.plan, norm_B, finite_B, scale_B, decision.limits)
        return self.decision, length_B

    def _directions_of(
        self,
        gradients: list[Tensor | None],
        states: list[dict[str, Any]],
        groups: list[dict[str, Any]],
        scale_B: Tensor,
        learns_B: Tensor,
        scaling: Scaling | None,
    ) -> list[Tensor | None]:
        """Return the direction of each tensor in its own shape; the memories have taken the gradients in."""
        made: list[Tensor | None] = [None] * len(gradients)
        # On the CPU looking costs nothing; elsewhere it would wait for the device.
        all_learn = scale_B.device.type == "cpu" and not torch.compiler.is_compiling() and bool(learns_B.all())
        for name, at in self._directions.items():
            turns, places = [], []
            for t in at:
                gradient, kind = gradients[t], self.kinds[t]
                if gradient is None or not gradient.numel():
                    continue
                wide = torch.float32 if gradient.dtype in (torch.float16, torch.bfloat16) else gradient.dtype
                plain = gradient.to(wide) if scaling is None else scaling.unscaled(gradient.to(wide))
                bounded = torch.where(self._factor(t, learns_B, plain), plain * self._factor(t, scale_B, plain), 0.0)
                rows = bounded.shape[0] if bounded.dim() > 1 else 1
                learns = None if all_learn else self._mask(t, learns_B, bounded, rows)
                whole, piece = _gathering(self.split, t, kind)
                memory = {key: value.view(rows, -1) if key != "step" else value for key, value in states[t].items()}
                turns.append(
                    Turn(
                        bounded.reshape(rows, -1),
                        memory,
                        learns,
                        groups[t],
                        kind.blocks,
                        kind.boxes,
                        kind.is_complex,
                        whole,
                        piece,
                    )
                )
                places.append(t)
            for t, d in zip(places, DIRECTIONS[name].turn(turns), strict=True):
                made[t] = d.view(self.split.parameters[t].shape)
        return made

    def _shorten(self, weights: list[Tensor | None], moves_B: Tensor) -> None:
        """Draw back rows that have grown beyond their longest length."""
        if not self._has_limits:
            return
        length_B = self._squares(weights).sqrt()
        self.grown_B = moves_B & (length_B > self.most_B)
        shrink_B = torch.where(self.grown_B, self.most_B / length_B, 1.0)
        for t, w in enumerate(weights):
            if w is not None and math.isfinite(self.kinds[t].longest):
                w.mul_(self._factor(t, shrink_B, w))

    def _squares(self, tensors: list[Tensor | None]) -> Tensor:
        """Squares of what was made here, (B,); of whole bins where a bin lies on several ranks."""
        kernel = self.split.kernel
        return kernel.squares_here(tensors) if kernel.bins_are_local else kernel.squares(tensors)

    def _factor(self, t: int, values_B: Tensor, like: Tensor) -> Tensor:
        return self.shapes.factor(t, values_B, like.dtype)

    def _mask(self, t: int, learns_B: Tensor, like: Tensor, rows: int) -> Tensor:
        """(rows, 1) or (rows, cols): 1 where the memory learns."""
        mask = self._factor(t, learns_B, like).to(like.dtype)
        if mask.numel() in (1, rows):
            return mask.reshape(-1, 1)
        return mask.expand(like.shape).reshape(rows, -1)


def _gathering(split: Split, t: int, kind: Kind) -> tuple[Any, Any]:
    """How a shard becomes the whole matrix and back; two None where the tensor is whole."""
    owner: Any = split.tensors[t]
    if not is_sharded(owner):
        return None, None
    from torch.distributed.tensor import DTensor

    shard = shard_of(split.plan.layout.names[t], owner)
    shape, rows = owner.shape, owner.shape[0] if owner.dim() > 1 else 1

    def whole(local: Tensor) -> Tensor:
        made = DTensor.from_local(
            local.view(shard.shape),
            owner.device_mesh,
            owner.placements,
            run_check=False,
            shape=shape,
            stride=owner.stride(),
        )
        return made.full_tensor().reshape(kind.rows, -1)

    def piece(matrix: Tensor) -> Tensor:
        return matrix.reshape(rows, -1)[shard.row_start : shard.row_stop, shard.col_start : shard.col_stop].contiguous()

    return whole, piece
