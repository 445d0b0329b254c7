"""A training that is killed at random moments ends, resumed, with the same weights bit for bit, and loses no record."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.architecture.sources import ROOT


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the campaign forks and kills, which needs a POSIX system")
def test_a_few_kills_of_the_campaign_lose_nothing(tmp_path):
    out = tmp_path / "kill.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "kill.py"), "--kills", "5", "--fresh", "1", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads(out.read_text(encoding="utf8"))["counts"]
    assert counts["kills"] == counts["files_opened"] == 5 and counts["rows_acknowledged"] > 0
    assert [counts[name] for name in ("wrong_ends", "checkpoints_lost", "files_broken", "rows_lost")] == [0, 0, 0, 0]


def test_the_count_in_the_documentation_is_the_one_in_the_raw_file():
    raw = json.loads((ROOT / "benchmarks" / "results" / "kill.json").read_text(encoding="utf8"))
    text = (ROOT / "docs/results/guard.md").read_text(encoding="utf8")
    counts = raw["counts"]
    assert f"| kills | {counts['kills']} |" in text
    assert f"| ends with other weights, of {counts['trainings']} | {counts['wrong_ends']} |" in text
    assert f"| records lost, of {counts['rows_acknowledged']:,} acknowledged | {counts['rows_lost']} |" in text
    assert f"| kills inside the writing of a checkpoint | {counts['torn_writes']} |" in text
    assert f"| run files that did not open | {counts['files_broken']} |" in text
    assert f"| checkpoints lost | {counts['checkpoints_lost']} |" in text
