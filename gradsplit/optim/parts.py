"""Planned: parameters that share one plan, with the two ledgers that bound their gradient and their update."""

from __future__ import annotations

import ctypes
import hashlib
import importlib
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..amp import Scaling
from ..budget import Decision, budgets_by_level, make_ledger
from ..distributed import adder, kernel_for, local_of
from ..kernels import make_kernel
from ..plan import Layout, Plan, make_plan, one_device, part_of
from ..rates import Rates
from ..split import check_state

__all__ = [
    "Planned",
    "UPDATES",
    "Update",
    "make_update",
    "refusal_of_fused",
    "make_part",
    "make_parts",
    "real",
    "advance",
    "local_gradient",
    "local_moments",
    "new_moments",
    "make_moments",
    "step_part",
]


class Planned:
    """Parameters of one optimizer under one plan.

    Args:
        names: one a parameter.
        parameters: on one device; complex ones already as real views, sharded ones whole as DTensors.
        owners: the parameters as the optimizer holds them, for their learning rates.
        groups: the position of each parameter's group in the optimizer.
        plan, budget, rule, backend, process_group, stages: as in `GSO`.
        optimizer: read for learning rates at every step.
    """

    def __init__(
        self,
        names: list[str],
        parameters: list[Tensor],
        owners: list[Tensor],
        groups: list[int],
        *,
        plan: Any,
        budget: Any,
        rule: str,
        backend: str,
        process_group: Any,
        stages: Any,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self._parameters, self.owners, self.groups = parameters, owners, groups
        self._options = {"budget": budget, "rule": rule, "backend": backend}
        self._options |= {"process_group": process_group, "stages": stages}
        layout = Layout(tuple(names), tuple(tuple(int(s) for s in p.shape) for p in parameters))
        self.plan = make_plan(plan, layout, call="GSO")
        budgets = budgets_by_level(budget, self.plan, call="GSO")
        device = parameters[0].device
        self.kernel = kernel_for(
            self.plan,
            parameters,
            lambda local: make_kernel(backend, local, device, call="GSO"),
            group=process_group,
        )
        # What this rank holds of the plan; the plan itself where nothing is sharded.
        self.local_plan: Plan = getattr(self.kernel, "local_plan", self.plan)
        like = self.kernel.squares([None] * len(parameters))
        of_gradient = [pair for pair in budgets if not pair[1].bounds_update]
        of_update = [pair for pair in budgets if pair[1].bounds_update]
        self.gradient_budgets, self.update_budgets = of_gradient, of_update
        add = adder(stages)
        self.gradient = make_ledger(self.plan, of_gradient, like, rule=rule, call="GSO", add=add)
        self.update = make_ledger(self.plan, of_update, like, rule=rule, call="GSO", add=add) if of_update else None
        self.rates = Rates(self.plan, owners, optimizer, call="GSO")
        # Where each tensor's bins lie in vectors over all bins; defined where every bin lies in one tensor.
        bounds = self.plan.boxes.slices_T(len(layout))
        self.bins_of_tensor = [np.unique(self.plan.bin_K[bounds[t] : bounds[t + 1]]) for t in range(len(layout))]
        self.bins_in_one_tensor = sum(len(bins) for bins in self.bins_of_tensor) == self.plan.num_bins

    @property
    def is_sharded(self) -> bool:
        """Whether ranks hold parts of the parameters."""
        return self.local_plan is not self.plan

    @property
    def needs_others(self) -> bool:
        """Whether other ranks take part in every step, whatever gradients there are here."""
        return self.is_sharded or self._options["stages"] is not None

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters as this rank holds them, sharing memory."""
        return [local_of(parameter) for parameter in self._parameters] if self.is_sharded else self._parameters

    def update_squares(self, updates: list[Tensor | None]) -> Tensor:
        """Return the squares of this rank's updates, added over the ranks only where a limit needs the others.

        Where every rank that holds a part of a bin holds all of it, a bound on bins alone is decided where they lie.
        """
        alone = all(level == "bin" for level, _ in self.update_budgets) and not (
            self.update and self.update.state_dict()
        )
        whole = alone and getattr(self.kernel, "bins_are_local", False)
        squares: Tensor = self.kernel.squares_here(updates) if whole else self.kernel.squares(updates)
        return squares

    def of_one(self, t: int, plan: Plan, name: str) -> Planned:
        """Return tensor t under its own part of the plan, with budgets and history of its own."""
        one, owner, group = [self._parameters[t]], [self.owners[t]], [self.groups[t]]
        return Planned([name], one, owner, group, plan=plan, optimizer=self.rates.optimizer, **self._options)

    def over(self, tensors: list[Tensor], plan: Plan, at: list[int]) -> Planned:
        """Return plain tensors that stand for the parameters ``at``, under a plan of their own with budgets of bins.

        Rates are shared. The list is kept: an entry that is replaced in it is replaced here.
        """
        names, owners = [self.plan.layout.names[t] for t in at], [self.owners[t] for t in at]
        budgets = {"bin": tuple(budget for _, budget in self.gradient_budgets + self.update_budgets)}
        options = {**self._options, "budget": budgets, "process_group": None, "stages": None}
        groups = [self.groups[t] for t in at]
        made = Planned(names, tensors, owners, groups, plan=plan, optimizer=self.rates.optimizer, **options)
        made.rates.top = self.rates.top
        return made

    @property
    def reads_weights(self) -> bool:
        """Whether a step needs the norms of the weights."""
        return self.gradient.reads_weights or (self.update is not None and self.update.reads_weights)

    @cached_property
    def partition(self) -> str:
        """Sixteen hexadecimal digits that name the shapes and the bins, in this order, whatever the tensors' names."""
        digest = hashlib.sha256(repr(self.plan.layout.shapes).encode())
        for column in vars(self.plan.boxes).values():
            digest.update(np.ascontiguousarray(column, dtype="<i8").data)
        return digest.hexdigest()[:16]

    def state(self) -> dict[str, Any]:
        """Return what the next step depends on and no parameter holds."""
        return {
            "fingerprint": self.partition,
            "gradient": self.gradient.state_dict(),
            "update": {} if self.update is None else self.update.state_dict(),
            "top_lr": self.rates.state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take over a saved state; as in torch, names do not count, only shapes and bins.

        Raises:
            ValueError: the state of another plan or of other budgets.
        """
        call = "GSO.load_state_dict(…)"
        tops = check_state(state, ("fingerprint", "gradient", "update", "top_lr"), call=call)
        if state["fingerprint"] not in (self.partition, self.plan.fingerprint):  # with the names: an older version's
            raise ValueError(
                f"{call}: expected the state of plan {self.partition}, got that of plan "
                f"{state['fingerprint']}. Make GSO with "
                "the model and plan of the saved run."
            )
        self.gradient.load_state_dict(state["gradient"], call=call)
        if self.update is not None:
            self.update.load_state_dict(state["update"], call=call)
        self.rates.load(tops)


UPDATES: dict[str, tuple[str, str]] = {
    "numba": (".updates.numba_cpu", "FusedUpdate"),
    "triton": (".updates.triton_gpu", "TritonUpdate"),
    "reference": (".updates.reference", "ReferenceUpdate"),
}
"""Backend -> module and class; a backend without a row is updated by the reference."""


class Update(Protocol):
    """One step of a `Planned`'s parameters."""

    planned: Planned

    @property
    def decision(self) -> Decision | None:
        """The decision on the gradient of the last step."""

    def step(
        self,
        gradients: list[Tensor | None],
        states: list[dict[str, Any]],
        groups: list[dict[str, Any]],
        scaling: Scaling | None = None,
    ) -> None:
        """Update the parameters in place; see `ReferenceUpdate.step`."""


def make_update(planned: Planned, *, fused: bool | None = None) -> Update:
    """Import and make the update that belongs to the kernel of a `Planned`, around shards if there are any.

    Args:
        planned: what is updated.
        fused: True: only a compiled one will do; False: the reference; None: the kernel's own.

    Raises:
        RuntimeError: ``fused=True`` where the kernel has no compiled update; the words are torch's. On the meta device,
            where parameters wait for their memory, the step raises.
    """
    if planned.is_sharded:
        sharded = importlib.import_module(".updates.sharded", __package__)
        if sharded.can_update(planned):
            around: Update = sharded.ShardedUpdate(planned, partial(make_update, fused=fused))
            return around
    kernel = planned.kernel.name
    compiled = not planned.is_sharded and kernel in UPDATES and UPDATES[kernel] != UPDATES["reference"]
    if fused and not compiled and planned.kernel.device.type != "meta":
        raise RuntimeError(refusal_of_fused(planned))
    module, name = UPDATES[kernel if compiled and fused is not False else "reference"]
    made: Update = getattr(importlib.import_module(module, __package__), name)(planned)
    return made


def refusal_of_fused(planned: Planned) -> str:
    """Say why there is no compiled update."""
    return (
        "`fused=True` requires all the params to be floating point Tensors of supported devices: on the CPU, with the "
        "package numba, on CUDA with backend='triton', and for shards with limits of single bins; got backend "
        f"{planned.kernel.name!r} on {planned.kernel.device}. Use fused=None, which takes what there is."
    )


_CALL = "GSO"


def make_parts(
    optimizer: torch.optim.Optimizer,
    overrides: Sequence[Mapping[str, Any]],
    num_shared: int,
    options: Mapping[str, Any],
    *,
    one_tensor_each: bool,
) -> list[Update]:
    """Return the parts of all groups.

    Args:
        optimizer: whose groups these are.
        overrides: each group's own plan and budget.
        num_shared: groups given at construction; those without overrides share a part.
        options: the optimizer's, see `make_part`.
        one_tensor_each: a part a tensor, for updates inside backward.
    """
    shared = [i for i in range(num_shared) if not overrides[i]]
    parts = [make_part(optimizer, shared, options)] if shared else []
    for i in range(len(optimizer.param_groups)):
        if i not in shared:
            parts.append(make_part(optimizer, [i], {**options, **overrides[i]}))
    return [one for part in parts for one in _split(part)] if one_tensor_each else parts


def make_part(optimizer: torch.optim.Optimizer, groups: Sequence[int], options: Mapping[str, Any]) -> Update:
    """Return the update of some groups under one plan.

    Args:
        optimizer: read for learning rates at every step.
        groups: their positions.
        options: ``second_moment`` and ``fused`` as in `GSO`, the others as in `Planned`.

    Raises:
        ValueError: bins over several tensors with one second moment a bin; no compiled update with ``fused=True``.
    """
    names: list[str] = []
    owners: list[Tensor] = []
    positions: list[int] = []
    for i in groups:
        group = optimizer.param_groups[i]
        names += group.get("param_names") or [f"group{i}.param{j}" for j in range(len(group["params"]))]
        owners += group["params"]
        positions += [i] * len(group["params"])
    # torch lets groups repeat each other's names; a layout's are unique.
    seen = Counter(names)
    names = [f"group{i}.{name}" if seen[name] > 1 else name for i, name in zip(positions, names, strict=True)]
    more = dict(options)
    second_moment, fused = more.pop("second_moment"), more.pop("fused")
    one_device(list(zip(names, owners, strict=True)), call=_CALL)
    planned = Planned(names, [real(p) for p in owners], owners, positions, optimizer=optimizer, **more)
    if second_moment == "bin" and not planned.bins_in_one_tensor:
        raise ValueError(
            f"GSO(second_moment='bin'): expected bins inside one tensor each, got {planned.plan!r} with bins "
            "over several. Use a "
            "plan by rows or tensors, or second_moment='element'."
        )
    return make_update(planned, fused=fused)


def _split(part: Update) -> list[Update]:
    """One part a tensor, for updates that see one tensor at a time."""
    planned = part.planned
    check_budget(planned)
    return [
        make_update(planned.of_one(t, part_of(planned.plan, [t])[0], name))
        for t, name in enumerate(planned.plan.layout.names)
        if planned.plan.layout.numels[t]  # of the whole tensor: a rank without a piece still takes part
    ]


def real(tensor: Tensor) -> Tensor:
    """Return complex numbers as pairs of real ones, sharing memory; anything else as it is."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def new_moments(owner: Tensor, num_bins: int | None, *, capturable: bool) -> dict[str, Tensor]:
    """Return zeros for a parameter that has its first gradient.

    Args:
        owner: the parameter.
        num_bins: bins that share one second moment each; None: one an element.
        capturable: the counter lives beside the parameter; else on the CPU, where reading it waits for nothing.
    """
    state = {"step": torch.zeros((), dtype=torch.float32, device=owner.device if capturable else "cpu")}
    state["exp_avg"] = torch.zeros_like(owner, memory_format=torch.preserve_format)
    if num_bins is None:
        state["exp_avg_sq"] = torch.zeros_like(owner, memory_format=torch.preserve_format)
    else:
        state["bin_sq"] = torch.zeros(num_bins, dtype=torch.float32, device=owner.device)
    return state


def advance(states: Sequence[dict[str, Tensor]], found_inf: Tensor | None) -> None:
    """Count a step of every state, unless a GradScaler found an overflow; without waiting for its answer."""
    if found_inf is None:
        steps = [state["step"] for state in states]
        if not torch.compiler.is_compiling() and all(_is_number(step) for step in steps):
            for step in steps:  # torch's own way takes several times as long: each is an operator call
                ctypes.c_float.from_address(step.data_ptr()).value += 1.0
            torch.autograd.graph.increment_version(steps)
        elif steps:
            torch._foreach_add_(steps, 1)
        return
    for state in states:
        if state["step"].device != found_inf.device:
            state["step"] = state["step"].to(found_inf.device)
        state["step"] += (found_inf.reshape(()) <= 0).to(state["step"].dtype)


def _is_number(step: Tensor) -> bool:
    """Whether a counter is one float32 in the CPU's memory."""
    return type(step) is Tensor and step.is_cpu and step.dtype is torch.float32 and step.numel() == 1


def local_moments(state: dict[str, Tensor]) -> dict[str, Any]:
    """Return a parameter's state as real views of what this rank holds."""
    mean = state["exp_avg"]
    if type(mean) is Tensor and not mean.is_complex():  # nearly always: it is its own view
        return state
    return {k: local_of(real(v)) if k in ("exp_avg", "exp_avg_sq") else v for k, v in state.items()}


def local_gradient(owner: Tensor) -> Tensor | None:
    """Return a real view of what this rank holds of a parameter's gradient, if it has one.

    Raises:
        RuntimeError: a sparse gradient.
    """
    gradient = owner.grad
    if gradient is None:
        return None
    if type(gradient) is Tensor and gradient.layout is torch.strided and not gradient.is_complex():  # nearly always
        return gradient
    if gradient.is_sparse:
        raise RuntimeError(
            f"GSO does not support sparse gradients, got one of shape {tuple(owner.shape)}. Make the embedding with "
            "sparse=False, or put GradientSplitter in front of SparseAdam."
        )
    local: Tensor = local_of(real(gradient))
    return local


def make_moments(optimizer: torch.optim.Optimizer, part: Update, waiting: Sequence[bool], second_moment: str) -> None:
    """Make the moments of every parameter that has its first gradient and is not waiting.

    Raises:
        RuntimeError: a sparse gradient; nothing has been made then.
    """
    planned = part.planned
    new = [
        t
        for t, owner in enumerate(planned.owners)
        if owner.grad is not None and not waiting[t] and not optimizer.state.get(owner)
    ]
    for t in new:
        local_gradient(planned.owners[t])
    for t in new:
        num_bins = len(planned.bins_of_tensor[t]) if second_moment == "bin" else None
        capturable = optimizer.param_groups[planned.groups[t]]["capturable"]
        optimizer.state[planned.owners[t]].update(new_moments(planned.owners[t], num_bins, capturable=capturable))


def step_part(
    optimizer: torch.optim.Optimizer, part: Update, waiting: Sequence[bool], scaling: Scaling | None, *, alone: bool
) -> None:
    """Update one part, all but its waiting tensors.

    Args:
        optimizer: whose states and groups these are.
        part: what is updated.
        waiting: one a tensor.
        scaling: what a GradScaler says of the gradients.
        alone: no other rank takes part in this step.

    Raises:
        RuntimeError: a sparse gradient, or ``fused=True`` without memory to walk.
    """
    planned = part.planned
    gradients = [None if waiting[t] else local_gradient(owner) for t, owner in enumerate(planned.owners)]
    # Where ranks hold shards, one without gradients takes part all the same, or the others would wait for it.
    if alone and all(gradient is None for gradient in gradients):
        return
    groups = [optimizer.param_groups[i] for i in planned.groups]
    if planned.kernel.device.type == "meta" and any(group["fused"] for group in groups):
        raise RuntimeError(refusal_of_fused(planned))
    own = [
        {} if gradient is None else optimizer.state[owner]
        for owner, gradient in zip(planned.owners, gradients, strict=True)
    ]
    advance([state for state in own if state], None if scaling is None else scaling.found_inf)
    states: list[dict[str, Any]] = [local_moments(state) if state else state for state in own]
    part.step(gradients, states, groups, scaling)


def check_budget(planned: Planned) -> None:
    """Refuse budgets that need other tensors' gradients of the same step.

    Raises:
        ValueError: a limit above the tensors, or a bin over several tensors.
    """
    above = [
        (level, b) for level, b in planned.gradient_budgets + planned.update_budgets if level in ("root", "module")
    ]
    if above:
        level, budget = above[0]
        raise ValueError(
            f"GSO(in_backward=True): expected budgets of bins or tensors, got {budget!r} at level {level!r}, which "
            "needs the gradients of all its tensors at once; here each is freed before the next is there. Use "
            "in_backward=False, or a budget per bin."
        )
    if not planned.bins_in_one_tensor:
        raise ValueError(
            f"GSO(in_backward=True): expected bins inside one tensor each, got {planned.plan!r} with bins over several."
            " Use a plan by rows or tensors, or in_backward=False."
        )
