"""`gradsplit run --samples`: the samples that stood out at a departure are named, and the training stays as it is."""

from __future__ import annotations

import copy
import functools
import io
import json
import math

import pytest
import torch
import typer
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from typer.testing import CliRunner

import gradsplit as gs
from gradsplit.cli import report
from gradsplit.watch.record import Recorder, RunFile, RunWriter
from gradsplit.watch.report.account import account_of
from gradsplit.watch.report.run_page import run_page
from gradsplit.watch.report.samples import sample_rows
from gradsplit.watch.report.text import findings, report_text
from tests.distributed.ranks import on_ranks
from tests.watch.run.processes import run_gradsplit
from tests.watch.run.watched import account_at, watched

STEPS, AT, SIZE = 24, 18, 16


def _regression():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))


def _pictures(norm=True):
    between = [nn.BatchNorm2d(4)] if norm else []
    return nn.Sequential(nn.Conv2d(1, 4, 3), *between, nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(144, 5))


def _rows(size=SIZE):
    x = torch.randn(size, 8)
    return x, 2 * x[:, :1]


def _images(size=SIZE):
    target = torch.randint(5, (size,))
    return torch.randn(size, 1, 8, 8) + target[:, None, None, None], target


def _loss(model, x, target):
    output = model(x)
    return F.cross_entropy(output, target) if output.shape != target.shape else (output - target).square().mean()


def _plant(fault, x, target, chosen):
    for i in chosen:
        if fault == "nan":
            x[i].view(-1)[3] = math.nan
        elif fault == "large":
            x[i] *= 1e4
        elif fault == "label":
            target[i] += 1e3
    if fault == "whole":
        x *= 1e3
    if fault == "loss":
        target += 1e3


def _train(path, make, batch, fault, chosen, *, seed, steps=STEPS, samples=True, train=None):
    """Train with the fault in one step, and return the weights."""
    torch.manual_seed(seed)
    with watched(path, samples=samples):
        model = make()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        for step in range(steps):
            x, target = batch()
            if step == AT:
                _plant(fault, x, target, chosen)
            optimizer.zero_grad()
            if train is None:
                _loss(model, x, target).backward()
            else:
                train(model, x, target)
            optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


def _named(account):
    return {row.sample for one in account.samples_at_first for row in one.rows}


def _said(account):
    return [sentence for sentence in findings(account) if "ample" in sentence]


@pytest.mark.parametrize(("fault", "said"), [("whole", "the whole batch was"), ("loss", "they were alike")])
def test_no_sample_of_a_batch_that_is_unlike_as_a_whole_is_named(tmp_path, fault, said):
    for seed in range(2):
        _train(tmp_path / f"{seed}.db", _regression, _rows, fault, (), seed=seed)
        account = account_at(tmp_path / f"{seed}.db")
        assert account.first is not None and account.first.step == AT and not _named(account)
        assert f"No sample of the batch of step {AT} stood out" in _said(account)[0] and said in _said(account)[0]


