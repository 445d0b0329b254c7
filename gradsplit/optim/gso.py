"""GSO, the gradient-splitting optimizer: AdamW over bins, each bounded before the moments and in its update."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..budget import Relative, RelativeStep
from .planned import Planned
from .registry import Update, make_update

__all__ = ["DEFAULT_BUDGET", "GSO"]

DEFAULT_BUDGET = (Relative(0.2), RelativeStep(0.03))
"""Before the moments, since one huge gradient would poison them for thousands of steps; and on the update."""

_OWN_OPTIONS = ("plan", "budget", "rule", "backend", "second_moment")


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
        backend: see `GradientSplitter`.

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
        budget: Any = DEFAULT_BUDGET,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        second_moment: str = "element",
        rule: str = "bottom_up",
        maximize: bool = False,
        backend: str = "auto",
    ) -> None:
        if second_moment not in ("element", "bin"):
            raise ValueError(f"GSO(second_moment={second_moment!r}): expected 'element' or 'bin'.")
        self._options = {
            "plan": plan,
            "budget": budget,
            "rule": rule,
            "backend": backend,
            "second_moment": second_moment,
        }
        self._overrides: list[dict[str, Any]] = []
        self._shared_groups = 0
        self._parts: list[Update] = []
        if isinstance(params, nn.Module):
            params = [(name, p) for name, p in params.named_parameters() if p.requires_grad]
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults)
        self._shared_groups = len(self.param_groups)
        self._build()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, under the optimizer's options or under their own ``plan`` and ``budget``."""
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

    def _part(self, groups: list[int], override: dict[str, Any]) -> Update:
        names, owners = [], []
        for i in groups:
            group = self.param_groups[i]
            given = group.get("param_names") or [f"group{i}.param{j}" for j in range(len(group["params"]))]
            names += list(given)
            owners += group["params"]
        options = {**self._options, **override}
        second_moment = options.pop("second_moment")
        from ..splitter import one_device

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
        group_of = {id(p): group for group in self.param_groups for p in group["params"]}
        for part in self._parts:
            owners = part.planned.owners
            groups = [group_of[id(p)] for p in owners]
            gradients: list[Tensor | None] = []
            for owner in owners:
                gradients.append(None if owner.grad is None else _gradient(owner))
            states = [self._state_of(owner, part.planned, t) for t, owner in enumerate(owners)]
            part.step(gradients, states, groups)
        return loss

    def _state_of(self, owner: Tensor, planned: Planned, t: int) -> dict[str, Any]:
        """Return a parameter's moments as real views; made at its first gradient, its step counted here."""
        if owner.grad is None:
            return {}
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
        return {k: _real(v) if k in ("exp_avg", "exp_avg_sq") else v for k, v in state.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state, and under "gradsplit" the budgets' history."""
        state = super().state_dict()
        state["gradsplit"] = [part.planned.state() for part in self._parts]
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` left off. Statistics per bin stay float32, whatever the parameters' dtype.

        Raises:
            ValueError: the state of another plan or of other budgets.
        """
        history = state_dict.get("gradsplit")
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
        own = {key: self.__dict__[key] for key in ("_options", "_overrides", "_shared_groups")}
        if callable(self._options["plan"]) and self._parts:  # a function may not be picklable; the plan it made is
            own["_options"] = {**self._options, "plan": self._parts[0].planned.plan}
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
    return _real(gradient)


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
