# mypy: disable-error-code="no-untyped-def"
"""The fused update of GSO by Triton programs: one launch for all tensors of a dtype, nothing waits for the device.

One program takes one bin through everything, where every budget of a bin needs that bin alone, each bin lies in one
piece of one tensor and has at most `LONGEST` elements. All else is the reference's, with one warning that says why.
Checked against the definition in Triton's interpreter on the CPU; and once per process, device and dtype by itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ...budget import Relative, RelativeStep
from ...budget.lines import Line, line_table, lines_of
from ...kernels.addressable import bump_versions, warn_of_fallback
from ...kernels.launch import launch
from ...kernels.selfcheck import is_sound
from ...kernels.triton_gpu import KINDS
from ...plan import Layout, Plan, xsp
from ...plan.lowering import BIN, COUNT, LENGTH, OFFSET, ROW_STEP, ROWS, STEP, TENSOR, lower
from ...split import Split
from .compiled import (
    BETA2,
    DECAY,
    EPS,
    FIRST_MOMENT,
    GRADIENT,
    NUM_NUMBERS,
    ONE_MINUS_BETA1,
    ONE_MINUS_BETA2,
    RATE,
    SECOND_MOMENT,
    SIGN,
    UNBIAS,
    WEIGHT,
    CompiledUpdate,
)
from .reference import ReferenceUpdate

__all__ = ["BLOCK", "LONGEST", "TritonUpdate", "one_pass"]

BLOCK = 1024
"""Elements of a bin that a program takes at once."""

COLUMNS = tl.constexpr(7)
_TENSOR, _BIN, _PLACE, _START, _SIZE, _LENGTH, _ROW_STEP = (tl.constexpr(column) for column in range(7))
"""The columns of a bin: its tensor, its number and its place among the tensor's bins. Its ``size`` elements begin at
element ``start`` of the tensor, in rows of ``length`` elements, which are ``row_step`` elements apart."""

_SLOPE, _FLOOR, _ROOT = (tl.constexpr(row) for row in range(3))
"""The rows of a line, see `line_table`."""

# A program can read these globals, and no plain integers.
_NUM_NUMBERS = tl.constexpr(NUM_NUMBERS)
_WEIGHT, _GRADIENT = tl.constexpr(WEIGHT), tl.constexpr(GRADIENT)
_FIRST_MOMENT, _SECOND_MOMENT = tl.constexpr(FIRST_MOMENT), tl.constexpr(SECOND_MOMENT)
_ONE_MINUS_BETA1, _BETA2 = tl.constexpr(ONE_MINUS_BETA1), tl.constexpr(BETA2)
_ONE_MINUS_BETA2, _RATE, _UNBIAS = tl.constexpr(ONE_MINUS_BETA2), tl.constexpr(RATE), tl.constexpr(UNBIAS)
_EPS, _DECAY, _SIGN = tl.constexpr(EPS), tl.constexpr(DECAY), tl.constexpr(SIGN)


@triton.jit
def _memory(addresses, which: tl.constexpr, t, num_tensors, KIND: tl.constexpr):
    """One of the four arrays of a tensor."""
    return tl.load(addresses + which * num_tensors + t).to(tl.pointer_type(KIND))


@triton.jit
def _elements(row, lo, BLOCK: tl.constexpr):
    """Offsets of a bin's elements from ``lo`` on, in the order of its rows, and which of them exist."""
    start, size = tl.load(row + _START), tl.load(row + _SIZE)
    length, row_step = tl.load(row + _LENGTH), tl.load(row + _ROW_STEP)
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
        line = lines + 3 * j * num_tensors + t
        slope = tl.load(line + _SLOPE * num_tensors)
        floor = tl.load(line + _FLOOR * num_tensors)
        root = tl.load(line + _ROOT * num_tensors)
        limit = tl.maximum(slope * weight, floor + root * root_of_numel)
        factor = tl.minimum(factor, tl.where(length > limit, limit / length, 1.0))
    return factor


