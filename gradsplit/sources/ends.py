"""A module whose samples do not meet inside it, bounded at its two ends: recurrent nets, attention, and what is named.

d_i <- c_i d_i at the output,  its input's signal <- 1/c_i;   so every weight gradient inside is sum_i c_i g_i
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_flatten, tree_unflatten

from .layers import Decided, Listener, Where, once
from .limits import all_finite, length, looks, masked, spread, times, wide

__all__ = ["WHOLE", "WholeKind", "rows_at"]


class _Call:
    """One call of a module that is split as a whole: what its two ends tell each other."""

    def __init__(self, listener: Listener) -> None:
        self.listener = listener
        self.activation_S: Tensor = torch.zeros(0)
        self.sound_S: Tensor | None = None
        self.decided: Decided | None = None


class WholeKind:
    """A module whose samples do not meet inside it is bounded at its two ends: the signal goes in times c, out by 1/c.

        d_i <- c_i d_i at the output,  its input's signal <- 1/c_i;   so every weight gradient inside is sum_i c_i g_i

    n_i is the norm of the inputs times the norm of the signal at the outputs. A sample whose input is not finite
    enters as zeros, and its output is NaN.
    """

    modules: tuple[type[nn.Module], ...] = ()

    def fits(self, module: nn.Module) -> bool:
        """Whether the module is of this kind."""
        return isinstance(module, self.modules)

    def dim_in(self, module: Any, name: str, tensor: Tensor, where: Where) -> int | None:
        """The dimension of the samples of an argument; None where the whole tensor is one sample."""
        return where.batch_dim if tensor.dim() > where.batch_dim else None

    def dim_out(self, module: Any, place: int, tensor: Tensor, where: Where) -> int | None:
        """The dimension of the samples of an output, of which this is the one at ``place``."""
        return where.batch_dim if tensor.dim() > where.batch_dim else None

    def enters(self, name: str) -> bool:
        """Whether the argument of this name holds samples."""
        return True

    def __call__(self, listener: Listener, module: Any, forward: Any, args: Any, kwargs: Any) -> Any:
        """Run the module between its two ends."""
        if not any(parameter.requires_grad for parameter in module.parameters()):
            return forward(*args, **kwargs)
        kind: Any = type(module)
        bound = _signature(kind).bind(*args, **kwargs)
        if any(isinstance(value, PackedSequence) for value in bound.arguments.values()):
            raise ValueError(
                f"SampleSplitter: expected a padded tensor for {type(module).__name__}, got a PackedSequence, in which "
                "the samples have no dimension of their own. Pad the sequences, or name the module in `leave_out`."
            )
        whole = _Call(listener)
        trees: dict[str, Any] = {}
        tensors: list[Tensor] = []
        shapes: list[list[int]] = []
        for name, value in bound.arguments.items():
            leaves, tree = tree_flatten(value)
            trees[name] = (leaves, tree)
            for leaf in leaves:
                if not (isinstance(leaf, Tensor) and leaf.is_floating_point() and self.enters(name)):
                    continue
                if all(leaf is not tensor for tensor in tensors):
                    tensors.append(leaf)
                    shapes.append(rows_at(leaf, self.dim_in(module, name, leaf, listener)))
        entered = dict(zip(map(id, tensors), _Enter.apply(whole, shapes, *tensors), strict=True))
        for name, (leaves, tree) in trees.items():
            bound.arguments[name] = tree_unflatten([entered.get(id(leaf), leaf) for leaf in leaves], tree)
        outputs, tree = tree_flatten(forward(*bound.args, **bound.kwargs))
        leave = [k for k, value in enumerate(outputs) if isinstance(value, Tensor) and value.requires_grad]
        shapes = [rows_at(outputs[k], self.dim_out(module, k, outputs[k], listener)) for k in leave]
        for k, tensor in zip(leave, _Leave.apply(whole, shapes, *(outputs[k] for k in leave)), strict=True):
            outputs[k] = tensor
        return tree_unflatten(outputs, tree)


@cache
def _signature(kind: Any) -> inspect.Signature:
    """The forward's, without its first argument."""
    whole = inspect.signature(kind.forward)
    return whole.replace(parameters=list(whole.parameters.values())[1:])


