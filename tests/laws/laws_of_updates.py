"""What every update of GSO must do. The subject is a function (pairs, **options) -> optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

import gradsplit as gs
from gradsplit.plan import Layout, Plan
from tests.laws.cases import in_strides, parameters, tensors
from tests.laws.oracles import label_elements, to_numpy
from tests.optim.oracle import Group, Oracle

Make = Callable[..., Any]

LAYOUT = Layout.from_shapes(
    {"scale": (), "conv.weight": (4, 3, 2, 2), "conv.bias": (4,), "fc.weight": (5, 6), "none": (0, 3), "row": (1, 5)}
)


def _pairs(dtype: torch.dtype, strides: str = "contiguous") -> list[tuple[str, nn.Parameter]]:
    made = []
    for name, p in parameters(LAYOUT, dtype):
        other = in_strides(p.detach(), strides)
        made.append((name, p if other is None else nn.Parameter(other)))
    return made


def _gradients(step: int, dtype: torch.dtype, strides: str = "contiguous", *, size: float = 1.0) -> list[torch.Tensor]:
    """Rows of very different sizes, so that some bind and some do not."""
    made = tensors(LAYOUT, dtype, strides, 1000 + 10 * step)
    for gradient in made:
        if gradient.dim() > 1:
            rows = torch.logspace(-4, 2, max(gradient.shape[0], 1), dtype=torch.float64)[: gradient.shape[0]]
            gradient.mul_(rows.to(gradient.dtype).view(-1, *(1,) * (gradient.dim() - 1)))
        gradient.mul_(size)
    return made


def check_equals_the_formulas(make: Make, plan: Plan, options: dict[str, Any], steps: int = 12) -> None:
    """The weights after every step are those of the float64 oracle; a tensor without a gradient is passed over."""
    bounded = options.get("budget") is None
    pairs, labels = _pairs(torch.float64, options.pop("strides", "contiguous")), label_elements(plan)
    group = Group(
        lr=0.02,
        betas=options.get("betas", (0.9, 0.999)),
        weight_decay=options.get("weight_decay", 0.01),
        maximize=options.get("maximize", False),
    )
    oracle = Oracle(
        [to_numpy(p, tuple(p.shape)) for _, p in pairs],
        labels,
        [group] * len(pairs),
        factor=0.2 if bounded else None,
        tau=0.03 if bounded else None,
        per_bin=options.get("second_moment") == "bin",
    )
    rtol = 1e-5 if oracle.per_bin else 1e-9  # one second moment a bin is kept in float32
    optimizer = make(pairs, lr=0.02, plan=plan, direction="adam", **options)
    for step in range(steps):
        gradients: list[torch.Tensor | None] = list(_gradients(step, torch.float64, size=30.0 if step == 5 else 1.0))
        if step in (1, 4):
            gradients[3] = None
        for (_, p), gradient in zip(pairs, gradients, strict=True):
            p.grad = gradient
        optimizer.step()
        oracle.step([None if g is None else to_numpy(g, tuple(g.shape)) for g in gradients])
        for (name, p), want in zip(pairs, oracle.weights, strict=True):
            np.testing.assert_allclose(
                to_numpy(p, want.shape), want, rtol=rtol, atol=rtol * 1e-3, err_msg=f"step {step}, {name}"
            )


def check_rows_move_by_a_share_of_their_length(make: Make, plan: Plan, dtype: torch.dtype) -> None:
    """Whatever the gradients, no bin's update is longer than 3 % of the bin; here without decay, which is beside it."""
    pairs, labels = _pairs(dtype), label_elements(plan)
    optimizer = make(pairs, lr=3.0, plan=plan, direction="adam", weight_decay=0.0)
    slack = 1 + 8 * torch.finfo(dtype).eps
    for step, size in enumerate([1e6, 1.0, 1e-6, 1e3]):
        before = [to_numpy(p, tuple(p.shape)) for _, p in pairs]
        for (_, p), gradient in zip(pairs, _gradients(step, dtype, size=size), strict=True):
            p.grad = gradient
        optimizer.step()
        for (name, p), old, canvas in zip(pairs, before, labels, strict=True):
            new = to_numpy(p, old.shape)
            for b in np.unique(canvas):
                moved, length = (np.linalg.norm(x[canvas == b]) for x in (new - old, old))
                bound = 0.03 * max(length, 0.01 * np.sqrt((canvas == b).sum()))
                # A weight is stored in its own dtype: half a unit in the last place of each entry may be added.
                stored = torch.finfo(dtype).eps * length
                assert moved <= bound * slack + stored, f"step {step}, {name}, bin {b} moved {moved}, bound {bound}"


def check_a_bad_bin_is_passed_over(make: Make, plan: Plan, bad: float, options: dict[str, Any]) -> None:
    """A bin with a bad value keeps weights and moments; the others move as if nothing had happened."""
    labels = label_elements(plan)
    target = int(labels[3].reshape(-1)[-1])
    runs = []
    for broken in (False, True):
        pairs = _pairs(torch.float32)
        optimizer = make(pairs, lr=0.02, plan=plan, direction="adam", **options)
        for step in range(4):
            for (_, p), gradient in zip(pairs, _gradients(step, torch.float32), strict=True):
                p.grad = gradient
            if broken and step == 2:
                pairs[3][1].grad.view(-1)[-1] = bad
                mask = torch.from_numpy(labels[3] == target)
                kept = [pairs[3][1].detach()[mask].clone(), optimizer.state[pairs[3][1]]["exp_avg"][mask].clone()]
            optimizer.step()
            if broken and step == 2:
                now = [pairs[3][1].detach()[mask], optimizer.state[pairs[3][1]]["exp_avg"][mask]]
                assert all(torch.equal(a, b) for a, b in zip(kept, now, strict=True)), "the bad bin moved"
        runs.append([p.detach().clone() for _, p in pairs])
        assert all(torch.isfinite(p).all() for _, p in pairs), "a bad value reached the weights"
    for (name, _), canvas, clean, after in zip(parameters(LAYOUT), labels, *runs, strict=True):
        others = torch.from_numpy(np.asarray(canvas != target))
        assert torch.equal(clean[others], after[others]), f"{name}: another bin moved differently"


def check_saving_changes_nothing(make: Make, plan: Plan, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Saved after three steps and loaded into a fresh optimizer, every later step is the same bit for bit."""
    runs = []
    for save in (True, False):
        pairs = _pairs(dtype)
        optimizer = make(pairs, lr=0.02, plan=plan, direction="adam", **options)
        for step in range(7):
            if save and step == 3:
                state = optimizer.state_dict()
                optimizer = make(pairs, lr=0.5, plan=plan, direction="adam", **options)
                optimizer.load_state_dict(state)
            for (_, p), gradient in zip(pairs, _gradients(step, dtype), strict=True):
                p.grad = gradient
            optimizer.step()
        runs.append([p.detach().clone() for _, p in pairs])
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b), "a round trip changed a later step"


def check_gradients_stay(make: Make, plan: Plan) -> None:
    """Ascending or descending, the optimizer reads gradients and never writes them."""
    for maximize in (False, True):
        pairs = _pairs(torch.float64)
        optimizer = make(pairs, lr=0.02, plan=plan, direction="adam", maximize=maximize)
        gradients = _gradients(0, torch.float64)
        for (_, p), gradient in zip(pairs, gradients, strict=True):
            p.grad = gradient.clone()
        optimizer.step()
        for (name, p), gradient in zip(pairs, gradients, strict=True):
            assert torch.equal(p.grad, gradient), f"{name}: the gradient was written"


def unbounded() -> Any:
    return gs.Fixed(float("inf"))
