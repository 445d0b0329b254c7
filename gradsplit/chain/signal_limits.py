"""Limits on the signals at ordinary joints: the norm of a signal, its scale, and the guard that applies a budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..budget.base import Budget, Reading, State
from ..xp import Array, numpy_xp, torch_xp


def signal_norm(signal: Tensor, per_sample: bool = False) -> Tensor:
    """L2 norm of a signal; it does not overflow, and in the usual case it does not copy the signal.

    Args:
        signal: gradient at a joint; float16 and bfloat16 are accumulated in float32.
        per_sample: whether to give one norm per entry of dimension 0.

    Returns:
        float32 norms, () or (samples,). They are inf or NaN only where the signal is, or where it exceeds float32.
    """
    flat = signal.detach()
    if flat.is_complex():  # as pairs of real numbers, and a list of them as samples of one pair each
        flat = torch.view_as_real(flat.resolve_conj()).reshape(*flat.shape[:1], -1)
    dim = tuple(range(1, flat.dim())) if per_sample and flat.dim() > 1 else None
    kind = torch.float64 if flat.dtype == torch.float64 else torch.float32
    if per_sample and flat.dim() <= 1 and not signal.is_complex():
        return flat.abs().to(torch.float32)
    norm = torch.linalg.vector_norm(flat, dim=dim, dtype=kind)
    if norm.device.type == "cpu" and bool(torch.isfinite(norm).all()):
        return norm.to(torch.float32)
    # Squares of entries above 1.8e19 overflow float32, so those are accumulated in float64. On a device this is always
    # done, since asking whether it is needed would wait for the device.
    return torch.linalg.vector_norm(flat, dim=dim, dtype=torch.float64).to(torch.float32)


def scale_within(norm: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factor that brings a norm within its limit, and whether the signal is finite.

        scale = min(1, limit / norm), 0 where the norm is not finite

    Args:
        norm: () or (samples,).
        limit: (), inf for none.

    Returns:
        (scale, finite), of the shape of `norm`.

    >>> scale_within(torch.tensor(4.0), torch.tensor(1.0))[0].item()
    0.25
    """
    finite = torch.isfinite(norm)
    scale = torch.where(norm > limit, limit / norm.clamp(min=1e-38), torch.ones_like(norm))
    return torch.where(finite, scale, torch.zeros_like(scale)), finite


def apply_scale(signal: Tensor, scale: Tensor, finite: Tensor) -> Tensor | None:
    """Return the signal times its scale, zeros where it is not finite (never 0 * inf); on the CPU None if unchanged."""
    if scale.device.type == "cpu" and bool((scale == 1).all()):
        return None  # reading a CPU tensor waits for nothing, and most signals are within their limit
    if scale.numel() == 1:
        scale, finite = scale.reshape(()), finite.reshape(())  # a scalar signal must stay a scalar
    else:
        shape = (-1,) + (1,) * (signal.dim() - 1)
        scale, finite = scale.reshape(shape), finite.reshape(shape)
    return torch.where(
        finite, signal * scale.to(signal.dtype), torch.zeros((), dtype=signal.dtype, device=signal.device)
    )


@dataclass
class JointMemory:
    """What one joint remembers, as (1,) arrays: the budget's history and what is shown to the user.

    They are tensors on the signal's device. For signals on the CPU they are numpy arrays: operations on single numbers
    then cost a tenth as much, and nothing has to be waited for.
    """

    state: State
    norm: Array
    limit: Array
    bounded: Array
    nonfinite: Array

    @classmethod
    def new(cls, budget: Budget, device: torch.device) -> JointMemory:
        """Return the memory before the first signal."""
        zero = np.zeros(1) if device.type == "cpu" else torch.zeros(1, device=device)
        xp = numpy_xp if device.type == "cpu" else torch_xp
        return cls(budget.init(xp, zero), zero, zero + float("inf"), zero, zero)

    def on(self, device: torch.device) -> JointMemory:
        """Return the same memory on another device."""
        shown = (self.norm, self.limit, self.bounded, self.nonfinite)
        return JointMemory(tuple(_beside(part, device) for part in self.state), *(_beside(x, device) for x in shown))

    def is_on(self, device: torch.device) -> bool:
        """Whether the memory is where signals of this device are judged."""
        if isinstance(self.norm, np.ndarray):
            return device.type == "cpu"
        return device.type != "cpu" and self.norm.device == device


def _beside(values: Array, device: torch.device) -> Array:
    if device.type == "cpu":
        return np.asarray(values.cpu() if isinstance(values, Tensor) else values, dtype=np.float64)
    return torch.as_tensor(values, dtype=torch.float32, device=device)


