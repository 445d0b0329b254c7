"""Each parameter's gradient and moments as an update reads them; moments are made at the first gradient."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..distributed import local_of
from .parts import real

__all__ = ["advance", "local_gradient", "local_moments", "new_moments"]


def new_moments(owner: Tensor, num_bins: int | None, *, capturable: bool) -> dict[str, Tensor]:
    """Return zeros for a parameter that has its first gradient.

    Args:
        owner: the parameter.
        num_bins: bins that share one second moment each; None: one an element.
        capturable: the counter lives beside the parameter; else on the CPU, where reading it waits for nothing.
    """
    state = {"step": torch.zeros((), dtype=torch.float32, device=owner.device if capturable else "cpu")}
    state["exp_avg"] = torch.zeros_like(owner, memory_format=torch.preserve_format)
    if num_bins is None:
        state["exp_avg_sq"] = torch.zeros_like(owner, memory_format=torch.preserve_format)
    else:
        state["bin_sq"] = torch.zeros(num_bins, dtype=torch.float32, device=owner.device)
    return state


def advance(states: Sequence[dict[str, Tensor]], found_inf: Tensor | None) -> None:
    """Count a step of every state, unless a GradScaler found an overflow; without waiting for its answer."""
    if found_inf is None:
        steps = [state["step"] for state in states]
        if not torch.compiler.is_compiling() and all(_is_number(step) for step in steps):
            for step in steps:  # torch's own way takes several times as long: each is an operator call
                ctypes.c_float.from_address(step.data_ptr()).value += 1.0
            torch.autograd.graph.increment_version(steps)
        elif steps:
            torch._foreach_add_(steps, 1)
        return
    for state in states:
        if state["step"].device != found_inf.device:
            state["step"] = state["step"].to(found_inf.device)
        state["step"] += (found_inf.reshape(()) <= 0).to(state["step"].dtype)


def _is_number(step: Tensor) -> bool:
    """Whether a counter is one float32 in the CPU's memory."""
    return type(step) is Tensor and step.is_cpu and step.dtype is torch.float32 and step.numel() == 1


def local_moments(state: dict[str, Tensor]) -> dict[str, Any]:
    """Return a parameter's state as real views of what this rank holds."""
    mean = state["exp_avg"]
    if type(mean) is Tensor and not mean.is_complex():  # nearly always: it is its own view
        return state
    return {k: local_of(real(v)) if k in ("exp_avg", "exp_avg_sq") else v for k, v in state.items()}


def local_gradient(owner: Tensor) -> Tensor | None:
    """Return a real view of what this rank holds of a parameter's gradient, if it has one.

    Raises:
        RuntimeError: a sparse gradient.
    """
    gradient = owner.grad
    if gradient is None:
        return None
    if type(gradient) is Tensor and gradient.layout is torch.strided and not gradient.is_complex():  # nearly always
        return gradient
    if gradient.is_sparse:
        raise RuntimeError(
            f"GSO does not support sparse gradients, got one of shape {tuple(owner.shape)}. Make the embedding with "
            "sparse=False, or put GradientSplitter in front of SparseAdam."
        )
    local: Tensor = local_of(real(gradient))
    return local
