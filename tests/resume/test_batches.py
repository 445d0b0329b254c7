"""The data position: batches are handed out unchanged, and go on where another process stopped."""

from __future__ import annotations

import random

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import gradsplit as gs


class Noisy(Dataset):
    """Items whose values are drawn when they are fetched, as augmentations are."""

    def __len__(self):
        return 23

    def __getitem__(self, i):
        return torch.tensor([float(i), torch.rand(()).item(), random.random()])


def _loader(own_generator, workers=0):
    generator = torch.Generator().manual_seed(4) if own_generator else None
    return DataLoader(Noisy(), batch_size=4, shuffle=True, generator=generator, num_workers=workers)


def _start():
    torch.manual_seed(7)
    random.seed(7)


def _drawn(batches, epochs, stop=None):
    """Every batch with a number drawn after it, as a training with dropout draws."""
    seen = []
    while batches.epoch < epochs:
        for batch in batches:
            seen.append((batch.tolist(), torch.rand(()).item()))
            if stop is not None and len(seen) == stop:
                return seen
    return seen


@pytest.mark.parametrize("own_generator", [False, True])
@pytest.mark.parametrize("stop", [1, 5, 6, 7, 14])
def test_a_shuffling_loader_goes_on_with_the_same_batches_and_the_same_numbers(tmp_path, own_generator, stop):
    _start()
    whole = _drawn(gs.Batches(_loader(own_generator)), 3)
    _start()
    batches = gs.Batches(_loader(own_generator))
    begun = _drawn(batches, 3, stop)
    gs.save_checkpoint(tmp_path / "run.ckpt", batches=batches)
    torch.manual_seed(1000)
    again = gs.Batches(_loader(own_generator))
    gs.load_checkpoint(tmp_path / "run.ckpt", batches=again)
    assert begun + _drawn(again, 3) == whole


def test_between_epochs_it_goes_on_too(tmp_path):
    _start()
    batches = gs.Batches(_loader(True))
    _drawn(batches, 1)
    gs.save_checkpoint(tmp_path / "run.ckpt", batches=batches)
    rest = _drawn(batches, 2)
    again = gs.Batches(_loader(True))
    gs.load_checkpoint(tmp_path / "run.ckpt", batches=again)
    assert again.epoch == 1 and _drawn(again, 2) == rest


def test_workers_hand_out_the_same_after_a_resume(tmp_path):
    _start()
    whole = _drawn(gs.Batches(_loader(False, workers=1)), 1)
    _start()
    batches = gs.Batches(_loader(False, workers=1))
    begun = _drawn(batches, 1, 2)
    gs.save_checkpoint(tmp_path / "run.ckpt", batches=batches)
    again = gs.Batches(_loader(False, workers=1))
    gs.load_checkpoint(tmp_path / "run.ckpt", batches=again)
    assert begun + _drawn(again, 1) == whole


def test_skipped_batches_are_not_handed_out_and_count_as_drawn():
    batches = gs.Batches([1, 2, 3, 4, 5, 6])
    seen = []
    for value in batches:
        seen.append((value, batches.position))
        if value == 2:
            batches.skip(2)
    assert seen == [(1, 1), (2, 2), (5, 5), (6, 6)]


def test_what_is_left_to_skip_is_kept():
    batches = gs.Batches([1, 2, 3, 4])
    handed_out = iter(batches)
    next(handed_out)
    batches.skip(2)
    again = gs.Batches([1, 2, 3, 4])
    again.load_state_dict(batches.state_dict())
    assert list(again) == [4]


def test_a_loop_that_is_left_begins_a_new_pass():
    batches = gs.Batches([1, 2, 3])
    for _ in batches:
        break
    assert list(batches) == [1, 2, 3] and batches.epoch == 1 and len(batches) == 3


def test_the_state_of_something_else_is_refused():
    batches = gs.Batches(_loader(True))
    with pytest.raises(ValueError, match=r"Batches.load_state_dict\(…\): expected what state_dict\(\) returned"):
        batches.load_state_dict({"epoch": 1})
    with pytest.raises(ValueError, match="expected a loader with 0 generators of its own, got one with 1"):
        batches.load_state_dict(gs.Batches(_loader(False)).state_dict())


def test_a_guard_knows_its_loaders_by_themselves_and_resumes_their_positions():
    model = torch.nn.Linear(1, 1)
    guard = gs.Guard(model, torch.optim.SGD(model.parameters(), 0.1))
    first, second = [1, 2, 3], [4, 5, 6]
    assert guard.batches(first) is guard.batches(first) is not guard.batches(second)
    next(iter(guard.batches(first)))
    next(iter(guard.batches(second)))
    again = gs.Guard(model, torch.optim.SGD(model.parameters(), 0.1))
    known = again.batches([1, 2, 3])
    again.load_state_dict(guard.state_dict())
    assert [p["position"] for p in again.state_dict()["batches"]] == [1, 1]  # the second loader's, too, not known yet
    assert list(known) == [2, 3] and list(again.batches([4, 5, 6])) == [5, 6]
