"""Laws that say what "nothing lost" means; each raises AssertionError where it does not hold."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gradsplit as gs
from tests.resume.runs import data, net, tensors_of

OPTIMIZERS = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), 0.05, momentum=0.9),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), 1e-2),
    "gso": lambda model: gs.GSO(model, 1e-2, direction="adam"),
}


def _assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys(), "other tensors"
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different, different


def check_going_back_is_exact(every: int, bad: int, kind: str) -> None:
    """After a divergence every tensor is what it was at the snapshot, and the rate is lowered from the next step on."""
    model = net()
    optimizer = OPTIMIZERS[kind](model)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 7, 0.9)
    guard = gs.Guard(model, optimizer, scheduler=schedule, every=every)
    seen = {0: tensors_of(model=model, optimizer=optimizer)}
    rates = []
    optimizer.register_step_pre_hook(lambda one, *_: rates.append(one.param_groups[0]["lr"]))
    for k, (x, y) in enumerate(guard.batches(data(bad + 2, bad=(bad,)))):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        if k == bad:
            model[0].weight.data.fill_(float("nan"))
        own = optimizer.param_groups[0]["lr"]
        optimizer.step()
        assert optimizer.param_groups[0]["lr"] == own, "the rate was not set back"
        assert rates[-1] == own * (0.5 if k > bad else 1.0), "the rate is not the lowered one"
        schedule.step()
        action = guard.step(loss)
        assert (action is not None) == (k == bad), "no rollback, or one too many"
        if action:
            _assert_same(tensors_of(model=model, optimizer=optimizer), seen[action.to_step])
            assert schedule.last_epoch == action.to_step == bad // every * every
        else:
            seen[k + 1] = tensors_of(model=model, optimizer=optimizer)


def _train(stop: int | None, path: Path, *, resume: bool = False) -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    random.seed(2)
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    x, y = (torch.cat(parts) for parts in zip(*data(6), strict=True))
    batches = gs.Batches(DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True))
    parts = {"model": model, "optimizer": optimizer, "batches": batches}
    if resume:
        torch.manual_seed(77)
        gs.load_checkpoint(path, **parts)
    step = 0
    while batches.epoch < 3:
        for inputs, targets in batches:
            optimizer.zero_grad()
            nn.functional.mse_loss(model(inputs) * random.uniform(0.9, 1.1), targets).backward()
            optimizer.step()
            step += 1
            if step == stop:
                gs.save_checkpoint(path, **parts)
                return {}
    return tensors_of(model=model, optimizer=optimizer)


def check_resuming_changes_nothing(stop: int, folder: Path) -> None:
    """A run that is interrupted after any step ends with the tensors of one that is not."""
    whole = _train(None, folder / "none.ckpt")
    _train(stop, folder / "run.ckpt")
    _assert_same(_train(None, folder / "run.ckpt", resume=True), whole)


def check_damage_is_refused(share: float, bit: int, folder: Path) -> None:
    """A file that differs by any bit, or ends anywhere, is refused, and nothing of it is applied."""
    model = nn.Linear(5, 3)
    path, torn = folder / "run.ckpt", folder / "torn.ckpt"
    gs.save_checkpoint(path, model=model)
    whole = path.read_bytes()
    at = int(share * (len(whole) - 1))
    model.weight.data.add_(1.0)
    before = tensors_of(model=model)
    for wrong in (whole[:at] + bytes([whole[at] ^ (1 << bit)]) + whole[at + 1 :], whole[:at]):
        torn.write_bytes(wrong)
        try:
            gs.load_checkpoint(torn, model=model)
        except gs.CheckpointError:
            _assert_same(tensors_of(model=model), before)
        else:
            raise AssertionError(f"a file damaged at byte {at} was loaded")


def check_a_failed_write_leaves_the_old_file(folder: Path) -> None:
    """Whatever stops the writing, the checkpoint is the one before."""
    path = folder / "run.ckpt"
    gs.save_checkpoint(path, step=1)
    old = path.read_bytes()

    class Full:
        def state_dict(self):
            return {"big": torch.zeros(10)}

    from gradsplit.resume.formats import FORMATS

    torch_format = FORMATS["torch"]
    own = torch_format.write

    def fails_half_way(file, tree):
        own(file, tree)
        file.truncate(100)
        raise OSError(28, "No space left on device")

    torch_format.write = fails_half_way
    try:
        gs.save_checkpoint(path, step=2, full=Full())
    except OSError:
        pass
    finally:
        torch_format.write = own
    assert path.read_bytes() == old, "the old checkpoint is gone"
