"""GSO in all its modes: moments, schedules, budgets, plans, backends, flags, dtypes, groups, states."""

from __future__ import annotations

import copy
import functools
import itertools
import pickle
from typing import Any

import torch

import gradsplit as gs
from same_numbers.gso import make_gso, note_state
from same_numbers.nets import Faults, drawn, loss_of, make_net, train
from same_numbers.sheet import Notes, Sheet
from same_numbers.splitters import BACKENDS, EMA, PLANS, ZSCORE, energies

FIXED_RATE = {"lr": 0.02}
"""Written out, so that a default that moves is not mistaken for a number that moved."""

BUDGETS: dict[str, Any] = {
    "fixed": gs.Fixed(0.1),
    "none": gs.Fixed(float("inf")),
    "relative": gs.Relative(0.05),
    "relative_step": gs.RelativeStep(0.02),
    "ema": (EMA, gs.RelativeStep(0.03)),
    "zscore": (ZSCORE, gs.RelativeStep(0.03)),
    "percentile": gs.Percentile(0.5, eta=0.1),
    "root": {"root": gs.Fixed(0.2)},
    "root and bin": {"root": (gs.Fixed(0.2), EMA), "bin": (gs.Relative(0.2), gs.RelativeStep(0.03))},
    "root of the update": {"root": gs.RelativeStep(0.02), "bin": gs.Relative(0.2)},
    "tensor and root": {"root": gs.RelativeStep(0.02), "tensor": (ZSCORE, gs.RelativeStep(0.02))},
    "length": (gs.Relative(0.1), gs.RelativeStep(0.02, length=1.0)),
}
MODES: dict[str, dict[str, Any]] = {
    "default": {},
    "nearest": {"rule": "nearest", "budget": BUDGETS["root and bin"]},
    "betas": {"betas": (0.0, 0.9), "eps": 1e-3},
    "no decay": {"weight_decay": 0.0},
    "decay": {"weight_decay": 0.5},
    "maximize": {"maximize": True},
    "capturable": {"capturable": True},
    "fused=False": {"fused": False},
    "tensor rate": {"lr": torch.tensor(0.02)},
    "in_backward": {"in_backward": True},
    "in_backward, ema": {"in_backward": True, "budget": (EMA, gs.RelativeStep(0.03))},
    "in_backward, tensor": {"in_backward": True, "budget": {"tensor": gs.Relative(0.1), "bin": gs.RelativeStep(0.03)}},
}
MODES |= {
    f"cyclic, {order}": {"schedule": "cyclic", "switch_every": 2, "order": order, "seed": 3}
    for order in ("fixed", "random", "energy")
}
MOMENTS = ("element", "bin")


def part(sheet: Sheet) -> None:
    def run(name: str, options: dict[str, Any]) -> None:
        for moment, backend in itertools.product(MOMENTS, BACKENDS):
            work = functools.partial(optimize, second_moment=moment, backend=backend, **{**FIXED_RATE, **options})
            sheet.run(f"gso/{name}/{moment}/{backend}", work)

    for name, options in MODES.items():
        run(name, options)
    for name, budget in BUDGETS.items():
        run(f"budget {name}", {"budget": budget})
    for name, plan in PLANS.items():
        if plan not in ("lbf", "whole"):
            run(f"plan {name}", {"plan": plan})
    run("plan tree_sp rows, module", {"plan": PLANS["tree_sp rows"], "budget": {"module": gs.Relative(0.1)}})
    run("plan tree_sp, module of the update", {"plan": "tree_sp", "budget": {"module": gs.RelativeStep(0.02)}})
    for (name, work), backend in itertools.product(WAYS.items(), BACKENDS):
        sheet.run(f"gso/ways/{name}/{backend}", functools.partial(work, backend=backend))
    sheet.run("gso/plan whole", functools.partial(optimize, plan="whole", **FIXED_RATE))
    sheet.run("gso/plan lbf", lambda notes: optimize(
        notes, plan=lambda layout: gs.lbf(layout, energies(), max_bins=30), second_moment="bin", **FIXED_RATE
    ))  # fmt: skip
    sheet.run("gso/fused", functools.partial(optimize, fused=True, **FIXED_RATE))
    sheet.run("gso/own defaults", optimize)
    sheet.run("gso/differentiable", differentiable)


