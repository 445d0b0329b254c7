"""The README's picture and the page of GSO's results are what their programs make of the runs of the driver."""

from __future__ import annotations

import json

import pytest

from benchmarks.gso import page, picture
from tests.architecture.sources import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "gso"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_picture_is_what_the_program_draws(theme):
    drawn = (RESULTS / f"beside-{theme}.svg").read_text(encoding="utf8")
    assert drawn == picture.draw(page.Runs(), picture.paces(), theme), "run benchmarks/gso.py picture"


def test_another_result_gives_another_picture():
    runs = page.Runs()
    before = picture.draw(runs, picture.paces(), "light")
    next(row for row in runs.rows if row["key"] == "gpt 500 linear adamw lr=0.01 seed=0")["score"] += 0.5
    assert picture.draw(runs, picture.paces(), "light") != before


def test_another_time_per_step_gives_another_picture():
    paces = picture.paces()
    slower = {**paces, "muon": 1.5 * paces["muon"]}
    assert picture.draw(page.Runs(), slower, "light") != picture.draw(page.Runs(), paces, "light")


def test_every_method_of_the_picture_has_its_lines():
    """Fresh seeds for the upper half, and the middle and both ends of a factor of 100 for the lower one."""
    runs = page.Runs()
    for drawn in picture.DRAWN:
        assert len(picture.fresh(runs, drawn)) >= 3, drawn.label
        rates = [round(x) for x, _ in picture.curve(runs, drawn)]
        assert {-1, 0, 1} <= set(rates) and len(rates) == 5, drawn.label


def test_the_page_of_results_is_what_its_program_makes_of_the_runs():
    text, data = page.made()
    assert (ROOT / "docs" / "results" / "gso.md").read_text(encoding="utf8") == text, "run benchmarks/gso.py page"
    assert (RESULTS / "proof.json").read_text(encoding="utf8") == data, "run benchmarks/gso.py page"


def test_a_worse_run_fails_its_bar(tmp_path):
    """A hot stack below .90 on one seed: the line of the bars says so."""
    lines = [json.loads(line) for line in (RESULTS / "runs.jsonl").read_text(encoding="utf8").splitlines()]
    for line in lines:
        if line["key"] == "residual-stack 900 linear gso lr=0.03 seed=12":
            line["score"] = 0.5
    changed = tmp_path / "runs.jsonl"
    changed.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf8")
    asked = "| hot residual stack | every seed at least 0.90 | lowest "
    assert f"{asked}0.922 | met |" in page.made()[0]
    assert f"{asked}0.500 | **not met** |" in page.made(changed)[0]
