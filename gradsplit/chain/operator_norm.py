"""The operator norm of one factor by power iteration."""

from __future__ import annotations

import torch
from torch import Tensor


def operator_norm(
    ends: list[Tensor], leaving: list[tuple[Tensor, Tensor]], *, iterations: int = 20, tolerance: float = 1e-3
) -> float:
    """Largest singular value of the Jacobian of a factor, from below.

        v <- J^T J v / ||J^T J v||,   sigma = ||J v||

    The iteration starts at the signal that leaves the factor, so the result is at least the gain that was
    measured where the iteration converges upwards, which it does for every start.

    Args:
        ends: the factor's outputs.
        leaving: its (leaf, signal) pairs from one application of J^T.
        iterations: most rounds; each costs three passes backward.
        tolerance: stop when sigma moves by less than this share.

    Returns:
        sigma, a lower bound that converges to the operator norm; no unit.

    >>> x = torch.ones(2, requires_grad=True); y = x * torch.tensor([2.0, 7.0])
    >>> round(operator_norm([y], [(x, torch.ones(2))]), 3)
    7.0

    Source: power iteration; J v by the double vector-Jacobian product, which needs no forward mode.
    """
    leaves = [leaf for leaf, _ in leaving]
    direction = _unit([grad.detach() for _, grad in leaving])
    probes = [torch.zeros_like(end, requires_grad=True) for end in ends]
    pulled = torch.autograd.grad(ends, leaves, probes, create_graph=True, allow_unused=True)
    used = [(number, grad) for number, grad in enumerate(pulled) if grad is not None]
    sigma = 0.0
    for _ in range(iterations):
        pushed = torch.autograd.grad(
            [grad for _, grad in used], probes, [direction[number] for number, _ in used],
            retain_graph=True, allow_unused=True,
        )  # fmt: skip
        image = [torch.zeros_like(p) if g is None else g for p, g in zip(probes, pushed, strict=True)]
        new = float(sum(part.double().square().sum() for part in image) ** 0.5)
        if new == 0.0:
            return 0.0
        back = torch.autograd.grad(ends, leaves, image, retain_graph=True, allow_unused=True)
        direction = _unit([torch.zeros_like(x) if g is None else g for x, g in zip(leaves, back, strict=True)])
        if abs(new - sigma) <= tolerance * new:
            return new
        sigma = new
    return sigma


def _unit(parts: list[Tensor]) -> list[Tensor]:
    length = sum(part.double().square().sum() for part in parts) ** 0.5
    return [(part / length).to(part.dtype) for part in parts]
