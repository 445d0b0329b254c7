"""The orthogonal direction: momentum whose singular values are all drawn near one."""

from __future__ import annotations

from collections import defaultdict
from typing import ClassVar

import torch
from torch import Tensor

from .direction import Direction, Turn, entered

__all__ = ["Orthogonal", "orthogonalised", "product_dtype"]

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of Newton-Schulz's quintic, from Muon (Jordan et al. 2024): steep at zero, between 0.7 and 1.2 near one."""

STEPS = 5


def orthogonalised(matrices: Tensor, steps: int = STEPS) -> Tensor:
    """Return matrices with all singular values drawn near 1, by Newton-Schulz.

        X <- X / ||X||_F;   then ``steps`` times:   X <- Q X,   Q = a + b A + c A A,   A = X X^T

    Where one side is at least twice the other, the long side takes part in the first and the last product alone. In
    between A <- Q A Q, since Q and A commute, and the Qs are gathered. That is the same in exact arithmetic. Halves
    keep to the products above, since A squares what is small.

    Args:
        matrices: (S, rows, cols), real or complex; the smaller side is multiplied.
        steps: five leave singular values above 0.01 of the norm between about 0.7 and 1.2.

    >>> d = orthogonalised(torch.diag(torch.tensor([3.0, 0.1]))[None])[0]
    >>> bool((torch.linalg.svdvals(d) - 1).abs().max() < 0.35)
    True
    """
    a, b, c = COEFFICIENTS
    flip = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mH if flip else matrices
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-30)
    if x.shape[-1] >= 2 * x.shape[-2] and x.dtype not in (torch.float16, torch.bfloat16) and steps:
        x = torch.bmm(_gathered(torch.bmm(x, x.mH), steps), x)
    else:
        for _ in range(steps):
            gram = torch.bmm(x, x.mH)
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mH if flip else x


def _gathered(gram: Tensor, steps: int) -> Tensor:
    """The product of all Qs, (S, n, n), of matrices whose Gram matrices these are."""
    a, b, c = COEFFICIENTS
    gathered = None
    for step in range(steps):
        q = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        q.diagonal(dim1=-2, dim2=-1).add_(a)
        gathered = q if gathered is None else torch.bmm(q, gathered)
        if step < steps - 1:
            gram = torch.bmm(torch.bmm(q, gram), q)
    assert gathered is not None
    return gathered


class Orthogonal(Direction):
    """Momentum made orthogonal, block by block: what Muon does to a matrix.

        m <- m + (1 - beta1) (g' - m);      D = orthogonalised(m + (1 - beta1) (g' - m))       Nesterov momentum

    Blocks of equal shapes are one batched product. From Muon (Jordan et al. 2024). Deviations: the gradient is bounded
    row by row before it enters the memory; the length of D does not matter, since every row moves by a share of its
    own length; computed in float32 on the CPU, and in bfloat16 on devices that have it.
    """

    name: ClassVar[str] = "orthogonal"
    memory: ClassVar[tuple[str, ...]] = ("momentum",)

    def refuses(self, shape: tuple[int, ...]) -> str:  # noqa: D102
        return "a tensor with two dimensions or more" if len(shape) < 2 else ""

    def turn(self, turns: list[Turn]) -> list[Tensor]:  # noqa: D102
        ahead = []
        for turn in turns:
            weight = 1 - turn.group["betas"][0]
            m = entered(turn.state["momentum"], turn.gradient, weight, turn.learns)
            whole = entered(m.clone(), turn.gradient, weight, turn.learns)
            ahead.append(whole if turn.whole is None else turn.whole(whole))
        self.orthogonalise_(ahead, turns)
        return [d if turn.piece is None else turn.piece(d) for d, turn in zip(ahead, turns, strict=True)]

    @staticmethod
    def orthogonalise_(ahead: list[Tensor], turns: list[Turn]) -> None:
        """Make matrices (S, rows, cols) orthogonal in place, each block by itself, equal shapes together."""
        alike: dict[tuple[object, ...], list[Tensor]] = defaultdict(list)
        for matrices, turn in zip(ahead, turns, strict=True):
            if not matrices.numel():
                continue
            num, rows, _ = matrices.shape
            wide = torch.view_as_complex(matrices.view(num, rows, -1, 2)) if turn.is_complex else matrices
            if turn.boxes:
                blocks = [wide[:, top:bottom, left:right] for top, bottom, left, right in turn.boxes]
            else:
                blocks = [wide.view(num * turn.blocks, rows // turn.blocks, -1)]
            for block in blocks:
                alike[tuple(block.shape[1:]), block.dtype, block.device].append(block)
        for blocks in alike.values():
            stack = torch.cat(blocks) if len(blocks) > 1 else blocks[0]
            made = orthogonalised(stack.to(product_dtype(stack.dtype, stack.device)))
            torch._foreach_copy_(blocks, list(made.split([len(block) for block in blocks])))


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return in what the products are computed: bfloat16 on cards that multiply it, at least float32 elsewhere.

    >>> product_dtype(torch.float32, torch.device("cpu"))
    torch.float32
    """
    if dtype.is_complex or dtype == torch.float64:
        return dtype
    fast = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8  # from Ampere on
    return torch.bfloat16 if fast else torch.float32
