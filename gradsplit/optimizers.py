"""What is known of optimizers that others made: their kinds, the bounds that fit them, whose parameters they hold."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .budget import DEFAULT_IN_FRONT, DEFAULT_OF_SPLITTER, Budget, Fixed, RelativeStep
from .hooks import users_level
from .rates import TOP, held_by

__all__ = [
    "calls_closure_often",
    "follows_gradient",
    "optimizer_of",
    "refuse_misfit",
    "searches_line",
    "usual_bounds",
    "warn_of_old_momentum",
    "warn_of_own_bounds",
    "why_not_capped",
]


def follows_gradient(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the update is lr times a momentum sum of gradients, as in SGD: bounding gradients bounds steps.

    >>> weight = torch.zeros(1, requires_grad=True)
    >>> [follows_gradient(kind([weight])) for kind in (torch.optim.SGD, torch.optim.ASGD, torch.optim.AdamW)]
    [True, True, False]
    """
    return all(
        ("dampening" in group and not {"betas", "trust_coefficient"} & set(group)) or {"lambd", "t0"} <= set(group)
        for group in optimizer.param_groups
    )


def calls_closure_often(optimizer: torch.optim.Optimizer) -> bool:
    """Whether one step evaluates the closure several times and compares the gradients, as LBFGS does."""
    return any("history_size" in group and "max_iter" in group for group in optimizer.param_groups)


