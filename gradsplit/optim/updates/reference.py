"""The reference update of GSO: design formulas tensor by tensor in eager torch. Every fused update must equal it.

Per bin b, with gradient g, weights w, scale s_b from the gradient's ledger:

    g'  = s_b g                        m   = b1 m + (1 - b1) g'
    v   = b2 v + (1 - b2) g'^2         element-wise, or one a bin:  v_b = b2 v_b + (1 - b2) s_b^2 square_b / n_b
    u   = lr  m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)
    w   = w - c_b (u + lr decay w)     c_b from the update's ledger

A bin whose gradient is not finite is passed over: weights, moments and history stay as they were.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...amp import Scaling
from ...budget import Decision
from ...kernels.eager import EagerKernel
from ...kernels.kernel import accumulate_dtype
from ...split import Split

__all__ = ["ReferenceUpdate"]


class ReferenceUpdate:
    """One step of a `Split`'s parameters in eager torch, on any device."""

    def __init__(self, split: Split) -> None:
        self.split = split
        self.decision: Decision | None = None
        kernel = split.kernel
        self.shapes = kernel if isinstance(kernel, EagerKernel) else EagerKernel(split.local_plan, kernel.device)
        self._ids_T = [torch.from_numpy(ids).to(kernel.device) for ids in split.bins_of_tensor]

    def step(
        self,
        gradients: list[Tensor | None],
        states: list[dict[str, Any]],
        groups: list[dict[str, Any]],
        scaling: Scaling | None = None,
    ) -> None:
        """Update the parameters in place; afterwards `decision` is that on the gradient.

        Nothing waits for the device, and all of it can be traced; with gradients enabled autograd sees the update.

        Args:
            gradients: one a parameter, as backward left it; None: the parameter is passed over.
            states: each parameter's moments, from `GSO`.
            groups: each parameter's hyper-parameters.
            scaling: what a GradScaler says of the gradients; on overflow every bin counts as not finite.
        """
        split = self.split
        # Under maximize a copy is negated, never the gradient itself.
        gradients = [
            -g if g is not None and group["maximize"] else g for g, group in zip(gradients, groups, strict=True)
        ]
        weights = split.parameters
        if torch.is_grad_enabled():  # what autograd keeps must not be what is overwritten below
            weights = [weight.clone() for weight in weights]
        reads: list[list[Tensor | None]] = [gradients, [*weights]] if split.reads_weights else [gradients]
        squares_B, *weights_B = (_smooth(squares) for squares in split.kernel.squares_many(reads))
        weight_squares_B = weights_B[0] if weights_B else None
        if scaling is not None:
            squares_B = scaling.unscaled_squares(squares_B)
            squares_B = torch.where(scaling.overflow(squares_B), torch.full_like(squares_B, torch.inf), squares_B)
        decision = split.gradient.decide(squares_B, weight_squares_B)
        times_B = decision.scale_B if scaling is None else scaling.unscaled(decision.scale_B)
        if any("bin_sq" in state for state in states):
            self._learn_bin_squares(decision, gradients, states, groups)
        updates: list[Tensor | None] = [
            None if g is None else self._update(t, g, states[t], groups[t], times_B, decision.finite_B)
            for t, g in enumerate(gradients)
        ]
        cap = None
        if split.update is not None:
            moved_B = _smooth(split.update_squares(updates))
            cap = split.update.decide(moved_B, weight_squares_B, split.pace_B())
        for t, update in enumerate(updates):
            if update is not None:
                decay = groups[t]["lr"] * groups[t]["weight_decay"]
                if cap is not None:
                    share = self._factor(t, cap.scale_B, update)
                    update, decay = self._where(t, cap.finite_B, update * share, 0.0), decay * share
                weight = weights[t].to(update.dtype)
                fresh = self._where(t, decision.finite_B, weight * (1 - decay) - update, weight)
                split.parameters[t].copy_(fresh)
        self.decision = decision

    def _update(
        self,
        t: int,
        gradient: Tensor,
        state: dict[str, Any],
        group: dict[str, Any],
        times_B: Tensor,
        finite_B: Tensor,
    ) -> Tensor:
        """Enter one gradient into its moments and return the update before its cap, in at least float32."""
        beta1, beta2 = group["betas"]
        # The counter as float64: a power of it in float32 would be off in the sixth digit.
        step = state["step"].to(accumulate_dtype(state["step"].device))
        # In at least float32; half-precision moments are rounded when they are stored, not before they are used.
        wide = torch.promote_types(state["exp_avg"].dtype, torch.float32)
        m = state["exp_avg"].to(wide, copy=torch.is_grad_enabled())
        g = self._where(t, finite_B, gradient.to(wide) * self._factor(t, times_B, m), 0.0)
        fresh_m = self._where(t, finite_B, torch.lerp(m, g, 1 - beta1), m)
        if "bin_sq" in state:
            spread = self._bins(t, state["bin_sq"], m)
        else:
            v = state["exp_avg_sq"].to(wide, copy=torch.is_grad_enabled())
            spread = self._where(t, finite_B, v * beta2 + g * g * (1 - beta2), v)
            state["exp_avg_sq"].copy_(spread)
        state["exp_avg"].copy_(fresh_m)
        denominator = spread.sqrt() / (1 - beta2**step).sqrt() + group["eps"]
        update = fresh_m * (group["lr"] / (1 - beta1**step)) / denominator
        return self._where(t, finite_B, update, 0.0)

    def _factor(self, t: int, values_B: Tensor, like: Tensor) -> Tensor:
        return self.shapes.factor(t, values_B, like.dtype)

    def _where(self, t: int, chosen_B: Tensor, value: Tensor, other: Tensor | float) -> Tensor:
        """The value in the bins that are chosen."""
        return torch.where(self.shapes.factor(t, chosen_B, value.dtype), value, other)

    def _bins(self, t: int, values: Tensor, like: Tensor) -> Tensor:
        """Spread a tensor's own bin values over its elements."""
        values_B = values.new_zeros(self.split.plan.num_bins).index_copy(0, self._ids_T[t], values)
        return self.shapes.factor(t, values_B, like.dtype)

    def _learn_bin_squares(
        self,
        decision: Decision,
        gradients: list[Tensor | None],
        states: list[dict[str, Any]],
        groups: list[dict[str, Any]],
    ) -> None:
        mean_B = (decision.norm_B * decision.scale_B) ** 2 / self.split.gradient.numel_B
        for t, gradient in enumerate(gradients):
            if gradient is None:
                continue
            v, ids, beta2 = states[t]["bin_sq"], self._ids_T[t], groups[t]["betas"][1]
            fresh = beta2 * v + (1 - beta2) * mean_B[ids].to(v.dtype)
            v.copy_(torch.where(decision.finite_B[ids], fresh, v))


def _smooth(squares_B: Tensor) -> Tensor:
    """The same squares; for autograd a square of 0 becomes a constant, since the root has no derivative there."""
    return torch.where(squares_B != 0, squares_B, 0.0) if torch.is_grad_enabled() else squares_B
