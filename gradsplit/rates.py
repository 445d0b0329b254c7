"""What may change between steps: an optimizer's parameters and rates per bin, and which parameters train."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .hooks import users_level
from .plan import Plan

__all__ = ["LOWERED", "TOP", "Clock", "Members", "Rates", "SecondSchedule", "Thawed", "held_by", "refuse_endless"]

TOP = "gradsplit_top_lr"
"""The key of a parameter group under which its largest learning rate stands: it is saved and restored with the rate."""

LOWERED = "_gradsplit_lowered"
"""The attribute of an optimizer that says whether a guard lowers its rates in this very step."""


def held_by(optimizer: Any) -> list[int]:
    """The identities of an optimizer's parameters, in order."""
    groups = getattr(optimizer, "param_groups", None)
    return [id(p) for group in groups for p in group["params"]] if isinstance(groups, list) else []


def refuse_endless(optimizer: torch.optim.Optimizer, *, call: str) -> None:
    """Refuse a learning rate, a decay or a momentum that is not finite, before a step makes the weights so.

    A tensor on a device, or in a capturable group, is not looked at, since that would wait for the device. A
    traced step looks at nothing.

    Raises:
        ValueError: names the option and the group.

    >>> refuse_endless(torch.optim.SGD([torch.zeros(1)], lr=float("nan")), call="f")
    Traceback (most recent call last):
    ValueError: f: expected finite options in SGD, got lr=nan in group 0, which would make its weights inf or nan. \
Look at the scheduler, or at what else sets lr.
    """
    for i, group in enumerate(() if torch.compiler.is_compiling() else optimizer.param_groups):
        for name in ("lr", "weight_decay", "momentum"):
            value = group.get(name)
            if value.__class__ is float and math.isfinite(value):
                continue
            if isinstance(value, Tensor) and value.device.type == "cpu" and value.numel() == 1:
                value = 0.0 if group.get("capturable") else value.item()
            if isinstance(value, Real) and not math.isfinite(value):
                raise ValueError(
                    f"{call}: expected finite options in {type(optimizer).__name__}, got {name}={float(value)} in "
                    f"group {i}, which would make its weights inf or nan. Look at the scheduler, or at what else sets "
                    f"{name}."
                )


class Clock:
    """How many steps an optimizer has made, and of how many; its parts share one.

    Args:
        steps: the length of the run, over which the share falls to zero; None: it does not.
        device: where a captured graph must find the count; None: on the CPU, where reading it waits for nothing.
    """

    def __init__(self, steps: int | None, device: torch.device | None = None) -> None:
        self.steps = steps
        # A tensor, since a traced step knows a number only as it was when it was traced.
        device = torch.device("cpu") if device is None else device
        self.made = torch.zeros((), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)

    def advance(self) -> None:
        """Count a step, in place, so that a captured graph counts on."""
        self.made.add_(1)

    def set(self, made: int) -> None:
        """Go on after some steps."""
        self.made = torch.full_like(self.made, made)

    def pace(self) -> float | Tensor:
        """Return the share of this step as a fraction of what ``lr`` says."""
        return 1.0 if self.steps is None else (1 - self.made / self.steps).clamp(min=0)


class SecondSchedule:
    """Say once where somebody changes learning rates beside an optimizer's own schedule.

    `ReduceLROnPlateau` leaves no other mark. A rate that is a tensor is not looked at, since it may be on a device.

    Args:
        steps: the length of the optimizer's own schedule; None: it has none, and nothing is said.
    """

    def __init__(self, steps: int | None) -> None:
        self.steps, self._told = steps, False
        self._rates: list[float] = []  # as the last step found them

    def forget(self) -> None:
        """Take the rates of the next step as they are."""
        self._rates = []

    def look(self, optimizer: torch.optim.Optimizer) -> None:
        """Compare the rates with those of the step before.

        Warns:
            UserWarning: they differ, for the first time.
        """
        if self._told or torch.compiler.is_compiling() or getattr(optimizer, LOWERED, False):
            return
        rates = [group["lr"] for group in optimizer.param_groups if not isinstance(group["lr"], Tensor)]
        before, self._rates = self._rates, rates
        if before == rates or len(before) != len(rates):
            return
        self._told = True
        was, now = next(pair for pair in zip(before, rates, strict=True) if pair[0] != pair[1])
        warnings.warn(
            f"GSO(steps={self.steps}): expected lr to stay as it was, {was:g}, got {now:g}. steps= already lets the "
            "share fall to zero, and both decays are multiplied. Leave out steps=, or what changes lr.",
            UserWarning,
            stacklevel=users_level(),
        )


