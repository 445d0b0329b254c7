"""What the compiled updates share: when a step is theirs, and the decision that is worked out only when asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from ..amp import Scaling
from ..budget import Decision
from ..budget.lines import lines_of
from .parameter_memory import ParameterMemory
from .planned import Planned
from .reference_update import ReferenceUpdate

__all__ = ["NUMBERS", "CompiledUpdate"]

NUMBERS = (
    "1 - beta1",
    "beta2",
    "1 - beta2",
    "lr / bias1",
    "1 / sqrt(bias2)",
    "eps",
    "lr decay",
    "sign of gradient",
)
"""What each tensor's row of ``numbers`` holds in the compiled loops, Numba's and Triton's."""


class CompiledUpdate(ABC):
    """One step by a compiled program; where that cannot be, by the reference."""

    def __init__(self, planned: Planned) -> None:
        self.planned = planned
        self._gradient_lines = lines_of(planned.gradient_budgets)
        self._update_lines = lines_of(planned.update_budgets)
        self._memory = ParameterMemory(planned)
        self._measured: tuple[Tensor, Tensor] | None = None
        self._decision: Decision | None = None
        self._reference: ReferenceUpdate | None = None

    @property
    def reference(self) -> ReferenceUpdate:
        """The definition, for tensors that cannot be walked in memory, and for steps that are traced."""
        self._make_reference()
        assert self._reference is not None
        return self._reference

    def _make_reference(self) -> bool:
        """Make it when it is first needed; while a step is traced this runs at once and leaves nothing in the graph."""
        if self._reference is None:
            self._reference = ReferenceUpdate(self.planned)
        return True

    # What torch.compiler.assume_constant_result does, without importing the compiler for those who do not use it.
    _make_reference._dynamo_marked_constant = True  # type: ignore[attr-defined]

    @property
    def decision(self) -> Decision | None:
        """The decision on the gradient of the last step; after one pass over memory made when asked for."""
        if self._measured is not None:
            self._decision, self._measured = self.planned.gradient.decide(*self._measured), None
        return self._decision

    def step(
        self,
        gradients: list[Tensor | None],
        states: list[dict[str, Any]],
        groups: list[dict[str, Any]],
        scaling: Scaling | None = None,
    ) -> None:
        """See `ReferenceUpdate.step`. Steps that are traced, and scaled float16 gradients, are the reference's."""
        half = scaling is not None and any(g is not None and g.dtype == torch.float16 for g in gradients)
        if not half and not torch.compiler.is_compiling():
            if scaling is not None:
                gradients = [None if g is None else scaling.plain(g) for g in gradients]
                scaling = None
            arrays = self._memory.arrays(gradients, states)
            if arrays is not None and self._walk(arrays, states, groups):
                return
        self.reference.step(gradients, states, groups, scaling)
        self._measured, self._decision = None, self.reference.decision

    @abstractmethod
    def _walk(
        self, arrays: tuple[list[Tensor | None], ...], states: list[dict[str, Any]], groups: list[dict[str, Any]]
    ) -> bool:
        """Update by the compiled program and leave its decision; False, with nothing touched, where it cannot."""
