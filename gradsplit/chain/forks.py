"""Forks: one activation that feeds several consumers, and whether its branches are tasks or rejoin before the loss.

Task heads are told from residual branches by structure alone. Two consumers of an activation belong to the
same task if anything they both feed still has more than one entry (the sum of a residual block, an
attention product, a concatenation); they belong to different tasks if they meet only in scalars, that is,
in the sum of the losses, or never. A task must read parameters of its own, so that a penalty on the
activation is not mistaken for a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .graph import CallTrace, Graph


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
        role: "task" (branches meet only in the loss), "residual" (they meet first in a sum) or "merge" (any
            other way).
        producer: (node, output) of the activation in the graph.
        branches: one entry a task for role "task", one a consumer otherwise.
    """

    module: str
    role: str
    producer: tuple[int, int]
    branches: tuple[Branch, ...]


def find_forks(graph: Graph, trace: CallTrace) -> list[Fork]:
    """List the forks of a graph, oldest first.

    Args:
        graph: from `walk`, over the loss or over the outputs of a model.
        trace: from `tracing`, to name modules.

    Returns:
        Every activation with two consumers or more. Parameters are not activations: a tied weight is no fork.
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
            names = [trace.module_of(_number(graph, user)) or "(loss)" for user, _ in users]
            role = "residual" if adds else "merge"
            forks.append(Fork(module, role, producer, _branches(names, members, [()] * len(members))))
    return forks


def _maker(graph: Graph, trace: CallTrace, node: int) -> str:
    """The module that made an activation; for an operation of the root's own code, the last module before it."""
    while True:
        name = trace.module_of(_number(graph, node))
        if name or not graph.producers_N[node]:
            return name
        node = max(graph.producers_N[node])


def _number(graph: Graph, node: int) -> int:
    return int(graph.nodes_N[node]._sequence_nr())


def _descendants(graph: Graph) -> list[int]:
    """For each node the set, as bits, of everything that depends on it."""
    above_N = [0] * len(graph.nodes_N)
    for node in range(len(graph.nodes_N) - 1, -1, -1):
        mine = above_N[node] | (1 << node)
        for producer in graph.producers_N[node]:
            above_N[producer] |= mine
    return above_N


def _wide_mask(graph: Graph) -> int:
    """Nodes whose meeting makes two branches one task: more than one entry, and not built from scalars alone.

    `torch.stack([loss_a, loss_b])` has two entries but is still the sum of the losses.
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
    """Consumers joined by the relation "both feed something wide", as lists of their numbers."""
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
    """For each task, as bits, what depends on it and on no other task."""
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
        trace.module_of(_number(graph, node)) for node in range(len(graph.nodes_N)) if mask >> node & 1
    )
    return tuple(name for name in found if name)


def _branch_names(graph: Graph, trace: CallTrace, inside: list[tuple[str, ...]], members: list[Any]) -> list[str]:
    """Name each task by the module that sets it apart: the first part of the path where the tasks differ."""
    paths = []
    for modules, users in zip(inside, members, strict=True):
        deepest = modules[0] if modules else ""
        own = trace.module_of(_number(graph, users[0][0]))
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