@triton.jit
def _entered(g, m, v, at, there, s, number, BY_BIN: tl.constexpr, WIDE: tl.constexpr):
    """The moments with a gradient times s entered into them, and the update they make; 0 where there is no element.

    With one second moment per bin, only the first moment is entered, and it stands for the update before its rate.
    """
    x = tl.load(g + at, mask=there, other=0.0).to(WIDE) * s
    m0 = tl.load(m + at, mask=there, other=0.0).to(WIDE)
    m1 = m0 + tl.load(number + _ONE_MINUS_BETA1).to(WIDE) * (x - m0)
    v1, u = m1, m1
    if not BY_BIN:
        v0 = tl.load(v + at, mask=there, other=0.0).to(WIDE)
        v1 = v0 * tl.load(number + _BETA2).to(WIDE) + x * x * tl.load(number + _ONE_MINUS_BETA2).to(WIDE)
        unbias, eps = tl.load(number + _UNBIAS).to(WIDE), tl.load(number + _EPS).to(WIDE)
        u = m1 * tl.load(number + _RATE).to(WIDE) / (tl.sqrt(v1) * unbias + eps)
        u = tl.where(there, u, 0.0)
    return m1, v1, u


@triton.jit
def _enter_bin(v, mean, number):
    """Enter a bin's mean square into its second moment; return what its first moments are multiplied by."""
    v1 = (tl.load(number + _BETA2) * tl.load(v) + tl.load(number + _ONE_MINUS_BETA2) * mean).to(tl.float32)
    tl.store(v, v1)
    root = tl.sqrt(v1.to(tl.float64))
    return tl.load(number + _RATE) / (root * tl.load(number + _UNBIAS) + tl.load(number + _EPS))


