# mypy: disable-error-code="no-untyped-def"
"""The share step by Triton programs: a few launches for all tensors, and Newton-Schulz in batched products per shape.

`measure` reads gradients and weights, `decide` works on the vectors of all bins, `enter` writes what lies ahead of the
momentum of matrices, and `commit` writes memories and weights. All that needs memory is done before `commit`, the one
that writes. So memory that runs out, or a product that fails, leaves weights and memories as they were.

Checked against the definition in Triton's interpreter on the CPU, and on no graphics card. So the programs are tried
beside the definition on every new kind of device, before they work there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ...amp import Scaling
from ...budget import Decision, Relative
from ...budget.lines import line_table, lines_of
from ...collective import COLLECTIVE, Collective
from ...kernels.addressable import bump_versions, obstacle, overlap, warn_of_fallback
from ...kernels.selfcheck import is_sound
from ...plan import Layout, pattern_of, xsp
from ...rates import Clock
from ...series import Series
from ...split import Split
from ..directions import DIRECTIONS, Adam, Orthogonal, Turn, orthogonalised, product_dtype
from ..kinds import Kind
from ..share import ShareUpdate
from . import share_programs as programs
from .compiled import FIRST_MOMENT, GRADIENT, SECOND_MOMENT, WEIGHT

__all__ = ["LONGEST", "TritonShare"]

LONGEST = 1 << 20
"""Elements of the largest bin that one program takes; beyond, most of the device would wait for it."""

_KINDS: dict[torch.dtype, tuple[Any, Any, torch.dtype]] = {
    torch.float32: (tl.float32, tl.float32, torch.float32),
    torch.float64: (tl.float64, tl.float64, torch.float64),
    torch.bfloat16: (tl.bfloat16, tl.float32, torch.float32),
    torch.float16: (tl.float16, tl.float32, torch.float32),
}
"""Each dtype's element type, the one of its memories, in which is computed, and torch's name of that."""

_NARROW = {torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16}


class _Table(NamedTuple):
    """Bins that the same programs serve: (bins, `COLUMNS`) on the device, and what the programs are made for."""

    bins: Tensor
    adam: bool
    plain: bool
    dtype: torch.dtype
    narrow: torch.dtype


class _Room(NamedTuple):
    """What is made once for weights of these dtypes and strides.

    Attributes:
        tables: of all bins.
        ahead: what lies ahead of the momentum of each orthogonal tensor; None for the others.
        stacks: equal blocks of matrices beside each other, and whose they are.
        others: orthogonal tensors with blocks of other forms, or of complex numbers.
    """

    tables: list[_Table]
    ahead: list[Tensor | None]
    stacks: list[tuple[Tensor, list[int]]]
    others: list[int]


class TritonShare(ShareUpdate):
    """One share step by the programs of this module; where that cannot be, by the definition.

    It cannot be for bins that are no runs of whole rows, for directions from outside, and for parameters that share
    memory or have no memory of their own.
    """

    def __init__(self, split: Split, kinds: list[Kind], collective: Collective, clock: Clock, series: Series) -> None:
        super().__init__(split, kinds, collective, clock, series)
        plan, self._device = split.plan, split.kernel.device
        self._lines = lines_of(split.gradient_budgets)
        self._line_table = self._here(line_table(self._lines or (), plan.width_T))
        self._numel_B = self._here(np.asarray(plan.numel_B, dtype=np.float64))
        self._known: tuple[Any, _Room | None] = (None, None)
        self._sent: dict[str, tuple[Any, Tensor]] = {}
        self._spare: list[Tensor] = []
        self._apart: tuple[Any, bool] = (None, True)
        self._warned = False

    def step(
        self,
        gradients: list[Tensor | None],
        states: list[dict[str, Any]],
        groups: list[dict[str, Any]],
        scaling: Scaling | None = None,
    ) -> None:
        """See `ShareUpdate.step`."""
        if torch.compiler.is_compiling() or not self._serves(gradients, states):
            super().step(gradients, states, groups, scaling)
            return
        with torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext():
            self._step(gradients, states, groups, scaling)

    def _step(
        self,
        gradients: list[Tensor | None],
        states: list[dict[str, Any]],
        groups: list[dict[str, Any]],
        scaling: Scaling | None,
    ) -> None:
        split, weights, room = self.split, self.split.parameters, self._known[1]
        assert room is not None and split.rates is not None
        num_tensors, num_bins = len(weights), split.plan.num_bins
        sizes = (num_tensors, num_bins)
        gradients = [None if g is None else g.reshape(w.shape) for g, w in zip(gradients, weights, strict=True)]
        gradients = [
            g
            if g is None or g.stride() == w.stride()
            else torch.empty_strided(w.shape, w.stride(), dtype=g.dtype, device=g.device).copy_(g)
            for g, w in zip(gradients, weights, strict=True)
        ]
        gradients = [None if w.numel() == 0 else g for g, w in zip(gradients, weights, strict=True)]
        addresses = self._addresses(room, weights, gradients, states)
        constants, rates, unbias = self._numbers(gradients, states, groups)
        pace = self._number(self.clock.pace()) if self.clock.steps else self._send("pace", 1.0)
        unscale = self._unscale(scaling)
        vectors = torch.empty((programs.ROWS, num_bins), dtype=torch.float64, device=self._device)
        moved = torch.zeros(num_bins, dtype=torch.int8, device=self._device)
        cosine_B = torch.full_like(self.most_B, torch.nan) if self.measures else None
        for table in room.tables:
            programs.measure[(len(table.bins),)](
                *(table.bins, addresses, self.recent_B, unscale, vectors, *sizes),
                *(_KINDS[table.dtype][0], table.plain, programs.BLOCK),
            )
        history = split.gradient.history
        try:
            decision, seen_steps = self._decide(vectors, num_tensors)
            rates = rates * self._factor_T(
                *(vectors[programs.EULER.value], vectors[programs.NORM.value], vectors[programs.LENGTH.value]),
                rates.index_select(0, self._tensor_B),
            )
            for table in room.tables:
                if not table.adam:
                    programs.enter[(len(table.bins),)](
                        *(table.bins, addresses, constants, unscale, vectors, *sizes),
                        *(*_KINDS[table.dtype][:2], _NARROW[table.narrow], table.plain, programs.BLOCK),
                    )
            self._orthogonalise(room, gradients)
        except BaseException:
            split.gradient.history = history
            raise
        for table in room.tables:
            programs.commit[(len(table.bins),)](
                *(
                    table.bins,
                    addresses,
                    constants,
                    unscale,
                    vectors,
                    rates,
                    pace,
                    unbias,
                    self.most_B,
                    moved,
                    cosine_B if cosine_B is not None else self.most_B,
                    *sizes,
                ),
                *(
                    table.adam,
                    self.measures,
                    *_KINDS[table.dtype][:2],
                    _NARROW[table.narrow],
                    table.plain,
                    programs.BLOCK,
                ),
            )
        self._remember(vectors[programs.RECENT.value], seen_steps, history, groups)
        self.decision, self.moved_B, self.grown_B, self.cosine_B = decision, moved > 0, moved > 1, cosine_B
        written = [w for w, g in zip(weights, gradients, strict=True) if g is not None]
        bump_versions([*written, *(v for state in states for k, v in state.items() if k != "step")])

    def _decide(self, vectors: Tensor, num_tensors: int) -> tuple[Decision, Tensor]:
        """Fill the vectors of the decision: by one program where each limit needs its bin alone, else in torch."""
        split, num_bins = self.split, self.split.plan.num_bins
        if self._lines is None:
            decision, length_B, recent_B, seen_steps = self._bound(vectors[0], vectors[1], None)
            rows = (decision.norm_B, decision.limit_B, decision.scale_B, length_B, decision.finite_B, recent_B)
            torch._foreach_copy_(list(vectors[programs.NORM.value :].unbind()), [row.to(vectors.dtype) for row in rows])
            return decision, seen_steps
        median = self.collective.median(vectors[programs.RATIO.value])
        programs.decide[(triton.cdiv(num_bins, programs.BLOCK),)](
            *(vectors, median, self.seen_steps, self.recent_B, self._tensor_B, self._numel_B, self._line_table),
            *(num_tensors, num_bins, len(self._lines), programs.BLOCK),
        )
        norm_B, limit_B, scale_B = vectors[programs.NORM.value : programs.SCALE.value + 1].unbind()
        self.collected = torch.where(median > COLLECTIVE, 1 / median, 1.0)
        decision = Decision(split.plan, norm_B, vectors[programs.FINITE.value] > 0, scale_B, (("bin", None, limit_B),))
        return decision, self.seen_steps + (norm_B > 0).any()

    def _orthogonalise(self, room: _Room, gradients: list[Tensor | None]) -> None:
        """Make orthogonal what lies ahead, the stacks of which a tensor has a gradient."""
        for stack, at in room.stacks:
            if any(gradients[t] is not None for t in at):
                stack.copy_(orthogonalised(stack))
        others = [t for t in room.others if gradients[t] is not None]
        if others:
            kinds = [self.kinds[t] for t in others]
            matrices = [room.ahead[t].view(1, kind.rows, -1) for t, kind in zip(others, kinds, strict=True)]  # type: ignore[union-attr]
            Orthogonal.orthogonalise_(
                matrices,
                [Turn(m, {}, None, {}, k.blocks, k.boxes, k.is_complex) for m, k in zip(matrices, kinds, strict=True)],
            )

    def _serves(self, gradients: list[Tensor | None], states: list[dict[str, Any]]) -> bool:
        """Whether the programs can do this step; if not, the reason is told once."""
        weights, names = self.split.parameters, self.split.plan.layout.names
        signature = [(w.dtype, w.shape, w.stride()) for w in weights]
        if self._known[0] != signature:
            self._known = (signature, self._make_room(weights))
        if self._known[1] is None:
            return False
        for name, w, g, state in zip(names, weights, gradients, states, strict=True):
            if g is None or not w.numel():
                continue
            wide = _KINDS[w.dtype][2]
            odd = [k for k, v in state.items() if k != "step" and (v.dtype != wide or not v.is_contiguous())]
            reason = obstacle(w, self._device.type) or obstacle(g, self._device.type)
            reason = reason or (f"its dtype is {w.dtype}, its gradient's {g.dtype}" if g.dtype != w.dtype else "")
            reason = reason or (f"its memory {odd[0]!r} is not {wide} without gaps" if odd else "")
            if reason:
                return self._refuse(name, reason)
        places = [w.data_ptr() for w in weights]
        if self._apart[0] != places:
            self._apart = (places, not overlap([w for w in weights if w.numel()]))
        return self._apart[1] or self._refuse(names[0], "it or a parameter beside it shares memory with another")

    def _refuse(self, name: str, reason: str) -> bool:
        if not self._warned:
            self._warned = True
            warn_of_fallback("GSO's Triton step", name, reason, "Mend that, or use backend='eager'.")
        return False

    def _make_room(self, weights: list[Tensor]) -> _Room | None:
        """Lay out the bins, and room for what lies ahead; None where the programs cannot serve these weights."""
        kinds, names = self.kinds, self.split.plan.layout.names
        made: dict[tuple[Any, ...], list[np.ndarray]] = {}
        alike: dict[tuple[Any, ...], list[int]] = {}
        ahead: list[Tensor | None] = [None] * len(weights)
        others = []
        for t, (w, kind) in enumerate(zip(weights, kinds, strict=True)):
            if not w.numel():
                continue
            direction = DIRECTIONS[kind.direction]
            if type(direction) not in (Adam, Orthogonal):
                self._refuse(names[t], f"its direction {kind.direction!r} comes from outside")
                return None
            bins, plain = _bins_of(self.split, t, w)
            if w.dtype not in _KINDS or bins is None:
                self._refuse(
                    names[t],
                    f"its dtype is {w.dtype}"
                    if bins is not None
                    else f"its bins are no runs of rows of at most {LONGEST} elements",
                )
                return None
            if not self._is_sound(w.dtype):
                return None
            adam, wide = type(direction) is Adam, _KINDS[w.dtype][2]
            narrow = wide
            if not adam and not kind.boxes and not kind.is_complex:
                narrow = self._narrow(wide)
                alike.setdefault((kind.rows // kind.blocks, kind.cols, narrow), []).append(t)
            elif not adam:
                ahead[t] = torch.zeros(w.shape, dtype=wide, device=w.device)
                others.append(t)
            made.setdefault((adam, plain, w.dtype, narrow), []).append(bins)
        stacks = []
        for (rows, cols, narrow), at in alike.items():
            stack = torch.zeros((sum(kinds[t].blocks for t in at), rows, cols), dtype=narrow, device=self._device)
            for t, part in zip(at, stack.split([kinds[t].blocks for t in at]), strict=True):
                ahead[t] = part
            stacks.append((stack, at))
        tables = [_Table(self._here(np.concatenate(bins)), *key) for key, bins in made.items()]
        if self._device.type == "cuda" and not self._spare:  # a captured graph reads these again at every replay
            self._spare = [
                torch.empty((programs.AHEAD + 1, len(weights)), dtype=torch.int64).pin_memory() for _ in range(4)
            ]
        return _Room(tables, ahead, stacks, others)

    def _is_sound(self, dtype: torch.dtype) -> bool:
        """Whether the programs make the definition's step here; tried once per process, device and dtype."""
        device, by_name = self._device, self.split.kernel.by_name
        return is_sound("triton: share step", device, dtype, partial(_trial, device, dtype), by_name=by_name)

    def _narrow(self, wide: torch.dtype) -> torch.dtype:
        """The dtype of the products of Newton-Schulz."""
        return product_dtype(wide, self._device)

    def _addresses(
        self,
        room: _Room,
        weights: list[Tensor],
        gradients: list[Tensor | None],
        states: list[dict[str, Any]],
    ) -> Tensor:
        """Addresses of weights, gradients, both memories and what lies ahead, (5, T); 0 where there is none."""
        rows = [[0] * len(weights) for _ in range(programs.AHEAD + 1)]
        for t, (w, g) in enumerate(zip(weights, gradients, strict=True)):
            if g is not None or self._looks_above:
                rows[WEIGHT][t] = w.data_ptr()
            if g is None:
                continue
            memories = [states[t][name].data_ptr() for name in DIRECTIONS[self.kinds[t].direction].memory]
            rows[GRADIENT][t], rows[FIRST_MOMENT][t], rows[SECOND_MOMENT][t] = g.data_ptr(), memories[0], memories[-1]
            place = room.ahead[t]
            rows[programs.AHEAD][t] = 0 if place is None else place.data_ptr()
        if self._spare and rows != self._sent.get("addresses", (None,))[0] and torch.cuda.is_current_stream_capturing():
            host = self._spare.pop()  # and never written again
            host.copy_(torch.tensor(rows, dtype=torch.int64))
            self._sent["addresses"] = (rows, host.to(self._device, non_blocking=True))
        return self._send("addresses", rows, torch.int64)

    def _numbers(
        self, gradients: list[Tensor | None], states: list[dict[str, Any]], groups: list[dict[str, Any]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The constants (T, 10), the shares (T,) and what corrects the means of Adam (2, T); nothing waits."""
        rows = [
            (
                *(kind.share, group["weight_decay"], kind.least, kind.longest),
                *(float(DIRECTIONS[kind.direction].keeps_length), -1.0 if group["maximize"] else 1.0),
                *(1 - group["betas"][0], group["betas"][1], 1 - group["betas"][1], max(group["eps"], 1e-30)),
            )
            for kind, group in zip(self.kinds, groups, strict=True)
        ]
        rates = [group["lr"] for group in groups]
        if any(isinstance(rate, Tensor) for rate in rates):
            known = {key: self._number(rate) for key, rate in {id(rate): rate for rate in rates}.items()}
            rate_T = torch.stack([known[id(rate)] for rate in rates])
        else:
            rate_T = self._send("rates", rates)
        counts = [state["step"] for g, state in zip(gradients, states, strict=True) if g is not None]
        if len({count.device for count in counts}) > 1:
            counts = [count.to(self._device) for count in counts]
        none = counts[0]
        given = iter(counts)
        count_T = torch.stack([none if g is None else next(given) for g in gradients])
        count_T = count_T.to(self._device, torch.float64, non_blocking=True).clamp_(min=1)
        betas = self._send("betas", [[group["betas"][i] for group in groups] for i in range(2)])
        return self._send("constants", rows), rate_T, 1 - betas**count_T

    def _number(self, value: Any) -> Tensor:
        """A 0-d float64 on the device."""
        if isinstance(value, Tensor):
            return value.to(self._device, torch.float64, non_blocking=True).reshape(())
        return torch.full((), value, dtype=torch.float64, device=self._device)

    def _unscale(self, scaling: Scaling | None) -> Tensor:
        """What gradients are multiplied by, and a number above 0 on an overflow."""
        if scaling is None:
            return self._send("unscale", [1.0, 0.0])
        inverse = self._number(1.0) if scaling.scale is None else self._number(scaling.scale).reciprocal()
        return torch.stack([inverse, self._number(scaling.overflow(None))])

    def _send(self, name: str, rows: Any, dtype: torch.dtype = torch.float64) -> Tensor:
        """Numbers on the device, sent again only where they have changed."""
        if name not in self._sent or self._sent[name][0] != rows:
            self._sent[name] = (rows, torch.tensor(rows, dtype=dtype).to(self._device, non_blocking=True))
        return self._sent[name][1]

    def _here(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self._device)


def _bins_of(split: Split, t: int, weight: Tensor) -> tuple[np.ndarray | None, bool]:
    """The bins of a tensor with the columns of the programs, and whether it lies in memory without gaps, row by row.

    None for the bins: they are no runs of rows, too large, or the weights lie in another order than programs can walk.
    """
    cut, ids = pattern_of(split.plan, t)
    plan, rows, cols = split.plan, split.plan.layout.rows[t], split.plan.layout.cols[t]
    places = _order_of(weight)
    if places is None or cut not in ("tensor", "rows", "cols") or (cut == "cols" and rows > 1):
        return None, False
    each = {"tensor": rows * cols, "rows": cols, "cols": 1}[cut]
    flat = ids.reshape(-1)
    first = np.flatnonzero(np.concatenate(([True], flat[1:] != flat[:-1])))
    size = np.diff(np.append(first, len(flat))) * each
    if len(np.unique(flat[first])) < len(first) or size.max() > LONGEST:
        return None, False
    if (np.bincount(plan.bin_K, minlength=plan.num_bins)[flat[first]] > 1).any():
        return None, False
    made = np.empty((len(first), programs.COLUMNS.value), dtype=np.int64)
    made[:, programs.TENSOR.value], made[:, programs.BIN.value], made[:, programs.START.value] = (
        t,
        flat[first],
        first * each,
    )
    made[:, programs.SIZE.value], made[:, programs.COLS.value] = size, cols
    made[:, programs.ROW_STEP.value :] = places
    return made, weight.is_contiguous()


def _order_of(weight: Tensor) -> tuple[int, int, int, int] | None:
    """Row step, inner, fast and slow of a tensor's matrix view; None where its columns lie in more than two runs.

    >>> _order_of(torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last))
    (60, 20, 3, 1)
    >>> _order_of(torch.zeros(2, 3).t()), _order_of(torch.zeros(2, 3))
    ((1, 1, 0, 3), (3, 1, 0, 1))
    """
    shape, strides = tuple(weight.shape), weight.stride()
    inner = list(zip(shape, strides, strict=True))[1 if len(shape) > 1 else 0 :]
    runs: list[tuple[int, int]] = []
    for size, stride in inner:
        if size == 1:
            continue
        if runs and runs[-1][1] == size * stride:
            runs[-1] = (runs[-1][0] * size, stride)
        else:
            runs.append((size, stride))
    step = strides[0] if len(shape) > 1 else 0
    if len(runs) > 2:
        return None
    if len(runs) < 2:
        return step, 1, 0, runs[0][1] if runs else 1
    return step, runs[1][0], runs[1][1], runs[0][1]


class _Untried(TritonShare):
    """The step while it is tried itself; momentum as it is, since rounding decides the last digits of products."""

    def _is_sound(self, dtype: torch.dtype) -> bool:
        return True

    def _narrow(self, wide: torch.dtype) -> torch.dtype:
        return wide

    def _orthogonalise(self, room: _Room, gradients: list[Tensor | None]) -> None:
        return None


class _Momentum(Orthogonal):
    """The same direction by the definition."""

    @staticmethod
    def orthogonalise_(ahead: list[Tensor], turns: list[Turn]) -> None:
        return None


def _trial(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor]]:
    """A step of rows, turned rows, words and a vector, with rows that are not finite; then the definition's."""
    matrix: dict[str, Any] = {"direction": "orthogonal", "longest": 3.0}
    word: dict[str, Any] = {"direction": "adam"}
    shapes = {"rows": (5, 70), "turned": (9, 3), "words": (3, programs.BLOCK + 6), "bias": (7,)}
    kinds = [
        Kind("matrix", rows=5, cols=70, **matrix),
        Kind("matrix", rows=9, cols=3, **matrix),
        Kind("embedding", rows=3, cols=programs.BLOCK + 6, **word),
        Kind("vector", rows=1, cols=7, share=1 / 3, least=1.0, **word),
    ]
    runs = []
    for make in (_Untried, ShareUpdate):
        weights = [_values(shape, i, device, dtype) for i, shape in enumerate(shapes.values())]
        weights[1] = weights[1].t().contiguous().t()
        gradients = [_values(shape, 7 + i, device, dtype) for i, shape in enumerate(shapes.values())]
        gradients[0][2, 3], gradients[2][1, programs.BLOCK] = float("nan"), float("inf")
        optimizer = torch.optim.AdamW([torch.nn.Parameter(w) for w in weights], lr=0.03, capturable=False)
        plan = xsp(Layout.from_shapes(shapes))
        owners = optimizer.param_groups[0]["params"]
        tensors = [p.detach() for p in owners]
        split = Split(plan, tensors, Relative(0.2), owners=owners, backend="eager", caps_updates=True, call="GSO")
        split.read_rates(optimizer)
        update: Any = make(split, kinds, Collective(), Clock(None), Series(device))
        update.directions = {**DIRECTIONS, "orthogonal": _Momentum()}
        wide = _KINDS[dtype][2]
        states: list[dict[str, Any]] = []
        for g, kind in zip(gradients, kinds, strict=True):  # of the gradient's signs, so that nothing cancels
            held = 0.05 * g.to(wide).nan_to_num(1.0, 1.0, 1.0).contiguous()
            memories = zip(DIRECTIONS[kind.direction].memory, (held, held.square()), strict=False)
            states.append({"step": torch.full((), 3.0), **dict(memories)})
        update.step([*gradients], states, [optimizer.param_groups[0]] * len(tensors))
        found = {f"a weight of {name!r}": w for name, w in zip(shapes, tensors, strict=True)}
        for name, state in zip(shapes, states, strict=True):
            found |= {f"{key!r} of {name!r}": value for key, value in state.items()}
        runs.append(found | {f"{key!r} of the rows": value for key, value in update.state().items()})
    for what, found_here in runs[0].items():
        yield what, found_here, runs[1][what]


def _values(shape: tuple[int, ...], seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Values of both signs and several sizes, without a generator that a run may use."""
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    return (torch.sin((i + 1) * (12.9898 + seed)) * (1 + i % 7)).reshape(shape).to(device, dtype)
