"""The autograd graph as plain data: nodes in the order of the forward pass, their consumers, and their modules.

Only this module reads what is private to autograd: `_sequence_nr` and `_input_metadata` of a node, and the state of the
backward pass that runs. Nodes are numbered 0 (oldest) to N-1 (newest); `_N` marks one entry per node.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from ..hooks import not_traced

_LEAF = 2**63  # AccumulateGrad has the largest sequence number, since it is not an operation of the forward pass


def next_sequence_number() -> int:
    """The number that the next operation of the forward pass will get."""
    return int(torch._C._autograd._get_sequence_nr())


class ModelHook:
    """A hook of one model and of no copy of it: in a copy, a pickle or a saved file it does nothing.

    A function would not do. Copies of a model share its functions, so a copy would still run the hook, and a pickle
    refuses functions that are local. What stands in a copy needs nothing of this package.

    Args:
        act: what the hook runs; the compiler leaves it out of its graphs.

    >>> import copy
    >>> hook = ModelHook(lambda *args: 7)
    >>> hook(None), copy.deepcopy(hook)(None)
    (7, None)
    """

    def __init__(self, act: Callable[..., Any]) -> None:
        self._act = not_traced(act)

    def __call__(self, *args: Any) -> Any:
        """Run the hook."""
        return self._act(*args)

    def __reduce__(self) -> Any:
        return getattr, (contextlib.nullcontext(), "__exit__")  # it takes any arguments and returns None


class Accumulation:
    """Whether the backward pass that runs accumulates into parameters; hooks ask this before they act.

    `torch.autograd.grad` does not, and neither does a pass to the inputs alone: there a signal is a value that the loss
    may be made of. The answer is read off the leaves below the node that runs. If none of them is a parameter, as in
    `torch.func.functional_call`, any leaf counts that the model was not called with. A reentrant checkpoint hides its
    leaves, but it runs in full passes only.
    """

    def __init__(self) -> None:
        self._inputs: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()
        self._known = -1  # the number of the last pass that was found to accumulate
        self._asked, self._seen = -1, set[Any]()  # the pass that was asked last, and the nodes without a parameter

    def __reduce__(self) -> Any:
        return Accumulation, ()  # what belongs to a pass is not copied

    def note_inputs(self, inputs: Iterable[Tensor]) -> None:
        """Keep in mind the leaves that a model is called with, because they are no parameters."""
        for tensor in inputs:
            if tensor.requires_grad and tensor.is_leaf:
                self._inputs[id(tensor)] = tensor

    def running(self) -> bool:
        """Whether the pass accumulates; to be called from a hook on a tensor or a node."""
        number = int(torch._C._current_graph_task_id())
        if number == self._known or number < 0:  # below 0 a compiled graph runs the hook, in a full pass
            return True
        if self._reaches_parameters(number):
            self._known = number
            return True
        return False

    def _reaches_parameters(self, number: int) -> bool:
        if number != self._asked:
            self._asked, self._seen = number, set()
            Variable._execution_engine.queue_callback(self._forget)
        stack: list[Any] = [torch._C._current_autograd_node()]
        parameters = others = False
        while stack:
            node = stack.pop()
            if node is None or node in self._seen:
                continue
            self._seen.add(node)
            leaf = getattr(node, "variable", None)
            if isinstance(leaf, Tensor):
                if id(leaf) in self._inputs:
                    continue
                filled = _fills(node)
                if isinstance(leaf, nn.Parameter):
                    if filled:
                        return True
                    parameters = True
                others = others or filled
            elif type(node).__name__ == "CheckpointFunctionBackward" and _fills(node):
                return True
            else:
                stack.extend(below for below, _ in node.next_functions)
        return others and not parameters

    def _forget(self) -> None:
        self._asked, self._seen = -1, set()  # nodes keep the graph alive


def batched(tensor: Tensor) -> bool:
    """Whether a tensor lives inside `torch.func.vmap` and a signal can pass through it."""
    layers, functorch = [tensor], torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(layers[-1]):
        layers.append(functorch.get_unwrapped(layers[-1]))
    return any(map(functorch.is_batchedtensor, layers[:-1])) and any(layer.requires_grad for layer in layers)


def _fills(node: Any) -> bool:
    """Whether the pass that runs executes a node; a leaf whose gradient is only returned is not executed."""
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # torch's answer for a leaf whose gradient `torch.autograd.grad` returns
        return False


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
    trace, open_calls = CallTrace(), list[int]()

    def enter(module: nn.Module, args: Any) -> None:
        open_calls.append(next_sequence_number())

    with contextlib.ExitStack() as hooks:
        for name, module in model.named_modules():

            def leave(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
                if open_calls:
                    trace.calls.append((open_calls.pop(), next_sequence_number(), name))

            hooks.callback(module.register_forward_pre_hook(ModelHook(enter)).remove)
            hooks.callback(module.register_forward_hook(ModelHook(leave)).remove)
        yield trace


@dataclass
class Graph:
    """Operations between some tensors and the leaves, oldest first.

    Attributes:
        nodes_N: autograd nodes; index 0 is the oldest operation.
        producers_N: for each node, the indices of the nodes whose output it reads (leaves left out).
        scalar_N: whether every output of the node has one entry.
        leaf_N: whether the node reads a leaf (a parameter) directly.
        data_N: whether it reads data, or looks up entries in a table. Data are tensors without gradient; beside
            parameters also leaves that are none, since a loss may ask for the gradient of its inputs.
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
    leaves = {node: isinstance(getattr(node, "variable", None), nn.Parameter) for node in found if node not in index}
    all_alike = not any(leaves.values())
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
            elif leaves[below] or all_alike:
                leaf = True
            else:
                data = True
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
