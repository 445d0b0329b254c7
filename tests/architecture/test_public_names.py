"""The public names are a promise: a change of the list is seen, and is written down for users."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys

import pytest

import gradsplit
from tests.architecture.sources import ROOT

SNAPSHOT = ROOT / "tests" / "architecture" / "public_names.txt"


def _names() -> list[str]:
    return SNAPSHOT.read_text(encoding="utf8").split()


def test_the_list_is_the_one_on_record():
    assert len(set(gradsplit.__all__)) == len(gradsplit.__all__), "a name stands in __all__ twice"
    assert sorted(gradsplit.__all__) == _names(), (
        "The public names changed. If that is meant: change tests/architecture/public_names.txt, and say in "
        "CHANGELOG.md what a user has to do."
    )


@pytest.mark.parametrize("name", _names())
def test_every_public_name_is_in_the_changelog(name):
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf8")
    assert re.search(rf"`(gs\.)?{name}\b", changelog), f"CHANGELOG.md does not mention `{name}`"


@pytest.mark.parametrize("name", _names())
def test_every_public_name_is_described(name):
    thing = getattr(gradsplit, name)
    if name.startswith("__") or not callable(thing):
        return
    described = inspect.getdoc(thing)
    assert described, f"gradsplit.{name} has no docstring"


_USED_AS_NAMED = """
import gradsplit as gs
assert gs.chain.Unrolled and gs.optim.directions.register and gs.budget.register and gs.sources.RunningLimit
assert "watch" not in dir(gs)
import inspect
for _ in range(2):  # the second time the package has taken the function's place
    assert list(inspect.signature(gs.diagnose).parameters)[:3] == ["model", "loss_fn", "batch"]
gs.GSOO
"""


def test_a_room_that_an_error_names_is_there_and_a_slip_is_told_of():
    done = subprocess.run([sys.executable, "-c", _USED_AS_NAMED], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1].startswith("AttributeError: module 'gradsplit' has no attribute 'GSOO'")
    assert "Did you mean: 'GSO'?" in done.stderr
