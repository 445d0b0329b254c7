"""benchmarks/gpu.py as a whole in its tiny setting on the CPU: every job, the files, and going on where it stopped."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

from tests.architecture.sources import ROOT


@pytest.fixture(scope="module")
def script():
    place = ROOT / "benchmarks" / "gpu.py"
    spec = importlib.util.spec_from_file_location("gpu_script", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


WORDS = ["--tiny", "--device", "cpu", "--seconds", "1"]


def test_every_job_runs_and_a_second_call_goes_on_where_the_first_one_stopped(script, tmp_path, capsys, monkeypatch):
    place = tmp_path / "made" / "gpu.json"
    words = [*WORDS, "--out", str(place)]
    assert script.main([*words, "--only", "a/eager/float32"]) == 0
    first = json.loads(place.read_text())["jobs"]
    assert len(first) == 4
    monkeypatch.setattr(script, "kernel_job", lambda setting, backend, dtype, strides: {"again": True})
    assert script.main(words) == 0, capsys.readouterr().out
    found = json.loads(place.read_text())
    jobs = found["jobs"]
    assert {name[0] for name in jobs} == set("abcd")
    assert {name: jobs[name] for name in first} == first, "a job that was done was done again"
    assert sum(job.get("again", False) for job in jobs.values()) == 28
    assert not [name for name, job in jobs.items() if "failed" in job]
    assert found["about"]["device"] == "cpu" and found["about"]["torch"] == torch.__version__
    curves = [job["curve"] for name, job in jobs.items() if name.startswith("d/")]
    assert len(curves) == 6
    assert all(curve[0][0] == 0 and curve[-1][0] == 6 for curve in curves)
    page = place.with_suffix(".md").read_text()
    assert all(title in page for title in ("Equal to the definition", "Nothing waits", "What a step costs", "Training"))
    said = capsys.readouterr().out
    assert f"{len(jobs)} jobs, 0 failed" in said


def test_a_job_that_fails_is_named_and_the_others_go_on(script, tmp_path, capsys, monkeypatch):
    def job(setting, backend, dtype, strides):
        if strides == "turned":
            raise ValueError("a planted fault")
        return {"squares_ulp": 1.0, "scaled_ulp": 0.5}

    monkeypatch.setattr(script, "kernel_job", job)
    place = tmp_path / "gpu.json"
    words = [*WORDS, "--out", str(place), "--only", "a/eager/float32"]
    assert script.main(words) == 1
    assert "a/eager/float32/turned: ValueError: a planted fault" in capsys.readouterr().out
    assert len(json.loads(place.read_text())["jobs"]) == 4
    assert "a planted fault" in place.with_suffix(".md").read_text()
    monkeypatch.setattr(script, "kernel_job", lambda setting, backend, dtype, strides: {"mended": True})
    assert script.main(words) == 0
    jobs = json.loads(place.read_text())["jobs"]
    assert [name for name, found in jobs.items() if "mended" in found] == ["a/eager/float32/turned"]


def test_results_of_another_machine_are_kept_apart(script, tmp_path, monkeypatch):
    place = tmp_path / "gpu.json"
    place.write_text(json.dumps({"about": {"card": "another"}, "jobs": {"a/eager/float32/turned": {"took": 1}}}))
    monkeypatch.setattr(script, "kernel_job", lambda setting, backend, dtype, strides: {"here": True})
    assert script.main([*WORDS, "--out", str(place), "--only", "a/eager/float32/turned"]) == 0
    assert json.loads(place.with_suffix(".before.json").read_text())["about"] == {"card": "another"}
    assert json.loads(place.read_text())["jobs"]["a/eager/float32/turned"]["here"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a graphics card here")
def test_without_a_card_it_says_so_and_ends_with_0(script, tmp_path, capsys):
    assert script.main(["--out", str(tmp_path / "gpu.json")]) == 0
    assert "skipped, torch sees no graphics card" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("column", [0, 1])
def test_the_loss_between_two_looks_is_on_the_line(column):
    from benchmarks.gpu.page import _at

    curve = [[0, 0.0, 5.0], [10, 2.0, 3.0], [20, 4.0, 2.0]]
    assert _at(curve, column, (5, 1.0)[column]) == pytest.approx(4.0)
    assert _at(curve, column, (15, 3.0)[column]) == pytest.approx(2.5)
    assert _at(curve, column, 99) == 2.0