@triton.jit
def _write(p, at, there, update, moved2, cap, number, KIND: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Take update and decay from the weights, both times the cap; neither where the update is not finite."""
    weight = tl.load(p + at, mask=there, other=0.0).to(WIDE)
    is_finite = tl.zeros([BLOCK], tl.float64) + moved2 < float("inf")
    shrink = (1 - cap * tl.load(number + _DECAY)).to(WIDE)
    tl.store(p + at, (weight * shrink - update * cap.to(WIDE)).to(KIND), mask=there & is_finite)


@triton.jit
def one_pass(
    table,
    addresses,
    numbers,
    lines,
    caps,
    squares,
    weights,
    num_tensors,
    BY_BIN: tl.constexpr,
    LINES: tl.constexpr,
    CAPS: tl.constexpr,
    KIND: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Update one bin, with one second moment BY_BIN or per element; write squares of gradient and weights as they were.

    ``table`` holds the bins, and ``addresses`` and ``numbers`` are those of `compiled`. ``lines`` and ``caps`` are the
    limits on the gradient and on the update.
    """
    row = table + tl.program_id(0) * COLUMNS
    t, bin_, size = tl.load(row + _TENSOR), tl.load(row + _BIN), tl.load(row + _SIZE)
    number = numbers + t * _NUM_NUMBERS
    p, g = _memory(addresses, _WEIGHT, t, num_tensors, KIND), _memory(addresses, _GRADIENT, t, num_tensors, KIND)
    m = _memory(addresses, _FIRST_MOMENT, t, num_tensors, KIND)
    v = _memory(addresses, _SECOND_MOMENT, t, num_tensors, tl.float32 if BY_BIN else KIND)
    gradient2, weight2 = _square(g, row, size, BLOCK), _square(p, row, size, BLOCK)
    tl.store(squares + bin_, gradient2)
    tl.store(weights + bin_, weight2)
    if gradient2 < float("inf"):  # nan is not
        norm = tl.sqrt(gradient2)
        scale = _factor(norm, lines, t, num_tensors, weight2, size, LINES)
        rate = tl.full([], 1.0, tl.float64)
        if BY_BIN:
            mean = (scale * norm) * (scale * norm) / size.to(tl.float64)
            rate = _enter_bin(v + tl.load(row + _PLACE), mean, number)
        s = (scale * tl.load(number + _SIGN)).to(WIDE)
        moved = tl.zeros([BLOCK], tl.float64)
        if CAPS > 0:
            for lo in range(0, size, BLOCK):
                at, there = _elements(row, lo, BLOCK)
                _m1, _v1, u = _entered(g, m, v, at, there, s, number, BY_BIN, WIDE)
                moved += u.to(tl.float64) * u.to(tl.float64)
        moved2 = tl.sum(moved, axis=0)
        if CAPS > 0:
            moved2 = moved2 * rate * rate
        cap = _factor(tl.sqrt(moved2), caps, t, num_tensors, weight2, size, CAPS)
        for lo in range(0, size, BLOCK):
            at, there = _elements(row, lo, BLOCK)
            m1, v1, u = _entered(g, m, v, at, there, s, number, BY_BIN, WIDE)
            tl.store(m + at, m1.to(KIND), mask=there)
            if not BY_BIN:
                tl.store(v + at, v1.to(KIND), mask=there)
            _write(p, at, there, u * rate.to(WIDE), moved2, cap, number, KIND, WIDE, BLOCK)


LONGEST = 1 << 16
"""Elements of the largest bin that one program updates alone; beyond, most of the device would wait for it."""

Table = tuple[torch.dtype, Tensor]


class TritonUpdate(CompiledUpdate):
    """One step in one launch a dtype; where that cannot be, by the reference, with one warning."""

    def __init__(self, split: Split) -> None:
        super().__init__(split)
        self._device = split.kernel.device
        self._tables: list[tuple[Any, list[Table] | None]] = []
        self._sent: dict[str, tuple[Any, Tensor]] = {}
        self._warned = False
        ids = [bins[0] if len(bins) else 0 for bins in split.bins_of_tensor]  # one of them: a tensor has one rate
        self._bin_of_tensor = torch.tensor(ids, device=self._device)
        self._lines, self._caps = (self._lines_here(lines) for lines in (self._gradient_lines, self._update_lines))

    def _update(
        self, arrays: tuple[list[Tensor | None], ...], states: list[dict[str, Any]], groups: list[dict[str, Any]]
    ) -> bool:
        """See `CompiledUpdate`."""
        split, num_bins = self.split, self.split.plan.num_bins
        pointers = [[0 if t is None else t.data_ptr() for t in row] for row in arrays]
        tables = self._tables_of(arrays[0])
        by_bin = any("bin_sq" in state for state in states)
        if tables is None or not all(self._is_sound(dtype, by_bin) for dtype, _ in tables):
            return False
        if not self._memory.is_apart(arrays[0], np.array(pointers[0])):
            self._refuse(split.plan.layout.names[0], "it or a parameter beside it shares memory with another")
            return False
        addresses = self._send("addresses", pointers, torch.int64)
        numbers = self._numbers(arrays[1], states, groups)
        # Every bound on the update follows the pace of its tensor's rate.
        caps = self._caps * split.pace_B()[self._bin_of_tensor] if len(self._caps) else self._caps
        squares, weights = torch.zeros((2, num_bins), dtype=torch.float64, device=self._device)
        for dtype, table in tables:
            given = (table, addresses, numbers, self._lines, caps, squares, weights, len(groups))
            how = (by_bin, len(self._lines), len(caps), *KINDS[dtype], BLOCK)
            launch(self._device, one_pass, (len(table),), *given, *how)
        self._measured, self._decision = (squares, weights), None
        bump_versions([t for row in (arrays[0], arrays[2], arrays[3]) for t in row if t is not None])
        return True

    def _is_sound(self, dtype: torch.dtype, by_bin: bool) -> bool:
        """Whether the program makes the definition's step here; tried once per process, device and dtype."""
        name, rounding = f"triton: fused update, second moment per {'bin' if by_bin else 'element'}", _ROUNDING[dtype]
        rounding = max(rounding, 1e-5) if by_bin else rounding  # float32 per bin
        trial = partial(_trial, self._device, dtype, by_bin)
        return is_sound(name, self._device, dtype, trial, by_name=self.split.kernel.by_name, rounding=rounding)

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
        """The constants of each tensor's step, (T, 8), see `compiled`; counters and rates may live on the device."""
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
    pieces = np.bincount(plan.bin_K, minlength=plan.num_bins)[bins[:, _BIN.value]]
    for bad, reason in (
        (pieces > 1, "a bin of its plan lies in several pieces"),
        (bins[:, _SIZE.value] > LONGEST, f"a bin of it has more than the {LONGEST} elements that one program updates"),
    ):
        if bad.any():
            return plan.layout.names[bins[bad.argmax(), _TENSOR.value]], reason
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
    made = np.empty((len(entries), COLUMNS.value), dtype=np.int64)
    made[:, _TENSOR.value], made[:, _BIN.value], made[:, _PLACE.value] = entries[:, TENSOR], bin_, place_B[bin_]
    made[:, _START.value] = entries[:, OFFSET] + i * entries[:, STEP]
    made[:, _SIZE.value] = entries[:, ROWS] * entries[:, LENGTH]
    made[:, _LENGTH.value], made[:, _ROW_STEP.value] = entries[:, LENGTH], entries[:, ROW_STEP]
    return made


_ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2.0**-8, torch.bfloat16: 2.0**-5}
"""What a step may differ by: it rounds several times, and an update may cancel a part of a weight."""


