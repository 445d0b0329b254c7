"""An optimizer's parameters as parts, each under one plan with its own budgets and update.

Groups that share the optimizer's options make one part; a group with a plan or budget of its own, or added later, is
a part of its own, so that no other's history moves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..plan import one_device, part_of
from .in_backward import check_budget
from .planned import Planned
from .registry import Update, make_update

__all__ = ["make_part", "make_parts", "real"]

_CALL = "GSO"


def make_parts(
    optimizer: torch.optim.Optimizer,
    overrides: Sequence[Mapping[str, Any]],
    num_shared: int,
    options: Mapping[str, Any],
    *,
    one_tensor_each: bool,
) -> list[Update]:
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
    return [one for part in parts for one in _split(part)] if one_tensor_each else parts


def make_part(optimizer: torch.optim.Optimizer, groups: Sequence[int], options: Mapping[str, Any]) -> Update:
    """Return the update of some groups under one plan.

    Args:
        optimizer: read for learning rates at every step.
        groups: their positions.
        options: ``second_moment`` and ``fused`` as in `GSO`, the others as in `Planned`.

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
    planned = Planned(names, [real(p) for p in owners], owners, positions, optimizer=optimizer, **more)
    if second_moment == "bin" and not planned.bins_in_one_tensor:
        raise ValueError(
            f"GSO(second_moment='bin'): expected bins inside one tensor each, got {planned.plan!r} with bins "
            "over several. Use a "
            "plan by rows or tensors, or second_moment='element'."
        )
    return make_update(planned, fused=fused)


def _split(part: Update) -> list[Update]:
    """One part a tensor, for updates that see one tensor at a time."""
    planned = part.planned
    check_budget(planned)
    return [
        make_update(planned.of_one(t, part_of(planned.plan, [t])[0], name))
        for t, name in enumerate(planned.plan.layout.names)
        if planned.plan.layout.numels[t]  # of the whole tensor: a rank without a piece still takes part
    ]


def real(tensor: Tensor) -> Tensor:
    """Return complex numbers as pairs of real ones, sharing memory; anything else as it is."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