class SignalGuard:
    """Bounds the signal of each watched module output by a budget of its own.

    Args:
        budget: it gives limits from the joint's own norms.
        per_sample: whether to judge each sample by itself; the history takes the largest norm over the samples.
        steps: whether modules that run several times in one pass are bounded too.
        zero_nonfinite: whether signals that are not finite are replaced by zeros.
    """

    def __init__(self, budget: Budget, per_sample: bool, steps: bool, zero_nonfinite: bool) -> None:
        self.budget, self.per_sample, self.steps, self.zero_nonfinite = budget, per_sample, steps, zero_nonfinite
        self.memories: dict[str, JointMemory] = {}
        self.made_by: dict[str, tuple[Any, int]] = {}
        self.repeated: set[str] = set()
        self._calls: dict[str, int] = {}
        self._forked: set[str] = set()
        self._backward = False

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy: what was learnt, and nothing of the pass that runs, since a graph cannot be copied."""
        return {**self.__dict__, "made_by": {}, "_calls": {}, "_backward": False}

    def new_pass(self) -> None:
        """A forward pass starts, so calls are counted from one again."""
        self._calls.clear()
        self.made_by.clear()
        self._forked.clear()
        self._backward = False

    def meet(self, name: str, made: list[tuple[str, Tensor]], alive: Callable[[], bool], bound: bool = True) -> None:
        """A watched module has returned, so set a hook on each of its tensors that carries a signal.

        Args:
            name: the module.
            made: (place in the output, tensor).
            alive: asked by the hook before it acts.
            bound: False for a module that only marks the place of a declared fork.
        """
        if not made:
            return
        if self._backward:  # if the root is not called, a signal since the last call has ended the pass
            self.new_pass()
        self._calls[name] = self._calls.get(name, 0) + 1
        if self._calls[name] > 1:
            self.repeated.add(name)
        self.made_by[name] = (made[0][1].grad_fn, made[0][1].output_nr)
        if not bound:
            return
        for place, tensor in made:
            call = f"#{self._calls[name]}" if self._calls[name] > 1 else ""
            self._watch(name, f"{name}{place}{call}", tensor, alive)

    def leave_alone(self, producers: set[tuple[Any, int]]) -> None:
        """Leave the activations of these nodes out: they are task forks, which the fork rule bounds."""
        self._forked.update(name for name, made in self.made_by.items() if made in producers)

    def _watch(self, name: str, joint: str, tensor: Tensor, alive: Callable[[], bool]) -> None:
        def on_signal(signal: Tensor) -> Tensor | None:
            self._backward = True  # also where the hook may not act: more calls then belong to another pass
            if not alive() or name in self._forked or (name in self.repeated and not self.steps):
                return None
            return self._bound(joint, signal)

        tensor.register_hook(on_signal)

    def _bound(self, joint: str, signal: Tensor) -> Tensor | None:
        if not signal.numel():
            return None  # a batch without samples has nothing to bound, and teaches nothing
        memory = self.memories.get(joint)
        if memory is None:
            memory = self.memories[joint] = JointMemory.new(self.budget, signal.device)
        elif not memory.is_on(signal.device):  # a state saved elsewhere
            memory = self.memories[joint] = memory.on(signal.device)
        on_cpu = signal.device.type == "cpu"
        return self.on_cpu(memory, signal) if on_cpu else self.on_device(memory, signal)

    def on_device(self, memory: JointMemory, signal: Tensor) -> Tensor | None:
        """Measure, bound and remember one signal without waiting for its device; None if it is unchanged."""
        with torch.no_grad():
            norm = signal_norm(signal, self.per_sample).reshape(-1)
            whole = norm.amax().reshape(1) if len(norm) > 1 else norm
            usable = torch.where(torch.isfinite(whole), whole, torch.zeros_like(whole))
            one = torch.ones_like(whole)
            reading = Reading(usable, None, one, one, one)
            memory.limit = self.budget.limits(torch_xp, reading, memory.state)
            scale, finite = scale_within(norm, memory.limit)
            kept = torch.minimum(usable, memory.limit)
            memory.state = self.budget.learn(torch_xp, reading, kept, memory.state)
            memory.norm = whole
            memory.bounded = memory.bounded + (finite & (scale < 1)).any()
            memory.nonfinite = memory.nonfinite + (~finite).any()
            if not self.zero_nonfinite:
                scale = torch.where(finite, scale, torch.ones_like(scale))
                finite = torch.ones_like(finite)
            return apply_scale(signal, scale, finite)

    def on_cpu(self, memory: JointMemory, signal: Tensor) -> Tensor | None:
        """Do the same on numpy arrays; a signal within its limit is not touched."""
        norm = signal_norm(signal, self.per_sample).detach().numpy().reshape(-1).astype(np.float64)
        finite = np.isfinite(norm)
        whole = norm.max().reshape(1)
        usable = np.where(np.isfinite(whole), whole, 0.0)
        one = np.ones(1)
        reading = Reading(usable, None, one, one, one)
        memory.limit = self.budget.limits(numpy_xp, reading, memory.state)
        over = finite & (norm > memory.limit)
        memory.state = self.budget.learn(numpy_xp, reading, np.minimum(usable, memory.limit), memory.state)
        memory.norm = whole
        memory.bounded = memory.bounded + over.any()
        memory.nonfinite = memory.nonfinite + (not finite.all())
        if not self.zero_nonfinite:
            finite = np.ones_like(finite)
        if finite.all() and not over.any():
            return None
        scale = np.where(finite, np.where(over, memory.limit / np.where(over, norm, 1.0), 1.0), 0.0)
        return apply_scale(signal, torch.from_numpy(scale), torch.from_numpy(finite))
