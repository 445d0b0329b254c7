"""Many runs of one tanh recurrence side by side, each with weights, data and limits of its own.

A recurrence of 50 units is too small for a processor: nearly all its time goes into starting operations. Here the runs
are one more dimension of every array, so that five seeds cost little more than one. Forward and backward pass are
written out; `tests/chain/test_side_by_side.py` holds them against autograd, `gain_penalty` and `ChainSplitter`.

Legend: `_R` one entry a run. Arrays: time T, runs R, batch B, units H.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradsplit.lab.workloads.recurrence import TanhRNN

METHODS = ("SGD", "global clip", "clip + gain penalty", "per-step bounds")
NAMES = ("w_in", "w_rec", "bias", "head.weight", "head.bias")


@dataclass(frozen=True)
class Method:
    """What acts on the gradient: a limit on the whole, a weight of the gain penalty, a limit on each step's signal."""

    limit: float = float("inf")
    penalty: float = 0.0
    step_limit: float = float("inf")


def method(name: str, penalty: float = 2.0) -> Method:
    """A method by its name in the tables."""
    return {
        "SGD": Method(),
        "global clip": Method(limit=1.0),
        "clip + gain penalty": Method(limit=1.0, penalty=penalty),
        "per-step bounds": Method(step_limit=0.1),
    }[name]


class Recurrences:
    """R runs of h_t = tanh(W_in x_t + b + W_rec h_{t-1}) with outputs read from the last h.

    Args:
        models: one model a run; their weights are copied.
    """

    def __init__(self, models: list[TanhRNN]) -> None:
        states = [model.state_dict() for model in models]
        self.weights = {name: torch.stack([state[name] for state in states]).clone() for name in NAMES}

    def keep(self, running_R: Tensor) -> None:
        """Go on with some of the runs only."""
        self.weights = {name: value[running_R] for name, value in self.weights.items()}

    def states(self, x: Tensor) -> Tensor:
        """States (T + 1, R, B, H), the zeros at the start first, of inputs (T, R, B, I)."""
        w = self.weights
        steps, runs, batch, _ = x.shape
        driven = torch.matmul(x, w["w_in"].transpose(1, 2)) + w["bias"][:, None]
        recurrent = w["w_rec"].transpose(1, 2)
        h = x.new_zeros(steps + 1, runs, batch, driven.shape[-1])
        for t in range(steps):
            torch.baddbmm(driven[t], h[t], recurrent, out=h[t + 1]).tanh_()
        return h

    def outputs(self, last: Tensor) -> Tensor:
        """Outputs (R, B, O) of the last states (R, B, H)."""
        return torch.baddbmm(self.weights["head.bias"][:, None], last, self.weights["head.weight"].transpose(1, 2))

    def gradients(self, x: Tensor, h: Tensor, d_out: Tensor, how: Method) -> tuple[dict[str, Tensor], Tensor]:
        """Gradients of the weights, and their norm (R,) before the limit.

            d_T = W_out^T d_out;  a_t = bounded(d_t) (1 - h_t^2);  d_{t-1} = W_rec^T a_t
            grad W_rec = sum_t a_t h_{t-1}^T

        Args:
            x: (T, R, B, I).
            h: (T + 1, R, B, H), from `states`.
            d_out: (R, B, O), the loss's gradient at the outputs.
            how: the bounds.
        """
        w = self.weights
        steps = x.shape[0]
        grads = {"head.weight": torch.bmm(d_out.transpose(1, 2), h[-1]), "head.bias": d_out.sum(1)}
        slope = 1 - h[1:].square()
        d = torch.empty_like(slope)  # the signal at each state, within its limit
        d[-1] = torch.bmm(d_out, w["head.weight"])
        a = torch.empty_like(slope)
        for t in range(steps - 1, -1, -1):
            if how.step_limit != float("inf"):
                norm_R = torch.linalg.vector_norm(d[t], dim=(1, 2), keepdim=True)
                d[t].mul_((how.step_limit / norm_R.clamp(min=1e-38)).clamp(max=1.0))
            torch.mul(d[t], slope[t], out=a[t])
            if t:
                torch.bmm(a[t], w["w_rec"], out=d[t - 1])
        flat = a.transpose(0, 1).flatten(1, 2).transpose(1, 2)  # (R, H, T B)
        grads["w_rec"] = torch.bmm(flat, h[:-1].transpose(0, 1).flatten(1, 2))
        grads["w_in"] = torch.bmm(flat, x.transpose(0, 1).flatten(1, 2))
        grads["bias"] = flat.sum(2)
        if how.penalty:
            grads["w_rec"] = grads["w_rec"] + how.penalty * self._penalty_gradient(d, a)
        norm_R = torch.stack([g.flatten(1).square().sum(1) for g in grads.values()]).sum(0).sqrt()
        if how.limit != float("inf"):
            scale_R = (how.limit / (norm_R + 1e-6)).clamp(max=1.0)
            grads = {name: g * scale_R.view(-1, *[1] * (g.dim() - 1)) for name, g in grads.items()}
        return grads, norm_R

    def _penalty_gradient(self, d: Tensor, a: Tensor) -> Tensor:
        """Gradient (R, H, H) by W_rec of mean_t (||W_rec^T a_t||^2 / ||d_t||^2 - 1)^2, with a and d constant."""
        # the ratio does not depend on the signal's scale: lift it so that squares of tiny signals do not underflow
        lift = d.abs().amax(dim=(0, 2, 3))[:, None, None].clamp(min=1e-38)
        d, a = d / lift, a / lift
        pulled = torch.matmul(a, self.weights["w_rec"])
        before = d.square().sum(-1)
        counts = before > 1e-30 * before.amax(dim=(0, 2))[:, None]
        safe = torch.where(counts, before, torch.ones_like(before))
        factor = torch.where(counts, 4 * (pulled.square().sum(-1) / safe - 1) / safe, torch.zeros_like(before))
        factor = factor / counts.sum(dim=(0, 2))[:, None].clamp(min=1)
        left = (a * factor[..., None]).transpose(0, 1).flatten(1, 2).transpose(1, 2)
        return torch.bmm(left, pulled.transpose(0, 1).flatten(1, 2))

    def update(self, grads: dict[str, Tensor], rate: float) -> None:
        """One step of plain gradient descent."""
        for name, grad in grads.items():
            self.weights[name].sub_(grad, alpha=rate)
