"""Explosions that a history cannot see, where they began, and healthy runs of the same shapes that are left alone."""

from __future__ import annotations

import gzip
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
from gradsplit.watch.report.run_page import run_page
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


@pytest.mark.parametrize(("rate", "large"), [(1e-2, False), (0.3, True)])
def test_a_rate_that_replaces_the_weights_is_told_and_no_check_fails(tmp_path, rate, large):
    account = _account(tmp_path, lambda: _text(rate, steps=20))
    told = [said for said in findings(account) if "its matrices had grown to " in said]
    assert bool(told) == large
    assert any("a third of the learning rate of AdamW (now 0.3)" in one.reason for one in advice_of(account)) == large
    assert not fails_on("explosion", account)
    if large:
        (stream,) = account.streams
        assert 8 <= stream.outgrown[0] <= 18 and 4 < stream.outgrown[1] < 40


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
    assert "the learning rate rose to 300 times its largest before" in headline(account)
    assert "Lower the learning rate (now 6)" in advice_of(account)[0].reason


@pytest.mark.parametrize("times", [4.0, 30.0])
def test_a_rate_that_rises_at_once_is_blamed_where_the_loss_rises_and_left_alone_where_it_does_not(tmp_path, times):
    rate, loss, norm = np.full(80, 1e-3), np.linspace(2.0, 1.0, 80), noise(80, outline().num_leaves)
    rate[:10] = np.linspace(1e-4, 1e-3, 10)  # a warm-up
    rate[50:] *= times
    for name, after in (("worse", 6.0), ("as before", 1.0)):
        loss[52:] = after
        writer = RunWriter(tmp_path / f"{name}.db", {"argv": ["t.py"], "mode": "watch"})
        writer.write([rows_of(Stream(0, "Adam", outline()), norm, loss_S=loss.copy(), lr_S=rate)])
        writer.close()
    assert account_at(tmp_path / "as before.db").first is None
    first = account_at(tmp_path / "worse.db").first
    assert (first is not None) == (times > 5)
    if first is not None:
        assert (first.step, first.kind) == (50, "rate")
        told = headline(account_at(tmp_path / "worse.db"))
        assert told.startswith("It began at step 50: the learning rate rose to 30 times its largest before, and within")
        assert "what raised the learning rate" in advice_of(account_at(tmp_path / "worse.db"))[0].reason


@pytest.mark.parametrize("step", [2, 30])
def test_a_batch_unlike_the_others_is_told_from_a_layer_and_from_a_rate(tmp_path, step):
    def train():
        model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        for now in range(40):
            x = torch.randn(64, 8)
            optimizer.zero_grad()
            y = x[:, :1] * (1000.0 if now == step else 1.0)
            F.mse_loss(model(x), y).backward()
            optimizer.step()

    account = _account(tmp_path, train)
    assert (account.first.step, account.first.kind) == (step, "batch")
    assert headline(account).startswith(f"At step {step} the batch was unlike those before it: its largest value was ")
    assert "Look at that batch in the data" in advice_of(account)[0].reason


def test_a_batch_whose_values_nobody_saw_is_told_by_its_loss(tmp_path):
    stream, norm, loss = Stream(0, "AdamW", outline()), noise(80, outline().num_leaves), np.full(80, 2.0)
    norm[60], loss[60] = 100 * norm[60], 500.0
    names = list(dict.fromkeys(stream.outline.tensors_L))
    stream.about["names"] = names
    for name, grown in (("still", 1.0), ("moved", 5.0)):
        writer = RunWriter(tmp_path / f"{name}.db", {"argv": ["t.py"], "mode": "watch"})
        writer.write([rows_of(stream, norm, loss_S=loss)])
        lengths = np.full(len(names), 3.0, dtype=np.float32)
        writer.add_lengths([(0, 48, lengths), (0, 60, lengths * np.float32(grown))])
        writer.close()
    still, moved = (account_at(tmp_path / f"{name}.db").first for name in ("still", "moved"))
    assert (still.step, still.kind) == (60, "batch")
    assert "its loss was 250 times that of the five steps before" in still.reason
    assert (moved.step, moved.kind) == (60, "history"), "the weights had moved: it may not have been the batch"


