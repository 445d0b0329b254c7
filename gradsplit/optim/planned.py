"""Planned: parameters that share one plan, with the two ledgers that bound their gradient and their update."""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..budget import budgets_by_level, make_ledger
from ..distributed import adder, kernel_for, local_of
from ..kernels import make_kernel
from ..plan import Layout, Plan, make_plan
from ..rates import Rates
from ..saved_state import check_state

__all__ = ["Planned"]


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
