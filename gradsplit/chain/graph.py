"""The autograd graph as plain data: nodes in the order of the forward pass, their consumers, and their modules.

Only this module reads the private attributes of autograd's nodes, `_sequence_nr` and `_input_metadata`. Nodes are
numbered 0 (oldest) to N-1 (newest); `_N` marks one entry per node.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..hooks import not_traced

_LEAF = 2**63  # AccumulateGrad has the largest sequence number, since it is not an operation of the forward pass


def next_sequence_number() -> int:
    """The number that the next operation of the forward pass will get."""
    return int(torch._C._autograd._get_sequence_nr())


@dataclass
class CallTrace:
    """Which module ran when, in units of autograd's sequence numbers."""

    calls: list[tuple[int, int, str]] = field(default_factory=list)

    def module_of(self, number: int) -> str:
        """Name of the innermost module that ran when the operation was made; "" is the root or the loss."""
        best, width = "", None
        for start, stop, name in self.calls:
            if start <= number < stop and (width is None or stop - start <= width):
                best, width = name, stop - start
        return best


@contextmanager
def tracing(model: nn.Module) -> Iterator[CallTrace]:
    """Record the calls of every module of the model while the context is open."""
    trace, open_calls, handles = CallTrace(), [], []

    def enter(module: nn.Module, args: Any) -> None:
        open_calls.append(next_sequence_number())

    for name, module in model.named_modules():

        def leave(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
            if open_calls:
                trace.calls.append((open_calls.pop(), next_sequence_number(), name))

        handles.append(module.register_forward_pre_hook(not_traced(enter)))
        handles.append(module.register_forward_hook(not_traced(leave)))
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Graph:
    """Operations between some tensors and the leaves, oldest first.

    Attributes:
        nodes_N: autograd nodes; index 0 is the oldest operation.
        producers_N: for each node, the indices of the nodes whose output it reads (leaves left out).
        scalar_N: whether every output of the node has one entry.
        leaf_N: whether the node reads a leaf (a parameter) directly.
        data_N: whether it reads a tensor without gradient (the data), or looks up entries in a table.
        consumers: (node, output) -> list of (consumer node, index of the consumer's input), oldest consumer first.
    """

    nodes_N: list[Any]
    producers_N: list[list[int]]
    scalar_N: list[bool]
    leaf_N: list[bool]
    data_N: list[bool]
    consumers: dict[tuple[int, int], list[tuple[int, int]]]

    def sequence_number(self, node: int) -> int:
        """The place of a node among all operations of this process; a `CallTrace` names the module for it."""
        return int(self.nodes_N[node]._sequence_nr())

    def shape(self, node: int, output: int) -> tuple[int, ...]:
        """Shape of one output of a node."""
        return tuple(self.nodes_N[node]._input_metadata[output].shape)


def walk(outputs: Iterable[Tensor]) -> Graph:
    """Walk the autograd graph from some tensors to its leaves.

    Args:
        outputs: tensors of a forward pass, for example the loss; tensors without a graph are ignored.

    Returns:
        The graph as data. It keeps the nodes alive, so drop it before the next step.

    >>> x = torch.ones(2, requires_grad=True); y = x * 2
    >>> graph = walk([y.sum() + y.mean()])
    >>> [len(users) for users in graph.consumers.values() if len(users) > 1]
    [2]
    """
    found: dict[Any, list[tuple[Any, int]]] = {}
    stack = [tensor.grad_fn for tensor in outputs if tensor.grad_fn is not None]
    while stack:
        node = stack.pop()
        if node in found:
            continue
        edges = [(below, number) for below, number in node.next_functions if below is not None]
        found[node] = edges
        stack.extend(below for below, _ in edges if below not in found)
    operations = sorted((node for node in found if node._sequence_nr() < _LEAF), key=lambda node: node._sequence_nr())
    index = {node: number for number, node in enumerate(operations)}
    producers_N: list[list[int]] = []
    leaf_N: list[bool] = []
    data_N: list[bool] = []
    consumers: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for number, node in enumerate(operations):
        producers, leaf, data = [], False, type(node).__name__.startswith(("Embedding", "Index", "Gather"))
        for place, (below, output) in enumerate(node.next_functions):
            if below is None:
                data = True
                continue
            if below in index:
                producers.append(index[below])
                consumers[index[below], output].append((number, place))
            else:
                leaf = True
        producers_N.append(producers)
        leaf_N.append(leaf)
        data_N.append(data)
    scalar_N = [_is_scalar(node) for node in operations]
    return Graph(operations, producers_N, scalar_N, leaf_N, data_N, dict(consumers))


def _is_scalar(node: Any) -> bool:
    metadata = getattr(node, "_input_metadata", None)
    if not metadata:
        return False
    sizes = [int(torch.Size(entry.shape).numel()) for entry in metadata if entry.shape is not None]
    return bool(sizes) and max(sizes) == 1
