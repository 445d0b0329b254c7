"""torch.compile of a step by share, and steps that can be captured."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import gradsplit as gs

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def model_of():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def backward(model, step):
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
    ((model(x) - step % 3).square().mean() * (1000.0 if step == 4 else 1.0)).backward()


def assert_close(ours, theirs):
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


OPTIONS = {
    "default": {},
    "capturable": {"capturable": True},
    "groups of constants": {"maximize": True, "betas": (0.8, 0.95), "weight_decay": 0.1},
    "blocks": {"blocks": {"0.weight": 2}},
    "all Adam": {"direction": {"*": "adam"}},
    "history": {"budget": (gs.Ema(1.1, warmup=1), gs.Relative(0.2))},
}


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("name", OPTIONS)
def test_a_step_by_share_is_one_graph_that_serves_all_steps_of_a_schedule(name):
    model, other = model_of(), model_of()
    compiled, eager = (gs.GSO(m, lr=torch.tensor(0.03), **OPTIONS[name]) for m in (model, other))
    counter = CompileCounter()
    update = torch.compile(compiled.step, backend=counter)
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 10) for o in (compiled, eager)]
    for step in range(8):
        for m, optimizer, run in ((model, compiled, update), (other, eager, eager.step)):
            optimizer.zero_grad()
            backward(m, step)
            run()
        for scheduler in schedulers:
            scheduler.step()
    assert counter.frame_count == 1
    assert_close(model, other)


def test_a_traced_step_passes_over_a_bad_row():
    model, other = model_of(), model_of()
    optimizers = [gs.GSO(m, lr=torch.tensor(0.03)) for m in (model, other)]
    update = torch.compile(optimizers[0].step, backend="eager")
    for step in range(3):
        for m, optimizer, run in zip((model, other), optimizers, (update, optimizers[1].step), strict=True):
            optimizer.zero_grad()
            backward(m, step)
            m[2].weight.grad[1, 0] = float("inf") if step == 1 else 0.0
            run()
    assert_close(model, other)


def test_the_built_in_schedule_goes_on_in_a_traced_step():
    model, other = model_of(), model_of()
    optimizers = [gs.GSO(m, lr=torch.tensor(0.03), steps=6) for m in (model, other)]
    update = torch.compile(optimizers[0].step, backend="eager")
    for step in range(6):
        for m, optimizer, run in zip((model, other), optimizers, (update, optimizers[1].step), strict=True):
            optimizer.zero_grad()
            backward(m, step)
            run()
    assert_close(model, other)
    assert optimizers[0].state_dict()["gradsplit_count"] == optimizers[1].state_dict()["gradsplit_count"] == 6


@pytest.mark.skipif(shutil.which("gcc") is None, reason="inductor needs a C++ compiler")
def test_inductors_code_makes_the_same_steps():
    model, other = model_of(), model_of()
    optimizers = [gs.GSO(m, lr=torch.tensor(0.03)) for m in (model, other)]
    update = torch.compile(optimizers[0].step)
    for step in range(4):
        for m, optimizer, run in zip((model, other), optimizers, (update, optimizers[1].step), strict=True):
            optimizer.zero_grad()
            backward(m, step)
            run()
    assert_close(model, other)


def test_a_capturable_step_keeps_its_counters_beside_the_parameters_and_reads_no_value(monkeypatch):
    """Where a number of a tensor is read, a device is waited for, and a graph cannot be captured."""
    model = model_of()
    optimizer = gs.GSO(model, lr=torch.tensor(0.03), capturable=True, fused=False)
    backward(model, 0)
    optimizer.step()
    optimizer.zero_grad()
    backward(model, 1)

    def refuse(self, *_):
        raise AssertionError("a tensor was read")

    with monkeypatch.context() as m:
        m.setattr(torch.compiler, "is_compiling", lambda: True)  # the one reading that is free on the CPU is left out
        for reading in ("item", "__bool__", "__float__", "tolist", "numpy"):
            m.setattr(torch.Tensor, reading, refuse)
        optimizer.step()
    assert all(state["step"] == 2 for state in optimizer.state.values())
