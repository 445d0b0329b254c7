"""What a GSO is given, and what of it is refused: parameters, constants, and torch's flags in torch's words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "FLAGS",
    "check_flags",
    "check_group",
    "check_numbers",
    "check_params",
    "check_share",
    "differentiable_backend",
]

FLAGS: dict[str, Any] = {
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
}
"""torch's flags in torch's order, with their defaults; states of older versions are completed with these."""


def check_params(params: Any) -> None:
    """Refuse what holds no parameters.

    Raises:
        TypeError: neither a module nor something to go through.
    """
    if not isinstance(params, (nn.Module, Iterable)):
        what = f"the class {params.__name__}" if isinstance(params, type) else type(params).__name__
        raise TypeError(
            f"GSO({what}): expected a module, parameters, pairs (name, parameter) or groups of them. Write for example "
            "GSO(model)."
        )


def check_group(group: Any) -> None:
    """Refuse a group without parameters.

    Raises:
        TypeError: no mapping, or one without "params".
    """
    if not isinstance(group, Mapping) or "params" not in group:
        got = f"the keys {sorted(map(str, group))}" if isinstance(group, Mapping) else "none"
        raise TypeError(
            f"GSO.add_param_group({type(group).__name__}): expected a mapping with 'params', got {got}. Write "
            "{'params': parameters}, beside options of the group."
        )


def check_numbers(options: Mapping[str, Any], *, by_share: bool) -> None:
    """Check the ranges of torch's usual constants.

    Raises:
        ValueError: no number, or one out of its range; for ranges the words are torch's.
    """
    lr, eps, decay, betas = options["lr"], options["eps"], options["weight_decay"], options["betas"]
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", decay)):
        if isinstance(value, bool) or not isinstance(value, (Real, Tensor)):
            raise ValueError(f"GSO({name}={value!r}): expected a number, got {type(value).__name__}. Use float(…).")
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"GSO(betas={betas!r}): expected two numbers in [0, 1). Write betas=(0.9, 0.99).")
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if (not isinstance(lr, Tensor) or lr.device.type == "cpu") and not torch.compiler.is_compiling() and not lr >= 0:
        raise ValueError(f"Invalid learning rate: {lr}")
    # A tensor on a device is not looked at, since that would wait for the device.
    readable = not isinstance(lr, Tensor) or (lr.device.type == "cpu" and not torch.compiler.is_compiling())
    if by_share and readable and lr > 0.5:
        raise ValueError(
            f"GSO(lr={lr}): expected a share of a row's length per step, at most 0.5. The default is 0.03; use "
            "direction='adam' for a learning rate of AdamW."
        )
    if not eps >= 0:
        raise ValueError(f"Invalid epsilon value: {eps}")
    if not decay >= 0:
        raise ValueError(f"Invalid weight_decay value: {decay}")
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", decay)):
        if not isinstance(value, Tensor) and value == math.inf:
            raise ValueError(f"GSO({name}=inf): expected a finite number. Leave {name}= out for its default.")
    if isinstance(betas[0], Tensor) != isinstance(betas[1], Tensor):
        raise ValueError("betas must be either both floats or both Tensors")
    if isinstance(betas[0], Tensor):
        raise ValueError("GSO(betas=…): expected two numbers, got tensors. Use float(beta).")
    for i, beta in enumerate(betas):
        if not isinstance(beta, Real):
            raise ValueError(f"GSO(betas={betas!r}): expected two numbers in [0, 1). Write betas=(0.9, 0.99).")
        if not 0 <= float(beta) < 1:
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


def check_share(steps: Any, *, second_moment: str, differentiable: bool) -> None:
    """Refuse what has no meaning for the share step.

    Raises:
        ValueError: a length below one step; an option of direction="adam".
    """
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, Integral) or int(steps) < 1):
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
