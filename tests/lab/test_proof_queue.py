"""The queue of the proof: what is missing or dies is named, and the rest of the queue goes on."""

from __future__ import annotations

import json
import statistics

import pytest

from benchmarks.proof import costs, numbers, page, picture, plan, runs, store
from gradsplit.lab.task import MissingDataError, MissingPackageError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "RUNS", tmp_path / "runs.jsonl")
    monkeypatch.setattr(store, "FAILED", tmp_path / "failed.jsonl")
    return tmp_path


def _jobs(*methods, workload="plain-stack"):
    return [plan.Job(workload, 2, method, 0.01, seed) for seed in (0, 1) for method in methods]


def _lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf8").splitlines()] if path.is_file() else []


def _result(job):
    return {"score": 0.5, "diverged": False, "cpu_ms_a_step": 1.0}


def test_a_run_that_dies_is_a_line_of_its_own_and_is_tried_again_at_the_next_start(folder, monkeypatch, capsys):
    ran = []

    def run(job):
        ran.append(job.key)
        if job.method == "soap":
            raise ZeroDivisionError("planted")
        return _result(job)

    monkeypatch.setattr(runs, "run", run)
    monkeypatch.setitem(plan.GROUPS, "here", lambda: _jobs("adamw", "soap"))
    runs.execute(["here"])
    assert [row["method"] for row in _lines(folder / "runs.jsonl")] == ["adamw", "adamw"]
    assert {row["why"] for row in _lines(folder / "failed.jsonl")} == {"ZeroDivisionError: planted"}
    assert "FAILED plain-stack 2 linear soap lr=0.01 seed=0" in capsys.readouterr().out
    ran.clear()
    runs.execute(["here"])
    assert [key.split()[3] for key in ran] == ["soap", "soap"], "what is done is not done again"


@pytest.mark.parametrize(
    ("error", "left"),
    [(MissingPackageError("method of the package x: none"), ["adamw", "adamw"]), (MissingDataError("no data"), [])],
)
def test_what_is_missing_is_named_once_and_left_out(folder, monkeypatch, capsys, error, left):
    def run(job):
        if job.method == "soap":
            raise error
        return _result(job)

    monkeypatch.setattr(runs, "run", run)
    monkeypatch.setitem(plan.GROUPS, "here", lambda: _jobs("soap", "adamw"))
    runs.execute(["here"])
    assert [row["method"] for row in _lines(folder / "runs.jsonl")] == left
    assert capsys.readouterr().out.count(f"left out: plain-stack, soap: {error}") == 1


def test_a_line_that_was_cut_off_is_done_again(folder, monkeypatch):
    monkeypatch.setattr(runs, "run", _result)
    monkeypatch.setitem(plan.GROUPS, "here", lambda: _jobs("adamw"))
    runs.execute(["here"])
    lines = (folder / "runs.jsonl").read_text(encoding="utf8").splitlines()
    (folder / "runs.jsonl").write_text(lines[0] + "\n" + lines[1][:30] + "\n", encoding="utf8")
    assert len(store.done()) == 1
    runs.execute(["here"])
    assert len(store.done()) == 2


def test_a_disk_that_is_full_keeps_the_run_for_the_next_line(folder, monkeypatch, capsys):
    monkeypatch.setattr(runs, "run", _result)
    monkeypatch.setitem(plan.GROUPS, "here", lambda: _jobs("adamw"))
    written, append = [], store.append_line

    def refusing(path, line):
        written.append(line)
        if len(written) == 1:
            raise OSError(28, "No space left on device")
        append(path, line)

    monkeypatch.setattr(store, "append_line", refusing)
    runs.execute(["here"])
    assert {row["seed"] for row in _lines(folder / "runs.jsonl")} == {0, 1}
    assert "No space left on device" in capsys.readouterr().out


def test_a_disk_that_stays_full_leaves_the_runs_in_the_log(folder, monkeypatch, capsys):
    def refusing(path, line):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs, "run", _result)
    monkeypatch.setattr(store, "append_line", refusing)
    monkeypatch.setattr(store, "_unwritten", [])
    monkeypatch.setitem(plan.GROUPS, "here", lambda: _jobs("adamw"))
    with pytest.raises(SystemExit, match=r"proof\.py: 2 lines are above, not in the file: .*No space left"):
        runs.execute(["here"])
    kept = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert {row["seed"] for row in kept} == {0, 1}
    assert not (folder / "runs.jsonl").exists()


def _entry(fresh, choosing=None):
    """A method's scores: one number, or one per seed."""
    if fresh is None:
        return {"fresh": None, "choosing": choosing}
    scores = fresh if isinstance(fresh, dict) else {"0": fresh}
    return {"fresh": {"median": statistics.median(scores.values()), "scores": scores}, "choosing": choosing}


def _ranked(higher, **methods):
    return numbers.ranked({"workload": "x", "higher_is_better": higher}, methods)


