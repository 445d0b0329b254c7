"""Saved states of GSO: what is refused before anything is changed, and how the state of another optimizer is read.

`GSO.load_state_dict` calls them in this order. `check_saved`, `check_moments` and `check_constants` refuse what does
not fit. `translated` gives the memories of AdamW and Muon the names that they have here. `load_history` takes over what
belongs to no parameter. Then torch loads the rest, and `mend_memories` undoes what torch does to its dtypes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..distributed import local_of
from .directions import DIRECTIONS
from .kinds import Kind
from .options import check_numbers
from .parts import memory_dtype

if TYPE_CHECKING:
    from .parts import Part

__all__ = [
    "COUNT",
    "HISTORY",
    "check_constants",
    "check_moments",
    "check_saved",
    "load_history",
    "mend_memories",
    "translated",
]

HISTORY, COUNT = "gradsplit", "gradsplit_count"
"""The keys of what no parameter holds, beside torch's "state" and "param_groups"."""


_OTHER_DIRECTION = "Make GSO with the direction of the saved run, or start without its state."
_DAMAGED = "The state is damaged: load another, or start without one."
_FOREIGN = (
    "That is the state of another optimizer, such as SGD, and no mean that GSO could go on with. Start GSO without it: "
    "load the model's weights alone."
)


def check_constants(saved: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], *, by_share: bool) -> None:
    """Refuse the constants of saved groups that a step would refuse.

    Raises:
        ValueError: such a constant; names the group.
    """
    for i, (own, group) in enumerate(zip(groups, saved["param_groups"], strict=False)):
        try:
            check_numbers({**own, **group}, by_share=by_share)
        except ValueError as error:
            said = str(error).rstrip(".")
            raise ValueError(
                f"GSO.load_state_dict(…): expected constants that GSO takes in group {i}, got others ({said}). Correct "
                "them in the state's 'param_groups'."
            ) from error


