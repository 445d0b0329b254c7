"""The faults: what is done to a batch, to gradients between backward and control, or to the optimizer's state.

A run has round(rate x steps) faulty steps, drawn without replacement; steps and places depend on seed, fault and step
alone, so that every method meets the same faults. Elements and rows are drawn in proportion to the number of elements,
tensors uniformly.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradsplit.lab.task import Batch, generator

__all__ = ["EXPONENT_BITS", "FAULTS", "Fault", "faulty_steps", "flip_bit"]

EXPONENT_BITS = range(23, 31)  # of a float32; 30 is the highest, which takes 1e-3 to 3e35
_STREAM = 9  # apart from those of weights, batches and data


@dataclass(frozen=True)
class Fault:
    """One kind of fault; exactly one of its actions is set.

    Attributes:
        name: the name in the raw file.
        on_gradients: changes the gradients of a step in place.
        on_state: changes the optimizer's state in place.
        on_batch: batch -> (batch, factor of its loss).
    """

    name: str
    on_gradients: Callable[[Sequence[Tensor], torch.Generator], None] | None = None
    on_state: Callable[[Sequence[Tensor], torch.Generator], None] | None = None
    on_batch: Callable[[Batch, torch.Generator], tuple[Batch, float]] | None = None

    def draw(self, seed: int, step: int) -> torch.Generator:
        """The generator of everything random at a faulty step."""
        return generator(seed * 100_003 + zlib.crc32(self.name.encode()) % 100_003, _STREAM, step)


def faulty_steps(fault: Fault, seed: int, steps: int, rate: float) -> frozenset[int]:
    """The faulty steps of a run; never the first, at which an optimizer has no state yet."""
    picks = torch.randperm(steps - 1, generator=fault.draw(seed, -1))[: round(rate * steps)]
    return frozenset((picks + 1).tolist())


def flip_bit(tensor: Tensor, place: int, bit: int) -> None:
    """Flip one bit of one float32, in place.

    >>> x = torch.tensor([1.0])
    >>> flip_bit(x, 0, 30)
    >>> x
    tensor([inf])
    """
    bits = tensor.detach().view(-1)[place : place + 1].view(torch.int32)
    bits.bitwise_xor_(1 << bit)


def _element(tensors: Sequence[Tensor], draw: torch.Generator) -> tuple[Tensor, int]:
    """A tensor and the place of one of its elements, every element of all tensors equally likely."""
    place = int(torch.randint(sum(t.numel() for t in tensors), (1,), generator=draw))
    for tensor in tensors:
        if place < tensor.numel():
            return tensor, place
        place -= tensor.numel()
    raise ValueError("_element(…): expected at least one element.")


def _element_becomes(value: float) -> Callable[[Sequence[Tensor], torch.Generator], None]:
    def act(tensors: Sequence[Tensor], draw: torch.Generator) -> None:
        tensor, place = _element(tensors, draw)
        tensor.view(-1)[place] = value

    return act


def _row_becomes(value: float) -> Callable[[Sequence[Tensor], torch.Generator], None]:
    def act(tensors: Sequence[Tensor], draw: torch.Generator) -> None:
        tensor, place = _element(tensors, draw)
        rows = tensor.view(tensor.shape[0] if tensor.dim() > 1 else 1, -1)
        rows[place // rows.shape[1]] = value

    return act


def _tensor_becomes(value: float) -> Callable[[Sequence[Tensor], torch.Generator], None]:
    def act(tensors: Sequence[Tensor], draw: torch.Generator) -> None:
        tensors[int(torch.randint(len(tensors), (1,), generator=draw))].fill_(value)

    return act


def _bit_flips(bit: int | None) -> Callable[[Sequence[Tensor], torch.Generator], None]:
    def act(tensors: Sequence[Tensor], draw: torch.Generator) -> None:
        tensor, place = _element(tensors, draw)
        drawn = EXPONENT_BITS[int(torch.randint(len(EXPONENT_BITS), (1,), generator=draw))]
        flip_bit(tensor, place, drawn if bit is None else bit)

    return act


def _scaled(factor: float) -> Callable[[Batch, torch.Generator], tuple[Batch, float]]:
    """Inputs times a factor; where these are characters, the loss of the batch times the factor."""

    def act(batch: Batch, _: torch.Generator) -> tuple[Batch, float]:
        if batch[0].is_floating_point():
            return (batch[0] * factor, *batch[1:]), 1.0
        return batch, factor

    return act


def _shuffled(batch: Batch, draw: torch.Generator) -> tuple[Batch, float]:
    """All targets of the batch belong to other inputs of the batch, in one random order."""
    order = torch.randperm(len(batch[0]), generator=draw)
    return (batch[0], *(target[order] for target in batch[1:])), 1.0


_VALUES = {"nan": float("nan"), "inf": float("inf"), "3e38": 3e38}
_EXTENTS = {"element": _element_becomes, "row": _row_becomes, "tensor": _tensor_becomes}

FAULTS: dict[str, Fault] = {
    fault.name: fault
    for fault in (
        *(
            Fault(f"{value} in one {extent}", on_gradients=becomes(number))
            for extent, becomes in _EXTENTS.items()
            for value, number in _VALUES.items()
        ),
        *(Fault(f"gradient bit {bit} flips", on_gradients=_bit_flips(bit)) for bit in EXPONENT_BITS),
        Fault("optimizer state bit flips", on_state=_bit_flips(None)),
        *(Fault(f"batch x 1e{power}", on_batch=_scaled(10.0**power)) for power in (3, 4, 5, 6)),
        Fault("labels shuffled", on_batch=_shuffled),
    )
}
