"""The examples of samples and terms run, and show what they promise."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.architecture.sources import ROOT

# Per example: its short run, and the numbers of the ordinary and the split run that it prints.
EXAMPLES = {
    "pinn_helmholtz": ("500", r"relative error (\S+)", 0.5),
    "regression_bad_rows": ("300", r"RMSE on clean rows (\S+)", 0.9),
    "digits_blank_images": ("80", r"accuracy (\S+)", None),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs_and_splitting_is_better(name, tmp_path):
    steps, pattern, share = EXAMPLES[name]
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), "--steps", steps]
    plot = tmp_path / "plot.html"
    if name == "pinn_helmholtz":
        command += ["--plot", str(plot)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ordinary, split = map(float, re.findall(pattern, done.stdout))
    assert split > 0.9 > ordinary if share is None else split < share * ordinary, done.stdout
    assert plot.exists() == (name == "pinn_helmholtz")
    if name == "digits_blank_images":
        named, right, there = map(
            int, re.search(r"(\d+) images were named, (\d+) of them blank; (\d+)", done.stdout).groups()
        )
        assert named == right <= there
