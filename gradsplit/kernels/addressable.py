"""Guards: which tensors may be read and written by address, and what is wrong with the others."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

__all__ = ["DTYPES", "FallbackWarning", "bump_versions", "obstacle", "overlap", "warn_of_fallback"]

DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))
"""What compiled programs read and write by address."""

_PLAIN = (Tensor, Parameter)


class FallbackWarning(UserWarning):
    """Part of the work is done by a slower backend with the same result."""


def obstacle(tensor: Tensor, device: str = "cpu") -> str:
    """Say why a tensor must not be touched by address on a type of device; empty if it may.

    Strides are judged by the lowering.
    """
    there = tensor.is_cpu if device == "cpu" else tensor.device.type == device
    plain = type(tensor) in _PLAIN and there and tensor.layout is torch.strided
    if plain and not (tensor.is_neg() or (tensor.is_complex() and tensor.is_conj())):  # nearly always: be quick
        return "" if tensor.data_ptr() else "it has no memory"
    if type(tensor) not in _PLAIN:
        return f"it is a {type(tensor).__name__}, whose memory may not be its own"
    if tensor.layout is not torch.strided:
        return f"its layout is {tensor.layout}"
    if not there:
        return f"it lives on {tensor.device}"
    return "its memory holds the negative or conjugate of its values"


def warn_of_fallback(what: str, name: str, reason: str, remedy: str) -> None:
    """Say once which tensor is served more slowly, and why."""
    warnings.warn(
        f"{what} falls back to eager torch for {name!r}: {reason}. The result is the same, only slower. {remedy}",
        FallbackWarning,
        stacklevel=4,
    )


def overlap(tensors: Sequence[Tensor]) -> bool:
    """Whether two tensors share memory; then the order of writes matters, and threads must not share the work."""
    starts = np.array([tensor.data_ptr() for tensor in tensors], dtype=np.int64)
    sizes = np.array(
        [
            tensor.element_size() * (1 + sum((n - 1) * d for n, d in zip(tensor.shape, tensor.stride(), strict=True)))
            for tensor in tensors
        ],
        dtype=np.int64,
    )
    order = np.argsort(starts)
    starts, stops = starts[order], (starts + sizes)[order]
    return bool((starts[1:] < stops[:-1]).any())


def bump_versions(tensors: list[Tensor]) -> None:
    """Tell autograd that memory was written, which it cannot see: graphs must not use old values they saved."""
    try:
        torch.autograd.graph.increment_version(tensors)  # passes over those of inference mode, which have no version
    except RuntimeError:  # an older torch that does not
        torch.autograd.graph.increment_version([tensor for tensor in tensors if not tensor.is_inference()])
