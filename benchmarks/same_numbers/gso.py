"""GSO as AdamW over bins, under the arguments that the tree at hand has for it, and its state in one form for all.

Older trees know no other direction and keep cyclic blocks inside GSO; newer ones have ``direction="adam"`` and
`gradsplit.CyclicBlocks` around any optimizer. The numbers are the same.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

import gradsplit as gs
from same_numbers.sheet import Notes

CYCLE = "gradsplit_cycle"
"""Where older trees keep whose turn it is, in GSO's own state."""

GROUP = ("lr", "betas", "eps", "weight_decay", "maximize", "capturable", "params", "param_names")
PART = ("fingerprint", "gradient", "update", "top_lr")


def make_gso(params: Any, **options: Any) -> Any:
    """Return GSO; with ``schedule="cyclic"`` blocks of tensors take turns, and are saved and loaded with it."""
    known = inspect.signature(gs.GSO).parameters
    if "direction" in known:
        options = {"direction": "adam", **options}
    if "schedule" in known or options.get("schedule") != "cyclic":
        return gs.GSO(params, **options)
    del options["schedule"]
    turns = {name: options.pop(name) for name in ("switch_every", "order", "seed") if name in options}
    optimizer = gs.GSO(params, **options)
    cyclic = gs.CyclicBlocks(optimizer, params, **turns)
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, CYCLE: cyclic.state_dict()})
    optimizer.register_load_state_dict_pre_hook(lambda _, state: _load(cyclic, state))
    return optimizer


def _load(cyclic: Any, state: dict[str, Any]) -> None:
    if CYCLE in state:
        cyclic.load_state_dict(state[CYCLE])


def note_state(notes: Notes, optimizer: torch.optim.Optimizer, prefix: str = "") -> None:
    """Note moments, groups, histories and turns apart; what a newer tree saves beside them is left out."""
    state = optimizer.state_dict()
    notes.note(f"{prefix}moments", state["state"])
    notes.note(f"{prefix}groups", [{key: group.get(key) for key in GROUP} for group in state["param_groups"]])
    notes.note(f"{prefix}history", [{key: part[key] for key in PART} for part in state.get("gradsplit", ())])
    notes.note(f"{prefix}turn", state.get(CYCLE))
