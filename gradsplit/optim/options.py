"""What a GSO is given, and what of it is refused: constants, torch's flags in torch's words, and saved states."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..distributed import local_of
from .directions import DIRECTIONS
from .kinds import Kind
from .parts import memory_dtype

if TYPE_CHECKING:
    from .parts import Part

__all__ = [
    "COUNT",
    "FLAGS",
    "HISTORY",
    "check_constants",
    "check_flags",
    "check_group",
    "check_moments",
    "check_numbers",
    "check_params",
    "check_saved",
    "check_share",
    "differentiable_backend",
    "load_history",
    "mend_memories",
    "translated",
]

FLAGS: dict[str, Any] = {
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
}
"""torch's flags in torch's order, with their defaults; states of older versions are completed with these."""


def check_params(params: Any) -> None:
    """Refuse what holds no parameters.

    Raises:
        TypeError: neither a module nor something to go through.
    """
    if not isinstance(params, (nn.Module, Iterable)):
        what = f"the class {params.__name__}" if isinstance(params, type) else type(params).__name__
        raise TypeError(
            f"GSO({what}): expected a module, parameters, pairs (name, parameter) or groups of them. Write for example "
            "GSO(model)."
        )


def check_group(group: Any) -> None:
    """Refuse a group without parameters.

    Raises:
        TypeError: no mapping, or one without "params".
    """
    if not isinstance(group, Mapping) or "params" not in group:
        got = f"the keys {sorted(map(str, group))}" if isinstance(group, Mapping) else "none"
        raise TypeError(
            f"GSO.add_param_group({type(group).__name__}): expected a mapping with 'params', got {got}. Write "
            "{'params': parameters}, beside options of the group."
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


def check_numbers(options: Mapping[str, Any], *, by_share: bool) -> None:
    """Check the ranges of torch's usual constants.

    Raises:
        ValueError: no number, or one out of its range; for ranges the words are torch's.
    """
    lr, eps, decay, betas = options["lr"], options["eps"], options["weight_decay"], options["betas"]
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", decay)):
        if isinstance(value, bool) or not isinstance(value, (Real, Tensor)):
            raise ValueError(f"GSO({name}={value!r}): expected a number, got {type(value).__name__}. Use float(…).")
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"GSO(betas={betas!r}): expected two numbers in [0, 1). Write betas=(0.9, 0.99).")
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if (not isinstance(lr, Tensor) or lr.device.type == "cpu") and not torch.compiler.is_compiling() and not lr >= 0:
        raise ValueError(f"Invalid learning rate: {lr}")
    # A tensor on a device is not looked at, since that would wait for the device.
    readable = not isinstance(lr, Tensor) or (lr.device.type == "cpu" and not torch.compiler.is_compiling())
    if by_share and readable and lr > 0.5:
        raise ValueError(
            f"GSO(lr={lr}): expected a share of a row's length per step, at most 0.5. The default is 0.03; use "
            "direction='adam' for a learning rate of AdamW."
        )
    if not eps >= 0:
        raise ValueError(f"Invalid epsilon value: {eps}")
    if not decay >= 0:
        raise ValueError(f"Invalid weight_decay value: {decay}")
    if isinstance(betas[0], Tensor) != isinstance(betas[1], Tensor):
        raise ValueError("betas must be either both floats or both Tensors")
    if isinstance(betas[0], Tensor):
        raise ValueError("GSO(betas=…): expected two numbers, got tensors. Use float(beta).")
    for i, beta in enumerate(betas):
        if not isinstance(beta, Real):
            raise ValueError(f"GSO(betas={betas!r}): expected two numbers in [0, 1). Write betas=(0.9, 0.99).")
        if not 0 <= float(beta) < 1:
            raise ValueError(f"Invalid beta parameter at index {i}: {beta}")


def check_flags(group: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Check a group's flags against each other and against the optimizer's.

    Raises:
        RuntimeError: flags that exclude each other; the words are torch's.
        ValueError: a flag that has no meaning here, or that would have to be the same in all groups.
    """
    if group["fused"] and group["foreach"]:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
    if group["fused"] and group["differentiable"]:
        raise RuntimeError("`fused` does not support `differentiable`")
    if group["foreach"]:
        raise ValueError(
            "GSO(foreach=True): expected None or False, since each bin has a scale of its own and torch has no "
            "multi-tensor kernel for that. Use fused=True on the CPU, or torch.compile(optimizer.step)."
        )
    if group["differentiable"] != defaults["differentiable"]:
        raise ValueError(
            f"GSO(differentiable={defaults['differentiable']}) with a group of differentiable="
            f"{group['differentiable']}: expected one value for all groups, since one step updates them all. Make a "
            "second GSO for the group."
        )


def differentiable_backend(backend: str, *, in_backward: bool) -> str:
    """Return the backend through which autograd can see.

    Raises:
        ValueError: a mode or a backend through which it cannot.
    """
    if in_backward:
        raise ValueError(
            "GSO(differentiable=True): expected in_backward=False, since an update in backward lets go of what "
            "autograd would need. Leave one of the two out."
        )
    if backend not in ("auto", "eager"):
        raise ValueError(
            f"GSO(differentiable=True, backend={backend!r}): expected backend 'auto' or 'eager', since autograd cannot "
            "see through compiled kernels. Leave it out."
        )
    return "eager"


def check_share(steps: Any, *, second_moment: str, differentiable: bool) -> None:
    """Refuse what has no meaning for the share step.

    Raises:
        ValueError: a length below one step; an option of direction="adam".
    """
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, Integral) or int(steps) < 1):
        raise ValueError(f"GSO(steps={steps!r}): expected the number of steps of the run, >= 1, or None.")
    if second_moment != "element":
        raise ValueError(
            f"GSO(second_moment={second_moment!r}): expected 'element' beside a direction that has no second moment "
            "per bin. Use direction='adam' with it."
        )
    if differentiable:
        raise ValueError(
            "GSO(differentiable=True): expected direction='adam', the one update that autograd can see through. Add "
            "direction='adam', or leave differentiable out."
        )


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


_OTHER_DIRECTION = "Make GSO with the direction of the saved run, or start without its state."
_DAMAGED = "The state is damaged: load another, or start without one."
_FOREIGN = (
    "That is the state of another optimizer, such as SGD, and no mean that GSO could go on with. Start GSO without it: "
    "load the model's weights alone."
)


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
