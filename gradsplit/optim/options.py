"""What may be said to a GSO: ranges of its constants, and torch's flags with torch's words in their errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["FLAGS", "check_flags", "check_numbers", "check_share", "differentiable_backend"]

FLAGS: dict[str, Any] = {
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
}
"""torch's flags in torch's order, with their defaults; states of older versions are completed with these."""


def check_numbers(options: Mapping[str, Any], *, by_share: bool) -> None:
    """Check the ranges of torch's usual constants.

    Raises:
        ValueError: a constant out of its range; the words are torch's.
    """
    lr, eps, decay, betas = options["lr"], options["eps"], options["weight_decay"], options["betas"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if not lr >= 0:
        raise ValueError(f"Invalid learning rate: {lr}")
    if by_share and not isinstance(lr, Tensor) and lr > 0.5:  # a tensor is not looked at, since that may wait
        raise ValueError(
            f"GSO(lr={lr}): expected a share of a row's length per step, at most 0.5. The default is 0.03; use "
            "direction='adam' for a learning rate of AdamW."
        )
    if not eps >= 0:
        raise ValueError(f"Invalid epsilon value: {eps}")
    if not decay >= 0:
        raise ValueError(f"Invalid weight_decay value: {decay}")
    if isinstance(betas[0], Tensor) != isinstance(betas[1], Tensor):
        raise ValueError("betas must be either both floats or both Tensors")
    if isinstance(betas[0], Tensor):
        raise ValueError("GSO(betas=…): expected two numbers, got tensors. Use float(beta).")
    for i, beta in enumerate(betas):
        if not 0 <= beta < 1:
            raise ValueError(f"Invalid beta parameter at index {i}: {beta}")


def check_flags(group: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Check a group's flags against each other and against the optimizer's.

    Raises:
        RuntimeError: flags that exclude each other; the words are torch's.
        ValueError: a flag that has no meaning here, or that would have to be the same in all groups.
    """
    if group["fused"] and group["foreach"]:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
    if group["fused"] and group["differentiable"]:
        raise RuntimeError("`fused` does not support `differentiable`")
    if group["foreach"]:
        raise ValueError(
            "GSO(foreach=True): expected None or False, since each bin has a scale of its own and torch has no "
            "multi-tensor kernel for that. Use fused=True on the CPU, or torch.compile(optimizer.step)."
        )
    if group["differentiable"] != defaults["differentiable"]:
        raise ValueError(
            f"GSO(differentiable={defaults['differentiable']}) with a group of differentiable="
            f"{group['differentiable']}: expected one value for all groups, since one step updates them all. Make a "
            "second GSO for the group."
        )


def differentiable_backend(backend: str, *, in_backward: bool) -> str:
    """Return the backend through which autograd can see.

    Raises:
        ValueError: a mode or a backend through which it cannot.
    """
    if in_backward:
        raise ValueError(
            "GSO(differentiable=True): expected in_backward=False, since an update in backward lets go of what "
            "autograd would need. Leave one of the two out."
        )
    if backend not in ("auto", "eager"):
        raise ValueError(
            f"GSO(differentiable=True, backend={backend!r}): expected backend 'auto' or 'eager', since autograd cannot "
            "see through compiled kernels. Leave it out."
        )
    return "eager"


def check_share(steps: int | None, *, second_moment: str, differentiable: bool) -> None:
    """Refuse what has no meaning for the share step.

    Raises:
        ValueError: a length below one step; an option of direction="adam".
    """
    if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
        raise ValueError(f"GSO(steps={steps!r}): expected the number of steps of the run, >= 1, or None.")
    if second_moment != "element":
        raise ValueError(
            f"GSO(second_moment={second_moment!r}): expected 'element' beside a direction that has no second moment "
            "per bin. Use direction='adam' with it."
        )
    if differentiable:
        raise ValueError(
            "GSO(differentiable=True): expected direction='adam', the one update that autograd can see through. Add "
            "direction='adam', or leave differentiable out."
        )
