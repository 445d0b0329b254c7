# mypy: disable-error-code="no-untyped-def"
"""The share step in compiled loops on the CPU, and Newton-Schulz in one batched product per shape.

Arrays that cross the memory bus: gradient and weights for the norms; gradient, memory and direction to enter; the
direction for its orthogonal form; direction and weights to apply.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...amp import Scaling
from ...budget import Decision
from ...budget.lines import line_table, lines_of
from ...collective import COLLECTIVE, FALLS, LET_THROUGH, RISES, Collective
from ...functional.kinds import WRITTEN
from ...kernels.addressable import bump_versions, obstacle, overlap
from ...kernels.addresses import KINDS, compiled, load, narrow, pointer, store
from ...kernels.numba_loops import _limit, share
from ...kernels.threads import Call, run, threads_for
from ...plan.lowering import lower
from ...rates import Clock
from ...series import Series
from ...split import Split
from ..directions import DIRECTIONS, Adam, Orthogonal, Turn, orthogonalised
from ..kinds import Kind
from ..share import ShareUpdate
from .compiled import FIRST_MOMENT, GRADIENT, SECOND_MOMENT, WEIGHT
from .numba_loops import _bin_square, _entry

__all__ = ["COLUMNS", "DIRECTION", "apply", "decide", "enter", "products", "ratios", "turn", "CompiledShare"]

DIRECTION = 4
"""The row of ``bases`` with the addresses of the directions, behind those of `compiled`."""

COLUMNS = (
    *("share", "decay", "least", "longest", "is_adam", "sign"),
    *("w1", "beta2", "w2", "unbias1", "unbias2", "eps"),
)
"""The columns of ``numbers``: see `gradsplit.optim.share` and `gradsplit.optim.directions.adam`."""

(SHARE, DECAY, LEAST, LONGEST, IS_ADAM, SIGN, W1, BETA2, W2, UNBIAS1, UNBIAS2, EPS) = range(12)

_reduced = compiled(fastmath={"reassoc", "contract"})
_plain = compiled()


@_plain
def ratios(squares, recent, out):
    """Write ||g_b|| / s_b of every bin; nan where it says nothing."""
    for b in range(len(squares)):
        known = math.isfinite(squares[b]) and squares[b] > 0 and recent[b] > 0
        out[b] = math.sqrt(squares[b]) / recent[b] if known else np.nan


@_plain
def decide(squares, weights, fired, factor, falls, recent, tensors, numel, lines, out):
    """Decide on every bin, and remember its norm.

    ``out`` (5, B): norm, limit, factor on the gradient, length of the weights, and 1 where the gradient is finite.
    """
    norms, limits, scales, lengths, finite = out[0], out[1], out[2], out[3], out[4]
    for b in range(len(squares)):
        t = tensors[b]
        weight2 = weights[b] if math.isfinite(weights[b]) else 0.0
        lengths[b] = math.sqrt(weight2)
        if not math.isfinite(squares[b]):
            norms[b], limits[b], scales[b], finite[b] = 0.0, _limit(lines, t, lengths[b], numel[b]), 0.0, 0.0
            continue
        norm = math.sqrt(squares[b])
        passed, limit = norm * factor, _limit(lines, t, lengths[b], numel[b])
        norms[b], limits[b], finite[b] = norm, limit, 1.0
        scales[b] = factor * (limit / passed if passed > limit else 1.0)
        if norm == 0.0:
            continue
        if recent[b] == 0.0:
            recent[b] = passed
        elif fired:
            recent[b] *= LET_THROUGH
        else:
            recent[b] = min(max(norm, falls * recent[b]), RISES * recent[b])


@_reduced
def _dot_row(g, d, start, length):
    total = narrow(d, 0.0)
    for j in range(start, start + length):
        total += load(g, j) * load(d, j)
    return np.float64(total)


@_reduced
def _products(c, worker, kind, entries, chunks, bases, out):
    for e in range(chunks[c], chunks[c + 1]):
        first, count, t, offset, step, rows, row_step, length = _entry(entries, e)
        if bases[GRADIENT, t] == 0:
            continue
        g, p = pointer(bases[GRADIENT, t], kind), pointer(bases[WEIGHT, t], kind)
        for i in range(count):
            for r in range(rows):
                out[first + i] += _dot_row(g, p, offset + i * step + r * row_step, length)


@_plain
def products(work, *arguments):
    """Add up gradient times weight of every bin."""
    share(_products, work, arguments)


@_reduced
def _enter_row(g, m, v, d, start, length, s, constants):
    w1, b2, w2, unbias1, unbias2, eps = constants
    for j in range(start, start + length):
        x, m0 = load(g, j) * s, load(m, j)
        m1 = m0 + w1 * (x - m0)
        store(m, j, m1)
        ahead = m1 + w1 * (x - m1)
        if v is not None:
            v1 = load(v, j) * b2 + x * x * w2
            store(v, j, v1)
            ahead = ahead * unbias1 / (math.sqrt(v1) * unbias2 + eps)
        store(d, j, ahead)


@_reduced
def _copy_row(m, d, start, length):
    for j in range(start, start + length):
        store(d, j, load(m, j))


@_reduced
def _enter(c, worker, kind, entries, chunks, bases, numbers, scales, finite):
    for e in range(chunks[c], chunks[c + 1]):
        first, count, t, offset, step, rows, row_step, length = _entry(entries, e)
        if bases[GRADIENT, t] == 0:
            continue
        g, m = pointer(bases[GRADIENT, t], kind), pointer(bases[FIRST_MOMENT, t], kind)
        v, d = pointer(bases[SECOND_MOMENT, t], kind), pointer(bases[DIRECTION, t], kind)
        constants = (
            narrow(g, numbers[t, W1]),
            narrow(g, numbers[t, BETA2]),
            narrow(g, numbers[t, W2]),
            narrow(g, numbers[t, UNBIAS1]),
            narrow(g, numbers[t, UNBIAS2]),
            narrow(g, numbers[t, EPS]),
        )
        for i in range(count):
            b, at = first + i, offset + i * step
            s = narrow(g, scales[b] * numbers[t, SIGN])
            for r in range(rows):
                start = at + r * row_step
                if finite[b] == 0.0:
                    _copy_row(m, d, start, length)
                elif numbers[t, IS_ADAM] > 0.0:
                    _enter_row(g, m, v, d, start, length, s, constants)
                else:
                    _enter_row(g, m, None, d, start, length, s, constants)


@_plain
def enter(work, *arguments):
    """Enter bounded gradients into the memories; write what lies ahead of the momentum, or Adam's direction."""
    share(_enter, work, arguments)


