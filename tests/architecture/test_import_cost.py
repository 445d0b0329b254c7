"""Every public name of gradsplit brings torch and numpy, and nothing else that a user has not imported."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.architecture.sources import ROOT

_NEWCOMERS = """
import json, sys
import numpy, torch
before = {name.split(".")[0] for name in sys.modules}
import gradsplit
for name in gradsplit.__all__:
    getattr(gradsplit, name)
after = {name.split(".")[0] for name in sys.modules}
print(json.dumps(sorted(after - before - set(sys.stdlib_module_names) - {"gradsplit"})))
"""

_PARTS = """
import json, sys
import gradsplit
for name in gradsplit.__all__:
    getattr(gradsplit, name)
print(json.dumps(sorted(name for name in sys.modules if name.startswith("gradsplit."))))
"""


def _run(program: str) -> list[str]:
    """The list that the program prints, from a process of its own: this one has imported everything."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_no_framework_but_torch_and_no_numba():
    assert _run(_NEWCOMERS) == []


def test_no_workload_command_line_or_report():
    heavy = ("gradsplit.cli", "gradsplit.workloads", "gradsplit.report", "gradsplit.integrations")
    loaded = [name for name in _run(_PARTS) if name.startswith(heavy)]
    assert loaded == [], f"import these where they are called: {loaded}"


def test_the_probe_notices_a_framework():
    assert "numba" in _run(_NEWCOMERS.replace("import gradsplit", "import gradsplit, numba"))
