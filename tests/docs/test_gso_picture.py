"""The README's picture is what its program draws from the kept runs, and these are runs of the driver."""

from __future__ import annotations

import importlib.util
import json

import pytest

from tests.architecture.sources import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "gso"
BESIDE = json.loads((RESULTS / "beside.json").read_text(encoding="utf8"))
NAMES = ("task", "steps", "options", "method", "lr", "method_options", "fault", "schedule")


@pytest.fixture(scope="module")
def program():
    spec = importlib.util.spec_from_file_location("gso_picture", ROOT / "benchmarks" / "gso_picture.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
