"""Budgets with any constants at any levels, over gradients with any values: what is kept is finite and not longer."""

from __future__ import annotations

import random
import warnings
from dataclasses import fields
from typing import Any

import torch

import gradsplit as gs
from benchmarks.fuzz.draws import EDGES, name, number
from benchmarks.fuzz.layouts import sound_layout
from benchmarks.fuzz.verdict import outcome
from gradsplit.budget import BUDGETS
from gradsplit.plan import LEVELS, STRATEGIES

__all__ = ["budgets", "filled_gradients"]


def budgets(rng: random.Random) -> str:
    """A `GradientSplitter` of random budgets, stepped over bad gradients."""
    layout = sound_layout(rng)
    pairs = [(n, torch.nn.Parameter(torch.randn(s))) for n, s in zip(layout.names, layout.shapes, strict=True)]
    optimizer = torch.optim.SGD([p for _, p in pairs], lr=rng.choice((0.1, 0.0, 1e-30, 1e6)))
    made: list[Any] = []

    def make() -> gs.GradientSplitter:
        made.append(_mapping(rng))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of limits that can never bind
            return gs.GradientSplitter(
                pairs,
                rng.choice((*STRATEGIES, *STRATEGIES, *STRATEGIES, name(rng))),
                made[-1],
                optimizer=optimizer,
                backend=rng.choice(("reference", "auto")),
                rule=rng.choice((*["bottom_up", "nearest"] * 8, name(rng))),
                on_nonfinite=rng.choice((*["zero"] * 18, "raise", "ignore")),
            )

    kind, splitter = outcome(make, what="a random budget")
    if kind == "refused":
        return kind
    for _ in range(rng.randint(1, 3)):
        before = filled_gradients(rng, [p for _, p in pairs])
        kind, record = outcome(splitter.step, what=f"{made} over {layout}")
        if kind == "refused":
            return kind
        scale_B = record.decision.scale_B
        assert ((scale_B >= 0) & (scale_B <= 1)).all(), (made, scale_B)
        for (_, p), was in zip(pairs, before, strict=True):
            assert p.grad is not None and p.grad.isfinite().all(), (made, was)
            held = was.isfinite()
            assert (p.grad[held].abs() <= was[held].abs()).all(), (made, was, p.grad)
        assert record.worst(3) is not None and str(record)
    return "ok"


def _mapping(rng: random.Random) -> Any:
    if rng.random() < 0.6:
        return _budget(rng)
    if rng.random() < 0.5:
        return {level: _budget(rng) for level in rng.sample(("root", "tensor", "bin"), 2)}
    levels = [*LEVELS, "row", ""] if rng.random() < 0.1 else list(LEVELS)
    return {rng.choice(levels): _budget(rng) for _ in range(rng.randint(0, 3))}


def _budget(rng: random.Random) -> Any:
    kind = rng.random()
    if kind < 0.1:
        return rng.choice((*BUDGETS, "emma", None, 3, gs.Ema, (), ("ema", gs.Fixed(1.0)), [], 1.5))
    row = rng.choice(list(BUDGETS.values()))
    options: dict[str, Any] = {}
    for one in fields(row):
        if rng.random() < 0.15:
            options[one.name] = rng.choice((number(rng), rng.choice(EDGES), 10, "1", None, True, (1.0, 2.0)))
        elif rng.random() < 0.4:
            options[one.name] = rng.choice((0.9, 0.5, 2.0, 1e-3, 1e3, 3))
    return row(**options)


def filled_gradients(rng: random.Random, parameters: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    """Give every parameter a gradient, some of its elements at an edge; return copies."""
    for p in parameters:
        p.grad = torch.randn_like(p) * min(10.0 ** rng.randint(-30, 30), 1e30)
        if rng.random() < 0.4:
            edge = rng.choice(EDGES)
            p.grad.view(-1)[rng.randrange(p.numel())] = edge if abs(edge) < 3.3e38 else float("inf")
    return [p.grad.clone() for p in parameters if p.grad is not None]
