"""The update of GSO over sharded parameters, with one all-reduce where every bin's limits need that bin alone.

Most tensors have bins that each lie whole on a rank (rows, under FSDP2). Every rank updates what it holds of them in
place, before anything is sent.

A tensor with a bin across several ranks is small: under FSDP2 a bias, or the scale of a norm. Sums of squares are not
enough for it, since the length of an update follows from the bounded gradient; a second message would be needed. So
one message gathers its weights, gradient and moments, and tells every rank what was decided for the bins of the
others. Every rank then makes the same update of the whole tensor and keeps its own piece.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...amp import Scaling
from ...budget import Decision
from ...budget.lines import lines_of
from ...distributed.shards import shard_of
from ...plan import part_of
from ...split import Split
from .compiled import FIRST_MOMENT, GRADIENT, SECOND_MOMENT, WEIGHT

__all__ = ["Gathered", "ShardedUpdate", "can_update"]

_COPIES, _PRESENT = 3, 4
"""The last rows of a message: how many ranks hold a bin, after its norm, scale and limit; how many have a gradient of
an element, after weights, gradient and moments."""


class Gathered:
    """Where the E elements of some sharded tensors stand in a row of a message, one tensor after the other.

    Every rank writes the pieces that it holds, and zeros elsewhere. The sum over the ranks, divided by how many ranks
    wrote an element, is the whole tensor. It is exact where the number of copies is a power of two.

    Args:
        names, tensors: as the optimizer holds them.
        add: adds a tensor over the ranks in place; called once, to count copies.
        like: a tensor of the message's dtype and device.
    """

    def __init__(self, names: Sequence[str], tensors: Sequence[Any], add: Callable[[Tensor], Any], like: Tensor):
        self.shapes = [tuple(int(size) for size in tensor.shape) for tensor in tensors]
        self._shards = [shard_of(name, tensor) for name, tensor in zip(names, tensors, strict=True)]
        self._bounds = [0, *accumulate(int(tensor.numel()) for tensor in tensors)]
        self.copies_E = like.new_zeros(self._bounds[-1])
        for t, shard in enumerate(self._shards):
            self.write(self.copies_E, t, like.new_ones(shard.shape))
        add(self.copies_E)

    def __len__(self) -> int:
        return self._bounds[-1]

    def write(self, row_E: Tensor, t: int, piece: Tensor) -> None:
        """Write this rank's piece of tensor t into a row of the message."""
        self.piece(self.whole(row_E, t), t).copy_(piece)

    def whole(self, row_E: Tensor, t: int) -> Tensor:
        """Return tensor t as a row of the message holds it, sharing memory."""
        return row_E[self._bounds[t] : self._bounds[t + 1]].view(self.shapes[t])

    def piece(self, whole: Tensor, t: int) -> Tensor:
        """Return this rank's piece of the whole tensor t, sharing memory."""
        shard, shape = self._shards[t], self.shapes[t]
        if len(shape) < 2:
            return whole.reshape(-1)[shard.col_start : shard.col_stop].reshape(shard.shape)
        behind = max(1, whole[0, 0].numel()) if whole.numel() else 1
        left, right = shard.col_start // behind, shard.col_stop // behind
        return whole[shard.row_start : shard.row_stop, left:right]


GATHERED, GATHERED_PER_BIN = 1 << 16, 2
"""The most elements that may be gathered: so many, or so many per bin if that is more. Then they do not make the
message much longer."""

_Gradients = list[Tensor | None]
_States = list[dict[str, Any]]


def can_update(split: Split) -> bool:
    """Whether each limit looks at one bin, and the tensors with bins across ranks are small together."""
    budgets = [split.gradient_budgets, split.update_budgets]
    alone = all(lines_of(pairs) is not None for pairs in budgets)
    plain = split.bins_in_one_tensor and not any(owner.is_complex() for owner in split.owners)
    num_gathered = sum(split.plan.layout.numels[t] for t in _across_ranks(split))
    return alone and plain and num_gathered <= max(GATHERED, GATHERED_PER_BIN * split.plan.num_bins)


def _across_ranks(split: Split) -> list[int]:
    """The tensors with a bin across several ranks."""
    plan = split.plan
    return [int(t) for t in np.unique(plan.tensor_K[split.kernel.spread_B[plan.bin_K]])]


