"""The methods that comparisons train with: one row each, ours and other people's under the same conditions.

Every method gets the same learning rates; every tuned method gets the same number of strengths, seven; untuned ones
have none. Strengths are spaced so that their ends are too strong and too weak on the registered workloads.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

import gradsplit as gs

from ..budget import DEFAULT_OF_SPLITTER
from .controls import Control, GlobalClip, NoControl, Split, tree_limits
from .optimizers import Settings, make_optimizer, make_schedule
from .task import Task

__all__ = ["METHODS", "Arrangement", "Method", "arrange", "method_named"]

Strengths = tuple[float, ...]
_GLOBAL: Strengths = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # norms of a whole gradient
_TENSOR: Strengths = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # a tensor or a leaf has a share of it,
_ROW: Strengths = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # a row a smaller one
_RELATIVE: Strengths = (0.0025, 0.01, 0.02, 0.04, 0.08, 0.16, 0.64)  # gradient norm / weight norm
_EMA: Strengths = (1.05, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0)
_Z: Strengths = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0)

Build = Callable[[Task, Optimizer, float, Settings], Control]
"""(task, optimizer, strength, settings) -> control."""


@dataclass(frozen=True)
class Method:
    """A named way to train.

    Attributes:
        name: the name on the command line.
        summary: one line for tables.
        control: makes what stands between backward and the update.
        strengths: the grid that is tuned; empty: nothing to tune.
        strategy: the strategy of `gradsplit.plan.STRATEGIES` it splits with, "" for the others.
        optimizer: the optimizer that is part of the method; "": the one the comparison asks for.
        in_adams_place: the optimizer where the comparison asks for Adam or AdamW; "": those.
        warms_up: whether a linear warm-up of the learning rate is part of the method.
        own_lrs: learning rates that its authors prescribe, in addition to everybody's.
        largest_lr: larger rates have no meaning for it and are left out.
        own_schedule: the optimizer's own; the comparison's is not applied.
        usual_lr: the rate that its authors or its package give; None: they give none.
        ours: whether it is gradsplit's.
    """

    name: str
    summary: str
    control: Build
    strengths: Strengths = ()
    strategy: str = ""
    optimizer: str = ""
    in_adams_place: str = ""
    warms_up: bool = False
    own_lrs: Strengths = ()
    largest_lr: float = math.inf
    own_schedule: bool = False
    usual_lr: float | None = None
    ours: bool = False

    def optimizer_name(self, asked: str) -> str:
        """The optimizer it trains with where the comparison asks for `asked`."""
        return self.optimizer or (self.in_adams_place if asked in ("adam", "adamw") else "") or asked


@dataclass
class Arrangement:
    """A task ready to be trained: call `mode(training=True)`, then `update` after every backward.

    Attributes:
        optimizer: updates the task's model.
        control: bounds its gradients before.
        schedule: moves the learning rate after.
    """

    optimizer: Optimizer
    control: Control
    schedule: LambdaLR | None

    def update(self) -> None:
        """Bound, update, move the learning rate."""
        self.control.bound()
        self.optimizer.step()
        if self.schedule is not None:
            self.schedule.step()

    def mode(self, *, training: bool) -> None:
        """Schedule-free optimizers keep two sets of weights, and must be told which one the model is to hold."""
        switch: Any = getattr(self.optimizer, "train" if training else "eval", None)
        if switch is not None:
            switch()


def arrange(method: Method, task: Task, lr: float, strength: float | None, settings: Settings) -> Arrangement:
    """Optimizer, control and schedule of one run.

    Args:
        method: a row of `METHODS`.
        task: whose model is trained.
        lr: learning rate > 0.
        strength: one number in the unit of the method; None where it has nothing to tune.
        settings: steps, optimizer, schedule, warm-up.

    Raises:
        ValueError: a strength for a method without, none for a method with.
        MissingPackageError: the method's package is not installed.
    """
    if bool(method.strengths) != (strength is not None):
        wanted = f"a strength, for example {method.strengths[3]}" if method.strengths else "no strength"
        raise ValueError(f"arrange({method.name!r}, strength={strength}): expected {wanted}.")
    optimizer = make_optimizer(method.optimizer_name(settings.optimizer), task.model, lr, settings)
    control = method.control(task, optimizer, 0.0 if strength is None else strength, settings)
    if method.own_schedule:
        return Arrangement(optimizer, control, None)
    warmup = settings.warmup_steps if method.warms_up else 0
    return Arrangement(optimizer, control, make_schedule(optimizer, settings, warmup=warmup))


def method_named(name: str) -> Method:
    """The row of that name.

    Raises:
        ValueError: no row has this name; the text offers the nearest and lists all.
    """
    if name in METHODS:
        return METHODS[name]
    near = difflib.get_close_matches(name, METHODS, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"method {name!r}: expected one of {', '.join(METHODS)}.{hint}")


def _split(strategy: str, budget: Callable[[float], gs.Budget]) -> Build:
    return lambda task, optimizer, strength, s: Split(task, optimizer, strategy, budget(strength), s.steps)


def _tree(rule: Callable[[float], gs.Budget]) -> Build:
    return lambda task, optimizer, strength, s: Split(
        task, optimizer, "tree_sp", lambda plan: tree_limits(plan, strength, rule), s.steps
    )


def _clip(task: Task, optimizer: Optimizer, strength: float, settings: Settings) -> Control:
    return GlobalClip(task, strength)


def _clip_at_one(task: Task, optimizer: Optimizer, strength: float, settings: Settings) -> Control:
    return GlobalClip(task, 1.0)


def _none(task: Task, optimizer: Optimizer, strength: float, settings: Settings) -> Control:
    return NoControl()


def _default(task: Task, optimizer: Optimizer, strength: float, settings: Settings) -> Control:
    """The splitter as it comes; in Adam's place the optimizer itself caps the update, so nothing stands before it."""
    if isinstance(optimizer, gs.GSO):
        return NoControl()
    return Split(task, optimizer, "xsp", DEFAULT_OF_SPLITTER, settings.steps)


