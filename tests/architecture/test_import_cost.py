"""Every public name of gradsplit brings torch and numpy, and nothing else that a user has not imported."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.architecture.sources import ROOT

_PROBE = """
import json, sys
import numpy, torch
before = set(sys.modules)
import gradsplit
for name in gradsplit.__all__:
    getattr(gradsplit, name)
new = set(sys.modules) - before
packages = {name.split(".")[0] for name in new} - {name.split(".")[0] for name in before}
print(json.dumps({
    "packages": sorted(
        name for name in packages - set(sys.stdlib_module_names) - {"gradsplit"} if "cython" not in name
    ),  # Cython's runtime names itself a module in whatever extension needs it

    "parts": sorted({name.split(".")[1] for name in new if name.startswith("gradsplit.")}),
}))
"""


def _run(program: str) -> dict[str, list[str]]:
    """What the program prints, from a process of its own: this one has imported everything already."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_public_names_bring_no_framework_but_torch_and_no_heavy_part():
    loaded = _run(_PROBE)
    assert loaded["packages"] == [], "import these where they are called"
    heavy = {"cli", "lab", "watch", "integrations"} & set(loaded["parts"])
    assert not heavy, f"import these parts where they are called: {sorted(heavy)}"


def test_the_probe_notices_a_package_and_a_part():
    loaded = _run(_PROBE.replace("import gradsplit\n", "import gradsplit, rich, gradsplit.cli\n"))
    assert "rich" in loaded["packages"]
    assert "cli" in loaded["parts"]
