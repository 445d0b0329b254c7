"""The README's picture and the page of GSO's results are what their programs make of the runs of the driver."""

from __future__ import annotations

import importlib.util
import json

import pytest

from tests.architecture.sources import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "gso"
BESIDE = json.loads((RESULTS / "beside.json").read_text(encoding="utf8"))
NAMES = ("task", "steps", "options", "method", "lr", "method_options", "fault", "schedule")


def _module(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def program():
    return _module("gso_picture")


@pytest.fixture(scope="module")
def page():
    return _module("gso_page")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_picture_is_what_the_program_draws(program, theme):
    drawn = (RESULTS / f"beside-{theme}.svg").read_text(encoding="utf8")
    assert drawn == program.draw(BESIDE, theme), "run benchmarks/gso_picture.py"


def test_another_result_gives_another_picture(program):
    changed = json.loads(json.dumps(BESIDE))
    program.cell_of(changed, "adamw", 0.01, {}, 500)["choosing"]["scores"][0] += 0.5
    assert program.draw(changed, "light") != program.draw(BESIDE, "light")


def test_another_time_per_step_gives_another_picture(program):
    changed = json.loads(json.dumps(BESIDE))
    changed["cpu_ms_per_step"]["muon"] *= 1.5
    assert program.draw(changed, "light") != program.draw(BESIDE, "light")


def test_kept_scores_are_those_of_the_driver():
    """A run that stands in both files has one score."""
    lines = [json.loads(line) for line in (RESULTS / "runs.jsonl").read_text(encoding="utf8").splitlines()]
    known = {json.dumps([[line[n] for n in NAMES], line["seed"]]): line["score"] for line in lines}
    compared = 0
    for cell in BESIDE["cells"]:
        for part in (cell["choosing"], cell["fresh"]):
            for seed, score in zip(part["seeds"], part["scores"], strict=True):
                found = known.get(json.dumps([[cell[n] for n in NAMES], seed]))
                assert found in (None, score), f"{cell['task']} {cell['method']} seed {seed}: {score}, not {found}"
                compared += found is not None
    assert compared >= 10


def test_the_page_of_results_is_what_its_program_makes_of_the_runs(page):
    text, data = page.made()
    assert (ROOT / "docs" / "results" / "gso.md").read_text(encoding="utf8") == text, "run benchmarks/gso_page.py"
    assert (RESULTS / "proof.json").read_text(encoding="utf8") == data, "run benchmarks/gso_page.py"


def test_a_worse_run_fails_its_bar(page, tmp_path):
    """A hot stack below .90 on one seed: the line of the bars says so."""
    lines = [json.loads(line) for line in (RESULTS / "runs.jsonl").read_text(encoding="utf8").splitlines()]
    for line in lines:
        if line["key"] == "residual-stack 900 linear gso lr=0.03 seed=12":
            line["score"] = 0.5
    changed = tmp_path / "runs.jsonl"
    changed.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf8")
    asked = "| hot residual stack | every seed at least 0.90 | lowest "
    assert f"{asked}0.928 | met |" in page.made()[0]
    assert f"{asked}0.500 | **not met** |" in page.made(changed)[0]