def optimize(notes: Notes, *, steps: int = 6, **options: Any) -> None:
    """A run under a falling rate; in-backward runs cannot let a gradient fall away after backward."""
    model = make_net()
    optimizer = make_gso(model, **options)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    train(notes, model, optimizer, steps=steps, after_step=lambda _: schedule.step())
    note_state(notes, optimizer)


def with_groups(notes: Notes, backend: str) -> None:
    """Groups with plans and budgets of their own, one of them added later."""
    model = make_net()
    groups = [
        {"params": list(model.stem.named_parameters()), "lr": 0.05},
        {"params": list(model.norm.named_parameters()), "budget": BUDGETS["ema"], "weight_decay": 0.0},
        {"params": [("scale", model.scale)], "plan": "per_tensor", "betas": (0.5, 0.9)},
    ]
    optimizer = make_gso(groups, backend=backend, **FIXED_RATE)
    train(notes, model, optimizer, steps=2)
    body = list(model.body.named_parameters())
    own = {"plan": PLANS["xsp axis=1"], "budget": BUDGETS["root"], "lr": 0.1, "maximize": True}
    optimizer.add_param_group({"params": body, **own})
    train(notes, model, optimizer, first=2)
    note_state(notes, optimizer)


def on_drawn(notes: Notes, backend: str, kind: str, **options: Any) -> None:
    """Given gradients for parameters of one kind."""
    draw = torch.Generator().manual_seed(7)
    dtypes = {"complex64": torch.complex64, "complex128": torch.complex128, "bfloat16": torch.bfloat16}
    dtype = dtypes.get(kind) or getattr(torch, kind)
    parameters = [
        torch.nn.Parameter(torch.randn(shape, generator=draw, dtype=dtype if dtype.is_complex else None).to(dtype))
        for shape in ((4, 3), (5,), (), (3, 2, 2))
    ]
    optimizer = make_gso(parameters, backend=backend, **{**FIXED_RATE, **options})
    for step in range(5):
        for parameter, gradient in zip(parameters, drawn(parameters, step), strict=True):
            parameter.grad = gradient
        optimizer.step()
        notes.note("parameters", parameters)
    note_state(notes, optimizer)


def resumed(notes: Notes, backend: str, **options: Any) -> None:
    """Loaded in the middle by another optimizer, copied, pickled, and taken over from AdamW."""
    model = make_net()
    optimizer = make_gso(model, backend=backend, **{**FIXED_RATE, **options})
    train(notes, model, optimizer, steps=3)
    again = make_net(seed=1)
    again.load_state_dict(model.state_dict())
    loaded = make_gso(again, backend=backend, **{**FIXED_RATE, **options})
    loaded.load_state_dict(optimizer.state_dict())
    note_state(notes, loaded)
    train(notes, again, loaded, first=3)
    if "schedule" in options:  # a wrapper is not copied with the optimizer
        return
    for way, made in (("copied", copy.deepcopy(optimizer)), ("pickled", pickle.loads(pickle.dumps(optimizer)))):
        parameters = [p for group in made.param_groups for p in group["params"]]
        for step in range(2):
            for parameter, gradient in zip(parameters, drawn(parameters, step), strict=True):
                parameter.grad = gradient
            made.step()
        notes.note(way, parameters)
        note_state(notes, made, f"{way} ")


def from_adamw(notes: Notes, backend: str) -> None:
    model = make_net()
    adamw = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(2):
        adamw.zero_grad()
        loss_of(model, step).backward()
        adamw.step()
    optimizer = make_gso(model, backend=backend, **FIXED_RATE)
    optimizer.load_state_dict(adamw.state_dict())
    train(notes, model, optimizer)
    note_state(notes, optimizer)


