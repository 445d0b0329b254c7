"""The share step: every row moves by a share of its own length along its direction. The definition, in eager torch.

Per bin b (a row by default), with gradient g, weights w of n entries, tau the share of now:

    c    = median over all bins of ||g_b|| / s_b               s_b the largest norm that the bin has had of late
    g'_b = g_b / c where c > 5, then times min(1, limit_b / ||g'_b||)                      limit_b from the budget
    D    = the tensor's direction, from g' and its memory
    tau <- tau min(1, (14 / H)^2)          H the number of layers that stand in series of late, see `gradsplit.series`
    tau <- tau min(1, min(1, 14 / H) M / V)    of vectors, which may change the loss by no more than matrices: likewise
    w_b <- (1 - decay tau) w_b - tau max(||w_b||, least sqrt n) d_b / max(||d_b||, floor)
    w_b <- w_b min(1, max(||w_b at the start||, longest) / ||w_b||)                        rows of matrices

s_b begins as the bin's first norm. Where c > 5 it becomes 1.05 s_b, so that a jump that stays is let through within a
hundred steps. Else it becomes min(max(||g_b||, f s_b), 2 s_b) with f = min(0.98, t / (t + 2)) at step t, so that a
spike in the first steps is soon forgotten. A bin whose gradient is not finite, and one whose direction is zero, stays
as it is, and so does its memory. A bin whose gradient is exactly zero stays too where the direction's length does not
count (floor = 0), and its memory fades; Adam's direction fades by itself. A bin that is found 1 % beyond its longest
length was written from outside, as when weights are loaded, and that length counts as its first.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..amp import Scaling
from ..budget import Decision
from ..collective import Collective
from ..distributed import gathering, is_sharded
from ..functional.kinds import WRITTEN
from ..plan import pattern_of
from ..rates import Clock
from ..series import Series, in_full
from ..split import ShareRecord, Split
from .directions import DIRECTIONS, Adam, Orthogonal, Turn
from .kinds import Kind

__all__ = ["ShareUpdate"]


@dataclass(frozen=True, eq=False)
class _Stack:
    """Tensors that are alike, read and written as one array (S, rows, cols): an operation on it is one launch.

    Attributes:
        at: the places of these S tensors.
        rows, cols: of each of them, as this rank holds it.
        kind: what each of them is.
        ids: the bins of the first tensor, then those of the second, and so on.
        form: the shape in which values of these bins spread over the array.
        over: the dimensions over which squares are added before they go to their bins.
    """

    at: list[int]
    rows: int
    cols: int
    kind: Kind
    ids: Tensor
    form: tuple[int, int, int]
    over: tuple[int, ...]

    def gathered(self, tensors: Any) -> Tensor:
        """Return the tensors' values as one array: a copy, or the memory of the only one."""
        first = tensors[self.at[0]]
        made = first if len(self.at) == 1 else torch.stack([tensors[t] for t in self.at])
        return made.reshape(len(self.at), self.rows, self.cols)

    def copied(self, tensors: Any) -> Tensor:
        """Return the tensors' values as one array of its own memory."""
        made = self.gathered(tensors)
        return made.clone() if len(self.at) == 1 else made

    def parts(self, array: Tensor, like: list[Any]) -> list[Tensor]:
        """Return what belongs to each tensor, in its own shape."""
        return list(array.reshape(len(self.at), *like[self.at[0]].shape).unbind())

    def add_squares(self, total_B: Tensor, array: Tensor) -> None:
        """Add the squares of an array to its bins."""
        if not array.numel():
            return
        if self.over:
            sums = torch.linalg.vector_norm(array, dim=self.over, dtype=total_B.dtype).square_()
        else:
            sums = array.to(total_B.dtype).square()
        total_B.index_add_(0, self.ids, sums.reshape(-1))

    def add_products(self, total_B: Tensor, one: Tensor, other: Tensor) -> None:
        """Add the products of two arrays' entries to their bins."""
        products = in_full(one) * in_full(other)
        sums = products.sum(self.over, dtype=total_B.dtype) if self.over else products.to(total_B.dtype)
        total_B.index_add_(0, self.ids, sums.reshape(-1))

    def spread(self, values_B: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the bins' values in a shape that broadcasts over the array."""
        return values_B.to(dtype).index_select(0, self.ids).view(self.form)


class ShareUpdate:
    """One step of a `Split`'s tensors by shares.

    Tensors of one shape, dtype, kind and group are stacked, so that the number of launches depends on the number of
    shapes. Everything is computed beside the old values and written at the end: an error on the way, such as memory
    that has run out, leaves weights and memories as they were. The price is room for new weights and new memories
    beside the old ones. Nothing waits for the device.

    Args:
        split: rows or other bins, each inside one tensor.
        kinds: what each tensor is.
        collective: shared by all parts of the optimizer.
        clock: likewise.
        series: likewise.

    Attributes:
        measures: whether the next step measures by how much it turns the rows.
        decision, collected, moved_B, grown_B, cosine_B, balance: of the last step, see `ShareRecord`.
    """

    def __init__(self, split: Split, kinds: list[Kind], collective: Collective, clock: Clock, series: Series) -> None:
        self.split, self.kinds, self.collective, self.clock, self.series = split, kinds, collective, clock, series
        self.measures, self.directions = False, DIRECTIONS
        self.decision: Decision | None = None
        self.collected: Tensor | None = None
        self.moved_B: Tensor | None = None
        self.grown_B: Tensor | None = None
        self.cosine_B: Tensor | None = None
        self.balance: Tensor | None = None
        plan, like = split.plan, split.like
        numel_B = torch.as_tensor(plan.numel_B, dtype=like.dtype, device=like.device)
        share_B, least_B, longest_B, keeps_B = (torch.empty_like(like) for _ in range(4))
        self._tensor_B = torch.zeros(plan.num_bins, dtype=torch.int64, device=like.device)
        for t, kind in enumerate(kinds):
            ids = torch.from_numpy(split.bins_of_tensor[t]).to(like.device)
            self._tensor_B[ids] = t
            share_B[ids], least_B[ids], longest_B[ids] = kind.share, kind.least, kind.longest
            keeps_B[ids] = float(DIRECTIONS[kind.direction].keeps_length)
        root_B = numel_B.sqrt()
        self._share_B, self._least_B, self._longest_B = share_B, least_B * root_B, longest_B
        self._is_vector_T = torch.tensor([kind.name == "vector" for kind in kinds], device=like.device)
        self._vector_T = self._is_vector_T.to(series.of_late)
        self._fades_B = keeps_B > 0
        self._floor_B = torch.where(self._fades_B, root_B, 1e-30)
        # Written in place, so that a captured step finds them again; tensors, since a traced one reads no number anew.
        self.recent_B, self.most_B = torch.zeros_like(like), torch.zeros_like(like)
        self.seen_steps = like.new_zeros(())
        self._has_limits = any(math.isfinite(kind.longest) for kind in kinds)
        self._looks_above = any(level != "bin" for level, _ in split.gradient_budgets)
        self._patterns = [pattern_of(split.local_plan, t) for t in range(len(kinds))]
        self._ids_T = [torch.from_numpy(bins.reshape(-1)).to(like.device) for _, bins in self._patterns]
        self._alike_T = self._alike()
        self._stacked: tuple[Any, list[_Stack]] = (None, [])
        # What these return is checked, and no row moves to where it is not finite.
        known = (Adam, Orthogonal)
        self._outside = {kind.direction for kind in kinds if type(DIRECTIONS[kind.direction]) not in known}
        self._told: set[int] = set()  # tensors whose directions were once not finite

    def record(self, step: int) -> ShareRecord | None:
        """Return the record of the last step, numbered ``step``; None before the first."""
        decision, none_B = self.decision, torch.zeros_like(self.split.like, dtype=torch.bool)
        if decision is None or self.collected is None or self.moved_B is None:
            return None
        squares_B = torch.where(decision.finite_B, decision.norm_B.square(), torch.nan)
        grown_B = none_B if self.grown_B is None else self.grown_B
        of_step = self.collected, self.moved_B, grown_B, self.cosine_B, self.series.of_late, self.balance
        return ShareRecord(step, squares_B, decision, *of_step)

    def state(self) -> dict[str, Tensor]:
        """Return the recent norms and the longest lengths, (B,) each, the numbers of steps and of layers in series."""
        kept = {"recent": self.recent_B, "most": self.most_B, "steps": self.seen_steps, "series": self.series.of_late}
        return {key: value.clone() for key, value in kept.items()}

    def load(self, state: Mapping[str, Any], *, call: str) -> None:
        """Take over what `state` returned.

        Raises:
            ValueError: vectors of another number of bins, or values that no run leaves; nothing is taken over then.
        """
        state = {"series": 0.0, **state}  # a state of before has no such number, which begins at 0
        for key, old in self.state().items():
            value = torch.as_tensor(state.get(key, ()))
            if value.shape != old.shape or bool((value.isnan() | (value < 0)).any()):
                raise ValueError(
                    f"{call}: expected {old.numel()} numbers >= 0 at {key!r}, got shape {tuple(value.shape)}. "
                    "The state is damaged, or of another plan: load another."
                )
        self.recent_B, self.most_B, self.seen_steps, self.series.of_late = (
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
        weights, split, ledger = self.split.parameters, self.split, self.split.gradient
        gradients = [None if g is None else g.reshape(w.shape) for g, w in zip(gradients, weights, strict=True)]
        history, collected = ledger.history, self.collected
        stacks = self._stacks_of(gradients, weights, groups)
        try:
            given = [stack.gathered(gradients) for stack in stacks]
            squares_B, weight_squares_B, euler_B = self._measured(stacks, given, gradients)
            decision, length_B, recent_B, seen_steps = self._bound(squares_B, weight_squares_B, scaling)
            assert split.rates is not None
            lr_B, decay_B = (split.rates.value_B(name, split.plan.num_bins) for name in ("lr", "weight_decay"))
            factor_T = self._factor_T(torch.where(decision.finite_B, euler_B, 0.0), decision.norm_B, length_B, lr_B)
            directions, memories = self._directions_of(stacks, given, states, groups, decision, scaling)
            ahead_B = self._squares(stacks, directions).sqrt()
            cosine_B = self._cosine_B(stacks, given, directions, groups, decision, ahead_B) if self.measures else None
            lost_B = decision.finite_B & ~ahead_B.isfinite()
            if self._outside:
                self._pass_over(stacks, directions, memories, states, lost_B)
                ahead_B = torch.where(lost_B, 0.0, ahead_B)
            moves_B = decision.finite_B & (ahead_B > 0) & (self._fades_B | (decision.norm_B > 0))
            first_B = moves_B & ((self.most_B == 0) | (length_B > WRITTEN * self.most_B))
            most_B = torch.where(first_B, torch.maximum(length_B, self._longest_B), self.most_B)
            tau_B = lr_B * self._share_B * (self.clock.pace() * factor_T).index_select(0, self._tensor_B)
            length = torch.maximum(length_B, self._least_B)
            step_B = torch.where(moves_B, tau_B * length / torch.maximum(ahead_B, self._floor_B), 0.0)
            fresh = self._moved(stacks, directions, 1 - torch.where(moves_B, decay_B * tau_B, 0.0), -step_B)
            grown_B = self._shorten(stacks, fresh, moves_B, most_B)
            written = [w.to(weights[s.at[0]].dtype) for s, w in zip(stacks, fresh, strict=True)]
            for stack, array in zip(stacks, written, strict=True):
                torch._foreach_copy_([weights[t] for t in stack.at], stack.parts(array, weights))
        except BaseException:
            ledger.history, self.collected = history, collected
            raise
        for stack, memory in zip(stacks, memories, strict=True):
            for key, array in memory.items():
                held = [states[t][key] for t in stack.at]
                torch._foreach_copy_(held, list(array.view(len(held), *held[0].shape).unbind()))
        self.most_B.copy_(most_B)
        self._remember(recent_B, seen_steps, history, groups)
        self.decision, self.moved_B, self.grown_B, self.cosine_B = decision, moves_B, grown_B, cosine_B
        if self._outside:
            self._tell(lost_B)

    def _remember(self, recent_B: Tensor, seen_steps: Tensor, history: Any, groups: list[dict[str, Any]]) -> None:
        """Write what is remembered of the norms where a captured graph finds it at its next replay."""
        self.recent_B.copy_(recent_B)
        self.seen_steps.copy_(seen_steps)
        if any(group["capturable"] for group in groups):
            self.split.gradient.history = _written(history, self.split.gradient.history)

    def _alike(self) -> list[int]:
        """A number per tensor, the same for tensors that may be stacked; each shard is alone, since it is gathered."""
        split, shapes = self.split, self.split.local_plan.layout.shapes
        known: dict[Any, int] = {}
        keys = []
        for t, kind in enumerate(self.kinds):
            alone = t if is_sharded(split.tensors[t]) else -1
            keys.append((shapes[t], tuple(split.owners[t].shape), kind, self._patterns[t].kind, alone))
        return [known.setdefault(key, len(known)) for key in keys]

    def _stacks_of(
        self, gradients: list[Tensor | None], weights: list[Tensor], groups: list[dict[str, Any]]
    ) -> list[_Stack]:
        """Stack the tensors that have gradients; remembered as long as nothing changes."""
        forms = zip(self._alike_T, gradients, weights, groups, strict=True)
        keys = [None if g is None else (form, g.dtype, w.dtype, id(group)) for form, g, w, group in forms]
        if keys == self._stacked[0] and not torch.compiler.is_compiling():
            return self._stacked[1]
        alike: dict[Any, list[int]] = {}
        for t, key in enumerate(keys):
            if key is not None and (weights[t].numel() or is_sharded(self.split.tensors[t])):
                alike.setdefault(key, []).append(t)
        stacks = [self._stack(at) for at in alike.values()]
        if not torch.compiler.is_compiling():
            self._stacked = (keys, stacks)
        return stacks

    def _stack(self, at: list[int]) -> _Stack:
        shape, (cut, _) = self.split.local_plan.layout.shapes[at[0]], self._patterns[at[0]]
        rows, cols = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))
        by_row, by_col = cut in ("rows", "cells", "none"), cut in ("cols", "cells", "none")
        over = (*(() if by_row else (1,)), *(() if by_col else (2,)))
        form = (len(at), rows if by_row else 1, cols if by_col else 1)
        ids = self._ids_T[at[0]] if len(at) == 1 else torch.cat([self._ids_T[t] for t in at])
        return _Stack(at, rows, cols, self.kinds[at[0]], ids, form, over)

    def _measured(
        self, stacks: list[_Stack], given: list[Tensor], gradients: list[Tensor | None]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Squares of gradients and weights, and their products, (B,) each; one message where ranks hold shards."""
        split, weights = self.split, self.split.parameters
        gradient_B, weight_B, euler_B = (torch.zeros_like(split.like) for _ in range(3))
        for stack, gradient in zip(stacks, given, strict=True):
            weight = stack.gathered(weights)
            if stack.kind.name != "vector":
                stack.add_products(euler_B, gradient, weight)
            if not split.is_sharded:
                stack.add_squares(gradient_B, gradient)
                stack.add_squares(weight_B, weight)
        if split.is_sharded:
            kernel: Any = split.kernel
            return tuple(kernel.squares_many([gradients, [*weights]], euler_B))
        for t, g in enumerate(gradients if self._looks_above else ()):
            if g is None:
                rests = self._stack([t])
                rests.add_squares(weight_B, rests.gathered(weights))
        return gradient_B, weight_B, euler_B

    def _factor_T(self, euler_B: Tensor, norm_B: Tensor, length_B: Tensor, lr_B: Tensor) -> Tensor:
        """Return what each tensor's share is multiplied by, (T,), from (B,) products, norms, lengths and shares."""
        change_B = norm_B * lr_B * self._share_B * torch.maximum(length_B, self._least_B)
        sums = euler_B.new_zeros(2, len(self.kinds)).index_add_(1, self._tensor_B, torch.stack([euler_B, change_B]))
        shortened = self.series.look(torch.where(self._is_vector_T, 0.0, sums[0]))  # vectors are no layers
        self.balance = self.series.balance(sums[1], self._vector_T)
        return torch.where(self._is_vector_T, self.balance * shortened, shortened)

    def _bound(
        self, squares_B: Tensor, weight_squares_B: Tensor, scaling: Scaling | None
    ) -> tuple[Decision, Tensor, Tensor, Tensor]:
        """Return the decision, lengths of weights (B,), and what is remembered: recent norms (B,), number of steps."""
        split = self.split
        if scaling is not None:
            squares_B = scaling.unscaled_squares(squares_B)
            squares_B = torch.where(scaling.overflow(squares_B), torch.inf, squares_B)
        norm_B, finite_B = squares_B.sqrt(), squares_B.isfinite()
        seen_B = finite_B & (norm_B > 0)
        factor, recent_B = self.collective.look(norm_B, seen_B, self.recent_B, self.seen_steps)
        seen_steps = self.seen_steps + seen_B.any()  # an overflow, and gradients of zeros, teach nothing
        decision = split.gradient.decide((norm_B * factor).square(), weight_squares_B)
        length_B = torch.where(weight_squares_B.isfinite(), weight_squares_B, 0.0).sqrt()
        norm_B, scale_B = torch.where(finite_B, norm_B, 0.0), decision.scale_B * factor
        self.collected = factor
        return Decision(split.plan, norm_B, finite_B, scale_B, decision.limits), length_B, recent_B, seen_steps

    def _directions_of(
        self,
        stacks: list[_Stack],
        given: list[Any],
        states: list[dict[str, Any]],
        groups: list[dict[str, Any]],
        decision: Decision,
        scaling: Scaling | None,
    ) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        """Return the direction of each stack, and copies of its memories that have taken the gradients in.

        Stack by stack, so that little is in memory at once. Directions from outside, and matrices that are gathered
        one by one and have equal shapes, come together.
        """
        made: list[Any] = [None] * len(stacks)
        together: dict[str, list[tuple[int, Turn]]] = {}
        memories, rests_B, weights = [], ~decision.finite_B, self.split.parameters
        for i, (stack, count) in enumerate(zip(stacks, self._counts(stacks, states), strict=True)):
            group, kind, dtype = groups[stack.at[0]], stack.kind, weights[stack.at[0]].dtype
            array = given[i].to(torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype)
            if not self.measures:
                given[i] = None
            array = array if scaling is None else scaling.unscaled(array)
            scale = stack.spread(decision.scale_B, array.dtype)
            array = array * (-scale if group["maximize"] else scale)
            array.masked_fill_(stack.spread(rests_B, torch.bool), 0)
            memory = {
                key: stack.copied({t: states[t][key] for t in stack.at}) for key in states[stack.at[0]] if key != "step"
            }
            memories.append(memory)
            turn = Turn(
                array,
                {**memory, "step": count},
                stack.spread(decision.finite_B, array.dtype),
                group,
                kind.blocks,
                kind.boxes,
                kind.is_complex,
                *_gathering(self.split, stack.at[0], kind),
            )
            if self.split.is_sharded or kind.direction in self._outside:
                together.setdefault(kind.direction, []).append((i, turn))
            else:
                (made[i],) = self.directions[kind.direction].turn([turn])
        for name, pairs in together.items():
            for (i, _), direction in zip(pairs, self._turned(name, [turn for _, turn in pairs], stacks), strict=True):
                made[i] = direction
        return made, memories

    def _turned(self, name: str, turns: list[Turn], stacks: list[_Stack]) -> list[Tensor]:
        """Return what a direction returns, one per turn.

        Raises:
            ValueError: one from outside has not returned one direction per turn, or one of another shape; names the
                first tensor of the turn.
        """
        made: Any = self.directions[name].turn(turns)
        if name not in self._outside:
            return made
        names = [self.split.plan.layout.names[stack.at[0]] for stack in stacks if stack.kind.direction == name]
        if not isinstance(made, (list, tuple)) or len(made) != len(turns):
            got = f"{len(made)}" if isinstance(made, (list, tuple)) else type(made).__name__
            raise ValueError(
                f"GSO(direction={name!r}): expected one direction per turn, {len(turns)} of them from {names[0]!r} on, "
                f"got {got}. Let turn() return a list; nothing has moved."
            )
        for first, d, turn in zip(names, made, turns, strict=True):
            if not isinstance(d, Tensor) or d.shape != turn.gradient.shape:
                got = f"shape {tuple(d.shape)}" if isinstance(d, Tensor) else type(d).__name__
                raise ValueError(
                    f"GSO(direction={name!r}): expected a direction of shape {tuple(turn.gradient.shape)} for "
                    f"{first!r}, got {got}. Return it like turn.gradient; nothing has moved."
                )
        return [d.to(turn.gradient) for d, turn in zip(made, turns, strict=True)]

    def _pass_over(
        self,
        stacks: list[_Stack],
        directions: list[Tensor],
        memories: list[dict[str, Tensor]],
        states: list[dict[str, Any]],
        lost_B: Tensor,
    ) -> None:
        """Let rows whose direction is not finite stay, and their memories; only directions from outside make such."""
        for i, stack in enumerate(stacks):
            if stack.kind.direction in self._outside:
                lost = stack.spread(lost_B, torch.bool)
                directions[i] = torch.where(lost, 0.0, directions[i])
                for key, fresh in memories[i].items():
                    old = stack.gathered({t: states[t][key] for t in stack.at})
                    memories[i][key] = torch.where(lost, old, fresh)

    def _tell(self, lost_B: Tensor) -> None:
        """Name rows whose direction was not finite; on the CPU, since elsewhere a look would wait for the device.

        Warns:
            UserWarning: such a row, once per tensor.
        """
        if lost_B.device.type != "cpu" or torch.compiler.is_compiling():
            return
        plan, where = self.split.plan, lost_B.nonzero()[:, 0].tolist()
        new = [b for b in where if int(plan.tensor_B[b]) not in self._told]
        if new:
            self._told |= {int(plan.tensor_B[b]) for b in new}
            name = self.kinds[int(plan.tensor_B[new[0]])].direction
            warnings.warn(
                f"GSO(direction={name!r}): expected finite directions, got inf or nan for {plan.bins[new[0]].name!r} "
                f"and {len(where) - 1} more rows in step {int(self.clock.made)}. They stay as they are, and so do "
                "their memories. Mend the direction.",
                UserWarning,
                stacklevel=6,
            )

    def _cosine_B(
        self,
        stacks: list[_Stack],
        given: list[Tensor],
        directions: list[Tensor],
        groups: list[dict[str, Any]],
        decision: Decision,
        ahead_B: Tensor,
    ) -> Tensor:
        """Cosines of the angles between gradients and directions, (B,); nan where one of them is zero or not finite.

        For two vectors of length one, cos = 1 - ||a - b||^2 / 2; squares are what a kernel can add over ranks.
        """
        valid_B = decision.finite_B & (decision.norm_B > 0) & ahead_B.isfinite() & (ahead_B > 0)
        per_g_B, per_d_B = (torch.where(valid_B, 1 / length_B, 0.0) for length_B in (decision.norm_B, ahead_B))
        apart = []
        for stack, g, d in zip(stacks, given, directions, strict=True):
            per_g = stack.spread(per_g_B, d.dtype)
            between = g.to(d.dtype) * (-per_g if groups[stack.at[0]]["maximize"] else per_g)
            between.addcmul_(d, stack.spread(per_d_B, d.dtype), value=-1)
            apart.append(between.masked_fill_(~stack.spread(valid_B, torch.bool), 0))
        return torch.where(valid_B, 1 - self._squares(stacks, apart) / 2, torch.nan)

    def _counts(self, stacks: list[_Stack], states: list[dict[str, Any]]) -> list[Tensor]:
        """The number of steps of each tensor, (S, 1, 1) per stack; at least 1, also where the first was an overflow."""
        counts, like = [states[t]["step"] for stack in stacks for t in stack.at], self.split.like
        if not counts:
            return []
        if len({count.device for count in counts}) > 1:
            counts = [count.to(like.device) for count in counts]
        # In float32, 1 - 0.99 would lose digits.
        count_T = torch.stack(counts).to(like.device, like.dtype, non_blocking=True).clamp_(min=1)
        return [part.view(-1, 1, 1) for part in count_T.split([len(stack.at) for stack in stacks])]

    def _moved(self, stacks: list[_Stack], directions: list[Tensor], keep_B: Tensor, step_B: Tensor) -> list[Tensor]:
        """Return new weights: old ones times what is kept, plus the direction times the step."""
        fresh, weights = [], self.split.parameters
        directions.reverse()  # each is let go of as soon as it has served
        for stack in stacks:
            direction = directions.pop()
            moved = stack.gathered(weights).to(direction.dtype) * stack.spread(keep_B, direction.dtype)
            fresh.append(moved.addcmul_(direction, stack.spread(step_B, direction.dtype)))
        return fresh

    def _shorten(self, stacks: list[_Stack], fresh: list[Tensor], moves_B: Tensor, most_B: Tensor) -> Tensor | None:
        """Draw back rows that have grown beyond their longest length, in place; return which these are, (B,)."""
        limited = [i for i, stack in enumerate(stacks) if math.isfinite(stack.kind.longest)]
        if not self._has_limits:
            return None
        length_B = self._squares([stacks[i] for i in limited], [fresh[i] for i in limited]).sqrt()
        grown_B = moves_B & (length_B > most_B)
        shrink_B = torch.where(grown_B, most_B / length_B, 1.0)
        for i in limited:
            fresh[i].mul_(stacks[i].spread(shrink_B, fresh[i].dtype))
        return grown_B

    def _squares(self, stacks: list[_Stack], arrays: Iterable[Tensor]) -> Tensor:
        """Squares of what was made here, (B,); of whole bins where a bin lies on several ranks."""
        kernel, weights = self.split.kernel, self.split.parameters
        if self.split.is_sharded:
            made: list[Tensor | None] = [None] * len(weights)
            for stack, array in zip(stacks, arrays, strict=True):
                for t, part in zip(stack.at, stack.parts(array, weights), strict=True):
                    made[t] = part
            return kernel.squares_here(made) if kernel.bins_are_local else kernel.squares(made)
        total_B = torch.zeros_like(self.split.like)
        for stack, array in zip(stacks, arrays, strict=True):
            stack.add_squares(total_B, array)
        return total_B


def _written(old: Any, new: Any) -> Any:
    """Nested tuples of tensors with their new values, in the memory of the old ones."""
    return old.copy_(new) if isinstance(old, Tensor) else tuple(map(_written, old, new))


def _gathering(split: Split, t: int, kind: Kind) -> tuple[Any, Any]:
    """How a shard becomes the whole matrix and back; two None where every rank holds the whole."""
    owner, layout = split.owners[t], split.plan.layout
    if not is_sharded(owner) or not owner.numel() or split.kernel.is_whole_T[t]:
        return None, None
    return gathering(layout.names[t], owner, layout.shapes[t], kind.rows)
