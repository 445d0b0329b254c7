"""The budget of ordinary joints at work: which outputs are watched in this pass, and what is done to their signals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradsplit.budget.base import Budget, Reading, State
from gradsplit.chain.bound import apply_scale, scale_within, signal_norm
from gradsplit.xp import torch_xp


@dataclass
class JointMemory:
    """What one joint remembers, as (1,) tensors on its device: the budget's history and what is shown to the user."""

    state: State
    norm: Tensor
    limit: Tensor
    bounded: Tensor
    nonfinite: Tensor

    @classmethod
    def new(cls, budget: Budget, device: torch.device) -> JointMemory:
        """Before the first signal."""
        zero = torch.zeros(1, device=device)
        return cls(budget.init(torch_xp, zero), zero, zero + float("inf"), zero, zero)

    def on(self, device: torch.device) -> JointMemory:
        """The same memory on another device."""
        shown = (self.norm, self.limit, self.bounded, self.nonfinite)
        return JointMemory(tuple(part.to(device) for part in self.state), *(part.to(device) for part in shown))


class SignalGuard:
    """Bounds the signal of each watched module output by a budget of its own.

    Args:
        budget: limits from the joint's own norms.
        per_sample: judge each sample by itself; the history takes the largest norm over the samples.
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
        """The activations made by these nodes are task forks: the fork rule bounds them, not the budget of a joint."""
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
            memory = self.memories[joint] = JointMemory.new(self.budget, signal.device)
        elif memory.norm.device != signal.device:  # a state saved elsewhere
            memory = self.memories[joint] = memory.on(signal.device)
        with torch.no_grad():
            norm = signal_norm(signal, self.per_sample).reshape(-1)
            whole = norm.amax().reshape(1) if len(norm) > 1 else norm
            usable = torch.where(torch.isfinite(whole), whole, torch.zeros_like(whole))
            one = torch.ones_like(whole)
            reading = Reading(usable, None, one, one)
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