@pytest.mark.parametrize(
    ("make", "batch", "fault"),
    [(_regression, _rows, "large"), (_pictures, _images, "nan"), (_pictures, _images, "none")],
)
def test_the_training_is_the_same_to_the_last_bit(tmp_path, make, batch, fault):
    with_samples, without = (
        _train(tmp_path / f"{samples}.db", make, batch, fault, {5}, seed=1, samples=samples)
        for samples in (True, False)
    )
    for a, b in zip(with_samples, without, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_the_report_says_which_sample_and_what_to_do(tmp_path):
    _train(tmp_path / "run.db", _pictures, _images, "nan", {5}, seed=0)
    account = account_at(tmp_path / "run.db")
    assert _said(account) == [
        f"Sample 5 of the batch of step {AT} stood out (not finite, first in layer 0): look at it; gs.SampleSplitter "
        "bounds such samples.",
        "The samples were not looked at in 2 parameters whose layers have no rule, or did not run where it can be "
        "seen: 1.weight, 1.bias.",
    ]
    assert f"Look at sample 5 of the batch of step {AT} in the data." in report_text(account)
    page = run_page(account)
    assert "Samples that stood out of their batch" in page and ">not finite<" in page


def test_without_the_option_nothing_is_said_of_samples(tmp_path):
    _train(tmp_path / "run.db", _regression, _rows, "large", {5}, seed=0, samples=False)
    account = account_at(tmp_path / "run.db")
    assert account.first is not None and not _said(account) and not account.samples_at_first


def test_a_departure_that_the_rate_made_names_nobody(tmp_path):
    torch.manual_seed(0)
    with watched(tmp_path / "run.db", samples=True):
        model = _regression()
        optimizer = torch.optim.SGD(model.parameters(), 1e-3)
        for step in range(60):
            optimizer.param_groups[0]["lr"] = 1e-3 if step < 40 else 10.0
            x, target = _rows()
            optimizer.zero_grad()
            _loss(model, x, target).backward()
            optimizer.step()
    account = account_at(tmp_path / "run.db")
    assert account.first is not None and account.first.kind == "rate" and not account.samples_at_first


def test_with_accumulation_the_micro_batch_is_named(tmp_path):
    def train(model, x, target):
        for part in range(4):
            rows = slice(4 * part, 4 * part + 4)
            (_loss(model, x[rows], target[rows]) / 4).backward()

    _train(tmp_path / "run.db", _regression, _rows, "large", {9}, seed=0, train=train)
    assert f"Sample 1 of micro-batch 2 of step {AT} stood out" in _said(account_at(tmp_path / "run.db"))[0]


def test_a_graph_compiled_by_torch_compile_is_one_layer(tmp_path):
    def make():
        return torch.compile(_pictures(norm=False), backend="aot_eager")

    weights = _train(
        tmp_path / "run.db", make, _images, "large", {7}, seed=1
    )  # with seed 0 the net is right about this image, so nothing departs
    account = account_at(tmp_path / "run.db")
    assert _named(account) == {7} and "most in the compiled model" in _said(account)[0]
    same = _train(tmp_path / "without.db", make, _images, "large", {7}, seed=1, samples=False)
    assert all(torch.equal(a, b) for a, b in zip(weights, same, strict=True))


@pytest.mark.parametrize("seed", range(3))
def test_a_large_sample_in_front_of_batch_norm_is_named_without_a_departure(tmp_path, seed):
    _train(tmp_path / "run.db", _pictures, _images, "large", {7}, seed=seed)
    account = account_at(tmp_path / "run.db")
    (said,) = _said(account)
    assert said.startswith(f"Sample 7 of the batch of step {AT} (the input of layer 0, ")
    assert "times the usual one) stood out by the input alone: look at the data." in said
    row = sample_rows([one for one in account.streams[0].samples if one.by == "input"])[0]
    assert row[:4] == [str(AT), "0", "7", "0"] and 1e3 < float(row[4]) < 5e4


def test_a_model_compiled_in_place_is_said_to_be_unseen(tmp_path):
    def make():
        model = _regression()
        model.compile(backend="aot_eager")
        return model

    _train(tmp_path / "run.db", make, _rows, "large", {7}, seed=0)
    (said,) = _said(account_at(tmp_path / "run.db"))
    assert "were not seen: no layer with a rule ran outside of a compiled graph" in said


class _Checkpointed(nn.Module):
    def __init__(self, *, reentrant):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 1)
        self.reentrant = reentrant

    def forward(self, x):
        x = checkpoint(lambda y: self.middle(y).relu(), self.first(x).relu(), use_reentrant=self.reentrant)
        return self.last(x)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_belong_to_the_pass_they_run_in(tmp_path, reentrant):
    _train(tmp_path / "run.db", lambda: _Checkpointed(reentrant=reentrant), _rows, "large", {7}, seed=0)
    account = account_at(tmp_path / "run.db")
    (reading,) = account.samples_at_first
    assert reading.num_passes == 1 and _named(account) == {7} and not reading.unruled


class _Recurrent(nn.Module):
    def __init__(self, *, batch_first):
        super().__init__()
        self.net, self.last, self.batch_first = nn.LSTM(4, 8, batch_first=batch_first), nn.Linear(8, 1), batch_first

    def forward(self, x):
        return self.last(self.net(x if self.batch_first else x.transpose(0, 1))[1][0][-1])


@pytest.mark.parametrize("batch_first", [True, False])
def test_recurrent_nets_say_where_their_batch_is(tmp_path, batch_first):
    def batch():
        return torch.randn(6, 9, 4), torch.randn(6, 1)

    _train(tmp_path / "run.db", lambda: _Recurrent(batch_first=batch_first), batch, "nan", {4}, seed=0)
    assert _named(account_at(tmp_path / "run.db")) == {4}


@pytest.mark.parametrize("shape", [(1, 8), (8,)], ids=["one", "none"])
def test_without_a_batch_nobody_is_named(tmp_path, shape):
    def batch():
        return torch.randn(shape), torch.randn(*shape[:-1], 1)

    torch.manual_seed(0)
    with watched(tmp_path / "run.db", samples=True):
        model = _regression()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        for step in range(STEPS):
            x, target = batch()
            optimizer.zero_grad()
            _loss(model, x * (math.nan if step == AT else 1.0), target).backward()
            optimizer.step()
    (said,) = _said(account_at(tmp_path / "run.db"))
    assert "it has one sample, or no dimension of samples" in said


