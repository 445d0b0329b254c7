"""A loss as a graph of core ATen operations, traced from a Python function, and power series sent through it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.func import functionalize
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from .kinks import noting_crossings
from .rules import UnsupportedOperation, rule_of
from .series import Series, series_leaves

Params = Mapping[str, Tensor]
LossOfParams = Callable[[dict[str, Tensor]], Tensor]


class InFloat64(TorchFunctionMode):
    """Convert every floating argument of a function to float64, since batches and buffers are usually float32."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in _UNTOUCHED or (name.endswith("_") and not name.endswith("__")):
            return func(*args, **(kwargs or {}))  # a change in place would be lost on a copy
        args, kwargs = pytree.tree_map_only(Tensor, to_float64, (args, kwargs or {}))
        return func(*args, **kwargs)


_UNTOUCHED = frozenset({"__get__", "__set__", "__setitem__", "double", "dim", "size"})


def to_float64(x: Tensor) -> Tensor:
    """Return a floating tensor in float64, any other as it is."""
    return x.double() if x.is_floating_point() and x.dtype != torch.float64 else x


@dataclass(frozen=True)
class TracedLoss:
    """A loss as a graph of functional ATen operations.

    Args:
        names: parameter names, in the order of the graph's inputs.
        graph: the graph; its output is the scalar loss.
    """

    names: tuple[str, ...]
    graph: fx.GraphModule

    def loss(self, params: Params) -> float:
        """Return L(params) in float64; it may be inf or nan."""
        with torch.no_grad(), _default_float64(), _one_draw():
            return float(self.graph(*(params[name].detach().double() for name in self.names)))

    def series(self, params: Params, directions: Mapping[str, Tensor], order: int) -> Tensor:
        """Return the Taylor coefficients of t -> L(params + t direction), one per order and bin.

        Args:
            params: the point, float64.
            directions: for each tensor that moves, (B, *shape).
            order: highest order.

        Returns:
            (order + 1, B) float64 coefficients.
        """
        num_bins = next(iter(directions.values())).shape[0]
        inputs = [_moving(params[name].detach(), directions.get(name), order) for name in self.names]
        with torch.no_grad(), _default_float64(), _one_draw():
            out = _Interpreter(self.graph, order).run(inputs)
        if not isinstance(out, Series):  # none of the tensors that move reaches the loss
            out = Series(out.double().reshape(1, 1), order)
        coef = torch.zeros(order + 1, num_bins, dtype=torch.float64)
        coef[: out.degree + 1] = out.coef.reshape(out.degree + 1, -1)
        return coef

    def crossings(self, params: Params, directions: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the first-order steps at which comparisons of the graph change their outcome, each (B, decisions)."""
        with noting_crossings() as found:
            self.series(params, directions, 1)
        return found

    def gradient(self, params: Params) -> dict[str, Tensor]:
        """Return the gradient of the loss, zero for a parameter that does not reach it."""
        leaves = [params[name].detach().double().requires_grad_() for name in self.names]
        with torch.enable_grad(), _default_float64(), _one_draw():
            loss = self.graph(*leaves)
        if not loss.requires_grad:
            return {name: torch.zeros_like(leaf) for name, leaf in zip(self.names, leaves, strict=True)}
        found = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        return dict(zip(self.names, found, strict=True))

    def peak_numbers(self, moving: frozenset[str]) -> int:
        """Return how many numbers one order of one bin needs at once, in the values that move with these tensors."""
        last_use, moves, alive, peak = _last_uses(self.graph.graph), set(), {}, 0
        inputs = iter(self.names)
        for node in self.graph.graph.nodes:
            if node.op == "placeholder":
                if next(inputs) in moving:
                    moves.add(node)
            elif any(source in moves for source in node.all_input_nodes):
                moves.add(node)
            if node in moves:
                values = pytree.tree_leaves(node.meta.get("val"))
                alive[node] = sum(v.numel() for v in values if isinstance(v, Tensor))
                peak = max(peak, sum(alive.values()))
            for dead in last_use.get(node, ()):
                alive.pop(dead, None)
        return peak


def trace_loss(loss_of_params: LossOfParams, params: Params) -> TracedLoss:
    """Trace a scalar loss with core ATen decompositions, in float64, without mutations.

    Args:
        loss_of_params: maps {name: tensor} to a scalar tensor; what it closes over is constant.
        params: the point at which to trace; control flow that depends on values stays as it is at this point.

    Raises:
        ValueError: the loss is not a scalar.
    """
    # Imported here, since the tracer imports sympy, which takes seconds that `import gradsplit` need not take.
    from torch._decomp import core_aten_decompositions
    from torch.fx.experimental.proxy_tensor import make_fx

    names = tuple(params)

    def flat(*tensors: Tensor) -> Tensor:
        with InFloat64():
            loss = loss_of_params(dict(zip(names, tensors, strict=True)))
            if not isinstance(loss, Tensor) or loss.ndim != 0 or loss.is_complex():
                kind = f"{loss.dtype} of " if isinstance(loss, Tensor) and loss.is_complex() else ""
                got = f"{kind}shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
                raise ValueError(
                    f"taylor_ladder(loss_of_params): expected a scalar loss, got {got}. Return a tensor that "
                    "depends on the parameters, reduced with .mean() or .sum()."
                )
            return loss

    inputs = [params[name].detach().double() for name in names]
    # A value that Python reads while tracing becomes a constant of the graph; by default torch raises an error.
    traced = partial(make_fx, _error_on_data_dependent_ops=False)
    # Attention is traced as the matrix products and the softmax that define it, since fused kernels have no series.
    with torch.no_grad(), _default_float64(), _one_draw(), sdpa_kernel(SDPBackend.MATH):
        decomposed = traced(flat, decomposition_table=dict(core_aten_decompositions()))(*inputs)
        # A second pass if it is needed: decompositions of recurrent cells, and models, may write in place.
        graph = traced(functionalize(decomposed, remove="mutations"))(*inputs) if _writes(decomposed) else decomposed
    graph.graph.eliminate_dead_code()
    return TracedLoss(names, graph)


def _writes(module: fx.GraphModule) -> bool:
    """Whether an operation of the graph changes one of its arguments."""
    return any(
        isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable for node in module.graph.nodes
    )


@contextmanager
def _one_draw() -> Iterator[None]:
    """Have random operations (dropout) draw the same numbers in every pass, since a ladder describes one function."""
    # `torch.manual_seed` would seed devices too: those that it does not restore, and those that do not run yet.
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        for generator in (torch.default_generator, *(torch.cuda.default_generators[i] for i in devices)):
            generator.manual_seed(0)
        yield


@contextmanager
def _default_float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _moving(value: Tensor, direction_B: Tensor | None, order: int) -> Series | Tensor:
    value = value.double()
    if direction_B is None:
        return value
    return Series(torch.stack([value.expand_as(direction_B), direction_B.double()]), order)


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        for source in node.all_input_nodes:
            last[source] = node
    freed: dict[fx.Node, list[fx.Node]] = {}
    for source, node in last.items():
        freed.setdefault(node, []).append(source)
    return freed


class _Interpreter:
    """Runs a graph node by node; it drops a value after its last use, which bounds the memory."""

    def __init__(self, module: fx.GraphModule, order: int) -> None:
        self.module, self.order = module, order
        self.last_uses = _last_uses(module.graph)

    def run(self, inputs: list[Series | Tensor]) -> Any:
        values: dict[fx.Node, Any] = {}
        remaining = iter(inputs)
        for node in self.module.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(remaining)
            elif node.op == "get_attr":
                values[node] = getattr(self.module, node.target)
            elif node.op == "output":
                return fx.node.map_arg(node.args[0], values.__getitem__)
            else:
                values[node] = self.call(node, values)
            for dead in self.last_uses.get(node, ()):
                del values[dead]
        raise AssertionError("a traced graph ends in an output node")

    def call(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        target: Any = node.target
        if target is operator.getitem or not series_leaves((args, kwargs)):
            return target(*args, **kwargs)
        try:
            return rule_of(target)(*args, **kwargs)
        except UnsupportedOperation as error:
            calls = [other for other in self.module.graph.nodes if other.op == "call_function"]
            sources = " and ".join(dict.fromkeys(source.name for source in node.all_input_nodes))
            raise UnsupportedOperation(
                f"{error} The place: operation {calls.index(node) + 1} of {len(calls)} in the traced loss, {node.name} "
                f"of {sources}."
            ) from None
