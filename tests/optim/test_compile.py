"""torch.compile of the model, of a step of GSO and of a training step with a splitter: traced once, not again."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import gradsplit as gs

# torch's compiler uses parts of torch that torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

INF = float("inf")


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
    ((model(x) - step % 3).square().mean() * (50.0 if step == 3 else 1.0)).backward()


def assert_close(ours, theirs):
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


OPTIONS = {
    "default": {},
    "bin": {"second_moment": "bin"},
    "history": {"budget": (gs.Ema(1.1, warmup=1), gs.Percentile(0.5), gs.RelativeStep())},
    "tree": {"plan": "tree_sp", "budget": {"root": gs.Fixed(1.0), "module": gs.Ema(1.5), "bin": gs.RelativeStep()}},
    "nearest": {"plan": "tree_sp", "budget": {"root": gs.Fixed(1.0), "bin": gs.Fixed(0.9)}, "rule": "nearest"},
    "ascending, capturable": {"maximize": True, "capturable": True, "backend": "eager"},
}


# torch's scheduler looks for calls of the original step and does not see those of a compiled one.
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("name", OPTIONS)
def test_a_step_of_gso_is_one_graph_that_serves_all_steps_of_a_schedule(name):
    model, other = model_of(), model_of()
    compiled, eager = (gs.GSO(m, lr=torch.tensor(0.01), **OPTIONS[name], direction="adam") for m in (model, other))
    counter = CompileCounter()
    # First the graph: a scheduler wraps `step` in a function that torch does not trace.
    step_of_graph = torch.compile(compiled.step, backend=counter, fullgraph=True)
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 10) for o in (compiled, eager)]
    for step in range(100 if name == "default" else 8):
        for m, optimizer, update in ((model, compiled, step_of_graph), (other, eager, eager.step)):
            optimizer.zero_grad()
            backward(m, step)
            update()
        for scheduler in schedulers:
            scheduler.step()
    assert counter.frame_count == 1
    assert_close(model, other)


def test_a_number_as_learning_rate_may_stay_as_it_is_without_another_graph():
    model = model_of()
    optimizer, counter = gs.GSO(model, lr=0.01, direction="adam"), CompileCounter()
    update = torch.compile(optimizer.step, backend=counter, fullgraph=True)
    for step in range(5):
        backward(model, step)
        update()
    assert counter.frame_count == 1


def test_a_parameter_that_gets_its_first_gradient_later_is_one_more_graph():
    model, other = model_of(), model_of()
    counter = CompileCounter()
    optimizers = [gs.GSO(m, lr=torch.tensor(0.01), direction="adam") for m in (model, other)]
    update = torch.compile(optimizers[0].step, backend=counter)
    for step in range(6):
        for m, optimizer, run in zip((model, other), optimizers, (update, optimizers[1].step), strict=True):
            optimizer.zero_grad()
            backward(m, step)
            if step < 3:
                m[0].weight.grad = None
            run()
    assert counter.frame_count == 2
    assert_close(model, other)


def test_a_traced_step_passes_over_a_bad_bin_as_any_other_does():
    model, other = model_of(), model_of()
    optimizers = [gs.GSO(m, lr=torch.tensor(0.01), direction="adam") for m in (model, other)]
    update = torch.compile(optimizers[0].step, backend="eager", fullgraph=True)
    for step in range(3):
        for m, optimizer, run in zip((model, other), optimizers, (update, optimizers[1].step), strict=True):
            optimizer.zero_grad()
            backward(m, step)
            m[2].weight.grad[1, 0] = INF if step == 1 else 0.0
            run()
    assert_close(model, other)


BUDGETS = {
    "default": None,
    "relative": gs.Relative(0.01),
    "history": (gs.Ema(1.1, warmup=1), gs.ZScore(2.0), gs.Percentile(0.5)),
}


@pytest.mark.parametrize(("name", "attached"), [("default", True), ("relative", False), ("history", False)])
def test_a_compiled_training_step_with_a_splitter_settles_and_equals_eager(name, attached):
    """With a tensor as rate, nothing is compiled from the third step on; records are made outside of the graphs."""
    model, other, records = model_of(), model_of(), []
    first, second = (torch.optim.SGD(m.parameters(), torch.tensor(0.01), momentum=0.9) for m in (model, other))
    ours = gs.GradientSplitter(model, budget=BUDGETS[name], optimizer=first, sinks=[records.append])
    theirs = gs.GradientSplitter(other, budget=BUDGETS[name], optimizer=second)
    if attached:
        ours.attach(first)
    counter, frames = CompileCounter(), []

    @torch.compile(backend=counter)
    def train(x):
        first.zero_grad()
        (model(x) - 1).square().mean().backward()
        if not attached:
            ours.step()
        first.step()

    for step in range(6):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        train(x)
        frames.append(counter.frame_count)
        second.zero_grad()
        (other(x) - 1).square().mean().backward()
        theirs.step()
        second.step()
    assert frames[2:] == frames[1:2] * 4
    assert [record.step for record in records] == list(range(6))
    assert_close(model, other)


def test_the_gradients_of_a_compiled_model_are_bounded_under_the_models_own_names():
    model = model_of()
    compiled = torch.compile(model, backend="aot_eager")
    splitter = gs.GradientSplitter(compiled, budget=gs.Fixed(1e-3))
    compiled(torch.ones(2, 4)).sum().backward()
    record = splitter.step()
    assert all(float(p.grad[0].norm()) <= 1e-3 * (1 + 1e-6) for p in model.parameters() if p.dim() > 1)
    assert record.worst(1)[0].name.removeprefix("_orig_mod.").startswith(("0.", "2."))
    optimizer = gs.GSO(compiled, lr=0.1, direction="adam")
    before = model[0].weight.detach().clone()
    optimizer.step()
    assert not torch.equal(before, model[0].weight)


@pytest.mark.skipif(shutil.which("gcc") is None, reason="inductor needs a C++ compiler")
def test_inductors_code_makes_the_same_steps():
    model, other = model_of(), model_of()
    optimizers = [gs.GSO(m, lr=torch.tensor(0.01), direction="adam") for m in (model, other)]
    update = torch.compile(optimizers[0].step, fullgraph=True)
    for step in range(4):
        for m, optimizer, run in zip((model, other), optimizers, (update, optimizers[1].step), strict=True):
            optimizer.zero_grad()
            backward(m, step)
            run()
    assert_close(model, other)
