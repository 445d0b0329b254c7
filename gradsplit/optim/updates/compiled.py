"""What the compiled updates share: which steps they can do, their tables, and a decision made when asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...amp import Scaling
from ...budget import Decision
from ...budget.lines import lines_of
from ...hooks import constant_while_traced
from ...kernels.addressable import DTYPES, obstacle, overlap, remedy_of, warn_of_fallback
from ...plan.lowering import is_addressable
from ...split import Split
from .reference import ReferenceUpdate

__all__ = ["NUM_NUMBERS", "CompiledUpdate", "ParameterMemory"]


class ParameterMemory:
    """Whether compiled loops may address the parameters of a split; what was found once is remembered.

    Args:
        split: the parameters.
    """

    def __init__(self, split: Split) -> None:
        self.split, self._device = split, split.kernel.device.type
        self._addressable: list[tuple[tuple[int, ...], torch.dtype] | None] = [None] * len(split.owners)
        self._apart_at = b""  # the addresses at which no two parameters shared memory
        self._warned = False

    def arrays(
        self, gradients: list[Tensor | None], states: list[dict[str, Any]]
    ) -> tuple[list[Tensor | None], ...] | None:
        """Return weights, gradients, first and second moments in equal strides; None if one is not addressable.

        A gradient of other strides is copied. A parameter without a gradient, or without elements, is left out.
        """
        weights: list[Tensor | None] = [None] * len(gradients)
        first_moments, second_moments = weights.copy(), weights.copy()
        parameters, device, addressable = self.split.parameters, self._device, self._addressable
        for t, gradient in enumerate(gradients):
            p, state = parameters[t], states[t]
            if gradient is None or p.numel() == 0:
                gradients[t] = None
                continue
            m, v = state["exp_avg"], state.get("exp_avg_sq")
            strides, dtype = p.stride(), p.dtype
            reason = ""
            if addressable[t] != (strides, dtype) or not p.data_ptr():
                reason = self._obstacle(t, p)
                addressable[t] = None if reason else (strides, dtype)
            reason = reason or obstacle(gradient, device) or _difference(strides, dtype, gradient, m, v)
            if reason:
                self._refuse(t, reason)
                return None
            if gradient.stride() != strides:
                gradients[t] = torch.empty_like(p).copy_(gradient)
            weights[t], first_moments[t] = p, m
            second_moments[t] = state["bin_sq"] if v is None else v
        return weights, gradients, first_moments, second_moments

    def _obstacle(self, t: int, p: Tensor) -> str:
        """Say why a parameter is not addressable; empty if it is."""
        if p.dtype not in DTYPES:
            return obstacle(p, self._device) or f"its dtype is {p.dtype}"
        fit = is_addressable(self.split.plan, t, p.stride())
        unfit = "" if fit else f"its strides {p.stride()} have no contiguous rows the plan could cut"
        return obstacle(p, self._device) or unfit

    def _refuse(self, t: int, reason: str) -> None:
        if not self._warned:
            self._warned = True
            name = self.split.plan.layout.names[t]
            warn_of_fallback("GSO's fused update", name, reason, remedy_of(reason))

    def is_apart(self, weights: list[Tensor | None], bases: np.ndarray) -> bool:
        """Whether no two parameters share memory; found out again only when an address has changed."""
        addresses = bases.tobytes()
        if self._apart_at != addresses:
            if overlap([p for p in weights if p is not None]):
                return False
            self._apart_at = addresses
        return True


def _difference(strides: tuple[int, ...], dtype: torch.dtype, gradient: Tensor, m: Tensor, v: Tensor | None) -> str:
    """Say why one loop cannot address a parameter, its gradient and its moments together; empty if it can."""
    if gradient.dtype is not dtype:
        return f"its dtype is {dtype}, its gradient's {gradient.dtype}"
    if m.stride() != strides or (v is not None and v.stride() != strides):
        return f"its strides {strides} are not those of its moments"
    if m.dtype is not dtype or (v is not None and v.dtype is not dtype):
        return f"its dtype is {dtype}, its moments' {m.dtype}"
    return ""


WEIGHT, GRADIENT, FIRST_MOMENT, SECOND_MOMENT = range(4)
"""The rows of ``bases`` (4, T): the addresses of each tensor's weights, gradient, first moments and second moments."""

ONE_MINUS_BETA1, BETA2, ONE_MINUS_BETA2, RATE, UNBIAS, EPS, DECAY, SIGN = range(8)
"""The columns of ``numbers`` (T, 8), each tensor's constants of a step: RATE is ``lr / (1 - beta1^t)``, UNBIAS
``1 / sqrt(1 - beta2^t)``, DECAY ``lr * weight_decay``, and SIGN -1 where the optimizer ascends."""

NUM_NUMBERS = 8


class CompiledUpdate(ABC):
    """One step by a compiled program, or by the reference where the program cannot do it.

    Args:
        split: plain tensors, held whole by this rank.
    """

    def __init__(self, split: Split) -> None:
        self.split = split
        self._gradient_lines = lines_of(split.gradient_budgets)
        self._update_lines = lines_of(split.update_budgets)
        self._memory = ParameterMemory(split)
        self._measured: tuple[Tensor, Tensor] | None = None
        self._decision: Decision | None = None
        self._reference: ReferenceUpdate | None = None

    @property
    def reference(self) -> ReferenceUpdate:
        """The definition, for tensors that are not addressable and for steps that are traced."""
        self._make_reference()
        assert self._reference is not None
        return self._reference

    @constant_while_traced
    def _make_reference(self) -> bool:
        """Make it when it is first needed; while a step is traced, at once, and without a trace in the graph."""
        if self._reference is None:
            self._reference = ReferenceUpdate(self.split)
        return True

    @property
    def decision(self) -> Decision | None:
        """The decision on the gradient of the last step; after one pass over memory it is made when asked for."""
        if self._measured is not None:
            self._decision, self._measured = self.split.gradient.decide(*self._measured), None
        return self._decision

    def step(
        self,
        gradients: list[Tensor | None],
        states: list[dict[str, Any]],
        groups: list[dict[str, Any]],
        scaling: Scaling | None = None,
    ) -> None:
        """See `ReferenceUpdate.step`. The reference does the steps that are traced or have scaled float16 gradients."""
        half = scaling is not None and any(g is not None and g.dtype == torch.float16 for g in gradients)
        if not half and not torch.compiler.is_compiling():
            if scaling is not None:
                gradients = [None if g is None else scaling.plain(g) for g in gradients]
                scaling = None
            arrays = self._memory.arrays(gradients, states)
            if arrays is not None and self._update(arrays, states, groups):
                return
        self.reference.step(gradients, states, groups, scaling)
        self._measured, self._decision = None, self.reference.decision

    @abstractmethod
    def _update(
        self, arrays: tuple[list[Tensor | None], ...], states: list[dict[str, Any]], groups: list[dict[str, Any]]
    ) -> bool:
        """Update by the compiled program and leave its decision; False, with nothing changed, where it cannot."""
