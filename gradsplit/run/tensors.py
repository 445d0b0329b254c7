"""What an optimizer's updates and its model's forward passes write to: its parameters, and the buffers beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .names import named_parameters_of, roots_of

__all__ = ["TensorsOf"]


class TensorsOf:
    """An optimizer's parameters, and the buffers of the living modules that own any of them, as one state.

    Args:
        optimizer: whose parameters.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._parameters = named_parameters_of(optimizer)
        owners = roots_of({id(parameter) for _, parameter in self._parameters})
        self._buffers = [
            (f"{type(root).__name__}{i}.{name}", root, name)
            for i, root in enumerate(owners)
            for name, _ in root.named_buffers()
        ]

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Pairs (name, parameter)."""
        yield from self._parameters

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Pairs (name, buffer) as they are now; a script may replace buffers."""
        for shown, root, name in self._buffers:
            owner, _, last = name.rpartition(".")
            buffer = getattr(root.get_submodule(owner), last, None)
            if isinstance(buffer, Tensor):
                yield shown, buffer

    def state_dict(self) -> dict[str, Any]:
        """Return the tensors themselves by name."""
        return {
            "parameters": {name: parameter.detach() for name, parameter in self.named_parameters()},
            "buffers": {name: buffer.detach() for name, buffer in self.named_buffers()},
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy a state into the tensors, in place."""
        for kind, pairs in (("parameters", self.named_parameters()), ("buffers", self.named_buffers())):
            for name, tensor in pairs:
                saved = state[kind].get(name)
                if saved is not None and saved.shape == tensor.shape:
                    tensor.copy_(saved)
