"""torch.compile of the model, of a step of GSO and of a training step with a splitter: traced once, not again."""

from __future__ import annotations

import copy
import gc
import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import gradsplit as gs
from tests.optim.small import model_of

# torch's compiler uses parts of torch that torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

INF = float("inf")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    gc.collect()  # a plan of an earlier test that goes while guards are made would move the others in a weak dictionary
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def backward(model, step):
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
    ((model(x) - step % 3).square().mean() * (50.0 if step == 3 else 1.0)).backward()


def assert_close(ours, theirs):
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


ADAM = {"direction": "adam"}
TREE = {"root": gs.Fixed(1.0), "module": gs.Ema(1.5), "bin": gs.RelativeStep()}
OPTIONS = {
    "adam": ADAM,
    "adam, one moment per row": {"second_moment": "bin", **ADAM},
    "adam, history": {"budget": (gs.Ema(1.1, warmup=1), gs.Percentile(0.5), gs.RelativeStep()), **ADAM},
    "adam, tree": {"plan": "tree_sp", "budget": TREE, **ADAM},
    "adam, nearest": {
        "plan": "tree_sp",
        "budget": {"root": gs.Fixed(1.0), "bin": gs.Fixed(0.9)},
        "rule": "nearest",
        **ADAM,
    },
    "adam, ascending, capturable": {"maximize": True, "capturable": True, "backend": "eager", **ADAM},
    "share": {},
    "share, capturable": {"capturable": True},
    "share, steps": {"steps": 40},
    "share, constants": {"maximize": True, "betas": (0.8, 0.95), "weight_decay": 0.1},
    "share, blocks": {"blocks": {"0.weight": 2}},
    "share, all Adam": {"direction": {"*": "adam"}},
    "share, history": {"budget": (gs.Ema(1.1, warmup=1), gs.Relative(0.2))},
}
FRONTS = {"adam": ADAM, "share": {}}


# torch's scheduler looks for calls of the original step and does not see those of a compiled one.
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("name", OPTIONS)
def test_a_step_of_gso_is_one_graph_that_serves_all_steps_of_a_schedule(name):
    model, other = model_of(), model_of()
    compiled, eager = (gs.GSO(m, lr=torch.tensor(0.01), **OPTIONS[name]) for m in (model, other))
    counter = CompileCounter()
    # First the graph: a scheduler wraps `step` in a function that torch does not trace.
    step_of_graph = torch.compile(compiled.step, backend=counter, fullgraph=True)
    schedulers = []
    if "steps" not in name:
        schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 10) for o in (compiled, eager)]
    for step in range(100 if name == "adam" else 8):
        for m, optimizer, update in ((model, compiled, step_of_graph), (other, eager, eager.step)):
            optimizer.zero_grad()
            backward(m, step)
            update()
        for scheduler in schedulers:
            scheduler.step()
    assert counter.frame_count == 1
    assert_close(model, other)


def both(model, other, optimizers, update, steps, spoil=lambda model, step: None):
    """Train two models, one by a traced step and one by an eager one."""
    for step in steps:
        for m, optimizer, run in zip((model, other), optimizers, (update, optimizers[1].step), strict=True):
            optimizer.zero_grad()
            backward(m, step)
            spoil(m, step)
            run()


@pytest.mark.parametrize("front", FRONTS)
def test_records_and_the_count_of_a_traced_step_are_those_of_an_eager_one(front):
    model, other = model_of(), model_of()
    optimizers = [gs.GSO(m, lr=torch.tensor(0.01), **FRONTS[front]) for m in (model, other)]
    update = torch.compile(optimizers[0].step, backend="eager", fullgraph=True)
    for step in range(4):
        both(model, other, optimizers, update, [step])
        ours, theirs = (optimizer.records[0] for optimizer in optimizers)
        assert ours.step == theirs.step == step
        torch.testing.assert_close(ours.norm_B, theirs.norm_B, rtol=1e-4, atol=1e-6)
    counts = [optimizer.state_dict().get("gradsplit_count") for optimizer in optimizers]
    assert counts == [None if front == "adam" else 4] * 2
    copied = copy.deepcopy(optimizers[0])
    assert copied._clock.made == 4


@pytest.mark.parametrize("front", FRONTS)
def test_sinks_see_every_traced_step(front):
    model, other = model_of(), model_of()
    seen = [], []
    optimizers = [
        gs.GSO(m, lr=torch.tensor(0.01), sinks=[s.append], **FRONTS[front])
        for m, s in zip((model, other), seen, strict=True)
    ]
    counter = CompileCounter()
    both(model, other, optimizers, torch.compile(optimizers[0].step, backend=counter), range(5))
    assert [record.step for record in seen[0]] == [record.step for record in seen[1]] == list(range(5))
    assert counter.frame_count == 1
    for ours, theirs in zip(*seen, strict=True):
        torch.testing.assert_close(ours.decision.scale_B, theirs.decision.scale_B, rtol=1e-4, atol=1e-6)
        if front == "share":
            torch.testing.assert_close(ours.cosine_B, theirs.cosine_B, rtol=0, atol=1e-4)
    assert_close(model, other)


def test_behind_a_traced_step_beyond_the_end_the_next_look_warns_once():
    model = model_of()
    optimizer = gs.GSO(model, lr=torch.tensor(0.03), steps=3)
    update = torch.compile(optimizer.step, backend="eager", fullgraph=True)
    for step in range(4):
        optimizer.zero_grad()  # a warning here would be an error
        backward(model, step)
        update()
    with pytest.warns(UserWarning, match=r"GSO\(steps=3\): step 3 is beyond the end of the run"):
        optimizer.zero_grad()
    backward(model, 4)
    update()
    optimizer.zero_grad()
    assert optimizer.state_dict()["gradsplit_count"] == 5


def test_the_built_in_schedule_goes_on_in_a_traced_step():
    model, other = model_of(), model_of()
    optimizers = [gs.GSO(m, lr=torch.tensor(0.03), steps=6) for m in (model, other)]
    both(model, other, optimizers, torch.compile(optimizers[0].step, backend="eager"), range(6))
    assert_close(model, other)
    assert optimizers[0].state_dict()["gradsplit_count"] == optimizers[1].state_dict()["gradsplit_count"] == 6


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


@pytest.mark.parametrize("front", FRONTS)
def test_a_traced_step_passes_over_a_bad_bin_as_any_other_does(front):
    def spoil(m, step):
        m[2].weight.grad[1, 0] = INF if step == 1 else 0.0

    model, other = model_of(), model_of()
    optimizers = [gs.GSO(m, lr=torch.tensor(0.01), **FRONTS[front]) for m in (model, other)]
    both(model, other, optimizers, torch.compile(optimizers[0].step, backend="eager", fullgraph=True), range(3), spoil)
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
@pytest.mark.parametrize("front", FRONTS)
def test_inductors_code_makes_the_same_steps(front):
    model, other = model_of(), model_of()
    optimizers = [gs.GSO(m, lr=torch.tensor(0.01), **FRONTS[front]) for m in (model, other)]
    both(model, other, optimizers, torch.compile(optimizers[0].step, fullgraph=True), range(4))
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
