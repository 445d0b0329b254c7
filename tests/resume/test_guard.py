"""A run that diverges goes back, leaves batches out, slows down and goes on; every action is told with its reason."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import gradsplit as gs
from gradsplit.resume.divergence import LossHistory, nonfinite_names
from tests.resume.runs import data, net, same, sgd, train, weights


def test_a_healthy_run_is_left_bit_for_bit_as_it_is():
    guarded, alone = net(), net()
    optimizer = sgd(guarded)
    guard = gs.Guard(guarded, optimizer, every=7)
    torch.manual_seed(1)
    train(guard, data(), guarded, optimizer)
    other = sgd(alone)
    torch.manual_seed(1)
    for x, y in data():
        other.zero_grad()
        nn.functional.mse_loss(alone(x), y).backward()
        other.step()
    assert same(weights(guarded), weights(alone))
    assert guard.actions == [] and guard.factor == 1.0


def test_after_a_nan_everything_is_as_it_was_at_the_snapshot():
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.5)
    guard = gs.Guard(model, optimizer, scheduler=schedule, every=10)
    seen = {}
    for i, (x, y) in enumerate(guard.batches(data(40, bad=(26,)))):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        schedule.step()
        action = guard.step(loss)
        if i == 19:
            moments = [state["exp_avg_sq"].clone() for state in optimizer.state.values()]
            seen = {"weights": weights(model), "moments": moments, "epoch": schedule.last_epoch}
        if action:
            assert i == 26
            assert same(weights(model), seen["weights"])
            assert same([state["exp_avg_sq"] for state in optimizer.state.values()], seen["moments"])
            assert schedule.last_epoch == seen["epoch"] and optimizer.param_groups[0]["lr"] == schedule.get_last_lr()[0]
    (action,) = guard.actions
    assert (action.step, action.to_step, action.num_undone) == (26, 20, 7)
    assert action.batches == "epoch 0: 20 to 26" and math.isnan(action.loss)
    assert not nonfinite_names(model, optimizer)


def test_buffers_are_rolled_back_with_the_weights():
    model = net()
    optimizer = sgd(model)
    guard = gs.Guard(model, optimizer, every=5)
    bad = data(12)
    bad[8] = (bad[8][0] * float("nan"), bad[8][1])
    train(guard, bad, model, optimizer)
    assert len(guard.actions) == 1
    assert torch.isfinite(model[1].running_mean).all() and torch.isfinite(model[1].running_var).all()


def test_a_loss_out_of_its_history_for_patience_steps_is_a_divergence():
    model = net()
    optimizer = sgd(model)
    guard = gs.Guard(model, optimizer, every=10, patience=5)
    for k in range(60):
        w = weights(model)
        action = guard.step(1.0 + 0.01 * (k % 4) if k < 40 else 3.0)
        optimizer.zero_grad()
        if k == 0:
            model[0].weight.grad = torch.ones_like(model[0].weight)
            optimizer.step()  # the first snapshot
        if action:
            break
        assert same(w[:1], weights(model)[:1]) or k == 0
    assert k == 44
    assert "5 steps in a row were bad: loss 3, usually 1.0" in action.reason
    assert action.usual == pytest.approx(1.01, abs=0.006)


def test_a_single_spike_of_the_loss_is_no_divergence_and_no_history():
    model = net()
    guard = gs.Guard(model, sgd(model), patience=3)
    for k in range(80):
        assert guard.step(50.0 if k % 10 in (7, 8) else 1.0) is None
    assert (
        guard.history.median == 1.0 and len(guard.history) == 66
    )  # 64 in order, and two before there was anything to judge by


def test_a_step_whose_bins_were_mostly_zeroed_is_bad_and_alone_does_no_harm():
    model = nn.Linear(4, 6)
    optimizer = sgd(model)
    splitter = gs.GradientSplitter(model, budget=gs.Fixed(1.0), optimizer=optimizer)
    guard = gs.Guard(model, optimizer, splitter, patience=3)
    bad = (10, 15, 16, 20, 21, 22)
    for k in range(23):
        optimizer.zero_grad()
        loss = model(torch.ones(2, 4)).square().mean()
        loss.backward()
        if k in bad:
            model.weight.grad.fill_(float("nan"))
        splitter.step()
        optimizer.step()
        action = guard.step(loss)
        assert (action is not None) == (k == 22)
    assert "86% of bins ZEROED" in action.reason
    assert action.worst[0].startswith("weight[") and "nan" in action.worst[0]


def test_a_loss_that_is_not_finite_with_a_splitter_in_front_costs_no_rollback():
    model = nn.Linear(4, 6)
    optimizer = sgd(model)
    splitter = gs.GradientSplitter(model, budget=gs.Fixed(1.0), optimizer=optimizer)
    guard = gs.Guard(model, optimizer, splitter)
    for k in range(40):
        optimizer.zero_grad()
        loss = model(torch.ones(2, 4)).square().mean() * (float("nan") if k % 10 == 5 else 1.0)
        loss.backward()
        splitter.step()
        optimizer.step()
        guard.step(loss)
    assert guard.actions == []


def test_after_max_rollbacks_it_stops_with_names_numbers_and_the_last_good_weights():
    model = net()
    optimizer = sgd(model)
    guard = gs.Guard(model, optimizer, every=5, max_rollbacks=2, lr_factor=0.1)
    with pytest.raises(gs.DivergenceError) as caught:
        train(guard, data(60, bad=tuple(range(21, 60))), model, optimizer)
    message = str(caught.value)
    assert "Guard.step(loss=nan): training diverged at step 23 and none of 2 rollbacks is left" in message
    assert "these are not finite: 0.weight, 0.bias" in message and "raise max_rollbacks" in message
    assert "Step 21: rolled back to step 20 (number 1)" in message and "learning rate from now on × 0.01" in message
    assert [action.kind for action in caught.value.actions] == ["rolled_back", "rolled_back", "stopped"]
    assert not nonfinite_names(model, optimizer)


def test_without_a_finite_snapshot_it_says_so():
    model = net()
    nn.init.constant_(model[0].weight, float("nan"))
    optimizer = sgd(model)
    guard = gs.Guard(model, optimizer)
    with pytest.raises(gs.DivergenceError, match="before there was a finite snapshot, the loss is nan"):
        train(guard, data(3), model, optimizer)


def test_further_batches_are_left_out_as_asked():
    model = net()
    optimizer = sgd(model)
    guard = gs.Guard(model, optimizer, every=5, skip=4)
    losses = train(guard, data(30, bad=(12,)), model, optimizer)
    assert len(losses) == 26
    assert guard.actions[0].batches == "epoch 0: 10 to 16"


def test_a_look_every_few_steps_finds_the_step_all_the_same():
    model = net()
    optimizer = sgd(model)
    guard = gs.Guard(model, optimizer, every=8, check_every=4)
    train(guard, data(40, bad=(21,)), model, optimizer)
    (action,) = guard.actions
    assert (action.step, action.to_step, action.num_undone) == (21, 16, 8)
    assert not nonfinite_names(model, optimizer)


@pytest.mark.parametrize(
    "optimizer_of", [lambda m: gs.GSO(m, 1e-2, direction="adam"), lambda m: torch.optim.LBFGS(m.parameters(), 0.1)]
)
def test_other_optimizers_are_rolled_back_with_all_their_state(optimizer_of):
    model = nn.Linear(4, 3)
    optimizer = optimizer_of(model)
    guard = gs.Guard(model, optimizer, every=4)
    x = torch.randn(8, 4)

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    def run(steps):
        for _ in range(steps):
            guard.step(optimizer.step(closure))
        return weights(model)

    run(8)
    reached = run(3)
    guard.roll_back()
    guard._rate.factor = 1.0
    assert same(run(3), reached)


def test_the_splitter_goes_back_but_its_steps_are_counted_on():
    model = nn.Linear(4, 3)
    optimizer = sgd(model)
    splitter = gs.GradientSplitter(model, budget=gs.Ema(1.5), optimizer=optimizer)
    guard = gs.Guard(model, optimizer, splitter, every=5)
    history = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(torch.randn(8, 4)).square().mean()
        loss.backward()
        splitter.step()
        optimizer.step()
        guard.step(loss)
        history.append([array.clone() for array in splitter.state_dict()["history"]["bin/ema/0"]])
    guard.roll_back()
    assert same(splitter.state_dict()["history"]["bin/ema/0"], history[4])
    assert not same(history[4], history[7])
    assert splitter.step_count == 8


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"every": 0}, r"Guard\(every=0\): expected a whole number >= 1"),
        ({"keep": 0}, r"Guard\(keep=0\): expected"),
        ({"patience": 1.5}, r"Guard\(patience=1.5\): expected"),
        ({"history": 3}, r"Guard\(history=3\): expected a whole number >= 16"),
        ({"lr_factor": 0.0}, r"Guard\(lr_factor=0.0\): expected a factor in \(0, 1\]"),
        ({"score": -1}, r"Guard\(score=-1\): expected a number above 0"),
        ({"scheduler": 7}, r"Guard\(scheduler=int\): expected an object with state_dict"),
        ({"others": {"guard": nn.Linear(1, 1)}}, r"under a name other than 'guard'"),
    ],
)
def test_bad_arguments_are_named(options, says):
    model = net()
    with pytest.raises(ValueError, match=says):
        gs.Guard(model, sgd(model), **options)


def judged(losses: list[float]) -> list[int]:
    """The steps after which a guard with these losses, and sound weights, went back."""
    model = nn.Linear(2, 1)
    optimizer = sgd(model)
    guard = gs.Guard(model, optimizer, max_rollbacks=100)
    for loss in losses:
        optimizer.step()
        guard.step(loss)
    return [action.step for action in guard.actions]


START = [1.0 / (k + 1) for k in range(40)]


@pytest.mark.parametrize(
    "tail",
    [
        [0.0] * 200 + [1e-6] * 200,
        [0.0] * 200 + [0.03, 0.0, 0.1, 0.05] * 50,
        [1e-9 * (k % 3) for k in range(200)] + [1e-3] * 200,
        [1e-7] * 200 + [2e-5, 1e-4] * 40,
        [-1e-9] * 200 + [1e-6] * 100,
    ],
)
@pytest.mark.parametrize("unit", [1.0, 1e-4, 1e5])
def test_a_run_whose_usual_loss_is_zero_is_not_stopped(tail: list[float], unit: float):
    assert judged([unit * loss for loss in START + tail]) == []


@pytest.mark.parametrize("unit", [1.0, 1e-4, 1e5])
def test_a_run_whose_usual_loss_is_zero_is_stopped_when_it_is_back_at_its_start(unit: float):
    losses = [unit * loss for loss in START + [0.0] * 200 + [1.0] * 10]
    assert judged(losses) == [len(losses) - 1]


def test_losses_of_zero_alone_give_no_scale_to_judge_by():
    assert judged([0.0] * 100 + [1e-6] * 200) == []
    assert judged([0.0] * 100 + [math.nan] * 10)


def test_the_scale_of_a_run_is_saved_with_it():
    history = LossHistory(128, 10.0)
    for loss in START + [0.0] * 200:
        history.add(loss)
    again = LossHistory(128, 10.0)
    again.load_state_dict(history.state_dict())
    assert again.spread == history.spread > 0
    old = LossHistory(128, 10.0)
    old.load_state_dict({"losses": START})  # a file from before the scale was saved
    assert old.spread > 0


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        (
            lambda model, optimizer: (optimizer, model),
            r"Guard\(optimizer=Linear\): expected a torch optimizer. Write Guard",
        ),
        (lambda model, optimizer: (model, None), r"Guard\(optimizer=NoneType\): expected a torch optimizer"),
        (lambda model, optimizer: (None, optimizer), r"Guard\(model=NoneType\): expected a module. Write Guard"),
    ],
)
def test_parts_in_the_wrong_place_are_named(parts, says):
    model = nn.Linear(2, 1)
    with pytest.raises(TypeError, match=says):
        gs.Guard(*parts(model, torch.optim.SGD(model.parameters(), lr=0.1)))


@pytest.mark.parametrize("state", [None, {}])
def test_what_is_no_state_is_named(state):
    model = nn.Linear(2, 1)
    guard = gs.Guard(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(
        ValueError, match=r"Guard.load_state_dict\(…\): expected what state_dict\(\) returned, got .* Load the"
    ):
        guard.load_state_dict(state)
