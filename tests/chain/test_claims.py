"""The numbers in the documents of the chain are those of the raw results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.attribution import as_markdown
from benchmarks.chain.tables import measured

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def test_the_table_of_attribution_is_the_raw_results() -> None:
    data = json.loads((RESULTS / "attribution.json").read_text())
    page = (ROOT / "docs/results/diagnose.md").read_text()
    assert as_markdown(data) in page
    assert f"{data['right']} of {data['faults']} planted faults" in page
    assert f"{data['false_alarms']} of {data['healthy']} healthy nets" in page
    assert data["right"] == sum(row["right"] for row in data["rows"]) and data["faults"] == len(data["rows"])
    assert data["right"] >= 0.95 * data["faults"] and data["false_alarms"] == 0


@pytest.mark.parametrize("path", sorted(RESULTS.glob("chain_*.json")), ids=lambda path: path.stem)
def test_every_result_says_how_it_was_made(path: Path) -> None:
    data = json.loads(path.read_text())
    assert "benchmarks/chain_tasks.py" in data["command"]
    assert {"date", "cpu", "threads", "torch", "source"} <= data["conditions"].keys()


def test_the_measured_section_is_the_raw_results() -> None:
    assert measured() in (ROOT / "docs/results/chain.md").read_text()
