"""Planned: parameters that share one plan, with the two ledgers that bound their gradient and their update."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..budget import Ledger, budgets_by_level
from ..kernels import make_kernel
from ..plan import Layout, make_plan
from ..rates import Rates

__all__ = ["Planned"]


class Planned:
    """Parameters of one optimizer under one plan.

    Args:
        names: one a parameter.
        parameters: on one device; complex ones already as real views.
        owners: the parameters as the optimizer holds them, for their learning rates.
        plan, budget, rule, backend: as in `GSO`.
        optimizer: read for learning rates at every step.
    """

    def __init__(
        self,
        names: list[str],
        parameters: list[Tensor],
        owners: list[Tensor],
        *,
        plan: Any,
        budget: Any,
        rule: str,
        backend: str,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self.parameters, self.owners = parameters, owners
        layout = Layout(tuple(names), tuple(tuple(int(s) for s in p.shape) for p in parameters))
        self.plan = make_plan(plan, layout, call="GSO")
        budgets = budgets_by_level(budget, self.plan, call="GSO")
        self.kernel = make_kernel(backend, self.plan, parameters[0].device, call="GSO")
        like = self.kernel.squares([None] * len(parameters))
        of_gradient = [pair for pair in budgets if not pair[1].bounds_update]
        of_update = [pair for pair in budgets if pair[1].bounds_update]
        self.gradient_budgets, self.update_budgets = of_gradient, of_update
        self.gradient = Ledger(self.plan, of_gradient, like, rule=rule, call="GSO")
        self.update = Ledger(self.plan, of_update, like, rule=rule, call="GSO") if of_update else None
        self.rates = Rates(self.plan, owners, optimizer, call="GSO")
        # Where each tensor's bins lie in vectors over all bins; defined where every bin lies in one tensor.
        bounds = self.plan.boxes.slices_T(len(layout))
        self.bins_of_tensor = [np.unique(self.plan.bin_K[bounds[t] : bounds[t + 1]]) for t in range(len(layout))]
        self.bins_in_one_tensor = sum(len(bins) for bins in self.bins_of_tensor) == self.plan.num_bins

    @property
    def reads_weights(self) -> bool:
        """Whether a step needs the norms of the weights."""
        return self.gradient.reads_weights or (self.update is not None and self.update.reads_weights)

    def state(self) -> dict[str, Any]:
        """Return what the next step depends on and no parameter holds."""
        return {
            "fingerprint": self.plan.fingerprint,
            "gradient": self.gradient.state_dict(),
            "update": {} if self.update is None else self.update.state_dict(),
            "top_lr": self.rates.state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take over a saved state.

        Raises:
            ValueError: the state of another plan or of other budgets.
        """
        call = "GSO.load_state_dict(…)"
        if state["fingerprint"] != self.plan.fingerprint:
            raise ValueError(
                f"{call}: expected the state of plan {self.plan.fingerprint}, got that of plan "
                f"{state['fingerprint']}. Make GSO with "
                "the model and plan of the saved run."
            )
        self.gradient.load_state_dict(state["gradient"], call=call)
        if self.update is not None:
            self.update.load_state_dict(state["update"], call=call)
        self.rates.load(state["top_lr"])
