"""Joints: the places of a model where the signal passes from one module, branch or time step to the one below it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from .forks import find_forks
from .graph import tracing, walk


def tensors_in(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor in a nested value with its place.

    Args:
        value: a tensor, a container of tensors, or anything else, which holds no tensor.
        path: place of `value` itself; a plain output has the empty place.

    Yields:
        Pairs (place, tensor), for example ("[1][0]", h) for h in `(output, (h, c))`.

    >>> [place for place, _ in tensors_in((torch.zeros(1), {"h": torch.zeros(1)}))]
    ['[0]', '[1].h']
    """
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors_in(item, f"{path}.{key}")
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from tensors_in(item, f"{path}[{index}]")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name), f"{path}.{field.name}")


def replace_tensors(value: Any, change: Callable[[str, Tensor], Tensor], path: str = "") -> Any:
    """Rebuild a nested value with every tensor passed through `change(place, tensor)`.

    If no tensor of a container changes, the same container is returned. So caches, and other containers whose identity
    matters, are left alone.

    Args:
        value: as in `tensors_in`.
        change: gives the new tensor for a place; it returns its argument to keep the old one.
        path: place of `value` itself.

    Returns:
        The same structure; a dataclass or mapping keeps its type.
    """
    if isinstance(value, Tensor):
        return change(path, value)
    if isinstance(value, Mapping):
        new = {key: replace_tensors(item, change, f"{path}.{key}") for key, item in value.items()}
        if all(new[key] is value[key] for key in new):
            return value
        if isinstance(value, dict) and type(value) is not dict:
            return type(value)(**{str(key): item for key, item in new.items()})
        return new
    if isinstance(value, (tuple, list)):
        items = [replace_tensors(item, change, f"{path}[{index}]") for index, item in enumerate(value)]
        if all(new_item is old for new_item, old in zip(items, value, strict=True)):
            return value
        if hasattr(value, "_fields"):
            return type(value)(*items)
        return type(value)(items)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field for field in dataclasses.fields(value) if field.init]
        changed = {
            field.name: replace_tensors(getattr(value, field.name), change, f"{path}.{field.name}") for field in fields
        }
        if all(changed[name] is getattr(value, name) for name in changed):
            return value
        return dataclasses.replace(value, **changed)
    return value


def carries_signal(tensor: Tensor) -> bool:
    """Whether a signal can pass through this tensor: floating and part of the autograd graph."""
    return tensor.requires_grad and (tensor.is_floating_point() or tensor.is_complex())


def call_model(model: torch.nn.Module, batch: Any) -> Any:
    """Call a model with a batch: a mapping by keyword, a tuple or list by position, anything else as one argument.

    Args:
        model: the module to call.
        batch: its inputs alone; for a batch that holds labels too, give a `loss_fn(model, batch)` instead.

    Returns:
        What the model returns.

    Raises:
        TypeError: the model does not take the batch that way.
    """
    try:
        if isinstance(batch, Mapping):
            return model(**batch)
        if isinstance(batch, (tuple, list)) and not hasattr(batch, "_fields"):
            return model(*batch)
        return model(batch)
    except TypeError as error:
        raise TypeError(
            f"joints(model, batch={type(batch).__name__}): the model could not be called with the batch: {error}. "
            "Pass a batch of inputs only; if it holds labels too, pass loss_fn=lambda model, batch: scalar."
        ) from error


LossFn = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Joint:
    """One place where the signal can be measured and bounded.

    Attributes:
        name: a unique name: the module, with the place inside its output, the call ("#2") or the branch ("->head").
        kind: "output" of a module, "branch" of an activation with several consumers, or "step" of a recurrence.
        role: "task", "residual" or "merge" for a branch, "layer" for an output, "time" for a step.
        module: dotted name of the module that made the activation.
        shape: shape of the activation, () where it is unknown.
        note: what the reader should know, for example that a fused recurrence has no inner joints.
    """

    name: str
    kind: str
    role: str
    module: str
    shape: tuple[int, ...] = ()
    note: str = ""


