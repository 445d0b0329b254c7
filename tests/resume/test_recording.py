"""Every action of a guard is in the run file, in the report's text and on its page, with names from outside escaped."""

from __future__ import annotations

import json
import math
import sqlite3

import pytest
import torch
from torch import nn

import gradsplit as gs
from gradsplit.resume.actions import GuardAction
from gradsplit.watch.record import Recorder, RunFile, RunFileError, RunWriter
from gradsplit.watch.report.account import account_of
from gradsplit.watch.report.run_page import run_page
from gradsplit.watch.report.text import report_text
from tests.resume.runs import data, net, sgd, train


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A run that rolled back twice and stopped: its file, its guard, and what it raised."""
    path = tmp_path_factory.mktemp("recorded") / "run.db"
    model = net()
    optimizer = sgd(model)
    recorder = Recorder([RunWriter(path, {"argv": ["train.py"], "mode": "control"})])
    splitter = gs.GradientSplitter(model, budget=gs.Fixed(10.0), optimizer=optimizer, sinks=[recorder])
    guard = gs.Guard(model, optimizer, splitter, every=10, max_rollbacks=2, patience=3)

    def poison(k):
        if k in (25, 33) or k > 45:
            model[0].weight.data.fill_(math.nan)

    with pytest.raises(gs.DivergenceError):
        train(guard, data(60), model, optimizer, splitter=splitter, before_step=poison)
    recorder.close()
    return path, guard


def test_the_run_file_keeps_every_action_whole(recorded):
    path, guard = recorded
    with RunFile(path) as file:
        kept = file.actions()
        events = [(event.step, event.kind, event.num) for event in file.events() if event.leaf is None]
    assert len(kept) == 3 and [action.kind for action in kept] == ["rolled_back", "rolled_back", "stopped"]
    assert [action.to_dict() for action in kept] == json.loads(json.dumps([a.to_dict() for a in guard.actions]))
    assert events == [(action.step, action.kind, action.num_undone) for action in kept]


def test_rows_are_numbered_on_over_a_rollback(recorded):
    with RunFile(recorded[0]) as file:
        steps = file.series(file.streams[0]).step_R.tolist()
    assert steps == list(range(len(steps)))


def test_the_report_tells_them_in_words(recorded):
    with RunFile(recorded[0]) as file:
        text = report_text(account_of(file))
    assert "The guard rolled back 2 times and then stopped the run: " in text
    assert "What the guard did" in text and "batches left out: epoch 0: 20 to 26" in text
    assert "Step 26: rolled back to step 20 (number 1), the loss is nan and these are not finite: 0.weight" in text


def test_the_page_shows_them_and_trusts_no_word(tmp_path):
    evil = "<img src=x onerror=alert(1)>"
    writer = RunWriter(tmp_path / "run.db", {"argv": ["train.py"]})
    recorder = Recorder([writer])
    model = nn.Linear(2, 2)
    splitter = gs.GradientSplitter(model, budget=gs.Fixed(1.0), sinks=[recorder])
    model(torch.ones(1, 2)).sum().backward()
    splitter.step()
    recorder.note(GuardAction("rolled_back", 9, 5, 1e9, evil, math.nan, 2.0, 0.5, 1, 5, evil, evil, (evil,)))
    recorder.close()
    with RunFile(tmp_path / "run.db") as file:
        page = run_page(account_of(file))
    assert evil not in page
    assert "The guard" in page and "&lt;img src=x" in page


def test_a_recorder_in_the_splitter_is_told_first_of_the_rows_and_then_of_the_action(tmp_path):
    model = net()
    optimizer = sgd(model)
    told = []

    class Sink:
        def write(self, batch):
            told.extend(["rows"] * sum(map(len, batch)))

        def note(self, action):
            told.append(action.kind)

        def close(self, **meta):
            told.append("closed")

    recorder = Recorder([Sink()], seconds=1000)
    splitter = gs.GradientSplitter(model, budget=gs.Fixed(1.0), optimizer=optimizer, sinks=[recorder])
    guard = gs.Guard(model, optimizer, splitter)
    train(guard, data(3), model, optimizer, splitter=splitter)
    guard.roll_back()
    recorder.close()
    assert told == ["rows"] * 3 + ["rolled_back", "closed"]


def test_a_sink_of_the_guards_own_is_called_with_every_action():
    model = net()
    optimizer = sgd(model)
    told = []
    guard = gs.Guard(model, optimizer, sinks=[told.append])
    train(guard, data(8, bad=(5,)), model, optimizer)
    assert told == guard.actions and len(told) == 1


@pytest.mark.parametrize("wrong", ['[{"kind": "rolled_back"}]', "[7]", '{"a": 1}', "7"])
def test_a_damaged_list_of_actions_is_named(tmp_path, wrong):
    RunWriter(tmp_path / "run.db", {}).close()
    with sqlite3.connect(tmp_path / "run.db") as connection:
        connection.execute("INSERT INTO meta VALUES ('guard', ?)", (wrong,))
    with RunFile(tmp_path / "run.db") as file, pytest.raises(RunFileError, match="expected the actions of a guard"):
        file.actions()
