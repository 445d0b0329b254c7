"""Where a parameter, its gradient and its moments lie in memory, for loops that walk all four together."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..kernels.walkable import DTYPES, obstacle, overlap, warn_of_fallback
from ..plan.lowering import walks
from .planned import Planned

__all__ = ["ParameterMemory"]


class ParameterMemory:
    """The memory of one part's parameters: what was found fit to be walked is not looked at again every step."""

    def __init__(self, planned: Planned) -> None:
        self.planned, self._device = planned, planned.kernel.device.type
        self._walked: list[tuple[tuple[int, ...], torch.dtype] | None] = [None] * len(planned.owners)
        self._apart = b""
        self._warned = False

    def arrays(
        self, gradients: list[Tensor | None], states: list[dict[str, Any]]
    ) -> tuple[list[Tensor | None], ...] | None:
        """Weights, gradients and moments in matching strides, or None where one of them cannot be walked."""
        weights: list[Tensor | None] = [None] * len(gradients)
        moments, spreads = weights.copy(), weights.copy()
        parameters, device, walked = self.planned.parameters, self._device, self._walked
        for t, gradient in enumerate(gradients):
            p, state = parameters[t], states[t]
            if gradient is None or p.numel() == 0:
                gradients[t] = None
                continue
            m, v = state["exp_avg"], state.get("exp_avg_sq")
            strides, dtype = p.stride(), p.dtype
            reason = ""
            if walked[t] != (strides, dtype) or not p.data_ptr():
                reason = self._obstacle(t, p)
                walked[t] = None if reason else (strides, dtype)
            reason = reason or obstacle(gradient, device) or _difference(strides, dtype, gradient, m, v)
            if reason:
                self._refuse(t, reason)
                return None
            if gradient.stride() != strides:
                gradients[t] = torch.empty_like(p).copy_(gradient)
            weights[t], moments[t] = p, m
            spreads[t] = state["bin_sq"] if v is None else v
        return weights, gradients, moments, spreads

    def _obstacle(self, t: int, p: Tensor) -> str:
        """Say why a parameter cannot be walked; empty if it can."""
        if p.dtype not in DTYPES:
            return obstacle(p, self._device) or f"its dtype is {p.dtype}"
        walked = walks(self.planned.plan, t, p.stride())
        unfit = "" if walked else f"its strides {p.stride()} have no contiguous rows the plan could cut"
        return obstacle(p, self._device) or unfit

    def _refuse(self, t: int, reason: str) -> None:
        if not self._warned:
            self._warned = True
            name = self.planned.plan.layout.names[t]
            warn_of_fallback(
                "GSO's fused update", name, reason, "Make the parameter contiguous, or say backend='eager'."
            )

    def is_apart(self, weights: list[Tensor | None], bases: np.ndarray) -> bool:
        """Whether no two parameters share memory; looked at once for the same addresses."""
        seen = bases.tobytes()
        if self._apart != seen:
            if overlap([p for p in weights if p is not None]):
                return False
            self._apart = seen
        return True


def _difference(strides: tuple[int, ...], dtype: torch.dtype, gradient: Tensor, m: Tensor, v: Tensor | None) -> str:
    """Say why a parameter, its gradient and its moments cannot be walked together; empty if they can."""
    if gradient.dtype is not dtype:
        return f"its dtype is {dtype}, its gradient's {gradient.dtype}"
    if m.stride() != strides or (v is not None and v.stride() != strides):
        return f"its strides {strides} are not those of its moments"
    if m.dtype is not dtype or (v is not None and v.dtype is not dtype):
        return f"its dtype is {dtype}, its moments' {m.dtype}"
    return ""