@_reduced
def _step_row(p, d, start, length, shrink, rate):
    part = narrow(p, 0.0)
    for j in range(start, start + length):
        fresh = load(p, j) * shrink - rate * load(d, j)
        store(p, j, fresh)
        part += fresh * fresh
    return np.float64(part)


@_reduced
def _scale_row(p, start, length, factor):
    for j in range(start, start + length):
        store(p, j, load(p, j) * factor)


@_reduced
def _apply(c, worker, kind, entries, chunks, bases, numbers, norms, lengths, finite, most, grown):
    for e in range(chunks[c], chunks[c + 1]):
        first, count, t, offset, step, rows, row_step, length = _entry(entries, e)
        if bases[GRADIENT, t] == 0:
            continue
        p, d = pointer(bases[WEIGHT, t], kind), pointer(bases[DIRECTION, t], kind)
        root = math.sqrt(rows * length)
        shrink = narrow(p, 1.0 - numbers[t, DECAY])
        for i in range(count):
            b, at = first + i, offset + i * step
            if finite[b] == 0.0 or (norms[b] == 0.0 and numbers[t, IS_ADAM] == 0.0):
                continue
            ahead2 = _bin_square(d, at, rows, row_step, length)
            if not ahead2 > 0.0:
                continue
            if most[b] == 0.0 or lengths[b] > WRITTEN * most[b]:
                most[b] = max(lengths[b], numbers[t, LONGEST])
            grown[b] = 1.0
            floor = root if numbers[t, IS_ADAM] > 0.0 else 1e-30
            long = max(lengths[b], numbers[t, LEAST] * root)
            rate = narrow(p, numbers[t, SHARE] * long / max(math.sqrt(ahead2), floor))
            fresh2 = 0.0
            for r in range(rows):
                fresh2 += _step_row(p, d, at + r * row_step, length, shrink, rate)
            if numbers[t, LONGEST] < np.inf and fresh2 > most[b] * most[b]:
                grown[b] = 2.0
                fresh2 = _bin_square(p, at, rows, row_step, length)
                factor = narrow(p, most[b] / math.sqrt(fresh2))
                for r in range(rows):
                    _scale_row(p, at + r * row_step, length, factor)


