"""The forward pass cut at its joints, so that the backward chain can be applied factor by factor.

Every output of a module is replaced by a detached leaf (and a clone of it, so that later in-place
operations stay legal). Each call of a module then owns a graph of its own, from the leaves it reads to the
output it makes: one factor of the chain. The values of the forward pass are unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .joints import carries_signal, replace_tensors, tensors_in

INPUT = "(input)"
LOSS = "(loss)"


@dataclass
class Cut:
    """One call of a module, cut off from what follows.

    Attributes:
        name: the module, with "#2" for its second call.
        module: dotted name of the module.
        kind: class of the module.
        made: its output tensors, as ends of this factor's graph.
        leaves: the same tensors as the following factors read them.
        arrived: root mean square of the floating inputs of the call, NaN without any.
        clean: whether every floating input was finite.
    """

    name: str
    module: str
    kind: str
    made: list[Tensor]
    leaves: list[Tensor]
    arrived: float
    clean: bool


@dataclass
class CutForward:
    """All cuts of a forward pass, oldest first, and the calls that did not end in a cut.

    Attributes:
        cuts: calls with an output that carries a signal.
        plain: (module, clean inputs, clean output) of every call of a leaf module, oldest first.
        inputs: leaves put in place of floating inputs of the model.
    """

    cuts: list[Cut] = field(default_factory=list)
    plain: list[tuple[str, bool, bool]] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)


@contextmanager
def cutting(model: nn.Module, names: list[str] | None = None) -> Iterator[CutForward]:
    """Cut the forward passes made inside the context at the outputs of the model's modules.

    Args:
        model: the module to cut.
        names: modules to cut at; None: every module but the root. A module that hands on a tensor which is
            cut already (a container, an identity) gets no cut of its own.

    Yields:
        The record that the passes fill.
    """
    record = CutForward()
    known: dict[int, Tensor] = {}  # the tensor is kept, so that its id stays its own
    calls: dict[str, int] = {}
    handles = []

    def fresh(tensor: Tensor) -> tuple[Tensor, Tensor]:
        leaf = tensor.detach().requires_grad_()
        alias = leaf.clone()
        known[id(alias)] = alias
        return leaf, alias

    def enter_root(module: nn.Module, args: Any, kwargs: Any) -> Any:
        def change(place: str, tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point() or tensor.requires_grad or not torch.is_grad_enabled():
                return tensor
            leaf, alias = fresh(tensor)
            record.inputs.append(leaf)
            return alias

        return replace_tensors(args, change), replace_tensors(kwargs, change)

    handles.append(model.register_forward_pre_hook(enter_root, with_kwargs=True))
    for name, module in model.named_modules():
        if not name or (names is not None and name not in names):
            continue

        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> Any:
            arrived, clean = _level((args, kwargs))
            if not any(True for _ in module.children()):
                record.plain.append((name, clean, _level(output)[1]))
            if not torch.is_grad_enabled():
                return None
            cut = Cut("", name, type(module).__name__, [], [], arrived, clean)

            def change(place: str, tensor: Tensor) -> Tensor:
                if not carries_signal(tensor) or id(tensor) in known:
                    return tensor
                leaf, alias = fresh(tensor)
                cut.made.append(tensor)
                cut.leaves.append(leaf)
                return alias

            changed = replace_tensors(output, change)
            if not cut.made:
                return None
            calls[name] = calls.get(name, 0) + 1
            cut.name = name if calls[name] == 1 else f"{name}#{calls[name]}"
            record.cuts.append(cut)
            return changed

        handles.append(module.register_forward_hook(leave, with_kwargs=True))
    try:
        yield record
    finally:
        # before any backward pass: a checkpointed block that runs again must run as it did, and without new
        # cuts
        for handle in handles:
            handle.remove()


def leaves_below(ends: list[Tensor]) -> list[Tensor]:
    """The leaves (cuts and parameters) that a factor's graph reads."""
    seen: set[Any] = set()
    leaves: dict[int, Tensor] = {}
    stack = [end.grad_fn for end in ends if end.grad_fn is not None]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves[id(node.variable)] = node.variable
        stack.extend(below for below, _ in node.next_functions if below is not None)
    for end in ends:
        if end.grad_fn is None and end.requires_grad:
            leaves[id(end)] = end
    return list(leaves.values())


def pull(
    ends: list[Tensor], leaves: list[Tensor], signals: list[Tensor], parameters: list[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Apply the transposed factor: signals at the ends to (leaf, gradient) for every leaf that they reach.

    Nothing is accumulated in `.grad` and no hook on an accumulated gradient runs (an optimizer that steps inside the
    backward pass must not step here), but for reentrant checkpoints, which refuse that way.

    Args:
        ends: outputs of the factor.
        leaves: of `leaves_below(ends)`.
        signals: one an end.
        parameters: of the model; a reentrant checkpoint reads some that the graph does not show.
    """
    if not _reentrant(ends):
        grads = torch.autograd.grad(ends, leaves, signals, retain_graph=True, allow_unused=True)
        return [(leaf, grad) for leaf, grad in zip(leaves, grads, strict=True) if grad is not None]
    every = list({id(tensor): tensor for tensor in [*leaves, *parameters]}.values())
    before = [tensor.grad for tensor in every]
    for tensor in every:
        tensor.grad = None
    try:
        torch.autograd.backward(ends, signals, retain_graph=True)
        return [(tensor, tensor.grad) for tensor in every if tensor.grad is not None]
    finally:
        for tensor, grad in zip(every, before, strict=True):
            tensor.grad = grad


def _reentrant(ends: list[Tensor]) -> bool:
    seen: set[Any] = set()
    stack = [end.grad_fn for end in ends if end.grad_fn is not None]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if type(node).__name__ == "CheckpointFunctionBackward":
            return True
        stack.extend(below for below, _ in node.next_functions if below is not None)
    return False


def rms(tensors: list[Tensor]) -> float:
    """Root mean square over all entries of some tensors, NaN without entries."""
    number = sum(tensor.numel() for tensor in tensors)
    if not number:
        return float("nan")
    total = sum(float(tensor.detach().abs().to(torch.float64).square().sum()) for tensor in tensors)
    return float((total / number) ** 0.5)


def _level(value: Any) -> tuple[float, bool]:
    floating = [t for _, t in tensors_in(value) if t.is_floating_point() and t.numel()]
    return rms(floating), all(bool(torch.isfinite(t.detach()).all()) for t in floating)
