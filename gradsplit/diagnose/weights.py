"""How hot each weight is: its root mean square against what keeps a random signal's size."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from torch import Tensor, nn

LOOKUP, RECURRENT, MAP = "lookup", "recurrent", "map"


@dataclass(frozen=True)
class WeightGain:
    """The gain a random signal would meet in one weight.

    Attributes:
        module: owner of the weight.
        parameter: its name in the owner.
        gain: ratio of root mean squares out / in for a random or a constant input, whichever is larger:
            max(rms(W) sqrt(fan-in), |mean(W)| fan-in); for a lookup table rms(W).
        reference: the median of this figure over the weights of its family in other modules, or 1 where there are none.
    """

    module: str
    parameter: str
    gain: float
    reference: float

    @property
    def ratio(self) -> float:
        """How many times hotter than its reference."""
        return self.gain / self.reference if self.reference > 0 else math.inf


def weight_gains(model: nn.Module) -> list[WeightGain]:
    """Gains of all weights with two dimensions or more; a tied weight counts once, under its first owner.

    >>> layer = nn.Linear(4, 2); _ = layer.weight.data.fill_(1.0)
    >>> [(entry.parameter, entry.gain, entry.reference) for entry in weight_gains(layer)]
    [('weight', 4.0, 1.0)]
    """
    seen: dict[int, int] = {}
    sizes: dict[int, Tensor] = {}
    found: list[tuple[str, str, str, float]] = []
    for name, module in model.named_modules():
        for parameter, tensor in module.named_parameters(recurse=False):
            if tensor.dim() < 2 or not tensor.numel() or not tensor.is_floating_point():
                continue
            family = _family(module)
            entry = (name, parameter, family, _gain(module, tensor, family))
            if id(tensor) not in seen:
                seen[id(tensor)] = len(found)
                if family == LOOKUP:
                    sizes[len(found)] = tensor
                found.append(entry)
            elif found[seen[id(tensor)]][2] == LOOKUP and family == MAP:
                # a table tied to an output layer is judged as the map that it is too, under its first name
                owner, known, _, _ = found[seen[id(tensor)]]
                found[seen[id(tensor)]] = (owner, known, MAP, entry[3])
    entries = []
    tables = {number: _size(table) for number, table in sizes.items()}
    for number, (name, parameter, family, gain) in enumerate(found):
        if family == LOOKUP:  # among tables also those that are tied to an output layer
            others = [size for other, size in tables.items() if other != number and math.isfinite(size)]
        else:
            others = [g for n, _, f, g in found if f == family and n != name and math.isfinite(g)]
        entries.append(WeightGain(name, parameter, gain, _reference(others)))
    return entries


def hot_weights(model: nn.Module, ratio: float = 3.5) -> list[WeightGain]:
    """Weights at least `ratio` times hotter than their reference, hottest first."""
    hot = [entry for entry in weight_gains(model) if math.isfinite(entry.gain) and entry.ratio >= ratio]
    return sorted(hot, key=lambda entry: -entry.ratio)


def _reference(others: list[float]) -> float:
    positive = [gain for gain in others if gain > 0]
    if not positive:
        return 1.0
    if len(positive) == 1:
        return positive[0]  # of two, the hotter one is judged by the cooler
    return statistics.median(positive)


def _gain(module: nn.Module, weight: Tensor, family: str) -> float:
    size = _size(weight)
    if family == LOOKUP:
        return size
    fan_in = _fan_in(module, weight)
    # weights of one sign add up on a constant input, such as the mean that a rectifier leaves
    return max(size * math.sqrt(fan_in), abs(float(weight.detach().double().mean())) * fan_in)


def _size(weight: Tensor) -> float:
    return float(weight.detach().double().square().mean().sqrt())


def _family(module: nn.Module) -> str:
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return LOOKUP
    return RECURRENT if isinstance(module, (nn.RNNBase, nn.RNNCellBase)) else MAP


def _fan_in(module: nn.Module, weight: Tensor) -> float:
    if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        reach = weight[0, 0].numel() / math.prod(module.stride)
        return max(1.0, weight.shape[0] / module.groups * reach)
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # transformers' transposed linear layer
        return float(weight.shape[0])
    return weight.numel() / weight.shape[0]
