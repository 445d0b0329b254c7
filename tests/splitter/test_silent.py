"""What used to fail without a word: endless rates, copies that lose their bounds, weights written past the counters."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import gradsplit as gs

KINDS = [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.LBFGS]


def model_of():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 20), nn.Tanh(), nn.Linear(20, 4))


def backward(model):
    for p in model.parameters():
        p.grad = None
    model(torch.ones(3, 4)).square().mean().backward()


def values(model):
    return [p.detach().clone() for p in model.parameters()]


def same(model, before):
    return all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("value", [math.nan, math.inf, torch.tensor(math.nan)], ids=["nan", "inf", "tensor"])
@pytest.mark.parametrize("how", ["attach", "step"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_rate_that_becomes_endless_is_refused_before_anything_moves(kind, how, value):
    model = model_of()
    optimizer = kind(model.parameters(), lr=0.01)
    splitter = gs.GradientSplitter(model, optimizer=optimizer)
    if how == "attach":
        splitter.attach(optimizer)

    def step():
        if kind is torch.optim.LBFGS:
            optimizer.step(lambda: (backward(model), model(torch.ones(3, 4)).square().mean())[1])
            return
        backward(model)
        if how == "step":
            splitter.step()
        optimizer.step()

    step()
    if splitter.step_count == 0:  # LBFGS attaches by itself
        splitter.attach(optimizer)
    before, count = values(model), splitter.step_count
    optimizer.param_groups[0]["lr"] = value
    words = rf"GradientSplitter.step\(\): expected finite options in {kind.__name__}, got lr={float(value)} in group 0"
    with pytest.raises(ValueError, match=words):
        step()
    assert same(model, before)
    assert splitter.step_count == count


@pytest.mark.parametrize("option", ["lr", "weight_decay", "momentum"])
def test_an_endless_option_is_refused_when_it_is_given(option):
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), **{"lr": 0.1, option: math.nan})
    with pytest.raises(
        ValueError, match=rf"optimizer=…\): expected finite options in SGD, got {option}=nan in group 0"
    ):
        gs.GradientSplitter(model, optimizer=optimizer)
    with pytest.raises(ValueError, match=rf"got {option}=nan"):
        gs.GradientSplitter(model, budget="fixed").attach(optimizer)


def test_the_group_with_the_endless_rate_is_named_and_a_missing_rate_is_none():
    model = model_of()
    optimizer = torch.optim.AdamW([{"params": model[0].parameters()}, {"params": model[2].parameters()}])
    splitter = gs.GradientSplitter(model, optimizer=optimizer)
    backward(model)
    optimizer.param_groups[0]["lr"] = None  # an optimizer that finds its rate by itself
    splitter.step()
    optimizer.param_groups[1]["lr"] = math.nan
    with pytest.raises(ValueError, match=r"got lr=nan in group 1"):
        splitter.step()


@pytest.mark.parametrize("direction", [None, "adam"])
@pytest.mark.parametrize(("option", "value"), [("lr", math.nan), ("lr", math.inf), ("weight_decay", math.inf)])
def test_gso_refuses_an_endless_option_that_is_set_later(direction, option, value):
    model = model_of()
    optimizer = gs.GSO(model) if direction is None else gs.GSO(model, direction=direction)
    backward(model)
    optimizer.step()
    before = values(model)
    optimizer.param_groups[0][option] = value
    with pytest.raises(ValueError, match=rf"GSO.step\(\): expected finite options in GSO, got {option}={value}"):
        optimizer.step()
    assert same(model, before)


@pytest.mark.parametrize("option", ["lr", "eps", "weight_decay"])
def test_gso_with_an_endless_constant_is_refused(option):
    with pytest.raises(ValueError, match=rf"GSO\({option}=inf\): expected"):
        gs.GSO(model_of(), direction="adam", **{option: math.inf})


def test_a_scheduler_that_falls_below_zero_lifts_no_limit():
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e3)
    gs.GradientSplitter(model, optimizer=optimizer).attach(optimizer)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step)
    for _ in range(3):  # rates 1e3, 0, -1e3
        backward(model)
        before = values(model)
        optimizer.step()
        schedule.step()
        for p, old in zip(model.parameters(), before, strict=True):
            rows, start = (
                (p - old).reshape(len(p) if p.dim() == 2 else 1, -1),
                old.reshape(len(old) if p.dim() == 2 else 1, -1),
            )
            assert (rows.norm(dim=1) <= 0.03001 * start.norm(dim=1).clamp(min=1)).all()


def saved(thing):
    torch.save(thing, io.BytesIO())


WAYS = {"copy": copy.copy, "deepcopy": copy.deepcopy, "pickle": pickle.dumps, "torch.save": saved}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_a_copy_that_leaves_its_splitter_behind_is_told_once(way, kind):
    model = model_of()
    optimizer = kind(model.parameters(), lr=0.01)
    handle = gs.GradientSplitter(model, optimizer=optimizer).attach(optimizer)
    with pytest.warns(UserWarning, match=rf"copy or pickle of {kind.__name__}: the GradientSplitter .* behind") as told:
        WAYS[way](optimizer)
        WAYS[way](optimizer)
    assert len(told) == 1
    assert told[0].filename == __file__
    WAYS[way](optimizer.state_dict())
    handle.remove()
    again = gs.GradientSplitter(model, budget="fixed")
    handle = again.attach(optimizer)
    handle.remove()
    WAYS[way](optimizer)  # nothing stands there


def test_model_and_optimizer_in_one_file_are_what_they_are_without_a_splitter():
    files = []
    for splits in (False, True):
        model = model_of()
        optimizer = torch.optim.Adam(model.parameters())
        backward(model)
        optimizer.step()
        splitter = gs.GradientSplitter(model, optimizer=optimizer)
        if splits:
            splitter.attach(optimizer)
        file = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if splits else "error")
            torch.save({"model": model, "optimizer": optimizer}, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        assert [id(p) for p in loaded["optimizer"].param_groups[0]["params"]] == [
            id(p) for p in loaded["model"].parameters()
        ]
        backward(loaded["model"])
        loaded["optimizer"].step()
        files.append((file.getvalue(), values(loaded["model"])))
    assert files[0][0] == files[1][0]
    assert all(torch.equal(a, b) for a, b in zip(files[0][1], files[1][1], strict=True))


def test_a_splitter_that_is_gone_leaves_copies_in_peace():
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters())
    other = torch.optim.AdamW(model_of().parameters())
    gs.GradientSplitter(model, optimizer=optimizer).attach(optimizer).remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert copy.deepcopy(other).param_groups
        assert copy.deepcopy(optimizer).param_groups


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_updates_through_data_are_told_of_where_numbers_can_be_read(dtype):
    weight = nn.Parameter(torch.ones(4, 3, dtype=dtype).t())
    optimizer = torch.optim.SGD([weight], lr=0.1)
    gs.GradientSplitter([("weight", weight)], optimizer=optimizer).attach(optimizer)
    with pytest.warns(UserWarning, match="the weights changed 3 times and no step of SGD was seen") as told:
        for _ in range(8):
            weight.grad = None
            weight.abs().square().sum().backward()
            weight.data.add_(weight.grad, alpha=-0.1)
    assert len(told) == 1


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_weights_that_are_swapped_around_the_pass_are_read_as_they_are_at_the_step(kind):
    """Binary weights for the pass, the fine ones for the step: limits are shares of the fine ones."""
    model = model_of()
    optimizer = kind(model.parameters(), lr=1e3)
    splitter = gs.GradientSplitter(model, optimizer=optimizer, budget=gs.Relative(0.1))
    splitter.attach(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(6):
            fine = values(model)
            for p in model.parameters():
                p.data.copy_(100 * p.sign())
            backward(model)
            for p, old in zip(model.parameters(), fine, strict=True):
                p.data.copy_(old)
            limit = 0.1 * fine[0].double().norm(dim=1).clamp(min=1e-3)
            length = model[0].weight.grad.double().norm(dim=1)
            optimizer.step()
            now = model[0].weight.grad.double().norm(dim=1)
            torch.testing.assert_close(now, torch.minimum(length, limit), rtol=1e-5, atol=1e-12)


def wrapped_model():
    model = model_of()
    for layer in (model[0], model[2]):
        for name in ("weight", "bias"):
            value = getattr(layer, name).detach()
            setattr(layer, name, nn.Parameter(TwoTensor(value, value.clone())))
    return model


@pytest.mark.parametrize("budget", [None, "ema", "zscore", "percentile", "running_median", "relative"])
@pytest.mark.parametrize("plan", ["xsp", "lbf", "whole"])
def test_records_and_states_of_wrapped_tensors_are_those_of_plain_ones(plan, budget):
    made = []
    for model in (model_of(), wrapped_model()):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        splitter = gs.GradientSplitter(model, plan=plan, budget=budget, optimizer=optimizer, backend="eager")
        if plan == "lbf":
            splitter.calibrate(lambda model=model: backward(model), 2)
        for _ in range(3):
            backward(model)
            record = splitter.step()
        file = io.BytesIO()
        torch.save(splitter.state_dict(), file)
        file.seek(0)
        splitter.load_state_dict(torch.load(file, weights_only=True))
        assert type(record.squares_B) is torch.Tensor
        made.append((record.worst(3), str(record), record.squares_B))
    assert made[0][:2] == made[1][:2]
    torch.testing.assert_close(made[0][2], made[1][2])


@pytest.mark.parametrize("direction", ["auto", "adam"])
def test_records_of_gso_over_wrapped_tensors_name_their_rows(direction):
    made = []
    for model in (model_of(), wrapped_model()):
        optimizer = gs.GSO(model, direction=direction, backend="eager")
        backward(model)
        optimizer.step()
        made.append([report.name for report in optimizer.records[0].worst(3)])
    assert made[0] == made[1]


def test_a_wrapped_gradient_that_is_not_finite_is_named_when_it_raises():
    model = wrapped_model()
    splitter = gs.GradientSplitter(model, budget="fixed", on_nonfinite="raise", backend="eager")
    backward(model)
    for inside in (model[0].weight.grad.a, model[0].weight.grad.b):
        inside[1, 2] = math.nan
    with pytest.raises(FloatingPointError, match=r"inf or nan in 0.weight\[1:2\]"):
        splitter.step()
