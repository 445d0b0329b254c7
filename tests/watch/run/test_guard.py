"""`gradsplit run --guard`: an unchanged script goes back, slows down, and goes on, or stops with the evidence."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from gradsplit.resume import DivergenceError
from gradsplit.watch.record import RunFile
from gradsplit.watch.run.names import TensorsOf
from gradsplit.watch.run.session import Session
from gradsplit.watch.run.settings import Settings
from tests.watch.run.processes import run_gradsplit, run_python

SCRIPT = """
import sys, torch
from torch import nn
torch.manual_seed(0)
torch.set_num_threads(1)
model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2))
optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.999)
for step in range(160):
    x = torch.randn(8, 6)
    if step in BAD:
        x = x * float("nan")
    optimizer.zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    schedule.step()
print(all(torch.isfinite(value).all() for value in model.state_dict().values()), f"{loss.item():.6f}")
"""


def _script(folder, bad):
    (folder / "train.py").write_text(SCRIPT.replace("BAD", repr(bad)))


def test_an_unchanged_script_survives_a_bad_batch(tmp_path):
    _script(tmp_path, [130])
    alone = run_python(tmp_path, "train.py")
    guarded = run_gradsplit(tmp_path, "--guard", "train.py")
    assert alone.stdout.startswith("False nan")
    assert guarded.returncode == 0, guarded.stderr
    assert guarded.stdout.startswith("True 0.")
    assert "gradsplit: the guard acted 1 times" in guarded.stderr
    with RunFile(tmp_path / "run.db") as file:
        (action,) = file.actions()
        rates = file.series(file.streams[0]).lr_R
        assert file.meta["guarded"] is True
    assert (action.step, action.to_step, action.optimizer, action.batches) == (130, 100, "AdamW", "")
    assert rates[131] == pytest.approx(0.5 * 1e-2 * 0.999**131, rel=1e-5)
    assert rates[130] == pytest.approx(1e-2 * 0.999**130, rel=1e-5)


def test_a_script_that_cannot_be_saved_stops_with_the_evidence(tmp_path):
    _script(tmp_path, list(range(110, 160)))
    done = run_gradsplit(tmp_path, "--guard", "--control", "--budget", "fixed:limit=1", "train.py")
    assert done.returncode == 1
    assert "training diverged at step 113 and none of 3 rollbacks is left" in done.stderr
    assert "0.weight[" in done.stderr and "nan" in done.stderr
    with RunFile(tmp_path / "run.db") as file:
        assert [action.kind for action in file.actions()] == ["rolled_back"] * 3 + ["stopped"]
        assert file.meta["exception"].startswith("DivergenceError: Guard.step(loss=nan)")


@pytest.fixture
def session(tmp_path):
    """A session that sees every optimizer of this process while the test runs."""
    session = Session(Settings(record=str(tmp_path / "run.db"), seconds=3600.0, quiet=True, guard=True))
    handles = [
        register_optimizer_step_pre_hook(session.pre),
        register_optimizer_step_post_hook(session.post),
    ]
    yield session
    for handle in handles:
        handle.remove()
    session.close()


def test_a_script_without_trouble_is_left_bit_for_bit(session):
    def trained(watched):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        for _ in range(120):
            optimizer.zero_grad()
            loss = model(torch.randn(5, 3)).square().mean()
            session.losses.note(loss)
            loss.backward()
            if watched:
                optimizer.step()
            else:
                torch.optim.AdamW.step.__wrapped__(optimizer)  # without any hook
        return [value.clone() for value in model.state_dict().values()]

    for guarded, alone in zip(trained(True), trained(False), strict=True):
        assert torch.equal(guarded, alone)
    assert session.num_rows == 120


def test_without_a_loss_to_be_seen_it_says_so_and_lets_the_script_alone(session, tmp_path, capsys):
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(20):
        model.weight.grad = torch.ones(1, 2)
        optimizer.step()
    assert capsys.readouterr().err.count("no loss was seen, so that --guard has nothing to go by") == 1
    session.close()
    with RunFile(tmp_path / "run.db") as file:
        assert file.actions() == []


def test_each_optimizer_has_a_guard_of_its_own_and_no_guard_outlives_it(session):
    good, bad = nn.Linear(2, 1), nn.Linear(2, 1)
    optimizers = [torch.optim.SGD(net.parameters(), 0.1) for net in (good, bad)]
    for k in range(3):
        for net, optimizer in zip((good, bad), optimizers, strict=True):
            optimizer.zero_grad()
            loss = net(torch.ones(1, 2)).sum() * (math.nan if net is bad and k == 2 else 1.0)
            session.losses.note(loss)
            loss.backward()
            optimizer.step()
    assert session._guards.factor(optimizers[0]) == 1.0 and session._guards.factor(optimizers[1]) == 0.5
    assert torch.isfinite(bad.weight).all()
    alive = weakref.ref(optimizers[1])
    del optimizers, optimizer
    gc.collect()
    assert alive() is None


def test_an_optimizer_that_grows_is_guarded_anew(session, tmp_path):
    first, second = nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(first.parameters(), 0.1)
    for k in range(4):
        if k == 2:
            optimizer.add_param_group({"params": list(second.parameters())})
        optimizer.zero_grad()
        loss = second(first(torch.ones(1, 2))).sum() * (math.nan if k == 3 else 1.0)
        session.losses.note(loss)
        loss.backward()
        optimizer.step()
    session.close()
    assert torch.isfinite(first.weight).all() and torch.isfinite(second.weight).all()
    with RunFile(tmp_path / "run.db") as file:
        assert len(file.actions()) == 1


def test_buffers_of_modules_beside_the_parameters_are_part_of_the_state():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(3, 3)
            self.norm = nn.BatchNorm1d(3, affine=False)  # owns no parameter
            self.register_buffer("cache", torch.zeros(2), persistent=False)

    net = Net()
    tensors = TensorsOf(torch.optim.SGD(net.parameters(), 0.1))
    names = {name.split(".", 1)[1] for name, _ in tensors.named_buffers()}
    assert names == {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked", "cache"}
    state = {kind: {k: v.clone() for k, v in part.items()} for kind, part in tensors.state_dict().items()}
    net.cache = torch.full((2,), math.nan)  # replaced, not written to
    net.norm.running_mean.fill_(math.nan)
    tensors.load_state_dict(state)
    assert net.cache.tolist() == [0, 0] and net.norm.running_mean.tolist() == [0, 0, 0]


def test_settings_carry_the_guard_to_every_process():
    assert Settings.from_environment(Settings(guard=True).to_environment()).guard is True


def test_a_stop_is_raised_and_never_swallowed(session):
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def step(scale):
        optimizer.zero_grad()
        loss = model(torch.ones(1, 2)).sum() * scale
        session.losses.note(loss)
        loss.backward()
        optimizer.step()

    step(1.0)
    for _ in range(3):
        step(math.nan)
    with pytest.raises(DivergenceError):
        step(math.nan)
