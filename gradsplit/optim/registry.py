"""The updates by the kernel they belong to; every one must equal the reference."""

from __future__ import annotations

import importlib
from typing import Any, Protocol

from torch import Tensor

from ..budget import Decision
from .planned import Planned

__all__ = ["UPDATES", "Update", "make_update"]

UPDATES: dict[str, tuple[str, str]] = {
    "numba": (".fused_update", "FusedUpdate"),
    "reference": (".reference_update", "ReferenceUpdate"),
}
"""Backend -> module and class; a backend without a row is updated by the reference."""


class Update(Protocol):
    """One step of a `Planned`'s parameters."""

    planned: Planned

    @property
    def decision(self) -> Decision | None:
        """The decision on the gradient of the last step."""

    def step(self, gradients: list[Tensor | None], states: list[dict[str, Any]], groups: list[dict[str, Any]]) -> None:
        """Update the parameters in place; see `ReferenceUpdate.step`."""


def make_update(planned: Planned) -> Update:
    """Import and make the update that belongs to the kernel of a `Planned`, around shards if there are any."""
    if planned.is_sharded:
        sharded = importlib.import_module(".sharded_update", __package__)
        if sharded.can_update(planned):
            around: Update = sharded.ShardedUpdate(planned, make_update)
            return around
    module, name = (
        UPDATES["reference"] if planned.is_sharded else UPDATES.get(planned.kernel.name, UPDATES["reference"])
    )
    made: Update = getattr(importlib.import_module(module, __package__), name)(planned)
    return made
