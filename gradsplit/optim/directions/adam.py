"""Adam's direction: each entry by its own signal-to-noise ratio; for embeddings and vectors."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from .direction import Direction, Turn, entered

__all__ = ["Adam"]


class Adam(Direction):
    """Adam's update without its learning rate, with Nesterov momentum.

        m <- m + (1 - beta1) (g' - m);      v <- v + (1 - beta2) (g'^2 - v)
        D = (m + (1 - beta1) (g' - m)) / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)

    Its root mean square is kept up to 1, so that a row whose gradients are mostly noise makes small steps. From Adam
    (Kingma & Ba 2015) and Nadam (Dozat 2016). Deviation: Nadam corrects the two terms of the numerator apart.
    """

    name: ClassVar[str] = "adam"
    memory: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    keeps_length: ClassVar[bool] = True

    def turn(self, turns: list[Turn]) -> list[Tensor]:  # noqa: D102
        made = []
        for gradient, state, learns, group, *_ in turns:
            beta1, beta2 = group["betas"]
            m = entered(state["exp_avg"], gradient, 1 - beta1, learns)
            v = entered(state["exp_avg_sq"], gradient.square(), 1 - beta2, learns)
            unbias1, unbias2 = ((1 - beta ** state["step"]).to(m.dtype) for beta in (beta1, beta2))
            ahead = entered(m.clone(), gradient, 1 - beta1, learns).div_(unbias1)
            made.append(ahead.div_((v / unbias2).sqrt_().add_(max(group["eps"], 1e-30))))
        return made
