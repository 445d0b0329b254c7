"""PyTorch's own optimizer tests, unmodified, on GSO and on optimizers with a splitter attached.

The file comes with PyTorch's sources, not with its wheel: pass the path of `test/test_optim.py` of any release, for
example from a checkout or from Debian's source package. Needs the packages expecttest and parameterized. Every subject
runs in a process of its own, since the file reads the list of optimizers when it is imported.

Run: python benchmarks/upstream_test_optim.py PATH/test/test_optim.py --out benchmarks/results/upstream_test_optim.json
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import types
import unittest
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import torch

import gradsplit as gs

INF = float("inf")


def _split(base: type, **options: object) -> type:
    """The optimizer, with a splitter attached to every one that is made."""

    def make(self, params, *args, **kwargs):
        base.__init__(self, params, *args, **kwargs)
        owners = [p for group in self.param_groups for p in group["params"]]
        pairs = [(f"p{i}", p) for i, p in enumerate(owners) if p.requires_grad]
        if len({p.device for _, p in pairs}) == 1:  # a splitter is for one device
            gs.GradientSplitter(pairs, **options).attach(self)

    return type(base.__name__, (base,), {"__init__": make})


def _unbounded(base: type) -> type:
    """GSO with limits of inf, which is AdamW."""

    def make(self, params, lr=1e-3, **options):
        gs.GSO.__init__(self, params, lr, **{"budget": gs.Fixed(INF), **options}, direction="adam")

    return type(base.__name__, (gs.GSO,), {"__init__": make})


def _by_adam(base: type) -> type:
    """GSO with Adam's direction."""

    def make(self, params, lr=1e-2, **options):
        gs.GSO.__init__(self, params, lr, **options, direction="adam")

    return type(base.__name__, (gs.GSO,), {"__init__": make})


SUBJECTS = {
    "AdamW": (torch.optim.AdamW, None),
    "GSO": (torch.optim.AdamW, lambda base: type(base.__name__, (gs.GSO,), {})),
    'GSO, direction="adam"': (torch.optim.AdamW, _by_adam),
    "GSO, unbounded": (torch.optim.AdamW, _unbounded),
    "AdamW + splitter, unbounded": (torch.optim.AdamW, lambda base: _split(base, budget=gs.Fixed(INF))),
    "AdamW + splitter, Relative(0.2)": (torch.optim.AdamW, lambda base: _split(base, budget=gs.Relative(0.2))),
    "SGD": (torch.optim.SGD, None),
    "SGD + splitter, unbounded": (torch.optim.SGD, lambda base: _split(base, budget=gs.Fixed(INF))),
    "SGD + splitter, default": (torch.optim.SGD, lambda base: _split(base)),
}
"""Name -> whose entry of upstream's list is taken, and what stands in for the optimizer.

A stand-in bears the optimizer's name, since the file makes an exception for AdamW's default decay by name.
"""


def _entry(common: types.ModuleType, name: str) -> object:
    base, stand_in = SUBJECTS[name]
    (listed,) = [info for info in common.optim_db if info.optim_cls is base]
    entry = copy.copy(listed)
    if stand_in is None:
        return entry
    entry.optim_cls = stand_in(base)
    if issubclass(entry.optim_cls, gs.GSO):  # it has no amsgrad and refuses foreach
        inputs, errors = entry.optim_inputs_func, entry.optim_error_inputs_func
        entry.optim_inputs_func = lambda *a, **k: [i for i in inputs(*a, **k) if "amsgrad" not in i.kwargs]
        entry.optim_error_inputs_func = lambda *a, **k: [
            e for e in errors(*a, **k) if "foreach" not in e.optimizer_error_input.kwargs
        ]
        entry.supported_impls = tuple(i for i in entry.supported_impls if i != "foreach")
    if name == "GSO":  # a flag that it refuses; a complex matrix is made orthogonal whole
        entry.supported_impls = tuple(i for i in entry.supported_impls if i != "differentiable")
        whole = unittest.skip("a complex matrix is made orthogonal whole, and its parts are another matrix")
        entry.decorators += (common.DecorateInfo(whole, "TestOptimRenewed", "test_complex"),)
    if not name.endswith("unbounded"):
        together = unittest.skip("real and imaginary part of a number are bounded together, in one bin")
        entry.decorators += (common.DecorateInfo(together, "TestOptimRenewed", "test_complex_2d"),)
        if entry.optim_cls.__mro__[1] is base:  # a vector of complex numbers is one bin, of pairs of numbers many
            entry.decorators += (common.DecorateInfo(together, "TestOptimRenewed", "test_complex"),)
    return entry


def run(path: Path, name: str, report: Path) -> int:
    """Run the file with one subject as its only optimizer."""
    import pytest
    from torch.testing._internal import common_optimizers as common

    common.optim_db[:] = [_entry(common, name)]
    # The file passes on the tests of three others, which are about torch's own classes.
    sys.modules["optim"] = types.ModuleType("optim")
    for module, cls in (
        ("test_lrscheduler", "TestLRScheduler"),
        ("test_optim", "TestDifferentiableOptimizer"),
        ("test_swa_utils", "TestSWAUtils"),
    ):
        sys.modules[f"optim.{module}"] = stub = types.ModuleType(f"optim.{module}")
        setattr(stub, cls, type(cls, (), {}))
    ours = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-c", os.devnull, f"--rootdir={path.parent}"]
    return int(pytest.main([*ours, "-W", "ignore", f"--junitxml={report}", str(path)]))


def outcomes(report: Path) -> dict[str, str]:
    """Return each test's outcome."""
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        name = f"{case.get('classname', '').rpartition('.')[2]}.{case.get('name')}"
        found[name] = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
    return found


def main() -> None:
    """Run every subject, print a table, keep every outcome."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="test/test_optim.py of PyTorch's sources")
    parser.add_argument("--subject", choices=SUBJECTS, action="append")
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    if asked.report:
        sys.exit(run(asked.path.resolve(), asked.subject[0], asked.report))
    tests = {}
    for name in asked.subject or SUBJECTS:
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            command = [sys.executable, __file__, str(asked.path), "--subject", name, "--report", str(report)]
            environment = {**os.environ, "PYTORCH_TESTING_DEVICE_ONLY_FOR": "cpu"}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if not report.is_file():
                sys.exit(f"{name}: no test ran\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
            tests[name] = outcomes(report)
        count = Counter(tests[name].values())
        print(f"{name}: {count['passed']} passed, {count['failed']} failed, {count['skipped']} skipped", flush=True)
        for test, outcome in tests[name].items():
            if outcome == "failed":
                print(f"  {test}")
        if asked.subject and not asked.out:
            print(done.stdout[-60000:])
    if asked.out:
        about = {
            "command": "python benchmarks/upstream_test_optim.py PATH/test/test_optim.py",
            "date": datetime.date.today().isoformat(),
            "machine": f"{platform.machine()}, CPU, 2 cores, torch {torch.__version__}",
        }
        counts = {name: dict(Counter(found.values())) for name, found in tests.items()}
        asked.out.write_text(json.dumps({"about": about, "counts": counts, "tests": tests}, indent=1) + "\n", "utf8")


if __name__ == "__main__":
    main()
