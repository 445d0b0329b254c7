"""The gain of every time step, all steps in one batch. Legend: `_T` one entry a time step here, never a tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from gradsplit.chain.cells import Cell


def squared_gains(
    cell: Cell, inputs: Tensor, states: Tensor, signals: Tensor, *, differentiable: bool = False
) -> tuple[Tensor, Tensor]:
    """Squared norms of the signal before and after each step's transposed factor.

        before = ||d_{t+1}||^2,   after = ||J_t^T d_{t+1}||^2,   J_t = d h_{t+1} / d h_t

    States and signals are constants, so the steps do not depend on each other and run as one batch.

    Args:
        cell: the recurrence.
        inputs: (T, batch, I).
        states: (T, batch, S), the state that enters each step.
        signals: (T, batch, S), the signal d_{t+1} at the state that leaves each step.
        differentiable: keep the graph towards the recurrent weight, and towards nothing else.

    Returns:
        (before, after), each (T, batch).
    """
    time, batch, size = states.shape
    here = states.detach().reshape(time * batch, size).requires_grad_()
    entering = signals.detach().reshape(time * batch, size)
    weight = cell.weight_hh if differentiable else cell.weight_hh.detach()
    with torch.enable_grad():
        there = cell.step(inputs.detach().reshape(time * batch, -1), here, weight, constant=True)
        (pulled,) = torch.autograd.grad(there, here, entering, create_graph=differentiable)
    before = entering.square().sum(-1).reshape(time, batch)
    return before, pulled.square().sum(-1).reshape(time, batch)
