"""Small tensors that every rank makes whole from the ranks' pieces, as part of a message that is sent anyway."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

from torch import Tensor

from .shards import shard_of

__all__ = ["Carried"]


class Carried:
    """Places of E elements, those of some sharded tensors one after the other, in rows of a message.

    Every rank writes what it holds and zeros elsewhere; the sum over ranks, divided by how many wrote an element, is
    the whole tensor, to the bit where the number of copies is a power of two.

    Args:
        names, tensors: as the optimizer holds them.
        add: adds a tensor over the ranks in place; called once, to count copies.
        like: a tensor of the message's dtype and device.
    """

    def __init__(self, names: Sequence[str], tensors: Sequence[Any], add: Callable[[Tensor], Any], like: Tensor):
        self.shapes = [tuple(int(size) for size in tensor.shape) for tensor in tensors]
        self._shards = [shard_of(name, tensor) for name, tensor in zip(names, tensors, strict=True)]
        self._bounds = [0, *accumulate(int(tensor.numel()) for tensor in tensors)]
        self.copies_E = like.new_zeros(self._bounds[-1])
        for t, shard in enumerate(self._shards):
            self.write(self.copies_E, t, like.new_ones(shard.shape))
        add(self.copies_E)

    def __len__(self) -> int:
        return self._bounds[-1]

    def write(self, row_E: Tensor, t: int, piece: Tensor) -> None:
        """Write this rank's piece of tensor t into a row of the message."""
        self.piece(self.whole(row_E, t), t).copy_(piece)

    def whole(self, row_E: Tensor, t: int) -> Tensor:
        """Return tensor t as a row of the message holds it, sharing memory."""
        return row_E[self._bounds[t] : self._bounds[t + 1]].view(self.shapes[t])

    def piece(self, whole: Tensor, t: int) -> Tensor:
        """Return this rank's piece of the whole tensor t, sharing memory."""
        shard, shape = self._shards[t], self.shapes[t]
        if len(shape) < 2:
            return whole.reshape(-1)[shard.col_start : shard.col_stop].reshape(shard.shape)
        behind = max(1, whole[0, 0].numel()) if whole.numel() else 1
        left, right = shard.col_start // behind, shard.col_stop // behind
        return whole[shard.row_start : shard.row_stop, left:right]
