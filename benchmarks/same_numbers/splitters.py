"""GradientSplitter: every strategy x budget x rule x backend, and every way to use it; plans and projections."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch

import gradsplit as gs
from same_numbers.nets import Faults, Net, drawn, loss_of, make_net, train
from same_numbers.sheet import Notes, Sheet

BACKENDS = ("numba", "eager", "reference")
RULES = ("bottom_up", "nearest")

PLANS: dict[str, Any] = {
    "whole": "whole",
    "per_tensor": "per_tensor",
    "xsp": "xsp",
    "xsp parts=2": lambda layout: gs.xsp(layout, parts=2),
    "xsp axis=1": lambda layout: gs.xsp(layout, axis=1),
    "xsp axis=1 parts=3": lambda layout: gs.xsp(layout, axis=1, parts=3),
    "lbf": "lbf",
    "lbf max_bins=20": lambda layout: gs.lbf(layout, energies(), max_bins=20, min_gain=0.0),
    "tree_sp": "tree_sp",
    "tree_sp rows": lambda layout: gs.tree_sp(layout, inner="xsp"),
    "tree_sp parts": lambda layout: gs.tree_sp(layout, inner=lambda layout: gs.xsp(layout, parts=3)),
}

EMA, ZSCORE = gs.Ema(1.1, beta=0.9, warmup=2, patience=2), gs.ZScore(1.5, beta=0.9, warmup=2)
BUDGETS: dict[str, Any] = {
    "default": None,
    "relative_step": gs.RelativeStep(0.02),
    "fixed": gs.Fixed(0.1),
    "relative": gs.Relative(0.05),
    "ema": EMA,
    "zscore": ZSCORE,
    "percentile": gs.Percentile(0.5, eta=0.1),
    "by name": ("relative", "zscore"),
    "three": (gs.Relative(0.2), gs.Fixed(0.3), EMA),
    "root": {"root": gs.Fixed(0.2)},
    "root and bin": {"root": EMA, "bin": gs.RelativeStep(0.05)},
    "tensor and bin": {"tensor": gs.Percentile(0.5, eta=0.1), "bin": "relative"},
    "three levels": {"root": ZSCORE, "tensor": gs.Relative(0.2), "bin": (EMA, gs.RelativeStep(0.05))},
    "module and root": {"module": gs.Relative(0.05), "root": ZSCORE},
    "every level": {
        "root": (ZSCORE, gs.Fixed(0.3)),
        "module": gs.Relative(0.1),
        "tensor": (gs.RelativeStep(0.05), gs.Percentile(0.7)),
        "bin": (EMA, gs.Fixed(0.2)),
    },
}

LACKS = {"whole": ("tensor", "module")} | {name: () for name in PLANS if name.startswith("tree_sp")}
"""The levels that a plan does not have; most have no modules."""


def energies() -> dict[str, torch.Tensor]:
    """Squared gradients of the tiny model on one batch."""
    model = make_net()
    loss_of(model, 0).backward()
    return {name: p.grad.square() for name, p in model.named_parameters()}


def part(sheet: Sheet) -> None:
    for plan, budget, rule, backend in itertools.product(PLANS, BUDGETS, RULES, BACKENDS):
        sheet.run(
            f"splitter/{plan}/{budget}/{rule}/{backend}",
            lambda notes, p=plan, b=budget, r=rule, k=backend: split(notes, p, BUDGETS[b], rule=r, backend=k),
        )
    capped = {"default": None, "root and bin": {"root": gs.Fixed(0.2), "bin": gs.RelativeStep(0.02)}}
    capped["two levels"] = {"tensor": gs.RelativeStep(0.02), "bin": (gs.RelativeStep(0.03), EMA)}
    for (name, budget), plan, backend in itertools.product(capped.items(), ("xsp", "per_tensor", "lbf"), BACKENDS):
        sheet.run(
            f"splitter/capped/{plan}/{name}/{backend}",
            lambda notes, p=plan, b=budget, k=backend: split(notes, p, b, backend=k, cap_updates=True),
        )
    for (name, work), backend in itertools.product(WAYS.items(), BACKENDS):
        sheet.run(f"splitter/ways/{name}/{backend}", lambda notes, w=work, k=backend: w(notes, k))
    sheet.run("plans", plans)
    for rule in RULES:
        sheet.run(f"project/{rule}", lambda notes, r=rule: projections(notes, r))


def split(notes: Notes, plan: str, budget: Any, *, cap_updates: bool = False, **options: Any) -> None:
    """A run of SGD with momentum behind it, or of AdamW with its updates capped."""
    model = make_net()
    if budget is not None and set(LACKS.get(plan, ("module",))) & set(budget if isinstance(budget, dict) else ()):
        try:
            gs.GradientSplitter(model, PLANS[plan], budget)
        except ValueError:
            notes.note("refused", "a level that the plan does not have")
        return
    splitter, optimizer = attached(notes, model, PLANS[plan], budget, cap_updates=cap_updates, **options)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
    train(notes, model, optimizer, after_step=lambda _: schedule.step())
    notes.note("state", splitter.state_dict())
    notes.note("plan", splitter.plan.fingerprint)


def attached(notes: Notes, model: Net, plan: Any, budget: Any, *, cap_updates: bool = False, **options: Any) -> Any:
    """A splitter in front of an optimizer, with records noted; calibrated where the strategy asks for it."""
    kind, rate = (torch.optim.AdamW, {"lr": 0.02}) if cap_updates else (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9})
    optimizer = kind(model.parameters(), **rate)
    splitter = gs.GradientSplitter(
        model, plan, budget, cap_updates=cap_updates, optimizer=optimizer, sinks=[notes.record], **options
    )
    if plan == "lbf":
        calibrate(splitter, model)
    splitter.attach(optimizer)
    return splitter, optimizer


def calibrate(splitter: Any, model: Net) -> None:
    turn = iter(range(50, 60))

    def closure() -> None:
        model.zero_grad()
        loss_of(model, next(turn)).backward()

    splitter.calibrate(closure, 3)


def by_hand(notes: Notes, backend: str, **options: Any) -> None:
    """`step()` called by hand, on gradients added up over two passes."""
    model = make_net()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.5, nesterov=True)
    splitter = gs.GradientSplitter(model, optimizer=optimizer, backend=backend, **options)

    def bound(step: int) -> None:
        loss_of(model, step + 20).backward()
        notes.record(splitter.step())

    train(notes, model, optimizer, before_step=bound)


def resumed(notes: Notes, backend: str) -> None:
    """Saved and loaded in the middle, with a history at every level."""
    model = make_net()
    splitter, optimizer = attached(notes, model, PLANS["tree_sp rows"], BUDGETS["every level"], backend=backend)
    faults = Faults(model)
    train(notes, model, optimizer, steps=3, faults=faults)
    state, own = splitter.state_dict(), optimizer.state_dict()
    again = make_net(seed=1)
    again.load_state_dict(model.state_dict())
    splitter, optimizer = attached(notes, again, PLANS["tree_sp rows"], BUDGETS["every level"], backend=backend)
    splitter.load_state_dict(state)
    optimizer.load_state_dict(own)
    train(notes, again, optimizer, steps=5, first=3)
    notes.note("state", splitter.state_dict())


def several_groups(notes: Notes, backend: str) -> None:
    """Rates of their own for two groups, one parameter frozen, one column of limits."""
    model = make_net()
    model.norm.bias.requires_grad_(False)
    groups = [
        {"params": model.stem.parameters(), "lr": 0.1, "momentum": 0.5},
        {"params": [p for p in [*model.norm.parameters(), *model.body.parameters(), model.scale] if p.requires_grad]},
    ]
    optimizer = torch.optim.SGD(groups, 0.03, momentum=0.9)
    plan = gs.per_tensor(gs.layout_of(model))
    limits = gs.Fixed(np.linspace(0.05, 0.5, plan.num_bins))
    splitter = gs.GradientSplitter(model, plan, (limits, gs.RelativeStep()), backend=backend, sinks=[notes.record])
    handle = splitter.attach(optimizer)
    train(notes, model, optimizer, steps=4)
    handle.remove()
    train(notes, model, optimizer, steps=1, first=20)


def with_closure(notes: Notes, backend: str) -> None:
    model = make_net()
    faults = Faults(model)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    splitter = gs.GradientSplitter(model, budget=EMA, backend=backend, sinks=[notes.record])
    splitter.attach(optimizer)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, faults.step)
        loss.backward()
        notes.note("losses", loss)
        return loss

    for step in range(3):
        faults.step = step
        optimizer.step(closure)
    notes.note("parameters", dict(model.named_parameters()))


def scaled(notes: Notes, backend: str, *, attach: bool) -> None:
    """Under a GradScaler, with an overflow at a step."""
    model = make_net()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    splitter = gs.GradientSplitter(model, budget=(gs.RelativeStep(), EMA), optimizer=optimizer, backend=backend)
    splitter.sinks.append(notes.record)
    faults = Faults(model)
    if attach:
        splitter.attach(optimizer)
    for step in range(5):
        faults.step = step
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        if not attach:
            splitter.step(scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
        notes.note("scaler", scaler.get_scale())
    notes.note("parameters", dict(model.named_parameters()))
    notes.note("state", splitter.state_dict())


def raising(notes: Notes, backend: str) -> None:
    model = make_net()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    splitter = gs.GradientSplitter(model, on_nonfinite="raise", backend=backend)
    splitter.attach(optimizer)
    try:
        train(notes, model, optimizer)
    except FloatingPointError as error:
        notes.text("error", str(error))
    notes.note("left", [p.grad for p in model.parameters()], dict(model.named_parameters()), splitter.state_dict())


def in_dtype(notes: Notes, backend: str, dtype: torch.dtype, *, strided: bool = False) -> None:
    """Gradients that are given, in one dtype, on request in memory that is not contiguous."""
    model = make_net(dtype)
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, 0.05, momentum=0.9)
    splitter = gs.GradientSplitter(model, PLANS["xsp parts=2"], (gs.RelativeStep(), EMA), backend=backend)
    splitter.attach(optimizer)
    splitter.sinks.append(notes.record)
    for step in range(5):
        for parameter, gradient in zip(parameters, drawn(parameters, step), strict=True):
            if strided and gradient.ndim > 1:
                gradient = gradient.transpose(0, 1).contiguous().transpose(0, 1)
            parameter.grad = gradient
        optimizer.step()
    notes.note("parameters", dict(model.named_parameters()), splitter.state_dict())


WAYS: dict[str, Any] = {
    "by hand": by_hand,
    "by hand, nearest": lambda notes, backend: by_hand(notes, backend, rule="nearest", budget=BUDGETS["every level"]
        | {"bin": EMA}, plan="tree_sp"),
    "resumed": resumed,
    "several groups": several_groups,
    "closure": with_closure,
    "scaler, attached": lambda notes, backend: scaled(notes, backend, attach=True),
    "scaler, by hand": lambda notes, backend: scaled(notes, backend, attach=False),
    "raise": raising,
    "float64": lambda notes, backend: in_dtype(notes, backend, torch.float64),
    "bfloat16": lambda notes, backend: in_dtype(notes, backend, torch.bfloat16),
    "float16": lambda notes, backend: in_dtype(notes, backend, torch.float16),
    "strided": lambda notes, backend: in_dtype(notes, backend, torch.float32, strided=True),
}  # fmt: skip


def plans(notes: Notes) -> None:
    """Boxes, trees and fingerprints of every strategy, and their way through plain data."""
    layout = gs.layout_of(make_net())
    notes.note("layout", layout.fingerprint, layout.names, layout.shapes)
    for name, make in PLANS.items():
        make = {"lbf": lambda layout: gs.lbf(layout, energies())}.get(make, make)
        plan = make(layout) if callable(make) else getattr(gs, make)(layout)
        notes.note(name, plan.fingerprint, plan.bins[0].name, plan.bins[-1].name, [node.name for node in plan.nodes])
        notes.note(name, plan.tensor_K, plan.row_start_K, plan.row_stop_K, plan.col_start_K, plan.col_stop_K)
        notes.note(name, plan.bin_K, plan.parents_N, list(plan.levels_N), plan.bin_nodes_B, plan.numel_B)
        notes.note(f"{name}, plain", plan.to_dict(), gs.Plan.from_dict(plan.to_dict()).fingerprint)
        notes.text(f"{name}, described", plan.describe())


def projections(notes: Notes, rule: str) -> None:
    """`project` on numpy and torch, with limits at every node."""
    draw = np.random.default_rng(0)
    for name in ("whole", "xsp parts=2", "tree_sp rows"):
        layout, make = gs.layout_of(make_net()), PLANS[name]
        plan = make(layout) if callable(make) else getattr(gs, make)(layout)
        norm_B, limit_N = np.exp(draw.standard_normal(plan.num_bins)), np.exp(draw.standard_normal(plan.num_nodes))
        for dtype in (np.float64, np.float32):
            arrays = norm_B.astype(dtype), limit_N.astype(dtype)
            notes.note(f"{name}, numpy", gs.project(plan, *arrays, rule=rule))
            notes.note(f"{name}, torch", gs.project(plan, *map(torch.from_numpy, arrays), rule=rule))
