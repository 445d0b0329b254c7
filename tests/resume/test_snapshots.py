"""Which snapshot is gone back to, what they take, and what happens when a disk fails."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import nn

import gradsplit as gs
from gradsplit.resume import snapshots
from tests.resume.runs import data, net, sgd, train


def test_no_snapshot_is_taken_while_steps_are_bad():
    model = net()
    optimizer = sgd(model)
    guard = gs.Guard(model, optimizer, every=10, patience=40)
    guard._first_snapshot()
    for k in range(59):
        guard.step(1.0 if k < 25 else 9.0)
    assert guard.snapshots.newest.step == 20
    guard.step(1.0)
    assert guard.snapshots.newest.step == 60


def test_the_second_divergence_from_one_snapshot_goes_to_the_one_before():
    model = net()
    optimizer = sgd(model)
    guard = gs.Guard(model, optimizer, every=10)
    batches = data(60, bad=(35, 37))
    train(guard, batches, model, optimizer)
    assert [action.to_step for action in guard.actions] == [30, 20]
    assert [action.num_undone for action in guard.actions] == [6, 12]


def test_progress_since_makes_the_newest_snapshot_good_again():
    model = net()
    optimizer = sgd(model)
    guard = gs.Guard(model, optimizer, every=5)
    train(guard, data(60, bad=(12, 22)), model, optimizer)
    assert [action.to_step for action in guard.actions] == [10, 18]
    assert guard.factor == 0.25


def test_a_snapshot_that_is_not_finite_is_not_kept():
    model = net()
    optimizer = sgd(model)
    guard = gs.Guard(model, optimizer, every=10)

    def poison(k):
        if k == 19:
            model[4].bias.grad.fill_(float("inf"))  # after the loss: the snapshot due now would hold it

    train(guard, data(30), model, optimizer, before_step=poison)
    (action,) = guard.actions
    assert (action.step, action.to_step) == (20, 10)


def test_memory_is_bounded_and_used_again():
    model = net()
    optimizer = sgd(model)
    guard = gs.Guard(model, optimizer, every=1, keep=3)
    places = set()
    for x, y in guard.batches(data(30)):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        guard.step(loss)
        places.add(guard.snapshots.newest.tree["parts"]["model"]["0.weight"].data_ptr())
    assert len(guard.snapshots) == 3 and len(places) == 3


def test_snapshots_on_disk_are_checkpoints_and_old_ones_are_removed(tmp_path):
    model = net()
    optimizer = sgd(model)
    guard = gs.Guard(model, optimizer, every=10, folder=tmp_path / "snapshots")
    train(guard, data(45, bad=(37,)), model, optimizer)
    guard.snapshots.wait()
    assert [action.to_step for action in guard.actions] == [30]
    assert [path.name for path in sorted((tmp_path / "snapshots").iterdir())] == [
        "step-00000020.ckpt",
        "step-00000030.ckpt",
    ]
    fresh = net()
    again = gs.Guard(fresh, sgd(fresh), every=10)
    gs.load_checkpoint(tmp_path / "snapshots" / "step-00000030.ckpt", **again.parts)
    assert again.step_count == 30


def test_a_snapshot_that_was_damaged_on_disk_is_named(tmp_path):
    model = net()
    optimizer = sgd(model)
    guard = gs.Guard(model, optimizer, folder=tmp_path)
    guard._first_snapshot()
    guard.snapshots.wait()
    place = tmp_path / "step-00000000.ckpt"
    place.write_bytes(place.read_bytes()[:-5])
    with pytest.raises(gs.CheckpointError, match=r"step-00000000\.ckpt"):
        guard.roll_back()


def test_a_snapshot_that_could_not_be_written_leaves_the_one_before_it(tmp_path, monkeypatch):
    """The disk is full when the run diverges, before anybody has looked at how the writing ended."""
    model = net()
    guard = gs.Guard(model, sgd(model), folder=tmp_path)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    guard._take_snapshot()
    guard.snapshots.wait()

    def full(path, tree):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(snapshots, "save_tree", full)
    guard.step_count = 5
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    guard._take_snapshot()
    with pytest.warns(RuntimeWarning, match="No space left"):
        assert guard.roll_back().to_step == 0
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key])


def test_named_tuples_in_a_state_come_back_as_they_were():
    class Pair(NamedTuple):
        mean: torch.Tensor
        count: int

    class Part:
        held = Pair(torch.ones(2), 3)

        def state_dict(self):
            return {"pair": self.held}

        def load_state_dict(self, state):
            self.held = state["pair"]

    model, part = net(), Part()
    guard = gs.Guard(model, sgd(model), others={"part": part})
    guard._take_snapshot()
    part.held = Pair(torch.zeros(2), 4)
    guard.roll_back()
    assert isinstance(part.held, Pair) and part.held.mean.tolist() == [1.0, 1.0] and part.held.count == 3


def test_a_disk_that_is_gone_costs_a_warning_and_no_training(tmp_path):
    model = net()
    optimizer = sgd(model)
    guard = gs.Guard(model, optimizer, every=10, folder=tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.warns(RuntimeWarning, match="could not be written, the training goes on") as told:
        losses = train(guard, data(15), model, optimizer)
        guard.snapshots.wait()
    assert len(losses) == 15
    assert ["step-00000000.ckpt" in str(told[0].message), "step-00000010.ckpt" in str(told[1].message)] == [True, True]
