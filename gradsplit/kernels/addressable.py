"""Which tensors compiled programs may read and write by address, and what is wrong with the others."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

__all__ = [
    "DTYPES",
    "PLAIN",
    "FallbackWarning",
    "bump_versions",
    "obstacle",
    "overlap",
    "remedy_of",
    "warn_of_fallback",
]

DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))
"""The dtypes that compiled programs read and write by address."""

PLAIN = (Tensor, Parameter)
"""The types whose memory is their own."""


class FallbackWarning(UserWarning):
    """Part of the work is done by a slower backend with the same result."""


def obstacle(tensor: Tensor, device: str = "cpu") -> str:
    """Say why a tensor must not be read and written by address on a type of device; empty if it may.

    Strides are judged by `gradsplit.plan.lowering`.

    Args:
        tensor: of any kind.
        device: the type of device whose memory the program addresses.

    >>> obstacle(torch.zeros(2)), obstacle(torch.zeros(2).to_sparse())
    ('', 'its layout is torch.sparse_coo')
    """
    there = tensor.is_cpu if device == "cpu" else tensor.device.type == device
    plain = type(tensor) in PLAIN and there and tensor.layout is torch.strided
    if plain and not (tensor.is_neg() or (tensor.is_complex() and tensor.is_conj())):  # nearly always: be quick
        return "" if tensor.data_ptr() else "it has no memory"
    if type(tensor) not in PLAIN:
        return f"it is a {type(tensor).__name__}, whose memory may not be its own"
    if tensor.layout is not torch.strided:
        return f"its layout is {tensor.layout}"
    if not there:
        return f"it lives on {tensor.device}"
    return "its memory holds the negative or conjugate of its values"


def remedy_of(reason: str) -> str:
    """What to do about a reason why a tensor is not addressed, as a sentence."""
    if "strides" in reason:
        return "Make the parameter contiguous, or use backend='eager'."
    if reason.startswith("its dtype is") and "," in reason:
        return "Give the parameter, its gradient and its moments one dtype, or use backend='eager'."
    return "Use backend='eager'."


def warn_of_fallback(what: str, name: str, reason: str, remedy: str) -> None:
    """Warn that a tensor is served by eager torch; the caller sees to it that this comes once.

    Args:
        what: what falls back, as the first words of the warning.
        name: the tensor.
        reason: what is wrong with it, without a full stop.
        remedy: what to do, as a sentence.
    """
    warnings.warn(
        f"{what} falls back to eager torch for {name!r}: {reason}. The result is the same, only slower. {remedy}",
        FallbackWarning,
        stacklevel=4,
    )


def overlap(tensors: Sequence[Tensor]) -> bool:
    """Whether any two of the tensors share memory; then the order of writes matters, and one thread does the work."""
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
    """Tell autograd that memory was written, which it cannot see: graphs must not use old values that they saved."""
    try:
        torch.autograd.graph.increment_version(tensors)  # leaves out tensors of inference mode, which have no version
    except RuntimeError:  # an older torch refuses them
        torch.autograd.graph.increment_version([tensor for tensor in tensors if not tensor.is_inference()])