def test_two_networks_name_their_own_samples(tmp_path):
    torch.manual_seed(0)
    with watched(tmp_path / "run.db", samples=True):
        nets = [_regression(), nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 1))]
        optimizers = [torch.optim.AdamW(net.parameters(), 1e-3) for net in nets]
        for step in range(STEPS):
            for which, (net, optimizer) in enumerate(zip(nets, optimizers, strict=True)):
                x, target = _rows()
                if step == AT and which == 1:
                    target[3] += 1e4
                optimizer.zero_grad()
                _loss(net, x, target).backward()
                optimizer.step()
    account = account_at(tmp_path / "run.db")
    assert account.first is not None and account.first.stream == 1 and _named(account) == {3}
    (reading,) = account.samples_at_first
    assert reading.num_passes == 1


def test_a_model_can_be_copied_pickled_and_scripted_as_ever(tmp_path):
    with watched(tmp_path / "run.db", samples=True):
        model = _regression()
        model(torch.randn(2, 8)).sum().backward()
        copy.deepcopy(model)
        torch.jit.script(model)
        file = io.BytesIO()
        torch.save(model, file)
        assert b"gradsplit" not in file.getvalue()
    assert not torch.nn.modules.module._global_forward_hooks


@pytest.mark.filterwarnings("ignore:.*no limit.*")
def test_a_recorder_in_ones_own_loop_does_the_same(tmp_path):
    torch.manual_seed(0)
    model = _regression()
    recorder = Recorder([RunWriter(tmp_path / "run.db")], samples=model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    gs.GradientSplitter(model, budget=gs.Fixed(1e9), sinks=[recorder]).attach(optimizer)
    for step in range(STEPS):
        x, target = _rows()
        if step == AT:
            x[5] *= 1e4
        optimizer.zero_grad()
        _loss(model, x, target).backward()
        optimizer.step()
    recorder.close()
    with RunFile(tmp_path / "run.db") as file:
        account = account_of(file)
    assert _named(account) == {5}
    assert not torch.nn.modules.module._global_forward_hooks


def test_a_recorder_asks_for_the_model():
    with pytest.raises(ValueError, match=r"Recorder\(samples=True\): expected the model .*samples=model"):
        Recorder([], samples=True)


_SCRIPT = """
import torch
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
optimizer = torch.optim.SGD(model.parameters(), 0.01)
for step in range(30):
    x = torch.randn(8, 4)
    if step == 20:
        x[3, 1] = float("nan")
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()
"""


def test_the_command_line_takes_the_option(tmp_path):
    (tmp_path / "train.py").write_text(_SCRIPT)
    done = run_gradsplit(tmp_path, "--watch", "--samples", "train.py")
    assert done.returncode == 0, done.stderr
    assert "Sample 3 of the batch of step 20 stood out" in _said(account_at(tmp_path / "run.db"))[0]
    app = typer.Typer()
    app.command()(report.run)
    words = [str(tmp_path / "run.db"), "--no-page", "--jsonl", str(tmp_path / "steps")]
    assert CliRunner().invoke(app, words).exit_code == 0
    lines = [json.loads(line) for line in (tmp_path / "steps").read_text().splitlines()]
    assert len(lines) == 30 and "samples" not in lines[19]
    assert lines[20]["samples"] == [{"pass": 0, "sample": 3, "layer": "0", "ratio": None, "num_layers": 1}]


def _on_a_rank(rank, world, folder):
    """Two trainings, one after the other; the second rank's batch has the fault."""
    for name, wrap in (
        ("ddp", nn.parallel.DistributedDataParallel),
        ("fsdp", lambda net: fully_shard(net, mesh=init_device_mesh("cpu", (world,)))),
    ):
        torch.manual_seed(0)
        with watched(folder / f"{name}.db", samples=True):
            model = wrap(_regression())
            optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
            torch.manual_seed(rank)
            for step in range(STEPS):
                x, target = _rows()
                if step == AT and rank == 1:
                    target[6] += 1e3
                optimizer.zero_grad()
                _loss(model, x, target).backward()
                optimizer.step()


@pytest.mark.parametrize("ways", [("ddp", "fsdp")])
def test_each_rank_names_its_own_samples_and_the_report_of_rank_0_has_them(tmp_path, ways):
    on_ranks(2, functools.partial(_on_a_rank, folder=tmp_path))
    for way in ways:
        assert not [row for one in _readings(tmp_path / f"{way}.db") for row in one["rows"]]
        (reading,) = account_at(tmp_path / f"{way}.db").samples_at_first
        assert (reading.rank, [row.sample for row in reading.rows]) == (1, [6])
        assert f"Sample 6 of the batch of step {AT} on rank 1 stood out" in _said(account_at(tmp_path / f"{way}.db"))[0]


def _readings(path):
    with RunFile(path) as file:
        return [one for one in file.meta.get("remarks", []) if one["kind"] == "samples"]
