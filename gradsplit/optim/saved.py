"""What a GSO saves, and taking it over whole or not at all, from its own runs and from other optimizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .directions import DIRECTIONS
from .kinds import Kind
from .parts import Part

__all__ = ["COUNT", "HISTORY", "check_moments", "load_history", "mend_memories", "translated"]

HISTORY, COUNT = "gradsplit", "gradsplit_count"
"""The keys of what no parameter holds, beside torch's "state" and "param_groups"."""


def load_history(parts: Sequence[Part], saved: Mapping[str, Any]) -> None:
    """Take over what the parts returned; nothing is taken unless all of it fits.

    A state without history, such as torch's AdamW leaves or a distributed checkpoint, starts it anew.

    Raises:
        ValueError: the state of other plans or budgets.
    """
    history = saved.get(HISTORY)
    if history is not None and len(history) != len(parts):
        raise ValueError(
            f"GSO.load_state_dict(…): expected the state of {len(parts)} plans, got {len(history)}. Add the groups of "
            "the saved run in the same order first."
        )
    call = "GSO.load_state_dict(…)"
    before = [part.state() for part in parts]
    try:
        for part, state in zip(parts, history or (), strict=False):
            part.load(state, call=call)
    except Exception:
        for part, state in zip(parts, before, strict=True):
            part.load(state, call=call)
        raise


def check_moments(saved: Mapping[str, Any], second_moment: str) -> None:
    """Refuse the moments of the other kind.

    Raises:
        ValueError: a saved parameter without the second moment that this optimizer keeps.
    """
    wanted, other = ("bin_sq", "element") if second_moment == "bin" else ("exp_avg_sq", "bin")
    for i, state in saved["state"].items():
        if state and wanted not in state:
            raise ValueError(
                f"GSO.load_state_dict(…): expected {wanted!r} in the state of parameter {i}, got {sorted(state)}. Make "
                f"GSO with second_moment={other!r} as in the saved run, or start without its state."
            )


_SAME = {"momentum": ("exp_avg", "momentum_buffer")}
"""Memory -> the names under which other optimizers keep the same: a running mean of gradients."""


def translated(saved: Mapping[Any, Mapping[str, Any]], kinds: Mapping[Any, Kind]) -> dict[Any, dict[str, Any]]:
    """Return saved states in the names of each tensor's memory.

    Raises:
        ValueError: a state that does not hold what the tensor's direction remembers; names the tensor.
    """
    made: dict[Any, dict[str, Any]] = {}
    for i, kind in kinds.items():
        state = dict(saved.get(i, {}))
        if not state:
            continue
        memory = DIRECTIONS[kind.direction].memory
        for name in memory:
            state[name] = next((state[key] for key in (name, *_SAME.get(name, ())) if key in state), None)
        lost = [name for name in memory if state[name] is None]
        if lost:
            raise ValueError(
                f"GSO.load_state_dict(…): expected {', '.join(lost)} in the state of parameter {i}, whose direction is "
                f"{kind.direction!r}, got {sorted(saved[i])}. Make GSO with the direction of the saved run, or start "
                "without its state."
            )
        made[i] = {key: state[key] for key in ("step", *memory) if key in state}
        made[i].setdefault("step", torch.ones(()))
    return made


def mend_memories(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Undo what torch's loading did to the memories.

    It casts all but "step" to the parameter's dtype. Statistics per bin, and the memories of half-precision
    parameters, must keep their own. Overriding torch's choice of the dtype has no effect, since it is called by its
    class's name. Old states hold "step" as a number.
    """
    saved_ids = [i for group in saved["param_groups"] for i in group["params"]]
    owners = [p for group in optimizer.param_groups for p in group["params"]]
    for i, owner in zip(saved_ids, owners, strict=True):
        for key, value in saved["state"].get(i, {}).items():
            if key == "step" and not isinstance(value, Tensor):
                optimizer.state[owner]["step"] = torch.tensor(float(value), dtype=torch.float32)
            elif key == "bin_sq":
                optimizer.state[owner][key] = value.to(owner.device, torch.float32, copy=True)
            elif key != "step" and value.dtype != owner.dtype and optimizer.state[owner][key].dtype == owner.dtype:
                optimizer.state[owner][key] = value.to(owner.device, copy=True)
