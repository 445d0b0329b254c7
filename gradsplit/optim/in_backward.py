"""GSO inside backward: every parameter is updated as soon as its gradient is complete, and the gradient is freed.

Gradients then never stand in memory all at once. That is possible only where a bin's limits need no other tensor's
gradient of this step, so a global clip can never do it, and `GSO` can with its default budget.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..amp import undisturbed
from ..hooks import users_level

if TYPE_CHECKING:
    from .gso import GSO

__all__ = ["InBackward", "check_model"]

_CALL = "GSO(in_backward=True)"


class InBackward:
    """The hooks of one optimizer, and what has been updated since its last ``step()``.

    Raises, from inside backward:
        RuntimeError: a second gradient of a parameter before ``step()``; several processes without FSDP2.
    """

    def __init__(self, optimizer: GSO) -> None:
        self._done: dict[int, tuple[weakref.ref[Tensor], int]] = {}  # the weights, and their version behind the update
        self._told = False
        self._accumulating = False
        self._optimizer = weakref.ref(optimizer)
        self._names = {}
        for part in optimizer._parts:
            (owner,), (name,) = part.split.owners, part.split.plan.layout.names
            self._names[id(owner)] = name
            if owner.requires_grad:  # one that is unfrozen later is updated by step()
                owner.register_post_accumulate_grad_hook(self._hook)

    def _hook(self, owner: Tensor) -> None:
        optimizer = self._optimizer()
        if optimizer is None or self._accumulating or owner.grad is None:
            return
        name = self._names[id(owner)]
        if id(owner) in self._done:
            raise RuntimeError(
                f"{_CALL}: expected one complete gradient of {name!r} between two calls of step(), got a second one; "
                "the first has been applied already. Accumulating: run all backward passes but the last under `with "
                "optimizer.accumulating():`. Reentrant checkpointing of shared weights: use "
                "checkpoint(…, use_reentrant=False). Otherwise: call step() after every backward."
            )
        _check_processes(owner, name)
        self._done[id(owner)] = weakref.ref(owner), -1
        with torch.no_grad():
            undisturbed(owner.device.type, optimizer._step_of, owner)
        self._done[id(owner)] = weakref.ref(owner), owner._version
        owner.grad = None

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Let gradients add up without an update."""
        before, self._accumulating = self._accumulating, True
        try:
            yield
        finally:
            self._accumulating = before

    def finish(self) -> None:
        """End the step.

        Raises:
            RuntimeError: called by a GradScaler, whose scaled gradients have been applied already.

        Warns:
            UserWarning: somebody has written to weights behind their update.
        """
        optimizer = self._optimizer()
        if not self._told and not torch.compiler.is_compiling():
            self._look_for_writes()
        self._done.clear()
        if optimizer is not None and getattr(optimizer, "grad_scale", None) is not None:
            raise RuntimeError(
                f"{_CALL}: expected unscaled gradients, got a step() by GradScaler: it unscales after backward, when "
                "the update has been made. Train in bfloat16 without a scaler, or use in_backward=False."
            )

    def _look_for_writes(self) -> None:
        for key, (ref, version) in self._done.items():
            owner = ref()
            if owner is None or owner._version == version or hasattr(owner, "device_mesh"):
                continue
            self._told = True
            warnings.warn(
                f"{_CALL}: {self._names[key]!r} was written between backward(), which has updated it, and step(), so "
                "that the update may be lost. If you swap weights around the backward pass, use in_backward=False.",
                UserWarning,
                stacklevel=users_level(),
            )
            return


def _check_processes(owner: Tensor, name: str) -> None:
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return
    if not hasattr(owner, "device_mesh"):
        raise RuntimeError(
            f"{_CALL}: expected one process, or parameters sharded by FSDP2, got {name!r} as a plain tensor in "
            f"{distributed.get_world_size()} processes. Hooks run before DDP has averaged the gradients: use "
            "in_backward=False."
        )


def check_model(model: object) -> None:
    """Refuse a model whose gradients are not complete when its hooks run.

    Raises:
        ValueError: DistributedDataParallel.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError(
            f"{_CALL}: expected a model of one process, or FSDP2, got DistributedDataParallel, whose gradients are "
            "averaged after the hooks have run. Use in_backward=False."
        )
