"""A guarded run that is interrupted goes on bit for bit, rollbacks and lowered rates included."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gradsplit as gs
from tests.resume.runs import data, net, same, weights

EPOCHS = 3


def _run():
    """Everything as a script makes it at its start."""
    torch.manual_seed(11)
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
    splitter = gs.GradientSplitter(model, budget=gs.Ema(1.3), optimizer=optimizer)
    guard = gs.Guard(model, optimizer, splitter, schedule, every=9, patience=3)
    x, y = (torch.cat(parts) for parts in zip(*data(12), strict=True))
    loader = DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True)
    return model, optimizer, schedule, splitter, guard, loader


def _train(run, path=None, stop=None):
    """The loop; leaves it after the step ``stop``, with a checkpoint."""
    model, optimizer, schedule, splitter, guard, loader = run
    batches = guard.batches(loader)
    while batches.epoch < EPOCHS:
        for x, y in batches:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            splitter.step()
            if guard.step_count == 14:  # a fault that no splitter sees: it lies in the weights
                model[0].weight.data.fill_(float("nan"))
            optimizer.step()
            schedule.step()
            guard.step(loss)
            if stop is not None and guard.step_count == stop:
                gs.save_checkpoint(path, **guard.parts)
                return model
    return model


@pytest.fixture(scope="module")
def whole():
    """The run that nobody interrupts; it goes back once, from step 15."""
    run = _run()
    _train(run)
    assert [(action.kind, action.step, action.to_step) for action in run[4].actions] == [("rolled_back", 15, 9)]
    return run


def _resumed(folder, stop):
    _train(_run(), folder / "run.ckpt", stop)
    run = _run()
    torch.rand(100)
    gs.load_checkpoint(folder / "run.ckpt", **run[4].parts)
    return run


@pytest.mark.parametrize("stop", [17, 24, 25, 30])
def test_an_interrupted_run_ends_with_the_weights_of_the_whole_one(tmp_path, whole, stop):
    run = _resumed(tmp_path, stop)
    assert run[4].factor == 0.5 and list(map(str, run[4].actions)) == list(map(str, whole[4].actions))
    _train(run)
    assert same(weights(run[0]), weights(whole[0]))
    assert run[4].step_count == whole[4].step_count and run[4].history.state_dict() == whole[4].history.state_dict()


def test_a_divergence_after_the_resume_goes_back_to_it_since_older_snapshots_are_gone(tmp_path):
    run = _resumed(tmp_path, 12)
    _train(run)
    assert [(action.step, action.to_step) for action in run[4].actions] == [(15, 12)]


def test_the_state_of_something_else_is_refused():
    guard = _run()[4]
    with pytest.raises(ValueError, match=r"Guard.load_state_dict\(…\): expected what state_dict\(\) returned"):
        guard.load_state_dict({"step_count": 3})
