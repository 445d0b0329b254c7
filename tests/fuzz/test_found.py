"""What fuzzing has found: these calls used to end in an error that told a user nothing, or in a wrong state."""

from __future__ import annotations

import copy
import sqlite3

import numpy as np
import pytest
import torch

import gradsplit as gs
from benchmarks.fuzz.run_files import sound_file
from gradsplit.plan import Layout
from gradsplit.split import check_state
from gradsplit.watch.record import RunFile
from gradsplit.watch.report.account import account_of
from gradsplit.watch.report.advice import advice_of
from gradsplit.watch.run.settings import VARIABLE, Settings, budget_from_words

LAYOUT = Layout.from_shapes({"w": (2, 3), "b": (2,)})


@pytest.mark.parametrize(
    "change",
    [
        {"boxes": None},
        {"shapes": 4},
        {"names": None},
        {"modules": ...},
        {"boxes": {"tensor_K": [0]}},
        {"boxes": {"row_start_K": [[0], 0]}},
        {"boxes": {"row_start_K": [0.5, 0.0]}},
        {"boxes": {"row_stop_K": []}},
        {"boxes": {"bin_K": [10**30, 0]}},
    ],
)
def test_a_damaged_plan_is_refused_in_our_words(change):
    state = gs.per_tensor(LAYOUT).to_dict()
    for key, value in change.items():
        if value is ...:
            del state[key]
        elif isinstance(value, dict):
            state[key] = {**state[key], **value}
        else:
            state[key] = value
    with pytest.raises(ValueError, match=r"Plan.from_dict\(…\): expected .* Make the plan again|expected"):
        gs.Plan.from_dict(state)


@pytest.mark.parametrize(
    ("energy", "words"),
    [
        (3, r"lbf\(energy=…\): expected a mapping from names to energies, got int"),
        ({"w": "much", "b": np.ones(2)}, r"lbf\(energy=…\): expected an array of numbers, got str at 'w'"),
        ({"w": np.ones((2, 3)), "b": [[1.0], [1.0, 2.0]]}, r"expected an array of numbers, got list at 'b'"),
    ],
)
def test_energies_that_are_none_are_named(energy, words):
    with pytest.raises(TypeError, match=words):
        gs.lbf(LAYOUT, energy)


@pytest.mark.parametrize(
    ("budget", "options", "name"),
    [
        (gs.Ema, {"ratio": "2"}, "ratio"),
        (gs.Ema, {"warmup": None}, "warmup"),
        (gs.Relative, {"factor": (1.0, 2.0)}, "factor"),
        (gs.RelativeStep, {"tau": None}, "tau"),
        (gs.ZScore, {"z": True}, "z"),
        (gs.Percentile, {"q": []}, "q"),
    ],
)
def test_a_constant_that_is_no_number_is_named(budget, options, name):
    with pytest.raises(TypeError, match=rf"{budget.__name__}\({name}=.*\): expected a number, got"):
        budget(**options)


def _splitter():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    splitter = gs.GradientSplitter(model, budget=gs.Ema(1.5), backend="reference")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    splitter.step()
    return splitter


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"top_lr": True}, "learning rates > 0"),
        ({"top_lr": ["0.1"]}, "learning rates > 0"),
        ({"top_lr": [float("nan")]}, "learning rates > 0"),
        ({"step_count": -1}, "a count of steps"),
        ({"step_count": None}, "a count of steps"),
        ({"history": []}, "the history of budgets"),
        ({"history": {7: [], "x": []}}, "the history of budgets"),
        ({"history": {"bin/ema/0": 3}}, "3 vectors of numbers"),
        ({"history": {"bin/ema/0": [[1.0] * 3]}}, "vectors of shape"),
        ({"history": {"bin/ema/0": [["a"] * 3, [0.0] * 3, [0.0] * 3]}}, "3 vectors of numbers"),
        ({"history": {"bin/ema/0": [[1.0] * 3, [0.0] * 3, [float("nan")] * 3]}}, "finite numbers >= 0"),
        ({"history": {"bin/ema/0": [[-1.0] * 3, [0.0] * 3, [0.0] * 3]}}, "finite numbers >= 0"),
    ],
)
def test_a_damaged_state_is_refused_and_changes_nothing(change, words):
    splitter = _splitter()
    before = copy.deepcopy(splitter.state_dict())
    with pytest.raises(ValueError, match=rf"GradientSplitter.load_state_dict\(…\): expected .*{words}"):
        splitter.load_state_dict({**before, **change})
    after = splitter.state_dict()
    assert after["step_count"] == before["step_count"]
    for old, new in zip(before["history"]["bin/ema/0"], after["history"]["bin/ema/0"], strict=True):
        assert torch.equal(old, new)


def test_the_state_of_something_else_is_refused_by_gso():
    model = torch.nn.Linear(3, 2)
    optimizer = gs.GSO(model, direction="adam")
    state = optimizer.state_dict()
    state["gradsplit"] = [{"fingerprint": state["gradsplit"][0]["fingerprint"]}]
    with pytest.raises(ValueError, match=r"GSO.load_state_dict\(…\): expected what state_dict\(\) returned"):
        optimizer.load_state_dict(state)
    with pytest.raises(ValueError, match="expected what state_dict"):
        check_state(None, ["top_lr"], call="f")


@pytest.mark.parametrize(
    "text", ["{", "7", "[]", "{}", '{"record": 3, "budget": [], "to": []}', '{"budget": 1, "to": []}']
)
def test_an_environment_that_is_not_ours_is_refused(text):
    with pytest.raises(ValueError, match=rf"{VARIABLE}=.*: expected what gradsplit run leaves there"):
        Settings.from_environment({VARIABLE: text})
    assert Settings.from_environment(Settings(max_megabytes=1).to_environment()) == Settings(max_megabytes=1)


def test_a_bound_beyond_all_numbers_is_none_and_not_a_warning():
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-30)
    splitter = gs.GradientSplitter(model, budget=gs.RelativeStep(tau=1e300), optimizer=optimizer)
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e30)
    assert (splitter.step().decision.scale_B == 1).all()


@pytest.mark.parametrize("number", ["inf", "-inf", "nan", "2.5"])
def test_a_count_in_words_of_a_budget_is_a_whole_number(number):
    with pytest.raises(ValueError, match=rf"--budget ema:warmup={number}: expected a whole number for 'warmup'"):
        budget_from_words([f"ema:warmup={number}"])


def test_advice_finds_the_stream_of_a_file_whose_numbers_do_not_begin_at_zero(tmp_path):
    (tmp_path / "run.db").write_bytes(sound_file())
    connection = sqlite3.connect(tmp_path / "run.db")
    for table, column in (("stream", "id"), ("chunk", "stream"), ("event", "stream")):
        connection.execute(f"UPDATE {table} SET {column} = 7")
    connection.commit()
    connection.close()
    with RunFile(tmp_path / "run.db") as file:
        account = account_of(file)
    assert account.first.stream == 7
    assert any("was bounded" in advice.reason for advice in advice_of(account))
