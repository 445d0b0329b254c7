"""The queue of the proof: what is missing or dies is named, and the rest of the queue goes on."""

from __future__ import annotations

import json

import pytest

from benchmarks import proof, proof_page
from gradsplit.lab.task import MissingDataError, MissingPackageError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(proof, "RUNS", tmp_path / "runs.jsonl")
    monkeypatch.setattr(proof, "FAILED", tmp_path / "failed.jsonl")
    return tmp_path


def _jobs(*methods, workload="plain-stack"):
    return [proof.Job(workload, 2, method, 0.01, seed) for seed in (0, 1) for method in methods]


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

    monkeypatch.setattr(proof, "run", run)
    monkeypatch.setitem(proof.GROUPS, "here", lambda: _jobs("adamw", "soap"))
    proof.execute(["here"])
    assert [row["method"] for row in _lines(folder / "runs.jsonl")] == ["adamw", "adamw"]
    assert {row["why"] for row in _lines(folder / "failed.jsonl")} == {"ZeroDivisionError: planted"}
    assert "FAILED plain-stack 2 linear soap lr=0.01 seed=0" in capsys.readouterr().out
    ran.clear()
    proof.execute(["here"])
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

    monkeypatch.setattr(proof, "run", run)
    monkeypatch.setitem(proof.GROUPS, "here", lambda: _jobs("soap", "adamw"))
    proof.execute(["here"])
    assert [row["method"] for row in _lines(folder / "runs.jsonl")] == left
    assert capsys.readouterr().out.count(f"left out: plain-stack, soap: {error}") == 1


def test_a_line_that_was_cut_off_is_done_again(folder, monkeypatch):
    monkeypatch.setattr(proof, "run", _result)
    monkeypatch.setitem(proof.GROUPS, "here", lambda: _jobs("adamw"))
    proof.execute(["here"])
    lines = (folder / "runs.jsonl").read_text(encoding="utf8").splitlines()
    (folder / "runs.jsonl").write_text(lines[0] + "\n" + lines[1][:30] + "\n", encoding="utf8")
    assert len(proof.done()) == 1
    proof.execute(["here"])
    assert len(proof.done()) == 2


def test_a_disk_that_is_full_keeps_the_run_for_the_next_line(folder, monkeypatch, capsys):
    monkeypatch.setattr(proof, "run", _result)
    monkeypatch.setitem(proof.GROUPS, "here", lambda: _jobs("adamw"))
    written, append = [], proof.append_line

    def refusing(path, line):
        written.append(line)
        if len(written) == 1:
            raise OSError(28, "No space left on device")
        append(path, line)

    monkeypatch.setattr(proof, "append_line", refusing)
    proof.execute(["here"])
    assert {row["seed"] for row in _lines(folder / "runs.jsonl")} == {0, 1}
    assert "No space left on device" in capsys.readouterr().out


def test_ranks_compare_the_best_and_say_how_far_behind():
    def entry(fresh, choosing=None):
        spread = (
            {"median": fresh, "min": fresh, "max": fresh, "seeds": [0], "scores": {"0": fresh}}
            if fresh is not None
            else None
        )
        return {"fresh": spread, "choosing": choosing}

    def ranked(higher, **methods):
        return proof_page._ranked("x", "score", higher, 5, "proof", methods)

    row = ranked(False, gso=entry(1.02), soap=entry(1.0))
    assert (row["first"], row["rank"], row["of"], row["behind"]) == ("soap", 2, 2, pytest.approx(0.02))
    row = ranked(True, gso=entry(0.9), soap=entry(0.8), muon=entry(0.7))
    assert (row["first"], row["rank"], row["of"], row["behind"]) == ("gso", 1, 3, 0.0)
    row = ranked(True, gso=entry(0.6, 0.9), soap=entry(None, 0.8))
    assert row["rank"] == 1, "on the seed that both have, GSO is ahead"
    row = ranked(True, gso=entry(0.6, 0.9), soap=entry(None, 0.95), muon=entry(0.7, 0.7))
    assert row["rank"] == 3 and row["first"] == "muon" and row["behind"] == pytest.approx(0.1 / 0.7)
    assert ranked(True, gso=entry(None), soap=entry(0.9))["rank"] is None
    assert ranked(True, gso={**entry(None), "lost": True}, soap=entry(None, 0.1))["behind"] == 1.0
    near = ranked(True, gso=entry(0.99), soap=entry(1.0))
    count = proof_page.count_of([row, near, ranked(True, gso=entry(None), soap=entry(0.9))])
    assert (count["rows"], count["first"], count["first_or_near"], count["share"]) == (2, 0, 1, 0.5)