def rows_at(tensor: Tensor, dim: int | None) -> list[int]:
    """The shape of one number per place of a dimension, which broadcasts against the tensor."""
    return [size if k == dim else 1 for k, size in enumerate(tensor.shape)]


def _length_of_all(tensors: Sequence[Tensor], shapes: Sequence[list[int]]) -> Tensor:
    norms = [wide(length(tensor, rows)) for tensor, rows in zip(tensors, shapes, strict=True)]
    return norms[0] if len(norms) == 1 else torch.stack(norms).square().sum(0).sqrt()


class _Enter(torch.autograd.Function):
    """Lets sound samples in; gives the signal that comes out its size again."""

    @staticmethod
    def forward(ctx: Any, whole: _Call, shapes: list[list[int]], *tensors: Tensor) -> Any:
        ctx.whole, ctx.shapes = whole, shapes
        whole.activation_S = _length_of_all(tensors, shapes)
        if looks(whole.activation_S) and all_finite(whole.activation_S):
            return tuple(tensor.view_as(tensor) for tensor in tensors)
        whole.sound_S = sound_S = whole.activation_S.isfinite()
        return tuple(masked(tensor, sound_S, rows) for tensor, rows in zip(tensors, shapes, strict=True))

    @staticmethod
    def backward(ctx: Any, *signals: Tensor | None) -> Any:
        decided = ctx.whole.decided
        if decided is None:
            return (None, None, *signals)
        passed = (
            None if d is None else times(d, 1 / decided.factor_S, decided.sound_S, rows)
            for d, rows in zip(signals, ctx.shapes, strict=True)
        )
        return (None, None, *passed)


class _Leave(torch.autograd.Function):
    """Lets the outputs out; measures and bounds the signal that comes in."""

    @staticmethod
    def forward(ctx: Any, whole: _Call, shapes: list[list[int]], *tensors: Tensor) -> Any:
        ctx.whole, ctx.shapes = whole, shapes
        ctx.set_materialize_grads(False)
        sound_S = whole.sound_S
        if sound_S is None:
            return tuple(tensor.view_as(tensor) for tensor in tensors)
        return tuple(
            torch.where(spread(sound_S, rows), tensor, math.nan) for tensor, rows in zip(tensors, shapes, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *signals: Tensor | None) -> Any:
        once()
        whole = ctx.whole
        given = [(d, rows) for d, rows in zip(signals, ctx.shapes, strict=True) if d is not None]
        signal_S = _length_of_all([d for d, _ in given], [rows for _, rows in given])
        decided = whole.decided = whole.listener.decide(whole.activation_S, signal_S)
        if decided is None:
            return (None, None, *signals)
        passed = (
            None if d is None else times(d, decided.factor_S, decided.sound_S, rows)
            for d, rows in zip(signals, ctx.shapes, strict=True)
        )
        return (None, None, *passed)


class _Recurrent(WholeKind):
    """RNN, GRU and LSTM: ``batch_first`` orders the sequence; the states are (layers, batch, width)."""

    modules = (nn.RNNBase,)

    def dim_in(self, module: Any, name: str, tensor: Tensor, where: Where) -> int | None:
        if tensor.dim() < 3:
            return None
        return 0 if name == "input" and module.batch_first else 1

    def dim_out(self, module: Any, place: int, tensor: Tensor, where: Where) -> int | None:
        return self.dim_in(module, "hx" if place else "input", tensor, where)


class _Attention(WholeKind):
    """Attention: its input and output projections, bounded together; the map of weights is (batch, queries, keys)."""

    modules = (nn.MultiheadAttention,)

    def enters(self, name: str) -> bool:
        return name in ("query", "key", "value")

    def dim_in(self, module: Any, name: str, tensor: Tensor, where: Where) -> int | None:
        if tensor.dim() < 3:
            return None
        return 0 if module.batch_first else 1

    def dim_out(self, module: Any, place: int, tensor: Tensor, where: Where) -> int | None:
        return 0 if place and tensor.dim() > 2 else self.dim_in(module, "query", tensor, where)


WHOLE: tuple[WholeKind, ...] = (_Recurrent(), _Attention())
"""One row per kind that is bounded at its two ends; `WholeKind()` itself takes any module whose samples do not meet."""
