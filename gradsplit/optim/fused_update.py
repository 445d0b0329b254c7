"""The fused update of GSO on the CPU: the reference's formulas in compiled loops, in one pass over memory where it can.

Where every budget of a bin needs that bin alone, a bin is measured, bounded, entered into its moments and applied while
its rows are in cache: 7 arrays cross the memory bus for "element" (weights, both moments read and written, the gradient
read), 5 for "bin". Otherwise norms come first, then the update; a bound on the update over several bins takes a third
pass.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..amp import Scaling
from ..budget import Decision
from ..kernels import squares_of
from ..kernels.addresses import KINDS
from ..kernels.numba_loops import fold
from ..kernels.threads import Call, run, threads_for
from ..kernels.walkable import bump_versions, obstacle, overlap, warn_of_fallback
from ..plan.lowering import Lowered, lower, walks
from . import update_loops as loops
from .local_limits import Line, lines_of
from .planned import Planned
from .reference_update import ReferenceUpdate

__all__ = ["FusedUpdate"]

LONGEST = 1 << 18
"""Elements of the largest bin that one thread updates alone, from cache."""

Table = tuple[Any, Lowered]


class FusedUpdate:
    """One step in compiled loops; where that cannot be, by the reference, with one warning."""

    def __init__(self, planned: Planned) -> None:
        self.planned = planned
        plan = planned.plan
        self._gradient_lines = lines_of(planned.gradient_budgets, plan.numel_B)
        self._update_lines = lines_of(planned.update_budgets, plan.numel_B)
        self._tables: list[tuple[Any, list[Table], bool]] = []
        self._warned = False
        self._measured: tuple[Tensor, Tensor] | None = None
        self._decision: Decision | None = None
        # Where a bin's second moment stands among its tensor's; bins over several tensors have none.
        self._tensor_B = np.zeros(plan.num_bins, dtype=np.int64)
        self._tensor_B[plan.bin_K] = plan.tensor_K
        self._places_B = np.zeros(plan.num_bins, dtype=np.int64)
        for ids in planned.bins_of_tensor:
            self._places_B[ids] = np.arange(len(ids))

    @cached_property
    def reference(self) -> ReferenceUpdate:
        """The definition, for tensors that cannot be walked in memory."""
        return ReferenceUpdate(self.planned)

    @property
    def decision(self) -> Decision | None:
        """The decision on the gradient of the last step; after one pass over memory made when asked for."""
        if self._measured is not None:
            self._decision, self._measured = self.planned.gradient.decide(*self._measured), None
        return self._decision

    def step(
        self,
        gradients: list[Tensor | None],
        states: list[dict[str, Any]],
        groups: list[dict[str, Any]],
        scaling: Scaling | None = None,
    ) -> None:
        """See `ReferenceUpdate.step`. Steps that are traced, and scaled float16 gradients, are the reference's."""
        arrays = None
        half = scaling is not None and any(g is not None and g.dtype == torch.float16 for g in gradients)
        if not half and not torch.compiler.is_compiling():
            if scaling is not None:
                gradients = [None if g is None else scaling.plain(g) for g in gradients]
                scaling = None
            arrays = self._arrays(gradients, states)
        if arrays is None:
            self.reference.step(gradients, states, groups, scaling)
            self._measured, self._decision = None, self.reference.decision
            return
        tables, one_pass = self._tables_of(arrays[0])
        bases = np.array([[0 if t is None else t.data_ptr() for t in row] for row in arrays], dtype=np.int64)
        numbers = _numbers(gradients, states, groups)
        written = [t for row in (arrays[0], arrays[2], arrays[3]) for t in row if t is not None]
        num_elements = sum(table.num_elements for _, table in tables)
        threads = 1 if overlap([t for t in arrays[0] if t is not None]) else threads_for(num_elements)
        by_bin = any("bin_sq" in state for state in states)
        if one_pass:
            self._one_pass(tables, bases, numbers, by_bin, threads)
        else:
            self._passes(tables, bases, numbers, by_bin, threads, gradients)
        bump_versions(written)

    def _one_pass(
        self, tables: list[Table], bases: np.ndarray, numbers: np.ndarray, by_bin: bool, threads: int
    ) -> None:
        num_bins = self.planned.plan.num_bins
        squares, weights = np.zeros(num_bins), np.zeros(num_bins)
        assert self._gradient_lines is not None and self._update_lines is not None
        bounds = (*_lines(self._gradient_lines, num_bins), *_lines(self._update_lines, num_bins))
        pace = np.zeros(0)
        if self._update_lines:
            pace = np.ascontiguousarray(self.planned.rates.pace_B(num_bins).numpy())
        calls: list[Call] = []
        for dtype, table in tables:
            kind, rows = KINDS[dtype], (table.entries, table.chunks, bases, numbers)
            rest = (*bounds, pace, squares, weights, np.zeros(1, dtype=np.int64))
            if by_bin:
                calls.append((loops.one_pass_bin, (kind, *rows, self._places_B, *rest)))
            else:
                like = np.zeros(0, dtype=np.float64 if dtype == torch.float64 else np.float32)
                calls.append((loops.one_pass_element, (kind, like, table.longest, *rows, *rest)))
        run(calls, threads)
        self._measured, self._decision = (torch.from_numpy(squares), torch.from_numpy(weights)), None

    def _passes(
        self,
        tables: list[Table],
        bases: np.ndarray,
        numbers: np.ndarray,
        by_bin: bool,
        threads: int,
        gradients: list[Tensor | None],
    ) -> None:
        planned, num_bins = self.planned, self.planned.plan.num_bins
        reads: list[list[Tensor | None]] = [gradients]
        if planned.reads_weights:
            reads.append(list(planned.parameters))
        squares_B, *weights_B = squares_of(planned.kernel, *reads)
        weight_B = weights_B[0] if weights_B else None
        decision = planned.gradient.decide(squares_B, weight_B)
        self._measured, self._decision = None, decision
        scale, finite = decision.scale_B.numpy(), decision.finite_B.numpy()
        rate = np.zeros(num_bins)
        if by_bin:
            loops.learn_bins(
                *(self._tensor_B, self._places_B, bases, numbers),
                *(decision.norm_B.numpy(), scale, finite, planned.plan.numel_B, rate),
            )
        if planned.update is None:
            loop, more = (loops.update_bin, (rate,)) if by_bin else (loops.update_element, ())
            run([_call(loop, dtype, t, bases, numbers, scale, finite, *more) for dtype, t in tables], threads)
            return
        loop = loops.moments_bin if by_bin else loops.moments_element
        slots = [np.zeros(table.num_slots) for _, table in tables]
        run(
            [_call(loop, d, t, bases, numbers, scale, finite, s) for (d, t), s in zip(tables, slots, strict=True)],
            threads,
        )
        moved = np.zeros(num_bins)
        for (_, table), out in zip(tables, slots, strict=True):
            fold(out, num_bins, table.fold_bins)
            moved += out[:num_bins]
        moved_B = torch.from_numpy(moved * rate * rate if by_bin else moved)
        cap = planned.update.decide(moved_B, weight_B, planned.rates.pace_B(num_bins))
        times, sound = cap.scale_B.numpy() * (rate if by_bin else 1.0), cap.finite_B.numpy()
        loop = loops.write_bin if by_bin else loops.write_element
        run([_call(loop, dtype, t, bases, numbers, times, sound, finite) for dtype, t in tables], threads)

    def _arrays(
        self, gradients: list[Tensor | None], states: list[dict[str, Any]]
    ) -> tuple[list[Tensor | None], ...] | None:
        """Weights, gradients and moments in matching strides, or None where one of them cannot be walked."""
        weights: list[Tensor | None] = []
        moments: list[Tensor | None] = []
        spreads: list[Tensor | None] = []
        parameters = self.planned.parameters
        for t, gradient in enumerate(gradients):
            p = parameters[t]
            if gradient is None or p.numel() == 0:
                gradients[t] = None
                weights.append(None)
                moments.append(None)
                spreads.append(None)
                continue
            m, v = states[t]["exp_avg"], states[t].get("exp_avg_sq")
            strides = p.stride()
            reason = obstacle(p) or obstacle(gradient)
            if not reason and (p.dtype not in KINDS or gradient.dtype != p.dtype):
                reason = f"its dtype is {p.dtype}, its gradient's {gradient.dtype}"
            if not reason and (m.stride() != strides or (v is not None and v.stride() != strides)):
                reason = f"its strides {strides} are not those of its moments"
            if not reason and (m.dtype != p.dtype or (v is not None and v.dtype != p.dtype)):
                reason = f"its dtype is {p.dtype}, its moments' {m.dtype}"
            if not reason and not walks(self.planned.plan, t, strides):
                reason = f"its strides {strides} have no contiguous rows that the plan could cut"
            if reason:
                self._refuse(t, reason)
                return None
            if gradient.stride() != strides:
                gradients[t] = torch.empty_like(p).copy_(gradient)
            weights.append(p)
            moments.append(m)
            spreads.append(states[t]["bin_sq"] if v is None else v)
        return weights, gradients, moments, spreads

    def _refuse(self, t: int, reason: str) -> None:
        if not self._warned:
            self._warned = True
            name = self.planned.plan.layout.names[t]
            warn_of_fallback(
                "GSO's fused update", name, reason, "Make the parameter contiguous, or say backend='eager'."
            )

    def _tables_of(self, weights: list[Tensor | None]) -> tuple[list[Table], bool]:
        """The lowered plan of each dtype, and whether one pass over whole bins will do."""
        signature = [None if p is None else (p.dtype, p.stride()) for p in weights]
        for known, tables, one_pass in self._tables:
            if known == signature:
                return tables, one_pass
        one_pass = self._gradient_lines is not None and self._update_lines is not None
        tables = self._lowered(signature, cut_bins=not one_pass)
        if one_pass and not all(t.whole_bins and t.longest <= LONGEST for _, t in tables):
            one_pass, tables = False, self._lowered(signature, cut_bins=True)
        self._tables = [(signature, tables, one_pass), *self._tables[:3]]
        return tables, one_pass

    def _lowered(self, signature: list[Any], *, cut_bins: bool) -> list[Table]:
        made = []
        for dtype in sorted({entry[0] for entry in signature if entry is not None}, key=str):
            strides = [entry[1] if entry is not None and entry[0] == dtype else None for entry in signature]
            table = lower(self.planned.plan, strides, bands=False, cut_bins=cut_bins)
            assert table is not None
            made.append((dtype, table))
        return made


