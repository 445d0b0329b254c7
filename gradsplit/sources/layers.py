"""A layer's own weight gradient as a sum over samples: what one sample adds is masked or bounded, per kind of layer.

    dL/dW = sum_i a_i d_i^T        n_i = ||a_i|| ||d_i||      (at least the norm of what sample i adds)
    d_i <- d_i min(1, limit / n_i) in this sum alone;  0 where a_i or d_i is not finite, here and in what is passed on

A sample that is finite sends its full signal to the layers below: every layer bounds for itself.
"""

from __future__ import annotations

import copy
import math
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..hooks import not_traced
from .limits import Rule, RunningLimit, length, looks, masked, row_shape, spread, times, wide

__all__ = [
    *("KINDS", "Decided", "Forward", "Kind", "Layer", "LayerKind", "Listener", "Where", "is_own", "once"),
]


SMALLEST = 1e-30  # of a factor, so that 1 / factor is finite in float32


class Decided(NamedTuple):
    """What was decided for the samples of one layer.

    Attributes:
        factor_S: what each sample's part of the sum is multiplied by, in [0, 1].
        sound_S: False where the sample is masked; None where it is known that none is.
    """

    factor_S: Tensor
    sound_S: Tensor | None


class Where(Protocol):
    """Where the samples of a layer lie."""

    batch_dim: int
    token: bool


class Listener(Where, Protocol):
    """What a layer asks: where its samples lie, and what is to be done with them."""

    def decide(
        self, activation_S: Tensor, signal_S: Tensor, again: Callable[[], tuple[Tensor, Tensor]] | None = None
    ) -> Decided | None:
        """From the norms of activations and signals; None where every sample is kept as it is (CPU alone).

        ``again`` gives the norms once more with a wider range, and is called where one of them is not finite.
        """