class ShardedUpdate:
    """One step over the shards of a `Split`, as the module describes it.

    Args:
        split: one for which `can_update` holds.
        make: returns the update of a split of plain tensors.
    """

    def __init__(self, split: Split, make: Callable[[Split], Any]) -> None:
        self.split = split
        self.decision: Decision | None = None
        across = _across_ranks(split)
        self._in_place = _InPlace(split, [t for t in range(len(split.owners)) if t not in across], make)
        self._across = _AcrossRanks(split, across, make) if across else None
        wide = torch.float64 if any(p.dtype == torch.float64 for p in split.owners) else split.gradient.numel_B.dtype
        self._like = torch.empty(0, dtype=wide, device=split.kernel.device)

    def step(
        self,
        gradients: _Gradients,
        states: _States,
        groups: list[dict[str, Any]],
        scaling: Scaling | None = None,
    ) -> None:
        """See `ReferenceUpdate.step`; every rank takes part, with whatever gradients it has."""
        if scaling is not None:
            gradients = [None if gradient is None else scaling.plain(gradient) for gradient in gradients]
        split, num_bins = self.split, self.split.plan.num_bins
        num_gathered = 0 if self._across is None else len(self._across.gathered)
        message = self._like.new_zeros(4 * num_bins + 5 * num_gathered)
        decided, rows = message[: 4 * num_bins].view(4, num_bins), message[4 * num_bins :].view(5, num_gathered)
        self._in_place.step(gradients, states, groups, decided)
        if self._across is not None:
            self._across.write(gradients, states, rows)
        split.kernel.add_(message)
        copies_B = decided[_COPIES]
        norm_B, scale_B, limit_B = (decided[:_COPIES] / copies_B.clamp(min=1.0)).to(split.gradient.numel_B.dtype)
        silent_B = copies_B == 0  # no gradient on any rank, or a bin across ranks
        scale_B, limit_B = scale_B.masked_fill(silent_B, 1.0), limit_B.masked_fill(silent_B, float("inf"))
        if self._across is not None:
            bins, decision = self._across.step(rows, gradients, states, groups)
            norm_B[bins] = torch.where(decision.finite_B, decision.norm_B, float("nan"))
            scale_B[bins], limit_B[bins] = decision.scale_B, decision.limit_B
        finite_B = norm_B.isfinite()
        norm_B = norm_B.masked_fill(~finite_B, 0.0)
        self.decision = Decision(split.plan, norm_B, finite_B, scale_B, (("bin", None, limit_B),))
        self._in_place.learn_elsewhere(self.decision, gradients, states, groups)


class _InPlace:
    """The tensors whose every bin lies whole on a rank: each rank updates what it holds of them, as one process would.

    Args:
        split: all tensors.
        at: which of them these are.
        make: see `ShardedUpdate`.
    """

    def __init__(self, split: Split, at: list[int], make: Callable[[Split], Any]) -> None:
        self.split, self.all = split, at
        pieces = split.parameters
        self.at = [t for t in at if pieces[t].numel()]
        self.pieces = [pieces[t] for t in self.at]
        self.bins = np.zeros(0, dtype=np.int64)
        if self.at:
            plan, self.bins = part_of(split.local_plan, self.at)
            self.part = split.over(self.pieces, plan, self.at)
            self.update = make(self.part)
        # Per tensor: which of its bins this rank holds.
        self.places = {t: np.flatnonzero(np.isin(split.bins_of_tensor[t], self.bins)) for t in at}

    def step(self, gradients: _Gradients, states: _States, groups: list[dict[str, Any]], decided: Tensor) -> None:
        """Update; write the norm, scale and limit of every bin that is here, and 1, into the rows of ``decided``."""
        mine = [gradients[t] for t in self.at]
        if all(gradient is None for gradient in mine):
            return
        present = np.array([gradient is not None for gradient in mine])
        pieces = self.split.parameters
        self.pieces[:] = [pieces[t] for t in self.at]
        kept = [dict(states[t]) for t in self.at]
        for t, state in zip(self.at, kept, strict=True):
            if "bin_sq" in state:
                state["bin_sq"] = state["bin_sq"][torch.from_numpy(self.places[t]).to(state["bin_sq"].device)]
        self.update.step(mine, kept, [groups[t] for t in self.at])
        for t, state in zip(self.at, kept, strict=True):
            if "bin_sq" in state:
                states[t]["bin_sq"][torch.from_numpy(self.places[t]).to(state["bin_sq"].device)] = state["bin_sq"]
        made: Decision = self.update.decision
        norm_B = torch.where(made.finite_B, made.norm_B, float("nan"))
        rows = torch.stack([norm_B, made.scale_B, made.limit_B, torch.ones_like(norm_B)]).to(decided.dtype)
        bins = torch.from_numpy(self.bins).to(decided.device)
        if not present.all():
            plan = self.part.plan
            has = np.zeros(plan.num_bins, dtype=bool)
            has[plan.bin_K] = present[plan.tensor_K]
            there = torch.from_numpy(has).to(decided.device)
            rows, bins = rows[:, there], bins[there]
        decided[:, bins] = rows

    def learn_elsewhere(
        self, decision: Decision, gradients: _Gradients, states: _States, groups: list[dict[str, Any]]
    ) -> None:
        """Enter the bins of other ranks into the second moments per bin, which every rank holds of all bins."""
        for t in self.all:
            if gradients[t] is None or "bin_sq" not in states[t]:
                continue
            v, beta2 = states[t]["bin_sq"], groups[t]["betas"][1]
            elsewhere = np.ones(len(v), dtype=bool)
            elsewhere[self.places[t]] = False
            places = torch.from_numpy(np.flatnonzero(elsewhere)).to(v.device)
            ids = torch.from_numpy(self.split.bins_of_tensor[t]).to(v.device)[places]
            mean = (decision.norm_B[ids] * decision.scale_B[ids]) ** 2 / self.split.gradient.numel_B[ids]
            fresh = beta2 * v[places] + (1 - beta2) * mean.to(v.dtype)
            v[places] = torch.where(decision.finite_B[ids], fresh, v[places])


