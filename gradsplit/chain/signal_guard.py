"""The guard of ordinary joints during training: which outputs are watched in this pass, and what is done to their signals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradsplit.chain.bound import apply_scale, scale_within, signal_norm
from gradsplit.chain.guard import follow_median, guard_limit


@dataclass
class JointMemory:
    """What one joint remembers, as 0-d tensors on its device."""

    median: Tensor
    norm: Tensor
    bounded: Tensor
    nonfinite: Tensor
    seen: int = 0

    @classmethod
    def new(cls, device: torch.device) -> JointMemory:
        """Before the first signal: everything zero."""
        return cls(*(torch.zeros((), device=device) for _ in range(4)))

    def on(self, device: torch.device) -> JointMemory:
        """The same memory on another device."""
        values = (self.median, self.norm, self.bounded, self.nonfinite)
        return JointMemory(*(value.to(device) for value in values), self.seen)


class SignalGuard:
    """Bounds the signal of each watched module output by a multiple of the running median of its own norm.

    Args:
        factor: multiple of the median.
        per_sample: judge each sample by itself.
        steps: whether modules that run several times in one pass are bounded too.
        zero_nonfinite: whether signals that are not finite are replaced by zeros.
    """

    def __init__(self, factor: float, per_sample: bool, steps: bool, zero_nonfinite: bool) -> None:
        self.factor, self.per_sample, self.steps, self.zero_nonfinite = (
            factor,
            per_sample,
            steps,
            zero_nonfinite,
        )
        self.memories: dict[str, JointMemory] = {}
        self.made_by: dict[str, tuple[Any, int]] = {}
        self.repeated: set[str] = set()
        self._calls: dict[str, int] = {}
        self._forked: set[str] = set()
        self._backward = False

    def new_pass(self) -> None:
        """A forward pass starts: calls are counted from one again."""
        self._calls.clear()
        self.made_by.clear()
        self._backward = False

    def meet(self, name: str, made: list[tuple[str, Tensor]], alive: Callable[[], bool], bound: bool = True) -> None:
        """A watched module has returned: set a hook on each tensor that carries a signal.

        Args:
            name: the module.
            made: (place in the output, tensor).
            alive: asked by the hook before it acts.
            bound: False for a module that is only needed as the place of a declared fork.
        """
        if not made:
            return
        if self._backward:  # without a call of the root, a signal seen since the last call ends the pass
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
        """The activations made by these nodes are task forks: the fork rule bounds them, not the guard."""
        self._forked.update(name for name, made in self.made_by.items() if made in producers)

    def _watch(self, name: str, joint: str, tensor: Tensor, alive: Callable[[], bool]) -> None:
        def on_signal(signal: Tensor) -> Tensor | None:
            self._backward = True
            if not alive() or name in self._forked or (name in self.repeated and not self.steps):
                return None
            return self._bound(joint, signal)

        tensor.register_hook(on_signal)

    def _bound(self, joint: str, signal: Tensor) -> Tensor | None:
        memory = self.memories.get(joint)
        if memory is None:
            memory = self.memories[joint] = JointMemory.new(signal.device)
        elif memory.median.device != signal.device:  # a state saved elsewhere
            memory = self.memories[joint] = memory.on(signal.device)
        with torch.no_grad():
            norm = signal_norm(signal, self.per_sample)
            scale, finite = scale_within(norm, guard_limit(memory.median, self.factor))
            memory.norm = norm.amax() if norm.dim() else norm
            memory.median = follow_median(memory.median, norm, memory.seen)
            memory.bounded = memory.bounded + (finite & (scale < 1)).any()
            memory.nonfinite = memory.nonfinite + (~finite).any()
            memory.seen += 1
            if not self.zero_nonfinite:
                scale = torch.where(finite, scale, torch.ones_like(scale))
                finite = torch.ones_like(finite)
            return apply_scale(signal, scale, finite)
