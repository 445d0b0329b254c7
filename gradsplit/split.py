"""Split: tensors under one plan. GradientSplitter, GSO and the limits of modules are all made of it.

gradients -> squares_B -> limits_N -> Decision(scale_B, outcome_B) -> scaled gradients

There are three ways from the first to the last, with the same result. The plain way takes these steps one by one. On a
GPU, programs take them in a few launches. On a CPU, where every limit needs its own bin alone, a bin is scaled while it
is still in cache. The two fast ways work out the decision as a whole only when somebody looks at it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .amp import Scaling, with_cpu_default
from .budget import Budget, Decision, Ledger, StagedLedger, budgets_by_level, make_ledger
from .budget.lines import line_table, lines_of
from .collective import COLLECTIVE, ENOUGH, Recent
from .distributed import adder, check_group, in_form, local_of, make_kernel
from .kernels.addressable import refuse_expanded
from .optimizers import calls_closure_often, follows_gradient
from .plan import Plan
from .programs import Programs
from .rates import Rates
from .records import BinReport, DeferredDecision, ShareRecord, StepRecord, checked_sinks, gradients_of, plain_of

__all__ = [
    "BinReport",
    "DeferredDecision",
    "ShareRecord",
    "Split",
    "StepRecord",
    "check_state",
    "checked_sinks",
    "described",
    "gradients_of",
]


_DAMAGED = "The state is damaged: load another, or start without one."


def check_state(state: Any, keys: Iterable[str], *, call: str) -> list[float]:
    """Refuse a mapping without the keys, counts that are none and learning rates that are none.

    Args:
        state: what should have come from ``state_dict()``.
        keys: that must be in it; "step_count" and "top_lr" are looked at.
        call: the caller's name, for errors.

    Returns:
        The largest learning rates; none where the state holds none.

    Raises:
        ValueError: something else.

    >>> check_state({"step_count": 3, "top_lr": [0.1]}, ["step_count", "top_lr"], call="f")
    [0.1]
    """
    missing = sorted(set(keys) - set(state)) if isinstance(state, Mapping) else list(keys)
    if missing:
        what = "a mapping" if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(
            f"{call}: expected what state_dict() returned, got {what} without {missing}. Save and load it unchanged."
        )
    count = state.get("step_count", 0)
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise ValueError(f"{call}: expected a count of steps, got step_count={count!r}. {_DAMAGED}")
    tops = state.get("top_lr", [])
    if not isinstance(tops, (list, tuple)) or not all(isinstance(top, float) and 0 < top < math.inf for top in tops):
        raise ValueError(f"{call}: expected learning rates > 0, got top_lr={tops!r:.80}. {_DAMAGED}")
    return list(tops)


class Split:
    """Tensors under one plan: how they are measured, what bounds them, and what is remembered between steps.

    `GradientSplitter` holds one, `GSO` one per part of its parameters, the chain one over a model's modules.

    Args:
        plan: B bins over the tensors.
        tensors: one per entry of the layout, on one device; complex ones as real views, sharded ones whole.
        budget: a budget, its name, a tuple of them, or a mapping from levels to these.
        rule: "bottom_up" or "nearest", see `project`.
        backend: "auto", or a row of `gradsplit.kernels.BACKENDS`.
        process_group: the ranks that hold the tensors; None: all.
        stages: the group of the pipeline stages; None: a limit at the root bounds what these ranks hold.
        caps_updates: budgets that bound the update act on the update itself, through the ledger ``update``; else they
            become limits on the gradient, as is right in front of SGD.
        collective: divide the whole gradient where all bins are scaled together, see `gradsplit.collective`.
        owners: the tensors as the optimizer holds them, from which learning rates are read; None: the same tensors.
        call: the caller's name, for errors.

    Attributes:
        tensors, owners: as given.
        kernel: reads and scales the bins.
        gradient: the ledger of the budgets that act on gradients.
        update: the ledger of the budgets that act on updates, or None.
        recent: the recent norms of the collective rule, or None.
        gradient_budgets, update_budgets: their (level, budget) pairs.
        rates: the optimizer's rates per bin, or None before `read_rates`.
        local_plan: what this rank holds of the plan; the plan itself where nothing is sharded.
        bins_of_tensor: each tensor's bins, in order.

    Raises:
        ValueError: an unknown budget, level, rule or backend; no group of ranks; shards of no whole copies.
    """

    def __init__(
        self,
        plan: Plan,
        tensors: list[Tensor],
        budget: Any,
        *,
        rule: str = "bottom_up",
        backend: str = "auto",
        process_group: dist.ProcessGroup | None = None,
        stages: dist.ProcessGroup | None = None,
        caps_updates: bool = False,
        collective: bool = False,
        owners: list[Tensor] | None = None,
        call: str,
    ) -> None:
        self.plan, self.call, self.tensors = plan, call, tensors
        self.owners = tensors if owners is None else owners
        self._shapes = [owner.shape for owner in self.owners]
        self._options: dict[str, Any] = {"rule": rule, "backend": backend, "caps_updates": caps_updates, "call": call}
        self._budget = budget
        self._ranks: dict[str, Any] = {"process_group": process_group, "stages": stages}
        for option, group in self._ranks.items():
            check_group(group, option=option, call=call)
        pairs = budgets_by_level(budget, plan, call=call)
        of_update = [pair for pair in pairs if pair[1].bounds_update and caps_updates]
        self.gradient_budgets, self.update_budgets = [pair for pair in pairs if pair not in of_update], of_update
        self.kernel = make_kernel(plan, tensors, backend, process_group, call=call)
        self.local_plan = self.kernel.local_plan
        self.like = self.kernel.squares([None] * len(tensors))
        self.gradient = self._ledger(self.gradient_budgets)
        self.update = self._ledger(of_update) if of_update else None
        self.recent = Recent(self.like) if collective else None
        self.rates: Rates | None = None
        self._tops: list[float] = []  # the largest rates of a state that was loaded before there was an optimizer
        self._lines = lines_of(self.gradient_budgets)
        bounds = plan.boxes.slices_T(len(plan.layout))
        self.bins_of_tensor = [np.unique(plan.bin_K[bounds[t] : bounds[t + 1]]) for t in range(len(plan.layout))]
        self._bin_of_tensor = plan.bin_K[np.minimum(bounds[:-1], len(plan.bin_K) - 1)]

    def _ledger(self, budgets: list[tuple[str, Budget]]) -> Ledger | StagedLedger:
        add = adder(self._ranks["stages"])
        return make_ledger(self.plan, budgets, self.like, rule=self._options["rule"], call=self.call, add=add)

    @cached_property
    def programs(self) -> Programs | None:
        """What decides in a few launches, where the kernel has programs; making it may wait for the device."""
        return Programs.of(self.kernel, self.gradient, self.recent, self.like)

    @property
    def is_sharded(self) -> bool:
        """Whether ranks hold parts of the tensors."""
        return self.local_plan is not self.plan

    @property
    def needs_others(self) -> bool:
        """Whether other ranks take part in every step, whatever gradients there are on this one."""
        return self.is_sharded or self._ranks["stages"] is not None

    @property
    def parameters(self) -> list[Tensor]:
        """The tensors as this rank holds them, in the forms of the plan's layout, sharing memory."""
        if not self.is_sharded:
            return self.tensors
        forms = self.local_plan.layout.shapes
        return [in_form(local_of(tensor), form) for tensor, form in zip(self.tensors, forms, strict=True)]

    @property
    def bins_in_one_tensor(self) -> bool:
        """Whether every bin lies in one tensor."""
        return sum(len(bins) for bins in self.bins_of_tensor) == self.plan.num_bins

    @property
    def needs_rates(self) -> bool:
        """Whether a budget needs the learning rates."""
        return any(budget.bounds_update for _, budget in (*self.gradient_budgets, *self.update_budgets))

    @property
    def reads_weights(self) -> bool:
        """Whether a step needs the norms of the weights."""
        return self.gradient.reads_weights or (self.update is not None and self.update.reads_weights)

    def read_rates(self, optimizer: torch.optim.Optimizer, *, in_groups: bool = False, anew: bool = False) -> None:
        """Read the learning rates of an optimizer from now on; the largest rates of a loaded state stay.

        Args:
            optimizer: whose groups hold the tensors.
            in_groups: see `Rates`.
            anew: its groups are no longer what they were.

        Raises:
            ValueError: an optimizer that does not hold one of the tensors.
        """
        if anew or self.rates is None or self.rates.optimizer is not optimizer:
            self.rates = Rates(self.plan, self.owners, optimizer, call=self.call, in_groups=in_groups)
            if self._tops:
                self.rates.load(self._tops)

    def check_shapes(self, *, call: str) -> None:
        """Refuse gradients of another shape, before compiled code reads memory that is not theirs.

        Raises:
            ValueError: a parameter was given other data since its bins were made.
        """
        if torch.compiler.is_compiling():
            return
        shapes = [owner.shape if owner.grad is None else owner.grad.shape for owner in self.owners]
        if shapes != self._shapes:
            t = next(t for t, shape in enumerate(shapes) if shape != self._shapes[t])
            raise ValueError(
                f"{call}: expected a gradient of shape {tuple(self._shapes[t])} at {self.plan.layout.names[t]!r}, as "
                f"the parameter had when its bins were made, got {tuple(shapes[t])}. Make a new {self.call} after a "
                "parameter changes its shape."
            )

    def pace_B(self) -> Tensor:
        """Return the learning rate now / the largest so far, (B,); after `read_rates`."""
        assert self.rates is not None
        return self.rates.pace_B(self.plan.num_bins)

    def tops(self) -> list[float]:
        """Return the largest learning rate of each group so far."""
        return self._tops if self.rates is None else self.rates.state()

    def load_tops(self, tops: list[float]) -> None:
        """Take over the largest learning rates of a saved run."""
        self._tops = tops
        if self.rates is not None:
            self.rates.load(tops)

    def measure(self, gradients: list[Tensor | None]) -> tuple[Tensor, Tensor | None]:
        """Return the bins' squares (B,) of gradients, and of the weights where a budget of gradients reads them."""
        reads: list[list[Tensor | None]] = [gradients]
        if self.gradient.reads_weights:
            reads.append([*self.parameters])
        squares_B, *weights_B = map(plain_of, self.kernel.squares_many(reads))
        return squares_B, weights_B[0] if weights_B else None

    @with_cpu_default
    def bound_(
        self,
        gradients: list[Tensor | None],
        check: Callable[[Tensor], None] | None = None,
        scaling: Scaling | None = None,
        held: Decision | None = None,
    ) -> tuple[Tensor, Decision]:
        """Bound gradients in place; return the squares (B,) as measured, and the decision.

        Args:
            gradients: one per tensor of the plan.
            check: called with all squares before the first bin is scaled.
            scaling: what a GradScaler says of the gradients. Limits then hold in unscaled units. On an overflow, which
                the scaler sees and answers, gradients and history are left as they are.
            held: the decision made earlier in the same step of the optimizer, whose scales hold here too.

        Raises:
            torch.cuda.OutOfMemoryError: the device has no memory left; weights and histories are as before.
            RuntimeError: an expanded gradient, whose entries cannot be scaled one by one; names the tensor.
        """
        if torch.compiler.is_compiling() or not isinstance(self.gradient, Ledger):
            return self._bound_(gradients, check, scaling, held)
        recent = self.recent
        before = self.gradient.history, None if recent is None else (recent.recent_B, recent.steps)
        try:
            return self._bound_(gradients, check, scaling, held)
        except torch.cuda.OutOfMemoryError as error:
            self.gradient.history = before[0]
            if recent is not None and before[1] is not None:
                recent.recent_B, recent.steps = before[1]
            raise torch.cuda.OutOfMemoryError(
                f"{self.call}.step(): expected memory for the bins' numbers on {self.like.device}, got none ({error}). "
                "Weights and histories are as before the step, and gradients may be bounded in part. Free memory, then "
                "run backward() and step() again."
            ) from error
        except RuntimeError as error:
            refuse_expanded(error, self.plan.layout.names, gradients, call=f"{self.call}.step()")
            raise

    def _bound_(
        self,
        gradients: list[Tensor | None],
        check: Callable[[Tensor], None] | None,
        scaling: Scaling | None,
        held: Decision | None,
    ) -> tuple[Tensor, Decision]:
        """See `bound_`; the two fast ways decide the same as the plain one at the end."""
        if held is not None:
            return self._bound_again_(gradients, held)
        pace_B, reach_B = self._rates_now()
        if scaling is not None:
            return self._bound_scaled_(gradients, scaling, pace_B, reach_B)
        if not torch.compiler.is_compiling():
            if self.programs is not None:
                return self._by_programs(gradients, check, pace_B, reach_B)
            if check is None and self.recent is None and self._lines is not None and self.kernel.bounds_while_reading:
                done = self._bin_by_bin(gradients, pace_B, reach_B)
                if done is not None:
                    return done
        squares_B, weight_squares_B = self.measure(gradients)
        if check is not None:
            check(squares_B)
        decision = self._decide(squares_B, weight_squares_B, pace_B, reach_B)
        self.kernel.scale_(gradients, decision.scale_B, ~decision.finite_B)
        return squares_B, decision

    def _rates_now(self) -> tuple[Tensor | None, Tensor | None]:
        """What budgets of gradients read of the learning rates: pace and reach, (B,); None where none reads them."""
        if self.rates is None or not self.needs_rates or self.update is not None:
            return None, None
        return self.rates.pace_B(self.plan.num_bins), self.rates.reach_B(self.plan.num_bins)

    def _bound_again_(self, gradients: list[Tensor | None], held: Decision) -> tuple[Tensor, Decision]:
        """Apply the scales of an earlier call of the closure; only what is not finite now is decided anew."""
        squares_B = plain_of(self.kernel.squares(gradients))
        finite_B = squares_B.isfinite()
        scale_B = torch.where(finite_B, held.scale_B, 0.0)
        norm_B = torch.where(finite_B, squares_B, 0.0).sqrt()
        self.kernel.scale_(gradients, scale_B, ~finite_B)
        return squares_B, Decision(self.plan, norm_B, finite_B, scale_B, held.limits)

    def _bound_scaled_(
        self, gradients: list[Tensor | None], scaling: Scaling, pace_B: Tensor | None, reach_B: Tensor | None
    ) -> tuple[Tensor, Decision]:
        """Bound gradients that may still carry a GradScaler's scale; on an overflow leave them as they are.

        A bin that is not finite teaches a history nothing. So on an overflow the ledger is shown that all bins are not
        finite, and no history changes.
        """
        scaled_squares_B, weight_squares_B = self.measure(gradients)
        squares_B = scaling.unscaled_squares(scaled_squares_B)
        overflow, finite_B = scaling.overflow(squares_B), squares_B.isfinite()
        made = self._decide(torch.where(overflow, torch.inf, squares_B), weight_squares_B, pace_B, reach_B)
        norm_B = torch.where(finite_B, squares_B, 0.0).sqrt()
        scale_B = torch.where(overflow, 1.0, made.scale_B)
        self.kernel.scale_(gradients, scale_B, ~(finite_B | overflow))
        return squares_B, Decision(self.plan, norm_B, finite_B, scale_B, made.limits)

    def _decide(
        self, squares_B: Tensor, weight_squares_B: Tensor | None, pace_B: Tensor | None, reach_B: Tensor | None
    ) -> Decision:
        """Return the budgets' decision, after the collective rule has divided a batch that is scaled as a whole."""
        if self.recent is None:
            return self.gradient.decide(squares_B, weight_squares_B, pace_B, reach_B)
        factor = self.recent.factor(squares_B)
        made = self.gradient.decide(squares_B * factor.square(), weight_squares_B, pace_B, reach_B)
        return Decision(made.plan, made.norm_B / factor, made.finite_B, made.scale_B * factor, made.limits)

    def _by_programs(
        self,
        gradients: list[Tensor | None],
        check: Callable[[Tensor], None] | None,
        pace_B: Tensor | None,
        reach_B: Tensor | None,
    ) -> tuple[Tensor, Decision]:
        """Bound in a few launches of programs; the decision as a whole is worked out when it is looked at."""
        assert self.programs is not None
        squares_B, weight_squares_B = self.measure(gradients)
        if check is not None:
            check(squares_B)
        step = self.programs.decide(squares_B, weight_squares_B, pace_B, reach_B)
        self.kernel.scale_(gradients, step.scale_B, step.zero_B)
        step.remember()
        return squares_B, DeferredDecision(self.plan, step.worked_out)

    def _bin_by_bin(
        self, gradients: list[Tensor | None], pace_B: Tensor | None, reach_B: Tensor | None
    ) -> tuple[Tensor, Decision] | None:
        """Bound each bin while it is in cache; return None, with nothing done, where the kernel cannot do so."""
        assert self._lines is not None
        times_T = None
        if pace_B is not None and reach_B is not None:
            times_T = pace_B.numpy()[self._bin_of_tensor] / reach_B.numpy()[self._bin_of_tensor]
        table = line_table(self._lines, self.plan.width_T, times_T)
        measured = self.kernel.bound_(gradients, self.parameters if self.gradient.reads_weights else None, table)
        if measured is None:
            return None
        squares_B, weight_squares_B = measured

        def decide() -> Decision:
            with torch.no_grad():
                return self.gradient.decide(squares_B, weight_squares_B, pace_B, reach_B)

        return squares_B, DeferredDecision(self.plan, decide)

    @cached_property
    def updates_stand_alone(self) -> bool:
        """Whether a limit on the update of a bin needs nothing but the bin."""
        alone = all(level == "bin" for level, _ in self.update_budgets)
        return alone and not (self.update is not None and self.update.state_dict())

    def update_squares(self, updates: list[Tensor | None]) -> Tensor:
        """Return the squares of this rank's updates, added over the ranks only where a limit needs the others.

        Where every rank that holds a part of a bin holds all of it, a bound on bins alone is decided where they lie.
        """
        whole = self.is_sharded and self.updates_stand_alone and self.kernel.bins_are_local
        return self.kernel.squares_here(updates) if whole else self.kernel.squares(updates)

    def copies_of_tensors(self) -> list[float]:
        """Return on how many ranks each element of a tensor lies; every rank has to ask."""
        if not self.is_sharded:
            return [1.0] * len(self.tensors)
        held_T = torch.tensor([p.numel() for p in self.parameters], dtype=self.like.dtype, device=self.like.device)
        held = self.kernel.add_(held_T).tolist()
        return [max(1.0, round(h / max(1, n))) for h, n in zip(held, self.plan.layout.numels, strict=True)]

    def of_one(self, t: int, plan: Plan) -> Split:
        """Return tensor t under its own part of the plan, with budgets and history of its own."""
        made = Split(plan, [self.tensors[t]], self._budget, owners=[self.owners[t]], **self._options, **self._ranks)
        if self.rates is not None:
            made.read_rates(self.rates.optimizer)
        return made

    def over(self, tensors: list[Tensor], plan: Plan, at: list[int]) -> Split:
        """Return plain tensors that stand for the tensors ``at``, under a plan of their own with budgets of bins.

        Rates are shared. The list is kept: an entry that is replaced in it is replaced here.
        """
        budgets = {"bin": tuple(budget for _, budget in self.gradient_budgets + self.update_budgets)}
        made = Split(plan, tensors, budgets, owners=[self.owners[t] for t in at], **self._options)
        if self.rates is not None:
            made.read_rates(self.rates.optimizer)
            assert made.rates is not None
            made.rates.top = self.rates.top
        return made

    @cached_property
    def partition(self) -> str:
        """Sixteen hexadecimal digits that name the shapes and the bins, in this order, whatever the tensors' names."""
        digest = hashlib.sha256(repr(self.plan.layout.shapes).encode())
        for column in vars(self.plan.boxes).values():
            digest.update(np.ascontiguousarray(column, dtype="<i8").data)
        return digest.hexdigest()[:16]

    def state(self) -> dict[str, Any]:
        """Return what the next step depends on and no tensor holds."""
        return {
            "fingerprint": self.partition,
            "gradient": self.gradient.state_dict(),
            "update": {} if self.update is None else self.update.state_dict(),
            "top_lr": self.tops(),
        }

    def load(self, state: dict[str, Any], *, call: str) -> None:
        """Take over a saved state; as in torch, names do not count, only shapes and bins.

        Raises:
            ValueError: the state of another plan or of other budgets.
        """
        tops = check_state(state, ("fingerprint", "gradient", "update", "top_lr"), call=call)
        if state["fingerprint"] not in (self.partition, self.plan.fingerprint):  # with the names: an older version's
            raise ValueError(
                f"{call}: expected the state of plan {self.partition}, got that of plan {state['fingerprint']}. Make "
                f"{self.call} with the model and plan of the saved run."
            )
        self.gradient.load_state_dict(state["gradient"], call=call)
        if self.update is not None:
            self.update.load_state_dict(state["update"], call=call)
        self.load_tops(tops)