def _call(loop: Any, dtype: torch.dtype, table: Lowered, *arguments: Any) -> Call:
    return loop, (KINDS[dtype], table.entries, table.chunks, *arguments, np.zeros(1, dtype=np.int64))


def _lines(lines: list[Line], num_bins: int) -> tuple[np.ndarray, np.ndarray]:
    slopes = np.array([slope for slope, _ in lines], dtype=np.float64)
    return slopes, np.array([floors for _, floors in lines], dtype=np.float64).reshape(len(lines), num_bins)


def _numbers(gradients: list[Tensor | None], states: list[dict[str, Any]], groups: list[dict[str, Any]]) -> np.ndarray:
    """The constants of each tensor's step, columns `loops.NUMBERS`."""
    known: dict[tuple[int, float], tuple[float, ...]] = {}
    rows = []
    for gradient, state, group in zip(gradients, states, groups, strict=True):
        if gradient is None:
            rows.append((0.0,) * len(loops.NUMBERS))
            continue
        key = (id(group), float(state["step"]))
        if key not in known:
            (beta1, beta2), lr, step = group["betas"], float(group["lr"]), key[1]
            known[key] = (
                *(1 - beta1, beta2, 1 - beta2, lr / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step)),
                *(group["eps"], 1 - lr * group["weight_decay"], -1.0 if group["maximize"] else 1.0),
            )
        rows.append(known[key])
    return np.array(rows, dtype=np.float64)
