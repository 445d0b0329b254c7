"""Forks: one activation that feeds several consumers; which forks are tasks, and the limits on their branches.

Structure alone tells task heads from residual branches. Two consumers of an activation belong to the same task if they
both feed a value with more than one entry: the sum of a residual block, an attention product, a concatenation. They
belong to different tasks if they meet only in scalars, that is, in the sum of the losses, or if they never meet. A task
must read parameters of its own, so that a penalty on the activation is not taken for a head.

During training the graph is walked once, at the end of the model's forward pass, from the outputs down. Every consumer
of a forked activation gets a hook that keeps the signal that it sends down. When all consumers have sent theirs, the
hook of the producer adds the branches again, each within the fork's limit. So all branches are judged together, by
exact norms, before any of them reaches the trunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from .graph import CallTrace, Graph, walk
from .signal_limits import scale_within, signal_norm


@dataclass(frozen=True)
class Branch:
    """One task, or one consumer, of a forked activation.

    Attributes:
        name: the module that sets this branch apart from its siblings.
        inputs: (node, index of its input) of every consumer on this branch, as numbers in the graph.
        modules: modules that run on this branch and on no other, in the order of the forward pass; tasks only.
    """

    name: str
    inputs: tuple[tuple[int, int], ...]
    modules: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fork:
    """An activation with several consumers.

    Attributes:
        module: the module whose code made the activation.
        role: "task" (branches meet only in the loss), "residual" (they meet first in a sum) or "merge" (they meet in
            any other way).
        producer: (node, output) of the activation in the graph.
        branches: one entry per task for role "task", otherwise one per consumer.
    """

    module: str
    role: str
    producer: tuple[int, int]
    branches: tuple[Branch, ...]


def find_forks(graph: Graph, trace: CallTrace) -> list[Fork]:
    """List the forks of a graph, oldest first.

    Args:
        graph: from `walk`, over the loss or over the outputs of a model.
        trace: from `tracing`; it names modules.

    Returns:
        Every activation with two consumers or more. A parameter is not an activation, so a tied weight is not a fork.
    """
    below_N, own_N = _parameter_paths(graph)
    above_N = _descendants(graph)
    wide = _wide_mask(graph)
    forks = []
    for producer, users in sorted(graph.consumers.items()):
        if len({user for user, _ in users}) < 2 or below_N[producer[0]]:
            continue
        reach = [above_N[user] | (1 << user) for user, _ in users]
        tasks = _components(reach, wide)
        module = _maker(graph, trace, producer[0])
        owning = [task for task in tasks if _owns_parameters(task, tasks, reach, own_N)]
        if len(owning) >= 2:
            members = [tuple(users[i] for i in task) for task in owning]
            private = _private([[reach[i] for i in task] for task in owning])
            inside = [_modules(graph, trace, mask) for mask in private]
            names = _branch_names(graph, trace, inside, members)
            forks.append(Fork(module, "task", producer, _branches(names, members, inside)))
        else:
            meet = reach[0]
            for bits in reach[1:]:
                meet &= bits
            first = (meet & -meet).bit_length() - 1
            adds = first >= 0 and "Add" in type(graph.nodes_N[first]).__name__
            members = [(user,) for user in users]
            names = [trace.module_of(graph.sequence_number(user)) or "(loss)" for user, _ in users]
            role = "residual" if adds else "merge"
            forks.append(Fork(module, role, producer, _branches(names, members, [()] * len(members))))
    return forks


def _maker(graph: Graph, trace: CallTrace, node: int) -> str:
    """The module that made an activation; for an operation of the root's own code, the last module before it."""
    while True:
        name = trace.module_of(graph.sequence_number(node))
        if name or not graph.producers_N[node]:
            return name
        node = max(graph.producers_N[node])


def _descendants(graph: Graph) -> list[int]:
    """For each node, as bits, the set of everything that depends on it."""
    above_N = [0] * len(graph.nodes_N)
    for node in range(len(graph.nodes_N) - 1, -1, -1):
        mine = above_N[node] | (1 << node)
        for producer in graph.producers_N[node]:
            above_N[producer] |= mine
    return above_N


def _wide_mask(graph: Graph) -> int:
    """Nodes that make one task of two branches that meet there.

    Such a node has more than one entry and is not built from scalars alone: `torch.stack([loss_a, loss_b])` has two
    entries, but it still belongs to the sum of the losses.
    """
    mask = 0
    tail_N: list[bool] = []
    for node, producers in enumerate(graph.producers_N):
        tail = graph.scalar_N[node] or (bool(producers) and all(tail_N[below] for below in producers))
        tail_N.append(tail)
        if not tail:
            mask |= 1 << node
    return mask


