"""The ladder of a model: its loss on a batch as a function of the parameters alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from ..plan import Plan
from .ladder import Ladder, taylor_ladder
from .recipe import RecipeStep
from .trace import LossOfParams, to_float64

LossFunction = Callable[[nn.Module, Any], Tensor]


class _Loss(nn.Module):
    """A loss as a module, so that ``functional_call`` can swap the parameters of everything that the loss calls."""

    def __init__(self, model: nn.Module, loss_fn: LossFunction) -> None:
        super().__init__()
        self.model, self.loss_fn = model, loss_fn

    def forward(self, batch: Any) -> Tensor:
        return self.loss_fn(self.model, batch)


def loss_of_model(model: nn.Module, loss_fn: LossFunction, batch: Any) -> tuple[LossOfParams, dict[str, Tensor]]:
    """Return the loss of one batch as a function of the trainable parameters, and their present values.

    Buffers are given as copies, so that the running statistics of a normalisation layer stay as they are.

    Args:
        model: any module, of any floating dtype.
        loss_fn: ``loss_fn(model, batch) -> scalar``.
        batch: what the loss function takes; its floating tensors follow the parameters to float64.

    >>> import torch
    >>> model = nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.constant_(model.weight, 3.0)
    >>> loss_of_params, params = loss_of_model(model, lambda m, x: m(x).square().mean(), torch.ones(4, 1))
    >>> loss_of_params(params).item()
    9.0
    """
    loss = _Loss(model, loss_fn)
    params = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss_of_params(moved: dict[str, Tensor]) -> Tensor:
        state = {f"model.{name}": value for name, value in moved.items()}
        state.update({f"model.{name}": value.clone() for name, value in model.named_buffers()})
        # Some modules, such as recurrent ones, compare dtypes themselves before they compute anything.
        doubled = any(value.dtype == torch.float64 for value in moved.values())
        return functional_call(loss, state, (pytree.tree_map_only(Tensor, to_float64, batch) if doubled else batch,))

    return loss_of_params, params


def ladder_of_model(
    model: nn.Module,
    loss_fn: LossFunction,
    batch: Any,
    *,
    bins: Plan | None = None,
    order: int = 10,
    recipe: str | Sequence[str | RecipeStep] | None = None,
    memory: int = 2 * 2**30,
) -> Ladder:
    """Return the ladder of a model on one batch, along minus its gradient: one for all, or one per bin of a plan.

    Args:
        model: any module.
        loss_fn: ``loss_fn(model, batch) -> scalar``.
        batch: what the loss function takes.
        bins: a plan of the model; None for the whole gradient.
        order: highest order; 10 gives a radius to some percent, 99 the shape of the nearest singularity.
        recipe: see ``taylor_ladder``.
        memory: bytes that the bins that are followed together may take, roughly.
    """
    loss_of_params, params = loss_of_model(model, loss_fn, batch)
    return taylor_ladder(loss_of_params, params, order=order, bins=bins, recipe=recipe, memory=memory)
