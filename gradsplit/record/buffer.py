"""RowBuffer: rows as they arise, kept on the gradients' device until a sink asks; adding one never waits for it."""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor

from .rows import Rows, Stream

__all__ = ["RowBuffer"]

_LARGEST = 3.4028234e38  # of float32: a finite norm is recorded as finite


class RowBuffer:
    """A table on the device, filled row by row; `take` copies it to the host in a few transfers.

    Args:
        stream: what the rows are about.
        device: where the norms are.
        capacity: rows; `full` says when to take them.
    """

    def __init__(self, stream: Stream, device: torch.device, *, capacity: int = 64) -> None:
        self.stream, self.device, self.capacity = stream, device, capacity
        self._norm = self._table()
        self._kept = self._table() if stream.controlled else None
        # Counts as float32: exact below 2^24 bins a leaf, and one dtype to copy.
        self._scaled = self._table() if stream.controlled else None
        self._zeroed = self._table() if stream.controlled else None
        self._numbers: list[tuple[int, float, float | Tensor, float | Tensor, float | Tensor, float | Tensor]] = []

    def _table(self) -> Tensor:
        return torch.empty(self.capacity, self.stream.outline.num_leaves, dtype=torch.float32, device=self.device)

    def __len__(self) -> int:
        return len(self._numbers)

    @property
    def full(self) -> bool:
        """Whether the next row has no place."""
        return len(self) == self.capacity

    @torch.no_grad()
    def add(
        self,
        step: int,
        squares_L: Tensor,
        *,
        after_L: Tensor | None = None,
        scaled_L: Tensor | None = None,
        zeroed_L: Tensor | None = None,
        loss: float | Tensor = float("nan"),
        lr: float | Tensor = float("nan"),
        own_scale: float | Tensor = 1.0,
        skipped: float | Tensor = 0.0,
    ) -> None:
        """Add one row.

        Args:
            step: the optimizer's step.
            squares_L: (L,) sums of squares as measured, any float dtype, on the device.
            after_L: (L,) sums of squares after control, if controlled.
            scaled_L: (L,) bins scaled, if controlled.
            zeroed_L: (L,) bins zeroed, if controlled.
            loss: a number or a 0-d tensor; a tensor is copied later.
            lr: likewise.
            own_scale: likewise; the script's own factor on all gradients.
            skipped: likewise; not 0 if the step is not made.
        """
        row = len(self)
        norm_L = torch.sqrt(squares_L)
        finite_L = norm_L.clamp(max=_LARGEST)
        self._norm[row].copy_(torch.where(torch.isfinite(norm_L), finite_L, norm_L))
        if self._kept is not None and after_L is not None and self._scaled is not None and self._zeroed is not None:
            share_L = torch.sqrt(after_L / squares_L)
            # nan: nothing was there (0/0, all of it kept), or it was not finite and has been zeroed.
            absent_L = torch.where(squares_L == 0, 1.0, 0.0).to(share_L.dtype)
            self._kept[row].copy_(torch.where(torch.isfinite(share_L), share_L, absent_L).clamp(max=1.0))
            self._scaled[row].copy_(torch.zeros_like(squares_L) if scaled_L is None else scaled_L)
            self._zeroed[row].copy_(torch.zeros_like(squares_L) if zeroed_L is None else zeroed_L)
        self._numbers.append((step, time.time(), loss, lr, own_scale, skipped))

    def take(self) -> Rows | None:
        """Return all rows on the host and start anew; None if there are none. Waits for the device."""
        count = len(self)
        if not count:
            return None
        numbers, self._numbers = self._numbers, []
        step, when, loss, lr, own_scale, skipped = zip(*numbers, strict=True)

        def host(table: Tensor | None) -> np.ndarray | None:
            return None if table is None else table[:count].cpu().numpy().copy()

        norm = host(self._norm)
        assert norm is not None
        return Rows(
            self.stream,
            np.array(step, dtype=np.int64),
            np.array(when),
            _numbers(loss),
            _numbers(lr),
            _numbers(own_scale),
            (_numbers(skipped) != 0).astype(np.uint8),
            norm,
            host(self._kept),
            host(self._scaled),
            host(self._zeroed),
        )


def _numbers(values: tuple[float | Tensor, ...]) -> np.ndarray:
    """Copy numbers to the host, all tensors of one device in one transfer."""
    out = np.array([float("nan") if isinstance(value, Tensor) else value for value in values], dtype=np.float64)
    where = [i for i, value in enumerate(values) if isinstance(value, Tensor)]
    if where:
        tensors = [values[i].detach().reshape(()).to(torch.float64) for i in where]  # type: ignore[union-attr]
        out[where] = torch.stack(tensors).cpu().numpy()
    return out
