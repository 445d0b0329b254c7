"""How large each batch was: the root mean square of what the first layers were given, as a multiple of the first."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gradsplit.watch.record import RunFile
from gradsplit.watch.report import account as accounts
from gradsplit.watch.report import rules
from gradsplit.watch.report.account import fails_on
from gradsplit.watch.report.text import findings, headline
from gradsplit.watch.run.given import Given
from tests.watch.run.watched import account_at, watched


def _given(path, stream=0):
    with RunFile(path) as file:
        return file.series(file.streams[stream]).given_R


def _oracle(batches):
    """Root mean squares in float64, over the first."""
    sizes = np.array([np.sqrt((batch.double().numpy() ** 2).mean()) for batch in batches])
    return sizes / sizes[0]


class _Scaled(nn.Module):
    """A product with a parameter, without any layer of torch."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x):
        return x * self.scale


class _Last(nn.Module):
    """The output of a recurrent net."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)[0]


_NETS = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 1)), (4, 6)),
    "without bias": (lambda: nn.Linear(6, 2, bias=False), (3, 4, 6)),
    "convolution": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU()), (3, 2, 6, 6)),
    "norm first": (lambda: nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 2)), (4, 6)),
    "batch norm": (lambda: nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 2)), (4, 6)),
    "lstm": (lambda: _Last(nn.LSTM(6, 3)), (5, 4, 6)),
    "gru": (lambda: _Last(nn.GRU(6, 3)), (5, 4, 6)),
    "product": (_Scaled, (4, 6)),
}


@pytest.mark.parametrize("name", list(_NETS))
@pytest.mark.parametrize("half", [False, True], ids=["float32", "autocast"])
def test_the_column_is_the_size_of_the_batch(tmp_path, name, half):
    make, shape = _NETS[name]
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    batches = [torch.randn(shape) * (1 + i % 3) for i in range(12)]
    with watched(tmp_path / "run.db"):
        for x in batches:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = model(x).float().square().mean()
            loss.backward()
            optimizer.step()
    np.testing.assert_allclose(_given(tmp_path / "run.db"), _oracle(batches), rtol=2e-2 if half else 1e-5)


def test_of_several_passes_before_a_step_the_largest_counts(tmp_path):
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with watched(tmp_path / "run.db"):
        for step in range(6):
            for micro in range(3):
                x = torch.full((2, 4), 50.0 if (step, micro) == (4, 1) else 1.0)
                model(x).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    np.testing.assert_allclose(_given(tmp_path / "run.db"), [1, 1, 1, 1, 50, 1])


def test_two_networks_of_a_script_have_their_own(tmp_path):
    torch.manual_seed(0)
    maker, critic = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4)), nn.Linear(4, 1)
    of_maker, of_critic = (torch.optim.SGD(net.parameters(), 0.01) for net in (maker, critic))
    with watched(tmp_path / "run.db"):
        for step in range(8):
            real, noise = torch.ones(2, 4) * (30 if step == 5 else 1), torch.ones(2, 3)
            of_critic.zero_grad()
            (critic(maker(noise).detach()).mean() - critic(real).mean()).backward()
            of_critic.step()
            of_maker.zero_grad()
            critic(maker(noise)).mean().backward()
            of_maker.step()
    assert _given(tmp_path / "run.db", 0)[5] == pytest.approx(30)
    np.testing.assert_allclose(_given(tmp_path / "run.db", 1), 1.0)


def test_updates_by_hand_have_the_column_too(tmp_path):
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    with watched(tmp_path / "run.db"):
        for step in range(8):
            model(torch.ones(2, 4) * (20 if step == 5 else 1)).mean().backward()
            for parameter in model.parameters():
                parameter.data.add_(parameter.grad, alpha=-0.01)
                parameter.grad = None
    np.testing.assert_allclose(_given(tmp_path / "run.db"), [1, 1, 1, 1, 1, 20, 1, 1])


def test_an_odd_batch_that_takes_another_way_through_the_layer_is_seen(tmp_path):
    """A linear map of a batch that is not contiguous is another operation than that of one that is."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with watched(tmp_path / "run.db"):
        for step in range(30):
            x = torch.ones(3, 7, 4)[:, :-1]
            model(x * 1000 if step == 20 else x).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    np.testing.assert_allclose(_given(tmp_path / "run.db"), np.where(np.arange(30) == 20, 1000, 1), rtol=1e-5)


