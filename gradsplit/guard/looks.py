"""Looks: losses and zeroed bins as they arise, read together once every few steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..record import StepRecord
from .agreement import Agreement

__all__ = ["Looks"]


class Looks:
    """Keep a loss and the share of bins ZEROED a step, on their device, and copy them to the host when asked.

    Args:
        agreement: over processes, which then all read the means.
    """

    def __init__(self, agreement: Agreement) -> None:
        self._agreement = agreement
        self._kept: list[tuple[Tensor | float, Tensor | float]] = []

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, loss: Tensor | float, record: StepRecord | None, *, copy: bool) -> None:
        """Add a step.

        Args:
            loss: a number, or a tensor of one entry.
            record: of the splitter, if there is one.
            copy: keep a copy of the loss, since it is read at a later step.
        """
        if isinstance(loss, Tensor):
            loss = loss.detach().reshape(())
            loss = loss.clone() if copy else loss
        zeroed: Tensor | float = 0.0
        if record is not None:
            zeroed = (~record.decision.finite_B).to(torch.float32).mean()
        self._kept.append((loss, zeroed))

    def take(self) -> list[tuple[float, float]]:
        """Return loss and share of every step, and start anew. Waits for the device."""
        kept, self._kept = self._kept, []
        alone = self._agreement.num_processes == 1
        if alone and (len(kept) == 1 or not any(isinstance(value, Tensor) for look in kept for value in look)):
            return [(float(loss), float(zeroed)) for loss, zeroed in kept]
        device = next((v.device for look in kept for v in look if isinstance(v, Tensor)), torch.device("cpu"))
        dtype = torch.float32 if device.type == "mps" else torch.float64
        table = torch.stack(
            [torch.as_tensor(value, dtype=dtype, device=device) for look in kept for value in look]
        ).reshape(len(kept), 2)
        return [(loss, zeroed) for loss, zeroed in self._agreement.mean(table).tolist()]

    def state_dict(self) -> dict[str, Any]:
        """Return what has not been looked at, as plain numbers."""
        return {"kept": [[float(loss), float(zeroed)] for loss, zeroed in self._kept]}

    def load_state_dict(self, state: dict[str, Sequence[Sequence[float]]]) -> None:
        """Undo `state_dict`."""
        self._kept = [(float(loss), float(zeroed)) for loss, zeroed in state["kept"]]