def _ours(name: str, strategy: str, summary: str, control: Build, strengths: Strengths) -> Method:
    return Method(name, summary, control, strengths, strategy=strategy, ours=True)


METHODS: dict[str, Method] = {
    row.name: row
    for row in (
        Method("none", "the optimizer alone", _none),
        Method("clip", "torch's clip_grad_norm_ over the whole model", _clip, _GLOBAL),
        Method("clip-relative", "one limit for all, relative to weights", _split("whole", gs.Relative), _RELATIVE),
        Method("zclip", "one limit for all, z-scores of the norm (ZClip)", _split("whole", gs.ZScore), _Z),
        _ours("xsp", "xsp", "rows, relative to weights (AGC)", _split("xsp", gs.Relative), _RELATIVE),
        _ours("xsp-fixed", "xsp", "rows, one constant", _split("xsp", gs.Fixed), _ROW),
        _ours("xsp-ema", "xsp", "rows, relative to their running mean", _split("xsp", gs.Ema), _EMA),
        _ours("per_tensor", "per_tensor", "tensors, relative to weights", _split("per_tensor", gs.Relative), _RELATIVE),
        _ours("per_tensor-fixed", "per_tensor", "tensors, one constant", _split("per_tensor", gs.Fixed), _TENSOR),
        _ours("lbf", "lbf", "calibrated rectangles, relative to weights", _split("lbf", gs.Relative), _RELATIVE),
        _ours("lbf-fixed", "lbf", "calibrated rectangles, one constant", _split("lbf", gs.Fixed), _TENSOR),
        _ours("tree_sp", "tree_sp", "root c, modules up to 2 c, tensors 2 c", _tree(gs.Fixed), _GLOBAL),
        _ours("tree_sp-relative", "tree_sp", "the same, relative to the weights", _tree(gs.Relative), _RELATIVE),
        Method(
            "default", "rows, at most 3 % of their length a step; nothing tuned", _default,
            strategy="xsp", in_adams_place="gso-cap", ours=True,
        ),
        Method(
            "gso", "GSO as it comes: no clip, no warm-up; lr is the share of a row", _none,
            optimizer="gso", own_lrs=(0.03,), largest_lr=0.5, usual_lr=0.03, ours=True,
        ),
        Method("gso-adam", "GSO with Adam's direction", _none, optimizer="gso-adam", usual_lr=1e-2, ours=True),
        Method("gso-bin", "GSO with one second moment a row", _none, optimizer="gso-bin", ours=True),
        Method("gso-cap", "GSO with the cap on the update alone", _none, optimizer="gso-cap", ours=True),
        Method("adamw", "AdamW alone", _none, optimizer="adamw", usual_lr=1e-3),
        Method("adamw+warmup", "AdamW with warm-up", _none, optimizer="adamw", warms_up=True, usual_lr=1e-3),
        Method(
            "adamw+clip+warmup", "AdamW, clip and warm-up", _clip, _GLOBAL,
            optimizer="adamw", warms_up=True, usual_lr=1e-3,
        ),
        Method(
            "adamw+clip1+warmup", "AdamW, clip at norm 1 and warm-up", _clip_at_one,
            optimizer="adamw", warms_up=True, usual_lr=1e-3,
        ),
        Method(
            "muon", "Muon on matrices and flattened convolutions, AdamW at a third of its rate, clip at 1, warm-up",
            _clip_at_one, optimizer="muon", warms_up=True, usual_lr=0.02,
        ),
        Method(
            "muon-rms", "Muon at AdamW's scale (Moonlight), AdamW at the same rate, clip at 1, warm-up",
            _clip_at_one, optimizer="muon-rms", warms_up=True, usual_lr=1e-3,
        ),
        Method(
            "soap", "SOAP with clip at 1 and warm-up (pytorch-optimizer)", _clip_at_one,
            optimizer="soap", warms_up=True, usual_lr=3e-3,
        ),
        Method(
            "lion", "Lion with clip at 1 and warm-up (pytorch-optimizer)", _clip_at_one,
            optimizer="lion", warms_up=True, usual_lr=1e-4,
        ),
        Method("lamb", "LAMB with warm-up (pytorch-optimizer)", _none, optimizer="lamb", warms_up=True, usual_lr=1e-3),
        Method(
            "prodigy", "Prodigy (prodigyopt), also at its own lr 1", _none,
            optimizer="prodigy", own_lrs=(1.0,), usual_lr=1.0,
        ),
        Method(
            "schedulefree", "schedule-free AdamW with its warm-up (schedulefree)", _none,
            optimizer="schedulefree", warms_up=True, own_schedule=True, usual_lr=2.5e-3,
        ),
    )
}  # fmt: skip
