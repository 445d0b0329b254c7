"""The gain of a recurrence drawn to one: the regulariser of Pascanu, Mikolov and Bengio (2013)."""

from __future__ import annotations

import torch
from torch import Tensor

from .recurrent import Cell, Unrolled, squared_gains


def gain_penalty(recurrence: Unrolled | Cell, inputs: Tensor | None = None, states: Tensor | None = None,
                 signals: Tensor | None = None, *, bound: float = 1e-30) -> Tensor:  # fmt: skip
    """How far the squared gain of the backward signal is from one, step by step.

        Omega = mean over steps t and samples of ( ||J_t^T d_{t+1}||^2 / ||d_{t+1}||^2 - 1 )^2

    Draws the product of factors of a recurrence towards neither growth nor decay. It is differentiated with
    respect to the recurrent weight only; states, signals and the slopes of the activations are constants: for a
    tanh J_t^T d = W^T ((1 - h_{t+1}^2) d), and only this W is not. Use it after the loss's backward
    pass and before any bound on the gradient:

        output, _ = unrolled(x); loss(output).backward(retain_graph=False)
        (alpha * gs.gain_penalty(unrolled)).backward()          # adds to weight_hh.grad

    Args:
        recurrence: an `Unrolled` module whose forward pass ran under `keep_signals()`, and whose backward
            pass has run; or a `Cell`, with the three arrays below.
        inputs: (T, batch, I), for a `Cell`.
        states: (T, batch, S), the states that enter the steps.
        signals: (T, batch, S), dL/dh at the states that leave them.
        bound: steps whose squared signal is at most this share of the largest one are left out; the mean is
            over the rest.

    Returns:
        The penalty, a scalar with a graph to `weight_hh`; 0 without any signal.

    Raises:
        ValueError: a `Cell` without its arrays, or an `Unrolled` whose signals were not kept.

    Deviations from the source: left-out steps are taken out of the mean, where the authors' code counts
        them as gain
    one and divides by the share that is left, which is the same number. The source's printed equation has
    plain norms, its code squared ones, as here.

    Source: arXiv 1211.5063, equations 9 and 10; written from the formula.

    >>> fused = torch.nn.RNN(1, 1, nonlinearity="relu", bias=False)
    >>> _ = fused.weight_hh_l0.data.fill_(2.0)
    >>> ones = torch.ones(1, 1, 1)
    >>> round(gain_penalty(Cell(fused), 9 * ones, ones, ones).item(), 4)     # (2^2 - 1)^2
    9.0
    """
    if isinstance(recurrence, Unrolled):
        parts = []
        for number, cell in enumerate(recurrence.cells):
            assert isinstance(cell, Cell)
            kept = [state.grad for state in recurrence.states[number][1:]] if recurrence.states else []
            if not kept or all(grad is None for grad in kept):
                raise ValueError(
                    "gain_penalty(unrolled): expected signals at its states, got none. Run the forward pass inside "
                    "`with unrolled.keep_signals():` and the loss's backward pass before this call."
                )
            known = [torch.zeros_like(s) if s.grad is None else s.grad for s in recurrence.states[number][1:]]
            entering = torch.stack([state.detach() for state in recurrence.states[number][:-1]])
            given = torch.stack([x.detach() for x in recurrence.inputs[number]])
            parts.append(_penalty(cell, given, entering, torch.stack(known), bound))
        return torch.stack(parts).mean()
    if inputs is None or states is None or signals is None:
        raise ValueError("gain_penalty(cell, ...): expected inputs, states and signals beside a Cell, got None.")
    return _penalty(recurrence, inputs, states, signals, bound)


def _penalty(cell: Cell, inputs: Tensor, states: Tensor, signals: Tensor, bound: float) -> Tensor:
    # the ratio does not depend on the signal's scale: lift it so that squares of tiny signals do not
    # underflow
    largest = signals.abs().amax()
    lifted = torch.where(largest > 0, signals / largest, signals)
    before, after = squared_gains(cell, inputs, states, lifted, differentiable=True)
    counts = before > bound * before.amax()
    ratio = after / torch.where(counts, before, torch.ones_like(before))
    excess = torch.where(counts, (ratio - 1).square(), torch.zeros_like(ratio))
    return excess.sum() / counts.sum().clamp(min=1)
