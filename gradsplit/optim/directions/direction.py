"""What a direction is: a memory per tensor, and a rule from bounded gradients to directions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

__all__ = ["Direction", "Turn"]


class Turn(NamedTuple):
    """S tensors of one step that are alike, as a direction sees them: an operation on all of them is one launch.

    Attributes:
        gradient: (S, rows, cols), bounded; zero where a row was not finite.
        state: the memories, each entry (S, rows, cols), changed in place; and ``step``, (S, 1, 1), counts from 1.
        learns: 1 where a row's gradient was finite, 0 where its memory must stay as it is; (S, rows, 1), or any shape
            that broadcasts over the gradient; None: all 1.
        group: the optimizer's group, with ``betas`` and ``eps``.
        blocks: equal blocks of rows that are optimised by themselves.
        boxes: blocks of other forms, in place of ``blocks``.
        is_complex: columns come in pairs, the parts of complex numbers.
        whole: gathers a shard into the whole matrix; None where it is whole.
        piece: cuts this rank's shard out of a whole matrix.
    """

    gradient: Tensor
    state: dict[str, Tensor]
    learns: Tensor | None
    group: dict[str, Any]
    blocks: int = 1
    boxes: tuple[tuple[int, int, int, int], ...] = ()
    is_complex: bool = False
    whole: Any = None
    piece: Any = None


class Direction(ABC):
    """Where a tensor goes.

    Attributes:
        name: what users write.
        memory: the names of its state, each a tensor like the parameter.
        keeps_length: the direction's own root mean square is kept up to 1, as the signal-to-noise ratio of Adam; else
            every row has the length of the share, whatever the direction's length.
    """

    name: ClassVar[str]
    memory: ClassVar[tuple[str, ...]]
    keeps_length: ClassVar[bool] = False

    @abstractmethod
    def turn(self, turns: list[Turn]) -> list[Tensor]:
        """Enter bounded gradients into the memories; return the directions, (S, rows, cols) per turn, all finite."""

    def refuses(self, shape: tuple[int, ...]) -> str:
        """Say what shape is expected if there is no rule for this one; empty if there is."""
        return ""


def entered(memory: Tensor, gradient: Tensor, weight: float, learns: Tensor | None) -> Tensor:
    """Move a running mean towards a gradient in place; return it.

        m_b <- m_b + weight (g_b - m_b)         rows that do not learn stay

    >>> import torch
    >>> entered(torch.zeros(2, 1), torch.ones(2, 1), 0.25, torch.tensor([[1.0], [0.0]])).tolist()
    [[0.25], [0.0]]
    """
    return memory.lerp_(gradient, weight) if learns is None else memory.lerp_(gradient, learns * weight)
