"""Damaged state dicts of splitter and optimizer: refused with nothing changed, or taken over and good for a step."""

from __future__ import annotations

import copy
import random
import warnings
from typing import Any

import torch
from torch import nn

import gradsplit as gs
from benchmarks.fuzz.draws import damaged
from benchmarks.fuzz.verdict import outcome

__all__ = ["states"]

_BUDGETS = (gs.Ema(1.5, warmup=1), gs.ZScore(warmup=2), gs.Percentile(0.9), gs.RelativeStep(), gs.Fixed(1.0))


def states(rng: random.Random) -> str:
    """Load a damaged state into a splitter, then step."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    budget: Any = {level: rng.choice(_BUDGETS) for level in rng.sample(("root", "tensor", "bin"), rng.randint(1, 3))}
    plan = rng.choice(("xsp", "per_tensor", "lbf"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of limits that can never bind
        splitter = gs.GradientSplitter(model, plan, budget, optimizer=optimizer, backend="reference")
        if plan == "lbf":
            splitter.calibrate(lambda: _backward(model), 2)
    for _ in range(2):
        _backward(model)
        splitter.step()
    before = copy.deepcopy(splitter.state_dict())
    state = damaged(rng, _with_lists(before), times=rng.choice((0, 1, 1, 2, 4)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        kind, _ = outcome(lambda: splitter.load_state_dict(state), what=repr(state))
    if kind == "refused":
        assert _same(splitter.state_dict(), before), "a refused state has changed something"
    _backward(model)
    step_kind, record = outcome(splitter.step, what=f"a step after {state!r}")
    assert step_kind == "ok", record
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters()), state
    return kind


def _with_lists(state: dict[str, Any]) -> dict[str, Any]:
    """The state with its tensors as lists, which `damaged` knows how to damage; loading takes both."""
    history = {key: [value.tolist() for value in values] for key, values in state["history"].items()}
    return {**state, "history": history}


def _backward(model: nn.Module) -> None:
    model.zero_grad()
    model(torch.randn(4, 3)).square().sum().backward()


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return set(a) == set(b) and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)
