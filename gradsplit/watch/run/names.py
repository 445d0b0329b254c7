"""Names for an optimizer's parameters, from wherever they can be had."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["named_parameters_of", "names_of_leaves", "parameters_of", "roots_of", "TensorsOf"]

_WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def parameters_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Return an optimizer's parameters in the order of its parameter groups."""
    return [parameter for entry in optimizer.param_groups for parameter in entry["params"]]


def named_parameters_of(optimizer: torch.optim.Optimizer) -> list[tuple[str, torch.Tensor]]:
    """Return pairs (name, parameter), names unique.

    The names are those the optimizer was given (``param_names``); else those by which living modules own the
    parameters, without the names of wrappers (DistributedDataParallel, torch.compile); else ``group0.param3``. Where
    other modules have optimizers of their own, the owner comes first: ``Generator.main.0.weight``.
    """
    given: list[str | None] = []
    for entry in optimizer.param_groups:
        given += list(entry.get("param_names") or [None] * len(entry["params"]))
    parameters = parameters_of(optimizer)
    owned = {} if all(given) else _owned_names({id(p) for p in parameters})
    places = [f"group{i}.param{j}" for i, e in enumerate(optimizer.param_groups) for j in range(len(e["params"]))]
    owner = "" if all(given) else _owner_among_several(optimizer)
    names = [
        _without_wrappers(name)
        if name
        else (owner + _without_wrappers(owned[id(parameter)]) if id(parameter) in owned else place)
        for name, parameter, place in zip(given, parameters, places, strict=True)
    ]
    twice = {name for name, count in Counter(names).items() if count > 1}
    return [
        (f"{place}.{name}" if name in twice else name, parameter)
        for name, place, parameter in zip(names, places, parameters, strict=True)
    ]


def names_of_leaves(leaves: list[Tensor]) -> dict[int, str]:
    """Return ``{id(leaf): dotted name}`` of those leaves that living modules own."""
    return {key: _without_wrappers(name) for key, name in _owned_names({id(leaf) for leaf in leaves}).items()}


def roots_of(wanted: set[int]) -> list[nn.Module]:
    """Return the living modules that no other module holds and that own any of the parameters (by id)."""
    return [root for root, _ in _covers(wanted)]


def _covers(wanted: set[int]) -> list[tuple[Any, dict[int, str]]]:
    """Return root modules, each with ``{id(parameter): dotted name}``."""
    modules = [thing for thing in gc.get_objects() if issubclass(type(thing), nn.Module)]
    inside = {id(child) for module in modules for child in vars(module).get("_modules", {}).values()}
    roots = [module for module in modules if id(module) not in inside and "_parameters" in vars(module)]
    covers: list[tuple[Any, dict[int, str]]] = []
    for root in roots:
        try:
            names = {id(parameter): name for name, parameter in root.named_parameters() if id(parameter) in wanted}
        except Exception:  # a module may define what its parameters are, and refuse
            continue
        if names:
            covers.append((root, names))
    return covers


def _owner_among_several(optimizer: torch.optim.Optimizer) -> str:
    """Return what tells this optimizer's network from those of others, with a dot; empty if none is needed."""
    mine = {id(parameter) for parameter in parameters_of(optimizer)}
    roots = roots_of(mine)
    if len(roots) != 1:
        return ""
    others: dict[int, nn.Module] = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.optim.Optimizer) and thing is not optimizer:
            theirs = {id(parameter) for parameter in parameters_of(thing)}
            if theirs and not theirs & mine:
                others |= {id(root): root for root in roots_of(theirs)}
    others.pop(id(roots[0]), None)
    if not others:
        return ""
    label = _label(roots[0])
    if label in {_label(other) for other in others.values()}:  # both are an nn.Sequential: the script's own names
        told = vars(sys.modules.get("__main__", sys)).items()
        label = next((name for name, value in list(told) if value is roots[0] and name[0] != "_"), label)
    return f"{label}."


def _label(root: nn.Module) -> str:
    """The class of a module inside its wrappers."""
    while (inner := next((m for n, m in root.named_children() if n in _WRAPPERS), None)) is not None:
        if any(True for _ in root.parameters(recurse=False)) or len(list(root.children())) != 1:
            break
        root = inner
    return type(root).__name__


def _owned_names(wanted: set[int]) -> dict[int, str]:
    """Return ``{id(parameter): dotted name}`` from living modules: the roots that cover most parameters, first."""
    covers = _covers(wanted)
    owned: dict[int, str] = {}
    several = len(covers) > 1
    while covers:
        root, names = max(covers, key=lambda cover: len(cover[1]))
        if names and several and len(names) < len(wanted):
            # Two networks under one optimizer: their names may be alike.
            names = {key: f"{type(root).__name__}.{name}" for key, name in names.items()}
        owned |= names
        covers = [
            (root, left)
            for root, names in covers
            if (left := {key: name for key, name in names.items() if key not in owned})
        ]
    return owned


def _without_wrappers(name: str) -> str:
    """Take away the names of wrappers: ``module.`` in front, the others anywhere.

    >>> _without_wrappers("module._orig_mod.head.weight"), _without_wrappers("model.module.weight")
    ('head.weight', 'model.module.weight')
    """
    parts = [part for part in name.split(".") if part not in _WRAPPERS or part == "module"]
    while len(parts) > 1 and parts[0] in _WRAPPERS:
        parts = parts[1:]
    return ".".join(parts)


class TensorsOf:
    """An optimizer's parameters, and the buffers of the living modules that own any of them, as one state.

    Args:
        optimizer: whose parameters.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._parameters = named_parameters_of(optimizer)
        owners = roots_of({id(parameter) for _, parameter in self._parameters})
        self._buffers = [
            (f"{type(root).__name__}{i}.{name}", root, name)
            for i, root in enumerate(owners)
            for name, _ in root.named_buffers()
        ]

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Pairs (name, parameter)."""
        yield from self._parameters

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Pairs (name, buffer) as they are now; a script may replace buffers."""
        for shown, root, name in self._buffers:
            owner, _, last = name.rpartition(".")
            buffer = getattr(root.get_submodule(owner), last, None)
            if isinstance(buffer, Tensor):
                yield shown, buffer

    def state_dict(self) -> dict[str, Any]:
        """Return the tensors themselves by name."""
        return {
            "parameters": {name: parameter.detach() for name, parameter in self.named_parameters()},
            "buffers": {name: buffer.detach() for name, buffer in self.named_buffers()},
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy a state into the tensors, in place."""
        for kind, pairs in (("parameters", self.named_parameters()), ("buffers", self.named_buffers())):
            for name, tensor in pairs:
                saved = state[kind].get(name)
                if saved is not None and saved.shape == tensor.shape:
                    tensor.copy_(saved)
