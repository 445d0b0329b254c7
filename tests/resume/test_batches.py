"""The data position: batches are handed out unchanged, and go on where another process stopped."""

from __future__ import annotations

import functools
import random

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, Sampler

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


class Drawing(Sampler):
    """An order drawn anew in every epoch, from a generator that is held in one way or another."""

    def __init__(self, hold):
        self.draw = hold()

    def __len__(self):
        return 23

    def __iter__(self):
        return iter(sorted(range(23), key=lambda _: self.draw()))


class Slotted:
    __slots__ = ("inner",)

    def __init__(self, inner):
        self.inner = inner


class Numpy:
    def __init__(self, made):
        self.deep = {"list": [Slotted(made)]}

    def __call__(self):
        return self.deep["list"][0].inner.random()


def _partial(made):
    return functools.partial(lambda one: one.random(), made)


OF_THE_MODULE = random.Random(0)


def _from_the_module():
    return OF_THE_MODULE.random()


def _restarted_module():
    OF_THE_MODULE.seed(5)
    return _from_the_module


def _enclosed():
    made = random.Random(3)
    return lambda: made.random()


HELD = {
    "python, a method": lambda: random.Random(3).random,
    "python, enclosed": _enclosed,
    "python, partial": lambda: _partial(random.Random(3)),
    "python, of the module": _restarted_module,
    "numpy, deep": lambda: Numpy(np.random.default_rng(3)),
    "numpy, mersenne": lambda: Numpy(np.random.Generator(np.random.MT19937(3))),
    "numpy, philox": lambda: Numpy(np.random.Generator(np.random.Philox(3))),
    "numpy, old": lambda: Numpy(np.random.RandomState(3)),
}


def _torch_in_a_batch_sampler():
    order = RandomSampler(range(23), generator=torch.Generator().manual_seed(3))
    return DataLoader(Noisy(), batch_sampler=BatchSampler(order, 4, False))


class Augmented(Noisy):
    def __init__(self):
        self.rng = np.random.default_rng(1)

    def __getitem__(self, i):
        return super().__getitem__(i) + self.rng.random()


LOADERS = {
    "a batch sampler": _torch_in_a_batch_sampler,
    "a dataset": lambda: DataLoader(Augmented(), batch_size=4, shuffle=True),
    "a loader of one's own": lambda: Custom(),
    **{
        name: lambda hold=hold: DataLoader(Noisy(), batch_sampler=BatchSampler(Drawing(hold), 4, False))
        for name, hold in HELD.items()
    },
}


class Custom:
    def __init__(self):
        self.rng = random.Random(4)

    def __iter__(self):
        for _ in range(5):
            yield torch.tensor(self.rng.random())


@pytest.mark.parametrize("file_format", ["torch", "safetensors"])
@pytest.mark.parametrize("stop", [3, 9])
@pytest.mark.parametrize("name", LOADERS)
def test_generators_at_any_depth_go_on_where_they_were(tmp_path, name, stop, file_format):
    make = LOADERS[name]
    _start()
    whole = _drawn(gs.Batches(make()), 3)
    _start()
    batches = gs.Batches(make())
    begun = _drawn(batches, 3, stop)
    gs.save_checkpoint(tmp_path / "run.ckpt", format=file_format, batches=batches)
    again = gs.Batches(make())
    gs.load_checkpoint(tmp_path / "run.ckpt", batches=again)
    assert begun + _drawn(again, 3) == whole


def test_a_generator_that_the_training_draws_from_too_goes_on():
    def run(stop):
        rng = random.Random(1)
        batches = gs.Batches(DataLoader(Noisy(), batch_sampler=BatchSampler(Drawing(lambda: rng.random), 4, False)))
        return rng, batches, stop

    rng, batches, _ = run(None)
    whole = [(batch[:, 0].tolist(), rng.random()) for _ in range(2) for batch in batches]
    rng, batches, _ = run(2)
    handed_out = iter(batches)
    begun = [(next(handed_out)[:, 0].tolist(), rng.random()) for _ in range(2)]
    state = batches.state_dict()
    rng, again, _ = run(None)
    again.load_state_dict(state)
    assert begun + [(batch[:, 0].tolist(), rng.random()) for _ in range(2) for batch in again] == whole


def _iterating():
    sampler = Drawing(lambda: random.Random(3).random)
    sampler.order = iter(range(23))
    return DataLoader(Noisy(), batch_size=4, sampler=sampler)


REFUSED = {
    "without a state": lambda: DataLoader(Noisy(), sampler=Drawing(lambda: random.SystemRandom().random)),
    r"an iterator that has begun, at '\.sampler\.order'": _iterating,
    "a worker that stays alive": lambda: DataLoader(Augmented(), num_workers=1, persistent_workers=True),
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_cannot_be_kept_is_refused_by_name(said):
    batches = gs.Batches(REFUSED[said]())
    with pytest.raises(
        ValueError, match=rf"Batches\.state_dict\(\): expected a loader whose state can be kept.*{said}"
    ):
        batches.state_dict()


def test_a_generator_of_another_kind_is_refused():
    state = gs.Batches(LOADERS["python, enclosed"]()).state_dict()
    for name in ("numpy, deep", "a batch sampler"):
        with pytest.raises(ValueError, match="got that of another kind of generator"):
            gs.Batches(LOADERS[name]()).load_state_dict(state)
