"""GSO, the gradient-splitting optimizer: AdamW over bins, each bounded before the moments and in its update."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..amp import Scaling
from ..budget import DEFAULT_OF_GSO
from ..hooks import without_compiler_guard
from .in_backward import InBackward, check_model
from .parts import Part, make_moments, make_part, make_parts, step_part

__all__ = ["GSO"]

_KEPT = ("_options", "_overrides", "_shared_groups", "_one_tensor_a_part")
"""What a copy takes over; parts and hooks are made anew, for its own parameters."""


class GSO(Optimizer):
    """AdamW over bins: no bin's gradient may poison the moments, no bin may move by more than a share of its length.

    Per bin b (a row by default), with limits from ``budget`` and ``tau`` following the learning rate's schedule:

        s_b = min(1, 0.2 max(||w_b||, 1e-3) / ||g_b||)          g' = s_b g
        m = b1 m + (1 - b1) g'         v = b2 v + (1 - b2) g'^2     (or one v a bin)
        u = lr mhat / (sqrt(vhat) + eps)
        c_b = min(1, 0.03 (lr / lr_max) max(||w_b||, 0.01 sqrt(n_b)) / ||u_b||)
        w = w - c_b (u + lr weight_decay w)

    With a limit of inf and ``second_moment="element"`` it is `torch.optim.AdamW` to rounding. A bin whose gradient is
    not finite is passed over, and nothing else. From AdamW (Loshchilov & Hutter 2019), AGC (Brock et al. 2021), LARS
    (You et al. 2017) and, for one second moment a bin, Adam-mini (Zhang et al. 2024). Deviations: AGC bounds before
    Adam's moments; the bound on the update is one-sided, LARS is not; decay is shortened with
    the update; bins of "bin" are rows everywhere, Adam-mini's are heads for query and key, tensors for convolutions.

    Args:
        params: a module, parameters, pairs (name, parameter), or groups; a group may carry its own ``plan`` and
            ``budget``.
        lr: learning rate >= 0; a float or a 0-d tensor. Trials: within 9 % of the best over a factor of 100.
        plan: see `GradientSplitter`.
        budget: a budget, its name, a tuple, or a mapping from levels; those that bound the update act on the update,
            the others on the gradient before the moments. Default ``(Relative(0.2), RelativeStep(0.03))``.
        betas: decay of the two moments, in [0, 1).
        eps: added to the denominator, >= 0.
        weight_decay: decoupled, per step and unit of lr, >= 0; not part of what is bounded, but shortened with it.
        second_moment: "element", or "bin": one a bin, which saves a copy of the weights.
        rule: "bottom_up" or "nearest", see `project`.
        maximize: ascend.
        foreach: None or False; there is no multi-tensor kernel for scales of bins.
        capturable: keep the step counters beside the parameters, so that a step can be captured in a graph.
        differentiable: let autograd see the update, with respect to gradients, weights and moments; in eager torch.
        fused: True asks for a compiled update and raises where there is none; False for eager torch; None: what
            the backend has.
        backend, process_group, stages: see `GradientSplitter`.
        in_backward: update each parameter as soon as backward has completed its gradient, and free the gradient; needs
            limits that look at one tensor each. ``step()`` then only ends the step; see `accumulating`.

    Raises:
        ValueError: a constant out of its range, no parameters, an unknown name; "bin" with bins over several tensors;
            flags without a meaning here.
        RuntimeError: a sparse gradient; flags that exclude each other.

    >>> w = nn.Parameter(torch.tensor([[3.0, 4.0]]))
    >>> opt = GSO([w], lr=1.0, weight_decay=0.0)
    >>> w.grad = torch.tensor([[1e9, 0.0]])
    >>> opt.step()                            # at most 3 % of the row's length, 5
    >>> w.data
    tensor([[2.8500, 4.0000]])
    """

    # GradScaler then hands scale and overflow to `step`, which heeds both without waiting for the device.
    _step_supports_amp_scaling = True

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
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        backend: str = "auto",
        process_group: Any = None,
        stages: Any = None,
        in_backward: bool = False,
    ) -> None:
        if second_moment not in ("element", "bin"):
            raise ValueError(f"GSO(second_moment={second_moment!r}): expected 'element' or 'bin'.")
        if in_backward:
            check_model(params)
        if differentiable:
            backend = differentiable_backend(backend, in_backward=in_backward)
        self._options = {
            "plan": plan,
            "budget": budget,
            "rule": rule,
            "backend": backend,
            "second_moment": second_moment,
            "process_group": process_group,
            "stages": stages,
            "fused": False if differentiable else fused,
        }
        self._one_tensor_a_part = in_backward
        self._in_backward: InBackward | None = None
        self._overrides: list[dict[str, Any]] = []
        self._shared_groups = 0
        self._parts: list[Part] = []
        if isinstance(params, nn.Module):
            params = [(name, p) for name, p in params.named_parameters() if p.requires_grad]
        defaults: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        defaults |= {
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
        }
        check_numbers(defaults)
        check_flags(defaults, defaults)
        super().__init__(params, defaults)
        self._shared_groups = len(self.param_groups)
        self._build()
        if in_backward:
            self._in_backward = InBackward(self)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, under the optimizer's options or under their own ``plan`` and ``budget``."""
        if self._in_backward is not None:
            raise ValueError(
                "GSO.add_param_group(…): expected all parameters at construction with in_backward=True. Make a second "
                "GSO for the new ones."
            )
        group = dict(param_group)
        override: dict[str, Any] = {key: group.pop(key) for key in ("plan", "budget") if key in group}
        check_numbers({**self.defaults, **group})
        check_flags({**self.defaults, **group}, self.defaults)
        if group.get("fused", self.defaults["fused"]) != self.defaults["fused"]:
            override["fused"] = group["fused"]
        without_compiler_guard(super().add_param_group)(group)
        self._overrides.append(override)
        if self._shared_groups:  # after construction: a part of its own, so that no other history moves
            try:
                self._parts.append(make_part(self, [len(self.param_groups) - 1], {**self._options, **override}))
            except (ValueError, TypeError):
                self.param_groups.pop()
                self._overrides.pop()
                raise

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Set all gradients to None, or to zero."""
        without_compiler_guard(super().zero_grad)(set_to_none)

    def _build(self) -> None:
        self._parts = make_parts(
            self, self._overrides, self._shared_groups, self._options, one_tensor_each=self._one_tensor_a_part
        )

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters once.

        Under a GradScaler gradients may still carry its scale; on an overflow nothing moves, counts or learns.

        Args:
            closure: evaluates the model again and returns the loss; runs with gradients enabled.

        Returns:
            What the closure returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scaling = Scaling.of_step(self)
        if self._in_backward is not None:
            self._in_backward.finish()
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            self._init_group()
            for part in self._parts:
                self._step_part(part, scaling)
        return loss

    def _init_group(self) -> None:
        """Make the moments of every parameter that has its first gradient.

        Under this name, `torch.compile` runs it while it traces, so that moments are never made inside a graph.
        """
        for part in self._parts:
            make_moments(self, part, self._options["second_moment"])

    def _step_part(self, part: Part, scaling: Scaling | None = None) -> None:
        step_part(self, part, scaling, alone=self._one_tensor_a_part or not part.split.needs_others)

    def _step_of(self, owner: Tensor) -> None:
        """Update the one parameter whose gradient is complete, from inside backward."""
        (part,) = [part for part in self._parts if part.split.owners[0] is owner]
        make_moments(self, part, self._options["second_moment"])
        self._step_part(part)

    @property
    def updates_in_backward(self) -> bool:
        """Whether each parameter is updated during the backward pass."""
        return self._in_backward is not None

    def accumulating(self) -> AbstractContextManager[None]:
        """Let gradients add up over backward passes without updates, with ``in_backward=True``.

        All passes but the last go under it; the last one, outside, updates with the sum.

        Raises:
            ValueError: without ``in_backward=True``, where gradients add up anyway.
        """
        if self._in_backward is None:
            raise ValueError("GSO.accumulating(): expected in_backward=True; else gradients add up until step().")
        return self._in_backward.accumulating()

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state, and under "gradsplit" the budgets' history."""
        return {**without_compiler_guard(super().state_dict)(), **history_of(self._parts)}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` left off. Statistics per bin stay float32, whatever the parameters' dtype.

        The state of a `torch.optim.AdamW` is taken over as well; its history begins here.

        Raises:
            ValueError: the state of another plan, of other budgets, or of the other kind of second moment.
        """
        check_moments(state_dict, self._options["second_moment"])
        before = history_of(self._parts)
        load_history(self._parts, state_dict)
        try:
            without_compiler_guard(super().load_state_dict)(state_dict)
        except Exception:
            load_history(self._parts, before)
            raise
        mend_moments(self, state_dict)

    def __getstate__(self) -> dict[str, Any]:
        own = {key: self.__dict__[key] for key in _KEPT}
        if callable(self._options["plan"]) and self._parts:  # a function may not be picklable; the plan it made is
            own["_options"] = {**self._options, "plan": self._parts[0].split.plan}
        own["_options"] = {**own["_options"], "process_group": None, "stages": None}  # a group ends with its process
        base: dict[str, Any] = super().__getstate__()
        return {**base, **own, "_history": [part.split.state() for part in self._parts]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        history = state.pop("_history", None)
        super().__setstate__(state)
        for group in self.param_groups:
            for key, value in {**FLAGS, **self.defaults}.items():
                group.setdefault(key, value)
        if history is not None:  # a copy or an unpickled one; load_state_dict keeps its parts
            self._build()
            self._in_backward = InBackward(self) if self._one_tensor_a_part else None
            for part, saved in zip(self._parts, history, strict=True):
                part.split.load(saved, call="GSO.__setstate__(…)")


FLAGS: dict[str, Any] = {
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
}
"""torch's flags in torch's order, with their defaults; states of older versions are completed with these."""


def check_numbers(options: Mapping[str, Any]) -> None:
    """Check the ranges of torch's usual constants.

    Raises:
        ValueError: a constant out of its range; the words are torch's.
    """
    lr, eps, decay, betas = options["lr"], options["eps"], options["weight_decay"], options["betas"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if not lr >= 0:
        raise ValueError(f"Invalid learning rate: {lr}")
    if not eps >= 0:
        raise ValueError(f"Invalid epsilon value: {eps}")
    if not decay >= 0:
        raise ValueError(f"Invalid weight_decay value: {decay}")
    if isinstance(betas[0], Tensor) != isinstance(betas[1], Tensor):
        raise ValueError("betas must be either both floats or both Tensors")
    if isinstance(betas[0], Tensor):
        raise ValueError("GSO(betas=…): expected two numbers, got tensors. Use float(beta).")
    for i, beta in enumerate(betas):
        if not 0 <= beta < 1:
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


HISTORY = "gradsplit"
"""The key of the budgets' history beside torch's "state" and "param_groups"."""


def history_of(parts: Sequence[Part]) -> dict[str, Any]:
    """Return what the next step depends on and no parameter holds."""
    return {HISTORY: [part.split.state() for part in parts]}


def load_history(parts: Sequence[Part], saved: Mapping[str, Any]) -> None:
    """Take over what `history_of` returned; nothing is taken unless all of it fits.

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
    before = history_of(parts)
    try:
        for part, state in zip(parts, history or (), strict=False):
            part.split.load(state, call=call)
    except Exception:
        for part, state in zip(parts, before[HISTORY], strict=True):
            part.split.load(state, call=call)
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

    It casts all but "step" to the parameter's dtype, and a statistic per bin must keep its precision. Overriding
    torch's choice of the dtype has no effect, since it is called by its class's name. Old states hold "step" as a
    number.
    """
    saved_ids = [i for group in saved["param_groups"] for i in group["params"]]
    owners = [p for group in optimizer.param_groups for p in group["params"]]
    for i, owner in zip(saved_ids, owners, strict=True):
        state = saved["state"].get(i, {})
        if "bin_sq" in state:
            optimizer.state[owner]["bin_sq"] = state["bin_sq"].to(owner.device, torch.float32, copy=True)
        if "step" in state and not isinstance(state["step"], torch.Tensor):
            optimizer.state[owner]["step"] = torch.tensor(float(state["step"]), dtype=torch.float32)
