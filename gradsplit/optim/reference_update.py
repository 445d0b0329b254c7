"""The reference update of GSO: design formulas tensor by tensor in eager torch. Every fused update must equal it.

Per bin b, with gradient g, weights w, scale s_b from the gradient's ledger:

    g'  = s_b g                        m   = b1 m + (1 - b1) g'
    v   = b2 v + (1 - b2) g'^2         element-wise, or one a bin:  v_b = b2 v_b + (1 - b2) s_b^2 square_b / n_b
    u   = lr  m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)
    w   = w (1 - lr decay) - c_b u     c_b from the update's ledger

A bin whose gradient is not finite is passed over: weights, moments and history stay as they were.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..budget import Decision
from ..kernels import squares_of
from ..kernels.eager import EagerKernel
from .planned import Planned

__all__ = ["ReferenceUpdate"]


class ReferenceUpdate:
    """One step of a `Planned`'s parameters in eager torch, on any device."""

    def __init__(self, planned: Planned) -> None:
        self.planned = planned
        self.decision: Decision | None = None
        kernel = planned.kernel
        self.shapes = kernel if isinstance(kernel, EagerKernel) else EagerKernel(planned.local_plan, kernel.device)

    def step(self, gradients: list[Tensor | None], states: list[dict[str, Any]], groups: list[dict[str, Any]]) -> None:
        """Update the parameters in place; afterwards `decision` is that on the gradient.

        Args:
            gradients: one a parameter, as backward left it; None: the parameter is passed over.
            states: each parameter's moments, from `GSO`.
            groups: each parameter's hyper-parameters.
        """
        planned, num_bins = self.planned, self.planned.plan.num_bins
        # Under maximize a copy is negated, never the gradient itself.
        gradients = [
            -g if g is not None and group["maximize"] else g for g, group in zip(gradients, groups, strict=True)
        ]
        parameters = planned.parameters
        reads: list[list[Tensor | None]] = [gradients, [*parameters]] if planned.reads_weights else [gradients]
        squares_B, *weights = squares_of(planned.kernel, *reads)
        weights_B = weights[0] if weights else None
        decision = planned.gradient.decide(squares_B, weights_B)
        if any("bin_sq" in state for state in states):
            self._learn_bin_squares(squares_B, decision, gradients, states, groups)
        updates: list[Tensor | None] = []
        for t, gradient in enumerate(gradients):
            if gradient is None:
                updates.append(None)
            else:
                updates.append(self._update(t, gradient, states[t], groups[t], decision))
        if planned.update is not None:
            pace_B = planned.rates.pace_B(num_bins)
            cap = planned.update.decide(planned.update_squares(updates), weights_B, pace_B)
            planned.kernel.scale_(updates, cap.scale_B, ~cap.finite_B)
        for t, update in enumerate(updates):
            if update is not None:
                parameter, group = parameters[t], groups[t]
                if group["weight_decay"] != 0:
                    live = self.shapes.factor(t, decision.finite_B, parameter.dtype)
                    shrink = 1 - group["lr"] * group["weight_decay"]
                    parameter.copy_(torch.where(live, parameter * shrink, parameter))
                parameter.sub_(update.to(parameter.dtype))
        self.decision = decision

    def _update(
        self, t: int, gradient: Tensor, state: dict[str, Any], group: dict[str, Any], decision: Decision
    ) -> Tensor:
        """Enter one gradient into its moments and return the update before its cap."""
        beta1, beta2 = group["betas"]
        m = state["exp_avg"]
        live = self.shapes.factor(t, decision.finite_B, m.dtype)
        scaled = gradient * self.shapes.factor(t, decision.scale_B, gradient.dtype)
        scaled = torch.where(live, scaled, torch.zeros((), dtype=scaled.dtype, device=scaled.device)).to(m.dtype)
        m.copy_(torch.where(live, torch.lerp(m, scaled, 1 - beta1), m))
        step = float(state["step"])
        if "bin_sq" in state:
            spread = self._bins(t, state["bin_sq"], m)
        else:
            v = state["exp_avg_sq"]
            v.copy_(torch.where(live, v * beta2 + scaled * scaled * (1 - beta2), v))
            spread = v
        denominator = spread.sqrt() / (1 - beta2**step) ** 0.5 + group["eps"]
        update = m * (group["lr"] / (1 - beta1**step)) / denominator
        return torch.where(live, update, torch.zeros((), dtype=update.dtype, device=update.device))

    def _bins(self, t: int, values: Tensor, like: Tensor) -> Tensor:
        """Spread a tensor's own bin values over its elements."""
        values_B = values.new_zeros(self.planned.plan.num_bins)
        values_B[self._ids(t, values)] = values
        return self.shapes.factor(t, values_B, like.dtype)

    def _learn_bin_squares(
        self,
        squares_B: Tensor,
        decision: Decision,
        gradients: list[Tensor | None],
        states: list[dict[str, Any]],
        groups: list[dict[str, Any]],
    ) -> None:
        mean_B = (decision.norm_B * decision.scale_B) ** 2 / self.planned.gradient.numel_B
        for t, gradient in enumerate(gradients):
            if gradient is None:
                continue
            v, ids, beta2 = states[t]["bin_sq"], self._ids(t, states[t]["bin_sq"]), groups[t]["betas"][1]
            fresh = beta2 * v + (1 - beta2) * mean_B[ids].to(v.dtype)
            v.copy_(torch.where(decision.finite_B[ids], fresh, v))

    def _ids(self, t: int, like: Tensor) -> Tensor:
        return torch.from_numpy(self.planned.bins_of_tensor[t]).to(like.device)
