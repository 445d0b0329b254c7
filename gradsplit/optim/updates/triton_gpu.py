# mypy: disable-error-code="no-untyped-def"
"""The fused update of GSO by Triton programs: one launch for all tensors of a dtype, nothing waits for the device.

One program takes one bin through everything, where every budget of a bin needs that bin alone, each bin lies in one
piece of one tensor and has at most `LONGEST` elements. All else is the reference's, with one warning that says why.
Checked against the definition in Triton's interpreter on the CPU, and on no graphics card.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ...budget.lines import Line, line_table, lines_of
from ...kernels.addressable import bump_versions, warn_of_fallback
from ...plan import Plan
from ...plan.lowering import BIN, COUNT, LENGTH, OFFSET, ROW_STEP, ROWS, STEP, TENSOR, lower
from ...split import Split
from .compiled import NUMBERS, CompiledUpdate

__all__ = ["BLOCK", "COLUMNS", "one_pass_bin", "one_pass_element", "LONGEST", "TritonUpdate"]

BLOCK = 1024
COLUMNS = 7


@triton.jit
def _memory(addresses, which: tl.constexpr, t, num_tensors, KIND: tl.constexpr):
    """One of the four arrays of a tensor."""
    return tl.load(addresses + which * num_tensors + t).to(tl.pointer_type(KIND))


@triton.jit
def _elements(row, lo, BLOCK: tl.constexpr):
    """Offsets of a bin's elements from ``lo`` on, in the order of its rows, and which of them exist."""
    start, size = tl.load(row + 3), tl.load(row + 4)
    length, row_step = tl.load(row + 5), tl.load(row + 6)
    i = lo + tl.arange(0, BLOCK).to(tl.int64)
    return start + (i // length) * row_step + i % length, i < size


@triton.jit
def _square(memory, row, size, BLOCK: tl.constexpr):
    """A bin's sum of squares, in float64."""
    total = tl.zeros([BLOCK], tl.float64)
    for lo in range(0, size, BLOCK):
        at, there = _elements(row, lo, BLOCK)
        x = tl.load(memory + at, mask=there, other=0.0).to(tl.float64)
        total += x * x
    return tl.sum(total, axis=0)


@triton.jit
def _factor(length, lines, t, num_tensors, weight2, size, COUNT: tl.constexpr):
    """What shortens a length to the least of ``max(slope * weight, floor + root * sqrt(numel))`` over the lines."""
    weight = tl.where(weight2 < float("inf"), tl.sqrt(weight2), 0.0)
    root_of_numel = tl.sqrt(size.to(tl.float64))
    factor = tl.full([], 1.0, tl.float64)
    for j in tl.static_range(COUNT):
        slope = tl.load(lines + (3 * j) * num_tensors + t)
        floor = tl.load(lines + (3 * j + 1) * num_tensors + t)
        root = tl.load(lines + (3 * j + 2) * num_tensors + t)
        limit = tl.maximum(slope * weight, floor + root * root_of_numel)
        factor = tl.minimum(factor, tl.where(length > limit, limit / length, 1.0))
    return factor


@triton.jit
def _mean(g, m, at, there, s, w1, WIDE: tl.constexpr):
    """The first moment with a gradient entered into it, and that gradient after its scale."""
    x = tl.load(g + at, mask=there, other=0.0).to(WIDE) * s
    m0 = tl.load(m + at, mask=there, other=0.0).to(WIDE)
    return m0 + w1 * (x - m0), x


@triton.jit
def _entered(g, m, v, at, there, s, number, WIDE: tl.constexpr):
    """Both moments with a gradient entered into them, and the update they make; 0 where there is no element."""
    m1, x = _mean(g, m, at, there, s, tl.load(number).to(WIDE), WIDE)
    v0 = tl.load(v + at, mask=there, other=0.0).to(WIDE)
    v1 = v0 * tl.load(number + 1).to(WIDE) + x * x * tl.load(number + 2).to(WIDE)
    rate, root, eps = tl.load(number + 3).to(WIDE), tl.load(number + 4).to(WIDE), tl.load(number + 5).to(WIDE)
    u = m1 * rate / (tl.sqrt(v1) * root + eps)
    return m1, v1, tl.where(there, u, 0.0)


@triton.jit
def _write(p, at, there, update, moved2, cap, number, KIND: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Take update and decay from the weights, both times the cap; neither where the update is not finite."""
    weight = tl.load(p + at, mask=there, other=0.0).to(WIDE)
    sound = tl.zeros([BLOCK], tl.float64) + moved2 < float("inf")
    shrink = (1 - cap * tl.load(number + 6)).to(WIDE)
    tl.store(p + at, (weight * shrink - update * cap.to(WIDE)).to(KIND), mask=there & sound)


@triton.jit
def one_pass_element(
    table,
    addresses,
    numbers,
    lines,
    caps,
    squares,
    weights,
    num_tensors,
    NUM_COLUMNS: tl.constexpr,
    NUM_NUMBERS: tl.constexpr,
    LINES: tl.constexpr,
    CAPS: tl.constexpr,
    KIND: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Update one bin with a second moment an element; write squares of gradient and weights as they were."""
    row = table + tl.program_id(0) * NUM_COLUMNS
    t, bin_, size = tl.load(row), tl.load(row + 1), tl.load(row + 4)
    number = numbers + t * NUM_NUMBERS
    p, g = _memory(addresses, 0, t, num_tensors, KIND), _memory(addresses, 1, t, num_tensors, KIND)
    m, v = _memory(addresses, 2, t, num_tensors, KIND), _memory(addresses, 3, t, num_tensors, KIND)
    gradient2, weight2 = _square(g, row, size, BLOCK), _square(p, row, size, BLOCK)
    tl.store(squares + bin_, gradient2)
    tl.store(weights + bin_, weight2)
    if gradient2 < float("inf"):  # nan is not
        scale = _factor(tl.sqrt(gradient2), lines, t, num_tensors, weight2, size, LINES)
        s = (scale * tl.load(number + 7)).to(WIDE)
        moved = tl.zeros([BLOCK], tl.float64)
        if CAPS > 0:
            for lo in range(0, size, BLOCK):
                at, there = _elements(row, lo, BLOCK)
                _m1, _v1, u = _entered(g, m, v, at, there, s, number, WIDE)
                moved += u.to(tl.float64) * u.to(tl.float64)
        moved2 = tl.sum(moved, axis=0)
        cap = _factor(tl.sqrt(moved2), caps, t, num_tensors, weight2, size, CAPS)
        for lo in range(0, size, BLOCK):
            at, there = _elements(row, lo, BLOCK)
            m1, v1, u = _entered(g, m, v, at, there, s, number, WIDE)
            tl.store(m + at, m1.to(KIND), mask=there)
            tl.store(v + at, v1.to(KIND), mask=there)
            _write(p, at, there, u, moved2, cap, number, KIND, WIDE, BLOCK)


@triton.jit
def one_pass_bin(
    table,
    addresses,
    numbers,
    lines,
    caps,
    squares,
    weights,
    num_tensors,
    NUM_COLUMNS: tl.constexpr,
    NUM_NUMBERS: tl.constexpr,
    LINES: tl.constexpr,
    CAPS: tl.constexpr,
    KIND: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The same with one second moment a bin: the update is the first moment times a number."""
    row = table + tl.program_id(0) * NUM_COLUMNS
    t, bin_, place, size = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 4)
    number = numbers + t * NUM_NUMBERS
    p, g = _memory(addresses, 0, t, num_tensors, KIND), _memory(addresses, 1, t, num_tensors, KIND)
    m, v = _memory(addresses, 2, t, num_tensors, KIND), _memory(addresses, 3, t, num_tensors, tl.float32)
    gradient2, weight2 = _square(g, row, size, BLOCK), _square(p, row, size, BLOCK)
    tl.store(squares + bin_, gradient2)
    tl.store(weights + bin_, weight2)
    if gradient2 < float("inf"):  # nan is not
        norm = tl.sqrt(gradient2)
        scale = _factor(norm, lines, t, num_tensors, weight2, size, LINES)
        mean = (scale * norm) * (scale * norm) / size.to(tl.float64)
        v1 = (tl.load(number + 1) * tl.load(v + place) + tl.load(number + 2) * mean).to(tl.float32)
        tl.store(v + place, v1)
        rate = tl.load(number + 3) / (tl.sqrt(v1.to(tl.float64)) * tl.load(number + 4) + tl.load(number + 5))
        s, w1 = (scale * tl.load(number + 7)).to(WIDE), tl.load(number).to(WIDE)
        moved = tl.zeros([BLOCK], tl.float64)
        if CAPS > 0:
            for lo in range(0, size, BLOCK):
                at, there = _elements(row, lo, BLOCK)
                m1, _x = _mean(g, m, at, there, s, w1, WIDE)
                moved += m1.to(tl.float64) * m1.to(tl.float64)
        moved2 = tl.sum(moved, axis=0)
        if CAPS > 0:
            moved2 = moved2 * rate * rate
        cap = _factor(tl.sqrt(moved2), caps, t, num_tensors, weight2, size, CAPS)
        for lo in range(0, size, BLOCK):
            at, there = _elements(row, lo, BLOCK)
            m1, _x = _mean(g, m, at, there, s, w1, WIDE)
            tl.store(m + at, m1.to(KIND), mask=there)
            _write(p, at, there, m1 * rate.to(WIDE), moved2, cap, number, KIND, WIDE, BLOCK)


LONGEST = 1 << 16
"""Elements of the largest bin that one program updates alone; beyond, most of the device would wait for it."""

_KINDS: dict[torch.dtype, tuple[Any, Any]] = {
    torch.float32: (tl.float32, tl.float32),
    torch.float64: (tl.float64, tl.float64),
    torch.bfloat16: (tl.bfloat16, tl.float32),
    torch.float16: (tl.float16, tl.float32),
}
"""Each dtype's element type, and the one to compute in."""

Table = tuple[torch.dtype, Tensor]


class TritonUpdate(CompiledUpdate):
    """One step in one launch a dtype; where that cannot be, by the reference, with one warning."""

    def __init__(self, split: Split) -> None:
        super().__init__(split)
        self._device = split.kernel.device
        self._tables: list[tuple[Any, list[Table] | None]] = []
        self._sent: dict[str, tuple[Any, Tensor]] = {}
        self._warned = False
        ids = [bins[0] if len(bins) else 0 for bins in split.bins_of_tensor]  # any of them: rates are a tensor's
        self._bin_of_tensor = torch.tensor(ids, device=self._device)
        self._lines, self._caps = (self._lines_here(lines) for lines in (self._gradient_lines, self._update_lines))

    def _walk(
        self, arrays: tuple[list[Tensor | None], ...], states: list[dict[str, Any]], groups: list[dict[str, Any]]
    ) -> bool:
        """See `CompiledUpdate`."""
        split, num_bins = self.split, self.split.plan.num_bins
        pointers = [[0 if t is None else t.data_ptr() for t in row] for row in arrays]
        tables = self._tables_of(arrays[0])
        if tables is None:
            return False
        if not self._memory.is_apart(arrays[0], np.array(pointers[0])):
            self._refuse(split.plan.layout.names[0], "it or a parameter beside it shares memory with another")
            return False
        addresses = self._send("addresses", pointers, torch.int64)
        numbers = self._numbers(arrays[1], states, groups)
        # Every bound on the update follows the pace of its tensor's rate.
        caps = self._caps * split.pace_B()[self._bin_of_tensor] if len(self._caps) else self._caps
        squares, weights = torch.zeros((2, num_bins), dtype=torch.float64, device=self._device)
        by_bin = any("bin_sq" in state for state in states)
        program = one_pass_bin if by_bin else one_pass_element
        for dtype, table in tables:
            program[(len(table),)](
                *(table, addresses, numbers, self._lines, caps, squares, weights, len(groups)),
                *(COLUMNS, len(NUMBERS), len(self._lines), len(caps), *_KINDS[dtype], BLOCK),
            )
        self._measured, self._decision = (squares, weights), None
        bump_versions([t for row in (arrays[0], arrays[2], arrays[3]) for t in row if t is not None])
        return True

    def _tables_of(self, weights: list[Tensor | None]) -> list[Table] | None:
        """The bins of each dtype, made once for dtypes and strides; None where the reference has to do it."""
        signature = [None if p is None else (p.dtype, p.stride()) for p in weights]
        for known, tables in self._tables:
            if known == signature:
                return tables
        tables, refusal = [], _refusal_of_budgets(self.split)
        for dtype in sorted({entry[0] for entry in signature if entry is not None}, key=str):
            strides = [entry[1] if entry is not None and entry[0] == dtype else None for entry in signature]
            bins = _bins(self.split, strides)
            refusal = refusal or _refusal_of_bins(self.split.plan, bins)
            tables.append((dtype, torch.from_numpy(bins).to(self._device)))
        made = None if refusal else tables
        if refusal:
            self._refuse(*refusal)
        self._tables = [(signature, made), *self._tables[:3]]
        return made

    def _refuse(self, name: str, reason: str) -> None:
        """Say once why the reference has to do it."""
        if not self._warned:
            self._warned = True
            remedy = "Take smaller bins with limits of their own, or backend='eager'."
            warn_of_fallback("GSO's Triton update", name, reason, remedy)

    def _lines_here(self, lines: Sequence[Line] | None) -> Tensor:
        return torch.from_numpy(line_table(lines or (), self.split.plan.width_T)).to(self._device)

    def _send(self, name: str, rows: Any, dtype: torch.dtype) -> Tensor:
        """Numbers on the device, sent again only when they have changed."""
        if name not in self._sent or self._sent[name][0] != rows:
            self._sent[name] = (rows, torch.tensor(rows, dtype=dtype).to(self._device, non_blocking=True))
        return self._sent[name][1]

    def _numbers(
        self, gradients: list[Tensor | None], states: list[dict[str, Any]], groups: list[dict[str, Any]]
    ) -> Tensor:
        """The constants of each tensor's step, columns `NUMBERS`; counters and rates may live on the device."""
        counters = [state["step"] for g, state in zip(gradients, states, strict=True) if g is not None]
        if len({counter.device for counter in counters}) > 1:
            counters = [counter.to(self._device) for counter in counters]
        none = torch.zeros_like(counters[0]) if counters else torch.zeros(())
        counter = iter(counters)
        count_T = torch.stack([none if g is None else next(counter) for g in gradients])
        # 0 after an overflow in the first step, which is passed over
        count_T = count_T.to(torch.float64).clamp(min=1).to(self._device, non_blocking=True)
        rows = [(*g["betas"], g["eps"], g["weight_decay"], -1.0 if g["maximize"] else 1.0) for g in groups]
        beta1_T, beta2_T, eps_T, decay_T, sign_T = self._send("constants", rows, torch.float64).unbind(1)
        rates = [group["lr"] for group in groups]
        if any(isinstance(rate, Tensor) for rate in rates):
            known = {id(rate): torch.as_tensor(rate, dtype=torch.float64).to(self._device) for rate in rates}
            lr_T = torch.stack([known[id(rate)].reshape(()) for rate in rates])
        else:
            lr_T = self._send("rates", rates, torch.float64)
        root_T = (1 - beta2_T**count_T).rsqrt()
        step_T = lr_T / (1 - beta1_T**count_T)
        columns = (1 - beta1_T, beta2_T, 1 - beta2_T, step_T, root_T, eps_T, lr_T * decay_T, sign_T)
        return torch.stack(columns, dim=1)


def _refusal_of_budgets(split: Split) -> tuple[str, str] | None:
    """The level of a budget that looks beyond a bin, and why bins cannot be updated one by one under it."""
    for level, budget in (*split.gradient_budgets, *split.update_budgets):
        if lines_of([(level, budget)]) is None:
            return (
                level,
                f"{type(budget).__name__} at this level looks beyond the bin, at nodes above it or at the past",
            )
    return None


def _refusal_of_bins(plan: Plan, bins: np.ndarray) -> tuple[str, str] | None:
    """The tensor with a bin that one program cannot update, and why; ``bins`` as the programs have them."""
    # Counted over the whole plan: a bin's other pieces may lie in tensors of another dtype.
    pieces = np.bincount(plan.bin_K, minlength=plan.num_bins)[bins[:, 1]]
    for bad, reason in (
        (pieces > 1, "a bin of its plan lies in several pieces"),
        (bins[:, 4] > LONGEST, f"a bin of it has more than the {LONGEST} elements that one program updates"),
    ):
        if bad.any():
            return plan.layout.names[bins[bad.argmax(), 0]], reason
    return None


def _bins(split: Split, strides: list[Any]) -> np.ndarray:
    """One row a box of a bin in tensors of these strides, with the columns of the programs."""
    lowered = lower(split.plan, strides, bands=False, cut_bins=False)
    assert lowered is not None  # tensors that are not addressable do not come here
    place_B = np.zeros(split.plan.num_bins, dtype=np.int64)
    for bins in split.bins_of_tensor:
        place_B[bins] = np.arange(len(bins))
    count = lowered.entries[:, COUNT]
    entries = np.repeat(lowered.entries, count, axis=0)
    i = np.arange(len(entries)) - np.repeat(np.cumsum(count) - count, count)
    bin_ = entries[:, BIN] + i
    start, size = entries[:, OFFSET] + i * entries[:, STEP], entries[:, ROWS] * entries[:, LENGTH]
    columns = (entries[:, TENSOR], bin_, place_B[bin_], start, size, entries[:, LENGTH], entries[:, ROW_STEP])
    return np.ascontiguousarray(np.stack(columns, axis=1))
