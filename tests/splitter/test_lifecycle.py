"""A splitter in a training run: attached, calibrated, saved, loaded, with closures, accumulation and sinks."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import gradsplit as gs
from tests.laws.cases import BUDGETS


def model_of(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2))


def backward(model, step, *, size=1.0):
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(8, 5, generator=generator), torch.randn(8, 2, generator=generator)
    loss = size * (model(x) - y).square().mean()
    loss.backward()
    return loss


def train(model, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        backward(model, step, size=1e3 if step % 4 == 3 else 1.0)
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def assert_equal(a, b):
    assert len(a) == len(b)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("strategy", ["xsp", "lbf", "tree_sp"])
def test_a_run_saved_and_loaded_through_a_file_goes_on_bit_for_bit(budget, strategy):
    def start(seed):
        model = model_of(seed)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        splitter = gs.GradientSplitter(model, strategy, BUDGETS[budget], optimizer=optimizer)
        splitter.calibrate(lambda: backward(model, 99), 3)
        splitter.attach(optimizer)
        return model, optimizer, splitter

    model, optimizer, _ = start(0)
    straight = train(model, optimizer, range(10))

    model, optimizer, splitter = start(0)
    train(model, optimizer, range(5))
    file = io.BytesIO()
    torch.save({"m": model.state_dict(), "o": optimizer.state_dict(), "s": splitter.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    model, optimizer, splitter = start(1)  # other weights, hence other history and another calibrated plan
    model.load_state_dict(saved["m"])
    optimizer.load_state_dict(saved["o"])
    splitter.load_state_dict(saved["s"])
    assert_equal(train(model, optimizer, range(5, 10)), straight)
    assert splitter.step_count == 10


def test_the_largest_rate_is_kept_when_the_state_is_loaded_before_there_is_an_optimizer():
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.4)
    splitter = gs.GradientSplitter(model, optimizer=optimizer)
    optimizer.param_groups[0]["lr"] = 0.1
    backward(model, 0, size=1e9)
    limits = [splitter.step().decision.limit_B]
    fresh = gs.GradientSplitter(model)
    fresh.load_state_dict(splitter.state_dict())
    fresh.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    limits.append(fresh.step().decision.limit_B)
    assert torch.equal(*limits)


def test_calibrating_again_keeps_the_largest_rate():
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.4)
    splitter = gs.GradientSplitter(model, "lbf", optimizer=optimizer)
    optimizer.param_groups[0]["lr"] = 0.1
    splitter.calibrate(lambda: backward(model, 0), 2)
    assert splitter.state_dict()["top_lr"] == [0.4]


def test_attached_it_does_what_a_call_before_the_step_does():
    finals = []
    for attached in (True, False):
        model = model_of()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        splitter = gs.GradientSplitter(model, "xsp", gs.Fixed(0.05), optimizer=optimizer)
        if attached:
            splitter.attach(optimizer)
        for step in range(4):
            optimizer.zero_grad()
            backward(model, step)
            if not attached:
                splitter.step()
            optimizer.step()
        finals.append([p.detach().clone() for p in model.parameters()])
        assert splitter.step_count == 4
    assert_equal(*finals)


def test_detached_it_does_nothing_more():
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    splitter = gs.GradientSplitter(model, "xsp", gs.Fixed(0.05))
    handle = splitter.attach(optimizer)
    train(model, optimizer, range(2))
    handle.remove()
    handle.remove()
    train(model, optimizer, range(3))
    assert splitter.step_count == 2


def closure_of(model, optimizer, step, calls):
    def closure():
        optimizer.zero_grad()
        loss = backward(model, step)
        calls.append(float(loss.detach()))
        return loss

    return closure


def test_inside_a_closure_the_first_call_decides_and_the_others_follow():
    """LBFGS calls the closure many times and compares the gradients; one record per step, one scale per bin."""
    model, calls, records = model_of(), [], []
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=5)
    splitter = gs.GradientSplitter(model, "per_tensor", gs.Fixed(0.01), sinks=[records.append])
    splitter.attach(optimizer)
    returned = optimizer.step(closure_of(model, optimizer, 0, calls))
    assert len(calls) > len(records) == splitter.step_count == 1
    assert float(returned.detach()) == calls[0]
    assert records[0].norm_after_B().max() <= 0.01 * (1 + 1e-6)
    assert (records[0].decision.scale_B < 1).any()
    optimizer.step(closure=closure_of(model, optimizer, 1, calls))
    assert len(records) == 2


def test_with_a_closure_and_without_a_first_order_step_is_the_same():
    finals = []
    for with_closure in (True, False):
        model = model_of()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        gs.GradientSplitter(model, "xsp", gs.Fixed(0.05)).attach(optimizer)
        for step in range(3):
            closure = closure_of(model, optimizer, step, [])
            if with_closure:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
        finals.append([p.detach().clone() for p in model.parameters()])
    assert_equal(*finals)


def test_under_accumulation_it_acts_once_on_the_sum():
    model, other = model_of(), model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    splitter = gs.GradientSplitter(model, "xsp", gs.Fixed(0.05))
    splitter.attach(optimizer)
    for step in range(3):
        backward(model, step)
        backward(other, step)
    optimizer.step()
    sums = [p.grad.clone() for p in other.parameters()]
    gs.GradientSplitter(other, "xsp", gs.Fixed(0.05)).step()
    assert_equal([p.grad for p in model.parameters()], [p.grad for p in other.parameters()])
    assert not all(torch.equal(a, p.grad) for a, p in zip(sums, other.parameters(), strict=True))
    assert splitter.step_count == 1


def test_a_healthy_run_with_generous_limits_is_the_run_without_a_splitter():
    finals = []
    for split in (True, False):
        model = model_of()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        if split:
            gs.GradientSplitter(model, "xsp", {"root": gs.Fixed(1e6), "bin": gs.Relative(1e6)}).attach(optimizer)
        finals.append(train(model, optimizer, range(6)))
    assert_equal(*finals)


def test_a_step_without_gradients_warns_and_teaches_nothing():
    model = model_of()
    splitter = gs.GradientSplitter(model, "xsp", gs.Ema(warmup=1))
    backward(model, 0)
    splitter.step()
    before = copy.deepcopy(splitter.state_dict()["history"])
    model.zero_grad()
    with pytest.warns(UserWarning, match="no parameter has a gradient. Call it after backward"):
        record = splitter.step()
    assert float(record.norm_B.sum()) == 0
    for key, arrays in splitter.state_dict()["history"].items():
        assert_equal(arrays, before[key])


def test_sinks_see_every_record_in_order():
    model, seen = model_of(), []
    splitter = gs.GradientSplitter(model, "xsp", gs.Fixed(0.05), sinks=(seen.append,))
    records = []
    for step in range(3):
        backward(model, step)
        records.append(splitter.step())
    assert [id(r) for r in seen] == [id(r) for r in records]
    assert [r.step for r in seen] == [0, 1, 2]


def test_raising_on_a_bad_gradient_leaves_everything_as_it_was():
    model = model_of()
    splitter = gs.GradientSplitter(model, "xsp", gs.Ema(warmup=1), on_nonfinite="raise")
    backward(model, 0)
    splitter.step()
    backward(model, 1, size=1e4)
    model[0].weight.grad[2, 1] = float("nan")
    model[2].bias.grad[0] = float("inf")
    before = [p.grad.clone() for p in model.parameters()]
    history = copy.deepcopy(splitter.state_dict()["history"])
    with pytest.raises(FloatingPointError, match=r"inf or nan in 0.weight\[2:3\], 2.bias at step 1. Use on_nonfinite"):
        splitter.step()
    for a, p in zip(before, model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, a, rtol=0, atol=0, equal_nan=True)
    assert splitter.step_count == 1
    for key, arrays in splitter.state_dict()["history"].items():
        assert_equal(arrays, history[key])


def test_tied_and_frozen_parameters():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(6, 3)
            self.middle = nn.Linear(3, 3).requires_grad_(False)
            self.head = nn.Linear(3, 6, bias=False)
            self.head.weight = self.embed.weight

    model = Tied()
    splitter = gs.GradientSplitter(model, "xsp", gs.Fixed(1e-3))
    assert splitter.layout.names == ("embed.weight",)
    model.head(model.middle(model.embed(torch.tensor([1, 2])))).square().sum().backward()
    splitter.step()
    assert (model.embed.weight.grad.norm(dim=1) <= 1e-3 * (1 + 1e-6)).all()
    assert model.middle.weight.grad is None


def test_sparse_gradients_are_coalesced_and_only_touched_rows_are_kept():
    embedding = nn.Embedding(50, 4, sparse=True)
    embedding(torch.tensor([3, 7, 3])).square().sum().backward()
    assert not embedding.weight.grad.is_coalesced()
    dense = embedding.weight.grad.to_dense()
    record = gs.GradientSplitter(embedding, "xsp", gs.Fixed(0.5)).step()
    gradient = embedding.weight.grad
    assert gradient.is_sparse
    assert gradient.is_coalesced()
    assert gradient.indices().tolist() == [[3, 7]]
    torch.testing.assert_close(record.norm_B, dense.double().norm(dim=1))
    want = dense * (0.5 / dense.norm(dim=1, keepdim=True)).clamp(max=1).nan_to_num(0.0)
    torch.testing.assert_close(gradient.to_dense(), want)


def test_a_parameter_thawed_after_the_splitter_was_made_is_named_once():
    model = model_of()
    model[0].requires_grad_(False)
    splitter = gs.GradientSplitter(model, "per_tensor", gs.Fixed(1e-3))
    backward(model, 0)
    splitter.step()
    model[0].requires_grad_(True)
    backward(model, 1)
    free = model[0].weight.grad.clone()
    with pytest.warns(UserWarning, match=r"0\.weight, 0\.bias had requires_grad=False .* no limit holds there"):
        splitter.step()
    assert torch.equal(model[0].weight.grad, free)
    assert model[2].weight.grad.norm() <= 1e-3 * (1 + 1e-5)
    splitter.step()  # a warning is an error here


def test_pairs_say_what_is_meant_and_nothing_else_is_watched():
    model = model_of()
    splitter = gs.GradientSplitter(list(model[2].named_parameters()), "per_tensor", gs.Fixed(1e-3))
    backward(model, 0)
    before = model[0].weight.grad.clone()
    splitter.step()
    assert before.norm() > 1e-3
    assert torch.equal(model[0].weight.grad, before)


@pytest.mark.parametrize("strategy", ["xsp", "lbf"])
@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_a_state_of_the_wrapped_model_goes_on_with_the_plain_one(wrap, strategy):
    def start(seed, wrap=lambda model: model):
        model = model_of(seed)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        splitter = gs.GradientSplitter(wrap(model), strategy, gs.Ema(1.1, warmup=3), optimizer=optimizer)
        splitter.calibrate(lambda: backward(model, 99), 3)
        splitter.attach(optimizer)
        return model, optimizer, splitter

    model, optimizer, splitter = start(0, wrap)
    train(model, optimizer, range(5))
    plain, its_optimizer, its_splitter = start(1)
    plain.load_state_dict(model.state_dict())
    its_splitter.load_state_dict(splitter.state_dict())
    assert its_splitter.plan.layout.names == gs.layout_of(plain).names
    assert_equal(train(plain, its_optimizer, range(5, 9)), train(model, optimizer, range(5, 9)))


def test_a_splitter_says_what_it_is():
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    splitter = gs.GradientSplitter(model, budget=gs.Fixed(2.0), optimizer=optimizer)
    plan = repr(splitter.plan)
    assert repr(splitter) == f"GradientSplitter({plan}, {{bin: Fixed(limit=2.0)}}, with SGD, 0 steps)"
    splitter.attach(optimizer)
    train(model, optimizer, range(1))
    assert repr(splitter) == f"GradientSplitter({plan}, {{bin: Fixed(limit=2.0)}}, attached to SGD, 1 steps)"
