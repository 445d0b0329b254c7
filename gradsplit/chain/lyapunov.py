"""Leading Lyapunov exponents: how fast neighbouring states of a recurrence part or meet, step by step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def lyapunov_exponents(step: Callable[[int, Tensor], Tensor], states: list[Tensor], num: int = 4) -> list[float]:
    """Mean logarithmic growth of the leading directions along a trajectory.

        J_t Q_t = Q_{t+1} R_t,   lambda_i = mean over t of log |R_t[i, i]|

    An exponent above 0 means that the forward state and the backward signal grow by exp(lambda) a step, so
    the gradient through T steps by exp(lambda T): explosion. Far below 0 it vanishes.

    Args:
        step: `step(t, state) -> next state` for one sample, (S,) to (S,).
        states: the states (S,) that enter the steps, in order.
        num: how many exponents.

    Returns:
        The exponents, natural logarithm a step, largest first; -inf where a direction is lost.

    >>> doubling = torch.diag(torch.tensor([2.0, 0.5], dtype=torch.float64))
    >>> trajectory = [torch.zeros(2, dtype=torch.float64)] * 40
    >>> found = lyapunov_exponents(lambda t, h: doubling @ h, trajectory, num=2)
    >>> [round(value, 3) for value in found]                                   # log 2, log 1/2
    [0.693, -0.693]

    Source: the QR method of Benettin et al. 1980.
    """
    size = states[0].numel()
    num = min(num, size)
    # the identity's first columns could lie in an invariant subspace; a fixed mixed start cannot
    seed = torch.arange(1, size * num + 1, dtype=states[0].dtype, device=states[0].device).reshape(size, num)
    directions, _ = torch.linalg.qr(torch.cos(seed * 12.9898))
    total = torch.zeros(num, dtype=torch.float64, device=states[0].device)
    # the start is forgotten over the first tenth of the trajectory
    skip = len(states) // 10
    for time, state in enumerate(states):
        pushed = torch.func.vmap(
            lambda v, time=time, state=state: torch.func.jvp(lambda h: step(time, h), (state,), (v,))[1]
        )(directions.T)
        directions, upper = torch.linalg.qr(pushed.T)
        if time >= skip:
            total += upper.diagonal().abs().to(torch.float64).log()
    return sorted((total / max(1, len(states) - skip)).tolist(), reverse=True)