def once() -> None:
    """Refuse a backward pass that is to be differentiated again.

    Raises:
        RuntimeError: create_graph=True.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "SampleSplitter: expected a backward pass without create_graph=True, since a bounded sum over samples has "
            "no second derivative. Take the splitter off for this model, and bound its loss terms with TermSplitter."
        )


class LayerKind:
    """How one kind of layer runs, and its gradients from the signal; the rest is the same for every kind."""

    modules: tuple[type[nn.Module], ...] = ()
    measures_activation = True

    def fits(self, module: nn.Module) -> bool:
        """Whether the module is of this kind and has its own forward."""
        return isinstance(module, self.modules) and any(type(module).forward is kind.forward for kind in self.modules)

    def features(self, module: nn.Module, weight: Tensor) -> tuple[int, int]:
        """How many trailing dimensions of the input, and of the output, are one sample's content at one place."""
        return 1, 1

    def prepare(self, module: Any, a: Tensor) -> tuple[Tensor, Any]:
        """The input and the constants that `run` and `gradients` get."""
        return a, None

    def without(self, a: Tensor, sound_S: Tensor | None, rows: Sequence[int], config: Any, weight: Tensor) -> Tensor:
        """The input without the samples that are not sound."""
        return masked(a, sound_S, rows) if a.is_floating_point() else a

    def run(self, a: Tensor, weight: Tensor, bias: Tensor | None, config: Any) -> tuple[Tensor, ...]:
        """The layer's output, and what backward needs beside input and weight: numbers per row of the input."""
        raise TypeError(f"{type(self).__name__}: expected a kind that says how it runs.")

    def gradients(
        self, d: Tensor, a: Tensor, weight: Tensor, config: Any, need: tuple[bool, bool, bool], *extra: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of input, weight and bias from the signal; None where not needed."""
        raise TypeError(f"{type(self).__name__}: expected a kind that says what its gradients are.")

    def __call__(
        self,
        listener: Listener,
        module: Any,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run the layer so that its own weight gradient is split by sample."""
        if not module.weight.requires_grad:
            return forward(*args, **kwargs)
        (a,) = [*args, *kwargs.values()]
        a, config = self.prepare(module, a)
        bias = getattr(module, "bias", None)
        features = self.features(module, module.weight)
        split: Tensor = _Split.apply(a, module.weight, bias, self, features, listener, config)
        return split


class _Split(torch.autograd.Function):
    """The layer as it is; in backward its own gradient is made from masked and bounded samples."""

    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        kind: LayerKind,
        features: tuple[int, int],
        listener: Listener,
        config: Any,
    ) -> Tensor:
        ctx.kind, ctx.features, ctx.listener, ctx.config = kind, features, listener, config
        ctx.has_bias = bias is not None
        y, *extra = kind.run(a, weight, bias, config)
        ctx.save_for_backward(a, weight, *extra)
        return y

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Any:
        once()
        a, weight, *extra = ctx.saved_tensors
        kind, listener, config = ctx.kind, ctx.listener, ctx.config
        # Under autocast the signal has the precision in which the layer ran.
        weight = weight.to(d.dtype)
        a = a.to(d.dtype) if a.is_floating_point() else a
        rows = row_shape(d.shape, ctx.features[1], listener.batch_dim, listener.token)
        rows_a = row_shape(a.shape, ctx.features[0], listener.batch_dim, listener.token)

        def norms(*, again: bool = True) -> tuple[Tensor, Tensor]:
            signal_S = length(d, rows, again=again)
            activation_S = length(a, rows_a, again=again) if a.is_floating_point() else torch.ones_like(signal_S)
            return activation_S if kind.measures_activation else activation_S * 0 + 1, signal_S

        decided = listener.decide(*norms(again=False), norms)
        down, own = bool(ctx.needs_input_grad[0]), bool(ctx.needs_input_grad[1])
        need_bias = ctx.has_bias and bool(ctx.needs_input_grad[2])
        if decided is None:
            found = kind.gradients(d, a, weight, config, (down, own, need_bias), *extra)
            return (*found, None, None, None, None)
        factor_S, sound_S = decided
        a = kind.without(a, sound_S, rows_a, config, weight)
        extra = [masked(numbers, sound_S, rows_a) for numbers in extra]
        mine = times(d, factor_S, sound_S, rows)
        _, grad_weight, grad_bias = kind.gradients(mine, a, weight, config, (False, own, need_bias), *extra)
        passed = None
        if down:
            below = masked(d, sound_S, rows)
            passed = kind.gradients(below, a, weight, config, (True, False, False), *extra)[0]
        return passed, grad_weight, grad_bias, None, None, None, None