class Members:
    """Notices when an optimizer no longer holds the parameters that it held.

    Args:
        optimizer: whose groups are watched.
        names, parameters: what is bounded.
        others: warn of parameters that the optimizer updates and nobody bounds.
        call: the caller's name, for messages.

    Warns:
        UserWarning: such a parameter.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        names: Sequence[str],
        parameters: Sequence[Tensor],
        *,
        others: bool,
        call: str,
    ) -> None:
        self.optimizer, self.call = optimizer, call
        self._name_of = {id(p): name for name, p in zip(names, parameters, strict=True)}
        self._held = held_by(optimizer)
        self._sizes = [len(group["params"]) for group in optimizer.param_groups]
        if others:
            self._warn_of(set(self._held), "are not in the model that was given")

    def look(self) -> bool:
        """Return whether parameters have moved between groups or groups were added, so that rates are read anew.

        Raises:
            ValueError: a parameter that is bounded is no longer the optimizer's.

        Warns:
            UserWarning: the optimizer has new parameters, which nobody bounds.
        """
        now, sizes = held_by(self.optimizer), [len(group["params"]) for group in self.optimizer.param_groups]
        if now == self._held and sizes == self._sizes:
            return False
        new, gone = set(now) - set(self._held), (set(self._held) - set(now)) & set(self._name_of)
        if gone:
            first = next(name for key, name in self._name_of.items() if key in gone)
            instead = "others in the place of" if new else "an optimizer that no longer holds"
            raise ValueError(
                f"{self.call}(optimizer={type(self.optimizer).__name__}): expected the parameters that the optimizer "
                f"had at first, got {instead} {first!r} and {len(gone) - 1} more. Make a new splitter after parameters "
                "are replaced or taken out."
            )
        self._held, self._sizes = now, sizes
        self._warn_of(new, "were added after the splitter was made")
        return True

    def _warn_of(self, keys: set[int], why: str) -> None:
        free = keys - set(self._name_of)
        if free:
            shapes = [tuple(p.shape) for g in self.optimizer.param_groups for p in g["params"] if id(p) in free]
            warnings.warn(
                f"{self.call}(optimizer={type(self.optimizer).__name__}): {len(free)} parameters of the optimizer "
                f"{why}, the first of shape {shapes[0]}: no limit holds there. Make the splitter with a model "
                "that holds all of them, or with pairs (name, parameter) if that is meant.",
                UserWarning,
                stacklevel=users_level(),
            )


class Thawed:
    """Warn of parameters that were frozen at first and have a gradient now; a plan does not grow.

    Args:
        model: whose frozen parameters are watched; pairs (name, parameter) are taken as all that is meant.

    >>> model = torch.nn.Linear(2, 1)
    >>> thawed = Thawed(model.requires_grad_(False))
    >>> model.requires_grad_(True)(torch.ones(1, 2)).sum().backward()
    >>> with warnings.catch_warnings(record=True) as told:
    ...     warnings.simplefilter("always")
    ...     thawed.look(call="step()")
    >>> str(told[0].message)[:35]
    'step(): weight, bias had requires_g'
    """

    def __init__(self, model: Any) -> None:
        named = model.named_parameters() if hasattr(model, "named_parameters") else ()
        self._frozen: list[tuple[str, Tensor]] = [(name, p) for name, p in named if not p.requires_grad]

    def look(self, *, call: str) -> None:
        """Name what trains without a bound, each parameter once.

        Warns:
            UserWarning: a parameter that was frozen when the splitter was made has a gradient.
        """
        if not self._frozen or torch.compiler.is_compiling():
            return
        names = [name for name, parameter in self._frozen if parameter.grad is not None]
        if names:
            self._frozen = [pair for pair in self._frozen if pair[0] not in names]
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            warnings.warn(
                f"{call}: {', '.join(names[:3])}{more} had requires_grad=False when the splitter was made and trains "
                "now: no limit holds there. Make the splitter while all that will ever train is trainable, then "
                "freeze; or make a new one now.",
                UserWarning,
                stacklevel=users_level(),
            )


class Rates:
    """Learning rates of a plan's bins, read from an optimizer at every step.

    Args:
        plan: bins over the parameters.
        parameters: one a layout entry.
        optimizer: whose ``param_groups`` hold them.
        call: the caller's name, for errors.
        in_groups: keep the largest rates in the optimizer's groups, so that its ``state_dict`` restores them with the
            rates; for optimizers that know nothing of them.

    Raises:
        ValueError: a parameter the optimizer does not hold.
    """

    def __init__(
        self,
        plan: Plan,
        parameters: Sequence[Tensor],
        optimizer: torch.optim.Optimizer,
        *,
        call: str,
        in_groups: bool = False,
    ) -> None:
        self.optimizer, self.in_groups, self.call = optimizer, in_groups, call
        self._loaded: list[float] = []  # for groups that were saved without their largest rate
        group_of = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
        lost = [name for name, p in zip(plan.layout.names, parameters, strict=True) if id(p) not in group_of]
        if lost:
            raise ValueError(
                f"{call}(optimizer=…): expected an optimizer of this model's parameters, got one without {lost[0]!r} "
                f"and {len(lost) - 1} more. Pass the optimizer that updates them, or split only what it updates."
            )
        group_T = np.array([group_of[id(p)] for p in parameters], dtype=np.int64)
        group_B = np.zeros(plan.num_bins, dtype=np.int64)
        group_B[plan.bin_K] = group_T[plan.tensor_K]
        device = parameters[0].device
        # One group is the usual case: a single number then serves all bins.
        self._group_B = None if (group_B == group_B[0]).all() else torch.from_numpy(group_B).to(device)
        self._only = int(group_B[0])
        self._device = device
        self.top: list[Any] = [_positive(group.get("lr")) for group in optimizer.param_groups]
        if in_groups:
            self.top = [group.setdefault(TOP, top) for group, top in zip(optimizer.param_groups, self.top, strict=True)]

    def _per_bin(self, values: list[Any], num_bins: int) -> Tensor:
        if self._group_B is None:
            return self._here(values[self._only]).reshape(1).expand(num_bins)
        return torch.stack([self._here(value) for value in values]).index_select(0, self._group_B)

    def _here(self, value: Any) -> Tensor:
        """A number beside the parameters, 0-d; written there, since a copy from the host would wait for the device."""
        dtype = torch.float32 if self._device.type == "mps" else torch.float64
        if isinstance(value, Tensor):
            return value.to(self._device, dtype).reshape(())
        return torch.full((), value, dtype=dtype, device=self._device)

    def pace_B(self, num_bins: int) -> Tensor:
        """Return learning rate now / largest so far, (B,), in [0, 1]; 1 while the rate has been 0 throughout.

        A scheduler's ``initial_lr`` and ``max_lr`` count from the start, so that the pace follows a warm-up too.
        """
        paces: list[Any] = []
        groups = self.optimizer.param_groups
        self.top += [_positive(group.get("lr")) for group in groups[len(self.top) :]]  # groups added since
        for i, group in enumerate(groups):
            lr = _positive(group.get("lr"))
            before = group.get(TOP, self._loaded[i] if i < len(self._loaded) else lr) if self.in_groups else self.top[i]
            seen = [before, lr, *(_positive(group[key]) for key in ("initial_lr", "max_lr") if key in group)]
            self.top[i] = _largest(seen)
            if self.in_groups:
                group[TOP] = self.top[i]
            paces.append(lr / self.top[i])
        return self._per_bin(paces, num_bins)

    def value_B(self, key: str, num_bins: int) -> Tensor:
        """Return an option of the groups for each bin, (B,), for example "lr" or "weight_decay"."""
        return self._per_bin([group[key] for group in self.optimizer.param_groups], num_bins)

    def reach_B(self, num_bins: int) -> Tensor:
        """Return the longest update per length of gradient, lr / (1 - momentum), (B,)."""
        groups = self.optimizer.param_groups
        endless = [g["momentum"] for g in groups if g.get("momentum", 0.0) >= 1]
        if endless:
            raise ValueError(
                f"{self.call}(optimizer={type(self.optimizer).__name__}): expected a momentum below 1, got "
                f"momentum={endless[0]} in a group since the last step: what momentum sums up has no bound then. Set "
                "it below 1, for example to 0.9."
            )
        return self._per_bin([_positive(g.get("lr")) / (1.0 - g.get("momentum", 0.0)) for g in groups], num_bins)

    def state(self) -> list[float]:
        """Return the largest rate of each group so far."""
        return [float(top) for top in self.top]

    def load(self, tops: Sequence[float]) -> None:
        """Take over the largest rates of a saved run, group by group, whatever this optimizer was made with."""
        tops = tops[: len(self.optimizer.param_groups)]
        self.top[: len(tops)] = self._loaded = [float(top) for top in tops]
        if self.in_groups:
            for group, top in zip(self.optimizer.param_groups, self._loaded, strict=False):
                group[TOP] = top


def _positive(lr: Any) -> Any:
    """The size of a rate. 0 stands for one too small to matter, so that ratios of rates stay defined; None, for 1."""
    if lr is None:  # the optimizer finds its rate by itself, as Adafactor of transformers may
        return 1.0
    if isinstance(lr, Tensor):
        return torch.clamp(lr.detach().to(torch.float64).abs(), min=1e-30)
    return max(abs(float(lr)), 1e-30)


def _largest(rates: list[Any]) -> Any:
    """The largest of some rates; a tensor where one of them is, so that nothing waits for a device."""
    tensors = [rate for rate in rates if isinstance(rate, Tensor)]
    if not tensors:
        return max(rates)
    like = tensors[0]
    return torch.stack([torch.as_tensor(r, dtype=like.dtype, device=like.device).reshape(()) for r in rates]).amax()
