"""The parts of a GSO: parameters under one plan, their moments, and one step of them."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..amp import Scaling
from ..distributed import local_of
from ..plan import Layout, make_plan, one_device, part_of
from ..split import Split
from .updates import Update, make_update, refusal_of_fused

__all__ = ["Part", "make_moments", "make_part", "make_parts", "real", "step_part"]

_CALL = "GSO"


@dataclass
class Part:
    """Parameters of one optimizer under one plan.

    Attributes:
        split: their plan, budgets and rates.
        groups: the position of each parameter's group in the optimizer.
        update: makes a step of them.
    """

    split: Split
    groups: list[int]
    update: Update


def make_parts(
    optimizer: torch.optim.Optimizer,
    overrides: Sequence[Mapping[str, Any]],
    num_shared: int,
    options: Mapping[str, Any],
    *,
    one_tensor_each: bool,
) -> list[Part]:
    """Return the parts of all groups.

    Args:
        optimizer: whose groups these are.
        overrides: each group's own plan and budget.
        num_shared: groups given at construction; those without overrides share a part.
        options: the optimizer's, see `make_part`.
        one_tensor_each: a part a tensor, for updates inside backward.
    """
    shared = [i for i in range(num_shared) if not overrides[i]]
    parts = [make_part(optimizer, shared, options)] if shared else []
    for i in range(len(optimizer.param_groups)):
        if i not in shared:
            parts.append(make_part(optimizer, [i], {**options, **overrides[i]}))
    return [one for part in parts for one in _one_by_one(part)] if one_tensor_each else parts


def make_part(optimizer: torch.optim.Optimizer, groups: Sequence[int], options: Mapping[str, Any]) -> Part:
    """Return some groups under one plan, with the update that belongs to it.

    Args:
        optimizer: read for learning rates at every step.
        groups: their positions.
        options: ``second_moment`` and ``fused`` as in `GSO`, the others as in `Split`.

    Raises:
        ValueError: bins over several tensors with one second moment a bin; no compiled update with ``fused=True``.
    """
    names: list[str] = []
    owners: list[Tensor] = []
    positions: list[int] = []
    for i in groups:
        group = optimizer.param_groups[i]
        names += group.get("param_names") or [f"group{i}.param{j}" for j in range(len(group["params"]))]
        owners += group["params"]
        positions += [i] * len(group["params"])
    # torch lets groups repeat each other's names; a layout's are unique.
    seen = Counter(names)
    names = [f"group{i}.{name}" if seen[name] > 1 else name for i, name in zip(positions, names, strict=True)]
    more = dict(options)
    second_moment, fused = more.pop("second_moment"), more.pop("fused")
    one_device(list(zip(names, owners, strict=True)), call=_CALL)
    tensors = [real(p) for p in owners]
    layout = Layout(tuple(names), tuple(tuple(int(size) for size in p.shape) for p in tensors))
    plan = make_plan(more.pop("plan"), layout, call=_CALL)
    split = Split(plan, tensors, more.pop("budget"), owners=owners, caps_updates=True, call=_CALL, **more)
    split.read_rates(optimizer)
    if second_moment == "bin" and not split.bins_in_one_tensor:
        raise ValueError(
            f"GSO(second_moment='bin'): expected bins inside one tensor each, got {plan!r} with bins over several. Use "
            "a plan by rows or tensors, or second_moment='element'."
        )
    return Part(split, positions, make_update(split, fused=fused))


def _one_by_one(part: Part) -> list[Part]:
    """Return one part per tensor, for updates that see one tensor at a time."""
    split, parts = part.split, []
    check_budget(split)
    for t, numel in enumerate(split.plan.layout.numels):
        if numel:  # of the whole tensor: a rank without a piece still takes part
            one = split.of_one(t, part_of(split.plan, [t])[0])
            parts.append(Part(one, [part.groups[t]], make_update(one)))
    return parts


def real(tensor: Tensor) -> Tensor:
    """Return complex numbers as pairs of real ones, sharing memory; anything else as it is."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def new_moments(owner: Tensor, num_bins: int | None, *, capturable: bool) -> dict[str, Tensor]:
    """Return zeros for a parameter that has its first gradient.

    Args:
        owner: the parameter.
        num_bins: bins that share one second moment each; None: one an element.
        capturable: the counter lives beside the parameter; else on the CPU, where reading it waits for nothing.
    """
    state = {"step": torch.zeros((), dtype=torch.float32, device=owner.device if capturable else "cpu")}
    state["exp_avg"] = torch.zeros_like(owner, memory_format=torch.preserve_format)
    if num_bins is None:
        state["exp_avg_sq"] = torch.zeros_like(owner, memory_format=torch.preserve_format)
    else:
        state["bin_sq"] = torch.zeros(num_bins, dtype=torch.float32, device=owner.device)
    return state