def searches_line(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step compares losses and slopes along a line, as LBFGS with ``line_search_fn`` does."""
    return any(group.get("line_search_fn") is not None for group in optimizer.param_groups)


def why_not_capped(optimizer: torch.optim.Optimizer) -> str:
    """Say why the step of an optimizer must not be changed after it was made, and what to do; "" where it may be.

    >>> why_not_capped(torch.optim.AdamW([torch.zeros(1, requires_grad=True)]))
    ''
    """
    names = " ".join(kind.__name__ for kind in type(optimizer).__mro__).lower().replace("_", "")
    groups = optimizer.param_groups
    if "schedulefree" in names or any({"weight_sum", "weight_lr_power"} <= set(group) for group in groups):
        return (
            "the weights that you see are an average y, so that a cap on them leaves the sequence z free. Cap z: give "
            "a plain optimizer to GradientSplitter(…, cap_updates=True), then wrap it by "
            "schedulefree.ScheduleFreeWrapper"
        )
    if any(name in names for name in ("prodigy", "dadapt")) or any("d0" in group for group in groups):
        return (
            "it estimates the distance to the solution from its own steps, and a cap would corrupt that estimate. "
            "Leave cap_updates out: the default in front keeps faults in their rows"
        )
    if searches_line(optimizer):
        return (
            "its line search has checked the loss at the end of the step, and a cap would go elsewhere. Leave "
            "cap_updates out, or use line_search_fn=None"
        )
    return ""


def optimizer_of(optimizer: Any, *, call: str) -> torch.optim.Optimizer:
    """Return the optimizer that makes the step: itself, or the one inside a wrapper of the same parameters.

    Raises:
        TypeError: something without parameter groups.
    """
    for _ in range(8):
        inside = [getattr(optimizer, name, None) for name in ("optimizer", "_optimizer", "base", "base_optimizer")]
        inner = next((one for one in inside if isinstance(one, torch.optim.Optimizer) and one is not optimizer), None)
        if inner is None or not held_by(inner) or held_by(inner) != held_by(optimizer):
            break
        optimizer = inner
    if not isinstance(optimizer, torch.optim.Optimizer) or not hasattr(optimizer, "param_groups"):
        name, hint = type(optimizer).__name__, ""
        if isinstance(optimizer, (list, tuple)):
            hint = " Make one splitter per optimizer."
        elif isinstance(optimizer, Mapping):
            hint = " Make one splitter per optimizer, each with pairs (name, parameter)."
        elif isinstance(optimizer, type):
            name, hint = f"{optimizer.__name__}, a class", f" Write {optimizer.__name__}(model.parameters())."
        elif isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
            hint = f" Pass the optimizer that this {name} was made for."
        elif isinstance(optimizer, torch.amp.GradScaler):
            hint = " Pass the optimizer here, and the scaler to step(scaler=…)."
        raise TypeError(
            f"{call}(optimizer={name}): expected a torch optimizer with param_groups.{hint} "
            "Without one, call GradientSplitter.step() before the update and give a budget, for example Relative(0.2)."
        )
    return optimizer


def usual_bounds(optimizer: torch.optim.Optimizer, *, caps: bool) -> tuple[Budget, bool]:
    """Return the default budget at an optimizer, and whether the collective rule stands beside it.

    >>> usual_bounds(torch.optim.AdamW([torch.zeros(1, requires_grad=True)]), caps=False)
    (Relative(factor=1.0, eps=0.001), True)
    """
    if caps:
        return RelativeStep(), False
    if follows_gradient(optimizer):
        return DEFAULT_OF_SPLITTER, False
    if calls_closure_often(optimizer):
        return Fixed(math.inf), False
    return DEFAULT_IN_FRONT, True


def warn_of_old_momentum(optimizer: torch.optim.Optimizer, in_front: Sequence[Budget]) -> None:
    """Warn of momentum that was summed up before anything bounded the step: it acts on, whatever is bounded now.

    Momentum from a run under such bounds comes with the largest rates, which say so.
    """
    if not any(budget.bounds_update for budget in in_front) or any(TOP in group for group in optimizer.param_groups):
        return
    if any(state.get("momentum_buffer") is not None for state in optimizer.state.values()):
        name = type(optimizer).__name__
        warnings.warn(
            f"GradientSplitter(optimizer={name}): {name} holds momentum of steps that nothing bounded, so the next "
            "steps may be longer than RelativeStep allows. Make the splitter before the first step, or clear the "
            "optimizer's state.",
            UserWarning,
            stacklevel=users_level(),
        )


def warn_of_own_bounds(optimizer: torch.optim.Optimizer) -> None:
    """Warn of a splitter in front of an optimizer of this package, which bounds every row by itself."""
    if any(kind.__module__.partition(".")[0] == __package__ for kind in type(optimizer).__mro__):
        name = type(optimizer).__name__
        warnings.warn(
            f"GradientSplitter(optimizer={name}): {name} bounds the gradient and the step of every row by itself, so "
            "that limits hold twice. Leave the splitter out; gradsplit run takes --watch instead of --control.",
            UserWarning,
            stacklevel=users_level(),
        )


def refuse_misfit(optimizer: torch.optim.Optimizer, in_front: Sequence[Budget], *, caps: bool) -> None:
    """Refuse bounds that an optimizer does not bear.

    Args:
        optimizer: in front of which, or behind which, they stand.
        in_front: the budgets of its gradients.
        caps: its step is bounded too.

    Raises:
        ValueError: RelativeStep in front of an optimizer whose step does not follow the gradient, or of a momentum of
            1; a cap behind one that does not bear it; a limit in front of a line search.
    """
    name = type(optimizer).__name__
    if any(budget.bounds_update for budget in in_front) and not follows_gradient(optimizer):
        raise ValueError(
            f"GradientSplitter(optimizer={name}): RelativeStep bounds the step, but a limit on the gradient here says "
            "nothing about it. Leave budget= out for the default that fits, or use cap_updates=True (one copy of the "
            "weights), or gradsplit.GSO instead of the optimizer."
        )
    if any(budget.bounds_update for budget in in_front):
        endless = [group["momentum"] for group in optimizer.param_groups if group.get("momentum", 0.0) >= 1]
        if endless:
            raise ValueError(
                f"GradientSplitter(optimizer={name}): RelativeStep bounds the sum that momentum makes, and with "
                f"momentum={endless[0]} it has no bound. Use a momentum below 1, for example 0.9."
            )
    why = why_not_capped(optimizer) if caps else ""
    if why:
        raise ValueError(
            f"GradientSplitter(optimizer={name}, cap_updates=True): expected a step that may be cut: {why}."
        )
    limits = [budget for budget in in_front if budget.constant() != math.inf]
    if limits and searches_line(optimizer):
        raise ValueError(
            f"GradientSplitter(optimizer={name}, budget={limits[0]!r}): expected no limit in front of a line search, "
            "which compares slopes with losses. Leave budget= out, or use line_search_fn=None."
        )