def test_ranks_compare_the_best_and_say_how_far_behind():
    row = _ranked(False, gso=_entry(1.02), soap=_entry(1.0))
    assert (row["first"], row["rank"], row["of"], row["margin"]) == ("soap", 2, 2, pytest.approx(-0.02))
    row = _ranked(True, gso=_entry(0.9), soap=_entry(0.8), muon=_entry(0.7))
    assert (row["first"], row["rank"], row["of"], row["margin"]) == ("gso", 1, 3, pytest.approx(0.125))
    row = _ranked(True, gso=_entry(0.6, 0.9), soap=_entry(None, 0.8))
    assert row["rank"] == 1, "on the seed that both have, GSO is ahead"
    row = _ranked(True, gso=_entry(0.6, 0.9), soap=_entry(None, 0.95), muon=_entry(0.7, 0.7))
    assert row["rank"] == 3 and row["first"] == "muon" and row["margin"] == pytest.approx(-0.1 / 0.7)
    assert _ranked(True, gso=_entry(None), soap=_entry(0.9))["rank"] is None
    assert _ranked(True, gso={**_entry(None), "lost": True}, soap=_entry(None, 0.1))["margin"] == -1.0


def test_ranks_count_the_shared_seeds_on_which_gso_is_ahead():
    row = _ranked(True, gso=_entry({"0": 0.9, "1": 0.5, "2": 0.7}), soap=_entry({"0": 0.8, "1": 0.6, "3": 0.1}))
    assert (row["ahead_on"], row["shared"]) == (1, 2)
    assert row["margin"] == pytest.approx(0.0), "the medians of the two shared seeds are equal"


def test_the_count_is_of_rows_that_are_first_or_near():
    row, near = _ranked(False, gso=_entry(1.03), soap=_entry(1.0)), _ranked(True, gso=_entry(0.99), soap=_entry(1.0))
    count = numbers.count_of([row, near, _ranked(True, gso=_entry(None), soap=_entry(0.9))])
    assert (count["rows"], count["first"], count["first_or_near"], count["share"]) == (2, 0, 1, 0.5)


def test_the_best_rate_is_that_of_the_choosing_seed_and_an_edge_asks_for_one_rate_more(folder, monkeypatch):
    worth = {0.003: 0.5, 0.001: 0.4, 0.01: 0.6}

    def run(job):
        return {"score": worth[job.lr], "diverged": False, "cpu_ms_a_step": 1.0}

    monkeypatch.setattr(runs, "run", run)
    jobs = plan.choosing(["control"], ["soap"])
    monkeypatch.setitem(plan.GROUPS, "here", lambda: jobs[:2])
    runs.execute(["here"])
    assert plan.best_rate(store.done(), "control", "soap") is None, "one rate has not run"
    monkeypatch.setitem(plan.GROUPS, "here", lambda: jobs)
    runs.execute(["here"])
    assert plan.best_rate(store.done(), "control", "soap") == 0.01
    assert [job.lr for job in plan.edges(["control"], ["soap"])] == [0.03]
    assert {job.seed for job in plan.confirming(["control"], ["soap"])} == set(plan.FRESH)


def test_the_picture_counts_the_rows_that_all_methods_have_run():
    rows = [
        {"higher_is_better": False, "methods": {"gso": _entry(1.0), "soap": _entry(1.1)}},
        {"higher_is_better": True, "methods": {"gso": _entry(0.9), "soap": _entry(1.0)}},
        {"higher_is_better": True, "methods": {"gso": _entry(0.1)}},
    ]
    distances, count = picture.profile(rows, ["gso", "soap"])
    assert count == 2
    assert distances["gso"] == pytest.approx([0.0, 0.1])
    assert distances["soap"] == pytest.approx([0.0, 0.1])


def test_the_page_and_its_picture_are_what_the_program_writes():
    made, text = json.loads(store.TABLES.read_text(encoding="utf8")), page.PAGE.read_text(encoding="utf8")
    assert page.filled(text, page.parts(made)) == text, "run benchmarks/proof.py page"
    assert picture.draw(made["rows"], numbers.COLUMNS) == page.PICTURE.read_text(encoding="utf8")


def test_costs_are_measured_in_turns_and_kept_beside_those_of_before(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(store, "COSTS", tmp_path / "costs.json")
    monkeypatch.setattr(costs, "ROUNDS", 2)
    monkeypatch.setattr(costs, "STRETCH", 1)
    monkeypatch.setattr(plan, "RATES", {name: plan.RATES[name] for name in ("muon", "adamw+clip1+warmup")})
    tiny = {"layers": 1, "width": 8, "heads": 2, "context": 8, "batch": 2}
    monkeypatch.setitem(plan.CASES, "small", plan.Case("small", "gpt", 5, tiny))
    turns, stretch = [], costs._stretch
    monkeypatch.setattr(costs, "_stretch", lambda *given: turns.append(given[2]) or stretch(*given))

    def missing(name):
        raise MissingDataError("no data")

    store.COSTS.write_text(json.dumps({"rows": {"before": 1}}), encoding="utf8")
    costs.main(["--rows", "small"])
    held = json.loads(store.COSTS.read_text(encoding="utf8"))["rows"]
    assert turns == [0, 0, 1, 1, 2, 2, 3, 3], "both take a stretch before either takes the next"
    assert held["before"] == 1 and set(held["small"]) == {"muon", "adamw+clip1+warmup"}
    assert len(held["small"]["muon"]["ms"]) == 2
    assert held["small"]["adamw+clip1+warmup"]["over_adamw"] == 1.0
    assert held["small"]["adamw+clip1+warmup"]["state_per_weight"] == pytest.approx(2.0, abs=0.1)
    monkeypatch.setattr(costs, "measure", missing)
    costs.main(["--rows", "small"])
    assert "left out: small: no data" in capsys.readouterr().out
