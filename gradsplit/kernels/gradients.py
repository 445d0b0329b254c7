"""What is to be read and scaled: the gradients of the parameters, as kernels can take them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["gradients_of"]


def gradients_of(
    names: Sequence[str], parameters: Sequence[Tensor], *, call: str = "GradientSplitter.step()"
) -> list[Tensor | None]:
    """Return the gradients in the layout's order; sparse ones coalesced, so that every stored row is there once.

    Raises:
        ValueError: a gradient that is neither dense nor made of stored rows; names the parameter.

    Warns:
        UserWarning: no parameter has a gradient.
    """
    for name, parameter in zip(names, parameters, strict=True):
        gradient = parameter.grad
        if gradient is None or gradient.layout == torch.strided:
            continue
        if not gradient.is_sparse or gradient.sparse_dim() != 1:
            raise ValueError(
                f"{call}: expected a dense gradient or one of stored rows, got {gradient.layout} of shape "
                f"{tuple(gradient.shape)} at {name!r}. Set parameter.grad = parameter.grad.to_dense() first."
            )
        if not gradient.is_coalesced():
            parameter.grad = gradient.coalesce()
    gradients = [parameter.grad for parameter in parameters]
    if all(gradient is None for gradient in gradients):
        warnings.warn(
            f"{call}: no parameter has a gradient. Call it after backward() and before zero_grad().",
            UserWarning,
            stacklevel=4,
        )
    return gradients
