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
from tests.splitter.test_hostile import backward, model_of

KINDS = [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.LBFGS]


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


def scaled_loop(model, optimizer, splitter, scaler, between=lambda: None, given=None):
    """Six steps by hand under a GradScaler; return what was warned of."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(6):
            optimizer.zero_grad()
            scaler.scale(model(torch.ones(3, 4)).square().mean()).backward()
            between()
            splitter.step(**(given or {}))
            scaler.step(optimizer)
            scaler.update()
    return [str(one.message) for one in told]


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}], ids=str)
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_scaler_that_unscales_behind_the_bounds_is_told_once(kind, options):
    model = model_of()
    optimizer = kind(model.parameters(), lr=0.01, **options)
    splitter = gs.GradientSplitter(model, optimizer=optimizer)
    told = scaled_loop(model, optimizer, splitter, torch.amp.GradScaler("cpu"))
    assert len(told) == 1
    assert "a GradScaler took its scale, 65536, out of the gradients after they were bounded" in told[0]
    assert "Write splitter.step(scaler=scaler)" in told[0]
    assert len(optimizer._optimizer_step_pre_hooks) == 0


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_scaler_that_is_handed_over_or_has_unscaled_is_right(kind):
    for way in ("given", "unscaled", "disabled", "attached"):
        model = model_of()
        optimizer = kind(model.parameters(), lr=0.01)
        splitter = gs.GradientSplitter(model, optimizer=optimizer)
        scaler = torch.amp.GradScaler("cpu", enabled=way != "disabled")
        given = {"scaler": scaler} if way == "given" else {}
        between = (lambda: scaler.unscale_(optimizer)) if way == "unscaled" else (lambda: None)  # noqa: B023
        if way == "attached":
            splitter.attach(optimizer)
            optimizer.zero_grad()
            scaler.scale(model(torch.ones(3, 4)).square().mean()).backward()
            scaler.step(optimizer)
            assert splitter.step_count == 1
        else:
            assert scaled_loop(model, optimizer, splitter, scaler, between, given) == []


def test_what_is_no_scaler_and_what_holds_an_optimizer_are_named():
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    splitter = gs.GradientSplitter(model, optimizer=optimizer)
    backward(model)
    with pytest.raises(TypeError, match=r"step\(scaler=SGD\): expected a torch.amp.GradScaler"):
        splitter.step(scaler=optimizer)
    with pytest.raises(TypeError, match=r"optimizer=StepLR\): .* Pass the optimizer that this StepLR was made for"):
        splitter.attach(torch.optim.lr_scheduler.StepLR(optimizer, 3))
    with pytest.raises(TypeError, match=r"optimizer=GradScaler\): .* the scaler to step\(scaler=…\)"):
        splitter.attach(torch.amp.GradScaler("cpu"))


@pytest.mark.parametrize("rate", [1e-3, 1e3])
def test_a_splitter_whose_model_stands_still_says_so_once(rate):
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    splitter = gs.GradientSplitter(model, optimizer=optimizer)
    backward(model)
    splitter.step()
    optimizer.step()
    again = copy.deepcopy(model)
    other = torch.optim.SGD(again.parameters(), lr=rate)
    with pytest.warns(UserWarning, match="4 calls in a row found the same gradients") as told:
        for _ in range(8):
            backward(again)
            splitter.step()
            other.step()
    assert len(told) == 1


def test_gradients_that_are_written_in_any_way_do_not_stand_still():
    model = model_of()
    splitter = gs.GradientSplitter(model, budget=gs.Fixed(1e9))
    backward(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(8):
            for p in model.parameters():
                p.grad.data.fill_(step + 1.0)  # leaves no mark
            splitter.step()
    assert splitter.step_count == 8


@pytest.mark.parametrize("how", ["attach", "step"])
def test_momentum_of_steps_that_nothing_bounded_is_told_of(how):
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    backward(model)
    optimizer.step()
    with pytest.warns(UserWarning, match="SGD holds momentum of steps that nothing bounded") as told:
        splitter = gs.GradientSplitter(model, optimizer=optimizer)
        if how == "attach":
            splitter.attach(optimizer)
    assert len(told) == 1
    saved_state = optimizer.state_dict()
    resumed = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    resumed.load_state_dict(saved_state)
    gs.GradientSplitter(model, optimizer=resumed)  # the state says that it was bounded
    gs.GradientSplitter(model, optimizer=optimizer, budget=gs.Fixed(1.0))  # claims nothing about the step


def test_a_gradient_that_two_parameters_hold_is_bounded_once():
    both = [nn.Parameter(torch.ones(2, 2)) for _ in range(2)]
    for p in both:
        p.grad = torch.full((2, 2), 30.0) if p is both[0] else both[0].grad
    gs.GradientSplitter([("a", both[0]), ("b", both[1])], budget=gs.Fixed(1.0)).step()
    for p in both:
        torch.testing.assert_close(p.grad.double().norm(dim=1), torch.ones(2, dtype=torch.float64))


def runs(make, steps=3):
    """Weights after some steps, without and within a default device on which nothing can be read."""
    made = []
    for device in ("cpu", "meta"):
        model = model_of()
        ones = torch.ones(3, 4)
        with torch.device(device):
            optimizer = make(model)
            for _ in range(steps):
                for p in model.parameters():
                    p.grad = None
                model(ones).square().mean().backward()
                optimizer.step()
        made.append(values(model))
    return made


@pytest.mark.parametrize("direction", ["auto", "adam"])
@pytest.mark.parametrize("options", [{}, {"backend": "eager"}, {"in_backward": True}, {"steps": 9}], ids=str)
def test_gso_leaves_a_default_device_alone(direction, options):
    if direction == "adam" and "steps" in options:
        options = {"second_moment": "bin"}
    plain, within = runs(lambda model: gs.GSO(model, direction=direction, **options))
    assert all(torch.equal(a, b) for a, b in zip(plain, within, strict=True))


@pytest.mark.parametrize("plan", ["xsp", "lbf", "tree_sp", "whole"])
@pytest.mark.parametrize("budget", [None, "ema", "zscore", "percentile", {"root": gs.Fixed(1.0), "bin": gs.Ema(1.5)}])
@pytest.mark.parametrize("caps", [False, True])
def test_a_splitter_leaves_a_default_device_alone(plan, budget, caps):
    def make(model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
        bounds = (gs.RelativeStep(), gs.Fixed(1.0)) if caps and budget is not None else budget
        splitter = gs.GradientSplitter(model, plan=plan, budget=bounds, optimizer=optimizer, cap_updates=caps)
        splitter.attach(optimizer)
        if plan == "lbf":
            splitter.calibrate(lambda: backward_with(model), 2)
        splitter.load_state_dict(splitter.state_dict())
        return optimizer

    def backward_with(model):
        with torch.device("cpu"):
            backward(model)

    plain, within = runs(make)
    assert all(torch.equal(a, b) for a, b in zip(plain, within, strict=True))


def test_updates_in_backward_that_somebody_overwrites_are_told_of_once():
    model = model_of()
    optimizer = gs.GSO(model, in_backward=True)
    with pytest.warns(UserWarning, match=r"in_backward=True\): .* was written between backward\(\)") as told:
        for _ in range(4):
            fine = values(model)
            model(torch.ones(3, 4)).square().mean().backward()
            with torch.no_grad():
                for p, old in zip(model.parameters(), fine, strict=True):
                    p.copy_(old)
            optimizer.step()
    assert len(told) == 1


def test_updates_in_backward_and_writes_after_the_step_are_in_peace():
    model = model_of()
    optimizer = gs.GSO(model, in_backward=True)
    before = values(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            model(torch.ones(3, 4)).square().mean().backward()
            optimizer.step()
            with torch.no_grad():
                for p in model.parameters():
                    p.clamp_(-1, 1)
    assert not same(model, before)