class _AcrossRanks:
    """The tensors with a bin across several ranks: gathered, updated whole on every rank, each keeping its piece.

    Args:
        split: all tensors.
        at: which of them these are.
        make: see `ShardedUpdate`.
    """

    def __init__(self, split: Split, at: list[int], make: Callable[[Split], Any]) -> None:
        self.split, self.at = split, at
        plan, bins = part_of(split.plan, at)
        like = split.gradient.numel_B
        self.bins = torch.from_numpy(bins).to(like.device)
        owners = [split.owners[t] for t in at]
        self.gathered = Gathered(plan.layout.names, owners, split.kernel.add_, like)
        self.weights = [torch.empty(tuple(p.shape), dtype=p.dtype, device=like.device) for p in owners]
        self.update = make(split.over(self.weights, plan, at))

    def write(self, gradients: _Gradients, states: _States, rows: Tensor) -> None:
        """Write this rank's pieces into five rows: weights, gradient, both moments, and 1 where there is a gradient."""
        weights = self.split.parameters
        for i, t in enumerate(self.at):
            self.gathered.write(rows[WEIGHT], i, weights[t])
            gradient, state = gradients[t], states[t]
            if gradient is not None:
                self.gathered.write(rows[GRADIENT], i, gradient)
                self.gathered.write(rows[FIRST_MOMENT], i, state["exp_avg"])
                if "exp_avg_sq" in state:
                    self.gathered.write(rows[SECOND_MOMENT], i, state["exp_avg_sq"])
                self.gathered.piece(self.gathered.whole(rows[_PRESENT], i), i).fill_(1.0)

    def step(
        self, rows: Tensor, gradients: _Gradients, states: _States, groups: list[dict[str, Any]]
    ) -> tuple[Tensor, Decision]:
        """Update the whole tensors and keep this rank's pieces; return their bins and the decision on these."""
        # All ranks write their weights; those without a gradient write nothing else.
        wholes = rows[:_PRESENT] / rows[_PRESENT].clamp(min=1.0)
        wholes[WEIGHT] = rows[WEIGHT] / self.gathered.copies_E
        by_bin = any("bin_sq" in state for state in states)
        made: _States = []
        whole_gradients: list[Tensor | None] = []
        for i, t in enumerate(self.at):
            weight, state = self.weights[i], states[t]
            w, g, m, v = (self.gathered.whole(whole, i).to(weight.dtype) for whole in wholes)
            weight.copy_(w)
            whole_gradients.append(g)
            one: dict[str, Any] = {"step": state.get("step", torch.ones(())), "exp_avg": m}
            if by_bin:
                bins = len(self.split.bins_of_tensor[t])
                one["bin_sq"] = state["bin_sq"].clone() if state else torch.zeros(bins, device=weight.device)
            else:
                one["exp_avg_sq"] = v
            made.append(one)
        self.update.step(whole_gradients, made, [groups[t] for t in self.at])
        weights = self.split.parameters
        for i, t in enumerate(self.at):
            if gradients[t] is None:
                continue
            weights[t].copy_(self.gathered.piece(self.weights[i], i))
            for key, value in made[i].items():
                if key == "bin_sq":
                    states[t][key].copy_(value)
                elif key != "step":
                    states[t][key].copy_(self.gathered.piece(value, i))
        return self.bins, self.update.decision
