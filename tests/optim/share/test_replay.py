"""A step that is played again, as a captured CUDA graph is; and one that fails half-way."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gradsplit as gs
from gradsplit.optim import gso, parts
from tests.optim.amp_runs import assert_same, snapshot
from tests.optim.launches import VIEWS, give, gpt

WAITS = ("local_scalar_dense", "nonzero", "is_nonzero", "equal")


class Tape(TorchDispatchMode):
    """Plays what was dispatched again, on the same memory, as a CUDA graph does; nothing of Python runs then."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").split(".")[0].lstrip("_")
        assert name not in WAITS, f"{name} waits for the device"
        made = func(*args, **(kwargs or {}))
        if name not in VIEWS and not func.name().startswith("profiler::"):
            self.calls.append((func, args, kwargs or {}, made))
        return made

    def play(self):
        for func, args, kwargs, made in self.calls:
            again = func(*args, **kwargs)
            if not any(argument.alias_info for argument in func._schema.returns):
                for old, new in zip(tree_leaves(made), tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor):
                        old.copy_(new)


OPTIONS = {
    "default": {},
    "the built-in schedule": {"steps": 8},
    "a history": {"budget": (gs.Ema(1.1, warmup=1), gs.Relative(0.2))},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_captured_step_goes_on_when_it_is_played_again(name, monkeypatch):
    monkeypatch.setattr(parts, "_is_number", lambda step: False)  # counters are written by torch, as on a card
    monkeypatch.setattr(gso, "check_numbers", lambda *_, **__: None)  # rates on a card are not looked at
    models = [gpt(blocks=1) for _ in range(2)]
    captured, usual = (
        gs.GSO(m, lr=torch.tensor(0.03), capturable=True, backend="eager", **OPTIONS[name]) for m in models
    )
    captured._told = usual._told = True  # on a card the count is not looked at
    for model in models:
        give(model, 0)
    for seed in range(2):
        for model, optimizer in zip(models, (captured, usual), strict=True):
            _into_place(model, seed)
            optimizer.step()
    tape = Tape()
    for seed in range(2, 6):
        for model in models:
            _into_place(model, seed, 1000.0 if seed == 4 else 1.0)
        captured.param_groups[0]["lr"].fill_(0.03 / seed)
        usual.param_groups[0]["lr"].fill_(0.03 / seed)
        if seed == 2:
            with torch.no_grad(), tape:
                captured.step()
        else:
            with torch.no_grad():
                tape.play()
        usual.step()
        assert_same(*(snapshot(m, o) for m, o in zip(models, (captured, usual), strict=True)))


def _into_place(model, seed, size=1.0):
    """Other gradients in the same memory."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad.copy_(size * torch.randn(p.shape, generator=generator))


def test_the_tape_tells_a_step_that_keeps_something_in_python():
    x, kept = torch.zeros(()), torch.ones(())
    tape = Tape()
    with tape:
        kept = kept + 1  # not in place
        x.add_(kept)
    tape.play()
    assert float(x) == 4.0  # 2 + 2; in place it would be 2 + 3


class Failure(TorchDispatchMode):
    """Raises at one of the operations, as a launch or an allocation may."""

    def __init__(self, at):
        super().__init__()
        self.left, self.name = at, ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").split(".")[0].lstrip("_")
        if name not in VIEWS and not name.startswith("profiler::"):
            self.left -= 1
            if self.left == -1:
                self.name = func.name()
                raise torch.OutOfMemoryError("planted")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("budget", [gs.Relative(0.2), (gs.Ema(1.1, warmup=1), gs.Relative(0.2))], ids=str)
def test_a_step_that_fails_before_it_writes_leaves_everything_as_it_was(budget):
    """Whatever operation fails: up to the first one that writes, which allocates nothing."""
    model = gpt(width=4, blocks=1)
    optimizer = gs.GSO(model, backend="eager", budget=budget)
    for seed in range(2):
        give(model, seed)
        optimizer.step()
    give(model, 2)
    before = copy.deepcopy(snapshot(model, optimizer))
    at, tried = 0, 0
    while True:
        failure = Failure(at)
        try:
            with failure:
                optimizer.step()
            break
        except torch.OutOfMemoryError:
            pass
        if failure.name == "aten::_foreach_copy_" and "written" in _where(failure, model, before):
            break
        assert_same(before, snapshot(model, optimizer))
        at, tried = at + 5, tried + 1
    assert tried > 40, tried


def _where(failure, model, before):
    moved = any(not torch.equal(a, b) for a, b in zip(before[0], model.parameters(), strict=True))
    return "written" if moved else ""
