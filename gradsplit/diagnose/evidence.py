"""What the findings read, measured once: the chain, the shares at forks, activity, calls, and hot weights."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..chain.chain import Chain
from ..chain.factors import gradient_chain, leaves_below, pull
from ..chain.forks import find_forks
from ..chain.graph import Graph, tracing, walk
from ..chain.joints import LossFn, tensors_in

LOOKUP, RECURRENT, MAP = "lookup", "recurrent", "map"


@dataclass(frozen=True)
class WeightHeat:
    """How much one weight would enlarge a random or a constant input.

    Attributes:
        module: owner of the weight.
        parameter: its name in the owner.
        enlarges: ratio of root mean squares out / in for a random or a constant input, whichever is larger:
            max(rms(W) sqrt(fan-in), |mean(W)| fan-in); for a lookup table rms(W).
        reference: the median of this figure over the weights of its family in other modules; 1 if there are none.
    """

    module: str
    parameter: str
    enlarges: float
    reference: float

    @property
    def ratio(self) -> float:
        """How many times hotter than its reference."""
        return self.enlarges / self.reference if self.reference > 0 else math.inf


def weight_heats(model: nn.Module) -> list[WeightHeat]:
    """The heat of every weight with two dimensions or more; a tied weight counts once, under its first owner.

    >>> layer = nn.Linear(4, 2); _ = layer.weight.data.fill_(1.0)
    >>> [(entry.parameter, entry.enlarges, entry.reference) for entry in weight_heats(layer)]
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
            entry = (name, parameter, family, _enlargement(module, tensor, family))
            if id(tensor) not in seen:
                seen[id(tensor)] = len(found)
                if family == LOOKUP:
                    sizes[len(found)] = tensor
                found.append(entry)
            elif found[seen[id(tensor)]][2] == LOOKUP and family == MAP:
                # A table that is tied to an output layer is a map too. It is judged as one, under its first name.
                owner, known, _, _ = found[seen[id(tensor)]]
                found[seen[id(tensor)]] = (owner, known, MAP, entry[3])
    entries = []
    tables = {number: _size(table) for number, table in sizes.items()}
    for number, (name, parameter, family, enlarges) in enumerate(found):
        if family == LOOKUP:  # the other tables include those that are tied to an output layer
            others = [size for other, size in tables.items() if other != number and math.isfinite(size)]
        else:
            others = [size for n, _, f, size in found if f == family and n != name and math.isfinite(size)]
        entries.append(WeightHeat(name, parameter, enlarges, _reference(others)))
    return entries


def hot_weights(model: nn.Module, ratio: float = 3.5) -> list[WeightHeat]:
    """Weights at least `ratio` times hotter than their reference, hottest first."""
    hot = [entry for entry in weight_heats(model) if math.isfinite(entry.enlarges) and entry.ratio >= ratio]
    return sorted(hot, key=lambda entry: -entry.ratio)


def _reference(others: list[float]) -> float:
    positive = [other for other in others if other > 0]
    if not positive:
        return 1.0
    if len(positive) == 1:
        return positive[0]  # the hotter one of two is judged by the cooler one
    return statistics.median(positive)


def _enlargement(module: nn.Module, weight: Tensor, family: str) -> float:
    size = _size(weight)
    if family == LOOKUP:
        return size
    fan_in = _fan_in(module, weight)
    # Weights of one sign add up on a constant input, such as the mean that a rectifier leaves.
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
    """One call of a module: whether its floating inputs and outputs were finite, and whether they held a NaN."""

    module: str
    clean_in: bool
    clean_out: bool
    nan_in: bool = False
    nan_out: bool = False


@dataclass(frozen=True)
class Activity:
    """Over the batch, the share of an activation function's units that are zero, or of its outputs that saturate."""

    module: str
    kind: str
    dead: float
    saturated: float


@dataclass(frozen=True)
class ForkShare:
    """At one task fork, the norm of each branch's signal and the modules of each branch."""

    module: str
    norms: dict[str, float]
    modules: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Break:
    """Where the backward pass stopped being finite: the operation, its module, and the largest entry that entered."""

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
        optimizer: the optimizer whose learning rate is judged, or None.
        chain: the factored gradient.
        calls: calls of all modules in the order in which they returned; "" is the root.
        activity: dead and saturated units of the activation modules.
        forks: task forks with the norms of their branches.
        broken: where the backward pass stopped being finite, None if it did not.
        hot: weights that are hotter than their siblings.
        ladder: whether to ask the ladder how far each part may step.
        notes: what was not examined, and why.
        terms_of: gives the named terms of the loss, where the user's function has names for them.
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
    hot: list[WeightHeat] = field(default_factory=list)
    ladder: bool = False
    notes: list[str] = field(default_factory=list)
    terms_of: Callable[[nn.Module, Any], Any] | None = None

    @property
    def finite(self) -> bool:
        """Whether the loss and all signals are finite."""
        return math.isfinite(self.chain.loss) and self.broken is None

    def explained(self, modules: set[str]) -> float:
        """Decades of growth that hot weights of these modules explain."""
        best: dict[str, float] = {}
        for entry in self.hot:
            if entry.module in modules:
                best[entry.module] = max(best.get(entry.module, 0.0), math.log10(entry.ratio))
        return sum(best.values())


def gather(model: nn.Module, loss_fn: LossFn, batch: Any, optimizer: Any) -> Evidence:
    """Measure everything, in three forward and two backward passes."""
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
        node, largest = max(breaks)  # the newest operation is the first one of the backward pass
        number = graph.sequence_number(node)
        module = trace.module_of(number)
        inside = any(start <= number < stop for start, stop, _ in trace.calls)
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
    # Detached, since a checkpointed block counts the tensors that are saved, and one more would be an error.
    return bool(torch.isfinite(tensor.detach()).all())


@contextmanager
def _watching(model: nn.Module, evidence: Evidence) -> Iterator[None]:
    """Note the calls of all modules, and the activity of activation functions, while the context is open."""
    with ExitStack() as hooks:
        for name, module in model.named_modules():

            def leave(module: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
                given = [t for _, t in tensors_in((args, kwargs)) if t.is_floating_point()]
                made = [t for _, t in tensors_in(output) if t.is_floating_point()]
                clean_in, clean_out = all(map(_finite, given)), all(map(_finite, made))
                nan_in = not clean_in and any(bool(t.detach().isnan().any()) for t in given)
                nan_out = not clean_out and any(bool(t.detach().isnan().any()) for t in made)
                evidence.calls.append(Call(name, clean_in, clean_out, nan_in, nan_out))
                if made and isinstance(module, (*RECTIFIERS, *SQUASHERS)):
                    evidence.activity.append(_activity(name, module, made[0].detach()))

            hooks.callback(module.register_forward_hook(leave, with_kwargs=True).remove)
        yield


def _activity(name: str, module: nn.Module, output: Tensor) -> Activity:
    # A unit is a channel of a map (dimension 1 of four or more), or else an entry of the last dimension.
    axis = 1 if output.dim() >= 4 else output.dim() - 1
    by_unit = output.transpose(0, axis).reshape(output.shape[axis], -1) if output.dim() else output.reshape(1, 1)
    kind = type(module).__name__
    if isinstance(module, RECTIFIERS):
        return Activity(name, kind, float((by_unit == 0).all(1).double().mean()), 0.0)
    low, high = (-1.0, 1.0) if isinstance(module, (nn.Tanh, nn.Hardtanh)) else (0.0, 1.0)
    margin = 0.005 * (high - low)
    return Activity(name, kind, 0.0, float(((output < low + margin) | (output > high - margin)).double().mean()))
