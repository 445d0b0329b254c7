"""Everything the findings read, gathered once: the chain, the forks' shares, the units' activity, the calls."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..chain.chain import Chain
from ..chain.cut import leaves_below, pull
from ..chain.factors import gradient_chain
from ..chain.forks import find_forks
from ..chain.graph import Graph, tracing, walk
from ..chain.joints import LossFn, tensors_in

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


RECTIFIERS = (nn.ReLU, nn.ReLU6)
SQUASHERS = (nn.Tanh, nn.Sigmoid, nn.Hardtanh, nn.Hardsigmoid)


@dataclass(frozen=True)
class Call:
    """One call of a module: whether its floating inputs and outputs were finite."""

    module: str
    clean_in: bool
    clean_out: bool


@dataclass(frozen=True)
class Activity:
    """How alive one activation function is: share of units zero, or of outputs saturated, over the batch."""

    module: str
    kind: str
    dead: float
    saturated: float


@dataclass(frozen=True)
class ForkShare:
    """Norms of the branches' signals at one task fork, by branch, and the modules of each branch."""

    module: str
    norms: dict[str, float]
    modules: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Break:
    """Where the backward pass stopped being finite: operation, its module, the largest entry that entered."""

    module: str
    operation: str
    largest: float


@dataclass
class Evidence:
    """What a diagnosis knows.

    Attributes:
        model: the model.
        loss_fn: its loss.
        batch: the batch.
        optimizer: None, or the optimizer whose learning rate is judged.
        chain: the factored gradient.
        calls: calls of all modules in the order in which they returned; "" is the root.
        activity: of activation modules.
        forks: task forks with the norms of their branches.
        broken: where the backward pass stopped being finite, None if it did not.
        hot: weights hotter than their siblings.
        ladder: whether the ladder is to be asked how far each part may step.
        notes: what a finding could not, or did not, ask.
    """

    model: nn.Module
    loss_fn: LossFn
    batch: Any
    optimizer: Any
    chain: Chain
    calls: list[Call] = field(default_factory=list)
    activity: list[Activity] = field(default_factory=list)
    forks: list[ForkShare] = field(default_factory=list)
    broken: Break | None = None
    hot: list[WeightGain] = field(default_factory=list)
    ladder: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def finite(self) -> bool:
        """Whether loss and signals are."""
        return math.isfinite(self.chain.loss) and self.broken is None

    def explained(self, modules: set[str]) -> float:
        """Decades of gain that hot weights of these modules explain."""
        best: dict[str, float] = {}
        for entry in self.hot:
            if entry.module in modules:
                best[entry.module] = max(best.get(entry.module, 0.0), math.log10(entry.ratio))
        return sum(best.values())


def gather(model: nn.Module, loss_fn: LossFn, batch: Any, optimizer: Any) -> Evidence:
    """Measure everything; three forward and two backward passes."""
    chain = gradient_chain(model, loss_fn, batch)
    evidence = Evidence(model, loss_fn, batch, optimizer, chain, hot=hot_weights(model))
    with torch.enable_grad(), _watching(model, evidence), tracing(model) as trace:
        loss = loss_fn(model, batch)
    if not math.isfinite(chain.loss):
        return evidence
    graph = walk([loss])
    forks = [fork for fork in find_forks(graph, trace) if fork.role == "task"]
    kept: dict[tuple[int, int], Tensor] = {}
    breaks: list[tuple[int, float]] = []
    _listen(graph, {pair for fork in forks for branch in fork.branches for pair in branch.inputs}, kept, breaks)
    pull([loss], leaves_below([loss]), [torch.ones_like(loss)], list(model.parameters()))
    for fork in forks:
        norms = {}
        for branch in fork.branches:
            parts = [kept[pair] for pair in branch.inputs if pair in kept]
            norms[branch.name] = float(torch.linalg.vector_norm(torch.stack(parts).sum(0).double())) if parts else 0.0
        members = {branch.name: branch.modules for branch in fork.branches}
        evidence.forks.append(ForkShare(fork.module or "(root)", norms, members))
    if breaks:
        node, largest = max(breaks)  # the newest operation is the first of the backward pass
        module = trace.module_of(int(graph.nodes_N[node]._sequence_nr()))
        inside = any(start <= int(graph.nodes_N[node]._sequence_nr()) < stop for start, stop, _ in trace.calls)
        name = module or ("(root)" if inside else "(loss)")
        evidence.broken = Break(name, type(graph.nodes_N[node]).__name__.removesuffix("0"), largest)
    return evidence


def _listen(
    graph: Graph, wanted: set[tuple[int, int]], kept: dict[tuple[int, int], Tensor], breaks: list[tuple[int, float]]
) -> None:
    places: dict[int, list[int]] = {}
    for node, place in wanted:
        places.setdefault(node, []).append(place)
    for number, node in enumerate(graph.nodes_N):

        def hook(grad_inputs: Any, grad_outputs: Any, number: int = number) -> None:
            for place in places.get(number, ()):
                if grad_inputs[place] is not None:
                    kept[number, place] = grad_inputs[place].detach()
            entering = [g for g in grad_outputs if g is not None]
            leaving = [g for g in grad_inputs if g is not None]
            if all(_finite(g) for g in entering) and not all(_finite(g) for g in leaving):
                breaks.append((number, max((float(g.abs().max()) for g in entering if g.numel()), default=0.0)))

        node.register_hook(hook)


def _finite(tensor: Tensor) -> bool:
    # detached: a saved tensor more would upset a checkpointed block, which counts them
    return bool(torch.isfinite(tensor.detach()).all())


@contextmanager
def _watching(model: nn.Module, evidence: Evidence) -> Iterator[None]:
    handles = []
    for name, module in model.named_modules():

        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
            given = [t for _, t in tensors_in((args, kwargs)) if t.is_floating_point()]
            made = [t for _, t in tensors_in(output) if t.is_floating_point()]
            evidence.calls.append(Call(name, all(map(_finite, given)), all(map(_finite, made))))
            if made and isinstance(module, (*RECTIFIERS, *SQUASHERS)):
                evidence.activity.append(_activity(name, module, made[0].detach()))

        handles.append(module.register_forward_hook(leave, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _activity(name: str, module: nn.Module, output: Tensor) -> Activity:
    # a unit is a channel of a map (dimension 1 of 3 or more), else an entry of the last dimension
    axis = 1 if output.dim() >= 4 else output.dim() - 1
    by_unit = output.transpose(0, axis).reshape(output.shape[axis], -1) if output.dim() else output.reshape(1, 1)
    kind = type(module).__name__
    if isinstance(module, RECTIFIERS):
        return Activity(name, kind, float((by_unit == 0).all(1).double().mean()), 0.0)
    low, high = (-1.0, 1.0) if isinstance(module, (nn.Tanh, nn.Hardtanh)) else (0.0, 1.0)
    margin = 0.005 * (high - low)
    return Activity(name, kind, 0.0, float(((output < low + margin) | (output > high - margin)).double().mean()))