def joints(model: nn.Module, batch: Any, loss_fn: LossFn | None = None) -> list[Joint]:
    """List the joints of a model, in the order of its forward pass; outputs come first, then branches.

    Args:
        model: any module; it is called once, with gradients, and keeps neither hooks nor gradients.
        batch: inputs of the model (mapping: by keyword; tuple or list: by position), or what `loss_fn` takes.
        loss_fn: `loss_fn(model, batch) -> scalar`. With it, branches that meet only in the sum of the losses are told
            from branches that rejoin before. Without it the graph ends at the outputs of the model.

    Returns:
        The joints that were found. A compiled model, or a reentrant checkpoint, shows no joints inside.

    Raises:
        TypeError: the model cannot be called with the batch.

    >>> [joint.name for joint in joints(nn.Sequential(nn.Linear(2, 3), nn.Tanh()), torch.zeros(1, 2))]
    ['0', '1']
    """
    found: list[Joint] = []
    calls: dict[str, int] = {}
    model = bare(model, call="joints")
    with ExitStack() as hooks, torch.enable_grad(), tracing(model) as trace:
        for name, module in model.named_modules():
            if not name:
                continue

            def note(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
                known = {id(t) for _, t in tensors_in(args)}
                made = [(place, t) for place, t in tensors_in(output) if carries_signal(t) and id(t) not in known]
                if made:
                    calls[name] = calls.get(name, 0) + 1
                for place, tensor in made:
                    call, shape = f"#{calls[name]}" if calls[name] > 1 else "", tuple(tensor.shape)
                    found.append(Joint(f"{name}{place}{call}", "output", "layer", name, shape, _fused(module)))

            hooks.callback(module.register_forward_hook(note).remove)
        output = call_model(model, batch) if loss_fn is None else loss_fn(model, batch)
    repeated = {name for name, count in calls.items() if count > 1}
    listed = [Joint(j.name, "step", "time", j.module, j.shape, j.note) if j.module in repeated else j for j in found]
    graph = walk(t for _, t in tensors_in(output))
    for fork in find_forks(graph, trace):
        for branch in fork.branches:
            name = f"{fork.module or '(root)'}->{branch.name}"
            listed.append(Joint(name, "branch", fork.role, fork.module, graph.shape(*fork.producer)))
    return _unique(listed)


def bare(model: nn.Module, *, call: str) -> nn.Module:
    """The user's module inside DistributedDataParallel or torch.compile, so that names carry no prefix.

    Raises:
        TypeError: no module; ``call`` is the caller's name.
    """
    given: Any = model
    if not isinstance(given, nn.Module):
        what = f"the class {given.__name__}" if isinstance(given, type) else type(given).__name__
        raise TypeError(f"{call}({what}, …): expected a torch.nn.Module. Pass the model itself.")
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model.get_submodule("_orig_mod")
        else:
            return model


_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def _holds_stack(module: nn.Module) -> bool:
    """Whether a module holds a list of blocks of one type, as the body of a transformer does."""
    for inner in module.modules():
        if isinstance(inner, _CONTAINERS):
            blocks = [child for child in inner.children() if any(True for _ in child.children())]
            if len(blocks) >= 2 and len({type(block) for block in blocks}) == 1:
                return True
    return False


def layers_of(model: nn.Module) -> list[str]:
    """Names of the layers: the children of the model, with lists and sequences replaced by their entries.

    Layers without parameters are left out, since their signal differs from the next layer's by an elementwise factor.

    >>> layers_of(nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Sequential(nn.Linear(2, 2))))
    ['0', '2.0']
    """
    names: list[str] = []

    def visit(module: nn.Module, path: str) -> None:
        for name, child in module.named_children():
            full = f"{path}.{name}" if path else name
            if isinstance(child, _CONTAINERS) or _holds_stack(child):
                visit(child, full)
            elif any(True for _ in child.parameters()):
                names.append(full)

    visit(model, "")
    if len(names) == 1:
        inner = model.get_submodule(names[0])
        deeper = [f"{names[0]}.{name}" for name in layers_of(inner)]
        return deeper or names
    return names


def checked_names(model: nn.Module, names: Sequence[str], call: str) -> list[str]:
    """Return the names if all of them are modules of the model.

    Raises:
        ValueError: one is not; the nearest names are offered.
    """
    known = [name for name, _ in model.named_modules() if name]
    for name in names:
        if name not in known:
            near = get_close_matches(str(name), known, n=3, cutoff=0.4) or known[:3]
            raise ValueError(
                f"{call}: expected names of modules, got {name!r}, which {type(model).__name__} does not have. "
                f"Nearest: {', '.join(near)}."
            )
    return list(names)


def _fused(module: nn.Module) -> str:
    if isinstance(module, nn.RNNBase):
        return "fused recurrence: no joints between its time steps; gradsplit.chain.recurrent.Unrolled(module) has them"
    return ""


def _unique(listed: list[Joint]) -> list[Joint]:
    seen: dict[str, int] = {}
    unique = []
    for joint in listed:
        seen[joint.name] = seen.get(joint.name, 0) + 1
        name = joint.name if seen[joint.name] == 1 else f"{joint.name}~{seen[joint.name]}"
        unique.append(Joint(name, joint.kind, joint.role, joint.module, joint.shape, joint.note))
    return unique