def _names_of(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of all parameters, or their places where the groups have none."""
    return [
        name
        for group in groups
        for name in group.get("param_names") or [f"parameter {j}" for j in range(len(group["params"]))]
    ]


def check_saved(saved: Any, groups: Sequence[Mapping[str, Any]]) -> None:
    """Refuse what no optimizer saved, the state of other tensors, and memories with values that no run leaves.

    Raises:
        ValueError: such a state; names the first tensor that differs.
    """
    call = "GSO.load_state_dict(…)"
    if not isinstance(saved, Mapping) or not {"state", "param_groups"} <= set(saved):
        what = f"a mapping with {sorted(map(str, saved))}" if isinstance(saved, Mapping) else type(saved).__name__
        raise ValueError(f"{call}: expected what state_dict() returned, with 'state' and 'param_groups', got {what}.")
    count = saved.get(COUNT, 0)
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise ValueError(f"{call}: expected a count of steps, got {COUNT}={count!r}. {_DAMAGED}")
    history = saved.get(HISTORY, ())
    if history is not None and not (
        isinstance(history, (list, tuple))
        and all(isinstance(one, Mapping) and isinstance(one.get("share", {}), Mapping) for one in history)
    ):
        kinds = [type(one).__name__ for one in history] if isinstance(history, (list, tuple)) else []
        what = f"{kinds}" if kinds else type(history).__name__
        raise ValueError(f"{call}: expected a mapping per plan at {HISTORY!r}, got {what}. {_DAMAGED}")
    ids = [i for group in saved["param_groups"] for i in group["params"]]
    known = set(ids)
    lost = [key for key in saved["state"] if key not in known]
    if lost and len(lost) == len(saved["state"]):
        raise ValueError(
            f"{call}: expected memories of the parameters that 'param_groups' lists, {ids[:3]!r:.60} and others, got "
            f"none of them and some of {lost[0]!r}. Save and load what state_dict() returned, unchanged."
        )
    owners = [p for group in groups for p in group["params"]]
    names = _names_of(groups)
    if len(ids) != len(owners):
        raise ValueError(
            f"{call}: expected the state of {len(owners)} parameters, got that of {len(ids)}. Make GSO with the "
            "parameters of the saved run; groups that were added then are added first."
        )
    for i, owner, name in zip(ids, owners, names, strict=True):
        state = saved["state"].get(i, {})
        step = state.get("step", 0)
        if not isinstance(state, Mapping) or not isinstance(step, (int, float, Tensor)):
            what = f"step={step!r:.40}" if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(f"{call}: expected memories and a count of steps for {name!r}, got {what}. {_DAMAGED}")
        for key, value in state.items():
            if key not in _MOMENTS:
                continue
            if not isinstance(value, Tensor):
                raise ValueError(
                    f"{call}: expected a tensor at {key!r} of {name!r}, got {type(value).__name__}. {_DAMAGED}"
                )
            if key == "bin_sq":
                continue
            if value.shape != owner.shape:
                raise ValueError(
                    f"{call}: expected memories of shape {tuple(owner.shape)} for {name!r}, got {key!r} of shape "
                    f"{tuple(value.shape)}. That is the state of another model: load the one of this model."
                )
            if not bool(local_of(value).isfinite().all()):
                raise ValueError(
                    f"{call}: expected finite memories, got inf or nan in {key!r} of {name!r}. Such a row would never "
                    "move again: load an earlier state, or start without one."
                )


def check_moments(saved: Mapping[str, Any], second_moment: str) -> None:
    """Refuse the moments of the other kind, and those of a run by share.

    Raises:
        ValueError: a saved parameter without the second moment that this optimizer keeps; a history of shares.
    """
    if any("share" in part for part in saved.get(HISTORY, ()) if isinstance(part, Mapping)):
        raise ValueError(
            "GSO.load_state_dict(…): expected the state of a run with direction='adam', got that of a run whose lr was "
            "a share. Make GSO with the direction of the saved run, or start without its state."
        )
    wanted, other = ("bin_sq", "element") if second_moment == "bin" else ("exp_avg_sq", "bin")
    for i, state in saved["state"].items():
        if state and wanted not in state:
            ours = f"Make GSO with second_moment={other!r} as in the saved run, or start without its state."
            advice = ours if {"exp_avg_sq", "bin_sq"} & set(state) else _FOREIGN
            got = f"in the state of parameter {i}, got {sorted(state)}"
            raise ValueError(f"GSO.load_state_dict(…): expected {wanted!r} {got}. {advice}")


_SAME = {"momentum": ("exp_avg", "momentum_buffer")}
"""Memory -> the names under which other optimizers keep the same: a running mean of gradients."""

_MOMENTS = {"momentum", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "bin_sq"}
"""What an optimizer keeps of gradients; anything else in a state belongs to a wrapper, which finds it again."""


def translated(
    saved: Mapping[str, Any], kinds: Sequence[Kind], groups: Sequence[Mapping[str, Any]]
) -> Mapping[str, Any]:
    """Return a saved state in the names of each tensor's memory.

    Where the state is that of another optimizer, its rates, betas and history mean something else: the groups then
    keep the constants that they have here, and history begins anew.

    Args:
        saved: what ``state_dict()`` returned, of as many parameters as there are kinds.
        kinds: one per parameter.
        groups: the optimizer's own.

    Raises:
        ValueError: a state that does not hold what the tensor's direction remembers; names the tensor.
    """
    owners = [(i, group) for group in saved["param_groups"] for i in group["params"]]
    names = _names_of(groups)
    made: dict[Any, dict[str, Any]] = {}
    foreign = any("share" not in part for part in saved.get(HISTORY, ()))
    foreign = foreign or any("amsgrad" in group or "momentum" in group for group in saved["param_groups"])
    for (i, group), kind, name in zip(owners, kinds, names, strict=True):
        state = dict(saved["state"].get(i, {}))
        if not state:
            continue
        memory = DIRECTIONS[kind.direction].memory
        for key in memory:
            if key in state:
                continue
            same = [other for other in _SAME.get(key, ()) if other in state]
            if not same or (same[0] == "momentum_buffer" and "dampening" in group):  # SGD's is a sum, not a mean
                raise ValueError(
                    f"GSO.load_state_dict(…): expected {key!r} in the state of {name!r}, whose direction is "
                    f"{kind.direction!r}, got {sorted(saved['state'][i])}. "
                    + (_OTHER_DIRECTION if set(state) & {"momentum", "exp_avg", "exp_avg_sq", "bin_sq"} else _FOREIGN)
                )
            state[key], foreign = state[same[0]], True
        made[i] = {key: value for key, value in state.items() if key in memory or key not in _MOMENTS}
        made[i].setdefault("step", torch.ones(()))
    told = {**saved, "state": {**saved["state"], **made}}
    if foreign and len(groups) == len(saved["param_groups"]):
        told["param_groups"] = [
            {**own, "params": group["params"]} for own, group in zip(groups, saved["param_groups"], strict=True)
        ]
        told.pop(HISTORY, None)
        told.pop(COUNT, None)
    return told


def mend_memories(optimizer: Optimizer, saved: Mapping[str, Any], *, by_share: bool) -> None:
    """Undo what torch's loading did to the memories.

    It casts all but "step" to the parameter's dtype. Statistics per bin must keep their own, and so must the memories
    of half-precision parameters, which the share step keeps in float32. Overriding torch's choice of the dtype has no
    effect, since it is called by its class's name. Old states hold "step" as a number.
    """
    saved_ids = [i for group in saved["param_groups"] for i in group["params"]]
    owners = [p for group in optimizer.param_groups for p in group["params"]]
    for i, owner in zip(saved_ids, owners, strict=True):
        for key, value in saved["state"].get(i, {}).items():
            if key == "step" and not isinstance(value, Tensor):
                optimizer.state[owner]["step"] = torch.tensor(float(value), dtype=torch.float32)
            elif key == "bin_sq":
                optimizer.state[owner][key] = value.to(owner.device, torch.float32, copy=True)
            elif key in _MOMENTS and owner.dtype in (torch.float16, torch.bfloat16):
                wide = memory_dtype(owner, by_share=True) if by_share else value.dtype
                optimizer.state[owner][key] = value.to(owner.device, wide, copy=True)


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