class _Linear(LayerKind):
    modules = (nn.Linear,)

    def run(self, a: Tensor, weight: Tensor, bias: Tensor | None, config: Any) -> tuple[Tensor, ...]:
        return (F.linear(a, weight, bias),)

    def gradients(
        self, d: Tensor, a: Tensor, weight: Tensor, config: Any, need: tuple[bool, bool, bool], *extra: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        flat_d, flat_a = d.reshape(-1, d.shape[-1]), a.reshape(-1, a.shape[-1])
        return (
            d @ weight if need[0] else None,
            flat_d.t() @ flat_a if need[1] else None,
            flat_d.sum(0) if need[2] else None,
        )


class _Conv(LayerKind):
    modules = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

    def features(self, module: nn.Module, weight: Tensor) -> tuple[int, int]:
        return weight.dim() - 1, weight.dim() - 1

    def prepare(self, module: Any, a: Tensor) -> tuple[Tensor, Any]:
        padding = module.padding
        if module.padding_mode != "zeros" or isinstance(padding, str):
            mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
            a = F.pad(a, module._reversed_padding_repeated_twice, mode=mode)
            padding = (0,) * len(module.kernel_size)
        return a, (module.stride, padding, module.dilation, module.groups)

    def run(self, a: Tensor, weight: Tensor, bias: Tensor | None, config: Any) -> tuple[Tensor, ...]:
        return ((F.conv1d, F.conv2d, F.conv3d)[weight.dim() - 3](a, weight, bias, *config),)

    def gradients(
        self, d: Tensor, a: Tensor, weight: Tensor, config: Any, need: tuple[bool, bool, bool], *extra: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        stride, padding, dilation, parts = config
        alone = d.dim() < weight.dim()  # no batch dimension
        if alone:
            d, a = d.unsqueeze(0), a.unsqueeze(0)
        zeros = [0] * (weight.dim() - 2)
        found = torch.ops.aten.convolution_backward(
            d, a, weight, [weight.shape[0]], stride, padding, dilation, False, zeros, parts, list(need)
        )
        passed, grad_weight, grad_bias = (tensor if asked else None for tensor, asked in zip(found, need, strict=True))
        return passed.squeeze(0) if alone and passed is not None else passed, grad_weight, grad_bias


class _Embedding(LayerKind):
    modules = (nn.Embedding,)

    def fits(self, module: nn.Module) -> bool:
        return super().fits(module) and not module.sparse and module.max_norm is None

    def features(self, module: nn.Module, weight: Tensor) -> tuple[int, int]:
        return 0, 1

    def prepare(self, module: Any, a: Tensor) -> tuple[Tensor, Any]:
        return a, (module.padding_idx, module.scale_grad_by_freq)

    def without(self, a: Tensor, sound_S: Tensor | None, rows: Sequence[int], config: Any, weight: Tensor) -> Tensor:
        empty, by_frequency = config
        if sound_S is None or not by_frequency:
            return a
        # The tokens of a sample that is left out must not count among those of the others.
        nowhere = weight.shape[0] if empty is None else empty
        return torch.where(spread(sound_S, rows), a, nowhere)

    def run(self, a: Tensor, weight: Tensor, bias: Tensor | None, config: Any) -> tuple[Tensor, ...]:
        return (F.embedding(a, weight, padding_idx=config[0]),)

    def gradients(
        self, d: Tensor, a: Tensor, weight: Tensor, config: Any, need: tuple[bool, bool, bool], *extra: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        empty, by_frequency = config
        if not need[1]:
            return None, None, None
        count = weight.shape[0]
        if by_frequency and empty is None:  # see `without`
            return None, torch.ops.aten.embedding_dense_backward(d, a, count + 1, count, True)[:count], None
        empty = -1 if empty is None else empty
        return None, torch.ops.aten.embedding_dense_backward(d, a, count, empty, by_frequency), None


class _Norm(LayerKind):
    """The gain's gradient is a sum of d_i times the normalised row, whose length is the same for all: n_i = ||d_i||."""

    measures_activation = False

    def fits(self, module: nn.Module) -> bool:
        return super().fits(module) and module.weight is not None

    def features(self, module: nn.Module, weight: Tensor) -> tuple[int, int]:
        return weight.dim(), weight.dim()


class _LayerNorm(_Norm):
    modules = (nn.LayerNorm,)

    def prepare(self, module: Any, a: Tensor) -> tuple[Tensor, Any]:
        return a, (module.normalized_shape, module.eps)

    def run(self, a: Tensor, weight: Tensor, bias: Tensor | None, config: Any) -> tuple[Tensor, ...]:
        if torch.is_autocast_enabled(a.device.type) or a.dtype != weight.dtype:
            return (F.layer_norm(a, config[0], weight, bias, config[1]),)
        # mean and 1 / deviation are kept, so that backward need not find them again
        return torch.native_layer_norm(a, config[0], weight, bias, config[1])

    def gradients(
        self, d: Tensor, a: Tensor, weight: Tensor, config: Any, need: tuple[bool, bool, bool], *extra: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        d, a, weight = _at_least_float32(d, a, weight)
        shape, eps = config
        dims = list(range(a.dim() - len(shape), a.dim()))
        if extra and extra[0].dtype == a.dtype:
            mean, rate = extra
        else:
            variance, mean = torch.var_mean(a, dims, correction=0, keepdim=True)
            rate = (variance + eps).rsqrt()
        zero = torch.zeros_like(weight) if need[2] else None
        found = torch.ops.aten.native_layer_norm_backward(d, a, list(shape), mean, rate, weight, zero, list(need))
        passed, grad_weight, grad_bias = (tensor if asked else None for tensor, asked in zip(found, need, strict=True))
        return passed, grad_weight, grad_bias


class _RMSNorm(_Norm):
    modules = (nn.RMSNorm,)

    def prepare(self, module: Any, a: Tensor) -> tuple[Tensor, Any]:
        return a, (module.normalized_shape, module.eps)

    def run(self, a: Tensor, weight: Tensor, bias: Tensor | None, config: Any) -> tuple[Tensor, ...]:
        return (F.rms_norm(a, config[0], weight, config[1]),)

    def gradients(
        self, d: Tensor, a: Tensor, weight: Tensor, config: Any, need: tuple[bool, bool, bool], *extra: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        d, a, weight = _at_least_float32(d, a, weight)
        eps = torch.finfo(a.dtype).eps if config[1] is None else config[1]  # torch's, whose halves are float32 inside
        dims = list(range(a.dim() - len(config[0]), a.dim()))
        rate = (a.square().mean(dims, keepdim=True) + eps).rsqrt()
        rate = rate.where(rate < math.inf, 0.0)  # with eps=0 of a sample that is left out
        row = a * rate
        inner = d * weight
        passed = rate * (inner - row * (inner * row).mean(dims, keepdim=True)) if need[0] else None
        lead = list(range(dims[0]))
        grad_weight = ((d * row).sum(lead) if lead else d * row) if need[1] else None
        return passed, grad_weight, None


def _at_least_float32(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor if tensor.dtype == torch.float64 else tensor.float() for tensor in tensors)


KINDS: tuple[LayerKind, ...] = (_Linear(), _Conv(), _Embedding(), _LayerNorm(), _RMSNorm())
"""One row per kind of layer whose own sum over samples is made here; a new kind is one class and one row."""


class Notes(Protocol):
    """What a layer asks of the splitter that it belongs to, and tells it."""

    rule: Rule
    scaler: Any
    batch_dim: int
    token: bool

    def see_pass(self) -> None:
        """A backward pass is there."""

    def live(self) -> None:
        """A sound sample of the pass has a gradient."""

    def sound(self, activation_S: Tensor, finite_S: Tensor) -> Tensor:
        """Which samples are not masked."""

    def note(self, name: str, ratio_S: Tensor) -> None:
        """Samples stood out; nan: not finite."""

    def lose(self) -> None:
        """No sample of the pass is sound in a layer."""


class Kind(Protocol):
    """How a layer of one kind is run and split."""

    def fits(self, module: nn.Module) -> bool:
        """Whether the module is of this kind."""

    def __call__(
        self,
        listener: Listener,
        module: Any,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run the module, split by sample."""


class Layer:
    """One layer: its rule, its running scale, and what it decides."""

    def __init__(self, splitter: Notes, name: str, kind: Kind) -> None:
        self.splitter, self.name, self.kind = splitter, name, kind
        self.batch_dim, self.token = splitter.batch_dim, splitter.token
        self.scale: Tensor | float | None = None
        self._limit: float | None = None

    def call(
        self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run the layer, split by sample where it is trained."""
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return self.kind(self, module, forward, args, kwargs)

    def decide(
        self, activation_S: Tensor, signal_S: Tensor, again: Callable[[], tuple[Tensor, Tensor]] | None = None
    ) -> Decided | None:
        """From the norms of activations and signals; None where every sample is kept as it is (CPU alone)."""
        splitter = self.splitter
        splitter.see_pass()
        if not signal_S.numel():
            return None
        may_look = looks(signal_S)
        norm_S = wide(activation_S) * wide(signal_S)
        if may_look:
            before = float(self.scale or 0.0)
            ordinary, largest = self._ordinary(before, norm_S)
            if again is not None and not math.isfinite(largest):  # or beyond the range of float32
                activation_S, signal_S = again()
                norm_S = wide(activation_S) * wide(signal_S)
                ordinary, largest = self._ordinary(before, norm_S)
            if 0 < largest < math.inf:
                splitter.live()
            if ordinary:
                return None
        if splitter.scaler is not None:
            norm_S = norm_S / splitter.scaler.scale(norm_S.new_ones(()))
        finite_S = norm_S.isfinite()
        if may_look and self._limit is not None:
            limit = torch.tensor(self._limit, dtype=norm_S.dtype)
        else:
            scale = torch.as_tensor(0.0 if self.scale is None else self.scale).to(norm_S)
            self.scale, limit = splitter.rule.follow(scale, norm_S, finite_S & (norm_S > 0))
            if may_look and bool((norm_S <= limit).all()):
                return None
        ratio_S = norm_S / limit
        sound_S = splitter.sound(activation_S, finite_S)
        splitter.note(self.name, torch.where(finite_S, ratio_S, math.nan).float())
        if may_look:
            if not bool(sound_S.any()):
                splitter.lose()
            elif bool((sound_S & (norm_S > 0)).any()):
                splitter.live()
        factor_S = torch.where(finite_S, (1 / ratio_S).clamp(min=SMALLEST, max=1.0), 1.0)
        return Decided(factor_S, None if may_look and bool(sound_S.all()) else sound_S)

    def _ordinary(self, before: float, norm_S: Tensor) -> tuple[bool, float]:
        """Move the scale by numbers, where the rule can; whether no sample is beyond the limit, and the largest."""
        rule = self.splitter.rule
        if self.splitter.scaler is not None or not isinstance(rule, RunningLimit):
            return False, float(norm_S.sum())  # not finite where one is not
        self.scale, self._limit, largest = rule.follow_numbers(before, norm_S.numpy())
        return largest <= self._limit and math.isfinite(largest), largest


class Forward:
    """A module's forward while it is split; a copy of the module, or one read from a file, has the forward of before.

    Args:
        module: what runs.
        call: how it runs while it is split.
        before: what stood in the place of the class's forward: of another library, or of this splitter; None: nothing.
    """

    def __init__(self, module: nn.Module, call: Callable[..., Any], before: Callable[..., Any] | None) -> None:
        self.module, self.call, self.before, self.on = module, call, before, True

    @not_traced  # torch.compile then runs the layer as it is, and split
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        before = self.before or _ordinary(self.module)
        if not self.on:
            return before(*args, **kwargs)
        if torch.is_grad_enabled() and torch._C._functorch.peek_interpreter_stack() is not None:
            raise RuntimeError(
                "SampleSplitter: expected an ordinary forward and backward pass, got a transformation of torch.func. "
                "Call .remove() before vmap, grad or jacrev, and attach the splitter again behind them."
            )
        return self.call(self.module, before, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if self.before is not None:
            return copy.deepcopy(self.before, memo)
        return _ordinary(memo[id(self.module)] if id(self.module) in memo else copy.deepcopy(self.module, memo))

    def __reduce__(self) -> Any:
        return _ordinary, (self.module, self.before)


def _ordinary(module: nn.Module, before: Any = None) -> Any:
    """The forward of the module's class, if nothing stood in its place before."""
    return types.MethodType(type(module).forward, module) if before is None else before


def is_own(forward: Any, module: nn.Module) -> bool:
    """Whether what stands in the place of a module's forward runs the forward of its class, and nothing else."""
    return forward is None or (isinstance(forward, types.MethodType) and forward.__func__ is type(module).forward)