def described(split: Split, optimizer: torch.optim.Optimizer | None, *, caps: bool) -> str:
    """See `GradientSplitter.describe`."""
    name = "an optimizer" if optimizer is None else type(optimizer).__name__
    said = []
    for place, pairs in (("In front of", split.gradient_budgets), ("Behind", split.update_budgets)):
        for level, budget in pairs:
            if budget.constant() == math.inf:
                said.append(f"{place} {name}, nothing finite is bounded.")
            else:
                nodes = f"{len(split.plan.level_nodes(level))} {level}{'s' if level != 'root' else ''}"
                said.append(f"{place} {name}, each of {nodes} keeps within {budget!r}.")
    if split.recent is not None:
        said.append(
            f"Where the median bin is more than {COLLECTIVE:g} times its recent norm, the whole gradient is divided by "
            "that ratio."
            + (f" That needs {ENOUGH} bins, so it never happens here." if split.plan.num_bins < ENOUGH else "")
        )
    if caps:
        said.append(f"This bounds the step after {name} has made it, whatever its rule.")
    elif optimizer is not None and follows_gradient(optimizer):
        said.append(f"The step of {name} follows the gradient, so this bounds the step itself.")
        if any(group.get("weight_decay") for group in optimizer.param_groups):
            said.append("Weight decay is added to it.")
    elif optimizer is not None and calls_closure_often(optimizer):
        said.append(f"{name} compares the gradients of a step, so the first call of the closure decides for all.")
    elif optimizer is not None and getattr(optimizer, "bounds_gradients", False):
        said.append(f"{name} bounds gradients itself, so they are bounded twice: without this, its budget= alone acts.")
    elif optimizer is not None:
        said.append(f"{name} rescales gradients, so this keeps faults out of its memory and does not bound the step.")
    return " ".join([*said, "A bin that is not finite becomes zero."])