def accumulating(notes: Notes, backend: str) -> None:
    model = make_net()
    optimizer = make_gso(model, in_backward=True, backend=backend, **FIXED_RATE)
    faults = Faults(model)
    for step in range(4):
        faults.step = step
        with optimizer.accumulating():
            loss_of(model, step).backward()
        loss_of(model, step + 30).backward()
        optimizer.step()
    notes.note("parameters", dict(model.named_parameters()))
    note_state(notes, optimizer)


def with_closure(notes: Notes, backend: str, **options: Any) -> None:
    model = make_net()
    optimizer, faults = make_gso(model, backend=backend, **{**FIXED_RATE, **options}), Faults(model)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, faults.step)
        loss.backward()
        return loss

    for step in range(4):
        faults.step = step
        notes.note("losses", optimizer.step(closure))
    notes.note("parameters", dict(model.named_parameters()))
    note_state(notes, optimizer)


def scaled(notes: Notes, backend: str, **options: Any) -> None:
    model = make_net()
    optimizer, faults = make_gso(model, backend=backend, **{**FIXED_RATE, **options}), Faults(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    for step in range(5):
        faults.step = step
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        if step == 4:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        notes.note("scaler", scaler.get_scale())
    notes.note("parameters", dict(model.named_parameters()))
    note_state(notes, optimizer)


def frozen(notes: Notes, backend: str, **options: Any) -> None:
    """A gradient that comes late, and one that never does."""
    model = make_net()
    optimizer = make_gso(model, backend=backend, **{**FIXED_RATE, **options})

    def drop(step: int) -> None:
        model.norm.bias.grad = None
        if step < 2:
            model.stem.embed.weight.grad = None

    train(notes, model, optimizer, before_step=drop)
    note_state(notes, optimizer)


WAYS: dict[str, Any] = {
    "groups": with_groups,
    **{
        f"{kind}, {moment}": functools.partial(on_drawn, kind=kind, second_moment=moment)
        for kind in ("float16", "bfloat16", "float64", "complex64", "complex128")
        for moment in MOMENTS
    },
    "bfloat16, root": functools.partial(on_drawn, kind="bfloat16", budget=BUDGETS["root and bin"]),
    "complex64, maximize": functools.partial(on_drawn, kind="complex64", maximize=True),
    "resumed": resumed,
    "resumed, bin": functools.partial(resumed, second_moment="bin", budget=BUDGETS["ema"]),
    "resumed, cyclic": functools.partial(resumed, schedule="cyclic", switch_every=2, order="random"),
    "resumed, in_backward": functools.partial(resumed, in_backward=True, budget=BUDGETS["ema"]),
    "from AdamW": from_adamw,
    "accumulating": accumulating,
    "closure": with_closure,
    "closure, cyclic": functools.partial(with_closure, schedule="cyclic", switch_every=2, order="energy"),
    "scaler": scaled,
    "scaler, root": functools.partial(scaled, budget=BUDGETS["root and bin"]),
    "scaler, cyclic": functools.partial(scaled, schedule="cyclic", switch_every=2),
    "frozen": frozen,
    "frozen, bin and history": functools.partial(frozen, second_moment="bin", budget=BUDGETS["zscore"]),
}


def differentiable(notes: Notes) -> None:
    """The update as autograd sees it."""
    start = [torch.randn(3, 2, generator=torch.Generator().manual_seed(1)), torch.ones(2)]
    start = [tensor.requires_grad_() for tensor in start]
    parameters = [p.clone() for p in start]
    optimizer = make_gso(parameters, differentiable=True, **FIXED_RATE)
    for step in range(2):
        for parameter, gradient in zip(parameters, drawn(parameters, step + 5), strict=True):
            parameter.grad = gradient
        optimizer.step()
    made = torch.autograd.grad(sum(p.square().sum() for p in parameters), start)
    notes.note("parameters", parameters, made)
