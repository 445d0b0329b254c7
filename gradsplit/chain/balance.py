"""balance_: it rescales weights once, layer by layer, so that the forward gains of a net are one before training."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from .joints import LossFn, bare

WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Balanced:
    """What `balance_` did to one layer.

    Attributes:
        name: the module.
        factor: the factor by which its weight was multiplied.
        before: root mean square of its output in the net as it was given.
        after: root mean square of its output in the balanced net.
    """

    name: str
    factor: float
    before: float
    after: float


def balance_(
    model: nn.Module, loss_fn: LossFn, batch: Any, *, target: float = 1.0, on: float | None = None,
    orthogonal: bool = False,
) -> list[Balanced]:  # fmt: skip
    """Rescale every linear and convolutional layer, in the order of the forward pass, to outputs of one size.

        W <- W target / rms(W x + b)        from the first layer to the last, each with its predecessors balanced

    If all layers have outputs of one size, the forward gain of every stage is one. In a stack of layers of one width
    the gain of the signal then is one too, since the same weight carries both. This cures a forward explosion, which no
    bound on the gradient can cure. Between layers of different widths only one of the two can be one, and here it is
    the forward gain.

    Args:
        model: it is changed in place: the weights (and, with `on`, the biases) of `nn.Linear` and convolutions.
        loss_fn: `loss_fn(model, batch) -> scalar`; it runs three times, without gradients.
        batch: a representative batch.
        target: root mean square of every layer's output.
        on: share of inputs for which a unit should be positive, between 0.5 and 1, or None to leave biases alone. Each
            unit's output then gets mean c and standard deviation `target`, where c = target Phi^-1(on). Deep plain
            stacks with rectifiers need a share near 1. Each layer then is nearly linear, so the inputs stay apart and
            the gains stay one through hundreds of layers.
        orthogonal: whether to replace each weight's matrix view first by the nearest matrix with orthogonal rows (or
            columns). Convolutions between equally many channels keep the centre of their kernel only. Then all
            directions have the same gain, and not only their mean.

    Returns:
        One entry per layer, in the order of the forward pass.

    Raises:
        ValueError: a target or share out of its range; a weight that is computed (weight norm, pruning), lazy, or
            without values; or a layer whose output is zero or not finite although all before it are balanced.

    >>> model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    >>> _ = model[0].weight.data.fill_(100.0), model[1].weight.data.fill_(0.1)
    >>> [round(entry.factor, 4) for entry in balance_(model, lambda m, x: m(x).sum(), torch.ones(4, 1))]
    [0.01, 10.0]

    Source: layer-sequential unit variance (Mishkin and Matas 2016, arXiv 1511.06422); data-dependent biases as in
    Krahenbuhl et al. 2016 (arXiv 1511.06856).
    Deviations: one pass replaces the iterations, and the root mean square replaces the variance. The share `on` is the
    project's own.
    """
    if not target > 0 or not math.isfinite(target):
        raise ValueError(
            f"balance_(target={target!r}): expected a finite root mean square above 0. Use 1.0 for usual layers."
        )
    if on is not None and not 0.5 <= on < 1:
        raise ValueError(
            f"balance_(on={on!r}): expected a share of at least 0.5 and below 1, or None, which leaves biases alone."
        )
    model = bare(model, call="balance_")
    _check_weights(model)
    before = _levels(model, loss_fn, batch)
    factors: dict[str, float] = {}
    with ExitStack() as hooks, torch.no_grad():
        for name, module in _weighted(model):
            if orthogonal:
                _orthogonalise(module)

            def leave(module: nn.Module, args: Any, output: Tensor, name: str = name) -> Tensor | None:
                if name in factors:
                    return None  # a weight that is used twice is balanced at its first use
                factor, changed = _rescale(name, module, output, target, on)
                factors[name] = factor
                return changed

            hooks.callback(module.register_forward_hook(leave).remove)
        loss_fn(model, batch)
    after = _levels(model, loss_fn, batch)
    return [Balanced(name, factor, before[name], after[name]) for name, factor in factors.items()]


def _weighted(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if isinstance(module, WEIGHTED):
            yield name, module


def _check_weights(model: nn.Module) -> None:
    """Refuse layers whose weight cannot be multiplied, all of them at once, before anything is changed."""
    wrong = []
    for name, module in _weighted(model):
        for part in ("weight", "bias"):
            held: Any = module._parameters.get(part)
            # Its value is not asked for: to read it would run a power iteration, which changes buffers.
            computed = is_parametrized(module, part) or hasattr(type(module), part)
            if held is None and (computed or vars(module).get(part) is not None):
                rule = next((f" ({kind})" for kind in _rules_of(module, part)), "")
                wrong.append(f"{part} of {name or '(root)'} is computed from other tensors{rule}")
            elif held is not None and (is_lazy(held) or held.is_meta):
                why = "is lazy, so run the model once" if is_lazy(held) else "is on the meta device"
                wrong.append(f"{part} of {name or '(root)'} {why}")
    if wrong:
        raise ValueError(
            f"balance_(model): expected layers with weights of their own, got {len(wrong)} without: {'; '.join(wrong)}"
            ". Call balance_ first and reparametrise afterwards."
        )


def _rules_of(module: nn.Module, part: str) -> Iterator[str]:
    """What computes a parameter: parametrisations, and the older hooks that run before a forward pass."""
    if is_parametrized(module, part):
        yield from (type(rule).__name__.strip("_") for rule in module.parametrizations[part])  # type: ignore[index]
    for hook in module._forward_pre_hooks.values():
        if part in (getattr(hook, "name", None), getattr(hook, "_tensor_name", None)):
            yield type(hook).__name__


def _rescale(name: str, module: nn.Module, output: Tensor, target: float, on: float | None) -> tuple[float, Tensor]:
    weight, bias = _parameters(module)
    if on is None or bias is None:
        size = float(output.double().square().mean().sqrt())
        _check(name, size)
        factor = target / size
        weight.mul_(factor)
        if bias is not None:
            bias.mul_(factor)
        return factor, output * factor
    axis = output.dim() - 1 if isinstance(module, nn.Linear) else 1
    over = tuple(dim for dim in range(output.dim()) if dim != axis)
    shape = [-1 if dim == axis else 1 for dim in range(output.dim())]
    linear = output - bias.view(shape)
    mean = linear.mean(over)
    size = float((linear - mean.view(shape)).double().square().mean().sqrt())
    _check(name, size)
    factor = target / size
    weight.mul_(factor)
    lift = target * math.sqrt(2) * float(torch.erfinv(torch.tensor(2 * on - 1, dtype=torch.float64)))
    bias.copy_(lift - mean * factor)
    return factor, linear * factor + bias.view(shape)


def _parameters(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    weight, bias = module.get_parameter("weight"), getattr(module, "bias", None)
    assert bias is None or isinstance(bias, Tensor)
    return weight, bias


def _check(name: str, size: float) -> None:
    if not size > 0 or not math.isfinite(size):
        raise ValueError(
            f"balance_(model): expected an output of finite size above 0 at {name!r}, got root mean square {size}. "
            "Look for a dead layer or a non-finite input before it with gs.diagnose."
        )


def _orthogonalise(module: nn.Module) -> None:
    weight, _ = _parameters(module)
    if weight[0, 0].numel() == 1 or weight.shape[0] != weight.shape[1]:
        weight.copy_(_nearest(weight.flatten(1)).view_as(weight))
        return
    flat = weight.view(weight.shape[0], weight.shape[1], -1)
    place = sum(size // 2 * math.prod(weight.shape[3 + d :]) for d, size in enumerate(weight.shape[2:]))
    middle = _nearest(flat[:, :, place].clone())
    flat.zero_()
    flat[:, :, place] = middle


def _nearest(matrix: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (left @ right).to(matrix.dtype)


def _levels(model: nn.Module, loss_fn: LossFn, batch: Any) -> dict[str, float]:
    """Root mean square of each layer's output, at its first call."""
    levels: dict[str, float] = {}
    with ExitStack() as hooks, torch.no_grad():
        for name, module in _weighted(model):

            def leave(module: nn.Module, args: Any, output: Tensor, name: str = name) -> None:
                levels.setdefault(name, float(output.double().square().mean().sqrt()))

            hooks.callback(module.register_forward_hook(leave).remove)
        loss_fn(model, batch)
    return levels
