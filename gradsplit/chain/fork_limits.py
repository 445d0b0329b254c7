"""Bounding the branches of task forks during training.

At the end of the model's forward pass the graph is walked once from the outputs. Every consumer of a forked
activation gets a hook that keeps what it sends down; when all have, the hook of the producer adds the
branches up again, each within the fork's limit. All branches are therefore judged together, by exact norms,
before any of them reaches the trunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .forks import Branch, Fork, find_forks
from .graph import CallTrace, Graph, walk
from .signal_limits import scale_within, signal_norm


def fork_state(num_branches: int, device: torch.device) -> Tensor:
    """The memory of a fork before its first signal: (num_branches,) zeros, where 0 means "no signal seen yet"."""
    return torch.zeros(num_branches, dtype=torch.float32, device=device)


def remember_branch(maximum: Tensor, norm: Tensor, decay: float = 0.999, growth: float = 1.05) -> Tensor:
    """Let one branch's slowly decaying maximum take in the norm of its signal.

        m <- min(max(n, decay m), growth m);  m <- n at the first signal;  unchanged where n is not finite

    The maximum decays slowly, so that a head that has finished keeps its share for about 1 / (1 - decay)
    steps; it grows slowly, so that one spike cannot raise the limit.

    Args:
        maximum: (), L2 norm, units of the signal; 0 before the first signal.
        norm: (), the L2 norm of the branch's signal now, before any bound.
        decay: factor a step by which the memory fades.
        growth: largest factor a step by which it grows.

    Returns:
        (), the new maximum.

    >>> remember_branch(torch.tensor(2.0), torch.tensor(100.0)).item() == torch.tensor(2.0 * 1.05).item()
    True

    Source: the project's trials; there is no published rule of this form.
    """
    seen = torch.minimum(torch.maximum(norm, decay * maximum), growth * maximum)
    new = torch.where(maximum > 0, seen, norm)
    return torch.where(torch.isfinite(norm), new, maximum)


def fork_limit(maximum_K: Tensor) -> Tensor:
    """The limit of every branch: the smallest of the branches' maxima.

        limit = min over branches k with m_k > 0 of m_k

    Args:
        maximum_K: (K,), L2 norms; a branch at 0 has not carried a signal yet and is left out.

    Returns:
        (), inf where no branch has a maximum.

    >>> fork_limit(torch.tensor([3.0, 0.0, 2.0])).item()
    2.0
    """
    none = torch.full_like(maximum_K, float("inf"))
    return torch.where(maximum_K > 0, maximum_K, none).amin()


@dataclass
class ForkMemory:
    """What one fork remembers: (K,) maxima, last norms, and how often each branch was bounded or not finite."""

    name: str
    branches: tuple[str, ...]
    maximum_K: list[Tensor] = field(default_factory=list)
    norm_K: list[Tensor] = field(default_factory=list)
    bounded_K: list[Tensor] = field(default_factory=list)
    nonfinite_K: list[Tensor] = field(default_factory=list)

    def on(self, device: torch.device) -> ForkMemory:
        """The memory with its tensors on a device; made at the first signal."""
        for values in (self.maximum_K, self.norm_K, self.bounded_K, self.nonfinite_K):
            if not values:
                values.extend(torch.zeros((), device=device) for _ in self.branches)
            elif values[0].device != device:
                values[:] = [value.to(device) for value in values]
        return self


def bound_branches(
    total: Tensor, parts_K: list[Tensor | None], memory: ForkMemory, per_sample: bool, zero_nonfinite: bool
) -> Tensor | None:
    """The signal at a fork with every branch within the fork's limit.

        limit = min_k m_k,   out = total + sum_k (s_k - 1) d_k,   s_k = min(1, limit / ||d_k||)

    Args:
        total: the signal as autograd summed it, with whatever reaches the activation from outside the known
            branches.
        parts_K: the branches' signals d_k; None for a branch that this backward pass does not visit.
        memory: updated in place by new tensors.
        per_sample: bound each sample's signal; the memory takes the largest norm over the samples.
        zero_nonfinite: whether a branch that is not finite is left out.

    Returns:
        The new signal, or None where nothing changes (known without waiting on the CPU only).
    """
    memory.on(total.device)
    norms: dict[int, Tensor] = {}
    for k, part in enumerate(parts_K):
        if part is None:
            continue
        norms[k] = signal_norm(part, per_sample)
        top = norms[k].amax() if norms[k].dim() else norms[k]
        memory.norm_K[k] = top
        memory.maximum_K[k] = remember_branch(memory.maximum_K[k], top)
    limit = fork_limit(torch.stack(memory.maximum_K))
    out, rebuilt, all_finite = total, torch.zeros_like(total), None
    changed = False
    for k, norm in norms.items():
        part = parts_K[k]
        assert part is not None
        scale, finite = scale_within(norm, limit)
        memory.bounded_K[k] = memory.bounded_K[k] + (finite & (scale < 1)).any()
        memory.nonfinite_K[k] = memory.nonfinite_K[k] + (~finite).any()
        if total.device.type == "cpu" and bool((scale == 1).all()):
            rebuilt = rebuilt + part
            continue
        changed = True
        if scale.dim():
            shape = (-1,) + (1,) * (part.dim() - 1)
            scale, finite = scale.reshape(shape), finite.reshape(shape)
        scale = scale.to(part.dtype)
        out = out + (scale - 1) * part
        rebuilt = rebuilt + torch.where(finite, scale * part, torch.zeros_like(part))
        all_finite = finite.all() if all_finite is None else all_finite & finite.all()
    if not changed or all_finite is None:
        return None
    # where a branch is not finite the sum is not either, and only the known parts can be put together again
    return torch.where(all_finite, out, rebuilt) if zero_nonfinite else out


class ForkWatch:
    """Finds the task forks of a model's forward pass and bounds their branches in the backward pass that follows."""

    def __init__(self, declared: Iterable[str], automatic: bool, per_sample: bool, zero_nonfinite: bool) -> None:
        self.declared, self.automatic = tuple(declared), automatic
        self.per_sample, self.zero_nonfinite = per_sample, zero_nonfinite
        self.memories: list[ForkMemory] = []
        self._size: int | None = None
        self._forks: list[Fork] = []

    @property
    def active(self) -> bool:
        """Whether any fork is looked for."""
        return self.automatic or bool(self.declared)

    @property
    def planned(self) -> bool:
        """Whether a forward pass has been read."""
        return self._size is not None

    def forget_plan(self) -> None:
        """Read the next forward pass anew; memories are kept and matched by name."""
        self._size, self._forks = None, []

    def read(
        self,
        outputs: Iterable[Tensor],
        trace: CallTrace | None,
        made_by: dict[str, tuple[Any, int]],
        alive: Callable[[], bool],
    ) -> set[tuple[Any, int]]:
        """Set the hooks of one step.

        Args:
            outputs: what the model (or the loss) returned.
            trace: names of modules; needed where the graph has not been seen before.
            made_by: module -> (node, output) of the activation it returned, for declared forks.
            alive: asked by every hook: a hook left over from an aborted step, or from a splitter since
                removed, does nothing.

        Returns:
            (node, output) of every forked activation, so that the guard leaves it alone.
        """
        if self.planned and not self._forks and not self.declared:
            return set()
        graph = walk(outputs)
        if not graph.nodes_N:
            return set()
        if len(graph.nodes_N) != self._size:
            self._plan(graph, trace or CallTrace(), made_by)
        for fork, memory in zip(self._forks, self.memories, strict=True):
            self._hook(graph, fork, memory, alive)
        return {(graph.nodes_N[f.producer[0]], f.producer[1]) for f in self._forks}

    def _plan(self, graph: Graph, trace: CallTrace, made_by: dict[str, tuple[Any, int]]) -> None:
        found = find_forks(graph, trace)
        forks = [fork for fork in found if fork.role == "task"] if self.automatic else []
        index = {node: number for number, node in enumerate(graph.nodes_N)}
        for name in self.declared:
            node, output = made_by.get(name, (None, 0))
            fork = next((f for f in found if node is not None and f.producer == (index.get(node), output)), None)
            if fork is None:
                raise ValueError(
                    f"ChainSplitter(forks=({name!r},)): expected a module whose output has several consumers before "
                    f"the "
                    f"model's outputs, got one consumer or none at {name!r}. gs.joints(model, batch) lists the "
                    f"branches."
                )
            if fork not in forks:
                forks.append(fork)
        self._size = len(graph.nodes_N)
        old = {(memory.name, memory.branches): memory for memory in self.memories}
        self._forks = forks
        self.memories = []
        for fork in forks:
            key = (fork.module or "(root)", tuple(branch.name for branch in fork.branches))
            self.memories.append(old.get(key) or self._same_size(old, key) or ForkMemory(*key))

    @staticmethod
    def _same_size(old: dict[Any, ForkMemory], key: tuple[str, tuple[str, ...]]) -> ForkMemory | None:
        # a graph read again without names (another batch shape took another path): the branches keep their
        # order
        return next((memory for (_, branches), memory in old.items() if len(branches) == len(key[1])), None)

    def _hook(self, graph: Graph, fork: Fork, memory: ForkMemory, alive: Callable[[], bool]) -> None:
        kept: dict[tuple[int, int], Tensor] = {}
        for branch in fork.branches:
            for user, place in branch.inputs:

                def keep(grad_inputs: Any, grad_outputs: Any, key: tuple[int, int] = (user, place)) -> None:
                    grad = grad_inputs[key[1]]
                    if grad is not None and alive():
                        kept[key] = grad.detach()

                graph.nodes_N[user].register_hook(keep)

        def join(grad_outputs: Any) -> Any:
            total = grad_outputs[fork.producer[1]]
            parts = [_sum(kept, branch) for branch in fork.branches]
            kept.clear()
            if total is None or not alive() or all(part is None for part in parts):
                return None
            new = bound_branches(total.detach(), parts, memory, self.per_sample, self.zero_nonfinite)
            if new is None:
                return None
            return tuple(new if place == fork.producer[1] else grad for place, grad in enumerate(grad_outputs))

        graph.nodes_N[fork.producer[0]].register_prehook(join)


def _sum(kept: dict[tuple[int, int], Tensor], branch: Branch) -> Tensor | None:
    parts = [kept[key] for key in branch.inputs if key in kept]
    total = parts[0] if parts else None
    for part in parts[1:]:
        total = part if total is None else total + part
    return total