def test_a_value_that_is_lost_beside_the_path_that_reads_it_is_named_where_it_was_made(tmp_path):
    class Agent(nn.Module):
        def __init__(self):
            super().__init__()
            self.critic, self.actor = (nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)) for _ in range(2))

    def train():
        agent = Agent()
        optimizer = torch.optim.Adam(agent.parameters(), 1e-3)
        for step in range(12):
            x = torch.randn(16, 4)
            value = agent.critic(x)
            value = value + torch.log(-value.abs() - 1) if step == 10 else value
            gain = (1 - value).detach()  # without its gradient, the actor is given it as data
            loss = (agent.actor(x) * gain).mean() + (value - 1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    first = _account(tmp_path, train).first
    assert (first.step, first.kind, first.tensor.rpartition(".")[0]) == (10, "forward", "critic.2")


def test_one_network_makes_what_the_other_is_given(tmp_path):
    def train():
        maker, critic = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)), nn.Linear(2, 1)
        makers, critics = torch.optim.Adam(maker.parameters(), 1e-3), torch.optim.Adam(critic.parameters(), 1e-3)
        for step in range(20):
            made = maker[1](maker[0](torch.randn(16, 4)))
            fake = maker[2](made / (made - made) if step == 15 else made)
            for optimizer, given, sign in ((critics, fake.detach(), 1), (makers, fake, -1)):
                optimizer.zero_grad()
                (sign * critic(given)).mean().backward()
                optimizer.step()

    account = _account(tmp_path, train)
    assert (account.first.step, account.first.kind) == (15, "forward")
    assert account.first.tensor.startswith("Sequential.0.") and account.first.stream == 1


def test_what_another_rank_saw_is_told_beside_the_gradients_they_share(tmp_path):
    norm = noise(80, outline().num_leaves)
    norm[60:] = np.nan
    for rank, name in ((0, "run.db"), (1, "run.rank1.db")):
        loss = np.full(80, 2.0)
        loss[60 + (rank == 0) :] = np.nan
        writer = RunWriter(tmp_path / name, {"argv": ["t.py"], "mode": "watch", "rank": rank, "world_size": 2})
        writer.write([rows_of(Stream(0, "SGD", outline()), norm, loss_S=loss)])
        if rank:
            writer.remark({"kind": "forward", "where": outline().tensors_L[0], "operation": "Log", "step": 60})
        writer.close()
    account = account_at(tmp_path / "run.db")
    assert (account.first.step, account.first.kind, account.first.rank) == (60, "forward", 1)
    assert headline(account).startswith("On rank 1: it began at step 60 in ")


def test_a_sudden_cause_within_slow_growth_is_where_it_began(tmp_path):
    norm = noise(130, outline().num_leaves) * np.exp(np.maximum(0, np.arange(130) - 60) * 0.08)[:, None]
    lengths = np.full(len(dict.fromkeys(outline().tensors_L)), 3.0, dtype=np.float32)
    stream = Stream(0, "SGD", outline())
    stream.about["names"] = list(dict.fromkeys(outline().tensors_L))
    for name, rate in (("slow", 1.0), ("raised", 20.0)):
        writer = RunWriter(tmp_path / f"{name}.db", {"argv": ["t.py"], "mode": "watch"})
        rates = np.where(np.arange(130) < 70, 0.01, 0.01 * rate)
        writer.write([rows_of(stream, norm, loss_S=np.full(130, 2.0), lr_S=rates)])
        writer.add_lengths([(0, 0, lengths)])
        writer.close()
    assert account_at(tmp_path / "slow.db").first.kind == "growth"
    raised = account_at(tmp_path / "raised.db").first
    assert (raised.kind, raised.step) == ("rate", 70)


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


def test_steps_that_a_scaler_skips_before_a_departure_belong_to_it(tmp_path):
    stream, norm, skipped = Stream(0, "AdamW", outline()), noise(80, outline().num_leaves), np.zeros(80, dtype=np.uint8)
    norm[50:55], skipped[50:55] = np.inf, 1
    norm[55:, 3] *= 1e4
    writer = RunWriter(tmp_path / "run.db", {"argv": ["t.py"], "mode": "watch"})
    writer.write([rows_of(stream, norm, skipped_S=skipped)])
    writer.close()
    account = account_at(tmp_path / "run.db")
    assert (account.first.step, account.first.kind, account.first.tensor) == (
        50,
        "history",
        stream.outline.tensors_L[3],
    )
    assert any("skipped 5 steps first" in said and "step 55" in said for said in findings(account))


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


def test_a_run_file_of_an_earlier_version_is_read(tmp_path):
    """Written before lengths of weights, remarks and turns were recorded: a gradient x 1e5 at step 20 of 24."""
    kept = ROOT / "tests" / "watch" / "record" / "older.db.gz"
    (tmp_path / "run.db").write_bytes(gzip.decompress(kept.read_bytes()))
    account = account_at(tmp_path / "run.db")
    assert account.num_rows == 24
    assert (account.first.step, account.first.tensor, account.first.kind) == (20, "2.weight", "history")
    assert headline(account) in report_text(account)
    assert "<title>gradsplit: train.py</title>" in run_page(account)


def test_the_guide_has_the_whole_glossary():
    guide = (ROOT / "docs/reference/sentences.md").read_text(encoding="utf8")
    for sentence, meaning in GLOSSARY.items():
        assert f"| {sentence} | {meaning} |" in guide


def test_the_glossary_explains_every_sentence():
    for start in ("It began at step", "No norm left", "The guard rolled back", "From step", "The script crashed"):
        assert any(start in sentence for sentence in GLOSSARY)
