"""Explosions that a history cannot see, where they began, and healthy runs of the same shapes that are left alone."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gradsplit.watch.record import RunWriter, Stream
from gradsplit.watch.report.account import fails_on
from gradsplit.watch.report.advice import advice_of
from gradsplit.watch.report.text import GLOSSARY, findings, headline, report_text
from tests.architecture.sources import ROOT
from tests.watch.record.recorded import noise, outline, rows_of
from tests.watch.run.watched import account_at, watched


def _account(tmp_path, train, *, seed=0):
    torch.manual_seed(seed)
    with watched(tmp_path / "run.db"):
        train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a report never warns on the user's standard error
        return account_at(tmp_path / "run.db")


def _fit(model, optimizer, steps, spoil=lambda step: None):
    for step in range(steps):
        x = torch.randn(64, 8)
        optimizer.zero_grad()
        spoil(step)
        (model(x) - x[:, :1]).square().mean().backward()
        optimizer.step()


def _mlp(rate, optimizer="AdamW", steps=60):
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
    _fit(model, getattr(torch.optim, optimizer)(model.parameters(), lr=rate), steps)


def _growing(factor, steps=91):
    model, scale = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)), 1.0
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    for _ in range(steps):
        x = torch.randn(64, 8)
        optimizer.zero_grad()
        scale *= factor
        (scale * (model(x) - x[:, :1])).square().mean().backward()
        optimizer.step()


def _gan(rate, *, penalty, steps=150):
    maker = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    critic = nn.Sequential(nn.Linear(2, 64), nn.LeakyReLU(0.2), nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1))
    makers, critics = (torch.optim.Adam(net.parameters(), rate, betas=(0.5, 0.999)) for net in (maker, critic))
    for _ in range(steps):
        angle = torch.rand(64) * 2 * math.pi
        real, fake = 2 * torch.stack([angle.cos(), angle.sin()], 1), maker(torch.randn(64, 8)).detach()
        critics.zero_grad()
        if penalty:
            between = (real + torch.rand(64, 1) * (fake - real)).requires_grad_()
            (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
            loss = critic(fake).mean() - critic(real).mean() + 10 * (slope.norm(dim=1) - 1).square().mean()
        else:
            loss = F.softplus(-critic(real)).mean() + F.softplus(critic(fake)).mean()
        loss.backward()
        critics.step()
        makers.zero_grad()
        told = critic(maker(torch.randn(64, 8)))
        (-told.mean() if penalty else F.softplus(-told).mean()).backward()
        makers.step()


class _Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.body, self.head = nn.Embedding(32, 32), nn.LSTM(32, 32, batch_first=True), nn.Linear(32, 32)

    def forward(self, x):
        return self.head(self.body(self.table(x))[0])


def _text(rate, steps=60):
    model = _Text()
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    for _ in range(steps):
        x = (torch.randint(0, 32, (16, 1)) + torch.randint(1, 4, (16, 1)) * torch.arange(17)) % 32
        optimizer.zero_grad()
        F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten()).backward()
        optimizer.step()


def _zero_head(steps=100):
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    nn.init.zeros_(model[2].weight)
    nn.init.zeros_(model[2].bias)
    _fit(model, torch.optim.AdamW(model.parameters(), 1e-2), steps)


def _overfit(steps=200):
    model, x, y = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 1)), torch.randn(16, 8), torch.randn(16, 1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize(
    "train",
    [
        lambda: _mlp(1e-2),
        lambda: _mlp(0.05, "SGD"),
        lambda: _text(1e-2),
        lambda: _gan(2e-3, penalty=False),
        lambda: _gan(1e-3, penalty=True),
        _zero_head,
        _overfit,
    ],
    ids=["MLP", "SGD", "text", "GAN", "WGAN-GP", "zero head", "overfit"],
)
def test_healthy_runs_are_left_alone(tmp_path, train):
    account = _account(tmp_path, train)
    assert account.first is None, headline(account)
    assert not fails_on("explosion", account)
    assert [advice.command for advice in advice_of(account)] == [""]


@pytest.mark.parametrize(
    ("train", "latest"),
    [
        (lambda: _mlp(1.0), 3),
        (lambda: _mlp(3.0, "SGD"), 3),
        (lambda: _gan(0.2, penalty=False), 3),
        (lambda: _gan(0.2, penalty=True), 5),
        (lambda: _growing(1.03), 50),
        (lambda: _growing(1.2), 20),
    ],
    ids=["rate 1", "SGD 3", "GAN", "WGAN-GP", "slow", "fast"],
)
def test_an_explosion_from_the_start_is_seen_and_the_advice_runs(tmp_path, train, latest):
    account = _account(tmp_path, train)
    assert account.first is not None
    assert account.first.step <= latest
    assert fails_on("explosion", account)
    told = " ".join(advice.reason + advice.command for advice in advice_of(account))
    for word in ("learning rate", "--guard", "diagnose", "GSO"):
        assert word in told


class _Deep(nn.Module):
    def __init__(self, spoil):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(8))
        self.head, self.spoil, self.step = nn.Linear(8, 1), spoil, -1

    def forward(self, x):
        for number, layer in enumerate(self.layers):
            x = x + 0.5 * torch.tanh(layer(x))
            x = self.spoil(x, self.step) if number == 3 else x
        return self.head(x)


class _Louder(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    def backward(context, signal):
        return signal * 3000.0


def _deep(spoil, step=60):
    def train():
        model = _Deep(lambda x, now: spoil(x) if now == step else x)

        def next_step(now):
            model.step = now

        _fit(model, torch.optim.AdamW(model.parameters(), 1e-3), step + 1, next_step)

    return train


@pytest.mark.parametrize("step", [0, 3, 60])
def test_a_value_lost_in_backward_is_named_at_the_last_lost_module(tmp_path, step):
    account = _account(tmp_path, _deep(lambda x: x + torch.sqrt((x * 0).abs()), step))
    assert (account.first.step, account.first.kind) == (step, "backward")
    assert account.first.tensor == "layers.3.weight"
    assert headline(account).startswith(f"It began at step {step} in layers.3.weight: the gradient was not finite")


@pytest.mark.parametrize("step", [1, 60])
def test_a_value_lost_in_forward_is_named_where_it_was_lost(tmp_path, step):
    account = _account(tmp_path, _deep(lambda x: x + torch.log((x * 0) - 1), step))
    assert (account.first.step, account.first.kind) == (step, "forward")
    assert "in layers.3: the forward pass made the first value that was not finite" in headline(account)


def test_a_bad_batch_is_told_from_a_bad_layer(tmp_path):
    def train():
        model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        for step in range(20):
            x = torch.randn(64, 8)
            if step == 15:
                x[3, 2] = math.nan
            optimizer.zero_grad()
            (model(x) - 1).square().mean().backward()
            optimizer.step()

    account = _account(tmp_path, train)
    assert headline(account) == "At step 15 the batch itself had values that were not finite."


def test_several_departures_are_one_event_at_its_place(tmp_path):
    account = _account(tmp_path, _deep(_Louder.apply))
    assert (account.first.step, account.first.tensor.rpartition(".")[0]) == (60, "layers.3")


def test_the_larger_rise_wins_over_the_quieter_tensor(tmp_path):
    norm = np.repeat(np.exp(0.3 * np.random.default_rng(0).standard_normal((80, 1))), 8, axis=1)
    stream = Stream(0, "SGD", outline({f"l.{i}.weight": (1, 4) for i in range(8)}))
    norm[:, 1] = 1.0  # quiet: its spread is the smallest
    norm[60, 1] *= 468
    norm[60, 6] *= 3630
    writer = RunWriter(tmp_path / "run.db", {"argv": ["t.py"], "mode": "watch"})
    writer.write([rows_of(stream, norm)])
    writer.close()
    first = account_at(tmp_path / "run.db").first
    assert (first.step, first.tensor) == (60, "l.6.weight")


def test_weights_that_jump_are_named(tmp_path):
    def train():
        model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(5)), nn.Linear(8, 1))

        def jump(step):
            if step == 40:
                with torch.no_grad():
                    model[3].weight *= 1000

        _fit(model, torch.optim.AdamW(model.parameters(), 1e-3), 45, jump)

    account = _account(tmp_path, train)
    assert (account.first.step, account.first.tensor, account.first.kind) == (40, "3.weight", "weights")
    assert "its weights jumped" in headline(account)


def test_a_rate_that_rises_is_told(tmp_path):
    def train():
        model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
        optimizer = torch.optim.SGD(model.parameters(), 0.02)

        def raise_it(step):
            optimizer.param_groups[0]["lr"] = 0.02 if step < 60 else 6.0

        _fit(model, optimizer, 64, raise_it)

    account = _account(tmp_path, train)
    assert account.first.step in (60, 61)
    assert any("learning rate had risen to 300 times its usual" in sentence for sentence in findings(account))
    assert "Lower the learning rate (now 6)" in advice_of(account)[0].reason


def test_no_clip_advice_to_adam_and_a_command_that_is_told_right_to_sgd(tmp_path):
    def train(optimizer):
        model = nn.Linear(8, 1)
        chosen = getattr(torch.optim, optimizer)(model.parameters(), 1e-3)
        for _ in range(20):
            x = torch.randn(64, 8)
            chosen.zero_grad()
            (model(x) - x[:, :1]).square().mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            chosen.step()

    for name in ("Adam", "SGD"):
        (tmp_path / name).mkdir()
        (advice,) = advice_of(_account(tmp_path / name, lambda name=name: train(name)))
        assert ("clip_grad_norm_" in advice.reason) == (name == "SGD")
        assert ("Take that line out of the script first" in advice.reason) == (name == "SGD")


def test_skipped_steps_of_a_scaler_are_ordinary_unless_they_never_end(tmp_path):
    stream, skipped = Stream(0, "AdamW", outline()), np.zeros(80, dtype=np.uint8)
    for name, rows in (("few", [3, 4, 30]), ("stuck", range(50, 80))):
        norm = noise(80, stream.outline.num_leaves)
        norm[list(rows)] = np.inf
        skipped[:] = 0
        skipped[list(rows)] = 1
        writer = RunWriter(tmp_path / f"{name}.db", {"argv": ["t.py"], "mode": "watch"})
        writer.write([rows_of(stream, norm, skipped_S=skipped.copy())])
        writer.close()
    assert account_at(tmp_path / "few.db").first is None
    assert account_at(tmp_path / "stuck.db").first.step == 50


def test_the_loss_before_is_that_of_the_step_before_and_nothing_lost_is_compared(tmp_path):
    stream, norm = Stream(0, "AdamW", outline()), noise(80, outline().num_leaves)
    norm[60, 2] = np.nan
    loss = np.full(80, 2.0)
    loss[59], loss[62] = 1.3e21, np.nan
    writer = RunWriter(tmp_path / "run.db", {"argv": ["t.py"], "mode": "watch"})
    writer.write([rows_of(stream, norm, loss_S=loss)])
    writer.close()
    account = account_at(tmp_path / "run.db")
    told = report_text(account)
    if account.first.step == 60:
        assert "Loss: 1.3e+21 in the step before, not finite in this step and the ten after." in told
    for wrong in ("at most not finite", "(not finite times)", "score", "all left its history"):
        assert wrong not in told


def test_the_guide_has_the_whole_glossary():
    guide = (ROOT / "docs/reference/sentences.md").read_text(encoding="utf8")
    for sentence, meaning in GLOSSARY.items():
        assert f"| {sentence} | {meaning} |" in guide


def test_the_glossary_explains_every_sentence():
    for start in ("It began at step", "No norm left", "The guard rolled back", "From step", "The script crashed"):
        assert any(start in sentence for sentence in GLOSSARY)