def advance(states: Sequence[dict[str, Tensor]], found_inf: Tensor | None) -> None:
    """Count a step of every state, unless a GradScaler found an overflow; without waiting for its answer."""
    if found_inf is None:
        steps = [state["step"] for state in states]
        if not torch.compiler.is_compiling() and all(_is_number(step) for step in steps):
            for step in steps:  # torch's own way takes several times as long: each is an operator call
                ctypes.c_float.from_address(step.data_ptr()).value += 1.0
            torch.autograd.graph.increment_version(steps)
        elif steps:
            torch._foreach_add_(steps, 1)
        return
    for state in states:
        if state["step"].device != found_inf.device:
            state["step"] = state["step"].to(found_inf.device)
        state["step"] += (found_inf.reshape(()) <= 0).to(state["step"].dtype)


def _is_number(step: Tensor) -> bool:
    """Whether a counter is one float32 in the CPU's memory."""
    return type(step) is Tensor and step.is_cpu and step.dtype is torch.float32 and step.numel() == 1


def local_moments(state: dict[str, Tensor]) -> dict[str, Any]:
    """Return a parameter's state as real views of what this rank holds."""
    mean = state["exp_avg"]
    if type(mean) is Tensor and not mean.is_complex():  # nearly always: it is its own view
        return state
    return {k: local_of(real(v)) if k in ("exp_avg", "exp_avg_sq") else v for k, v in state.items()}


def local_gradient(owner: Tensor) -> Tensor | None:
    """Return a real view of what this rank holds of a parameter's gradient, if it has one.

    Raises:
        RuntimeError: a sparse gradient.
    """
    gradient = owner.grad
    if gradient is None:
        return None
    if type(gradient) is Tensor and gradient.layout is torch.strided and not gradient.is_complex():  # nearly always
        return gradient
    if gradient.is_sparse:
        raise RuntimeError(
            f"GSO does not support sparse gradients, got one of shape {tuple(owner.shape)}. Make the embedding with "
            "sparse=False, or put GradientSplitter in front of SparseAdam."
        )
    local: Tensor = local_of(real(gradient))
    return local


def make_moments(optimizer: torch.optim.Optimizer, part: Part, second_moment: str) -> None:
    """Make the moments of every parameter that has its first gradient.

    Raises:
        RuntimeError: a sparse gradient; nothing has been made then.
    """
    split = part.split
    new = [t for t, owner in enumerate(split.owners) if owner.grad is not None and not optimizer.state.get(owner)]
    for t in new:
        local_gradient(split.owners[t])
    for t in new:
        num_bins = len(split.bins_of_tensor[t]) if second_moment == "bin" else None
        capturable = optimizer.param_groups[part.groups[t]]["capturable"]
        optimizer.state[split.owners[t]].update(new_moments(split.owners[t], num_bins, capturable=capturable))


def step_part(optimizer: torch.optim.Optimizer, part: Part, scaling: Scaling | None, *, alone: bool) -> None:
    """Update one part.

    Args:
        optimizer: whose states and groups these are.
        part: what is updated.
        scaling: what a GradScaler says of the gradients.
        alone: no other rank takes part in this step.

    Raises:
        RuntimeError: a sparse gradient, or ``fused=True`` without memory to walk.
    """
    split = part.split
    gradients = [local_gradient(owner) for owner in split.owners]
    # Where ranks hold shards, one without gradients takes part all the same, or the others would wait for it.
    if alone and all(gradient is None for gradient in gradients):
        return
    groups = [optimizer.param_groups[i] for i in part.groups]
    if split.kernel.device.type == "meta" and any(group["fused"] for group in groups):
        raise RuntimeError(refusal_of_fused(split))
    own = [
        {} if gradient is None else optimizer.state[owner]
        for owner, gradient in zip(split.owners, gradients, strict=True)
    ]
    advance([state for state in own if state], None if scaling is None else scaling.found_inf)
    states: list[dict[str, Any]] = [local_moments(state) if state else state for state in own]
    part.update.step(gradients, states, groups, scaling)


def check_budget(split: Split) -> None:
    """Refuse budgets that need other tensors' gradients of the same step.

    Raises:
        ValueError: a limit above the tensors, or a bin over several tensors.
    """
    above = [(level, b) for level, b in split.gradient_budgets + split.update_budgets if level in ("root", "module")]
    if above:
        level, budget = above[0]
        raise ValueError(
            f"GSO(in_backward=True): expected budgets of bins or tensors, got {budget!r} at level {level!r}, which "
            "needs the gradients of all its tensors at once; here each is freed before the next is there. Use "
            "in_backward=False, or a budget per bin."
        )
    if not split.bins_in_one_tensor:
        raise ValueError(
            f"GSO(in_backward=True): expected bins inside one tensor each, got {split.plan!r} with bins over several."
            " Use a plan by rows or tensors, or in_backward=False."
        )