def _parameter_paths(graph: Graph) -> tuple[list[bool], int]:
    """Nodes computed from parameters alone, and (as bits) the nodes where such a value meets an activation."""
    below_N: list[bool] = []
    own = 0
    for node, producers in enumerate(graph.producers_N):
        reads = graph.leaf_N[node] or bool(producers)
        only = reads and not graph.data_N[node] and all(below_N[p] for p in producers)
        below_N.append(only)
        if not only and (graph.leaf_N[node] or any(below_N[p] for p in producers)):
            own |= 1 << node
    return below_N, own


def _components(reach: list[int], wide: int) -> list[list[int]]:
    """Consumers joined by the relation "both feed a node of the wide mask", as lists of their numbers."""
    tasks: list[tuple[int, list[int]]] = []
    for number, bits in enumerate(reach):
        merged, members = bits & wide, [number]
        rest = []
        for other_bits, other in tasks:
            if other_bits & merged:
                merged |= other_bits
                members = other + members
            else:
                rest.append((other_bits, other))
        tasks = [*rest, (merged, members)]
    return sorted(sorted(members) for _, members in tasks)


def _owns_parameters(task: list[int], tasks: list[list[int]], reach: list[int], own: int) -> bool:
    mine = others = 0
    for other in tasks:
        for number in other:
            if other is task:
                mine |= reach[number]
            else:
                others |= reach[number]
    return bool(mine & ~others & own)


def _private(reach: list[list[int]]) -> list[int]:
    """For each task, as bits, the nodes that depend on it and on no other task."""
    unions = []
    for task in reach:
        union = 0
        for bits in task:
            union |= bits
        unions.append(union)
    private = []
    for number, mine in enumerate(unions):
        for other, bits in enumerate(unions):
            if other != number:
                mine &= ~bits
        private.append(mine)
    return private


def _modules(graph: Graph, trace: CallTrace, mask: int) -> tuple[str, ...]:
    """Modules whose operations are in a mask, in the order of the forward pass."""
    found = dict.fromkeys(
        trace.module_of(graph.sequence_number(node)) for node in range(len(graph.nodes_N)) if mask >> node & 1
    )
    return tuple(name for name in found if name)


def _branch_names(graph: Graph, trace: CallTrace, inside: list[tuple[str, ...]], members: list[Any]) -> list[str]:
    """Name each task by the module that sets it apart: the first part of the path where the tasks differ."""
    paths = []
    for modules, users in zip(inside, members, strict=True):
        deepest = modules[0] if modules else ""
        own = trace.module_of(graph.sequence_number(users[0][0]))
        paths.append((own if own not in ("", _common([own, deepest])) else deepest).split("."))
    common = 0
    while all(len(path) > common + 1 for path in paths) and len({path[common] for path in paths}) == 1:
        common += 1
    names = [".".join(path[: common + 1]) for path in paths]
    return names if len(set(names)) == len(names) else [".".join(path) for path in paths]


def _common(paths: list[str]) -> str:
    parts = []
    for entries in zip(*(path.split(".") for path in paths), strict=False):
        if len(set(entries)) > 1:
            break
        parts.append(entries[0])
    return ".".join(parts)


def _branches(names: list[str], members: list[Any], inside: list[tuple[str, ...]]) -> tuple[Branch, ...]:
    seen: dict[str, int] = {}
    branches = []
    for name, inputs, modules in zip(names, members, inside, strict=True):
        seen[name] = seen.get(name, 0) + 1
        label = name if seen[name] == 1 else f"{name}#{seen[name]}"
        branches.append(Branch(label, tuple(inputs), modules))
    return tuple(branches)


