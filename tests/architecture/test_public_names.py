"""The public names are a promise: a change of the list is seen, and is written down for users."""

from __future__ import annotations

import inspect
import re

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
