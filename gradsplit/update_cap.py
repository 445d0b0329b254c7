"""UpdateCap: bound the step of any optimizer after it was made, by comparing with a copy of the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .budget import Reading
from .plan import pattern_of
from .split import Split
from .xp import torch_xp

__all__ = ["STEPS", "UpdateCap"]

BLOCK, BLOCK_ON_DEVICE = 1 << 19, 1 << 24
"""Elements that are compared with their copy at a time: they stay in cache between measuring and drawing back. On a
device fewer launches count for more, so there it is a 32nd of all elements, up to the second number."""

STEPS = ("cap", "share")
"""What a step may be made into: at most the limit, or exactly the limit."""


class UpdateCap:
    """Draw the weights back to within the limits on the update, or out to them.

    Per bin b:

        w_b <- w_before + s_b (w_b - w_before)          "cap":   s_b = min(1, limit_b / ||w_b - w_before||)
                                                        "share": s_b = limit_b / ||w_b - w_before||

    With "share" the optimizer gives the direction alone, and every bin moves by its limit, tau of its own length. A bin
    whose gradient was zero in this step is only capped, since momentum or decay alone say nothing of a direction.

    The memory is one copy of the weights and one block beside it. The cost is two passes over the weights: the copy
    before the step, and one in which each block is measured and drawn back. Bins that are cut by a block or by a rank
    are measured first and drawn back later, which is a third pass; so are all bins where a limit needs the others.
    Decoupled weight decay is part of what is bounded here; `GSO` bounds the update apart from it.

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
        self._blocks, self._copies = _blocks_of(split), split.copies_of_tensors()

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
        if not self._before or self._before[0].dtype != weights[0].dtype:  # the model may have been cast since
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
        weights, pace_B = split.parameters, split.pace_B()
        for block in self._blocks:
            scale, finite = self._decide(block, self._measured(block, weights), pace_B)
            self._draw(block, weights, scale, finite)

    def _measured(self, block: _Block, weights: list[Tensor]) -> Tensor:
        """Squares of the update and of the weights before it, (2, b)."""
        squares = self.split.like.new_zeros(2, block.num_bins)
        for piece in block.pieces:
            now, old = piece.of(weights), piece.of(self._before)
            part = 1 / self._copies[piece.t] if block.on_ranks else 1.0
            piece.add_squares(now - old, squares[0], part)
            piece.add_squares(old, squares[1], part)
        return squares

    def _decide(self, block: _Block, squares: Tensor, pace_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors of the block's bins and whether their updates are finite, (b,) each."""
        split = self.split
        assert split.update is not None
        at = block.bins
        if block.on_ranks:
            squares = split.kernel.add_(squares)
        if not split.updates_stand_alone:
            decision = split.update.decide(squares[0], squares[1], pace_B)
            norm, finite, scale, limit = decision.norm_B, decision.finite_B, decision.scale_B, decision.limit_B
        else:
            finite = squares[0].isfinite()
            norm, weight = squares.where(squares.isfinite(), 0.0).sqrt()
            reading = Reading(norm, weight, block.numel, block.num_rows, pace_B[at].to(norm.dtype))
            limits = [budget.limits(torch_xp, reading, ()) for _, budget in split.update_budgets]
            limit = limits[0] if len(limits) == 1 else torch.stack(limits).amin(0)
            over = finite & (norm > limit)
            scale = torch.where(over, limit / norm, finite.to(norm.dtype))
        if self.step == "share":
            moves = finite & (norm > 0)
            if self._gradient_B is not None:
                gradient = self._gradient_B[at]
                moves = moves & gradient.isfinite() & (gradient > 0)
            scale = torch.where(moves, limit / torch.where(norm > 0, norm, 1.0), scale)
        return scale, finite

    def _draw(self, block: _Block, weights: list[Tensor], scale: Tensor, finite: Tensor) -> None:
        # On the CPU looking costs nothing; elsewhere it would wait for the device.
        looks = scale.device.type == "cpu"
        if looks and bool((scale == 1).all()):
            return
        undoes = not (looks and bool(finite.all()))
        for piece in block.pieces:
            if looks and bool((scale[piece.place] == 1).all()):
                continue
            now, old = piece.of(weights), piece.of(self._before)
            if undoes:
                now.copy_(torch.where(piece.factor(finite), now, old))
            # A bin whose factor is 1 keeps the optimizer's bits.
            if now.dtype in (torch.float32, torch.float64):
                torch.lerp(old, now, piece.factor(scale.to(now.dtype)), out=now)
            else:
                factor = piece.factor(scale.to(torch.float64 if now.dtype == torch.complex128 else torch.float32))
                now.copy_(torch.where(factor == 1, now, old + (now - old) * factor))


@dataclass
class _Piece:
    """A tensor, or some rows of it, and where its bins stand in a vector of bins.

    Attributes:
        t: the tensor's place in the layout.
        rows: which rows; None: all.
        kind: what tells its bins apart, as in `pattern_of`.
        place: of its rows, columns or elements in the vector; a slice where each is a bin of its own.
        shape: of one value per row, column or element, so that it broadcasts.
    """

    t: int
    rows: slice | None
    kind: str
    place: slice | Tensor
    shape: tuple[int, ...]

    def of(self, tensors: list[Tensor]) -> Tensor:
        """The piece of its tensor."""
        return tensors[self.t] if self.rows is None else tensors[self.t][self.rows]

    def add_squares(self, x: Tensor, squares: Tensor, part: float) -> None:
        """Add a part of the squares of its bins to a vector of bins."""
        x = x.abs() if x.is_complex() else x
        dtype = squares.dtype
        if self.kind == "cells" or x.dim() == 0 or (self.kind == "cols" and x.dim() == 1):
            lengths = x.reshape(-1).to(dtype)
        else:
            lengths = _lengths(x, "rows" if self.kind == "tensor" else self.kind, dtype)
            if self.kind == "tensor":
                lengths = torch.linalg.vector_norm(lengths).reshape(1)
        if isinstance(self.place, slice):
            torch.mul(lengths, lengths, out=squares[self.place])
        else:
            squares.index_add_(0, self.place, lengths.square(), alpha=part)

    def factor(self, values: Tensor) -> Tensor:
        """Values of bins in a shape that broadcasts over the piece."""
        return values[self.place].view(self.shape)


_PLAIN = (1e-15, 1e18)
"""Between these lengths, squares in float32 neither vanish nor overflow."""


def _lengths(x: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """Lengths of the rows or columns of a tensor, or of a whole vector, in another dtype.

    A norm in float64 first makes a copy of float32 numbers that is twice as large, and takes four times as long. So
    lengths of matrices are measured in float32, and again in float64 where that loses digits.
    """
    dims = {"rows": tuple(range(1, x.dim())) or None, "cols": 0}[kind]
    if x.device.type == "cpu" and x.dtype == torch.float32 and dtype == torch.float64 and x.dim() > 1:
        lengths = torch.linalg.vector_norm(x, dim=dims).reshape(-1)
        least, most = lengths.aminmax()
        if least > _PLAIN[0] and most < _PLAIN[1]:
            return lengths.to(dtype)
        if bool(((lengths == 0) | ((lengths > _PLAIN[0]) & (lengths < _PLAIN[1]))).all()):
            return lengths.to(dtype)
    return torch.linalg.vector_norm(x, dim=dims, dtype=dtype).reshape(-1)


@dataclass
class _Block:
    """Pieces that are decided on together.

    Attributes:
        pieces: what is measured and drawn back.
        bins: (b,) which bins they make up.
        num_bins: b.
        numel, num_rows: (b,) sizes of these bins.
        on_ranks: other ranks hold parts of them, so that squares are added over the ranks.
    """

    pieces: list[_Piece]
    bins: Tensor
    num_bins: int
    numel: Tensor
    num_rows: Tensor
    on_ranks: bool


class _Cut(NamedTuple):
    """A piece that has no place yet: the bins of its rows, columns or elements, and how many elements it has."""

    t: int
    rows: slice | None
    kind: str
    ids: np.ndarray
    shape: tuple[int, ...]
    numel: int


def _cuts(split: Split) -> list[_Cut]:
    """All that this rank holds, in pieces of at most one block, or of one row."""
    weights, cuts = split.parameters, []
    total = sum(weight.numel() for weight in weights)
    size = BLOCK if split.like.device.type == "cpu" else max(BLOCK, min(BLOCK_ON_DEVICE, total // 32))
    for t, weight in enumerate(weights):
        if not weight.numel():
            continue
        kind, bins = pattern_of(split.local_plan, t)
        shape, ids = tuple(weight.shape), bins.reshape(-1)
        one_by_one = {"tensor": (), "rows": (-1, *(1,) * (len(shape) - 1)), "cols": (1, *shape[1:])}
        if kind == "cols" and len(shape) == 1:  # a vector is one row, whose columns are its entries
            one_by_one["cols"] = (-1,)
        like = one_by_one.get(kind, (-1, *shape[1:]))
        if weight.numel() <= size or not shape:
            cuts.append(_Cut(t, None, kind, ids, like, weight.numel()))
            continue
        step = max(1, size * len(weight) // weight.numel())
        per_row = len(ids) // len(weight) if like and like[0] == -1 else 0
        for start in range(0, len(weight), step):
            rows = slice(start, min(start + step, len(weight)))
            mine = ids[rows.start * per_row : rows.stop * per_row] if per_row else ids
            cuts.append(_Cut(t, rows, kind, mine, like, weight[rows].numel()))
    return cuts


def _block(
    split: Split, cuts: list[_Cut], bins: np.ndarray | None = None, *, adds: bool = False, on_ranks: bool = False
) -> _Block:
    """Give pieces their places in the vector of some bins.

    Args:
        split: whose bins they are.
        cuts: the pieces.
        bins: of the vector, sorted; None: those of the pieces.
        adds: pieces share bins, so that each adds to what others have found.
        on_ranks: other ranks hold parts of the bins.
    """
    plan, like = split.plan, split.like
    if bins is None:
        bins = np.unique(np.concatenate([cut.ids for cut in cuts]))
    pieces = []
    for cut in cuts:
        at = np.searchsorted(bins, cut.ids)
        if not adds and bool((np.diff(at) == 1).all()):
            place: slice | Tensor = slice(int(at[0]), int(at[-1]) + 1)
        else:
            place = torch.from_numpy(at.astype(np.int32)).to(like.device)
        pieces.append(_Piece(cut.t, cut.rows, cut.kind, place, cut.shape))
    numel, num_rows = (
        torch.from_numpy(np.asarray(sizes_B, dtype=np.float64)[bins]).to(like.device, like.dtype)
        for sizes_B in (plan.numel_B, plan.num_rows_B)
    )
    return _Block(pieces, torch.from_numpy(bins).to(like.device), len(bins), numel, num_rows, on_ranks)


def _blocks_of(split: Split) -> list[_Block]:
    """Pieces side by side up to a size, each with whole bins; then the bins that are cut; then those cut by ranks."""
    cuts, all_B = _cuts(split), np.arange(split.plan.num_bins)
    if not split.updates_stand_alone:
        return [_block(split, cuts, all_B, adds=True, on_ranks=split.is_sharded)]
    count_B = np.zeros(split.plan.num_bins, dtype=np.int64)
    for cut in cuts:
        count_B[np.unique(cut.ids)] += 1
    spread_B = _with_neighbours(split.kernel.spread_B, cuts)
    lots: list[list[_Cut]] = []
    apart: list[_Cut] = []
    spread: list[_Cut] = []
    for cut in cuts:
        if spread_B[cut.ids].any():
            spread.append(cut)
        elif (count_B[cut.ids] > 1).any():
            apart.append(cut)
        elif lots and sum(other.numel for other in lots[-1]) + cut.numel <= BLOCK:
            lots[-1].append(cut)
        else:
            lots.append([cut])
    blocks = [_block(split, lot) for lot in lots]
    if apart:
        blocks.append(_block(split, apart, adds=True))
    if spread_B.any():  # on every rank, whatever it holds of them
        blocks.append(_block(split, spread, all_B, adds=True, on_ranks=True))
    return blocks


def _with_neighbours(spread_B: np.ndarray, cuts: list[_Cut]) -> np.ndarray:
    """Which bins are spread over ranks, or share a piece with one that is: a bin is decided on in one block."""
    while True:
        wider_B = spread_B.copy()
        for cut in cuts:
            wider_B[cut.ids] |= spread_B[cut.ids].any()
        if (wider_B == spread_B).all():
            return wider_B
        spread_B = wider_B
