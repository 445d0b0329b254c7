"""GSO, the gradient-splitting optimizer: AdamW over bins, each bounded before the moments and in its update."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..budget import DEFAULT_OF_GSO
from ..distributed import local_of
from ..plan import one_device, part_of
from .cyclic import Cyclic
from .in_backward import InBackward, check_budget, check_model
from .planned import Planned
from .registry import Update, make_update

__all__ = ["GSO"]

_KEPT = ("_options", "_overrides", "_shared_groups", "_one_tensor_a_part", "_cyclic")
"""What a copy takes over; parts and hooks are made anew, for its own parameters."""


class GSO(Optimizer):
    """AdamW over bins: no bin's gradient may poison the moments, no bin may move by more than a share of its length.

    Per bin b (a row by default), with limits from ``budget`` and ``tau`` following the learning rate's schedule:

        s_b = min(1, 0.2 max(||w_b||, 1e-3) / ||g_b||)          g' = s_b g
        m = b1 m + (1 - b1) g'         v = b2 v + (1 - b2) g'^2     (or one v a bin)
        u = lr mhat / (sqrt(vhat) + eps)
        c_b = min(1, 0.03 (lr / lr_max) max(||w_b||, 0.01 sqrt(n_b)) / ||u_b||)
        w = w (1 - lr weight_decay) - c_b u

    With a limit of inf and ``second_moment="element"`` it is `torch.optim.AdamW` to rounding. A bin whose gradient is
    not finite is passed over, and nothing else. From AdamW (Loshchilov & Hutter 2019), AGC (Brock et al. 2021), LARS
    (You et al. 2017) and, for one second moment a bin, Adam-mini (Zhang et al. 2024). Deviations: AGC bounds before
    Adam's moments; the bound on the update is one-sided, LARS is not; bins of "bin" are rows everywhere, Adam-mini's
    are heads for query and key and whole tensors for convolutions.

    Args:
        params: a module, parameters, pairs (name, parameter), or groups; a group may carry its own ``plan`` and
            ``budget``.
        lr: learning rate >= 0; a float or a 0-d tensor. Trials: within 9 % of the best over a factor of 100.
        plan: see `GradientSplitter`.
        budget: a budget, its name, a tuple, or a mapping from levels; those that bound the update act on the update,
            the others on the gradient before the moments. Default ``(Relative(0.2), RelativeStep(0.03))``.
        betas: decay of the two moments, in [0, 1).
        eps: added to the denominator, >= 0.
        weight_decay: decoupled, per step and unit of lr, >= 0; not part of what is bounded.
        second_moment: "element", or "bin": one a bin, which saves a copy of the weights.
        rule: "bottom_up" or "nearest", see `project`.
        maximize: ascend.
        backend, process_group: see `GradientSplitter`.
        in_backward: update each parameter as soon as backward has completed its gradient, and free the gradient; needs
            limits that look at one tensor each. ``step()`` then only ends the step; see `accumulating`.
        schedule: "all", or "cyclic": one block of tensors after the other, moments for the active block alone.
        switch_every, order, seed: of the cycle, see `Cyclic`.

    Raises:
        ValueError: a constant out of its range, no parameters, an unknown name; "bin" with bins over several tensors.
        RuntimeError: a sparse gradient.

    >>> w = nn.Parameter(torch.tensor([[3.0, 4.0]]))
    >>> opt = GSO([w], lr=1.0, weight_decay=0.0)
    >>> w.grad = torch.tensor([[1e9, 0.0]])
    >>> opt.step()                            # at most 3 % of the row's length, 5
    >>> w.data
    tensor([[2.8500, 4.0000]])
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 1e-2,
        *,
        plan: Any = "xsp",
        budget: Any = DEFAULT_OF_GSO,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        second_moment: str = "element",
        rule: str = "bottom_up",
        maximize: bool = False,
        backend: str = "auto",
        process_group: Any = None,
        in_backward: bool = False,
        schedule: str = "all",
        switch_every: int = 100,
        order: str = "fixed",
        seed: int = 0,
    ) -> None:
        if second_moment not in ("element", "bin"):
            raise ValueError(f"GSO(second_moment={second_moment!r}): expected 'element' or 'bin'.")
        if schedule not in ("all", "cyclic"):
            raise ValueError(f"GSO(schedule={schedule!r}): expected 'all' or 'cyclic'.")
        if in_backward:
            check_model(params)
            if schedule == "cyclic":
                raise ValueError(
                    "GSO(in_backward=True, schedule='cyclic'): expected one of the two, since the gradients of blocks "
                    "that wait would never be freed. Leave one out."
                )
        self._options = {
            "plan": plan,
            "budget": budget,
            "rule": rule,
            "backend": backend,
            "second_moment": second_moment,
            "process_group": process_group,
        }
        self._one_tensor_a_part = in_backward
        self._in_backward: InBackward | None = None
        self._cyclic: Cyclic | None = None
        self._overrides: list[dict[str, Any]] = []
        self._shared_groups = 0
        self._parts: list[Update] = []
        if isinstance(params, nn.Module):
            params = [(name, p) for name, p in params.named_parameters() if p.requires_grad]
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults)
        self._shared_groups = len(self.param_groups)
        self._build()
        if in_backward:
            self._in_backward = InBackward(self)
            # GradScaler then calls step() without unscaling first, and step() can say what is wrong.
            self._step_supports_amp_scaling = True
        if schedule == "cyclic":
            names = [name for part in self._parts for name in part.planned.plan.layout.names]
            self._cyclic = Cyclic(names, switch_every=switch_every, order=order, seed=seed)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, under the optimizer's options or under their own ``plan`` and ``budget``."""
        if self._in_backward is not None or self._cyclic is not None:
            raise ValueError(
                "GSO.add_param_group(…): expected all parameters at construction with in_backward=True or "
                "schedule='cyclic'. Make a second GSO for the new ones."
            )
        group = dict(param_group)
        override: dict[str, Any] = {key: group.pop(key) for key in ("plan", "budget") if key in group}
        _check_numbers({**self.defaults, **group})
        super().add_param_group(group)
        self._overrides.append(override)
        if self._shared_groups:  # after construction: a part of its own, so that no other history moves
            try:
                self._parts.append(self._part([len(self.param_groups) - 1], override))
            except (ValueError, TypeError):
                self.param_groups.pop()
                self._overrides.pop()
                raise

    def _build(self) -> None:
        """Make one part of all groups that share the options, and one of every other group."""
        shared = [i for i in range(self._shared_groups) if not self._overrides[i]]
        alone = [i for i in range(len(self.param_groups)) if i not in shared]
        parts = [self._part(shared, {})] if shared else []
        self._parts = parts + [self._part([i], self._overrides[i]) for i in alone]
        if self._one_tensor_a_part:
            self._parts = [one for part in self._parts for one in self._split(part)]

    def _split(self, part: Update) -> list[Update]:
        """One part a tensor, for updates that see one tensor at a time."""
        planned = part.planned
        check_budget(planned)
        parts = []
        for t, name in enumerate(planned.plan.layout.names):
            if planned.plan.layout.numels[t]:  # of the whole tensor: a rank without a piece still takes part
                made = planned.of_one(t, part_of(planned.plan, [t])[0], name)
                parts.append(make_update(made))
        return parts

    def _part(self, groups: list[int], override: dict[str, Any]) -> Update:
        names, owners = [], []
        for i in groups:
            group = self.param_groups[i]
            given = group.get("param_names") or [f"group{i}.param{j}" for j in range(len(group["params"]))]
            names += list(given)
            owners += group["params"]
        options = {**self._options, **override}
        second_moment = options.pop("second_moment")
        one_device(list(zip(names, owners, strict=True)), call="GSO")
        planned = Planned(names, [_real(p) for p in owners], owners, optimizer=self, **options)
        if second_moment == "bin" and not planned.bins_in_one_tensor:
            raise ValueError(
                f"GSO(second_moment='bin'): expected bins inside one tensor each, got {planned.plan!r} with bins "
                "over several. Use a "
                "plan by rows or tensors, or second_moment='element'."
            )
        return make_update(planned)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters once.

        Args:
            closure: evaluates the model again and returns the loss; runs with gradients enabled.

        Returns:
            What the closure returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._in_backward is not None:
            self._in_backward.finish()
        if self._cyclic is not None:
            self._begin_cyclic(self._cyclic)
        group_of = {id(p): group for group in self.param_groups for p in group["params"]}
        seen = 0
        for part in self._parts:
            self._step_part(part, group_of, seen)
            seen += len(part.planned.owners)
        return loss

    def _step_part(self, part: Update, group_of: dict[int, dict[str, Any]], seen: int = 0) -> None:
        """Update one part; ``seen`` tensors stand before it in the cycle of blocks."""
        owners = part.planned.owners
        gradients: list[Tensor | None] = []
        for t, owner in enumerate(owners):
            waits = owner.grad is None or (self._cyclic is not None and not self._cyclic.is_active(seen + t))
            gradients.append(None if waits else _gradient(owner))
        # Where ranks hold shards, one without gradients takes part all the same, or the others would wait for it.
        alone = not part.planned.is_sharded or self._one_tensor_a_part
        if alone and all(gradient is None for gradient in gradients):
            return
        states = [
            {} if gradients[t] is None else self._state_of(owner, part.planned, t) for t, owner in enumerate(owners)
        ]
        part.step(gradients, states, [group_of[id(p)] for p in owners])

    def _step_of(self, owner: Tensor) -> None:
        """Update the one parameter whose gradient is complete, from inside backward."""
        (part,) = [part for part in self._parts if part.planned.owners[0] is owner]
        (group,) = [group for group in self.param_groups if any(p is owner for p in group["params"])]
        self._step_part(part, {id(owner): group})

    def accumulating(self) -> AbstractContextManager[None]:
        """Let gradients add up over backward passes without updates, with ``in_backward=True``.

        All passes but the last go under it; the last one, outside, updates with the sum.

        Raises:
            ValueError: without ``in_backward=True``, where gradients add up anyway.
        """
        if self._in_backward is None:
            raise ValueError("GSO.accumulating(): expected in_backward=True; else gradients add up until step().")
        return self._in_backward.accumulating()

    def _begin_cyclic(self, cyclic: Cyclic) -> None:
        """Enter a step of the cycle; a block that has become idle loses its moments."""
        owners = [owner for part in self._parts for owner in part.planned.owners]
        before = cyclic.active
        cyclic.begin_step(
            lambda: [
                0.0 if p.grad is None else float(torch.linalg.vector_norm(_gradient(p), dtype=torch.float64) ** 2)
                for p in owners
            ]
        )
        if cyclic.active != before:
            for t, owner in enumerate(owners):
                if not cyclic.is_active(t):
                    self.state.pop(owner, None)

    def _state_of(self, owner: Tensor, planned: Planned, t: int) -> dict[str, Any]:
        """Return a parameter's moments as real views; made at its first gradient, its step counted here."""
        state = self.state[owner]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(owner, memory_format=torch.preserve_format)
            if self._options["second_moment"] == "bin":
                bins = len(planned.bins_of_tensor[t])
                state["bin_sq"] = torch.zeros(bins, dtype=torch.float32, device=owner.device)
            else:
                state["exp_avg_sq"] = torch.zeros_like(owner, memory_format=torch.preserve_format)
        state["step"] += 1
        return {k: local_of(_real(v)) if k in ("exp_avg", "exp_avg_sq") else v for k, v in state.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state, and under "gradsplit" the budgets' history."""
        state = super().state_dict()
        state["gradsplit"] = [part.planned.state() for part in self._parts]
        if self._cyclic is not None:
            state["gradsplit_cycle"] = self._cyclic.state()
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` left off. Statistics per bin stay float32, whatever the parameters' dtype.

        Raises:
            ValueError: the state of another plan or of other budgets.
        """
        history = state_dict.get("gradsplit")
        if self._cyclic is not None and "gradsplit_cycle" in state_dict:
            self._cyclic.load(state_dict["gradsplit_cycle"])
        if history is not None:
            if len(history) != len(self._parts):
                raise ValueError(
                    f"GSO.load_state_dict(…): expected the state of {len(self._parts)} plans, got {len(history)}. "
                    "Add the groups of "
                    "the saved run in the same order first."
                )
            before = [part.planned.state() for part in self._parts]
            try:
                for part, saved in zip(self._parts, history, strict=True):
                    part.planned.load(saved)
                super().load_state_dict(state_dict)
            except Exception:
                for part, saved in zip(self._parts, before, strict=True):
                    part.planned.load(saved)
                raise
        else:
            super().load_state_dict(state_dict)
        # torch casts every statistic but "step" to its parameter's dtype; one a bin must keep its precision.
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        owners = [p for group in self.param_groups for p in group["params"]]
        for i, owner in zip(saved_ids, owners, strict=True):
            saved_state = state_dict["state"].get(i, {})
            if "bin_sq" in saved_state:
                self.state[owner]["bin_sq"] = saved_state["bin_sq"].to(owner.device, torch.float32, copy=True)

    def __getstate__(self) -> dict[str, Any]:
        own = {key: self.__dict__[key] for key in _KEPT}
        if callable(self._options["plan"]) and self._parts:  # a function may not be picklable; the plan it made is
            own["_options"] = {**self._options, "plan": self._parts[0].planned.plan}
        own["_options"] = {**own["_options"], "process_group": None}  # a group ends with its process
        base: dict[str, Any] = super().__getstate__()
        return {**base, **own, "_history": [part.planned.state() for part in self._parts]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        history = state.pop("_history", None)
        super().__setstate__(state)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
        if history is not None:  # a copy or an unpickled one; load_state_dict keeps its parts
            self._build()
            self._in_backward = InBackward(self) if self._one_tensor_a_part else None
            for part, saved in zip(self._parts, history, strict=True):
                part.planned.load(saved)


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _gradient(owner: Tensor) -> Tensor:
    """The gradient as a real view."""
    gradient = owner.grad
    assert gradient is not None
    if gradient.is_sparse:
        raise RuntimeError(
            f"GSO does not support sparse gradients, got one of shape {tuple(owner.shape)}. Make the embedding with "
            "sparse=False, or "
            "put GradientSplitter in front of SparseAdam."
        )
    return local_of(_real(gradient))


def _check_numbers(options: dict[str, Any]) -> None:
    """Check the ranges of torch's usual constants; the words are torch's."""
    lr, eps, decay, betas = options["lr"], options["eps"], options["weight_decay"], options["betas"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if not lr >= 0:
        raise ValueError(f"Invalid learning rate: {lr}")
    if not eps >= 0:
        raise ValueError(f"Invalid epsilon value: {eps}")
    if not decay >= 0:
        raise ValueError(f"Invalid weight_decay value: {decay}")
    for i, beta in enumerate(betas):
        if not 0 <= beta < 1:
            raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