@_plain
def apply(work, *arguments):
    """Move every bin by its share, and draw back what has grown beyond its longest length.

    ``grown`` (B,): 1 where a bin has moved, 2 where it was drawn back.
    """
    share(_apply, work, arguments)


@_reduced
def _turn(c, worker, kind, entries, chunks, bases, numbers, norms, cosines):
    for e in range(chunks[c], chunks[c + 1]):
        first, count, t, offset, step, rows, row_step, length = _entry(entries, e)
        if bases[GRADIENT, t] == 0:
            continue
        g, d = pointer(bases[GRADIENT, t], kind), pointer(bases[DIRECTION, t], kind)
        for i in range(count):
            b, at = first + i, offset + i * step
            ahead2, dot = _bin_square(d, at, rows, row_step, length), 0.0
            if norms[b] > 0.0 and ahead2 > 0.0:
                for r in range(rows):
                    dot += _dot_row(g, d, at + r * row_step, length)
                cosines[b] = numbers[t, SIGN] * dot / (norms[b] * math.sqrt(ahead2))


@_plain
def turn(work, *arguments):
    """Write the cosines of the angles between gradients and directions; nan where one of them is zero."""
    share(_turn, work, arguments)


class CompiledShare(ShareUpdate):
    """One share step in compiled loops; where that cannot be, by the definition.

    It cannot be for half precision, for memory that is not contiguous, under a GradScaler, for budgets that look
    beyond a bin, and for directions from outside.
    """

    def __init__(self, split: Split, kinds: list[Kind], collective: Collective, clock: Clock, series: Series) -> None:
        super().__init__(split, kinds, collective, clock, series)
        plan = split.plan
        lines = lines_of(split.gradient_budgets)
        known = all(type(DIRECTIONS[kind.direction]) in (Adam, Orthogonal) for kind in kinds)
        self._fits = lines is not None and known
        self._lines = line_table(lines or (), plan.width_T)
        self._tensors = self._tensor_B.numpy()
        self._numel_B = np.asarray(plan.numel_B, dtype=np.float64)
        self._tables: list[tuple[torch.dtype, Any]] = []
        self._forms: list[Any] = []
        self._ahead: list[Tensor] = []  # the direction of each tensor, kept from step to step
        self._stacks: list[tuple[Tensor, list[int]]] = []  # stacks of equal blocks, and their tensors
        self._others: list[int] = []  # orthogonal tensors with blocks of other forms
        self._addresses: tuple[bytes, bool] = (b"", True)

    def step(
        self,
        gradients: list[Tensor | None],
        states: list[dict[str, Any]],
        groups: list[dict[str, Any]],
        scaling: Scaling | None = None,
    ) -> None:
        """See `ShareUpdate.step`."""
        weights = self.split.parameters
        if scaling is not None or torch.compiler.is_compiling() or not self._prepare(weights):
            super().step(gradients, states, groups, scaling)
            return
        plain = [
            None if g is None else g.reshape(w.shape).contiguous() for g, w in zip(gradients, weights, strict=True)
        ]
        fits = all(
            g is None or (g.dtype == w.dtype and all(v.dtype == w.dtype for k, v in state.items() if k != "step"))
            for g, w, state in zip(plain, weights, states, strict=True)
        )
        if not fits:
            super().step(gradients, states, groups, scaling)
            return
        present = [None if g is None else w for g, w in zip(plain, weights, strict=True)]
        squares_B, weight_squares_B = self.split.kernel.squares_many([plain, [*weights]])
        out = self._decide(squares_B.numpy(), weight_squares_B.numpy())
        bases = self._bases(present, plain, states)
        euler = np.zeros(len(squares_B))
        threads = threads_for(sum(table.num_elements for _, table in self._tables)) if self._apart(bases) else 1
        run([(products, (KINDS[d], t.entries, t.chunks, bases, euler)) for d, t in self._tables], threads)
        lr_B = np.array([float(group["lr"]) for group in groups])[self._tensors]
        of_step = np.where(out[4] > 0, euler, 0.0), out[0], out[3], lr_B
        factors = self._factor_T(*map(torch.from_numpy, of_step)).tolist()
        numbers = self._numbers(states, groups, factors)
        calls: list[Call] = [
            (enter, (KINDS[d], t.entries, t.chunks, bases, numbers, out[2], out[4])) for d, t in self._tables
        ]
        run(calls, threads)
        self._orthogonalise(bases)
        cosines, grown = np.full(len(squares_B), np.nan), np.zeros(len(squares_B))
        if self.measures:
            run([(turn, (KINDS[d], t.entries, t.chunks, bases, numbers, out[0], cosines)) for d, t in self._tables], 1)
        self.cosine_B = torch.from_numpy(cosines) if self.measures else None
        most = self.most_B.numpy()
        calls = [
            (apply, (KINDS[d], t.entries, t.chunks, bases, numbers, out[0], out[3], out[4], most, grown))
            for d, t in self._tables
        ]
        run(calls, threads)
        self.moved_B, self.grown_B = torch.from_numpy(grown > 0), torch.from_numpy(grown > 1)
        moved = [w for w in present if w is not None]
        bump_versions([*moved, *(v for state in states for k, v in state.items() if k != "step")])

    def _decide(self, squares: np.ndarray, weights: np.ndarray) -> np.ndarray:
        recent = self.recent_B.numpy()
        ratio = np.empty(len(squares))
        ratios(squares, recent, ratio)
        median = float(self.collective.median(torch.from_numpy(ratio)))
        fired = median > COLLECTIVE
        factor = 1.0 / median if fired else 1.0
        seen = float(self.seen_steps)
        out = np.empty((5, len(squares)))
        falls = min(FALLS, seen / (seen + 2))
        decide(
            *(squares, weights, fired, factor, falls, recent),
            *(self._tensors, self._numel_B, self._lines, out),
        )
        self.seen_steps += bool((out[0] > 0).any())
        self.collected = torch.tensor(factor, dtype=torch.float64)
        norm_B, limit_B, scale_B, _, finite_B = (torch.from_numpy(row) for row in out)
        self.decision = Decision(self.split.plan, norm_B, finite_B > 0, scale_B, (("bin", None, limit_B),))
        return out

    def _prepare(self, weights: list[Tensor]) -> bool:
        """Lower the plan for the weights as they lie; False where the loops cannot walk them."""
        forms = [(type(w), w.dtype, w.shape, w.is_contiguous()) for w in weights]
        if forms == self._forms:
            return bool(self._tables)
        self._forms, self._tables = forms, []
        plain = (torch.float32, torch.float64)
        if not self._fits or not all(w.dtype in plain and w.is_contiguous() for w in weights):
            return False
        if any(w.numel() and obstacle(w) for w in weights):
            return False
        tables = []
        for dtype in sorted({w.dtype for w in weights}, key=str):
            strides = [w.stride() if w.dtype == dtype else None for w in weights]
            table = lower(self.split.plan, strides, bands=False, cut_bins=False)
            if table is None or not table.whole_bins:
                return False
            tables.append((dtype, table))
        self._tables = tables
        self._make_room(weights)
        return True

    def _make_room(self, weights: list[Tensor]) -> None:
        """One buffer per tensor for its direction; equal blocks of matrices lie together in one stack."""
        self._ahead, self._stacks, self._others = [torch.empty(0)] * len(weights), [], []
        alike: dict[tuple[Any, ...], list[int]] = {}
        for t, (w, kind) in enumerate(zip(weights, self.kinds, strict=True)):
            if kind.direction == "orthogonal" and not kind.boxes and not kind.is_complex and w.numel():
                alike.setdefault((kind.rows // kind.blocks, kind.cols, w.dtype), []).append(t)
            else:
                self._ahead[t] = torch.zeros_like(w)
                if kind.direction == "orthogonal" and w.numel():
                    self._others.append(t)
        for (rows, cols, dtype), at in alike.items():
            stack = torch.zeros(sum(self.kinds[t].blocks for t in at), rows, cols, dtype=dtype)
            start = 0
            for t in at:
                stop = start + self.kinds[t].blocks
                self._ahead[t] = stack[start:stop]
                start = stop
            self._stacks.append((stack, at))

    def _orthogonalise(self, bases: np.ndarray) -> None:
        """Make the stacks orthogonal in place, those of which a tensor has a gradient."""
        for stack, at in self._stacks:
            if bases[0, at].any():
                stack.copy_(orthogonalised(stack))
        others = [t for t in self._others if bases[0, t]]
        if others:
            kinds = [self.kinds[t] for t in others]
            matrices = [self._ahead[t].view(1, kind.rows, -1) for t, kind in zip(others, kinds, strict=True)]
            turns = [
                Turn(m, {}, None, {}, k.blocks, k.boxes, k.is_complex) for m, k in zip(matrices, kinds, strict=True)
            ]
            Orthogonal.orthogonalise_(matrices, turns)

    def _bases(
        self, weights: list[Tensor | None], gradients: list[Tensor | None], states: list[dict[str, Any]]
    ) -> np.ndarray:
        """Addresses of weights, gradients, both memories and directions, (5, T); 0 for a tensor without a gradient."""
        bases = np.zeros((5, len(weights)), dtype=np.int64)
        for t, (w, g) in enumerate(zip(weights, gradients, strict=True)):
            if w is None or g is None or not w.numel():
                continue
            first, *second = (states[t][name] for name in DIRECTIONS[self.kinds[t].direction].memory)
            bases[:, t] = (
                *(w.data_ptr(), g.data_ptr(), first.data_ptr()),
                *(second[0].data_ptr() if second else first.data_ptr(), self._ahead[t].data_ptr()),
            )
        return bases

    def _apart(self, bases: np.ndarray) -> bool:
        """Whether no two parameters share memory; looked at once for the same addresses."""
        key = bases[0].tobytes()
        if self._addresses[0] != key:
            self._addresses = (key, not overlap(self.split.parameters))
        return self._addresses[1]

    def _numbers(self, states: list[dict[str, Any]], groups: list[dict[str, Any]], factors: list[float]) -> np.ndarray:
        """The constants of each tensor's step, (T, 12), see `COLUMNS`."""
        numbers, pace = np.zeros((len(states), len(COLUMNS))), float(self.clock.pace())
        for t, (state, group, kind, factor) in enumerate(zip(states, groups, self.kinds, factors, strict=True)):
            if not state:
                continue
            (beta1, beta2), adam = group["betas"], kind.direction == "adam"
            tau = float(group["lr"]) * (pace * factor) * kind.share
            count = max(float(state["step"]), 1.0) if adam else 1.0
            numbers[t] = (
                *(tau, tau * group["weight_decay"], kind.least, kind.longest, adam, -1.0 if group["maximize"] else 1.0),
                *(1 - beta1, beta2, 1 - beta2, 1 / (1 - beta1**count), 1 / math.sqrt(1 - beta2**count), group["eps"]),
            )
        return numbers
