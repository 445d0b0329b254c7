"""The table of PyTorch's own optimizer tests shows what was recorded; nothing fails that plain optimizers pass."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.architecture.sources import ROOT

RAW = json.loads((ROOT / "benchmarks/results/upstream_test_optim.json").read_text(encoding="utf8"))


def test_the_table_is_the_record():
    page = (ROOT / "docs/results/upstream.md").read_text(encoding="utf8")
    for name, count in RAW["counts"].items():
        assert f"| {name} | {count['passed']} | {count.get('failed', 0)} | {count.get('skipped', 0)} |" in page


@pytest.mark.parametrize("name", RAW["tests"])
def test_nothing_failed_that_the_plain_optimizer_passes(name):
    plain = RAW["tests"]["SGD" if name.startswith("SGD") else "AdamW"]
    failed = [test for test, outcome in RAW["tests"][name].items() if outcome == "failed"]
    assert [test for test in failed if plain.get(test) != "failed"] == []


def test_gso_passes_the_file_where_it_is_at_hand():
    """Set GRADSPLIT_UPSTREAM_TEST_OPTIM to the path of PyTorch's test/test_optim.py to run it."""
    path = os.environ.get("GRADSPLIT_UPSTREAM_TEST_OPTIM", "")
    if not Path(path).is_file():
        pytest.skip("PyTorch's test/test_optim.py is not in its wheel; set GRADSPLIT_UPSTREAM_TEST_OPTIM to its path")
    command = [sys.executable, str(ROOT / "benchmarks/upstream_test_optim.py"), path, "--subject", "GSO"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert " 0 failed" in done.stdout, done.stdout + done.stderr
