"""Measuring and bounding one signal."""

from __future__ import annotations

import torch
from torch import Tensor


def signal_norm(signal: Tensor, per_sample: bool = False) -> Tensor:
    """L2 norm of a signal that neither overflows nor copies the signal in the usual case.

    Args:
        signal: gradient at a joint; float16 and bfloat16 are accumulated in float32.
        per_sample: one norm for each entry of dimension 0.

    Returns:
        float32 norms, () or (samples,); inf or NaN only where the signal has such entries (or exceeds
        float32).
    """
    flat = signal.detach()
    dim = tuple(range(1, flat.dim())) if per_sample and flat.dim() > 1 else None
    kind = torch.float64 if flat.dtype == torch.float64 else torch.float32
    if per_sample and flat.dim() <= 1:
        return flat.abs().to(torch.float32)
    norm = torch.linalg.vector_norm(flat, dim=dim, dtype=kind)
    if norm.device.type == "cpu" and bool(torch.isfinite(norm).all()):
        return norm.to(torch.float32)
    # Entries above 1.8e19 overflow float32 squares: accumulate those in float64. On a device this is done
    # always, since asking whether it is needed would wait for the device.
    return torch.linalg.vector_norm(flat, dim=dim, dtype=torch.float64).to(torch.float32)


def scale_within(norm: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    """The factor that brings a norm within its limit, and whether the signal is finite.

        scale = min(1, limit / norm), 0 where the norm is not finite

    Args:
        norm: () or (samples,).
        limit: (), inf for none.

    Returns:
        (scale, finite), of the shape of `norm`.

    >>> scale_within(torch.tensor(4.0), torch.tensor(1.0))[0].item()
    0.25
    """
    finite = torch.isfinite(norm)
    scale = torch.where(norm > limit, limit / norm.clamp(min=1e-38), torch.ones_like(norm))
    return torch.where(finite, scale, torch.zeros_like(scale)), finite


def apply_scale(signal: Tensor, scale: Tensor, finite: Tensor) -> Tensor | None:
    """The signal times its scale, zeros where it is not finite (never 0 * inf); None for "unchanged" on the CPU."""
    if scale.device.type == "cpu" and bool((scale == 1).all()):
        return None  # reading a CPU tensor waits for nobody, and most signals are within their limit
    if scale.numel() == 1:
        scale, finite = scale.reshape(()), finite.reshape(())  # a scalar signal must stay one
    else:
        shape = (-1,) + (1,) * (signal.dim() - 1)
        scale, finite = scale.reshape(shape), finite.reshape(shape)
    return torch.where(
        finite, signal * scale.to(signal.dtype), torch.zeros((), dtype=signal.dtype, device=signal.device)
    )
