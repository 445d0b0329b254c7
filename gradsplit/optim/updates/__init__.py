"""The updates of GSO by backend, one file each; every one must equal `reference`."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from ...amp import Scaling
from ...budget import Decision
from ...split import Split

__all__ = ["UPDATES", "Update", "make_update", "refusal_of_fused"]

UPDATES: dict[str, tuple[str, str]] = {
    "numba": (".numba_cpu", "FusedUpdate"),
    "triton": (".triton_gpu", "TritonUpdate"),
    "reference": (".reference", "ReferenceUpdate"),
}
"""Backend -> module and class; a backend without a row is updated by the reference."""


class Update(Protocol):
    """One step of a `Split`'s parameters."""

    split: Split

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


def make_update(split: Split, *, fused: bool | None = None) -> Update:
    """Import and make the update that belongs to the kernel of a `Split`, around shards if there are any.

    Args:
        split: what is updated.
        fused: True: only a compiled one will do; False: the reference; None: the kernel's own.

    Raises:
        RuntimeError: ``fused=True`` where the kernel has no compiled update; the words are torch's. On the meta device,
            where parameters wait for their memory, the step raises.
    """
    if split.is_sharded:
        sharded = importlib.import_module(".sharded", __package__)
        if sharded.can_update(split):
            around: Update = sharded.ShardedUpdate(split, partial(make_update, fused=fused))
            return around
    kernel = split.kernel.name
    compiled = not split.is_sharded and kernel in UPDATES and UPDATES[kernel] != UPDATES["reference"]
    if fused and not compiled and split.kernel.device.type != "meta":
        raise RuntimeError(refusal_of_fused(split))
    module, name = UPDATES[kernel if compiled and fused is not False else "reference"]
    made: Update = getattr(importlib.import_module(module, __package__), name)(split)
    return made


def refusal_of_fused(split: Split) -> str:
    """Say why there is no compiled update."""
    return (
        "`fused=True` requires all the params to be floating point Tensors of supported devices: on the CPU, with the "
        "package numba, on CUDA with backend='triton', and for shards with limits of single bins; got backend "
        f"{split.kernel.name!r} on {split.kernel.device}. Use fused=None, which takes what there is."
    )