def test_words_have_no_size(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with watched(tmp_path / "run.db"):
        for _ in range(5):
            model(torch.randint(0, 7, (3, 2))).mean().backward()
            optimizer.step()
    assert np.isnan(_given(tmp_path / "run.db")).all()


def test_a_value_that_is_lost_is_inf_and_sticks_to_its_step():
    given, model = Given(), nn.Linear(2, 1)
    for value, expected in ((1.0, 1.0), (math.nan, math.inf), (3.0, 3.0)):
        given.look(model(torch.full((2, 2), value)).mean())
        given.look(model(torch.full((2, 2), 0.5)).mean())
        assert given.take() == expected


def test_graphs_of_ever_other_kinds_are_left_alone():
    """Each graph is longer than the one before: what is seen is right, and after a while few graphs are searched."""
    given, model = Given(), nn.Linear(2, 2)
    for length in range(1, 300):
        x = torch.full((2, 2), float(length))
        y = model(x)
        for _ in range(length):
            y = torch.tanh(y)
        given.look(y.mean())
    assert given._missed >= 64
    assert len(given._ways) <= 8


@pytest.mark.parametrize("jump", [False, True])
def test_no_part_of_the_forward_pass_is_computed_again(tmp_path, jump):
    """What a checkpoint keeps is made anew by whoever asks for it; what hooks keep is unpacked by them."""
    calls, unpacked = 0, 0

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            nonlocal calls
            calls += 1
            return torch.tanh(self.inner(x))

    def unpack(x):
        nonlocal unpacked
        unpacked += 1
        return x

    def train():
        nonlocal calls, unpacked
        calls, unpacked = 0, 0
        torch.manual_seed(0)
        block, head = Block(), nn.Linear(4, 1)
        optimizer = torch.optim.SGD([*block.parameters(), *head.parameters()], 0.01)
        for step in range(10):
            optimizer.zero_grad()
            x = torch.randn(3, 4)
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
                y = head(x)
            factor = 100.0 if jump and step == 8 else 1.0
            (factor * (y + head(checkpoint(block, x, use_reentrant=False)))).square().mean().backward()
            optimizer.step()
        return calls, unpacked, [float(p.detach().sum()) for p in block.parameters()]

    alone = train()
    with watched(tmp_path / "run.db"):
        beside = train()
    assert beside == alone


def _trained(path, *, at=-1, times=1.0, normalised=True, steps=40):
    torch.manual_seed(0)
    layers = [nn.Linear(8, 32), *([nn.LayerNorm(32)] if normalised else []), nn.ReLU(), nn.Linear(32, 1)]
    model = nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    with watched(path):
        for step in range(steps):
            x = torch.randn(16, 8)
            optimizer.zero_grad()
            (model(x * (times if step == at else 1.0)) - x[:, :1].sign()).square().mean().backward()
            optimizer.step()
    return account_at(path)


@pytest.mark.parametrize("at", [3, 25, 39])
def test_a_batch_that_a_normalisation_hides_is_told_and_fails_no_check(tmp_path, at):
    account = _trained(tmp_path / "run.db", at=at, times=1000.0)
    assert headline(account).startswith("No norm left its own history")
    (told,) = [line for line in findings(account) if "as large as any before it" in line]
    assert f"the batch of step {at} was" in told
    assert account.streams[0].larger[1] == pytest.approx(1000, rel=0.4)
    assert not fails_on("explosion", account)


@pytest.mark.parametrize(("at", "times"), [(-1, 1.0), (20, 5.0), (1, 1000.0)], ids=["none", "fivefold", "too early"])
def test_an_ordinary_batch_is_not_told(tmp_path, at, times):
    assert "as large as any before" not in " ".join(findings(_trained(tmp_path / "run.db", at=at, times=times)))


def test_a_batch_that_does_harm_is_the_event(tmp_path):
    account = _trained(tmp_path / "run.db", at=25, times=1000.0, normalised=False)
    assert (account.first.step, account.first.kind) == (25, "batch")
    assert "the root mean square of what the first layer was given was" in headline(account)
    assert not [line for line in findings(account) if "as large as any before it" in line], "it is told once"
    assert fails_on("explosion", account)


def test_without_the_rule_such_a_batch_is_not_told(tmp_path, monkeypatch):
    monkeypatch.setattr(accounts, "larger_batch", lambda series: (-1, 0.0))
    account = _trained(tmp_path / "run.db", at=25, times=1000.0)
    assert "as large as any before" not in " ".join(findings(account))


def test_the_rule_waits_for_three_batches_and_forgets_none():
    def row_of(*given):
        series = type("Series", (), {"given_R": np.array(given, dtype=np.float32)})
        return rules.larger_batch(series)

    assert row_of(1, 1, 1, 10.5) == (3, pytest.approx(10.5))
    assert row_of(1, 1, 20, 1, 1) == (-1, 0.0)
    assert row_of(1, 20, 1, 1, 150) == (-1, 0.0)
    assert row_of(np.nan, 1, np.inf, 1, 1, np.nan, 11, 500) == (6, pytest.approx(11))
