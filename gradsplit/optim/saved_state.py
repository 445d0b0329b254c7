"""What GSO saves beside torch's own state, and taking it over whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .cyclic import Cyclic
from .registry import Update

__all__ = ["HISTORY", "check_moments", "history_of", "load_history", "mend_moments"]

HISTORY = "gradsplit"
"""The key of the budgets' history beside torch's "state" and "param_groups"."""

_CYCLE = "gradsplit_cycle"


def history_of(parts: Sequence[Update], cyclic: Cyclic | None) -> dict[str, Any]:
    """Return what the next step depends on and no parameter holds."""
    saved: dict[str, Any] = {HISTORY: [part.planned.state() for part in parts]}
    if cyclic is not None:
        saved[_CYCLE] = cyclic.state()
    return saved


def load_history(parts: Sequence[Update], cyclic: Cyclic | None, saved: Mapping[str, Any]) -> None:
    """Take over what `history_of` returned; nothing is taken unless all of it fits.

    A state without history, such as torch's AdamW leaves or a distributed checkpoint, starts it anew.

    Raises:
        ValueError: the state of other plans, budgets or blocks.
    """
    history = saved.get(HISTORY)
    if history is not None and len(history) != len(parts):
        raise ValueError(
            f"GSO.load_state_dict(…): expected the state of {len(parts)} plans, got {len(history)}. Add the groups of "
            "the saved run in the same order first."
        )
    before = history_of(parts, cyclic)
    try:
        for part, state in zip(parts, history or (), strict=False):
            part.planned.load(state)
        if cyclic is not None and _CYCLE in saved:
            cyclic.load(saved[_CYCLE])
    except Exception:
        for part, state in zip(parts, before[HISTORY], strict=True):
            part.planned.load(state)
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


def mend_moments(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Undo what torch's loading did to the moments.

    It casts all but "step" to the parameter's dtype, and a statistic a bin must keep its precision; overriding torch's
    choice of the dtype has no effect, since it is called by its class's name. Old states hold "step" as a number.
    """
    saved_ids = [i for group in saved["param_groups"] for i in group["params"]]
    owners = [p for group in optimizer.param_groups for p in group["params"]]
    for i, owner in zip(saved_ids, owners, strict=True):
        state = saved["state"].get(i, {})
        if "bin_sq" in state:
            optimizer.state[owner]["bin_sq"] = state["bin_sq"].to(owner.device, torch.float32, copy=True)
        if "step" in state and not isinstance(state["step"], torch.Tensor):
            optimizer.state[owner]["step"] = torch.tensor(float(state["step"]), dtype=torch.float32)