def remember_branch(maximum: Tensor, norm: Tensor, decay: float = 0.999, growth: float = 1.05) -> Tensor:
    """Let one branch's slowly decaying maximum take in the norm of its signal.

        m <- min(max(n, decay m), growth m);  m <- n at the first signal;  unchanged where n is not finite

    The maximum decays slowly, so that a head that has finished keeps its share for about 1 / (1 - decay) steps. It
    grows slowly, so that one spike cannot raise the limit.

    Args:
        maximum: (), L2 norm, units of the signal; 0 before the first signal.
        norm: (), L2 norm of the branch's signal now, before any bound.
        decay: factor per step by which the memory fades.
        growth: largest factor per step by which it grows.

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
    """What one fork remembers, per branch (K,): the maximum, the last norm, and counts of bounded and non-finite."""

    name: str
    branches: tuple[str, ...]
    maximum_K: list[Tensor] = field(default_factory=list)
    norm_K: list[Tensor] = field(default_factory=list)
    bounded_K: list[Tensor] = field(default_factory=list)
    nonfinite_K: list[Tensor] = field(default_factory=list)

    def on(self, device: torch.device) -> ForkMemory:
        """This memory with its tensors on a device; the tensors are made at the first signal."""
        for values in (self.maximum_K, self.norm_K, self.bounded_K, self.nonfinite_K):
            if not values:
                values.extend(torch.zeros((), device=device) for _ in self.branches)
            elif values[0].device != device:
                values[:] = [value.to(device) for value in values]
        return self


def bound_branches(
    total: Tensor, parts_K: list[Tensor | None], memory: ForkMemory, per_sample: bool, zero_nonfinite: bool
) -> Tensor | None:
    """Return the signal at a fork with every branch within the fork's limit.

        limit = min_k m_k,   out = total + sum_k (s_k - 1) d_k,   s_k = min(1, limit / ||d_k||)

    Args:
        total: the signal as autograd summed it, also over what is outside the known branches.
        parts_K: the branches' signals d_k; None for a branch that this backward pass does not visit.
        memory: it takes in new tensors, in place.
        per_sample: whether to bound each sample's signal; the memory takes the largest norm over the samples.
        zero_nonfinite: whether a branch that is not finite is left out.

    Returns:
        The new signal. None if nothing changes, which only the CPU knows without waiting.
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
    # Where a branch is not finite the sum is not either, so the known branches are added again.
    return torch.where(all_finite, out, rebuilt) if zero_nonfinite else out


class ForkWatch:
    """Finds the task forks of a model's forward pass and bounds their branches in the backward pass that follows.

    Args:
        declared: names of modules whose output is a task fork.
        automatic: whether to find task forks by structure too.
        per_sample: whether to bound each sample's signal.
        zero_nonfinite: whether a branch that is not finite is left out.
    """

    def __init__(self, declared: Iterable[str], automatic: bool, per_sample: bool, zero_nonfinite: bool) -> None:
        self.declared, self.automatic = tuple(declared), automatic
        self.per_sample, self.zero_nonfinite = per_sample, zero_nonfinite
        self.memories: list[ForkMemory] = []
        self._shape: tuple[str, ...] | None = None  # kinds of all operations: equal numbers of them may differ
        self._forks: list[Fork] = []

    @property
    def active(self) -> bool:
        """Whether any fork is looked for."""
        return self.automatic or bool(self.declared)

    @property
    def planned(self) -> bool:
        """Whether a forward pass has been read."""
        return self._shape is not None

    def forget_plan(self) -> None:
        """Have the next forward pass read anew; memories are kept and matched by name."""
        self._shape, self._forks = None, []

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
            trace: names of modules; needed for a graph that has not been seen before.
            made_by: module -> (node, output) of the activation that it returned, for declared forks.
            alive: every hook asks this. A hook left over from an aborted step, or from a splitter that has been
                removed since, does nothing.

        Returns:
            (node, output) of every forked activation, so that the guard leaves it alone.
        """
        if self.planned and not self._forks and not self.declared:
            return set()
        graph = walk(outputs)
        if not graph.nodes_N:
            return set()
        if tuple(type(node).__name__ for node in graph.nodes_N) != self._shape:
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
                    f"the model's outputs, got one consumer or none at {name!r}. Look up the branches with "
                    "gs.joints(model, batch)."
                )
            if fork not in forks:
                forks.append(fork)
        self._shape = tuple(type(node).__name__ for node in graph.nodes_N)
        old = {(memory.name, memory.branches): memory for memory in self.memories}
        self._forks = forks
        self.memories = []
        for fork in forks:
            key = (fork.module or "(root)", tuple(branch.name for branch in fork.branches))
            self.memories.append(old.get(key) or self._same_size(old, key) or ForkMemory(*key))

    @staticmethod
    def _same_size(old: dict[Any, ForkMemory], key: tuple[str, tuple[str, ...]]) -> ForkMemory | None:
        # Another batch shape took another path, so the graph was read again without names. Branches keep their order.
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
    return reduce(torch.add, parts) if parts else None
