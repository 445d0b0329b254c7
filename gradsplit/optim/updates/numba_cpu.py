"""The fused update of GSO on the CPU: the reference's formulas in compiled loops, in one pass over memory where it can.

Where every budget of a bin needs that bin alone, a bin is measured, bounded, entered into its moments and applied while
its rows are in cache: 7 arrays cross the memory bus for "element" (weights, both moments read and written, the gradient
read), 5 for "bin". Otherwise norms come first, then the update; a bound on the update over several bins takes a third
pass.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...budget.lines import line_table
from ...kernels.addressable import bump_versions
from ...kernels.addresses import KINDS
from ...kernels.numba_cpu import room_for_workers
from ...kernels.numba_loops import fold
from ...kernels.threads import Call, run, threads_for
from ...plan.lowering import Lowered, lower
from ...split import Split
from . import numba_loops as loops
from .compiled import CompiledUpdate

__all__ = ["FusedUpdate"]

LONGEST = 1 << 18
"""Elements of the largest bin that one thread updates alone, from cache."""

_NONE = torch.zeros(())  # steps of a parameter without a state

Table = tuple[Any, Lowered]


class FusedUpdate(CompiledUpdate):
    """One step in compiled loops; where that cannot be, by the reference, with one warning."""

    def __init__(self, split: Split) -> None:
        super().__init__(split)
        plan = split.plan
        self._tables: list[tuple[Any, list[Table], bool]] = []
        # Kept: an array made anew in every hook of a backward pass would lie between gradients that are freed, and
        # leave their memory in pieces.
        self._squares = np.zeros((2, plan.num_bins))
        self._gradient_table = line_table(self._gradient_lines or (), plan.width_T)
        self._update_table = line_table(self._update_lines or (), plan.width_T)
        self._paced_at = b""  # the paces of the tensors in the update's table
        # Where a bin's second moment stands among its tensor's; bins over several tensors have none.
        self._tensor_B = np.zeros(plan.num_bins, dtype=np.int64)
        self._tensor_B[plan.bin_K] = plan.tensor_K
        self._places_B = np.zeros(plan.num_bins, dtype=np.int64)
        self._bin_of_tensor = np.zeros(len(split.owners), dtype=np.int64)  # one of them: a tensor has one rate
        for t, ids in enumerate(split.bins_of_tensor):
            self._places_B[ids] = np.arange(len(ids))
            self._bin_of_tensor[t] = ids[0] if len(ids) else 0

    def _update(
        self, arrays: tuple[list[Tensor | None], ...], states: list[dict[str, Any]], groups: list[dict[str, Any]]
    ) -> bool:
        """See `CompiledUpdate`. Every budget has its loops, so this never fails."""
        gradients = arrays[1]
        tables, one_pass = self._tables_of(arrays[0])
        bases = np.array([[0 if t is None else t.data_ptr() for t in row] for row in arrays], dtype=np.int64)
        numbers = _numbers(states, groups)
        num_elements = sum(table.num_elements for _, table in tables)
        threads = threads_for(num_elements) if self._memory.is_apart(arrays[0], bases[0]) else 1
        by_bin = "bin_sq" in next((state for state in states if state), {})
        if one_pass:
            self._one_pass(tables, bases, numbers, by_bin, threads, any_missing=any(g is None for g in gradients))
        else:
            self._passes(tables, bases, numbers, by_bin, threads, gradients)
        bump_versions([t for row in (arrays[0], arrays[2], arrays[3]) for t in row if t is not None])
        return True

    def _one_pass(
        self,
        tables: list[Table],
        bases: np.ndarray,
        numbers: np.ndarray,
        by_bin: bool,
        threads: int,
        *,
        any_missing: bool,
    ) -> None:
        squares, weights = self._squares
        if any_missing:  # all others are written
            self._squares.fill(0.0)
        bounds = (self._gradient_table, self._paced_table())
        calls: list[Call] = []
        for dtype, table in tables:
            kind, rows = KINDS[dtype], (table.entries, table.chunks, bases, numbers)
            wide = np.float64 if dtype == torch.float64 else np.float32
            last = (None, self._places_B) if by_bin else (room_for_workers(table.longest, wide), None)
            calls.append((loops.one_pass, (kind, *rows, *bounds, squares, weights, *last)))
        run(calls, threads)
        self._measured, self._decision = (torch.from_numpy(squares), torch.from_numpy(weights)), None

    def _paced_table(self) -> np.ndarray:
        """The limits on the update at the learning rates of now; most steps have the last step's."""
        if self._update_lines:
            times_T = self.split.pace_B().numpy()[self._bin_of_tensor]
            paces = times_T.tobytes()
            if self._paced_at != paces:
                self._update_table = line_table(self._update_lines, self.split.plan.width_T, times_T)
                self._paced_at = paces
        return self._update_table

    def _passes(
        self,
        tables: list[Table],
        bases: np.ndarray,
        numbers: np.ndarray,
        by_bin: bool,
        threads: int,
        gradients: list[Tensor | None],
    ) -> None:
        split, num_bins = self.split, self.split.plan.num_bins
        reads: list[list[Tensor | None]] = [gradients]
        if split.reads_weights:
            reads.append(list(split.parameters))
        squares_B, *weights_B = split.kernel.squares_many(reads)
        weight_B = weights_B[0] if weights_B else None
        decision = split.gradient.decide(squares_B, weight_B)
        self._measured, self._decision = None, decision
        scale, finite = decision.scale_B.numpy(), decision.finite_B.numpy()
        rate = np.zeros(num_bins) if by_bin else None
        if rate is not None:
            loops.learn_bins(
                *(self._tensor_B, self._places_B, bases, numbers),
                *(decision.norm_B.numpy(), scale, finite, split.plan.numel_B, rate),
            )
        if split.update is None:
            run([_call(loops.enter_bins, d, t, bases, numbers, scale, finite, rate, None) for d, t in tables], threads)
            return
        slots = [np.zeros(table.num_slots) for _, table in tables]
        run(
            [
                _call(loops.enter_bins, d, t, bases, numbers, scale, finite, rate, out)
                for (d, t), out in zip(tables, slots, strict=True)
            ],
            threads,
        )
        moved = np.zeros(num_bins)
        for (_, table), out in zip(tables, slots, strict=True):
            fold(out, num_bins, table.fold_bins)
            moved += out[:num_bins]
        moved_B = torch.from_numpy(moved if rate is None else moved * rate * rate)
        cap = split.update.decide(moved_B, weight_B, split.pace_B())
        caps = (cap.scale_B.numpy(), cap.finite_B.numpy())
        run([_call(loops.write, d, t, bases, numbers, *caps, finite, rate) for d, t in tables], threads)

    def _tables_of(self, weights: list[Tensor | None]) -> tuple[list[Table], bool]:
        """The lowered plan of each dtype, and whether one pass over whole bins is enough."""
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
            table = lower(self.split.plan, strides, bands=False, cut_bins=cut_bins)
            assert table is not None
            made.append((dtype, table))
        return made


def _call(loop: Any, dtype: torch.dtype, table: Lowered, *arguments: Any) -> Call:
    return loop, (KINDS[dtype], table.entries, table.chunks, *arguments)


def _numbers(states: list[dict[str, Any]], groups: list[dict[str, Any]]) -> np.ndarray:
    """The constants of each tensor's step, (T, 8), see `compiled`."""
    counts = torch.stack([state.get("step", _NONE) for state in states]).tolist()
    keys = list(zip(map(id, groups), counts, strict=True))
    group_of = dict(zip(keys, groups, strict=True))
    rows = []
    for (_, count), group in group_of.items():
        (beta1, beta2), lr = group["betas"], float(group["lr"])
        count = max(count, 1.0)  # 0 without a gradient, or after an overflow in the first step, which is passed over
        rows.append(
            (
                *(1 - beta1, beta2, 1 - beta2, lr / (1 - beta1**count), 1 / math.sqrt(1 - beta2**count)),
                *(group["eps"], lr * group["weight_decay"], -1.0 if group["maximize"] else 1.0),
            )
        )
    row_of = {key: row for row, key in enumerate(group_of)}
    return np.array(rows, dtype=np.float64)[[row_of[key] for key in keys]]
