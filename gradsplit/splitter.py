"""GradientSplitter: measure, decide, apply, record, once an optimizer step."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .amp import Scaling, Unscaled, with_cpu_default
from .budget import DEFAULT_OF_SPLITTER, Decision, Ledger, RelativeStep, StagedLedger
from .distributed import local_of, whole_of
from .hooks import Bypassed, Handle, Place, Turn, Unseen, attach_to, not_traced, runs_hooks, users_level
from .kernels import Kernel
from .optimizers import (
    calls_closure_often,
    optimizer_of,
    refuse_misfit,
    usual_bounds,
    warn_of_old_momentum,
    warn_of_own_bounds,
)
from .plan import STRATEGIES, Layout, Plan, layout_of, make_plan, named_trainable, one_device
from .rates import Members, Thawed, refuse_endless
from .records import StepRecord, plain_of
from .split import Split, check_state, checked_sinks, described, gradients_of
from .update_cap import STEPS, UpdateCap

__all__ = ["GradientSplitter"]


COPIED = (
    "copy or pickle of a GradientSplitter: expected its state_dict(), got the object, which stands at one model and "
    "one optimizer. Make a splitter for the copied model, then call load_state_dict(splitter.state_dict())."
)
CALL_ME = (
    "Write splitter.step() between backward() and optimizer.step(), or splitter.attach(optimizer) once after making it."
)


def check_options(model: Any, on_nonfinite: str, step: str, cap_updates: bool, collective: bool | None) -> None:
    """Refuse an optimizer in the model's place, and words that are none of the choices.

    Raises:
        TypeError: an optimizer where the model belongs.
        ValueError: another word, or a share of a step that is not looked at.
    """
    if isinstance(model, torch.optim.Optimizer):
        raise TypeError(
            f"GradientSplitter({type(model).__name__}): expected a model or pairs (name, parameter) first, got an "
            "optimizer. Write GradientSplitter(model, optimizer=optimizer)."
        )
    if on_nonfinite not in ("zero", "raise"):
        raise ValueError(f"GradientSplitter(on_nonfinite={on_nonfinite!r}): expected 'zero' or 'raise'.")
    if collective not in (True, False, None):
        raise ValueError(
            f"GradientSplitter(collective={collective!r}): expected True, False or None. None takes what fits the "
            "optimizer."
        )
    if step not in STEPS or (step != "cap" and not cap_updates):
        raise ValueError(
            f"GradientSplitter(step={step!r}, cap_updates={cap_updates!r}): expected 'cap', or 'share' with "
            "cap_updates=True, since a step has a length only after the optimizer has made it."
        )


class GradientSplitter:
    """Bound each bin of a model's gradient by a budget of its own, in place, between ``backward()`` and ``step()``.

    gradients -> squares_B -> limits_N -> Decision(scale_B, outcome_B) -> scaled gradients -> StepRecord

    A bin within its limit keeps its gradient bit for bit. A bin that is not finite is set to zero and named. A bin's
    decision does not depend on other bins, unless a budget bounds a node above them. Nothing waits for the device.

    Args:
        model: a module, or pairs (name, parameter). Its trainable parameters are bounded.
        plan: a Plan, a strategy's name ("xsp", "lbf", "tree_sp", "per_tensor", "whole") or a function layout -> plan.
        budget: a budget, its name, a tuple of them, or a mapping from levels ("root", "module", "tensor", "bin") to
            these. None takes what fits the optimizer, and `describe` says what that is. In front of SGD it is
            ``RelativeStep(0.03, length=1.0)``, in front of others ``Relative(1.0)`` with the collective rule. In front
            of LBFGS it only zeroes bins that are not finite. With ``cap_updates`` it is ``RelativeStep(0.03)``.
        optimizer: the optimizer whose step follows; `attach` sets it too. For a wrapper of an optimizer (of accelerate,
            Lightning, schedule-free), the optimizer inside is taken.
        backend: "auto", or a row of `gradsplit.kernels.BACKENDS`.
        rule: "bottom_up" or "nearest", see `project`.
        on_nonfinite: "zero" sets a non-finite bin to zero; "raise" raises instead, which waits for the device.
        cap_updates: bound the update that the optimizer has made, by `RelativeStep`. This works behind any optimizer
            and costs one copy of the weights. If ``optimizer`` is given, the splitter attaches itself.
        step: with ``cap_updates``: "cap" lets a bin move by at most its limit, "share" by exactly its limit.
        collective: divide the whole gradient where a batch scales all bins together, see `gradsplit.collective`. None:
            only with the default budget in front of an optimizer other than SGD.
        process_group: the ranks that hold the parameters, where these are sharded (FSDP2, tensor parallel). None: all
            ranks. A step takes one all-reduce, and none where nothing is sharded.
        stages: a group with one rank of every pipeline stage, this one among them. A limit at "root" then bounds the
            gradient of all stages together, by one more all-reduce of six numbers. None: it bounds what these ranks
            hold.
        sinks: functions called with every StepRecord.

    Raises:
        ValueError: no trainable parameters, several devices, an unknown name, a plan of another model, RelativeStep in
            front of an optimizer whose step it cannot bound, a cap behind an optimizer that must not be capped.
        TypeError: something else in the place of the optimizer.

    Warns:
        UserWarning: the optimizer updates parameters that the model does not hold.

    >>> model = nn.Linear(2, 2, bias=False)
    >>> splitter = GradientSplitter(model, plan="xsp", budget={"bin": "fixed"})       # rows, each at most 1 long
    >>> model.weight.grad = torch.tensor([[30.0, 40.0], [0.3, 0.4]])
    >>> record = splitter.step()
    >>> model.weight.grad
    tensor([[0.6000, 0.8000],
            [0.3000, 0.4000]])
    >>> record.worst(1)[0].name
    'weight[0:1]'
    """

    def __init__(
        self,
        model: nn.Module | Iterable[tuple[str, Tensor]],
        plan: Plan | str | Callable[[Layout], Plan] = "xsp",
        budget: Any = None,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        backend: str = "auto",
        rule: str = "bottom_up",
        on_nonfinite: str = "zero",
        cap_updates: bool = False,
        step: str = "cap",
        collective: bool | None = None,
        process_group: Any = None,
        stages: Any = None,
        sinks: Iterable[Callable[[StepRecord], None]] = (),
    ) -> None:
        check_options(model, on_nonfinite, step, cap_updates, collective)
        pairs = named_trainable(model, call="GradientSplitter")
        self.parameters: list[Tensor] = [parameter for _, parameter in pairs]
        self.device = one_device(pairs, call="GradientSplitter")
        self.layout, self._thawed = layout_of(pairs), Thawed(model)
        self.backend, self.rule, self.on_nonfinite = backend, rule, on_nonfinite
        self.process_group, self.stages = process_group, stages
        self.sinks = checked_sinks(sinks, call="GradientSplitter")
        self.step_count = 0
        self._strategy, self._after_updates, self._step = plan, cap_updates, step
        self._chooses, self._collective = budget is None, collective
        usual = RelativeStep() if cap_updates else DEFAULT_OF_SPLITTER
        self._budget, self._is_collective = (usual if budget is None else budget), bool(collective)
        self._all_named = isinstance(model, nn.Module)
        self.optimizer: torch.optim.Optimizer | None = None
        self._members: Members | None = None
        self._turn = Turn()
        self._handle: Handle | None = None
        self._unseen: Unseen | None = None
        self._bypassed: Bypassed | None = None
        self._unscaled: Unscaled | None = None
        self._adopt(make_plan(plan, self.layout, call="GradientSplitter"))
        if optimizer is not None:
            inner = self._stand_by(optimizer)
            if cap_updates or calls_closure_often(inner):
                self._handle = self.attach(optimizer)
            elif runs_hooks(inner):
                self._unseen = Unseen(inner, self, call="GradientSplitter", remedy=CALL_ME)
                self._unscaled = Unscaled(inner, _warn)

    @with_cpu_default
    def _adopt(self, plan: Plan) -> None:
        """Start with a plan, and with budgets without history; the largest learning rates so far are kept.

        Raises:
            ValueError: a cap on the update without a budget that bounds it.
        """
        before: Split | None = vars(self).get("_split")
        split = Split(
            plan,
            self.parameters,
            self._budget,
            rule=self.rule,
            backend=self.backend,
            process_group=self.process_group,
            stages=self.stages,
            caps_updates=self._after_updates,
            collective=self._is_collective,
            call="GradientSplitter",
        )
        if self._after_updates and split.update is None:
            raise ValueError(
                f"GradientSplitter(cap_updates=True, budget={self._budget!r:.60}): expected a budget that bounds the "
                "update, got none. Use RelativeStep(), alone or beside the others in a tuple, or leave budget= out."
            )
        _ = split.programs  # now, since a step must not wait for the device
        cap = None if split.update is None else UpdateCap(split, self._step)
        if before is not None:
            split.load_tops(before.tops())
            if before.rates is not None:
                split.read_rates(before.rates.optimizer, in_groups=split.needs_rates)
        self._split, self._cap = split, cap

    @property
    def plan(self) -> Plan:
        """The plan in force."""
        return self._split.plan

    @property
    def kernel(self) -> Kernel:
        """What reads and scales the bins."""
        return self._split.kernel

    @property
    def ledger(self) -> Ledger | StagedLedger:
        """The budgets of gradients, with their history."""
        return self._split.gradient

    def _stand_by(self, optimizer: Any) -> torch.optim.Optimizer:
        """Note the optimizer whose step follows, choose the defaults for it, and return it without its wrapper."""
        optimizer = optimizer_of(optimizer, call="GradientSplitter")
        at = self.optimizer
        if at is not None and at is not optimizer and self._handle is not None and self._handle.is_attached:
            raise ValueError(
                f"GradientSplitter.attach({type(optimizer).__name__}): expected one optimizer, got a second one beside "
                f"{type(at).__name__}, to which this is attached. Call remove() on its handle first, or make another "
                "splitter for the second one."
            )
        if self._chooses:
            budget, collective = usual_bounds(optimizer, caps=self._after_updates)
            collective = collective if self._collective is None else self._collective
            if (budget, collective) != (self._budget, self._is_collective):
                self._budget, self._is_collective = budget, collective
                self._adopt(self.plan)
        in_front = [budget for _, budget in self._split.gradient_budgets]
        refuse_endless(optimizer, call="GradientSplitter(optimizer=…)")
        refuse_misfit(optimizer, in_front, caps=self._cap is not None)
        if optimizer is not self.optimizer:
            warn_of_old_momentum(optimizer, in_front)
            warn_of_own_bounds(optimizer)
        self._split.read_rates(optimizer, in_groups=self._split.needs_rates)
        if optimizer is not self.optimizer:
            self._members = Members(
                optimizer, self.layout.names, self.parameters, others=self._all_named, call="GradientSplitter"
            )
        self.optimizer = optimizer
        self._turn.stand_at(optimizer)
        return optimizer

    def describe(self) -> str:
        """Say in a few sentences what is bounded, and why.

        >>> model = nn.Linear(2, 2)
        >>> said = GradientSplitter(model, optimizer=torch.optim.AdamW(model.parameters())).describe()
        >>> said.split(". ")[0]
        'In front of AdamW, each of 3 bins keeps within Relative(factor=1.0, eps=0.001)'
        """
        if self._unseen is not None:
            self._unseen.read()
        return described(self._split, self.optimizer, caps=self._cap is not None)

    def attach(self, optimizer: torch.optim.Optimizer) -> Handle:
        """Run `step` before every step of an optimizer, inside its closure if any; ``handle.remove()`` detaches.

        With a closure that is called several times in a step, the first call decides and the others follow.

        Raises:
            ValueError: another splitter of the same parameters is attached to the optimizer.
        """
        optimizer = self._stand_by(optimizer)
        if self._unseen is not None and self._unseen.settle():
            self._unseen = None
        if self._handle is not None and self._handle.is_attached:
            return self._handle
        place = Place(optimizer, self, self.layout.names, self.parameters, call="GradientSplitter.attach")
        hooks = attach_to(optimizer, start=self._start, before=self._before_update, after=self._after_update)
        self._bypassed = Bypassed(optimizer, self.parameters, call="GradientSplitter.attach")
        self._handle = Handle([hooks, place, self._bypassed])
        return self._handle

    def _start(self) -> None:
        if self._bypassed is not None:
            self._bypassed.remove()
            self._bypassed = None
        self._turn.begin()
        if self._cap is not None:
            self._cap.remember(anew=True)

    def _before_update(self) -> None:
        if not self._turn.done(self.parameters):
            self.step()

    def _after_update(self) -> None:
        self._turn.end()
        if self._cap is not None:
            self._cap.apply()

    @torch.no_grad()
    def step(self, *, scaler: torch.amp.GradScaler | None = None) -> StepRecord:
        """Bound the gradients in place and return the record.

        Args:
            scaler: a GradScaler, before or after its ``unscale_``. Limits then hold in unscaled units. On an overflow
                gradients and history stay as they are, since the scaler skips that step. Not needed when attached.

        Raises:
            ValueError: RelativeStep without an optimizer to read the learning rate from; a scaler without one; a
                learning rate, a decay or a momentum of the optimizer that is not finite.
            FloatingPointError: a non-finite bin, if ``on_nonfinite="raise"``; the gradients are left as they were.

        Warns:
            UserWarning: no parameter has a gradient; one that was frozen when the splitter was made has one.
        """
        self._check_ready()
        self._thawed.look(call="GradientSplitter.step()")
        if self._members is not None and not torch.compiler.is_compiling() and self._members.look():
            self._split.read_rates(self._members.optimizer, in_groups=self._split.needs_rates, anew=True)
        gradients = gradients_of(self.layout.names, self.parameters)
        self._split.check_shapes(call="GradientSplitter.step()")
        scaling = Scaling.of(self.optimizer, scaler)
        check = self._raise_if_not_finite if self.on_nonfinite == "raise" else None
        held = self._turn.held
        squares_B, decision = self._split.bound_(gradients, check, scaling, held)
        if self._cap is not None:
            self._cap.note(squares_B)
        self._turn.take(decision, self.parameters)
        if self._unscaled is not None and scaling is None and not torch.compiler.is_compiling():
            self._unscaled = self._unscaled if self._unscaled.note(self.parameters) else None
        return StepRecord(self.step_count - 1, squares_B, decision) if held else self._recorded(squares_B, decision)

    def _check_ready(self) -> None:
        """Refuse a step that lacks what its bounds need.

        Raises:
            ValueError: no learning rate for RelativeStep, or one that is not finite; a cap on the update that stands at
                no optimizer.

        Warns:
            UserWarning: another splitter at the same optimizer has bounded these gradients, or the optimizer has made a
                step with them before.
        """
        if self.optimizer is not None:
            refuse_endless(self.optimizer, call="GradientSplitter.step()")
        unseen = None if torch.compiler.is_compiling() else self._unseen
        if unseen is not None and unseen.came_too_late(self.parameters):
            _warn(
                f"GradientSplitter.step(): {type(self.optimizer).__name__} made its step with these gradients before "
                f"they were bounded. {CALL_ME}"
            )
        if not torch.compiler.is_compiling() and self._turn.done_by_another(self.parameters):
            _warn(
                f"GradientSplitter.step(): another splitter at this {type(self.optimizer).__name__} has bounded these "
                "gradients already, so that limits hold twice. Leave one of them out; one splitter takes several "
                "budgets."
            )
        if not torch.compiler.is_compiling() and self._turn.stands_still(self.parameters):
            _warn(
                f"GradientSplitter.step(): {Unseen.STEPS + 1} calls in a row found the same gradients, and nobody "
                "wrote to them in between. If a copy of the model trains, make a splitter for the copy."
            )
        if self._split.needs_rates and self._split.rates is None:
            raise ValueError(
                "GradientSplitter.step(): RelativeStep needs the learning rate. Pass optimizer=…, or "
                "attach(optimizer), or a budget of gradients, for example budget=gradsplit.Relative(0.02)."
            )
        if self._cap is not None and self.step_count and not self._cap.remembers:
            raise ValueError(
                "GradientSplitter.step(): cap_updates=True bounds the step after the optimizer has made it, and no "
                "step of it was seen. Call attach(optimizer) once instead of step()."
            )

    def _raise_if_not_finite(self, squares_B: Tensor) -> None:
        if not bool(squares_B.isfinite().all()):
            bad = [self.plan.bins[b].name for b in (~squares_B.isfinite()).nonzero().flatten()[:5].tolist()]
            raise FloatingPointError(
                f"GradientSplitter.step(): expected finite gradients, got inf or nan in {', '.join(bad)} at step "
                f"{self.step_count}. Use on_nonfinite='zero' to go on without them."
            )

    @not_traced  # a step count inside a graph would have the graph compiled anew at every step
    def _recorded(self, squares_B: Tensor, decision: Decision) -> StepRecord:
        """Count the step and hand its record to the sinks."""
        if self._unseen is not None:
            self._unseen = None if self._unseen.settle() else self._unseen
        record = StepRecord(self.step_count, squares_B, decision)
        self.step_count += 1
        for sink in self.sinks:
            sink(record)
        return record

    @torch.no_grad()
    def calibrate(self, closure: Callable[[], Any], steps: int = 8) -> Plan:
        """Measure energies over a few backward passes, cut anew where the strategy needs them, and warm up the history.

        Energies are an exponential mean of squared gradients with memory 0.9, bias-corrected; a pass with a non-finite
        gradient is left out for its tensor. Weights stay as they are, gradients end as None.

        Args:
            closure: clears gradients, runs forward and backward; what it returns is ignored.
            steps: passes, >= 1.

        Returns:
            The plan now in force.
        """
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"GradientSplitter.calibrate(steps={steps!r}): expected at least one backward pass.")
        strategy = self._strategy
        cuts_anew = isinstance(strategy, str) and STRATEGIES[strategy].needs_energy
        whole_means = [torch.zeros_like(p.detach(), dtype=torch.float32) for p in self.parameters] if cuts_anew else []
        mean: list[Any] = [local_of(value) for value in whole_means]
        seen = [0] * len(self.parameters)
        squares: list[Tensor] = []
        for _ in range(steps):
            for parameter in self.parameters:
                parameter.grad = None
            with torch.enable_grad():
                closure()
            gradients = gradients_of(self.layout.names, self.parameters, call="GradientSplitter.calibrate(…)")
            squares.append(with_cpu_default(self.kernel.squares)(gradients))
            if not cuts_anew:
                continue
            energy_T = [None if gradient is None else _energy(gradient) for gradient in gradients]
            for t, sound in enumerate(_sound_everywhere(self.kernel, energy_T)):
                if sound:
                    mean[t].lerp_(energy_T[t], 1 - _MEMORY)
                    seen[t] += 1
        for parameter in self.parameters:
            parameter.grad = None
        if cuts_anew:
            energies = {
                name: plain_of(whole_of(value)) / (1 - _MEMORY**count) if count else np.zeros(value.shape)
                for name, value, count in zip(self.layout.names, whole_means, seen, strict=True)
            }
            self._adopt(make_plan(strategy, self.layout, energies, call="GradientSplitter.calibrate"))
        elif not self._split.needs_rates:
            weights = self.kernel.squares(self.parameters) if self.ledger.reads_weights else None
            for squares_B in squares:
                self.ledger.decide(squares_B, weights)
        return self.plan

    def __repr__(self) -> str:
        name = "no optimizer" if self.optimizer is None else type(self.optimizer).__name__
        place = "attached to" if self._handle is not None and self._handle.is_attached else "with"
        budgets = [*self._split.gradient_budgets, *self._split.update_budgets]
        bounds = ", ".join(f"{level}: {budget!r}" for level, budget in budgets)
        return f"GradientSplitter({self.plan!r}, {{{bounds}}}, {place} {name}, {self.step_count} steps)"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(COPIED)

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next step depends on: plan, step count, history, learning-rate tops."""
        return {
            "fingerprint": self._split.partition,
            "plan": self.plan.to_dict() if self._strategy == "lbf" else None,
            "step_count": self.step_count,
            "history": self.ledger.state_dict(),
            "top_lr": self._split.tops() if self._split.rates is not None else [],
            **({} if self._split.recent is None else {"collective": self._split.recent.state()}),
        }

    @with_cpu_default
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` left off; a calibrated plan comes with it. As in torch, names do not count.

        Raises:
            ValueError: the state of another plan or of other budgets; nothing is taken over then.
        """
        call = "GradientSplitter.load_state_dict(…)"
        tops = check_state(state, ("fingerprint", "step_count", "history", "top_lr"), call=call)
        before = dict(vars(self))
        try:
            if state.get("plan") is not None and self._strategy == "lbf":
                made = Plan.from_dict(state["plan"])
                if made.layout.shapes == self.layout.shapes:  # as in torch, names do not count
                    made = Plan(self.layout, made.boxes, modules=made.modules)
                self._adopt(make_plan(made, self.layout, call=call))
            # With the names: an older version's.
            if state["fingerprint"] not in (self._split.partition, self.plan.fingerprint):
                raise ValueError(
                    f"{call}: expected the state of plan {self._split.partition}, got that of plan "
                    f"{state['fingerprint']}. Make the splitter with the model and plan of the saved run."
                )
            recent = self._split.recent
            norms = None if recent is None or "collective" not in state else recent.read(state["collective"], call=call)
            self.ledger.load_state_dict(state["history"], call=call)
        except Exception:
            vars(self).update(before)
            raise
        if recent is not None and norms is not None:
            recent.recent_B, recent.steps = norms
        self.step_count = state["step_count"]
        self._split.load_tops(tops)


def _warn(words: str) -> None:
    warnings.warn(words, UserWarning, stacklevel=users_level())


_MEMORY = 0.9


def _energy(gradient: Tensor) -> Tensor:
    """Squares of what this rank holds of a gradient."""
    local: Tensor = local_of(gradient.to_dense() if gradient.is_sparse else gradient)
    return (local.abs() if local.is_complex() else local).float().square()


def _sound_everywhere(kernel: Kernel, energy_T: list[Tensor | None]) -> list[bool]:
    """Whether every rank has a finite gradient of a tensor; one answer for all ranks, or they would cut differently."""
    bad = [energy is None or not bool(energy.isfinite().all()) for energy in energy_T]
    bad_T = kernel.add_(torch.tensor(bad, dtype=torch.float32, device=kernel.device))
    return [not count for count in bad_T.tolist()]