class _Untried(TritonUpdate):
    """The update while it is tried itself."""

    def _is_sound(self, dtype: torch.dtype, by_bin: bool) -> bool:
        return True


def _trial(device: torch.device, dtype: torch.dtype, by_bin: bool) -> Iterator[tuple[str, Tensor, Tensor]]:
    """A step of rows, turned rows, a long row and a vector, with rows that are not finite; then the definition's."""
    shapes = {"rows": (5, 70), "turned": (9, 3), "long": (2, BLOCK + 6), "bias": (7,)}
    plan, runs = xsp(Layout.from_shapes(shapes)), []
    for make in (_Untried, ReferenceUpdate):
        weights, gradients = (
            [
                (torch.sin(torch.arange(math.prod(shape)) * 12.9898 + i) * 2).reshape(shape).to(device, dtype)
                for i, shape in enumerate(shapes.values(), first)
            ]
            for first in (0, 7)
        )
        weights[1] = weights[1].t().contiguous().t()
        weights[3] *= 1e-4  # so short that floors decide
        gradients[1] = gradients[1].t().contiguous().t()
        gradients[0][2, 3], gradients[2][1, BLOCK] = float("nan"), float("inf")
        optimizer = torch.optim.AdamW([torch.nn.Parameter(w) for w in weights], lr=0.03)
        owners = optimizer.param_groups[0]["params"]
        tensors = [p.detach() for p in owners]
        budgets = (Relative(0.2), RelativeStep(0.01))  # both bind
        split = Split(plan, tensors, budgets, owners=owners, backend="eager", caps_updates=True, call="GSO")
        split.read_rates(optimizer)
        states: list[dict[str, Any]] = []
        for g, bins in zip(gradients, split.bins_of_tensor, strict=True):  # of the gradient's signs: nothing cancels
            held = 0.05 * g.nan_to_num(1.0, 1.0, 1.0)
            of_bins = 0.01 + torch.arange(len(bins), dtype=torch.float32, device=device)
            second = {"bin_sq": of_bins} if by_bin else {"exp_avg_sq": held.square()}
            states.append({"step": torch.full((), 3.0), "exp_avg": held, **second})
        make(split).step([*gradients], states, [optimizer.param_groups[0]] * len(tensors))
        found = {f"a weight of {name!r}": w for name, w in zip(shapes, tensors, strict=True)}
        for name, state in zip(shapes, states, strict=True):
            found |= {f"{key!r} of {name!r}": value for key, value in state.items()}
        runs.append(found)
    for what, found_here in runs[0].items():
        yield what, found_here, runs[1][what]
