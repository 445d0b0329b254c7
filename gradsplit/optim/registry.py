"""The updates by the kernel they belong to; every one must equal the reference."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from ..amp import Scaling
from ..budget import Decision
from .planned import Planned

__all__ = ["UPDATES", "Update", "make_update", "refusal_of_fused"]

UPDATES: dict[str, tuple[str, str]] = {
    "numba": (".fused_update", "FusedUpdate"),
    "triton": (".triton_update", "TritonUpdate"),
    "reference": (".reference_update", "ReferenceUpdate"),
}
"""Backend -> module and class; a backend without a row is updated by the reference."""


class Update(Protocol):
    """One step of a `Planned`'s parameters."""

    planned: Planned

    @property
    def decision(self) -> Decision | None:
        """The decision on the gradient of the last step."""

    def step(
        self,
        gradients: list[Tensor | None],
        states: list[dict[str, Any]],
        groups: list[dict[str, Any]],
        scaling: Scaling | None = None,
    ) -> None:
        """Update the parameters in place; see `ReferenceUpdate.step`."""


def make_update(planned: Planned, *, fused: bool | None = None) -> Update:
    """Import and make the update that belongs to the kernel of a `Planned`, around shards if there are any.

    Args:
        planned: what is updated.
        fused: True: only a compiled one will do; False: the reference; None: the kernel's own.

    Raises:
        RuntimeError: ``fused=True`` where the kernel has no compiled update; the words are torch's. On the meta device,
            where parameters wait for their memory, the step raises.
    """
    if planned.is_sharded:
        sharded = importlib.import_module(".sharded_update", __package__)
        if sharded.can_update(planned):
            around: Update = sharded.ShardedUpdate(planned, partial(make_update, fused=fused))
            return around
    kernel = planned.kernel.name
    compiled = not planned.is_sharded and kernel in UPDATES and UPDATES[kernel] != UPDATES["reference"]
    if fused and not compiled and planned.kernel.device.type != "meta":
        raise RuntimeError(refusal_of_fused(planned))
    module, name = UPDATES[kernel if compiled and fused is not False else "reference"]
    made: Update = getattr(importlib.import_module(module, __package__), name)(planned)
    return made


def refusal_of_fused(planned: Planned) -> str:
    """Say why there is no compiled update."""
    return (
        "`fused=True` requires all the params to be floating point Tensors of supported devices: on the CPU, with the "
        "package numba, on CUDA with backend='triton', and for shards with limits of single bins; got backend "
        f"{planned.kernel.name!r} on {planned.kernel.device}. Use fused=None, which takes what there is."
    )
